"""Ballbot-v0 on a GPU: thousands of robots, simulated and rendered by MuJoCo Warp, with PyTorch tensors in and out.

`gym.make_vec("BallbotWarp-v0", num_envs=4096, device="cuda")` has the task of `gym.make_vec("Ballbot-v0", ...)`, whose
specification is in ballbot_env.py. It needs `pip install -r requirements-gpu.txt`. With device="cpu" it runs the same
kernels on the CPU, slowly, for tests.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

try:
    import warp as wp

    wp.config.log_level = wp.LOG_WARNING  # otherwise it prints a line for each kernel
    wp.init()
    import mujoco_warp as mjw
except ImportError:
    raise ImportError("BallbotWarp-v0 needs MuJoCo Warp: pip install -r requirements-gpu.txt") from None

from ballbot_env import MAX_EPISODE_STEPS, START_EXTENT, get_ends, get_reward_terms, load_reward
from ballbot_utils.arguments import ARGUMENTS, check_arguments, check_options
from ballbot_utils.checks import check_value
from ballbot_utils.commands import COMMAND_STEPS, MAX_COMMAND, STANDING_FRACTION
from ballbot_utils.depth import MAX_DEPTH, STEEPEST_BLOCK, DepthRenderer, steepest_blocks
from ballbot_utils.geometry import heading_then_tilt, rotation_matrix
from ballbot_utils.model import BALL_RADIUS, BALL_START, BASE_START, CAMERAS, MAX_TORQUE, TIMESTEP, make_model
from ballbot_utils.observations import NOISE_WIDTH, add_sensor_noise, make_observations, make_space
from ballbot_utils.physics import state_columns
from ballbot_utils.randomization import NUM_HEIGHT_SCALES, PUSH_STEPS, RANDOMIZATION, check_randomization, height_scales
from ballbot_utils.terrain import CELL, TERRAIN_EXTENT, Terrain

CONTACTS_PER_ROBOT, CONSTRAINTS_PER_ROBOT = 10, 32  # room for them; 3 rollers and up to 4 contacts with the ground


class BallbotWarpEnv(gym.vector.VectorEnv):
    """Many ballbots on one device: the task, arguments and spaces of `BallbotVectorEnv`, with tensors on the device.

    Observations, rewards, terminations, truncations and infos are tensors that the next step overwrites: clone what is
    to be kept. A step does not wait for the device, and on a GPU it is one CUDA graph for the physics of an action and
    two for the rest. What differs from `BallbotVectorEnv`:

    - An episode that ends is followed by the next one's first observation (SAME_STEP). `info["final_obs"]` has the last
      observations of all robots, as a dict of tensors, whether they ended or not. `info["episode"]` has return `r` and
      length `l` of all robots' present or just ended episodes; `_episode` marks the ended ones.
    - Robot i is seeded with seed + i, and no robot's samples depend on the others. They are not those of the CPU's
      environments: the same distributions, other numbers. The same seed gives the same bits on the same device, as far
      as Warp's atomic additions do: on the CPU always, on a GPU not always.
    - Physics is float32, and Warp keeps at most four contacts between ball and height field.
    - `info` does not name the kind of terrain under the robot. There is no `curriculum`.
    - `num_threads`, `render_mode`, `copy` and `autoreset_mode` do not exist. `contacts` and `constraints` are the room
      for them per robot. If it is exceeded, a later step raises a RuntimeError.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        terrain: str | Callable | np.ndarray = "perlin",
        terrain_seed: int = 0,
        terrain_amplitude: float = 0.1,
        cameras: bool = True,
        camera_size: int = 64,
        camera_rate: float = 90.0,
        camera_pitch: float = 0.0,
        wheel_damping: float = 0.4,
        frame_skip: int = 1,
        max_episode_steps: int | None = None,
        max_tilt: float = 20.0,
        goal: Sequence[float] | str = (0.0, 1.0),
        forward_reward_weight: float = 0.01,
        ctrl_cost_weight: float = 0.0001,
        healthy_reward: float = 0.02,
        reward: Callable | str | None = None,
        randomization: Mapping[str, float] | None = None,
        curriculum: bool = False,
        device: str | torch.device = "cuda",
        contacts: int = CONTACTS_PER_ROBOT,
        constraints: int = CONSTRAINTS_PER_ROBOT,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in ARGUMENTS}
        check_arguments(given)
        check_value(not curriculum, "curriculum", curriculum, "False, as BallbotWarp-v0 has no levels")
        self.num_envs, self.frame_skip = num_envs, frame_skip
        self.device = device = torch.empty(0, device=device).device
        self.randomization = check_randomization(randomization, terrain, max_tilt)
        limit = MAX_EPISODE_STEPS if max_episode_steps is None else max_episode_steps
        self.max_episode_steps = math.inf if limit == -1 else limit  # actions
        self._max_tilt, self._max_sin2_half_tilt = max_tilt, math.sin(math.radians(max_tilt) / 2) ** 2
        self.reward_weights = forward_reward_weight, ctrl_cost_weight, healthy_reward
        self.frame_interval = math.ceil(1 / (camera_rate * TIMESTEP) - 1e-9)

        present = {"", "cameras" * cameras, "command" * isinstance(goal, str)}
        table = make_observations(camera_size, self.frame_interval)
        self._observations = {name: row for name, row in table.items() if row.needs in present}
        self.single_observation_space = make_space(self._observations)
        self.single_action_space = spaces.Box(-1, 1, (3,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self.terrain = Terrain(terrain, terrain_seed, terrain_amplitude)
        strength = self.randomization.get("terrain_amplitude")
        scales = height_scales(strength) if strength else (1.0,)
        self.model = make_model(self.terrain, wheel_damping, scales, camera_pitch)
        with self._scope():
            self.robots = WarpRobots(self.model, num_envs, frame_skip, self.randomization, contacts, constraints)
            self._ground = Ground(self.terrain, device)
            starts = self.terrain.find_starts(2 * (-START_EXTENT,), 2 * (START_EXTENT,))
            self._starts = None if starts is None else torch.tensor(starts, dtype=torch.float32, device=device)
            self._random = Random(num_envs, device)
            self.frames = self._renderer = None
            if cameras:
                self._renderer = WarpDepthRenderer(self.model, camera_size, self._ground, num_envs)
                self.frames = self._renderer.frames
        self._graphs = None  # captured by the first step on a GPU

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(num_envs, *shape, dtype=dtype, device=device)

        self.goal = self.commands = None
        if goal == "command":
            self.commands = zeros(2)
        else:
            self.goal = torch.tensor(np.asarray(goal, float) / math.hypot(*goal), dtype=torch.float32, device=device)
        self._ahead = torch.tensor([[0], [0.3], [0.6]], device=device)  # m
        self.last_actions, self._actions = zeros(3), zeros(3)
        self._sampled = {name: zeros(*RANDOMIZATION[name].shape) for name in self.randomization
                         if RANDOMIZATION[name].sample}  # fmt: skip
        self._height_scales = torch.tensor(scales, dtype=torch.float32, device=device)
        whole = dict(dtype=torch.int64)
        # All that the future depends on, besides the physics
        self._state = {
            "clock": zeros(**whole), "observed_at": zeros(**whole), "frame_time": zeros(**whole),
            "steps": zeros(**whole), "returns": zeros(), "physics_errors": zeros(**whole),
            "last_actions": self.last_actions,
            "commands_due": zeros(**whole), "key": self._random.key, "counter": self._random.counter,
            "queue": zeros(int(self.randomization.get("latency", 0)), 3), "next_push": zeros(**whole),
            "push_left": zeros(**whole), "noise": zeros(NOISE_WIDTH),
        }  # fmt: skip
        self._state |= {"commands": self.commands} if self.commands is not None else {}
        self._state |= {"frames": self.frames} if cameras else {}
        self._state |= {f"sampled_{name}": value for name, value in self._sampled.items()} | self.robots.state
        self.physics_errors = self._state["physics_errors"]
        self._reward = load_reward(reward, self, zeros(3))
        self._needs_reset = True
        self._overflow = torch.zeros(num_envs, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    def _scope(self):
        """A block in which Warp uses this environment's device, and PyTorch's present stream."""
        if self.device.type == "cpu":
            return wp.ScopedDevice("cpu")
        return wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(self.device)))

    # Gymnasium's interface

    def reset(self, *, seed: int | Sequence | None = None, options: Mapping | None = None) -> tuple[dict, dict]:
        """Start new episodes. Returns `(observation, info)`. `seed` and `options` are those of `BallbotVectorEnv`."""
        options = dict(options or {})
        everywhere = np.ones(self.num_envs, bool)
        mask = np.asarray(options.pop("reset_mask", everywhere))
        check_value(mask.dtype == bool and mask.shape == (self.num_envs,) and mask.any(), "reset_mask", mask,
                       f"a bool array ({self.num_envs},), somewhere True")  # fmt: skip
        if self._needs_reset and not mask.all():
            raise gym.error.ResetNeeded("call reset() without a reset_mask first")
        options = check_options(options, self.num_envs, self._max_tilt)
        options = {
            name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in options.items()
        }
        if seed is None and self._needs_reset:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        if seed is not None:
            seeds = [int(seed) + i for i in range(self.num_envs)] if isinstance(seed, (int, np.integer)) else list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one each, or one int")
            self._random.seed(seeds, mask)
            self._state["clock"][torch.from_numpy(mask)] = 0
        self._needs_reset = False
        mask = torch.from_numpy(mask).to(self.device)
        with torch.no_grad(), self._scope():
            self._random.refresh()
            self._reset(mask, options)
            return self._get_obs(), self._get_info()

    def step(self, actions: torch.Tensor) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        """Hold actions (num_envs, 3), on the device, for `frame_skip` physics steps.

        Returns `(obs, rewards, terminations, truncations, infos)`, of float and bool tensors (num_envs, ...).
        """
        if self._needs_reset:
            raise gym.error.ResetNeeded("call reset() before step()")
        if self._overflow.any():  # what has arrived from an earlier step
            raise RuntimeError(
                f"more contacts or constraints than there is room for (Warp's flags: {int(self._overflow.max())}): "
                "make the environments with more contacts= and constraints="
            )
        self._actions.copy_(torch.as_tensor(actions))
        if self.device.type == "cpu":
            with torch.no_grad(), self._scope():
                self._before_physics()
                self.robots.step()
                result = self._after_physics()
        else:
            if self._graphs is None:
                self._capture()
            before, _, after, result = self._graphs
            before.replay()
            self.step_physics()
            after.replay()
        self._overflow.copy_(self.robots.overflow, non_blocking=True)
        return result

    def step_physics(self, graph: bool = True) -> None:
        """The physics steps of an action alone, for benchmarks; with `graph` as a CUDA graph if there is one."""
        with self._scope():
            if graph and self._graphs:
                wp.capture_launch(self._graphs[1])
            else:
                self.robots.step()

    def _capture(self):
        """Capture a step in three CUDA graphs. The state does not change."""
        saved = self.get_state()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        before, after = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.stream(side), self._scope():
            for _ in range(2):  # compiles kernels, and allocates
                self._before_physics()
                self.robots.step()
                self._after_physics()
            torch.cuda.synchronize()
            with wp.ScopedCapture() as capture:
                self.robots.step()
            with torch.cuda.graph(before, stream=side):
                self._before_physics()
            with torch.cuda.graph(after, stream=side):
                result = self._after_physics()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._graphs = before, capture.graph, after, result
        self.set_state(saved)

    def apply_force(self, forces: torch.Tensor) -> None:
        """Apply `forces` (num_envs, 3), N in the world's frame, to the bases: see `BallbotVectorEnv`."""
        if tuple(forces.shape) != (self.num_envs, 3):
            raise ValueError(f"forces have shape {tuple(forces.shape)}, expected ({self.num_envs}, 3)")
        self.robots.forces.copy_(forces)

    def set_command(self, velocities: torch.Tensor) -> None:
        """Command `velocities` (num_envs, 2), m/s in the world's frame, as `BallbotVectorEnv.set_command` does."""
        if self.commands is None:
            raise ValueError('set_command() needs the goal "command"')
        self.commands.copy_(velocities)
        self._state["commands_due"].fill_(torch.iinfo(torch.int64).max)

    def slopes(self) -> torch.Tensor:
        """Slopes of the ground, float32 (num_envs, 6), as `BallbotVectorEnv.slopes` has them."""
        direction = self.goal
        if self.commands is not None:
            direction = self.commands / self.commands.norm(dim=1, keepdim=True).clamp(min=1e-9)
        ahead = self._ahead * direction[..., None, :]
        places = self.robots.ball_position[:, None, :2] + ahead
        return self._ground.slopes(places, BALL_RADIUS, self._height_scale()[:, None, None]).flatten(1)

    def get_state(self) -> dict[str, torch.Tensor]:
        """All that the future depends on, for `set_state`."""
        return {name: value.clone() for name, value in self._state.items()}

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a `get_state` of an environment made with the same arguments. ValueError for any other."""
        wrong = [name for name, value in self._state.items() if name not in state or state[name].shape != value.shape]
        if wrong or len(state) != len(self._state):
            raise ValueError(f"{(wrong or ['the content'])[0]} is not as these environments have it")
        for name, value in self._state.items():
            value.copy_(state[name])
        self._needs_reset = False
        with self._scope():
            self._change_models()

    # A step. CUDA graphs record these methods: they do not wait for the device, and no shape depends on a value.

    def _height_scale(self):
        return self._sampled.get("terrain_amplitude", self._height_scales.new_ones(self.num_envs))

    def _before_physics(self):
        """Begin and end pushes, and delay the actions."""
        state, strengths = self._state, self.randomization
        self._random.refresh()
        self.last_actions.copy_(self._actions.nan_to_num().clamp(-1, 1))
        if "push" in strengths:
            num_actions = -(-PUSH_STEPS // self.frame_skip)
            seconds, impulse = num_actions * self.frame_skip * TIMESTEP, self._sampled["push"]
            state["next_push"] -= 1
            state["push_left"] -= 1
            ends, begins = state["push_left"] == 0, state["next_push"] < 0
            impulse.masked_fill_(ends[:, None], 0)
            self.robots.forces.masked_fill_(ends[:, None], 0)
            sampled = planar(self._random.uniform(0, strengths["push"]), self._random.uniform(0, 2 * math.pi))
            impulse.copy_(torch.where(begins[:, None], sampled, impulse))
            force = torch.nn.functional.pad(sampled / seconds, (0, 1))
            self.robots.forces.copy_(torch.where(begins[:, None], force, self.robots.forces))
            state["push_left"].masked_fill_(begins, num_actions)
            state["next_push"].copy_(torch.where(begins, self._actions_to_next_push() - 1, state["next_push"]))
        commands = self.last_actions.expand(self.frame_skip, -1, -1)  # (frame_skip, num_envs, 3)
        if "latency" in strengths:
            queue = torch.cat([state["queue"], commands.transpose(0, 1)], 1)
            longest = state["queue"].shape[1]
            steps = (
                torch.arange(self.frame_skip, device=self.device) + longest - self._sampled["latency"][:, None].long()
            )
            commands = queue.gather(1, steps[:, :, None].expand(-1, -1, 3)).transpose(0, 1)
            state["queue"].copy_(queue[:, self.frame_skip :])
        torch.mul(commands, -MAX_TORQUE, out=self.robots.motors)

    def _after_physics(self):
        """Ends, rewards, observations and resets. Returns what a step returns."""
        state, robots = self._state, self.robots
        failed = robots.replace_failed(self._actions.isnan().any(1))
        state["physics_errors"] += failed
        steps = state["steps"][:, None] + torch.arange(1, self.frame_skip + 1, device=self.device)
        max_steps = self.max_episode_steps * self.frame_skip
        terminated, truncated, active = get_ends(robots, failed, steps, max_steps, self._max_sin2_half_tilt)
        num_substeps = active.sum(1)
        robots.rewind(num_substeps)
        vel = self._observations["vel"]
        velocity = robots.substep_velocity.clamp(vel.low, vel.high)
        terms = get_reward_terms(
            velocity, self.goal, self.commands, self.last_actions, terminated, active, *self.reward_weights
        )
        if self._reward:
            terms[f"reward_{self._reward.__name__}"] = self._reward(self, self.last_actions) * active.sum(1)
        rewards = sum(terms.values())
        if self.frames is not None:
            due = (state["clock"] + num_substeps) // self.frame_interval * self.frame_interval
            poses = robots.substep_poses(due - state["clock"] - 1)
            self._take_frames(due > state["clock"], poses, due)
        state["observed_at"].copy_(state["clock"] + num_substeps)
        state["clock"] += self.frame_skip
        state["steps"] += num_substeps
        state["returns"] += rewards
        if self.commands is not None:
            self._sample_commands(state["steps"] >= state["commands_due"])
        final_info = self._get_info() | terms
        if "obs_noise" in self.randomization:
            state["noise"].copy_(self._sample_noise())
        final_obs = {name: value.clone() for name, value in self._get_obs().items()}
        self.final_slopes = self.slopes()
        terminations, truncations = terminated.any(1), truncated.any(1)
        done = terminations | truncations
        infos = {"episode": {"r": state["returns"].clone(), "l": state["steps"].clone()}, "_episode": done}
        self._reset(done, {})
        infos |= {"final_obs": final_obs, "_final_obs": done, "final_info": final_info} | self._get_info() | terms
        return self._get_obs(), rewards, terminations, truncations, infos

    def _reset(self, mask, options):
        """New episodes where `mask` (num_envs,), and their first frames."""
        state, random, robots = self._state, self._random, self.robots

        def put(array, value):
            array.copy_(torch.where(mask.view(-1, *[1] * (array.ndim - 1)), value, array))

        xy = torch.stack([random.uniform(-START_EXTENT, START_EXTENT) for _ in range(2)], 1)
        if self._starts is not None:
            share = (xy[:, 0] + START_EXTENT) / (2 * START_EXTENT)
            xy = self._starts[(share * len(self._starts)).long().clamp(max=len(self._starts) - 1)]
        xy = options.get("position", xy)
        for name, value in self._sampled.items():
            strength = self.randomization[name]
            if name == "terrain_amplitude":
                value_sampled = self._height_scales[random.integers(NUM_HEIGHT_SCALES)]
            elif name in ("tilt", "velocity"):
                longest = math.radians(strength) if name == "tilt" else strength
                value_sampled = planar(random.uniform(0, longest), random.uniform(0, 2 * math.pi))
                value_sampled = options.get(name, value_sampled)
            elif name == "push":
                value_sampled = torch.zeros_like(value)
            else:
                value_sampled = RANDOMIZATION[name].sample(random, strength).float()
            put(value, value_sampled)
        if "push" in self.randomization:
            put(state["push_left"], torch.zeros_like(state["push_left"]))
            put(state["next_push"], self._actions_to_next_push())
        if self.commands is not None:
            self._sample_commands(mask)
            put(state["commands_due"], random.integers(1, COMMAND_STEPS + 1))
        if "obs_noise" in self.randomization:
            put(state["noise"], self._sample_noise())
        ground = self._ground.max_height(xy, BALL_RADIUS) * self._height_scale()
        zeros = torch.zeros_like(xy)
        moves = {"heading": zeros[:, 0], "tilt": zeros, "velocity": zeros} | {
            name: value for name, value in self._sampled.items() if name in ("tilt", "velocity")
        }
        moves |= {name: value for name, value in options.items() if name in moves}
        robots.start(put, xy, ground, **moves)
        self._change_models()
        for name in ("last_actions", "steps", "returns", "queue"):
            state[name].masked_fill_(mask.view(-1, *[1] * (state[name].ndim - 1)), 0)
        put(state["observed_at"], state["clock"])
        if self.frames is not None:
            self._take_frames(mask, torch.cat([robots.position, robots.quaternion], 1), state["clock"])

    def _change_models(self):
        """Give the robots' models what was sampled. MuJoCo's constants follow before the next physics step."""
        for name, values, usual in self.robots.fields:
            values.copy_(torch.einsum("n,...->n...", self._sampled[name], usual))
        if "terrain_amplitude" in self._sampled:
            scale = self._sampled["terrain_amplitude"][:, None]
            self.robots.hfield_ids.copy_((scale - self._height_scales).abs().argmin(1))

    def _actions_to_next_push(self):
        seconds = self.randomization["push_interval"] * self._random.uniform(0.5, 1.5)
        return (seconds / TIMESTEP / self.frame_skip).round().clamp(min=-(-PUSH_STEPS // self.frame_skip)).long()

    def _sample_noise(self):
        return self.randomization["obs_noise"] * self._random.standard_normal(NOISE_WIDTH)

    def _sample_commands(self, mask):
        kind, speed, turn = (self._random.uniform(0, 1) for _ in range(3))
        speed = torch.where(kind < STANDING_FRACTION, 0, MAX_COMMAND * speed)
        self.commands.copy_(torch.where(mask[:, None], planar(speed, 2 * math.pi * turn), self.commands))
        self._state["commands_due"] += COMMAND_STEPS * mask

    def _get_obs(self):
        values = {name: row.read(self) for name, row in self._observations.items()}
        if "obs_noise" in self.randomization:
            values |= add_sensor_noise(values, self._state["noise"])
        for name, row in self._observations.items():
            if len(row.shape) == 1:  # frames are clipped where they are taken
                values[name] = values[name].clamp(row.low, row.high)
        return values

    def _get_info(self):
        infos = {"position": self.robots.position.clone(), "physics_errors": self._state["physics_errors"].clone()}
        if self._sampled:
            infos["randomization"] = {name: value.clone() for name, value in self._sampled.items()}
        return infos

    def frame_view(self, camera: int) -> torch.Tensor:
        """The newest frames (num_envs, 1, camera_size, camera_size), m, of a camera."""
        return self.frames[:, camera : camera + 1]

    def frame_ages(self) -> torch.Tensor:
        """Seconds (num_envs, 1) since the frames were taken, at the last observation."""
        return ((self._state["observed_at"] - self._state["frame_time"]) * TIMESTEP)[:, None].float()

    def _take_frames(self, mask, poses, clock):
        """Frames where `mask` (num_envs,), from poses (num_envs, 7), taken at `clock` (num_envs,)."""
        noise = None
        if "obs_noise" in self.randomization:
            noise = self.randomization["obs_noise"], self._random.integers(2**31 - 1).int()
        self._renderer.render(mask, poses, self._height_scale(), noise)
        self._state["frame_time"].copy_(torch.where(mask, clock, self._state["frame_time"]))


def planar(length: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Vectors (n, 2) of `length` (n,) at `angle` (n,), rad."""
    return torch.stack([length * torch.cos(angle), length * torch.sin(angle)], 1)


class Random:
    """Random numbers for n robots, each with its own seed. A robot's do not depend on the others.

    The k-th number of a seed is a hash of both (SplitMix64: Steele, Lea and Flood, OOPSLA 2014).
    """

    width = 96  # numbers that a step can use per robot

    def __init__(self, n: int, device: str | torch.device) -> None:
        self.key = torch.zeros(n, dtype=torch.int64, device=device)
        self.counter = torch.zeros(n, dtype=torch.int64, device=device)

    def seed(self, seeds: Sequence[int], mask: np.ndarray) -> None:
        """Restart the robots in `mask`, bool (n,), with `seeds` (n,), whole numbers from 0 on."""
        mask = torch.from_numpy(mask).to(self.key.device)
        seeds = torch.tensor([int(seed) % 2**63 for seed in seeds], device=mask.device)
        self.key.copy_(torch.where(mask, hash_whole(seeds), self.key))
        self.counter.masked_fill_(mask, 0)

    def refresh(self) -> None:
        """New numbers for a step."""
        index = self.counter[:, None] + torch.arange(1, self.width + 1, device=self.key.device)
        bits = hash_whole(self.key[:, None] + index * -7046029254386353131)
        self._block = ((bits >> 40) & 0xFFFFFF) * 2.0**-24
        self.counter += self.width
        self._used = 0

    def _next(self, count):
        self._used += count
        assert self._used <= self.width, "Random.width is too small"
        return self._block[:, self._used - count : self._used]

    def uniform(self, low: float, high: float) -> torch.Tensor:
        """A number (n,) from low to high for each robot."""
        return low + (high - low) * self._next(1)[:, 0]

    def integers(self, low: int, high: int | None = None) -> torch.Tensor:
        """A whole number (n,) from low to high - 1, or from 0 to low - 1."""
        low, high = (0, low) if high is None else (low, high)
        return (low + (high - low) * self._next(1)[:, 0].double()).long()

    def standard_normal(self, width: int) -> torch.Tensor:
        """Normal numbers (n, width), by Box and Muller (1958)."""
        length = torch.sqrt(-2 * torch.log1p(-self._next(width)))
        return length * torch.cos(2 * math.pi * self._next(width))


def hash_whole(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64, of int64 tensors."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


class WarpRobots:
    """What `ballbot_utils.physics.Robots` is for `mujoco.batch`: names for the parts of Warp's state, as tensors."""

    def __init__(
        self,
        model: mujoco.MjModel,
        num_robots: int,
        frame_skip: int,
        randomization: Mapping[str, float],
        contacts: int,
        constraints: int,
    ) -> None:
        parameters = [(name, *field) for name in randomization for field in RANDOMIZATION[name].fields(model)]
        batched = {field for _, field, _ in parameters}
        if "mass" in randomization:
            batched |= {"body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_acc0"}
        if "terrain_amplitude" in randomization:
            batched.add("geom_dataid")
            ground = model.geom("ground").id  # its bounds are those of the highest hills
            model.geom_aabb[ground, [2, 5]] = 50
            model.geom_rbound[ground] = 2 * TERRAIN_EXTENT + 100
        model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
        self._model = mjw.put_model(model, {name: num_robots for name in batched})
        self._data = data = mjw.make_data(model, num_robots, nconmax=contacts, njmax=constraints)
        self._changes_mass, self._frame_skip = "mass" in randomization, frame_skip
        self.fields = []  # of the model that differ between robots: (randomization, values (n, ...), usual value)
        for name, field, index in parameters:
            index = (slice(None), *(index if isinstance(index, tuple) else (index,)))
            values = wp.to_torch(getattr(self._model, field))[index]
            self.fields.append((name, values, values[0].clone()))
        if "terrain_amplitude" in randomization:
            self.hfield_ids = wp.to_torch(self._model.geom_dataid)[:, ground]

        columns = state_columns(model)
        self.state = {
            name: wp.to_torch(getattr(data, name)) for name in ("qpos", "qvel", "qacc_warmstart", "xfrc_applied")
        }
        self._qpos, self._qvel = self.state["qpos"], self.state["qvel"]
        self._start = self._qpos.new_tensor(model.qpos0).expand(num_robots, -1)
        self._columns = columns
        self.position, self.quaternion = self._qpos[:, columns.pose][:, :3], self._qpos[:, columns.pose][:, 3:]
        self.ball_position = self._qpos[:, columns.ball]
        self.velocities, self.angular_velocities = (
            self._qvel[:, columns.velocity],
            self._qvel[:, columns.angular_velocity],
        )
        self.wheel_speeds = self._qvel[:, columns.wheels]
        self.forces = self.state["xfrc_applied"][:, model.body("base").id, :3]
        # Before and after each physics step of an action: (frame_skip, n, ...)
        self._controls, self._substep_qpos, self._substep_qvel = (
            wp.zeros((frame_skip, num_robots, width)) for width in (model.nu, model.nq, model.nv)
        )
        self.motors = wp.to_torch(self._controls)[:, :, :3]
        self._all_qpos, self._all_qvel = wp.to_torch(self._substep_qpos), wp.to_torch(self._substep_qvel)
        poses = self._all_qpos[:, :, columns.pose].transpose(0, 1)
        self.substep_position, self.substep_quaternion = poses[..., :3], poses[..., 3:]
        self.substep_velocity = self._all_qvel[:, :, columns.velocity].transpose(0, 1)[..., :2]
        overflow = mjw.OverflowType
        self._overflows = int(
            overflow.NEFC | overflow.NARROWPHASE | overflow.BROADPHASE | overflow.CCD | overflow.HFIELD
        )
        self._overflow_flags = wp.to_torch(data.overflow)

    @property
    def overflow(self) -> torch.Tensor:
        """Warp's flags (n,) of contacts and constraints for which there was no room."""
        return self._overflow_flags & self._overflows

    def step(self) -> None:
        """The physics steps of an action."""
        if self._changes_mass:
            mjw.set_const(self._model, self._data)
        for k in range(self._frame_skip):
            wp.copy(self._data.ctrl, self._controls[k])
            mjw.step(self._model, self._data)
            wp.copy(self._substep_qpos[k], self._data.qpos)
            wp.copy(self._substep_qvel[k], self._data.qvel)

    def replace_failed(self, failed: torch.Tensor) -> torch.Tensor:
        """Put robots that `failed`, or whose state is not finite, into the initial state; bool (n,), where."""
        failed = failed | ~(self._all_qpos.isfinite().all(2) & self._all_qvel.isfinite().all(2)).all(0)
        self._all_qpos.copy_(torch.where(failed[:, None], self._start, self._all_qpos))
        self._all_qvel.masked_fill_(failed[:, None], 0)
        return failed

    def rewind(self, num_substeps: torch.Tensor) -> None:
        """Go back to the states after the first `num_substeps` (n,) physics steps of the action."""
        for state, states in ((self._qpos, self._all_qpos), (self._qvel, self._all_qvel)):
            state.copy_(states.gather(0, (num_substeps - 1)[None, :, None].expand(1, -1, states.shape[2]))[0])

    def substep_poses(self, index: torch.Tensor) -> torch.Tensor:
        """Base poses (n, 7) after the physics step `index` (n,) of the action."""
        poses, index = self._all_qpos[:, :, self._columns.pose], index.clamp(0, self._frame_skip - 1)
        return poses.gather(0, index[None, :, None].expand(1, -1, 7))[0]

    def start(self, put, xy, ground, heading, tilt, velocity) -> None:
        """Let robots stand at `xy` (n, 2), m, just above `ground` (n,), m, turned and moving as `Robots.move` says.

        `put(array, value)` changes the robots that start.
        """
        put(self._qpos, self._start)
        put(self._qvel, torch.zeros_like(self._qvel))
        put(self.state["qacc_warmstart"], torch.zeros_like(self.state["qacc_warmstart"]))
        put(self.state["xfrc_applied"], torch.zeros_like(self.state["xfrc_applied"]))
        ball = torch.cat([xy, (ground + BALL_START)[:, None]], 1)
        quaternion = heading_then_tilt(heading, tilt)
        base = ball + (BASE_START - BALL_START) * rotation_matrix(quaternion)[:, :, 2]
        put(self.ball_position, ball)
        put(self.position, base)
        put(self.quaternion, quaternion)
        put(self.velocities[:, :2], velocity)
        put(self._qvel[:, self._columns.ball_velocity][:, :2], velocity)


class Ground:
    """A `Terrain` on the device."""

    def __init__(self, terrain: Terrain, device: str | torch.device) -> None:
        self.device = device
        self.heights = None if terrain.is_plane else torch.tensor(terrain.heights, device=device)
        self._sides = torch.tensor([(1, 0), (0, 1), (-1, 0), (0, -1)], device=device)

    def max_height(self, xy: torch.Tensor, radius: float) -> torch.Tensor:
        """`Terrain.max_height` (n,), m, at places (n, 2), m."""
        if self.heights is None:
            return xy.new_zeros(len(xy))
        reach = radius + CELL
        first = ((xy + (TERRAIN_EXTENT - reach)) / CELL).long() + 1
        last = ((xy + (TERRAIN_EXTENT + reach)) / CELL).long()
        offsets = torch.arange(int(2 * reach / CELL) + 2, device=xy.device)
        nodes = torch.minimum(first[:, :, None] + offsets, last[:, :, None])  # (n, 2, nodes)
        return self.heights[nodes[:, 1, :, None], nodes[:, 0, None, :]].amax((1, 2))

    def slopes(self, places: torch.Tensor, reach: float, scale: torch.Tensor) -> torch.Tensor:
        """`Terrain.slopes` (..., 2) at places (..., 2), m."""
        if self.heights is None:
            return torch.zeros_like(places)
        nodes = (places[..., None, :] + reach * self._sides + TERRAIN_EXTENT) / CELL + 0.5
        col, row = nodes.clamp(0, len(self.heights) - 1).long().unbind(-1)
        heights = self.heights[row, col] * scale
        return (heights[..., :2] - heights[..., 2:]) / (2 * reach)


class WarpDepthRenderer:
    """What `ballbot_utils.depth.DepthRenderer` is on a CPU, as one kernel with a thread per pixel.

    A ray is followed in steps so short that no terrain of the slope nearby is missed (sphere tracing, Hart, 1996), and
    ends with one Newton step.
    """

    def __init__(self, model: mujoco.MjModel, size: int, ground: Ground, num_robots: int) -> None:
        cpu = DepthRenderer(model, size, None if ground.heights is None else ground.heights.cpu().numpy())
        self.frames = torch.full((num_robots, len(CAMERAS), size, size), MAX_DEPTH, device=ground.device)
        heights = np.zeros((2, 2), np.float32) if ground.heights is None else ground.heights.cpu().numpy()
        self._heights = wp.array(heights, dtype=float)
        self._steepest = wp.array(steepest_blocks(heights) if ground.heights is not None else heights, dtype=float)
        self._is_plane = ground.heights is None
        self._offsets = wp.array(cpu.offsets.astype(np.float32), dtype=wp.vec3)
        self._axes = wp.array(cpu.axes.astype(np.float32), dtype=wp.mat33)
        self._self_depth = wp.array(cpu.self_depth.numpy(), dtype=float)
        self._out = wp.from_torch(self.frames)

    def render(self, mask: torch.Tensor, poses: torch.Tensor, scale: torch.Tensor, noise: tuple | None) -> None:
        """New `frames`, m, float32 (n, cameras, size, size), where `mask` (n,), of bases at `poses` (n, 7).

        `scale` (n,) is a factor on the terrain's heights; `noise` a standard deviation, m, and a seed (n,), int.
        """
        std, seeds = noise or (0.0, torch.zeros_like(mask, dtype=torch.int32))
        wp.launch(
            render_pixel,
            dim=self.frames.shape,
            inputs=[
                wp.from_torch(mask), wp.from_torch(poses.contiguous()), wp.from_torch(scale), self._is_plane,
                self._heights, self._steepest, self._offsets, self._axes, self._self_depth, float(std),
                wp.from_torch(seeds),
            ],
            outputs=[self._out],
        )  # fmt: skip


@wp.func
def clearance(heights: wp.array2d(dtype=float), scale: float, origin: wp.vec3, direction: wp.vec3, depth: float):
    """The height, m, over the bilinear height field of the point at `depth` along a ray."""
    point = origin + depth * direction
    last = float(heights.shape[0] - 1)
    column = wp.clamp((point[0] + wp.static(TERRAIN_EXTENT)) * wp.static(1.0 / CELL), 0.0, last)
    row = wp.clamp((point[1] + wp.static(TERRAIN_EXTENT)) * wp.static(1.0 / CELL), 0.0, last)
    i, j = wp.min(int(row), heights.shape[0] - 2), wp.min(int(column), heights.shape[0] - 2)
    a, b = row - float(i), column - float(j)
    low = heights[i, j] + b * (heights[i, j + 1] - heights[i, j])
    high = heights[i + 1, j] + b * (heights[i + 1, j + 1] - heights[i + 1, j])
    return point[2] - scale * (low + a * (high - low))


@wp.kernel
def render_pixel(
    mask: wp.array(dtype=wp.bool),
    poses: wp.array2d(dtype=float),
    scale: wp.array(dtype=float),
    is_plane: bool,
    heights: wp.array2d(dtype=float),
    steepest: wp.array2d(dtype=float),
    offsets: wp.array(dtype=wp.vec3),
    axes: wp.array(dtype=wp.mat33),
    self_depth: wp.array3d(dtype=float),
    noise: float,
    seeds: wp.array(dtype=int),
    frames: wp.array4d(dtype=float),
):
    robot, camera, i, j = wp.tid()
    if not mask[robot]:
        return
    size = float(frames.shape[3])
    across, down = (float(j) + 0.5) * 2.0 / size - 1.0, (float(i) + 0.5) * 2.0 / size - 1.0
    turn = wp.quat(poses[robot, 4], poses[robot, 5], poses[robot, 6], poses[robot, 3])
    o = wp.vec3(poses[robot, 0], poses[robot, 1], poses[robot, 2]) + wp.quat_rotate(turn, offsets[camera])
    d = wp.quat_rotate(turn, axes[camera] * wp.vec3(across, -down, 1.0))
    depth = wp.float32(0.0)
    if is_plane:
        depth = -o[2] / wp.min(d[2], -1.0e-3)
    else:
        block = wp.static(1.0 / (CELL * STEEPEST_BLOCK))
        row = wp.clamp(int((o[1] + wp.static(TERRAIN_EXTENT)) * block), 0, steepest.shape[0] - 1)
        column = wp.clamp(int((o[0] + wp.static(TERRAIN_EXTENT)) * block), 0, steepest.shape[1] - 1)
        slope = steepest[row, column] * scale[robot]
        loss = wp.max(wp.sqrt(d[0] * d[0] + d[1] * d[1]) * slope - d[2], 0.05)  # of clearance per depth, at most
        step, over = wp.int32(0), wp.float32(1.0)
        while step < 40 and over > 5.0e-4 and depth < 1.2:
            over = clearance(heights, scale[robot], o, d, depth)
            depth += wp.max(over, 5.0e-4) / loss
            step += 1
        over = clearance(heights, scale[robot], o, d, depth)
        probe = clearance(heights, scale[robot], o, d, depth + 0.01)
        depth += over / wp.max((over - probe) * 100.0, 0.05)
    depth = wp.min(wp.max(depth, 0.0), self_depth[camera, i, j])
    if noise > 0.0:
        pixel = wp.rand_init(seeds[robot], (camera * frames.shape[2] + i) * frames.shape[3] + j)
        depth = wp.clamp(depth + noise * wp.randn(pixel), 0.0, wp.static(MAX_DEPTH))
    frames[robot, camera, i, j] = depth
