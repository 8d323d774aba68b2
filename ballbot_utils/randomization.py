"""Domain randomization: robots, grounds and sensors that differ between episodes; pushes, latency and noise in them.

To randomize another field of MuJoCo's model, add an entry to RANDOMIZATION. Anything else needs an entry as well, and a
passage in the class Randomization.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mujoco
import mujoco.batch
import numpy as np
import torch

from ballbot_utils.checks import check_value, is_number
from ballbot_utils.model import CAMERAS, MAX_TORQUE, TIMESTEP
from ballbot_utils.terrain import is_plane

PUSH_STEPS = 10  # physics steps that a push lasts: 20 ms
NUM_HEIGHT_SCALES = 5  # factors on the height of the hills from which `terrain_amplitude` samples
MAX_LEVEL = 10  # of a curriculum, in which hills and pushes have the share level / MAX_LEVEL of their full size
SUCCESS_SPEED = 0.3  # m/s towards the goal, the mean of an episode: from here on it is a success


def height_scales(strength: float, curriculum: bool = False) -> np.ndarray:
    """The factors (n,) on the height of the hills: one height field is compiled for each.

    They are NUM_HEIGHT_SCALES, or with a curriculum all multiples of 1 / MAX_LEVEL up to the largest of these.
    """
    widest = 1 - 1 / NUM_HEIGHT_SCALES
    if curriculum:
        multiples = np.arange(round(MAX_LEVEL * (1 + strength * widest)) + 1) / MAX_LEVEL
        return np.maximum(multiples, 1e-5)  # MuJoCo needs a height
    return 1 + strength * np.linspace(-widest, widest, NUM_HEIGHT_SCALES)


def sample_factor(rng: np.random.Generator, strength: float) -> float:
    """A factor, uniform from 1 - strength to 1 + strength."""
    return rng.uniform(1 - strength, 1 + strength)


def sample_planar_vector(rng: np.random.Generator, longest: float) -> tuple[float, float]:
    """A vector (x, y), its length uniform up to `longest`, its direction uniform."""
    length, angle = rng.uniform(0, longest), rng.uniform(0, 2 * math.pi)
    return length * math.cos(angle), length * math.sin(angle)


class Parameter(NamedTuple):
    """What `randomization` takes under a name, and how the value of an episode is sampled."""

    low: float  # lowest and highest strength, and both in words
    high: float
    expected: str
    sample: Callable[[np.random.Generator, float], Any] | None = None  # generator and strength to a value
    shape: tuple[int, ...] = ()  # of a value
    # Parts of model fields that the value is a factor on: field's name and index
    fields: Callable[[mujoco.MjModel], list[tuple[str, Any]]] = lambda model: []


# In the order in which values are sampled
RANDOMIZATION = {
    "terrain_amplitude": Parameter(
        0, 1, "a share from 0 to 1", lambda rng, strength: height_scales(strength)[rng.integers(NUM_HEIGHT_SCALES)]
    ),
    "mass": Parameter(
        0, 0.9, "a share from 0 to 0.9", sample_factor,
        fields=lambda model: [("body_mass", model.body("base").id), ("body_inertia", model.body("base").id)],
    ),
    "friction": Parameter(
        0, 0.9, "a share from 0 to 0.9", sample_factor,
        fields=lambda model: [("geom_friction", (model.geom("ball").id, 0)),
                              ("geom_friction", (model.geom("ground").id, 0)),
                              ("pair_friction", (slice(None), slice(2)))],
    ),
    "wheel_damping": Parameter(
        0, 1, "a share from 0 to 1", sample_factor,
        fields=lambda model: [("dof_damping", model.joint(f"wheel_{i}").dofadr[0]) for i in range(3)],
    ),
    "latency": Parameter(
        0, 100, "a whole number of steps from 0 to 100", lambda rng, strength: rng.integers(int(strength) + 1)
    ),
    "tilt": Parameter(
        0, 90, "degrees from 0 to below max_tilt",
        lambda rng, strength: sample_planar_vector(rng, math.radians(strength)), (2,),
    ),
    "velocity": Parameter(0, 2, "a speed from 0 to 2 m/s", sample_planar_vector, (2,)),
    "push": Parameter(0, 100, "an impulse from 0 to 100 N·s", lambda rng, strength: 0, (2,)),  # begins later
    "push_interval": Parameter(0.1, 100, "0.1 to 100 s"),
    "obs_noise": Parameter(0, 10, "a standard deviation from 0 to 10"),
}  # fmt: skip


def check_randomization(
    randomization: Mapping[str, float] | None,
    terrain: Any = "perlin",
    max_tilt: float = 20.0,
    curriculum: bool = False,
) -> dict[str, float]:
    """The strengths that are not 0, in the order of RANDOMIZATION. Raises ValueError, of one line, for invalid ones.

    `terrain` and `curriculum` are the environment's arguments, `max_tilt` the tilt in degrees at which an episode ends.
    With a curriculum on hills there is a `terrain_amplitude`, maybe of 0.
    """
    check_value(randomization is None or isinstance(randomization, Mapping), "randomization", randomization,
                   'a dict of names and strengths, such as {"push": 1.0}')  # fmt: skip
    given = dict(randomization or {})
    for name, strength in given.items():
        if name not in RANDOMIZATION:
            raise ValueError(f"randomization has no {name!r}: there are {', '.join(RANDOMIZATION)}")
        low, high, expected, *_ = RANDOMIZATION[name]
        valid = is_number(strength) and low <= strength <= high
        valid = valid and (name != "latency" or strength == int(strength)) and (name != "tilt" or strength < max_tilt)
        check_value(valid, f"randomization {name}", strength, expected)
    on = {name: given[name] for name in RANDOMIZATION if given.get(name)}
    if "push_interval" in on and "push" not in given:
        raise ValueError("randomization has a push_interval and no push: give both, or push alone")
    if "push" not in on:
        on.pop("push_interval", None)
    if "terrain_amplitude" in on and is_plane(terrain):
        raise ValueError(
            f'randomization has a terrain_amplitude, which means nothing on terrain "{terrain}": leave it out'
        )
    if curriculum and is_plane(terrain) and "push" not in on:
        raise ValueError(f'curriculum has no effect on terrain "{terrain}" without a push: leave it out')
    if curriculum and not is_plane(terrain):
        on = {"terrain_amplitude": 0.0} | on
    return on | ({"push_interval": on.get("push_interval", 1.0)} if "push" in on else {})


class Pushes:
    """Horizontal pushes on the bases of many robots: a force acts for PUSH_STEPS physics steps, then ends.

    Where actions are held, it acts for as many actions as these steps need, at least one, and is so much weaker that
    its impulse stays the same.
    """

    def __init__(self, forces: np.ndarray, frame_skip: int) -> None:
        """`forces` (n, 3), N, is the array that the environments read: `BallbotVectorEnv.forces`."""
        self._forces, self.frame_skip = forces, frame_skip
        self.num_actions = -(-PUSH_STEPS // frame_skip)
        self.seconds = self.num_actions * frame_skip * TIMESTEP
        self.actions_left = np.zeros(len(forces), int)  # until each push ends

    def begin(self, i: int | slice, force: np.ndarray) -> None:
        """Push robot i, or a slice of them, by `force` (2,) or (n, 2), N: an impulse in N·s divided by `seconds`."""
        self._forces[i, :2], self._forces[i, 2], self.actions_left[i] = force, 0, self.num_actions

    def end_due(self) -> np.ndarray:
        """End the pushes that have lasted long enough; bool (n,), where. To be called before each action."""
        self.actions_left -= 1
        over = self.actions_left == 0
        if over.any():
            self._forces[over] = 0
        return over


def add_depth_noise(frames: torch.Tensor, noise: torch.Tensor, max_depth: float) -> torch.Tensor:
    """Frames, m, with noise, m, of the same shape, clipped to [0, max_depth]."""
    return (frames + noise).clamp_(0, max_depth)


class Randomization:
    """What differs between many robots that are stepped together, and the disturbances in their episodes."""

    def __init__(
        self,
        strengths: dict[str, float],
        model: mujoco.MjModel,
        batch: mujoco.batch.Batch,
        forces: np.ndarray,
        frame_skip: int,
        noise_width: int,
        camera_size: int,
        device: str | torch.device,
        curriculum: bool,
    ) -> None:
        """For the robots of `batch`.

        `strengths` and `curriculum` are those of `check_randomization`. `forces` (n, 3), N, act on the bases;
        `noise_width` is the number of proprioceptive values with noise. `camera_size`, pixels, is 0 without cameras;
        `device` has frames.
        """
        n = len(forces)
        self.strengths, self._batch, self._frame_skip = strengths, batch, frame_skip
        # What was sampled, (n, ...). All of it is part of the environments' state; `info` has names without underscore.
        self.sampled = {name: np.zeros((n, *RANDOMIZATION[name].shape)) for name in strengths
                        if RANDOMIZATION[name].sample}  # fmt: skip
        self.height_scale = self.sampled.get("terrain_amplitude")  # (n,), or None
        if self.height_scale is not None:
            self._height_scales = height_scales(strengths["terrain_amplitude"], curriculum)
            self._hfield_ids = batch.expand("geom_dataid")[:, model.geom("ground").id]
        self.levels = None  # of the curriculum, int (n,), from 0 to MAX_LEVEL
        if curriculum:
            self.levels = self.sampled["level"] = np.zeros(n, int)
        if "latency" in strengths:
            self.sampled["latency"] = np.zeros(n, int)
            # Commands of the last physics steps, oldest first
            self.sampled["_commands"] = np.zeros((n, int(strengths["latency"]), 3), np.float32)
            self._controls = np.zeros((n, frame_skip, model.nu))
        if "push" in strengths:
            self._pushes = Pushes(forces, frame_skip)
            # In actions: until the next push begins, and until the present one ends
            self.sampled |= {"_next_push": np.zeros(n, int), "_push_ends": self._pushes.actions_left}
        if "obs_noise" in strengths:
            self.sampled["_noise"] = np.zeros((n, noise_width), np.float32)
        if "obs_noise" in strengths and camera_size:
            size = len(CAMERAS) * camera_size**2  # of a robot's frames
            table = np.random.default_rng(0).standard_normal(max(2**17, 4 * size), np.float32) * strengths["obs_noise"]
            # All stretches of the table as long as a robot's frames, without copies: (stretches, size)
            self._depth_noise = torch.from_numpy(table).float().to(device).unfold(0, size, 1)
        # Parts of model fields, (n, ...), their usual values, and the name of the factor on them
        self._fields = []
        for name in strengths:
            for field, part in RANDOMIZATION[name].fields(model):
                part = part if isinstance(part, tuple) else (part,)
                values = batch.expand(field)[(slice(None), *part)]
                self._fields.append((values, np.array(getattr(model, field)[part]), name))

    @property
    def noise(self) -> np.ndarray | None:
        """Noise on proprioception, float32 (n, noise_width), or None."""
        return self.sampled.get("_noise")

    def sample_episode(self, i: int, rng: np.random.Generator) -> None:
        """Sample what an episode of robot i differs in."""
        sampled = self.sampled
        for name, strength in self.strengths.items():
            if RANDOMIZATION[name].sample:
                sampled[name][i] = RANDOMIZATION[name].sample(rng, strength)
        if self.levels is not None and self.height_scale is not None:
            self.height_scale[i] = self._height_scales[round(self.levels[i] * self.height_scale[i])]
        if "latency" in self.strengths:
            sampled["_commands"][i] = 0
        if "push" in self.strengths:
            sampled["_push_ends"][i] = 0
            sampled["_next_push"][i] = self._actions_to_next_push(rng)
        if self.noise is not None:
            self._sample_noise(i, rng)

    def starts(self, ids: np.ndarray, options: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The options of a reset, each (n, ...), completed by what was sampled for the robots `ids`."""
        for name in {"tilt", "velocity"} & self.sampled.keys():
            if name in options:
                self.sampled[name][ids] = options[name][ids]
            options = options | {name: self.sampled[name]}
        return options

    def change_models(self, ids: np.ndarray) -> None:
        """Give the models of the robots `ids` what was sampled for them, and what MuJoCo derives from it."""
        for values, usual, name in self._fields:
            values[ids] = np.multiply.outer(self.sampled[name][ids], usual)
        if self.height_scale is not None:
            self._hfield_ids[ids] = np.abs(self.height_scale[ids, None] - self._height_scales).argmin(1)
        self._batch.set_const(ids)

    def hfield_id(self, i: int) -> int:
        """The height field that robot i stands on, with `terrain_amplitude` only."""
        return int(self._hfield_ids[i])

    def before_action(
        self, actions: np.ndarray, rngs: list[np.random.Generator], running: np.ndarray
    ) -> np.ndarray | None:
        """Begin and end pushes, and delay `actions` (n, 3): controls (n, frame_skip, nu), or None without latency.

        Nothing is sampled for robots that are not `running`, bool (n,).
        """
        if "push" in self.strengths:
            impulses, actions_to_next = self.sampled["push"], self.sampled["_next_push"]
            actions_to_next -= 1
            impulses[self._pushes.end_due()] = 0
            for i in np.flatnonzero((actions_to_next < 0) & running):
                share = 1 if self.levels is None else self.levels[i] / MAX_LEVEL
                impulses[i] = sample_planar_vector(rngs[i], self.strengths["push"] * share)
                self._pushes.begin(i, impulses[i] / self._pushes.seconds)
                actions_to_next[i] = self._actions_to_next_push(rngs[i]) - 1
        if "latency" not in self.strengths:
            return None
        commands, held = self.sampled["_commands"], np.repeat(actions[:, None], self._frame_skip, 1)
        queue = np.concatenate([commands, held], 1)
        steps = np.arange(self._frame_skip) + commands.shape[1] - self.sampled["latency"][:, None]
        np.multiply(queue[np.arange(len(queue))[:, None], steps], -MAX_TORQUE, out=self._controls[:, :, :3])
        commands[:] = queue[:, self._frame_skip :]
        return self._controls

    def forget_commands(self, ids: np.ndarray) -> None:
        """Clear the delayed commands of the robots `ids`, whose physics failed."""
        if "latency" in self.strengths:
            self.sampled["_commands"][ids] = 0

    def after_action(self, rngs: list[np.random.Generator], running: np.ndarray) -> None:
        """Sample the noise on the next observations, without frames, of robots that are `running`, bool (n,)."""
        for i in np.flatnonzero(running) if self.noise is not None else ():
            self._sample_noise(i, rngs[i])

    def change_levels(self, ended: np.ndarray, succeeded: np.ndarray) -> None:
        """Raise the levels of robots whose episodes `ended` where they `succeeded`, else lower them; bool (n,) both."""
        change = np.where(succeeded, 1, -1) * ended
        np.clip(self.levels + change, 0, MAX_LEVEL, out=self.levels)

    def disturb_frames(self, frames: torch.Tensor, rngs: list[np.random.Generator], max_depth: float) -> torch.Tensor:
        """New frames (m, cameras, size, size), m, with the noise on them; `rngs` are those of their robots."""
        if self.noise is None:
            return frames
        starts = [rng.integers(len(self._depth_noise)) for rng in rngs]
        noise = self._depth_noise[torch.tensor(starts, device=frames.device)].view_as(frames)
        return add_depth_noise(frames, noise, max_depth)

    def find_invalid(self, sampled: dict[str, torch.Tensor]) -> str:
        """The name of what cannot have been sampled in a state whose structure is that of `sampled`, or ""."""
        for name, highest in {"latency": self.strengths.get("latency"), "level": MAX_LEVEL}.items():
            if name in sampled and not 0 <= sampled[name].min() <= sampled[name].max() <= highest:
                return name
        return ""

    def _actions_to_next_push(self, rng):
        seconds = self.strengths["push_interval"] * rng.uniform(0.5, 1.5)
        return max(round(seconds / TIMESTEP / self._frame_skip), self._pushes.num_actions)

    def _sample_noise(self, i, rng):
        noise = rng.standard_normal(self.noise.shape[1], np.float32)
        self.noise[i] = np.float32(self.strengths["obs_noise"]) * noise
