"""Ballbot-v0: a robot that balances on a ball and drives over uneven ground, on stock MuJoCo.

`gym.make("Ballbot-v0")` gives one environment, `gym.make_vec("Ballbot-v0", num_envs=10)` many of them on
`mujoco.batch`. Both run the same code: environment i of the vector is, bit for bit, the single
environment reset with seed + i.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike

try:
    import mujoco
    import mujoco.batch
except (AttributeError, OSError, RuntimeError) as error:  # of OpenGL, which only pictures need
    raise ImportError(
        f"MuJoCo cannot use MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}): unset it, or make it osmesa or egl and "
        "install that (Debian: libosmesa6, or libegl1 and libgl1-mesa-dri)"
    ) from None

ASSETS = Path(__file__).resolve().parent / "ballbot_utils" / "assets"  # where a wheel has them
if not ASSETS.is_dir():
    ASSETS = Path(__file__).resolve().parent / "assets"

TIMESTEP = 0.002  # s, of a physics step
MAX_EPISODE_STEPS = 4000  # actions, by the registration
MAX_TORQUE = 10.0  # N·m at |action| = 1
BALL_RADIUS = 0.09  # m
BASE_OVER_BALL = 0.1313  # m, base origin above the ball's centre when the robot rests upright on it
BASE_START = 0.24  # m, base origin above the ground at the start
BALL_START = 0.12  # m, ball centre above the ground at the start
TERRAIN_EXTENT = 20.0  # m, half the side of the square terrain
TERRAIN_NODES = 1169  # per side: cells of 40 m / 1168 = 10/292 m
EDGE = 1.0  # m, episodes are truncated this close to the terrain's edge
START_EXTENT = 10.0  # m, starts are drawn from the square |x|, |y| <= START_EXTENT
MAX_DEPTH = 1.0  # m
# rad: going to +y, wheels 1 and 2 then turn at 0.87 of the ball's rim speed and wheel 0 rests. Heading 0 asks 0.95 of
# wheel 1, which runs out of torque first
EASY_HEADING = 0.22
PICTURE_STEPS = 20  # render() draws anew after so many: 25 pictures a second
MAX_COMMAND, STANDING, COMMAND_STEPS = 0.6, 0.2, 2000  # m/s; share of commands to stand still; steps a drawn one holds
PUSH_STEPS = 10  # steps that a random push lasts: 20 ms
NUM_RELIEFS = 5  # heights of the hills that `randomization` draws from
# MuJoCo's warnings end the episode and are printed; they need no MUJOCO_LOG.TXT in the working directory.
_log = mujoco.MjLogConfig.get()
_log.logto_file = False
_log.set()

PROPRIOCEPTION = ("orientation", "angular_vel", "vel", "motor_state", "actions")
REWARD_TERMS = ("reward_forward", "reward_ctrl", "reward_healthy")
# What `randomization` takes, in the order in which it is drawn: lowest and highest strength, and both in words
RANDOMIZATION = {
    "terrain_amplitude": (0, 1, "a share from 0 to 1"),
    "mass": (0, 0.9, "a share from 0 to 0.9"),
    "friction": (0, 0.9, "a share from 0 to 0.9"),
    "wheel_damping": (0, 1, "a share from 0 to 1"),
    "latency": (0, 100, "a whole number of steps from 0 to 100"),
    "tilt": (0, 90, "degrees from 0 to below max_tilt"),
    "velocity": (0, 2, "a speed from 0 to 2 m/s"),
    "push": (0, 100, "an impulse from 0 to 100 N·s"),
    "push_interval": (0.1, 100, "0.1 to 100 s"),
    "obs_noise": (0, 10, "a standard deviation from 0 to 10"),
}


class BallbotEnv(gym.Env):
    """
    ## Description
    A ballbot: a tower of 3.85 kg that balances on a ball of 9 cm radius, which three omniwheels drive. The goal is to
    roll along +y (or another `goal`) over uneven ground for 8 s without falling. Left alone the robot falls in about a
    second. Actions are taken at 500 Hz, one for each physics step of 2 ms, or held for `frame_skip` of them.

    The task is that of Salehi, ["Reinforcement Learning for Ballbot Navigation in Uneven
    Terrain"](https://arxiv.org/abs/2505.18417), on stock MuJoCo instead of a patched one. What differs from the paper:

    - The wheels' damping is 0.4 N·m·s/rad instead of 0.8. With 0.8 the motors cannot drive faster than 0.46 m/s, and no
      episode of 4000 steps can return more than 98.5. With 0.4 the top speed is 0.93 m/s and the bound is 117.
      `wheel_damping=0.8` is the paper's setting; compare returns only at the same damping.
    - There is one terrain, 40 m square, fixed by `terrain_seed`, and each episode starts at a random place of it. The
      paper makes a new terrain for each episode, 10 m square, and starts in its middle. Ours is cubed gradient noise
      whose slopes match those of the paper's simplex noise (median 0.05, 90th percentile 0.13, 99th 0.20) within 15 %.
    - A wheel's roller is a sphere coupled to its hub about the axle (see `assets/ballbot.xml`), not a capsule with
      anisotropic friction. Velocities under random torques agree within 5 %.
    - Depth images are computed without OpenGL (see Cameras).

    MuJoCo's height fields slow the ball down, even where they are level: it touches neighbouring cells, whose normals
    are tilted. A ball that rolls freely at 0.25 to 0.8 m/s is held back by 0.6 to 1.5 % of its weight, by direction and
    speed, and pushed sideways by up to 0.7 %; from 0.5 m/s it stops within 5 to 10 s. On the plane of `terrain="flat"`
    both are below 0.02 %.

    `gym.make_vec("Ballbot-v0", num_envs=10)` gives many at once, stepped on threads: see `BallbotVectorEnv`.

    ## Action Space
    The action space is a `Box(-1, 1, (3,), float32)`: one command per motor. The torque on wheel i is -10 N·m times
    `action[i]`, about the wheel's axle (note the sign). Actions outside [-1, 1] are clipped.

    | Num | Action                     | Min | Max | Name (in the XML file)  | Joint | Type (Unit)            |
    | --- | -------------------------- | --- | --- | ----------------------- | ----- | ---------------------- |
    | 0   | command to wheel 0's motor | -1  | 1   | motor_0 (joint wheel_0) | hinge | torque (-10 N·m per 1) |
    | 1   | command to wheel 1's motor | -1  | 1   | motor_1 (joint wheel_1) | hinge | torque (-10 N·m per 1) |
    | 2   | command to wheel 2's motor | -1  | 1   | motor_2 (joint wheel_2) | hinge | torque (-10 N·m per 1) |

    In the base's frame (x to the right, y forward, z up) wheel 0 is at (-0.018, -0.08, -0.054) m and its axle is
    (-0.153, -0.690, -0.707); wheels 1 and 2 are the same turned by 120° and 240° about z.

    ## Observation Space
    The observation space is a `Dict` of `Box`es, all float32. "Base" is the body that carries tower, wheels and cameras
    (free joint `base` in the XML file).

    | Key                        | Index | Meaning                                            | Min | Max  | Unit     |
    | -------------------------- | ----- | -------------------------------------------------- | --- | ---- | -------- |
    | `orientation`              | 0     | rotation vector of the base, axis times angle: x   | -π  | π    | rad      |
    |                            | 1     | the same: y                                        | -π  | π    | rad      |
    |                            | 2     | the same: z                                        | -π  | π    | rad      |
    | `angular_vel`              | 0     | angular velocity of the base, in its own frame: x  | -2  | 2    | rad/s    |
    |                            | 1     | the same: y                                        | -2  | 2    | rad/s    |
    |                            | 2     | the same: z                                        | -2  | 2    | rad/s    |
    | `vel`                      | 0     | velocity of the base's origin, in the world: x     | -2  | 2    | m/s      |
    |                            | 1     | the same: y                                        | -2  | 2    | m/s      |
    |                            | 2     | the same: z                                        | -2  | 2    | m/s      |
    | `motor_state`              | 0     | speed of wheel 0 about its axle, divided by 10     | -5  | 5    | 10 rad/s |
    |                            | 1     | the same: wheel 1                                  | -5  | 5    | 10 rad/s |
    |                            | 2     | the same: wheel 2                                  | -5  | 5    | 10 rad/s |
    | `actions`                  | 0     | last action, clipped; 0 after a reset: motor 0     | -1  | 1    |          |
    |                            | 1     | the same: motor 1                                  | -1  | 1    |          |
    |                            | 2     | the same: motor 2                                  | -1  | 1    |          |
    | `depth_0`                  | all   | planar depth of the right camera: (1, row, column) | 0   | 1    | m        |
    | `depth_1`                  | all   | planar depth of the left camera: (1, row, column)  | 0   | 1    | m        |
    | `relative_image_timestamp` | 0     | time since the two frames were taken               | 0   | 0.01 | s        |
    | `command`                  | 0     | velocity wanted, in the world: x                   | -2  | 2    | m/s      |
    |                            | 1     | the same: y                                        | -2  | 2    | m/s      |

    Values beyond Min and Max are clipped. With `cameras=False` depth and its timestamp are absent. `command` is there
    only with `goal="command"` (see Commands). Position, and a goal that is a direction, are not observed. The images'
    shape is (1, `camera_size`, `camera_size`), by default (1, 64, 64). The maximum of `relative_image_timestamp`
    follows from `camera_rate`; 0.01 s is that of the default.

    ### Cameras
    - Camera 0 sits at (0.17, -0.01, -0.06) m in the base's frame and looks along (-0.5, 0, -0.866): down and inwards at
      the ground beside the ball. Camera 1 is its mirror image: x and the direction's x have the other sign. `fovy` is
      90°; the images are square, so that they are 90° wide too.
    - Row 0 is the top of the image (towards +y of the base), column 0 its left (towards -x), for both cameras.
    - A pixel is the planar depth of what is seen through its centre: the distance along the camera's optical axis, not
      along the pixel's ray. It is clipped to [0, 1] m; where nothing is hit it is 1.
    - Of the robot itself only the ball is in view. It is always drawn where it is while the base rests on it.
    - A new frame is taken every 6 steps (83.3 Hz, the nearest below the nominal 90 Hz), and held in between. Both
      cameras' frames are taken together, after the physics step, so that `relative_image_timestamp` is then 0. With
      `frame_skip` the cameras keep this clock: a frame taken while an action is held has some age when it is observed.
    - The cameras' clock runs freely across episodes: `reset(seed=...)` restarts it, `reset()` does not. Each reset
      takes a first frame, whatever the clock says, and the next may then follow after fewer than 6 steps.

    ## Rewards
    The reward of a step is ***reward*** *=* *forward_reward - ctrl_cost + healthy_reward*:

    - *forward_reward*: `forward_reward_weight` (default 0.01) times the velocity towards the goal, in m/s: `vel` as
      observed, that is after clipping (without the noise of `randomization`), times the unit vector along `goal`
      (default +y). With `goal="command"` it is the weight times 8 (|c|² - |v - c|²), where v is x and y of `vel` and c
      the command: largest where v is c, 0 when standing still, and negative going elsewhere, or at all where c is 0.
      Of distances in place of their squares little is learnt: the speeds that noise makes then cost more than following
      is worth. The 8 makes up for commands being slower than what the robot can do.
    - *ctrl_cost*: `ctrl_cost_weight` (default 0.0001) times the sum of the squares of the clipped action.
    - *healthy_reward*: `healthy_reward` (default 0.02) in each step that does not end in termination.

    Standing still for 4000 steps returns 80. With `frame_skip` the rewards of all steps held are summed.

    ## Starting State
    The robot stands upright, not moving, facing +y. Its x and y are drawn uniformly from [-10, 10] m, around the middle
    of the terrain; nothing else is random. The ball's centre starts 0.12 m and the base's origin 0.24 m above the
    highest point of the terrain under the ball, so that the robot first drops by about 3 cm.

    `reset(seed=...)` fixes all starts from then on. It does not change the terrain: that is `terrain_seed`.

    `reset(options={...})` changes this one start. An option left out is as said above:

    | Option     | Type   | Meaning                                                                           | Unit |
    | ---------- | ------ | --------------------------------------------------------------------------------- | ---- |
    | `position` | (x, y) | where the ball's centre is, from -19 to 19                                        | m    |
    | `heading`  | float  | turn of the base about the vertical, counterclockwise from above; 0 faces +y      | rad  |
    | `tilt`     | (x, y) | turn about the ball's centre after that, axis (in the world) times angle          | rad  |
    | `velocity` | (x, y) | of base and ball alike, in the world; nothing turns                               | m/s  |

    A tilt must be below `max_tilt`. `gym.make_vec` takes each for all environments, or one for each.

    ### Pushes
    `env.unwrapped.push(force)` pushes the base at its centre of mass by (x, y, z) N, in the world's frame, from the
    next step on, until a force is given anew ((0, 0, 0) ends it) or the episode ends.

    ### Commands
    With `goal="command"` the velocity to go at is observed, and drawn anew at the start, once in the first 2000 steps
    (4 s) of an episode, so that short ones see changes too, and every 2000 from there on: one in five is to stand
    still, the others have speeds uniform from 0 to 0.6 m/s and directions uniform in the plane.
    `env.unwrapped.command(velocity)` sets it to (x, y) m/s, in the world's frame, up to 2 m/s each: it counts from the
    next step on, until one is set anew or the episode ends. None is drawn in between.

    ### Domain randomization
    `randomization={"push": 1.0, "mass": 0.1}` trains a policy for a robot that is not quite as modelled. It is off by
    default. Each name may be left out; its value is the strength, and 0 is off:

    | `randomization`     | Strength s and its unit      | What is drawn                                               |
    | ------------------- | ---------------------------- | ----------------------------------------------------------- |
    | `terrain_amplitude` | share of `terrain_amplitude` | its hills times 1 + u s, u in ±0.8, ±0.4 and 0              |
    | `mass`              | share of the mass            | mass and inertia of the base times U(1 - s, 1 + s)          |
    | `friction`          | share of the coefficient     | sliding friction of all contacts times U(1 - s, 1 + s)      |
    | `wheel_damping`     | share of `wheel_damping`     | damping of all wheels times U(1 - s, 1 + s)                 |
    | `latency`           | physics steps of 2 ms        | delay of the actions: a whole number from 0 to s            |
    | `tilt`              | degrees                      | tilt at the start: U(0, s), to any side                     |
    | `velocity`          | m/s                          | velocity at the start: U(0, s), in any direction            |
    | `push`              | N·s                          | impulse of each push: U(0, s), in any horizontal direction  |
    | `push_interval`     | s; 1 unless given            | time from push to push, and to the first: U(s/2, 3s/2)      |
    | `obs_noise`         | each sensor's own            | noise on the sensors: Gaussian, of standard deviation s     |

    U(a, b) is uniform. All is drawn by the environment's own generator: noise and pushes as the episode goes on, all
    else at its reset. An option of `reset()` wins over what would be drawn.

    - `latency`: in each physics step the motors get the command of so many physics steps before, and 0 in the first
      ones; `actions` and *ctrl_cost* are of the last command all the same.
    - `push`: a force on the base's centre of mass for 20 ms, or for the actions that last so long, at least one. It
      takes the place of what `push()` set. 1 N·s changes the speed of the robot by some 0.26 m/s.
    - `obs_noise`: on `orientation`, `angular_vel`, `vel` and `motor_state` it is drawn for each observation, on depth
      with each frame (a random stretch of a table of 2^17 Gaussian values or more, which is fast): 0.01 is 0.01 rad,
      rad/s, m/s and m, and 0.1 rad/s of a wheel. What is observed is clipped after it.
    - Mass, friction, damping and hills are fields of each environment's own model (`mujoco.batch`), bit for bit as if
      the model had been compiled with them. `model` is the one that they are drawn around.

    ## Episode End
    ### Termination
    The episode terminates when

    1. the base tilts by more than `max_tilt` (default 20°) from the vertical, or
    2. the physics fails: MuJoCo warns or raises an error, or the state is no longer finite (an action with NaN does
       this). The observation is then finite, that of the robot at the origin in its initial pose, and
       `info["physics_errors"]` has gone up by 1.

    ### Truncation
    The episode is truncated when

    1. it has lasted `max_episode_steps` actions (4000, 8 s at `frame_skip=1`, unless given: see Arguments), or
    2. the base's origin is less than 1 m from the terrain's edge, that is |x| or |y| > 19 m (on flat ground too).

    With `frame_skip` an episode that terminates or comes too close to the edge ends at the physics step, among those
    held, at which this happens.

    A step that terminates is not truncated as well, except by Gymnasium's `TimeLimit`, which may do so at its limit:
    test for termination first.

    ## Info
    `reset()` and `step()` return in `info`:

    | Key              | Type               | Meaning                                          | Unit |
    | ---------------- | ------------------ | ------------------------------------------------ | ---- |
    | `position`       | float64 array (3,) | position of the base's origin in the world       | m    |
    | `physics_errors` | int                | physics failures since this environment was made |      |
    | `randomization`  | dict               | what was drawn, with `randomization` only        |      |

    In `info["randomization"]` are, of the names given: `terrain_amplitude`, `mass`, `friction` and `wheel_damping`, the
    factors, float; `latency`, int; `tilt` and `velocity`, float64 arrays (2,) as `reset()` has them as options; and
    `push`, float64 array (2,), the impulse (x, y) in N·s of the push that acted in this step, else zeros.

    `step()` also returns the reward's terms, which add up to it: `reward_forward` (*forward_reward*), `reward_ctrl`
    (-*ctrl_cost*) and `reward_healthy` (*healthy_reward*), each a float.

    ## Saving and Copying
    `copy.deepcopy` and `pickle` copy an environment, with its wrappers, at any time, and the copy continues bit for
    bit. Windows and OpenGL's contexts are not copied. `env.unwrapped.get_state()` returns all that the future depends
    on, and `env.unwrapped.set_state(state)` continues from there, in an environment made with the same arguments; what
    Gymnasium's wrappers count, as `TimeLimit` does, is not in it. Both exist in `BallbotVectorEnv` too.

    ## Arguments
    All can be given to `gym.make` and `gym.make_vec`:

    ```python
    import gymnasium as gym
    import ballbot_env  # registers Ballbot-v0

    env = gym.make("Ballbot-v0", terrain="flat", wheel_damping=0.8)
    ```

    | Parameter               | Type          | Default    | Unit      | Description                                |
    | ----------------------- | ------------- | ---------- | --------- | ------------------------------------------ |
    | `terrain`               | **str**       | `"perlin"` |           | `"perlin"` (hills) or `"flat"`             |
    | `terrain_seed`          | **int**       | `0`        |           | Which Perlin terrain                       |
    | `terrain_amplitude`     | **float**     | `0.1`      | m         | Height of the terrain, lowest to highest   |
    | `cameras`               | **bool**      | `True`     |           | Whether depth images are observed          |
    | `camera_size`           | **int**       | `64`       | pixels    | Side of the depth images, at least 8       |
    | `camera_rate`           | **float**     | `90.0`     | Hz        | Nominal frame rate, see below              |
    | `wheel_damping`         | **float**     | `0.4`      | N·m·s/rad | Damping of the wheels' hinges (paper: 0.8) |
    | `frame_skip`            | **int**       | `1`        | steps     | Physics steps that an action is held       |
    | `max_episode_steps`     | **int, None** | see below  | actions   | Length at which an episode is truncated    |
    | `max_tilt`              | **float**     | `20.0`     | degrees   | Tilt above which an episode terminates     |
    | `goal`                  | **tuple**     | `(0, 1)`   |           | Direction (x, y) to go, or `"command"`     |
    | `forward_reward_weight` | **float**     | `0.01`     | s/m       | Weight of *forward_reward*                 |
    | `ctrl_cost_weight`      | **float**     | `0.0001`   |           | Weight of *ctrl_cost*                      |
    | `healthy_reward`        | **float**     | `0.02`     |           | *healthy_reward* of a step                 |
    | `randomization`         | **dict, None** | `None`     |           | Strengths: see Domain randomization        |
    | `num_threads`           | **int**       | see below  |           | Threads: physics, frames; 0: one per CPU   |
    | `device`                | **str**       | `"cpu"`    |           | Where frames are rendered, see below       |
    | `render_mode`           | **str, None** | `None`     |           | `"human"` or `"rgb_array"`                 |

    `gym.make_vec` alone takes `num_envs`, `autoreset_mode` and `copy`: see `BallbotVectorEnv`.

    - `camera_rate`: a new frame comes every ceil(500 / `camera_rate`) steps, 6 for 90 Hz; from 500 Hz on, every step.
    - `frame_skip`: steps are physics steps of 2 ms everywhere, in the lengths of episodes too, so that numbers compare
      at any value of it. `max_episode_steps` alone counts actions.
    - `max_episode_steps`: the argument of Gymnasium, with its meaning, in `gym.make` and in `gym.make_vec` in every
      vectorization mode: it counts actions, -1 is no limit, and `None` is 4000, that of the registration. It does not
      follow `frame_skip`: with `frame_skip=4` the 8 s of the task are `max_episode_steps=1000`, and the 4000 of the
      registration are 32 s. The class `BallbotEnv`, made without `gym.make`, has no limit unless it is given one.
    - `num_threads`: 1 by default, and one robot has no use for more. For `gym.make_vec` the default is 0. Results are
      the same, bit for bit, at any number of threads. PyTorch's own threads are neither used nor changed.
    - `device`: a PyTorch device. With `"cuda"` frames are made on the GPU and stay there: `depth_0` and `depth_1` are
      then `torch` tensors on that device instead of arrays; all else is as before.
    - `render_mode`: `"human"` opens MuJoCo's viewer, `"rgb_array"` gives pictures of 640x480 pixels; both need OpenGL,
      which nothing else here does. `gym.make_vec` has `"rgb_array"` only. Arrows show goal or command (green), velocity
      (white, to the same scale) and pushes (red).
    - A picture is drawn 25 times a second: in the 20 steps after it `render()` returns it again, read-only.
      `metadata["render_fps"]` is the rate of actions, 500 Hz / `frame_skip`, so that what `RecordVideo` records, a
      picture for each, plays in real time.

    ## Version History
    * v0: initial version. Since its rollers were mended (`upright_i` in `assets/ballbot.xml`) the robot can drive:
      returns of before do not compare. `motor_state` is clipped at 50 rad/s instead of 20; `frame_skip`, options of
      `reset()`, `push()`, `goal="command"`, `randomization` and the reward's terms in `info` are new.
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": round(1 / TIMESTEP)}

    def __init__(
        self,
        terrain: str = "perlin",
        *,
        frame_skip: int = 1,
        max_episode_steps: int | None = -1,
        num_threads: int = 1,
        render_mode: str | None = None,
        **kwargs,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode is {render_mode!r}: use None, "human" or "rgb_array"')
        self._envs = BallbotVectorEnv(
            1,
            terrain,
            frame_skip=frame_skip,
            max_episode_steps=max_episode_steps,
            num_threads=num_threads,
            autoreset_mode=AutoresetMode.DISABLED,  # a single environment has none
            copy=False,  # `_single` does
            **kwargs,
        )
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": self._envs.metadata["render_fps"]}
        self.model = self._envs.model
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self._viewer = self._data = None

    def reset(self, *, seed: int | None = None, options: Mapping | None = None) -> tuple[dict, dict]:
        """Start an episode. Returns `(observation, info)`. `options` says where and how: see Starting State."""
        super().reset(seed=seed)
        obs, info = self._envs._reset_all([self.np_random], np.array([seed is not None]), options)
        if self.render_mode == "human":
            self.render()
        return self._single(obs), of_first(info)

    def step(self, action: ArrayLike) -> tuple[dict, float, bool, bool, dict]:
        """Hold `action` (3,) for `frame_skip` steps of 2 ms. Returns `(obs, reward, terminated, truncated, info)`."""
        action = np.asarray(action, np.float32)
        if action.shape != (3,):
            raise ValueError(f"action has shape {action.shape}, expected (3,)")
        obs, rewards, terminations, truncations, infos = self._envs._advance(action[None])
        if self.render_mode == "human" and self._envs._clock[0] % 8 < self._envs.frame_skip:
            self.render()
        return (
            self._single(obs),
            float(rewards[0]),
            bool(terminations[0]),
            bool(truncations[0]),
            of_first(infos),
        )

    def push(self, force: ArrayLike) -> None:
        """Push the base at its centre of mass by `force` (3,), N in the world's frame.

        It acts from the next step on, until it is given anew (zeros end it) or the episode ends.
        """
        if np.shape(force) != (3,):
            raise ValueError(f"force has shape {np.shape(force)}, expected (3,)")
        self._envs.push([force])

    def command(self, velocity: ArrayLike) -> None:
        """Want the robot to go at `velocity` (2,), m/s in the world's frame; only with `goal="command"`.

        It counts from the next step on, until it is given anew or the episode ends; none is drawn in between.
        """
        self._envs.command(np.asarray(velocity)[None])

    def render(self) -> np.ndarray | None:
        """The RGB picture, uint8 (480, 640, 3), or None after updating the viewer's window."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render mode: gym.make("Ballbot-v0", render_mode="rgb_array")')
            return None
        if self.render_mode == "rgb_array":
            return self._envs._picture(0)
        self._data = self._envs._mjdata(0, self._data)
        if self._viewer is None:
            import mujoco.viewer

            if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                raise RuntimeError('render_mode="human" needs a display: use "rgb_array" without one')
            self._viewer = mujoco.viewer.launch_passive(self.model, self._data)
        self._viewer.user_scn.ngeom = 0
        draw_arrows(self._viewer.user_scn, self._envs.arrows(0))
        self._viewer.sync()
        return None

    def get_state(self) -> dict:
        """All that the future depends on, as a dict of tensors, numbers and strings, for `set_state`."""
        return self._envs.get_state()

    def set_state(self, state: dict) -> None:
        """Go on, bit for bit, from a `get_state` of an environment made with the same arguments; else ValueError."""
        self._envs.set_state(state)
        self.np_random = self._envs._rngs[0]

    def __getstate__(self):
        return self.__dict__ | {"model": None, "_viewer": None, "_data": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.model = self._envs.model

    def close(self) -> None:
        self._envs.close()
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None

    @staticmethod
    def _single(obs):
        return {key: copied(value[0]) for key, value in obs.items()}


class BallbotVectorEnv(gym.vector.VectorEnv):
    """Many ballbots at once, `gym.make_vec("Ballbot-v0", num_envs=10)`: the task of `BallbotEnv`, stepped on threads.

    Spaces, arguments and dynamics are those of `BallbotEnv`, which documents them; here every array has a
    leading axis of `num_envs`, and actions are float (num_envs, 3).

    - `autoreset_mode` is a `gymnasium.vector.AutoresetMode`, or its value, a string, and says what happens when an
      episode has ended, in the layout of `SyncVectorEnv`. `metadata["autoreset_mode"]` tells which it is.
      - `SAME_STEP` (`"SameStep"`, the default): the step that ends an episode returns the next one's first observation,
        and `info["final_obs"]`, `info["final_info"]` hold the last of the ended one. `info["episode"]` holds return
        `r`, length `l` (physics steps) and time `t` (s) of the episodes that ended, so that `RecordEpisodeStatistics`
        of `gymnasium.wrappers.vector` is not needed; here it needs a `stats_key` of its own.
      - `NEXT_STEP` (`"NextStep"`, for wrappers that want it, as `NormalizeObservation` does): the next step starts the
        new episode, whatever its action, and returns the first observation and a reward of 0. There is no
        `info["episode"]`, which is `RecordEpisodeStatistics`'s; that wrapper counts actions.
      - `DISABLED` (`"Disabled"`): the caller resets what has ended, before the next step, which else raises
        `gymnasium.error.ResetNeeded`.
    - `reset(options={"reset_mask": mask})`, bool (num_envs,), resets some environments, in any mode. The others stay as
      they are; of `info`, only what `_key` marks is told.
    - `copy` (default True, as in `SyncVectorEnv`): what a step returns outlives the next one. With `copy=False`
      `depth_0` and `depth_1` are read-only views of the environments' frame memory: a held frame costs nothing, and a
      new one replaces it. All else is fresh each step.
    - `new_frames`, bool (num_envs,), tells which environments' frames are new since the step before.
    - `reset(seed)` seeds environment i with seed + i, as Gymnasium's vector environments do; a list gives each its own.
      Seeds s and s + 1 then share all but one of their environments: `spawn_seeds` gives independent ones.
    - An environment whose physics fails (MuJoCo warning or error, state not finite) ends its episode as
      terminated and counts it in `info["physics_errors"]`; the others go on.
    - With `randomization` each environment has what it draws for itself.

    To read, or to build on: `model` (MjModel), `batch` (`mujoco.batch.Batch`, the live physics), `goal` (unit vector,
    or None with `goal="command"`), `commands` (m/s, (num_envs, 2), or None without it), `velocities` (the bases', m/s,
    (num_envs, 3)), `slopes()` (of the ground, which no sensor measures), `frames` (float32 tensor (num_envs, 2,
    camera_size, camera_size) in m, or None), `renderer` (`DepthRenderer`), `frame_interval` (steps), `render_seconds`
    (spent on frames so far) and `physics_errors` (num_envs,).

    Results are bit-identical at any `num_threads`.
    """

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": round(1 / TIMESTEP),
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        terrain: str = "perlin",
        terrain_seed: int = 0,
        terrain_amplitude: float = 0.1,
        cameras: bool = True,
        camera_size: int = 64,
        camera_rate: float = 90.0,
        wheel_damping: float = 0.4,
        frame_skip: int = 1,
        max_episode_steps: int | None = None,
        max_tilt: float = 20.0,
        goal: Sequence[float] | str = (0.0, 1.0),
        forward_reward_weight: float = 0.01,
        ctrl_cost_weight: float = 0.0001,
        healthy_reward: float = 0.02,
        randomization: Mapping[str, float] | None = None,
        num_threads: int = 0,
        device: str | torch.device = "cpu",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        copy: bool = True,
    ) -> None:
        self._arguments = deepcopy({name: value for name, value in locals().items() if name != "self"})
        whole = {"num_envs": (num_envs, 1), "terrain_seed": (terrain_seed, 0), "camera_size": (camera_size, 8),
                 "frame_skip": (frame_skip, 1), "num_threads": (num_threads, 0)}  # fmt: skip
        if max_episode_steps is None:
            max_episode_steps = MAX_EPISODE_STEPS
        for name, (value, low) in whole.items():
            need(is_number(value, (int, np.integer)) and value >= low, name, value, f"a whole number from {low} on")
        limited = is_number(max_episode_steps, (int, np.integer)) and max_episode_steps >= 1
        need(limited or max_episode_steps == -1, "max_episode_steps", max_episode_steps,
             "a whole number from 1 on, or -1 for no limit")  # fmt: skip
        need(terrain in ("perlin", "flat"), "terrain", terrain, '"perlin" or "flat"')
        need(not is_number(terrain_amplitude) or terrain_amplitude <= 100, "terrain_amplitude", terrain_amplitude,
             "a height of 100 m or less")  # fmt: skip
        above_0 = {"terrain_amplitude": (terrain_amplitude, 'a height above 0 m, or terrain="flat"'),
                   "camera_rate": (camera_rate, "a rate above 0 Hz")}  # fmt: skip
        for name, (value, what) in above_0.items():
            need(is_number(value) and value > 0, name, value, what)
        for name, value in {"cameras": cameras, "copy": copy}.items():
            need(isinstance(value, bool), name, value, "True or False")
        need(is_number(wheel_damping) and 0 <= wheel_damping <= 1e6, "wheel_damping", wheel_damping,
             "a damping of 0 N·m·s/rad or more, to 1e6")  # fmt: skip
        need(is_number(max_tilt) and 0 < max_tilt < 90, "max_tilt", max_tilt, "an angle between 0 and 90 degrees")
        direction = np.asarray(goal, dtype=object)
        commanded = isinstance(goal, str) and goal == "command"
        need(commanded or (direction.shape == (2,) and all(map(is_number, direction)) and any(direction)), "goal", goal,
             'a direction (x, y) other than (0, 0), or "command"')  # fmt: skip
        weights = {"forward_reward_weight": forward_reward_weight, "ctrl_cost_weight": ctrl_cost_weight,
                   "healthy_reward": healthy_reward}  # fmt: skip
        for name, value in weights.items():
            need(is_number(value), name, value, "a finite number")
        try:
            torch.empty(0, device=torch.device(device))
        except (RuntimeError, TypeError, AssertionError):  # a string that is no device, no string, no GPU
            need(False, "device", device, 'a device that PyTorch finds here, such as "cpu"')
        need(render_mode in (None, "rgb_array"), "render_mode", render_mode, 'None or "rgb_array"')
        modes = [value for mode in AutoresetMode for value in (mode, mode.value)]
        need(autoreset_mode in modes, "autoreset_mode", autoreset_mode, '"SameStep", "NextStep" or "Disabled"')
        self.num_envs = num_envs
        self.frame_skip = frame_skip
        self.render_mode = render_mode
        self.randomization = checked_randomization(randomization, terrain, max_tilt)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        fps = self.metadata["render_fps"] / frame_skip  # a picture for each action
        self.metadata["render_fps"] = int(fps) if fps.is_integer() else fps  # gymnasium.utils.play wants an int
        self.max_episode_steps = max_episode_steps if limited else math.inf  # actions
        self._max_lean = math.sin(math.radians(max_tilt) / 2) ** 2  # x² + y² of the quaternion at the largest tilt
        self.goal = None if commanded else np.asarray(goal, dtype=float) / math.hypot(*goal)
        self.commands = np.zeros((num_envs, 2)) if commanded else None  # m/s
        self._commands_due = np.zeros(num_envs, int)  # the step of the episode after which the next is drawn
        self._weights = tuple(weights.values())
        self.frame_interval = math.ceil(1 / (camera_rate * TIMESTEP) - 1e-9)

        low, high = -np.ones(3, np.float32), np.ones(3, np.float32)
        self.single_action_space = spaces.Box(low, high)
        boxes = {"orientation": np.float32(math.pi), "angular_vel": 2, "vel": 2, "motor_state": 5, "actions": 1}
        boxes = {key: spaces.Box(low * bound, high * bound) for key, bound in boxes.items()}
        if cameras:
            shape = (1, camera_size, camera_size)
            boxes |= {f"depth_{i}": spaces.Box(0, MAX_DEPTH, shape, np.float32) for i in (0, 1)}
            age = max(self.frame_interval - 1, 1) * TIMESTEP  # a space needs some extent
            boxes["relative_image_timestamp"] = spaces.Box(0, np.float32(age), (1,), np.float32)
        if commanded:
            boxes["command"] = spaces.Box(-2, 2, (2,), np.float32)
        self.single_observation_space = spaces.Dict(boxes)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        reliefs, share = (1.0,), self.randomization.get("terrain_amplitude")
        if share:
            reliefs = 1 + share * np.linspace(1 / NUM_RELIEFS - 1, 1 - 1 / NUM_RELIEFS, NUM_RELIEFS)
        self.model = make_model(terrain, terrain_seed, terrain_amplitude, wheel_damping, reliefs)
        self._heights = None  # m, (nodes, nodes); None on flat ground
        if terrain == "perlin":
            self._heights = perlin_terrain(terrain_seed) * np.float32(terrain_amplitude)
        self.batch = mujoco.batch.Batch(self.model, num_envs, num_threads)
        base, ball = self.model.joint("base"), self.model.joint("ball")
        wheels = [self.model.joint(f"wheel_{i}").dofadr[0] for i in range(3)]
        qpos, self._qvel = self.batch.bind("qpos"), self.batch.bind("qvel")
        pose, place = slice(base.qposadr[0], base.qposadr[0] + 7), slice(ball.qposadr[0], ball.qposadr[0] + 3)
        self._position, self._quaternion = qpos[:, pose][:, :3], qpos[:, pose][:, 3:]
        self._ball_position = qpos[:, place]
        # The physics steps during which an action is held: (num_envs, frame_skip, ...)
        self._record = {
            name: np.empty((num_envs, frame_skip, size))
            for name, size in (("qpos", self.model.nq), ("qvel", self.model.nv))
        }
        self._held_position = self._record["qpos"][:, :, pose][:, :, :3]
        self._held_quaternion = self._record["qpos"][:, :, pose][:, :, 3:]
        # Where the observed velocities stand: the base's angular and linear ones, then those of the wheels
        start = base.dofadr[0]
        self._velocity_columns = np.r_[start + 3 : start + 6, start : start + 3, wheels]
        self._velocity_scale, self._velocity_bound = np.repeat([1, 0.1], [6, 3]), np.repeat([2.0, 5.0], [6, 3])
        self._step_numbers = np.arange(1, frame_skip + 1)
        self.velocities = self._qvel[:, start : start + 3]
        self._linear_velocities = [slice(joint.dofadr[0], joint.dofadr[0] + 2) for joint in (base, ball)]  # x and y
        self._motors = self.batch.bind("ctrl")[:, :3]
        self._forces = self.batch.bind("xfrc_applied")[:, self.model.body("base").id, :3]
        self._warnings = self.batch.warning[:, :, 1]
        self._start_state = self.batch.state[0].copy()
        if self.randomization:
            self._prepare_randomization(reliefs, camera_size if cameras else 0, device)

        self._rngs = [None] * num_envs
        self._actions = np.zeros((num_envs, 3), np.float32)
        self._clock = np.zeros(num_envs, int)  # physics steps since the last seeded reset: the cameras run freely on it
        self._observed_at = np.zeros(num_envs, int)  # clock of the last observation
        self._ended = np.zeros(num_envs, bool)  # waiting for a reset
        self._steps = np.zeros(num_envs, int)
        self._returns = np.zeros(num_envs)
        self._started = np.zeros(num_envs)  # s
        self._everyone = np.ones(num_envs, bool)
        self._everyone.flags.writeable = False
        self.physics_errors = np.zeros(num_envs, int)
        self.final_slopes = np.zeros((num_envs, 6), np.float32)
        self.render_seconds = 0.0  # spent on depth frames
        self._needs_reset = True
        self.new_frames = np.zeros(num_envs, bool)
        self.renderer = None
        self.frames = None  # float32 tensor (num_envs, 2, camera_size, camera_size), m
        if cameras:
            self.renderer = DepthRenderer(self.model, camera_size, self._heights, device, self.batch.nthread)
            with one_thread():
                shape = num_envs, 2, camera_size, camera_size
                self.frames = views = torch.full(shape, MAX_DEPTH, dtype=torch.float32, device=device)
            self._frame_time = np.zeros(num_envs, int)  # clock at which each frame was taken
            if views.device.type == "cpu":
                views = views.numpy().view()
                views.flags.writeable = False
            self._frame_views = {f"depth_{i}": views[:, i : i + 1] for i in (0, 1)}
        self._terrain = dict(terrain=terrain, terrain_seed=terrain_seed, terrain_amplitude=terrain_amplitude)
        self._painters = [None] * num_envs
        self._pictures = [(None, None)] * num_envs  # when each was drawn, and the picture
        self._copy = copy
        self._made = set(self.__dict__)  # made anew in a copy

    # Gymnasium's interface

    _spec = None

    @property
    def spec(self):
        """The EnvSpec that `gym.make_vec` sets, with the `max_episode_steps` of these environments."""
        return self._spec

    @spec.setter
    def spec(self, spec):
        limit = None if self.max_episode_steps == math.inf else self.max_episode_steps
        self._spec = spec and replace(spec, max_episode_steps=limit)

    def reset(self, *, seed: int | Sequence | None = None, options: Mapping | None = None) -> tuple[dict, dict]:
        """Start all episodes anew. Returns `(observation, info)`.

        `seed`: int, list of int, or None to go on. `options` are those of `BallbotEnv`, each for all or one for each:
        position (2,) or (num_envs, 2), and so on; and `reset_mask`, bool (num_envs,), which environments to reset.
        """
        seeds = [seed] * self.num_envs if seed is None else seed
        if isinstance(seeds, (int, np.integer)):
            seeds = [int(seeds) + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one each, or one int")
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", self._everyone))
        need(mask.dtype == bool and mask.shape == (self.num_envs,) and mask.any(), "reset_mask", mask,
             f"a bool array ({self.num_envs},), somewhere True")  # fmt: skip
        if self._needs_reset and not mask.all():
            raise gym.error.ResetNeeded("call reset() without a reset_mask first")
        rngs = [
            rng if rng is not None and (s is None or not masked) else gym.utils.seeding.np_random(s)[0]
            for rng, s, masked in zip(self._rngs, seeds, mask)
        ]
        return self._reset_all(rngs, np.array([s is not None for s in seeds]), options, mask)

    def step(self, actions: ArrayLike) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Hold `actions` for `frame_skip` steps. Returns `(obs, rewards, terminations, truncations, infos)`."""
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            return self._step_without_reset(actions)
        obs, rewards, terminations, truncations, infos = self._advance(actions)
        done = terminations | truncations
        if np.count_nonzero(done):
            ids = np.flatnonzero(done)
            elapsed = np.round(time.perf_counter() - self._started, 6)
            episode = {
                "r": np.where(done, self._returns, 0.0),
                "l": np.where(done, self._steps, 0),
                "t": np.where(done, elapsed, 0.0),
            }
            final_obs = np.full(self.num_envs, None, object)
            for i in ids:
                final_obs[i] = {key: copied(value[i]) for key, value in obs.items()}
            final_info = of_some(infos, done)
            self.final_slopes = self.slopes()
            self._reset(ids)
            obs = self._observe()
            # Of an ended episode the reward's terms are in final_info only
            infos = self._infos() | of_some({key: infos[key] for key in REWARD_TERMS}, ~done)
            infos |= {"episode": episode, "_episode": done.copy()}
            infos |= {"final_obs": final_obs, "_final_obs": done.copy()}
            infos |= {"final_info": final_info, "_final_info": done.copy()}
        return obs, rewards, terminations, truncations, infos

    def _step_without_reset(self, actions):
        """A step that leaves an ended episode's last observation; with NEXT_STEP those that ended before start anew."""
        starting = self._ended
        if not np.count_nonzero(starting):
            obs, rewards, terminations, truncations, infos = self._advance(actions)
        elif self.autoreset_mode is AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(f"environments {', '.join(map(str, np.flatnonzero(starting)))} have ended: "
                                        'call reset(options={"reset_mask": ...}) before step()')  # fmt: skip
        else:
            ids, clock, errors = np.flatnonzero(starting), self._clock[starting], self.physics_errors[starting]
            # Their physics goes on as well, and is then undone
            _, rewards, terminations, truncations, infos = self._advance(actions, starting)
            self._clock[ids], self.physics_errors[ids] = clock, errors
            self._reset(ids)
            for result in (rewards, terminations, truncations):
                result[ids] = 0
            obs = self._observe()
            infos = self._infos() | of_some({key: infos[key] for key in REWARD_TERMS}, ~starting)
        self._ended = terminations | truncations
        return obs, rewards, terminations, truncations, infos

    def push(self, forces: ArrayLike) -> None:
        """Push the bases at their centres of mass by `forces` (num_envs, 3), N in the world's frame.

        They act from the next step on, until they are given anew (zeros end them) or the episode ends.
        """
        if np.shape(forces) != (self.num_envs, 3):
            raise ValueError(f"forces have shape {np.shape(forces)}, expected ({self.num_envs}, 3)")
        self._forces[:] = forces

    def command(self, velocities: ArrayLike) -> None:
        """Want the robots to go at `velocities` (num_envs, 2), m/s in the world's frame; only with `goal="command"`.

        They count from the next step on, until they are given anew or the episode ends; none is drawn in between.
        """
        if self.commands is None:
            raise ValueError('command() needs the goal "command": gym.make("Ballbot-v0", goal="command")')
        velocities = np.asarray(velocities, float)
        if velocities.shape != (self.num_envs, 2):
            raise ValueError(f"velocities have shape {velocities.shape}, expected ({self.num_envs}, 2)")
        need((np.abs(velocities) <= 2).all(), "the velocity", velocities, "x and y from -2 to 2 m/s")
        self.commands[:], self._commands_due[:] = velocities, np.iinfo(int).max

    def slopes(self) -> np.ndarray:
        """Slopes of the ground along x and y, (num_envs, 6) float32: under the ball, 0.3 m and 0.6 m on.

        On is towards the goal or the command. No sensor measures them: they are for a critic, in training alone
        (asymmetric actor-critic, Pinto et al., arXiv 1710.06542). After a step that ended episodes, `final_slopes`
        holds the slopes at their final observations.
        """
        if self._heights is None:
            return np.zeros((self.num_envs, 6), np.float32)
        on = self.goal  # a unit vector
        if on is None:
            on = self.commands / np.maximum(np.linalg.norm(self.commands, axis=1, keepdims=True), 1e-9)
        ahead = np.array([0, 0.3, 0.6])[:, None, None] * on[..., None, None, :]
        places = self._ball_position[:, None, None, :2] + ahead  # (num_envs, 3, 1, 2)
        around = places + BALL_RADIUS * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # (num_envs, 3, 4, 2)
        cells = (around + TERRAIN_EXTENT) * ((TERRAIN_NODES - 1) / (2 * TERRAIN_EXTENT)) + 0.5
        col, row = np.moveaxis(np.clip(cells, 0, TERRAIN_NODES - 1).astype(int), -1, 0)
        heights = self._heights[row, col] * (1 if self._relief is None else self._relief[:, None, None])
        slopes = (heights[..., :2] - heights[..., 2:]) / (2 * BALL_RADIUS)
        return slopes.reshape(self.num_envs, 6).astype(np.float32)

    _kept = "_actions", "_clock", "_observed_at", "_ended", "_steps", "_returns", "physics_errors"  # by get_state

    def get_state(self) -> dict:
        """All that the future depends on, as a dict of tensors, numbers and strings, for `set_state`."""
        if self._rngs[0] is None:
            raise gym.error.ResetNeeded("call reset() before get_state()")
        state = {
            "physics": torch.tensor(self.batch.state),
            "warnings": torch.tensor(self.batch.warning),
            "rngs": json.dumps([rng.bit_generator.state for rng in self._rngs]),
        }
        for name in self._kept:
            state[name] = torch.tensor(getattr(self, name))
        if self.commands is not None:
            state |= {"commands": torch.tensor(self.commands), "commands_due": torch.tensor(self._commands_due)}
        if self.randomization:
            state["drawn"] = {name: torch.tensor(value) for name, value in self._drawn.items()}
        if self.frames is not None:
            state |= {"frames": self.frames.clone(), "frame_time": torch.tensor(self._frame_time)}
        return state

    def set_state(self, state: dict) -> None:
        """Go on, bit for bit, from a `get_state` of an environment made with the same arguments.

        Raises ValueError on what is none, and is then as it was.
        """
        rngs = [np.random.default_rng() for _ in range(self.num_envs)]
        if self._needs_reset:
            self._rngs = rngs
        wrong = unlike(state, self.get_state())
        if not wrong and not (0 <= state["_clock"].min() and state["_clock"].max() < 2**53):
            wrong = "clock"
        drawn = {} if wrong else state.get("drawn", {})
        for name, high in (("latency", self.randomization.get("latency")), ("_relief", NUM_RELIEFS - 1)):
            if name in drawn and not 0 <= drawn[name].min() <= drawn[name].max() <= high:
                wrong = name.strip("_")
        try:
            for rng, rng_state in zip(rngs, json.loads(state["rngs"]), strict=True):
                rng.bit_generator.state = rng_state
        except Exception:  # NumPy raises many kinds
            wrong = wrong or "rngs"
        if wrong:
            raise ValueError(f"{wrong} is not as these environments have it")
        self._rngs = rngs
        self.batch.state[:] = state["physics"].numpy()
        self.batch.warning[:] = state["warnings"].numpy()
        for name in self._kept:
            getattr(self, name)[:] = state[name].numpy()
        if self.randomization:
            for name, value in self._drawn.items():
                value[:] = state["drawn"][name].numpy()
            self._change_models(np.arange(self.num_envs))
        self._started[:] = time.perf_counter()
        if self.commands is not None:
            self.commands[:], self._commands_due[:] = state["commands"].numpy(), state["commands_due"].numpy()
        if self.frames is not None:
            self.frames.copy_(state["frames"])
            self._frame_time[:] = state["frame_time"].numpy()
            self.new_frames[:] = True
        self._needs_reset = False
        self._pictures = [(None, None)] * self.num_envs

    def __getstate__(self):
        names = {"_rngs", "new_frames", "action_space", "single_action_space"}
        names |= self.__dict__.keys() - self._made  # a subclass's, and what was set from outside
        state = None if self._needs_reset else self.get_state()
        return self._arguments, state, {name: self.__dict__[name] for name in names}

    def __setstate__(self, pickled):
        arguments, state, attributes = pickled
        BallbotVectorEnv.__init__(self, **arguments)
        if state is not None:
            self.set_state(state)
        self.__dict__.update(attributes)

    def arrows(self, i: int, force: ArrayLike | None = None) -> list[tuple]:
        """What `draw_arrows` shows of environment i: its goal, its velocity and a push, of `force` if it is given."""
        goal = self.goal if self.commands is None else self.commands[i]
        return make_arrows(self._position[i], goal, self.velocities[i], self._forces[i] if force is None else force)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """RGB pictures, uint8 (480, 640, 3), one per environment, by MuJoCo's OpenGL renderer."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render mode: gym.make_vec("Ballbot-v0", render_mode="rgb_array")')
            return None
        return tuple(self._picture(i) for i in range(self.num_envs))

    def close_extras(self, **kwargs) -> None:
        for painter in filter(None, self._painters):
            painter.close()
        self._painters = [None] * self.num_envs

    # What both environments share

    def _reset_all(self, rngs, seeded, options, mask=None):
        """Reset all environments, or those of a mask (num_envs,); `seeded` ones' (num_envs,) cameras start anew."""
        starts = self._starts(options or {})
        mask = self._everyone if mask is None else mask
        self._rngs = rngs
        self._clock[seeded & mask] = 0
        self._needs_reset = False
        self._ended = self._ended & ~mask
        self.new_frames[:] = False
        self._reset(np.flatnonzero(mask), starts)
        infos = self._infos()
        return self._observe(), infos if mask.all() else of_some(infos, mask)

    def _starts(self, options):
        """The options of a reset, each (num_envs, ...)."""
        starts = {}
        limits = {
            "position": ((2,), f"x and y from {EDGE - TERRAIN_EXTENT:g} to {TERRAIN_EXTENT - EDGE:g} m"),
            "heading": ((), "an angle in rad"),
            "tilt": ((2,), "angles about x and y in rad, less than max_tilt"),
            "velocity": ((2,), "x and y in m/s"),
        }
        for name, value in options.items():
            if name not in limits:
                raise ValueError(f"reset() has no option {name!r}: there are {', '.join(limits)}")
            shape, what = limits[name]
            try:
                start = np.asarray(value, float)
            except (TypeError, ValueError):
                start = np.array(np.nan)
            good = start.shape in (shape, (self.num_envs, *shape)) and np.isfinite(start).all()
            if good and name == "position":
                good = np.abs(start).max() <= TERRAIN_EXTENT - EDGE
            if good and name == "tilt":
                good = np.sin(np.linalg.norm(start, axis=-1).max() / 2) ** 2 < self._max_lean
            need(
                good, name, value, f"{what}, of shape {shape}" + f" or {(self.num_envs, *shape)}" * (self.num_envs > 1)
            )
            starts[name] = np.broadcast_to(start, (self.num_envs, *shape))
        return starts

    def _reset(self, ids, starts=None):
        """New start poses for the environments `ids`, and their first frames. `starts` is for all environments."""
        self.batch.state[ids] = self._start_state
        self.batch.warning[ids] = 0
        for i in ids:
            self._pictures[i] = None, None
            x, y = self._rngs[i].uniform(-START_EXTENT, START_EXTENT, 2)
            if starts and "position" in starts:
                x, y = starts["position"][i]
            if self.randomization:
                self._draw(i)
            ground = self._highest(x, y) * (1 if self._relief is None else self._relief[i])
            self._position[i] = x, y, ground + BASE_START
            self._ball_position[i] = x, y, ground + BALL_START
        if self.randomization:
            starts = self._drawn_starts(ids, starts or {})
            self._change_models(ids)
        if self.commands is not None:
            self._draw_commands(ids)
            self._commands_due[ids] = [self._rngs[i].integers(1, COMMAND_STEPS + 1) for i in ids]
        if starts:
            still = np.zeros((self.num_envs, 2))
            self._turn(ids, starts.get("heading", still[:, 0])[ids], starts.get("tilt", still)[ids])
            for columns in self._linear_velocities:
                self._qvel[ids, columns] = starts.get("velocity", still)[ids]
        self._actions[ids] = 0
        self._steps[ids] = 0
        self._returns[ids] = 0
        self._started[ids] = time.perf_counter()
        self._observed_at[ids] = self._clock[ids]
        self._take_frames(ids, self._position[ids], self._quaternion[ids], self._clock[ids])

    def _draw_commands(self, ids):
        """New commands for the environments `ids`."""
        for i in ids:
            kind, speed, turn = self._rngs[i].random(3)
            speed = 0 if kind < STANDING else MAX_COMMAND * speed
            self.commands[i] = speed * math.cos(2 * math.pi * turn), speed * math.sin(2 * math.pi * turn)

    def _turn(self, ids, heading, tilt):
        """Turn upright bases `ids` (n,) by `heading` (n,), then by `tilt` (n, 2) about their balls' centres, rad."""
        angle = np.linalg.norm(tilt, axis=1)
        w, (x, y) = np.cos(angle / 2), tilt.T * np.sinc(angle / (2 * np.pi)) / 2
        cos, sin = np.cos(heading / 2), np.sin(heading / 2)
        quaternion = np.stack([w * cos, x * cos + y * sin, y * cos - x * sin, w * sin], 1)
        self._quaternion[ids] = quaternion
        self._position[ids] += (BASE_START - BALL_START) * (rotation_matrix(quaternion)[:, :, 2] - [0, 0, 1])

    def _highest(self, x, y):
        """Highest terrain node, m, under a ball centred at (x, y), one cell beyond its radius included."""
        if self._heights is None:
            return 0.0
        cell = 2 * TERRAIN_EXTENT / (TERRAIN_NODES - 1)
        reach = BALL_RADIUS + cell
        row, col = (slice(int((c + TERRAIN_EXTENT - reach) / cell) + 1, int((c + TERRAIN_EXTENT + reach) / cell) + 1)
                    for c in (y, x))  # fmt: skip
        return float(self._heights[row, col].max())

    def _take_frames(self, ids, position, quaternion, clock):
        """Frames of the environments `ids` from poses (n, 3) and (n, 4), taken at `clock` (n,)."""
        if self.frames is None:
            return
        started = time.perf_counter()
        with one_thread():
            frames = self.renderer.render(position, quaternion, None if self._relief is None else self._relief[ids])
            if "obs_noise" in self.randomization:
                starts = [self._rngs[i].integers(len(self._frame_noise)) for i in ids]
                frames += self._frame_noise[torch.tensor(starts, device=frames.device)].view_as(frames)
                frames.clamp_(0, MAX_DEPTH)
            if len(ids) == self.num_envs:
                self.frames.copy_(frames)
            else:
                self.frames[torch.from_numpy(ids)] = frames
        self._frame_time[ids] = clock
        self.new_frames[ids] = True
        self.render_seconds += time.perf_counter() - started

    def _advance(self, actions, starting=None):
        """Hold actions for `frame_skip` physics steps, without autoreset.

        The environments `starting`, bool (num_envs,), are reset by the caller afterwards, and draw nothing here."""
        if self._needs_reset:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions, np.float32)
        if actions.shape != (self.num_envs, 3):
            raise ValueError(f"actions have shape {actions.shape}, expected ({self.num_envs}, 3)")
        if starting is not None:
            actions = np.where(starting[:, None], np.float32(0), actions)
        self._actions = np.minimum(np.maximum(actions, -1), 1)
        np.multiply(self._actions, -MAX_TORQUE, out=self._motors)
        if "push" in self.randomization:
            self._push_at_random(starting)
        controls = self._delayed() if "latency" in self.randomization else None
        broken = None
        try:
            self.batch.rollout(self.frame_skip, control=controls, record=("qpos", "qvel"), out=self._record)
        except mujoco.batch.SimulationError as error:
            broken = np.zeros(self.num_envs, bool)
            broken[error.ids] = True
        state = self.batch.state
        if np.count_nonzero(self._warnings) or not math.isfinite(state.sum() + self._actions.sum()):
            broken = np.zeros(self.num_envs, bool) if broken is None else broken
            broken |= self._warnings.any(1) | ~np.isfinite(state).all(1) | ~np.isfinite(self._actions).all(1)
        if broken is not None:
            broken = np.flatnonzero(broken)
            state[broken] = self._start_state  # finite, whatever the physics left behind
            self._record["qpos"][broken] = self.batch.qpos[broken, None]
            self._record["qvel"][broken] = self.batch.qvel[broken, None]
            self._actions[broken] = np.nan_to_num(self._actions[broken])
            if controls is not None:
                self._drawn["_commands"][broken] = 0

        # By physics step held, (num_envs, frame_skip): what ends the episode, and the rewards
        x, y = self._held_quaternion[:, :, 1], self._held_quaternion[:, :, 2]
        fell = x * x + y * y > self._max_lean
        if broken is not None:
            fell[broken, 0] = True
            self.physics_errors[broken] += 1
        over = self._steps[:, None] + self._step_numbers >= self.max_episode_steps * self.frame_skip
        outside = np.abs(self._held_position[:, :, :2]) > TERRAIN_EXTENT - EDGE
        if np.count_nonzero(outside):
            over |= outside.any(2)
        over &= ~fell
        taken = np.full(self.num_envs, self.frame_skip)  # physics steps until the episode ends or the next action
        if np.count_nonzero(fell) or np.count_nonzero(over):
            ended = fell | over
            early = np.flatnonzero(ended[:, :-1].any(1))
            taken[early] = ended[early].argmax(1) + 1
            self.batch.qpos[early] = self._record["qpos"][early, taken[early] - 1]
            self.batch.qvel[early] = self._record["qvel"][early, taken[early] - 1]
            counted = self._step_numbers <= taken[:, None]
            fell &= counted
            over &= counted
            healthy = (counted & ~fell).sum(1)
        else:
            counted, healthy = True, taken
        terminations, truncations = fell.any(1), over.any(1)
        velocity = np.minimum(np.maximum(self._record["qvel"][:, :, self._velocity_columns[3:5]], -2), 2)
        if self.commands is None:
            speed = velocity @ self.goal
        else:
            wanted = self.commands[:, None]
            speed = 8 * (np.square(wanted).sum(2) - np.square(velocity - wanted).sum(2))
        forward_weight, ctrl_weight, healthy_weight = self._weights
        forward = forward_weight * (speed * counted).sum(1)
        ctrl = -ctrl_weight * np.square(self._actions, dtype=float).sum(1) * taken
        healthy = healthy_weight * healthy
        rewards = forward + ctrl + healthy

        due = (self._clock + taken) // self.frame_interval * self.frame_interval  # clock of the newest frame
        self.new_frames[:] = False
        if self.frames is not None:
            ids = np.flatnonzero((due > self._clock) if starting is None else (due > self._clock) & ~starting)
            if len(ids):
                at = ids, due[ids] - self._clock[ids] - 1
                self._take_frames(ids, self._held_position[at], self._held_quaternion[at], due[ids])
        self._observed_at = self._clock + taken
        self._clock += self.frame_skip
        self._steps += taken
        self._returns += rewards
        if self.commands is not None:
            due = np.flatnonzero((self._steps >= self._commands_due) & (True if starting is None else ~starting))
            self._draw_commands(due)
            self._commands_due[due] += COMMAND_STEPS
        infos = self._infos()
        infos |= dict(zip(REWARD_TERMS, (forward, ctrl, healthy))) | {f"_{key}": self._everyone for key in REWARD_TERMS}
        if "obs_noise" in self.randomization:
            self._draw_noise(np.arange(self.num_envs) if starting is None else np.flatnonzero(~starting))
        return self._observe(), rewards, terminations, truncations, infos

    def _observe(self):
        w, x, y, z = self._quaternion.T.copy()
        sine = np.sqrt(x * x + y * y + z * z)
        half_angle = np.arctan2(np.copysign(sine, w), np.abs(w))
        scale = 2 * half_angle / np.maximum(sine, 1e-9)
        velocity = self._qvel[:, self._velocity_columns] * self._velocity_scale
        values = np.empty((self.num_envs, 15), np.float32)
        np.multiply(self._quaternion[:, 1:], scale[:, None], out=values[:, :3])
        if "obs_noise" in self.randomization:
            noise = self._drawn["_noise"]
            values[:, :3] = np.minimum(np.maximum(values[:, :3] + noise[:, :3], -math.pi), math.pi)
            velocity += noise[:, 3:]
        np.minimum(np.maximum(velocity, -self._velocity_bound), self._velocity_bound, out=velocity)
        values[:, 3:12] = velocity
        values[:, 12:] = self._actions
        obs = {key: values[:, 3 * i : 3 * i + 3] for i, key in enumerate(PROPRIOCEPTION)}
        if self.frames is not None:
            age = (self._observed_at - self._frame_time) * TIMESTEP
            views = self._frame_views
            obs |= {key: copied(view) for key, view in views.items()} if self._copy else views
            obs |= {"relative_image_timestamp": age.astype(np.float32)[:, None]}
        if self.commands is not None:
            obs["command"] = self.commands.astype(np.float32)
        return obs

    def _infos(self):
        infos = {"position": self._position.copy(), "physics_errors": self.physics_errors.copy()}
        infos |= {"_position": self._everyone, "_physics_errors": self._everyone}
        if self.randomization:
            drawn = {name: value.copy() for name, value in self._drawn.items() if name[0] != "_"}
            infos |= {"randomization": drawn | {f"_{name}": self._everyone for name in drawn}}
            infos |= {"_randomization": self._everyone}
        return infos

    def _picture(self, i):
        """The picture of environment i: that of before, read-only, until PICTURE_STEPS have passed."""
        due, picture = self._pictures[i]
        if due == self._clock[i] // PICTURE_STEPS:
            return picture
        place, terrain, painter = self._position[i, :2], self._terrain, self._painters[i]
        if self._relief is not None:  # the hills that are drawn
            terrain = terrain | {"terrain_amplitude": terrain["terrain_amplitude"] * self._relief[i]}
        if painter is None or not painter.covers(place, **terrain):
            if painter is not None:
                painter.close()
            try:
                self._painters[i] = painter = Painter(480, 640, [place - 2, place + 2], 0, **terrain)
            except Exception as error:  # whatever the platform's OpenGL raises
                raise RuntimeError(
                    'render_mode="rgb_array" needs OpenGL, training does not: without a display install a renderer '
                    "(Debian: apt-get install libosmesa6) and set MUJOCO_GL=osmesa, or MUJOCO_GL=egl on a GPU"
                ) from error
        picture = painter.picture(self.batch.qpos[i], self.arrows(i))
        picture.flags.writeable = False
        self._pictures[i] = self._clock[i] // PICTURE_STEPS, picture
        return picture

    def _mjdata(self, i, data=None):
        data = self.batch.get_data(i, data)
        if self._relief is not None:  # the hills that are drawn
            self.model.geom_dataid[self.model.geom("ground").id] = self._drawn["_relief"][i]
        mujoco.mj_forward(self.model, data)
        return data

    # Domain randomization

    _relief = None  # (num_envs,), factors on the height of the hills, where they differ

    def _prepare_randomization(self, reliefs, camera_size, device):
        """Memory for what is drawn, and the model fields that follow from it. `camera_size` is 0 without cameras."""
        model, batch, n = self.model, self.batch, self.num_envs
        self._reliefs = np.asarray(reliefs)
        given = self.randomization
        factors = [name for name in ("terrain_amplitude", "mass", "friction", "wheel_damping") if name in given]
        # What is drawn, (num_envs, ...): all of it is in `get_state`, and what has no underscore is told in `info`
        self._drawn = {name: np.ones(n) for name in factors}
        if "terrain_amplitude" in given:
            self._relief = self._drawn["terrain_amplitude"]
            self._drawn["_relief"] = np.zeros(n, int)  # which height field
            self._height_fields = batch.expand("geom_dataid")[:, model.geom("ground").id]
        if "latency" in given:
            self._drawn["latency"] = np.zeros(n, int)
            # The commands of the last physics steps, oldest first
            self._drawn["_commands"] = np.zeros((n, int(given["latency"]), 3), np.float32)
            self._controls = np.zeros((n, self.frame_skip, model.nu))
        self._drawn |= {name: np.zeros((n, 2)) for name in ("tilt", "velocity", "push") if name in given}
        if "push" in given:
            # In actions: until the next push begins, and until the last one ends
            self._drawn |= {"_next_push": np.zeros(n, int), "_push_ends": np.zeros(n, int)}
        if "obs_noise" in given:
            self._drawn["_noise"] = np.zeros((n, 12), np.float32)  # in the order of the observation
            if camera_size:
                size = 2 * camera_size**2  # of both frames
                table = np.random.default_rng(0).standard_normal(max(2**17, 4 * size), np.float32) * given["obs_noise"]
                # Every stretch of the table that is as long as both frames, without copies: (stretches, size)
                self._frame_noise = torch.from_numpy(table).float().to(device).unfold(0, size, 1)
        base, ball, ground = model.body("base").id, model.geom("ball").id, model.geom("ground").id
        wheels = [model.joint(f"wheel_{i}").dofadr[0] for i in range(3)]
        parts = {"mass": [("body_mass", base), ("body_inertia", base)],
                 "friction": [("geom_friction", (geom, 0)) for geom in (ball, ground)]
                 + [("pair_friction", (slice(None), slice(2)))],
                 "wheel_damping": [("dof_damping", wheel) for wheel in wheels]}  # fmt: skip
        # Parts of model fields, (num_envs, ...), their usual values, and the factor that they follow
        self._fields = []
        for name in factors:
            for field, part in parts.get(name, ()):
                part = part if isinstance(part, tuple) else (part,)
                values = batch.expand(field)[(slice(None), *part)]
                self._fields.append((values, np.array(getattr(model, field)[part]), name))

    def _draw(self, i):
        """What the episode of environment i differs in, in the order of RANDOMIZATION."""
        rng, drawn, given = self._rngs[i], self._drawn, self.randomization
        for name, strength in given.items():
            if name == "terrain_amplitude":
                drawn["_relief"][i] = rng.integers(len(self._reliefs))
                drawn[name][i] = self._reliefs[drawn["_relief"][i]]
            elif name in ("mass", "friction", "wheel_damping"):
                drawn[name][i] = rng.uniform(1 - strength, 1 + strength)
            elif name == "latency":
                drawn[name][i] = rng.integers(int(strength) + 1)
                drawn["_commands"][i] = 0
            elif name in ("tilt", "velocity"):
                drawn[name][i] = randomly_directed(math.radians(strength) if name == "tilt" else strength, rng)
            elif name == "push":
                drawn[name][i] = drawn["_push_ends"][i] = 0
                drawn["_next_push"][i] = self._until_next_push(rng)
            elif name == "obs_noise":
                self._draw_noise([i])

    def _drawn_starts(self, ids, starts):
        """Options of a reset, with what is drawn in place of those that are not given."""
        for name in {"tilt", "velocity"} & self._drawn.keys():
            if name in starts:
                self._drawn[name][ids] = starts[name][ids]
            starts = starts | {name: self._drawn[name]}
        return starts

    def _change_models(self, ids):
        """Give the models of the environments `ids` what was drawn for them, and what MuJoCo derives from it."""
        for values, usual, name in self._fields:
            values[ids] = np.multiply.outer(self._drawn[name][ids], usual)
        if self._relief is not None:
            self._height_fields[ids] = self._drawn["_relief"][ids]
        self.batch.set_const(ids)

    def _until_next_push(self, rng):
        """Actions until the next push."""
        return max(round(self.randomization["push_interval"] * rng.uniform(0.5, 1.5) / TIMESTEP / self.frame_skip),
                   -(-PUSH_STEPS // self.frame_skip))  # fmt: skip

    def _push_at_random(self, starting):
        """Begin and end the pushes that are due before the next action."""
        pushes, left, ends = (self._drawn[name] for name in ("push", "_next_push", "_push_ends"))
        left -= 1
        ends -= 1
        over = ends == 0
        if over.any():
            pushes[over] = self._forces[over] = 0
        for i in np.flatnonzero(left < 0 if starting is None else (left < 0) & ~starting):
            rng, lasts = self._rngs[i], -(-PUSH_STEPS // self.frame_skip)
            pushes[i] = randomly_directed(self.randomization["push"], rng)
            self._forces[i, :2] = pushes[i] / (lasts * self.frame_skip * TIMESTEP)
            ends[i], left[i] = lasts, self._until_next_push(rng) - 1

    def _delayed(self):
        """Controls (num_envs, frame_skip, nu): in each physics step the command of `latency` steps before."""
        commands, held = self._drawn["_commands"], np.repeat(self._actions[:, None], self.frame_skip, 1)
        queue = np.concatenate([commands, held], 1)
        steps = self._step_numbers + commands.shape[1] - 1 - self._drawn["latency"][:, None]
        np.multiply(queue[np.arange(self.num_envs)[:, None], steps], -MAX_TORQUE, out=self._controls[:, :, :3])
        commands[:] = queue[:, self.frame_skip :]
        return self._controls

    def _draw_noise(self, ids):
        """Noise for the next observation of the environments `ids`, but for their frames."""
        noise, std = self._drawn["_noise"], np.float32(self.randomization["obs_noise"])
        for i in ids:
            noise[i] = std * self._rngs[i].standard_normal(12, np.float32)


def checked_randomization(
    randomization: Mapping[str, float] | None, terrain: str = "perlin", max_tilt: float = 20.0
) -> dict[str, float]:
    """What of a `randomization` is on, in the order in which it is drawn; ValueError, in one line, where it cannot be.

    The other arguments are those of `BallbotEnv`.
    """
    need(randomization is None or isinstance(randomization, Mapping), "randomization", randomization,
         'a dict of names and strengths, such as {"push": 1.0}')  # fmt: skip
    given = dict(randomization or {})
    for name, strength in given.items():
        if name not in RANDOMIZATION:
            raise ValueError(f"randomization has no {name!r}: there are {', '.join(RANDOMIZATION)}")
        low, high, what = RANDOMIZATION[name]
        good = is_number(strength) and low <= strength <= high
        good = good and (name != "latency" or strength == int(strength)) and (name != "tilt" or strength < max_tilt)
        need(good, f"randomization {name}", strength, what)
    on = {name: given[name] for name in RANDOMIZATION if given.get(name)}
    if "push_interval" in on and "push" not in given:
        raise ValueError("randomization has a push_interval and no push: give both, or push alone")
    if "push" not in on:
        on.pop("push_interval", None)
    if "terrain_amplitude" in on and terrain == "flat":
        raise ValueError('randomization has a terrain_amplitude, which means nothing on terrain "flat": leave it out')
    return on | ({"push_interval": on.get("push_interval", 1.0)} if "push" in on else {})


def randomly_directed(longest, rng):
    """A vector (x, y) of a length up to `longest`, uniform, in any direction."""
    length, angle = rng.uniform(0, longest), rng.uniform(0, 2 * math.pi)
    return length * math.cos(angle), length * math.sin(angle)


def of_first(infos: dict) -> dict:
    """The info of the first environment, from those of many."""
    single = {}
    for key, value in infos.items():
        if key[0] == "_":
            continue
        if isinstance(value, dict):
            single[key] = of_first(value)
        else:
            single[key] = value[0] if value.ndim > 1 else value[0].item()
    return single


def of_some(infos: dict, where: np.ndarray) -> dict:
    """The infos of the environments `where`, bool (num_envs,), zeros for the others; empty where there are none."""
    some = {}
    for key, value in infos.items() if where.any() else ():
        if key[0] != "_":
            if isinstance(value, dict):
                some[key] = of_some(value, where)
            else:
                some[key] = np.where(where[:, None] if value.ndim > 1 else where, value, 0)
            some[f"_{key}"] = where.copy()
    return some


def copied(value: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """A copy of an array or tensor."""
    return value.clone() if torch.is_tensor(value) else value.copy()


def unlike(value: Any, like: Any, name: str = "content") -> str:
    """Where `value` differs in structure from `like`, or "" if it does not.

    Both are dicts, lists and tuples of tensors, numbers, strings and None. Alike are equal keys and lengths, the same
    types, and the same shapes, strides and dtypes; all numbers of `value` must be finite. In `like` a list that ends in
    ... is any number of its first element, and ... is anything.
    """
    if like is ...:
        return ""
    if isinstance(like, torch.Tensor):
        alike = type(value) is torch.Tensor and value.layout == like.layout and not value.requires_grad
        alike = alike and (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)
        return "" if alike and (not value.is_floating_point() or value.isfinite().all()) else name
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            return name
        return next(filter(None, (unlike(value[key], like[key], f"{name} {key}") for key in like)), "")
    if type(value) is not type(like) or (isinstance(value, float) and not math.isfinite(value)):
        return name
    if isinstance(like, (list, tuple)):
        like = [like[0]] * len(value) if like and like[-1] is ... else like
        if len(value) != len(like):
            return name
        return next(filter(None, (unlike(v, w, f"{name} {i}") for i, (v, w) in enumerate(zip(value, like)))), "")
    return ""


def need(good: bool, name: str, value: Any, what: str) -> None:
    """Raise ValueError, in one line that says `what` to give for an argument, unless its value is good."""
    if not good:
        raise ValueError(f"{name} is {' '.join(repr(value).split())}: give {what}")  # arrays have several lines


def is_number(value: Any, kinds: tuple = (int, float, np.number)) -> bool:
    """Whether it is a finite number, True and False being none."""
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def steepest_nearby(heights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from places (n, 2), m, to the terrain's largest slope (n,) within 1.1 m along x and y, or farther."""
    cell, block = 2 * TERRAIN_EXTENT / (len(heights) - 1), 16
    slopes = np.hypot(np.diff(heights, axis=0)[:, 1:], np.diff(heights, axis=1)[1:]) / cell
    slopes = torch.from_numpy(slopes)[None, None]
    blocks = F.max_pool2d(F.max_pool2d(slopes, block), 5, 1, 2)[0, 0].numpy()

    def steepest(places):
        column, row = ((places + TERRAIN_EXTENT) / (cell * block)).astype(int).clip(0, len(blocks) - 1).T
        return blocks[row, column]

    return steepest


def spawn_seeds(seed: int, n: int) -> list[int]:
    """Seeds for `n` environments, independent of each other and of those that any other `seed` gives.

    The first seeds of a longer list are those of a shorter one (`numpy.random.SeedSequence`).
    """
    return np.random.SeedSequence(seed).generate_state(n, np.uint64).tolist()


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrices (n, 3, 3) of unit quaternions (n, 4), w first."""
    products = 2 * quaternion[:, :, None] * quaternion[:, None]  # (n, 4, 4)
    _, wx, wy, wz, _, xx, xy, xz, _, _, yy, yz, _, _, _, zz = products.reshape(-1, 16).T.copy()
    matrix = np.empty((3, 3, len(quaternion)))
    matrix[0] = 1 - yy - zz, xy - wz, xz + wy
    matrix[1] = xy + wz, 1 - xx - zz, yz - wx
    matrix[2] = xz - wy, yz + wx, 1 - xx - yy
    return matrix.transpose(2, 0, 1)


def in_body_frame(orientation: np.ndarray, vel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotation vectors (n, 3) in rad and velocities (n, 3) in the world, as the robot sees them.

    Returns lean (n, 2), x and y of the upward direction in its frame, heading (n, 1) in rad, 0 facing +y, from -π to π,
    and the velocity in its frame (n, 3).
    """
    angle = np.linalg.norm(orientation, axis=1, keepdims=True)
    quaternion = np.concatenate([np.cos(angle / 2), orientation * np.sinc(angle / (2 * np.pi)) / 2], 1)
    rotation = rotation_matrix(quaternion)  # columns: the robot's axes in the world
    heading = np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
    return rotation[:, 2, :2], heading[:, None], (rotation * vel[:, :, None]).sum(1)


def make_model(
    terrain: str = "perlin",
    terrain_seed: int = 0,
    terrain_amplitude: float = 0.1,
    wheel_damping: float = 0.4,
    reliefs: Sequence[float] = (1.0,),
) -> mujoco.MjModel:
    """The MjModel of assets/ballbot.xml standing on the given terrain.

    `terrain_amplitude` is in m, `wheel_damping` in N·m·s/rad. There is a height field for each of the factors `reliefs`
    on that amplitude; the robot stands on the middle one. Raises FileNotFoundError without the asset.
    """
    path = ASSETS / "ballbot.xml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: ballbot_env.py needs the assets/ folder beside it")
    spec = mujoco.MjSpec.from_file(str(path))
    for i in range(3):
        spec.joint(f"wheel_{i}").damping = [wheel_damping, 0, 0]
    if terrain == "perlin":
        heights = perlin_terrain(terrain_seed)
        for k, relief in enumerate(reliefs):
            extent = [TERRAIN_EXTENT, TERRAIN_EXTENT, terrain_amplitude * relief, 0.1]
            spec.add_hfield(name=f"terrain_{k}", nrow=TERRAIN_NODES, ncol=TERRAIN_NODES,
                            size=extent, userdata=heights.ravel())  # fmt: skip
        ground = spec.geom("ground")
        ground.type = mujoco.mjtGeom.mjGEOM_HFIELD
        ground.hfieldname = f"terrain_{len(reliefs) // 2}"
        # The ball touches several cells at once: with that many contacts sparse is a fifth faster, to the same result.
        spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    return spec.compile()


def make_scene(
    places: np.ndarray, terrain: str = "perlin", terrain_seed: int = 0, terrain_amplitude: float = 0.1
) -> mujoco.MjModel:
    """An MjModel to draw the robot by: of the terrain only what the camera sees from `places` (n, 2), m.

    The whole of it would take a second a picture without a GPU. Its texture shows the relief: green valleys, sandy
    hills, and the shading of a low sun.
    """
    spec = mujoco.MjSpec.from_file(str(ASSETS / "ballbot.xml"))
    spec.visual.map.fogstart, spec.visual.map.fogend = 4, 8
    spec.visual.rgba.fog = [0.8, 0.88, 0.95, 1]  # as the sky at the horizon
    spec.visual.quality.shadowsize = 2048  # faster
    spec.visual.map.shadowclip = 0.6  # and yet as sharp
    model = spec.compile()
    if terrain == "flat":
        return model
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    right, _, back = data.camera("track").xmat.reshape(3, 3).T[:, :2]
    corners = np.array([(2, 2), (-2, -2), 5 * right - 8 * back, -5 * right - 8 * back])  # of what is in view
    low, high = np.min(places, 0) + corners.min(0), np.max(places, 0) + corners.max(0)
    cell, stride = 2 * TERRAIN_EXTENT / (TERRAIN_NODES - 1), 2  # every other node is enough to see
    low, high = (np.clip((c + TERRAIN_EXTENT) / cell, 0, TERRAIN_NODES - 1).astype(int) for c in (low, high))
    heights = perlin_terrain(terrain_seed)[low[1] : high[1] + 1 : stride, low[0] : high[0] + 1 : stride]
    bottom, span = heights.min(), np.ptp(heights)
    rows, cols = heights.shape
    half = np.array([cols - 1, rows - 1]) * stride * cell / 2
    middle = low * cell - TERRAIN_EXTENT + half
    spec.add_hfield(name="terrain", nrow=rows, ncol=cols, size=[*half, terrain_amplitude * span, 0.1],
                    userdata=((heights - bottom) / span).ravel())  # fmt: skip
    ground = spec.geom("ground")
    ground.type, ground.hfieldname = mujoco.mjtGeom.mjGEOM_HFIELD, "terrain"
    ground.pos = [*middle, terrain_amplitude * bottom]

    pixels = 2048
    spec.add_texture(name="relief", type=mujoco.mjtTexture.mjTEXTURE_2D, width=pixels, height=pixels, nchannel=3,
                     builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT)  # fmt: skip
    material = spec.material("ground")
    textures = list(material.textures)
    textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "relief"
    material.textures, material.texrepeat, material.texuniform = textures, [1, 1], False
    model = spec.compile()

    height = F.interpolate(torch.tensor(heights)[None, None], (pixels, pixels), mode="bilinear", align_corners=True)
    height = height[0, 0].numpy()
    slope_y, slope_x = np.gradient(terrain_amplitude * height, 2 * half[1] / (pixels - 1), 2 * half[0] / (pixels - 1))
    sun = np.array([0.4, -0.5, 0.4])
    light = (sun[2] - sun[0] * slope_x - sun[1] * slope_y) / (sun[2] * np.sqrt(1 + slope_x**2 + slope_y**2))
    x, y = (m + h * np.linspace(-1, 1, pixels) for m, h in zip(middle, half))
    tile = (np.floor(x / 0.25)[None] + np.floor(y / 0.25)[:, None]) % 2  # tiles of 25 cm
    colors = np.array([[112, 142, 104], [196, 186, 140], [240, 224, 196]])
    rgb = np.stack([np.interp(height, [0, 0.35, 1], channel) for channel in colors.T], -1)
    rgb = np.clip(rgb * (light * (1 - 0.1 * tile))[..., None], 0, 255).astype(np.uint8)
    start = model.texture("relief").adr[0]
    model.tex_data[start : start + rgb.size] = rgb.ravel()
    return model


class Painter:
    """Pictures of one robot by MuJoCo's OpenGL renderer, with arrows for its goal, its velocity and pushes."""

    def __init__(self, height, width, places, samples=4, **terrain):
        """Of `height` by `width` pixels; `places` and `terrain` are as `make_scene` takes them.

        `samples` smooth a pixel; without a GPU none takes 0.08 s a picture, 4 take 0.2 s.
        """
        self._model = make_scene(places, **terrain)
        self._model.vis.quality.offsamples = samples
        self._data = mujoco.MjData(self._model)
        self._renderer = mujoco.Renderer(self._model, height, width)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_FOG] = True
        self._low, self._high, self._terrain = np.min(places, 0), np.max(places, 0), terrain
        if terrain.get("terrain") == "flat":
            self._low, self._high = -np.inf, np.inf

    def covers(self, place, **terrain):
        """Whether a robot at `place` (2,), m, is among the places it was made for, on the same terrain."""
        return terrain == self._terrain and ((self._low <= place) & (place <= self._high)).all()

    def picture(self, qpos, arrows):
        """The RGB picture, uint8 (height, width, 3), of the robot at `qpos`; `arrows` as `make_arrows` gives them."""
        self._data.qpos[:] = qpos
        mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera="track")
        scene = self._renderer.scene
        for geom in scene.geoms[: scene.ngeom]:
            if geom.category == mujoco.mjtCatBit.mjCAT_STATIC:  # the ground: its shadows on itself are ragged,
                geom.category = mujoco.mjtCatBit.mjCAT_DECOR  # and decoration casts none
        draw_arrows(scene, arrows)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()


def make_arrows(position, goal, velocity, force):
    """Arrows, (start, end, colour), for a base at `position` (3,), m.

    Green for `goal` (2,), 0.5 m long for 1 m/s or a unit vector, white for `velocity` (3,), m/s, to the same scale, and
    red for a push by `force` (3,), N.
    """
    above, higher, rim = (np.add(position, [0, 0, z]) for z in (0.36, 0.4, 0.32))
    arrows = [
        (above, above + np.append(goal, 0) / 2, (0.1, 0.75, 0.2, 1)),
        (higher, higher + np.divide(velocity, 2), (1, 1, 1, 1)),
    ]
    strength = np.linalg.norm(force)
    if strength > 0:
        direction, length = np.divide(force, strength), 0.2 + min(strength, 100) / 200
        end = rim - 0.12 * direction  # on the tower, where none is hidden behind it
        arrows.append((end - length * direction, end, (0.9, 0.1, 0.1, 1)))
    return arrows


def draw_arrows(scene, arrows):
    """Add `arrows` of `make_arrows` to a mujoco.MjvScene."""
    kind = mujoco.mjtGeom.mjGEOM_ARROW
    for start, end, colour in arrows:
        if scene.ngeom < scene.maxgeom and np.linalg.norm(np.subtract(end, start)) > 0.01:
            geom = scene.geoms[scene.ngeom]
            mujoco.mjv_initGeom(geom, kind, np.zeros(3), np.zeros(3), np.zeros(9), np.array(colour, np.float32))
            mujoco.mjv_connector(geom, kind, 0.012, start, end)
            geom.size[2] *= 2  # MuJoCo draws an arrow half as long
            geom.category = mujoco.mjtCatBit.mjCAT_DECOR  # casts no shadow
            scene.ngeom += 1


@functools.lru_cache(maxsize=2)
def perlin_terrain(seed: int, nodes: int = TERRAIN_NODES) -> np.ndarray:
    """Heights of a square terrain in units of its amplitude: float32 (nodes, nodes), from 0 to 1.

    Gradient noise (Perlin, "Improving Noise", SIGGRAPH 2002) of 4 octaves, persistence 0.2, lacunarity 2
    and a base wavelength of 25 cells, scaled to [0, 1] and cubed. The cube gives flat valleys between
    hills: at amplitude 0.1 m the slopes have median 0.05, 90th percentile 0.12 and 99th 0.19, close to
    those of the simplex-noise terrain of arXiv 2505.18417 (0.05, 0.13, 0.20). Rows run along y, columns along x.
    """
    rng = np.random.default_rng(seed)
    noise = np.zeros((nodes, nodes))
    for octave in range(4):
        x = np.arange(nodes) * (2.0**octave / 25)
        cell = x.astype(int)
        frac = x - cell
        fade = frac**3 * (frac * (frac * 6 - 15) + 10)
        angle = rng.uniform(0, 2 * np.pi, (cell[-1] + 2, cell[-1] + 2))
        gradient_x, gradient_y = np.cos(angle), np.sin(angle)
        for dy in (0, 1):
            weight_y = fade if dy else 1 - fade
            for dx in (0, 1):
                weight_x = fade if dx else 1 - fade
                corner = np.ix_(cell + dy, cell + dx)
                dot = gradient_x[corner] * (frac - dx) + gradient_y[corner] * (frac - dy)[:, None]
                noise += 0.2**octave * weight_y[:, None] * weight_x * dot
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    heights = (noise**3).astype(np.float32)
    heights.flags.writeable = False  # cached: every environment of this seed shares it
    return heights


@contextlib.contextmanager
def one_thread():
    """A block in which PyTorch keeps to the calling thread.

    Its own threads are slow where the cores are busy with something else, and a forked process waits for them for ever.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that first use PyTorch in the meantime, the renderer's
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DepthRenderer:
    """Planar depth of both cameras for any number of robots, with torch, without OpenGL.

    Each pixel's ray is followed to its first crossing of the height field, which is bilinear between its nodes. Ray
    directions have unit component along the optical axis, so that a point's parameter t is its planar depth in m.

    A 16 times smaller image comes first: its rays are traced from the camera by steps that no terrain of a bounded
    slope can be missed by (sphere tracing, Hart, 1996), and a Newton step ends them. The full image starts from its
    inverse depths, which are linear in the image of a plane, and takes one Newton step. Where the terrain is steep, the
    pixels that this moves by more than `tolerance` are near a silhouette, and are traced one by one.

    The robot's own parts move by less than a millimetre in the base frame: they are one constant depth map per camera,
    and the nearer of the two counts.
    """

    coarse_steps, pixel_steps = 4, 20  # of tracing, for the small image and for single pixels
    tolerance = 0.02  # m
    gentle = 0.45  # slope up to which the small image shows nearly every hill
    chunk = 32  # robots rendered at a time: their images fit in a CPU core's cache

    def __init__(self, model, size, heights=None, device="cpu", num_threads=1):
        """`heights`: float32 (nodes, nodes) in m, or None for flat ground at z = 0."""
        self.size, self.device = size, torch.device(device)
        self.heights = None
        if heights is not None:
            self.heights = torch.from_numpy(heights)[None, None].to(device)
            self._steepest = steepest_nearby(heights)
        self._pool = None
        if num_threads > 1 and self.device.type == "cpu":
            self._pool = ThreadPoolExecutor(num_threads)
        data = mujoco.MjData(model)
        self._settle(model, data)
        base = model.body("base").id
        rotation, position = data.xmat[base].reshape(3, 3), data.xpos[base]
        cameras = [model.camera(f"depth_{i}").id for i in (0, 1)]
        # Columns of `axes`: right, up and forward of each camera, in the base frame.
        axes = np.stack([rotation.T @ data.cam_xmat[c].reshape(3, 3) for c in cameras])
        axes[:, :, 2] *= -1  # MuJoCo's cameras look along -z
        self._axes = axes  # (2, 3, 3)
        self._offsets = np.stack([rotation.T @ (data.cam_xpos[c] - position) for c in cameras])  # (2, 3)
        # fovy 90: tan 45° = 1
        pixels, coarse = ((torch.arange(n, dtype=torch.float32) + 0.5) * (2 / n) - 1 for n in (size, -(-size // 4)))
        self_depth = torch.from_numpy(self._ray_self_depth(model, data, cameras, pixels.numpy()))
        # Linear interpolation between the coarse image's pixels, and beyond its outermost: (size, size // 4)
        weights = (1 - (pixels[:, None] - coarse).abs() * len(coarse) / 2).clamp(min=0)
        weights /= weights.sum(1, keepdim=True)
        self._pixels, self.coarse_pixels, self._interpolation = (
            pixels.to(device),
            coarse.to(device),
            weights.to(device),
        )
        self.self_depth = self_depth.to(device)  # (2, size, size)

    @staticmethod
    def _settle(model, data):
        """Robot upright at rest on its ball, high above the ground, where nothing else is in view."""
        mujoco.mj_resetData(model, data)
        base, ball = (model.joint(name).qposadr[0] for name in ("base", "ball"))
        data.qpos[base + 2] = 100.0
        data.qpos[ball : ball + 3] = data.qpos[base : base + 3] - [0, 0, BASE_OVER_BALL]
        mujoco.mj_forward(model, data)

    def _ray_self_depth(self, model, data, cameras, pixel):
        u, v = (grid.ravel() for grid in np.meshgrid(pixel, -pixel))
        visible = np.array([1, 1, 1, 0, 0, 0], np.uint8)
        maps = []
        for camera in cameras:
            matrix = data.cam_xmat[camera].reshape(3, 3)
            rays = np.stack([u, v, -np.ones_like(u)], 1) @ matrix.T
            length = np.linalg.norm(rays, axis=1)
            distance, geom = np.empty(len(rays)), np.empty(len(rays), np.int32)
            mujoco.mj_multiRay(
                model, data, data.cam_xpos[camera], (rays / length[:, None]).ravel(), visible, True, -1, geom, distance,
                None, len(rays), MAX_DEPTH * 2,
            )  # fmt: skip
            depth = np.where(geom >= 0, distance / length, MAX_DEPTH)
            maps.append(depth.reshape(self.size, self.size))
        return np.minimum(maps, MAX_DEPTH).astype(np.float32)

    @staticmethod
    def _rays(axes, pixels):
        """Directions along x, y and z, (2n, side, side) each, of the rays through an image's pixels.

        The image's sides have `pixels` (0: the middle, ±1: the edges).
        """
        right, up, forward = axes[:, :, 0, None], axes[:, :, 1, None], axes[:, :, 2, None]
        across = (right * pixels)[:, :, None]  # (2n, 3, 1, side)
        down = (forward - up * pixels)[:, :, :, None]  # (2n, 3, side, 1)
        return [down[:, k] + across[:, k] for k in range(3)]

    def lookup(self, grid):
        """Bilinear heights (n, h, w) at grid (2, n, h, w), x and y in units of TERRAIN_EXTENT."""
        _, n, h, w = grid.shape
        points = grid.view(2, n, h * w).permute(1, 2, 0)[:, None]  # planar, as grid_sample is fastest
        heights = self.heights.expand(n, 1, -1, -1)
        return F.grid_sample(heights, points, padding_mode="border", align_corners=True).view(n, h, w)

    def _clearance(self, origin, direction, relief, t):
        """Heights in m over the terrain of the rays' points at depths t (n, h, w); negative below it."""
        grid = t.new_empty(2, *t.shape)
        for k in (0, 1):
            torch.addcmul(origin[k], direction[k], t, out=grid[k])
        height = self.lookup(grid)
        if relief is not None:
            height *= relief
        return torch.addcmul(origin[2], direction[2], t).sub_(height)

    def _first_crossing(self, origin, direction, relief, steepest, steps):
        """Depths (n, h, w) in m at which rays first meet the terrain, and 1 / their loss of clearance there.

        `origin` and `direction` are x, y and z; `steepest` is the largest slope of the terrain.
        """
        x, y, z = direction
        loss = torch.hypot(x, y).mul_(TERRAIN_EXTENT * steepest).sub_(z).clamp_(min=0.05)  # of clearance, at most
        bound, t, probe = loss.reciprocal_(), torch.zeros_like(z), 0.02
        for _ in range(steps):
            clearance = self._clearance(origin, direction, relief, t).clamp_(min=0.002)
            t = torch.addcmul(t, clearance, bound)
        t.clamp_(max=1.2 * MAX_DEPTH)
        clearance = self._clearance(origin, direction, relief, t)
        loss = (clearance - self._clearance(origin, direction, relief, t + probe)) / probe
        inverse = loss.clamp_(min=0.05).reciprocal_()
        return torch.addcmul(t, clearance, inverse), inverse

    def render(self, position, quaternion, relief=None):
        """Depth frames, float32 (n, 2, size, size), of bases at `position` (n, 3), `quaternion` (n, 4).

        `relief` (n,): a factor on the heights that each of them sees."""

        def render_part(part):
            return self._render(position[part], quaternion[part], None if relief is None else relief[part])

        with one_thread():
            if self.device.type != "cpu" or len(position) <= self.chunk:
                return render_part(slice(None))
            parts = [slice(i, i + self.chunk) for i in range(0, len(position), self.chunk)]
            run = map if self._pool is None else self._pool.map
            return torch.cat(list(run(render_part, parts)))

    @torch.no_grad()
    def _render(self, position, quaternion, relief):
        n, size = len(position), self.size
        rotation = rotation_matrix(quaternion)[:, None]  # (n, 1, 3, 3)
        # Sums of products by hand: a matrix product's rounding may depend on the batch size.
        axes = sum(rotation[..., :, k, None] * self._axes[None, :, None, k, :] for k in range(3))  # (n, 2, 3, 3)
        origin = position[:, None] + sum(rotation[..., k] * self._offsets[:, None, k] for k in range(3))
        # x and y in units of TERRAIN_EXTENT
        axes[:, :, :2] *= 1 / TERRAIN_EXTENT
        origin[:, :, :2] *= 1 / TERRAIN_EXTENT
        axes = torch.from_numpy(axes.reshape(2 * n, 3, 3).astype(np.float32)).to(self.device)
        origin = torch.from_numpy(origin.reshape(2 * n, 3).astype(np.float32).T.copy()).to(self.device)
        origin = origin.view(3, 2 * n, 1, 1).unbind()
        direction = self._rays(axes, self._pixels)
        if self.heights is None:
            depth = -origin[2] / direction[2].clamp_(max=-1e-3)
        else:
            steepest = self._steepest(position[:, :2]) * (1 if relief is None else relief)
            steep = (steepest > self.gentle).any()
            steepest = torch.from_numpy(steepest.astype(np.float32)).to(self.device)
            steepest = steepest.repeat_interleave(2).view(-1, 1, 1)
            if relief is not None:
                relief = torch.from_numpy(relief.astype(np.float32)).to(self.device)
                relief = relief.repeat_interleave(2).view(-1, 1, 1)
            depth = self._terrain_depth(axes, origin, direction, relief, steepest, steep)
        depth = depth.clamp_(min=0).view(n, 2, size, size)
        return torch.minimum(depth, self.self_depth, out=depth)

    def _terrain_depth(self, axes, origin, direction, relief, steepest, steep):
        """Depths (2n, size, size) of the terrain alone; `steep`: whether any of it is."""
        rays = origin, self._rays(axes, self.coarse_pixels), relief, steepest
        depth, inverse = self._first_crossing(*rays, self.coarse_steps)
        depth = self._enlarge(depth.clamp_(0.05, 1.2 * MAX_DEPTH).reciprocal_())
        depth = depth.clamp_(min=1 / (1.2 * MAX_DEPTH)).reciprocal_()
        change = self._clearance(origin, direction, relief, depth).mul_(self._enlarge(inverse))
        depth += change
        if not steep:
            return depth
        unsure = (change.abs_() > self.tolerance) & (steepest > self.gentle)
        pixels = torch.from_numpy(np.flatnonzero(unsure.cpu().numpy())).to(self.device)
        nearest = self.self_depth.view(-1)[pixels % self.self_depth.numel()] + 0.1  # beyond it they are hidden
        pixels = pixels[depth.view(-1)[pixels] < nearest]
        if len(pixels):
            images = pixels // self.size**2
            origin = [x.view(-1)[images][None, None] for x in origin]
            direction = [x.view(-1)[pixels][None, None] for x in direction]
            relief, steepest = (x if x is None else x.view(-1)[images] for x in (relief, steepest))
            crossings, _ = self._first_crossing(origin, direction, relief, steepest, self.pixel_steps)
            depth.view(-1)[pixels] = crossings.view(-1)
        return depth

    def _enlarge(self, image):
        """The small image, interpolated: (2n, size // 4, size // 4) to (2n, size, size)."""
        return self._interpolation @ image @ self._interpolation.T


gym.register(
    "Ballbot-v0",
    entry_point="ballbot_env:BallbotEnv",
    vector_entry_point="ballbot_env:BallbotVectorEnv",
    max_episode_steps=MAX_EPISODE_STEPS,
)
