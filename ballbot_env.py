"""Ballbot-v0: a robot that balances on a ball and drives over uneven ground, in stock MuJoCo.

`gym.make("Ballbot-v0")` gives one environment, `gym.make_vec("Ballbot-v0", num_envs=10)` many, stepped together by
`mujoco.batch`. Both run the same code: environment i of the vector is, bit for bit, the single environment reset with
seed + i. What they are built from is in ballbot_utils/: model.py, terrain.py, depth.py, randomization.py, commands.py,
scene.py and geometry.py.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike

try:
    import mujoco
    import mujoco.batch
except (AttributeError, OSError, RuntimeError) as error:  # from OpenGL, which only pictures need
    raise ImportError(
        f"MuJoCo cannot use MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}): unset it, or make it osmesa or egl and "
        "install that (Debian: libosmesa6, or libegl1 and libgl1-mesa-dri)"
    ) from None

from ballbot_utils.arguments import check_arguments, check_options
from ballbot_utils.checks import check_value, find_mismatch
from ballbot_utils.commands import Commands
from ballbot_utils.console import has_display
from ballbot_utils.depth import MAX_DEPTH, DepthRenderer, single_torch_thread
from ballbot_utils.geometry import rotation_matrix
from ballbot_utils.infos import mask_infos, unbatch_infos
from ballbot_utils.model import BALL_RADIUS, CAMERAS, TIMESTEP, make_model
from ballbot_utils.observations import NOISE_WIDTH, SCAN, add_sensor_noise, make_observations, make_space
from ballbot_utils.physics import Robots
from ballbot_utils.randomization import SUCCESS_SPEED, Randomization, check_randomization, height_scales
from ballbot_utils.scene import PictureCache, draw_arrows, make_arrows
from ballbot_utils.state import copy_array, copy_into, to_tensors
from ballbot_utils.terrain import TERRAIN_EXTENT, TERRAIN_MARGIN, Terrain
from ballbot_utils.user_files import find_file, load_function

MAX_EPISODE_STEPS = 4000  # actions, by the registration
START_EXTENT = 10.0  # m, starts are sampled from the square |x|, |y| <= START_EXTENT


class BallbotEnv(gym.Env):
    """
    ## Description
    A ballbot: a tower of 3.85 kg that balances on a ball of 9 cm radius, which three omniwheels drive. The goal is to
    roll along +y (or another `goal`) over uneven ground for 8 s without falling. Without control the robot falls in
    about a second. A physics step is 2 ms. An action is taken in each of them (500 Hz), or held for `frame_skip` steps.

    The task is that of Salehi, ["Reinforcement Learning for Ballbot Navigation in Uneven
    Terrain"](https://arxiv.org/abs/2505.18417), in stock MuJoCo instead of a patched one. It differs from the paper:

    - The wheels' damping is 0.4 N·m·s/rad instead of 0.8. With 0.8 the motors cannot drive faster than 0.46 m/s at
      heading 0, and no episode of 4000 steps returns more than 98.5. With 0.4 these are 0.93 m/s and 117.
      `wheel_damping=0.8` is the paper's setting. Compare returns only at the same damping.
    - There is one terrain, 40 m square, fixed by `terrain_seed`, and each episode starts at a random place of it. The
      paper makes a new terrain for each episode, 10 m square, and starts in its middle. By default ours is cubed
      gradient noise; there are other kinds (see Terrain).
      Its slopes match the paper's simplex noise (median 0.05, 90th percentile 0.13, 99th 0.20) within 15 %.
    - A wheel's roller is a sphere coupled to its hub about the axle (see `assets/ballbot.xml`), not a capsule with
      anisotropic friction. Velocities under random torques agree within 5 %.
    - Depth images are computed without OpenGL (see Cameras).

    MuJoCo's height fields slow the ball down, even where they are level: it touches neighbouring cells, whose normals
    are tilted. A ball that rolls freely at 0.25 to 0.8 m/s is held back by 0.6 to 1.5 % of its weight, depending on
    direction and speed, and pushed sideways by up to 0.7 %; from 0.5 m/s it stops within 5 to 10 s. On the plane of
    `terrain="flat"` both are below 0.02 %.

    ## Action Space
    The action space is a `Box(-1, 1, (3,), float32)`: one command per motor. The torque on wheel i is -10 N·m times
    `action[i]`, about the wheel's axle (note the sign). Actions outside [-1, 1] are clipped.

    | Num | Action                     | Min | Max | Name (in the XML file)  | Joint | Type (Unit)            |
    | --- | -------------------------- | --- | --- | ----------------------- | ----- | ---------------------- |
    | 0   | command to wheel 0's motor | -1  | 1   | motor_0 (joint wheel_0) | hinge | torque (-10 N·m per 1) |
    | 1   | command to wheel 1's motor | -1  | 1   | motor_1 (joint wheel_1) | hinge | torque (-10 N·m per 1) |
    | 2   | command to wheel 2's motor | -1  | 1   | motor_2 (joint wheel_2) | hinge | torque (-10 N·m per 1) |

    In the base's frame (x to the right, y forward, z up) wheel 0 is at (-0.018, -0.08, -0.054) m and its axle is
    (-0.153, -0.690, -0.707). Wheels 1 and 2 are the same, turned by 120° and 240° about z.

    ## Observation Space
    The observation space is a `Dict` of `Box`es, all float32. "Base" is the body that carries tower, wheels and cameras
    (free joint `base` in the XML file).

    | Key                        | Index   | Meaning                                           | Min | Max  | Unit     |
    | -------------------------- | ------- | ------------------------------------------------- | --- | ---- | -------- |
    | `orientation`              | 0, 1, 2 | rotation vector of the base, axis times angle     | -π  | π    | rad      |
    | `angular_vel`              | 0, 1, 2 | angular velocity of the base, in its own frame    | -2  | 2    | rad/s    |
    | `vel`                      | 0, 1, 2 | velocity of the base's origin, in the world       | -2  | 2    | m/s      |
    | `motor_state`              | 0, 1, 2 | speed of each wheel about its axle, divided by 10 | -5  | 5    | 10 rad/s |
    | `actions`                  | 0, 1, 2 | last action, clipped; 0 after a reset             | -1  | 1    |          |
    | `depth_0`                  | all     | planar depth, right camera: (1, row, column)      | 0   | 1    | m        |
    | `depth_1`                  | all     | planar depth, left camera: (1, row, column)       | 0   | 1    | m        |
    | `relative_image_timestamp` | 0       | time since the two frames were taken              | 0   | 0.01 | s        |
    | `heights`                  | all     | ground ahead, above that under the ball: 30 points | -0.5 | 0.5 | m       |
    | `command`                  | 0, 1    | commanded velocity, in the world                  | -2  | 2    | m/s      |

    Indices are x, y and z, or wheels 0, 1 and 2. Values beyond Min and Max are clipped. Depth and its timestamp are
    absent with `cameras=False`, `heights` without `height_scan=True`, and `command` without `goal="command"` (see
    Commands). Position, and a goal that is a direction, are not observed. The images' shape is (1, `camera_size`,
    `camera_size`), by default (1, 64, 64). The maximum of `relative_image_timestamp` depends on `camera_rate`; 0.01 s
    belongs to the default. `heights` are the terrain's own, at 0.1, 0.2 to 0.6 m ahead, and there from 0.2 m to the
    left to 0.2 m to the right, 0.1 m apart. Ahead is where the base faces, level. No sensor measures them: they show
    what cameras could help at most.

    ### Cameras
    - Camera 0 sits at (0.17, -0.01, -0.06) m in the base's frame and looks along (-0.5, 0, -0.866): down and inwards at
      the ground beside the ball. Camera 1 is its mirror image: x and the direction's x have the other sign. `fovy` is
      90°. The images are square, so they are 90° wide too. `camera_pitch` turns both towards +y of the base.
    - Row 0 is the top of the image (towards +y of the base), column 0 its left (towards -x), for both cameras.
    - A pixel is the planar depth seen through its centre: the distance along the camera's optical axis, not along the
      pixel's ray. It is clipped to [0, 1] m. A pixel that hits nothing is 1.
    - Of the robot itself only the ball is in view. It is always shown where it is while the base rests on it.
    - A new frame is taken every 6 steps (83.3 Hz, the nearest below the nominal 90 Hz), and held in between. Both
      cameras' frames are taken together, after the physics step, where `relative_image_timestamp` is then 0. With
      `frame_skip` the cameras keep this clock: a frame taken while an action is held has some age when it is observed.
    - The cameras' clock runs freely across episodes: `reset(seed=...)` restarts it, `reset()` does not. Each reset
      takes a first frame, whatever the clock says, and the next may then follow after fewer than 6 steps.

    ## Rewards
    The reward of a step is ***reward*** *=* *forward_reward - ctrl_cost + healthy_reward*:

    - *forward_reward*: `forward_reward_weight` (default 0.01) times the velocity towards the goal, in m/s: `vel` as
      observed, after clipping and without the noise of `randomization`, times the unit vector along `goal` (default
      +y). With `goal="command"` it is the weight times 8 (|c|² - |v - c|²), where v is x and y of `vel` and c the
      command: largest where v is c, 0 when standing still, negative in other directions. Distances instead of squares
      teach little: the speeds that noise causes then cost more than following earns. The factor 8 makes up for
      commands being slower than the robot's top speed.
    - *ctrl_cost*: `ctrl_cost_weight` (default 0.0001) times the sum of the squares of the clipped action.
    - *healthy_reward*: `healthy_reward` (default 0.02) in each step that does not end in termination.

    Standing still for 4000 steps returns 80. With `frame_skip` the rewards of all steps held are summed.

    `reward` adds a term of your own, a function or the name of one in a file, `"my_terms.py:energy"`:

    ```python
    def energy(envs, actions):
        return -1e-4 * abs(actions * envs.robots.wheel_speeds).sum(1)
    ```

    It gets the `BallbotVectorEnv`, also from the single environment, after the action's last step, and the clipped
    actions (num_envs, 3). It returns the reward per physics step (num_envs,), which is multiplied by the number of
    steps held. `info` has the sum as `reward_energy`. `BallbotVectorEnv` says what can be read; write `abs(x)` and
    `x.sum(1)` instead of NumPy's functions, and the term also works on BallbotWarp-v0, whose arrays are tensors.

    ## Terrain
    `terrain` is a kind, or a kind and arguments of it: `"ramp"`, `"ramp:angle=15,length=3"`. Lengths, heights
    and depths are in m, angles in degrees. The ground's lowest point is at z = 0. Robots drive along +y, across steps,
    waves and ridges.

    | Kind       | Arguments and defaults                             | Seeded | What it is                            |
    | ---------- | -------------------------------------------------- | ------ | ------------------------------------- |
    | `flat`     |                                                    | no     | a plane                               |
    | `perlin`   |                                                    | yes    | hills up to `terrain_amplitude`       |
    | `ramp`     | `angle=10`, `length=2`, `landing=2`                | no     | up and down by turns, with landings   |
    | `steps`    | `height=0.01`, `depth=1`                           | no     | single steps, up and down by turns    |
    | `stairs`   | `height=0.01`, `depth=0.4`, `count=5`, `landing=2` | no     | flights, up and down by turns         |
    | `waves`    | `height=0.1`, `length=3`                           | no     | sine waves across, trough to crest    |
    | `ridges`   | `height=0.05`, `angle=10`, `spacing=2`             | no     | sharp ridges, flanks of `angle`       |
    | `hills`    | `height=0.2`, `width=4`, `spacing=5`               | yes    | round hills at random places          |
    | `bowl`     | `depth=0.2`, `width=6`, `spacing=8`                | no     | parabolic bowls in a grid             |
    | `spiral`   | `height=0.1`, `spacing=3`                          | no     | a ridge that winds out of the middle  |
    | `rough`    | `height=0.02`, `size=0.2`                          | yes    | random heights of points `size` apart |
    | `potholes` | `depth=0.02`, `width=0.4`, `spacing=1`             | yes    | round holes at random places          |
    | `blocks`   | `height=0.01`, `size=0.6`                          | yes    | square blocks at random levels        |
    | `mixed`    | `patch=6`                                          | yes    | patches of other kinds, see `info`    |

    A classic controller drives all defaults at 0.4 m/s. It manages slopes up to 20° and steps up to 1.5 cm;
    docs/terrain.md derives the limits and has a picture of each kind (`python -m ballbot_utils.gallery terrain.png`).
    The face of a step is one cell, 3.4 cm, wide: a step of 1 cm rises at 16°. `flat` is a plane, where the ball has one
    contact; on all other kinds it has several, which are stiffer together.

    Your own terrain is a function of x and y (arrays (1169, 1169), m) that returns heights in m, with arguments of its
    own if it has any, and a generator if it has a parameter `rng`; or an array of heights in m of any shape, rows along
    y, that covers the whole square; or a string that names a file in the working directory:
    `"my_terrain.py:canyon:depth=0.5"`, `"heights.npy"`, or a grey PNG of 16 bits whose white is at `height`,
    `"heights.png:height=0.3"`.

    ## Starting State
    The robot stands upright, still, facing +y. Its x and y are uniform in [-10, 10] m, around the middle of the
    terrain. On kinds other than `flat` and `perlin` it starts only where no slope within 13 cm is above 0.15; if less
    than a tenth of the ground is so gentle, on the gentlest tenth. Nothing else is random. The ball's centre starts
    0.12 m and the base's origin 0.24 m above the highest point of the terrain under the ball: the robot first drops by
    about 3 cm.

    `reset(seed=...)` fixes all starts that follow. It does not change the terrain, which `terrain_seed` does.
    `reset(options={...})` changes one start:

    | Option     | Type   | Meaning                                                                           | Unit |
    | ---------- | ------ | --------------------------------------------------------------------------------- | ---- |
    | `position` | (x, y) | of the ball's centre, from -19 to 19                                              | m    |
    | `heading`  | float  | turn of the base about the vertical, counterclockwise from above; 0 faces +y      | rad  |
    | `tilt`     | (x, y) | turn about the ball's centre after that, axis (in the world) times angle          | rad  |
    | `velocity` | (x, y) | of base and ball, in the world; nothing turns                                     | m/s  |

    A tilt must be below `max_tilt`. `gym.make_vec` takes each for all environments, or one for each.

    ### Forces
    `env.unwrapped.apply_force(force)` applies (x, y, z) N, in the world's frame, to the base's centre of mass from the
    next step until another force is set ((0, 0, 0) ends it) or the episode ends.

    ### Commands
    With `goal="command"` the velocity to drive at is observed. It is sampled at the start, once in the first 2000 steps
    (4 s) of an episode, so that short ones see changes too, and every 2000 steps after that. One in five is to stand
    still, the others have speeds uniform from 0 to 0.6 m/s and directions uniform in the plane.
    `env.unwrapped.set_command(velocity)` sets it to (x, y) m/s, in the world's frame, up to 2 m/s each, from the next
    step until another is set or the episode ends. No command is sampled until then.

    ### Domain randomization
    `randomization={"push": 1.0, "mass": 0.1}` trains a policy for a robot that is not quite as modelled. It is off by
    default. Each name is optional; its value is the strength, and 0 is off:

    | `randomization`     | Strength s and its unit      | What is sampled                                             |
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

    U(a, b) is uniform. The environment's own generator samples everything: noise and pushes during the episode, the
    rest at its reset. An option of `reset()` replaces what would be sampled.

    - `latency`: each command reaches the motors this many physics steps later. Until the first one arrives they get
      0. `actions` and *ctrl_cost* use the command without delay.
    - `push`: a force on the base's centre of mass for 20 ms, or for the actions that last so long, at least one. It
      replaces the force of `apply_force()`. 1 N·s changes the speed of the robot by some 0.26 m/s.
    - `obs_noise`: sampled for each observation on `orientation`, `angular_vel`, `vel` and `motor_state`, and with each
      frame on depth (a random stretch of a table of 2^17 Gaussian values or more, which is fast): 0.01 is 0.01 rad,
      rad/s, m/s and m, and 0.1 rad/s of a wheel. Observations are clipped after it.
    - Mass, friction, damping and hills are fields of each environment's own model (`mujoco.batch`), bit for bit as if
      the model had been compiled with them. `model` has the usual values.

    ### Curriculum
    With `curriculum=True` each robot has a level from 0 to 10. Heights of the terrain and impulses of pushes are
    level / 10 of what the other arguments say, heights to the nearest tenth: at level 0 the ground is level (within
    1e-5 of its height) and no push acts. Robots start at level 0 after `reset(seed=...)`. A success raises the level by
    1 for the next episode, any other end of an episode lowers it by 1. An episode is a success if the robot did not
    fall and went at 0.3 m/s or more along `goal` on average; with `goal="command"` if it did not fall. A reset in the
    middle of an episode ends it; that of a vector environment leaves the level as it is.

    ## Episode End
    ### Termination
    The episode terminates when

    1. the base tilts by more than `max_tilt` (default 20°) from the vertical, or
    2. the physics fails: MuJoCo warns or raises an error, or the state is not finite (an action with NaN causes this).
       The observation is then finite, of the robot at the origin in its initial pose, and
       `info["physics_errors"]` increases by 1.

    ### Truncation
    The episode is truncated when

    1. it has lasted `max_episode_steps` actions (4000, 8 s at `frame_skip=1`, unless given: see Arguments), or
    2. the base's origin is less than 1 m from the terrain's edge, that is |x| or |y| > 19 m (on flat ground too).

    With `frame_skip` an episode that terminates or comes too close to the edge ends at the physics step, among those
    held, at which this happens. A step that terminates is not truncated as well, except by Gymnasium's `TimeLimit`,
    which may do so at its limit: test for termination first.

    ## Info
    `reset()` and `step()` return in `info`:

    | Key              | Type               | Meaning                                          | Unit |
    | ---------------- | ------------------ | ------------------------------------------------ | ---- |
    | `position`       | float64 array (3,) | position of the base's origin in the world       | m    |
    | `physics_errors` | int                | physics failures since this environment was made |      |
    | `randomization`  | dict               | samples and level: see below                     |      |
    | `terrain`        | str                | kind under the robot, on terrain `mixed` only    |      |

    `info["randomization"]` exists with `randomization` or `curriculum` only. It has, of the names given:
    `terrain_amplitude`, `mass`, `friction` and `wheel_damping`, the factors, float; `latency`, int; `tilt` and
    `velocity`, float64 arrays (2,) as `reset()` has them as options; and `push`, float64 array (2,), the impulse (x, y)
    in N·s of the push that acted in this step, else zeros. With `curriculum` it also has `level`, int, of this episode,
    and `terrain_amplitude` always, except on flat ground; the level is then a part of this factor.

    `step()` also returns the reward's terms, which add up to it: `reward_forward` (*forward_reward*), `reward_ctrl`
    (-*ctrl_cost*) and `reward_healthy` (*healthy_reward*), each a float.

    ## Saving and Copying
    `copy.deepcopy` and `pickle` copy an environment, with its wrappers, at any time, and the copy continues bit for
    bit. Windows and OpenGL's contexts are not copied. `env.unwrapped.get_state()` returns all that the future depends
    on, and `env.unwrapped.set_state(state)` continues from there, in an environment made with the same arguments. The
    counts of Gymnasium's wrappers, such as `TimeLimit`, are not in it. `BallbotVectorEnv` has both methods too.

    ## Arguments
    `gym.make` and `gym.make_vec` take all of them:

    ```python
    import gymnasium as gym
    import ballbot_env  # registers Ballbot-v0

    env = gym.make("Ballbot-v0", terrain="flat", wheel_damping=0.8)
    ```

    | Parameter               | Type          | Default    | Unit      | Description                                |
    | ----------------------- | ------------- | ---------- | --------- | ------------------------------------------ |
    | `terrain`               | **str, function, array** | `"perlin"` | | Kind of ground, or your own: see Terrain   |
    | `terrain_seed`          | **int**       | `0`        |           | Which terrain of a seeded kind             |
    | `terrain_amplitude`     | **float**     | `0.1`      | m         | Height of Perlin hills, lowest to highest  |
    | `cameras`               | **bool**      | `True`     |           | Whether depth images are observed          |
    | `camera_size`           | **int**       | `64`       | pixels    | Side of the depth images, at least 8       |
    | `camera_rate`           | **float**     | `90.0`     | Hz        | Nominal frame rate, see below              |
    | `camera_pitch`          | **float**     | `0.0`      | degrees   | How far the cameras are turned up          |
    | `height_scan`           | **bool**      | `False`    |           | Whether `heights` are observed             |
    | `wheel_damping`         | **float**     | `0.4`      | N·m·s/rad | Damping of the wheels' hinges (paper: 0.8) |
    | `frame_skip`            | **int**       | `1`        | steps     | Physics steps that an action is held       |
    | `max_episode_steps`     | **int, None** | see below  | actions   | Length at which an episode is truncated    |
    | `max_tilt`              | **float**     | `20.0`     | degrees   | Tilt above which an episode terminates     |
    | `goal`                  | **tuple**     | `(0, 1)`   |           | Direction (x, y) to go, or `"command"`     |
    | `forward_reward_weight` | **float**     | `0.01`     | s/m       | Weight of *forward_reward*                 |
    | `ctrl_cost_weight`      | **float**     | `0.0001`   |           | Weight of *ctrl_cost*                      |
    | `healthy_reward`        | **float**     | `0.02`     |           | *healthy_reward* of a step                 |
    | `reward`                | **str, function, None** | `None` |  | A term of your own: see Rewards            |
    | `randomization`         | **dict, None** | `None`     |           | Strengths: see Domain randomization        |
    | `curriculum`            | **bool**      | `False`    |           | Whether difficulty grows: see Curriculum   |
    | `num_threads`           | **int**       | see below  |           | Threads: physics, frames; 0: one per CPU   |
    | `device`                | **str**       | `"cpu"`    |           | Where frames are rendered, see below       |
    | `render_mode`           | **str, None** | `None`     |           | `"human"` or `"rgb_array"`                 |

    `gym.make_vec` alone takes `num_envs`, `autoreset_mode` and `copy`: see `BallbotVectorEnv`.

    - `camera_rate`: a new frame comes every ceil(500 / `camera_rate`) steps, 6 for 90 Hz; from 500 Hz on, every step.
    - `frame_skip`: steps are physics steps of 2 ms everywhere, in the lengths of episodes too, so that numbers compare
      at any value of it. Only `max_episode_steps` counts actions.
    - `max_episode_steps`: the argument of Gymnasium, with its meaning, in `gym.make` and in `gym.make_vec` in every
      vectorization mode: it counts actions, -1 is no limit, and `None` is 4000, as registered. It does not follow
      `frame_skip`: with `frame_skip=4` the 8 s of the task are `max_episode_steps=1000`, and 4000 are 32 s. The class
      `BallbotEnv`, made without `gym.make`, has no limit unless one is given.
    - `num_threads`: 1 by default, and one robot has no use for more. For `gym.make_vec` the default is 0. Results are
      the same, bit for bit, at any number of threads. PyTorch's own threads are neither used nor changed.
    - `device`: a PyTorch device. With `"cuda"` frames are made on the GPU and stay there: `depth_0` and `depth_1` are
      then `torch` tensors on that device instead of arrays.
    - `render_mode`: `"human"` opens MuJoCo's viewer, `"rgb_array"` gives pictures of 640x480 pixels. Both need OpenGL,
      which nothing else here does. `gym.make_vec` has `"rgb_array"` only. Arrows show goal or command (green), velocity
      (white, to the same scale) and forces (red). A picture is rendered 25 times a second: in the 20 steps after it
      `render()` returns it again, read-only. `metadata["render_fps"]` is the rate of actions, 500 Hz / `frame_skip`:
      videos of `RecordVideo`, with a picture for each action, play in real time.

    ## Version History
    * v0: initial version. Since its rollers were fixed (`upright_i` in `assets/ballbot.xml`) the robot can drive. Do
      not compare returns with earlier ones. `motor_state` is clipped at 50 rad/s instead of 20. New are `frame_skip`,
      options of `reset()`, `apply_force()`, `goal="command"`, `randomization`, `curriculum` and the reward's terms in
      `info`.
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": round(1 / TIMESTEP)}

    def __init__(
        self,
        terrain: str | Callable | np.ndarray = "perlin",
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
            autoreset_mode=AutoresetMode.DISABLED,
            copy=False,  # `_first` copies
            **kwargs,
        )
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": self._envs.metadata["render_fps"]}
        self.model = self._envs.model
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self._viewer = self._data = None

    def reset(self, *, seed: int | None = None, options: Mapping | None = None) -> tuple[dict, dict]:
        """Start an episode. Returns `(observation, info)`. `options`: see Starting State."""
        super().reset(seed=seed)
        running = not (self._envs._needs_reset or self._envs._ended[0])
        if running and self._envs.levels is not None:  # a wrapper, such as TimeLimit, ended the episode
            self._envs._randomization.change_levels(np.ones(1, bool), self._envs._is_fast())
        obs, info = self._envs._reset_all([self.np_random], np.array([seed is not None]), options)
        if self.render_mode == "human":
            self.render()
        return self._first(obs), unbatch_infos(info)

    def step(self, action: ArrayLike) -> tuple[dict, float, bool, bool, dict]:
        """Hold `action` (3,) for `frame_skip` steps of 2 ms. Returns `(obs, reward, terminated, truncated, info)`."""
        action = np.asarray(action, np.float32)
        if action.shape != (3,):
            raise ValueError(f"action has shape {action.shape}, expected (3,)")
        obs, rewards, terminations, truncations, infos = self._envs._step_physics(action[None])
        if self.render_mode == "human" and self._envs._clock[0] % 8 < self._envs.frame_skip:
            self.render()
        self._envs._ended = terminations | truncations
        ends = bool(terminations[0]), bool(truncations[0])
        return self._first(obs), float(rewards[0]), *ends, unbatch_infos(infos)

    def apply_force(self, force: ArrayLike) -> None:
        """Apply `force` (3,), N in the world's frame, to the base's centre of mass.

        It acts from the next step until another force is set (zeros end it) or the episode ends.
        """
        if np.shape(force) != (3,):
            raise ValueError(f"force has shape {np.shape(force)}, expected (3,)")
        self._envs.apply_force([force])

    def set_command(self, velocity: ArrayLike) -> None:
        """Command `velocity` (2,), m/s in the world's frame, up to 2 m/s each; only with `goal="command"`.

        It counts from the next step until another command is set or the episode ends. None is sampled until then.
        """
        self._envs.set_command(np.asarray(velocity)[None])

    def render(self) -> np.ndarray | None:
        """The RGB picture, uint8 (480, 640, 3), or None after updating the viewer's window."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render mode: gym.make("Ballbot-v0", render_mode="rgb_array")')
            return None
        if self.render_mode == "rgb_array":
            return self._envs._render_env(0)
        self._data = self._envs.get_data(0, self._data)
        if self._viewer is None:
            import mujoco.viewer

            if not has_display():
                raise RuntimeError('render_mode="human" needs a display: use "rgb_array" without one')
            self._viewer = mujoco.viewer.launch_passive(self.model, self._data)
        self._viewer.user_scn.ngeom = 0
        draw_arrows(self._viewer.user_scn, self._envs.arrows(0))
        self._viewer.sync()
        return None

    def get_state(self) -> dict:
        """All that the future depends on, as a dict of tensors and strings, for `set_state`."""
        return self._envs.get_state()

    def set_state(self, state: dict) -> None:
        """Continue, bit for bit, from a `get_state` of an environment made with the same arguments; else ValueError."""
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
    def _first(obs):
        return {key: copy_array(value[0]) for key, value in obs.items()}


class BallbotVectorEnv(gym.vector.VectorEnv):
    """Many ballbots at once, `gym.make_vec("Ballbot-v0", num_envs=10)`: the task of `BallbotEnv`, stepped on threads.

    Spaces, arguments and dynamics are those of `BallbotEnv`, which documents them. Here every array has a leading axis
    of `num_envs`, and actions are float (num_envs, 3).

    - `autoreset_mode` is a `gymnasium.vector.AutoresetMode`, or its value, a string. It says what happens when an
      episode has ended, in the layout of `SyncVectorEnv`. `metadata["autoreset_mode"]` has it too.
      - `SAME_STEP` (`"SameStep"`, the default): the step that ends an episode returns the next one's first observation.
        `info["final_obs"]` and `info["final_info"]` hold the last of the ended one. `info["episode"]` holds return `r`,
        length `l` (physics steps) and time `t` (s) of the episodes that ended. `RecordEpisodeStatistics` of
        `gymnasium.wrappers.vector` is not needed, and needs a `stats_key` of its own here.
      - `NEXT_STEP` (`"NextStep"`, for wrappers such as `NormalizeObservation`): the next step starts the new episode,
        whatever its action, and returns the first observation and a reward of 0. There is no `info["episode"]`, which
        is left to `RecordEpisodeStatistics`; that wrapper counts actions.
      - `DISABLED` (`"Disabled"`): the caller resets ended environments before the next step, which otherwise raises
        `gymnasium.error.ResetNeeded`.
    - `reset(options={"reset_mask": mask})`, bool (num_envs,), resets some environments, in any mode. The others do not
      change, and `info` is about those in `_key` only.
    - `copy` (default True, as in `SyncVectorEnv`): what a step returns stays valid. With `copy=False` `depth_0` and
      `depth_1` are read-only views of the frame memory: a held frame costs nothing, and a new one replaces it.
    - `new_frames`, bool (num_envs,), marks the environments whose frames are new since the step before.
    - `reset(seed)` seeds environment i with seed + i, as Gymnasium's vector environments do; a list gives each its own.
      Seeds s and s + 1 then share all but one of their environments: `spawn_seeds` gives independent ones.
    - An environment whose physics fails (MuJoCo warning or error, state not finite) ends its episode as terminated and
      counts it in `info["physics_errors"]`. The others are not affected. Each samples its own `randomization`.

    To read, or to build on: `model` (MjModel), `robots` (`Robots`: live poses, velocities and forces), `batch`,
    `velocities` and `forces` (as in `robots`), `terrain` (`Terrain`), `goal` (unit vector, or None with
    `goal="command"`), `commands` (m/s, (num_envs, 2), or None without it), `levels` (int (num_envs,), or None without
    `curriculum`), `slopes()` (of the ground), `frames` (float32 tensor (num_envs, 2, camera_size, camera_size) in m, or
    None), `renderer` (`DepthRenderer`), `frame_interval` (steps), `render_seconds` (spent on frames so far) and
    `physics_errors` (num_envs,).

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
        terrain: str | Callable | np.ndarray = "perlin",
        terrain_seed: int = 0,
        terrain_amplitude: float = 0.1,
        cameras: bool = True,
        camera_size: int = 64,
        camera_rate: float = 90.0,
        camera_pitch: float = 0.0,
        height_scan: bool = False,
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
        num_threads: int = 0,
        device: str | torch.device = "cpu",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        copy: bool = True,
    ) -> None:
        self._arguments = deepcopy({name: value for name, value in locals().items() if name != "self"})
        check_arguments(self._arguments)
        self.num_envs, self.frame_skip, self.render_mode, self._copy = num_envs, frame_skip, render_mode, copy
        self.randomization = check_randomization(randomization, terrain, max_tilt, curriculum)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        fps = self.metadata["render_fps"] / frame_skip  # a picture for each action
        self.metadata["render_fps"] = int(fps) if fps.is_integer() else fps  # gymnasium.utils.play wants an int
        limit = MAX_EPISODE_STEPS if max_episode_steps is None else max_episode_steps
        self.max_episode_steps = math.inf if limit == -1 else limit  # actions
        self._max_tilt, self._max_sin2_half_tilt = max_tilt, math.sin(math.radians(max_tilt) / 2) ** 2
        self._commands = Commands(num_envs) if isinstance(goal, str) else None
        self.commands = self._commands and self._commands.velocities  # m/s, (num_envs, 2)
        self.goal = None if self._commands else np.asarray(goal, dtype=float) / math.hypot(*goal)
        self.forward_reward_weight, self.ctrl_cost_weight = forward_reward_weight, ctrl_cost_weight
        self.healthy_reward = healthy_reward
        self.frame_interval = math.ceil(1 / (camera_rate * TIMESTEP) - 1e-9)

        present = {"", "cameras" * cameras, "command" * isinstance(goal, str), "height_scan" * height_scan}
        table = make_observations(camera_size, self.frame_interval)
        self._observations = {name: row for name, row in table.items() if row.needs in present}
        self.single_observation_space = make_space(self._observations)
        self.single_action_space = spaces.Box(-1, 1, (3,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self.terrain = Terrain(terrain, terrain_seed, terrain_amplitude)
        strength = self.randomization.get("terrain_amplitude")
        self._starts = self.terrain.find_starts(2 * (-START_EXTENT,), 2 * (START_EXTENT,))
        scales = (1.0,) if strength is None else height_scales(strength, curriculum)
        self.model = make_model(self.terrain, wheel_damping, scales, camera_pitch)
        self.robots = Robots(self.model, num_envs, num_threads, frame_skip)
        self.batch, self.velocities, self.forces = self.robots.batch, self.robots.velocities, self.robots.forces
        self._randomization = None
        if self.randomization:
            size = camera_size if cameras else 0
            self._randomization = Randomization(
                self.randomization, self.model, self.batch, self.forces, frame_skip, NOISE_WIDTH, size, device,
                curriculum,
            )  # fmt: skip
        # Factors on the height of the hills (num_envs,), where `randomization` samples them, else None
        self._height_scale = self._randomization and self._randomization.height_scale
        self.levels = self._randomization and self._randomization.levels  # of the curriculum (num_envs,), or None

        self._rngs = [None] * num_envs
        self.last_actions = np.zeros((num_envs, 3), np.float32)
        self._clock = np.zeros(num_envs, int)  # physics steps since the last seeded reset: the cameras run freely on it
        self._observed_at = np.zeros(num_envs, int)  # clock of the last observation
        self._ended = np.zeros(num_envs, bool)  # waiting for a reset
        self._steps = np.zeros(num_envs, int)
        self._returns = np.zeros(num_envs)
        self._started = np.zeros(num_envs)  # s
        self._start = np.zeros((num_envs, 2))  # m, where the episodes started
        self._all_envs = np.ones(num_envs, bool)
        self._all_envs.flags.writeable = False
        self.physics_errors = np.zeros(num_envs, int)
        self.final_slopes = np.zeros((num_envs, 6), np.float32)
        self.render_seconds = 0.0  # spent on depth frames
        self._needs_reset = True
        self.new_frames = np.zeros(num_envs, bool)
        self.renderer = None
        self.frames = None  # float32 tensor (num_envs, cameras, camera_size, camera_size), m
        if cameras:
            precise = self.terrain.has_edges or camera_pitch != 0  # turned cameras see more edges of hills
            self.renderer = DepthRenderer(
                self.model, camera_size, self.terrain.heights, device, self.batch.nthread, precise
            )
            shape = num_envs, len(CAMERAS), camera_size, camera_size
            with single_torch_thread():
                self.frames = torch.full(shape, MAX_DEPTH, dtype=torch.float32, device=device)
            self._frame_views = self.frames
            if self.frames.device.type == "cpu":
                self._frame_views = self.frames.numpy().view()
                self._frame_views.flags.writeable = False
            self._frame_time = np.zeros(num_envs, int)  # clock at which each frame was taken
        self._pictures = PictureCache(num_envs)
        self._reward = load_reward(reward, self, np.zeros((num_envs, 3), np.float32))
        self._own_attributes = set(self.__dict__)  # which a copy makes itself

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
        """Start new episodes. Returns `(observation, info)`.

        `seed`: int, list of int, or None to keep the generators. `options` are those of `BallbotEnv`, one for all
        environments or one for each: position (2,) or (num_envs, 2), and so on; and `reset_mask`, bool (num_envs,),
        which environments to reset.
        """
        seeds = [seed] * self.num_envs if seed is None else seed
        if isinstance(seeds, (int, np.integer)):
            seeds = [int(seeds) + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one each, or one int")
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", self._all_envs))
        check_value(mask.dtype == bool and mask.shape == (self.num_envs,) and mask.any(), "reset_mask", mask,
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
        obs, rewards, terminations, truncations, infos = self._step_physics(actions)
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
                final_obs[i] = {key: copy_array(value[i]) for key, value in obs.items()}
            final_info = mask_infos(infos, done)
            self.final_slopes = self.slopes()
            self._reset(ids)
            obs, infos = self._get_obs(), self._get_info() | mask_infos(reward_terms(infos), ~done)
            infos |= {"episode": episode, "_episode": done.copy()}
            infos |= {"final_obs": final_obs, "_final_obs": done.copy()}
            infos |= {"final_info": final_info, "_final_info": done.copy()}
        return obs, rewards, terminations, truncations, infos

    def _step_without_reset(self, actions):
        """A step that returns an ended episode's last observation. With NEXT_STEP, episodes that had ended restart."""
        starting = self._ended
        if not np.count_nonzero(starting):
            obs, rewards, terminations, truncations, infos = self._step_physics(actions)
        elif self.autoreset_mode is AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(f"environments {', '.join(map(str, np.flatnonzero(starting)))} have ended: "
                                        'call reset(options={"reset_mask": ...}) before step()')  # fmt: skip
        else:
            ids, clock, errors = np.flatnonzero(starting), self._clock[starting], self.physics_errors[starting]
            # Their physics is stepped as well, and then undone
            _, rewards, terminations, truncations, infos = self._step_physics(actions, ~starting)
            self._clock[ids], self.physics_errors[ids] = clock, errors
            self._reset(ids)
            for result in (rewards, terminations, truncations):
                result[ids] = 0
            obs, infos = self._get_obs(), self._get_info() | mask_infos(reward_terms(infos), ~starting)
        self._ended = terminations | truncations
        return obs, rewards, terminations, truncations, infos

    def apply_force(self, forces: ArrayLike) -> None:
        """Apply `forces` (num_envs, 3), N in the world's frame, to the bases' centres of mass.

        They act from the next step until others are set (zeros end them) or the episode ends.
        """
        if np.shape(forces) != (self.num_envs, 3):
            raise ValueError(f"forces have shape {np.shape(forces)}, expected ({self.num_envs}, 3)")
        self.forces[:] = forces

    def set_command(self, velocities: ArrayLike) -> None:
        """Command `velocities` (num_envs, 2), m/s in the world's frame, up to 2 m/s each; only with `goal="command"`.

        They count from the next step until others are set or the episode ends. None is sampled until then.
        """
        if self.commands is None:
            raise ValueError('set_command() needs the goal "command": gym.make("Ballbot-v0", goal="command")')
        velocities = np.asarray(velocities, float)
        if velocities.shape != (self.num_envs, 2):
            raise ValueError(f"velocities have shape {velocities.shape}, expected ({self.num_envs}, 2)")
        self._commands.set(velocities)

    def slopes(self) -> np.ndarray:
        """Slopes of the ground along x and y, float32 (num_envs, 6): under the ball, and 0.3 m and 0.6 m ahead of it.

        Ahead is towards the goal or along the command. No sensor measures slopes: they are for a critic in training
        (asymmetric actor-critic, Pinto et al., arXiv 1710.06542). After a step that ended episodes, `final_slopes`
        holds the slopes at their final observations.
        """
        direction = self.goal if self.commands is None else self._commands.directions()  # (2,) or (num_envs, 2)
        ahead = np.array([0, 0.3, 0.6])[:, None] * direction[..., None, :]
        scale = 1 if self._height_scale is None else self._height_scale[:, None, None]
        slopes = self.terrain.slopes(self.robots.ball_position[:, None, :2] + ahead, BALL_RADIUS, scale)
        return slopes.reshape(self.num_envs, 6).astype(np.float32)

    def scan_heights(self) -> np.ndarray:
        """The observation `heights`, float32 (num_envs, 30), m."""
        right = rotation_matrix(self.robots.quaternion)[:, :2, 0]
        right = right / np.linalg.norm(right, axis=1, keepdims=True)
        axes = np.stack([right, right[:, ::-1] * [-1, 1]], 1)  # rows: to the right, ahead
        here = self.robots.ball_position[:, None, :2]
        heights = self.terrain.heights_at(np.concatenate([here, here + SCAN @ axes], 1))
        heights = heights if self._height_scale is None else heights * self._height_scale[:, None]
        return (heights[:, 1:] - heights[:, :1]).astype(np.float32)

    # State and copies

    def _state_arrays(self):
        """All arrays that the future depends on, by name. Only the generators are missing."""
        names = "_clock", "_observed_at", "_ended", "_steps", "_returns", "physics_errors"
        arrays = {name: getattr(self, name) for name in names} | {"_actions": self.last_actions}
        arrays |= {"physics": self.batch.state, "warnings": self.batch.warning}
        if self._commands:
            arrays |= {"commands": self.commands, "commands_due": self._commands.due}
        if self._randomization:
            arrays["randomization"] = self._randomization.sampled
        if self.levels is not None:
            arrays["start"] = self._start
        if self.frames is not None:
            arrays |= {"frames": self.frames, "frame_time": self._frame_time}
        return arrays

    def get_state(self) -> dict:
        """All that the future depends on, as a dict of tensors and strings, for `set_state`."""
        if self._needs_reset:
            raise gym.error.ResetNeeded("call reset() before get_state()")
        return to_tensors(self._state_arrays()) | {"rngs": json.dumps([rng.bit_generator.state for rng in self._rngs])}

    def set_state(self, state: dict) -> None:
        """Continue, bit for bit, from a `get_state` of an environment made with the same arguments.

        Raises ValueError for any other or damaged state, and changes nothing then.
        """
        arrays, rngs = self._state_arrays(), [np.random.default_rng() for _ in range(self.num_envs)]
        wrong = find_mismatch(state, to_tensors(arrays) | {"rngs": ""})
        if not wrong and not (0 <= state["_clock"].min() and state["_clock"].max() < 2**53):
            wrong = "clock"
        if not wrong and self._randomization:
            wrong = self._randomization.find_invalid(state["randomization"])
        try:
            for rng, rng_state in zip(rngs, json.loads(state["rngs"]), strict=True):
                rng.bit_generator.state = rng_state
        except Exception:  # NumPy raises many kinds
            wrong = wrong or "rngs"
        if wrong:
            raise ValueError(f"{wrong} is not as these environments have it")
        copy_into(arrays, state)
        self._rngs, self._needs_reset = rngs, False
        self._started[:] = time.perf_counter()
        self.new_frames[:] = self.frames is not None
        if self._randomization:
            self._randomization.change_models(np.arange(self.num_envs))
        self._pictures.forget(range(self.num_envs))

    def __getstate__(self):
        names = {"_rngs", "new_frames", "action_space", "single_action_space"}
        names |= self.__dict__.keys() - self._own_attributes  # a subclass's, and what was set from outside
        state = None if self._needs_reset else self.get_state()
        return self._arguments, state, {name: self.__dict__[name] for name in names}

    def __setstate__(self, pickled):
        arguments, state, attributes = pickled
        BallbotVectorEnv.__init__(self, **arguments)
        if state is not None:
            self.set_state(state)
        self.__dict__.update(attributes)

    # Pictures

    def arrows(self, i: int, force: ArrayLike | None = None) -> list[tuple]:
        """Arrows, for `draw_arrows`, of environment i: goal, velocity, and the force on it, or `force` (3,), N."""
        goal = self.goal if self.commands is None else self.commands[i]
        force = self.forces[i] if force is None else force
        return make_arrows(self.robots.position[i], goal, self.velocities[i], force)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """RGB pictures, uint8 (480, 640, 3), one per environment, by MuJoCo's OpenGL renderer."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render mode: gym.make_vec("Ballbot-v0", render_mode="rgb_array")')
            return None
        return tuple(self._render_env(i) for i in range(self.num_envs))

    def _render_env(self, i):
        terrain = self.terrain
        if self._height_scale is not None:
            terrain = replace(terrain, scale=self._height_scale[i])
        place = self.robots.position[i, :2]
        return self._pictures.get(i, self._clock[i], self.batch.qpos[i], place, terrain, self.arrows(i))

    def get_data(self, i: int, data: mujoco.MjData | None = None) -> mujoco.MjData:
        """A copy of environment i's physics, in `data` if given, and the ground in `model` that belongs to it."""
        data = self.batch.get_data(i, data)
        if self._height_scale is not None:
            self.model.geom_dataid[self.model.geom("ground").id] = self._randomization.hfield_id(i)
        mujoco.mj_forward(self.model, data)
        return data

    def close_extras(self, **kwargs) -> None:
        self._pictures.close()

    # Resets

    def _reset_all(self, rngs, seeded, options, mask=None):
        """Reset all environments, or those in `mask` (num_envs,). The clock restarts where `seeded` (num_envs,)."""
        options = check_options(options or {}, self.num_envs, self._max_tilt)
        mask = self._all_envs if mask is None else mask
        self._rngs = rngs
        self._clock[seeded & mask] = 0
        if self.levels is not None:
            self.levels[seeded & mask] = 0
        self._needs_reset = False
        self._ended = self._ended & ~mask
        self.new_frames[:] = False
        self._reset(np.flatnonzero(mask), options)
        return self._get_obs(), self._get_info() if mask.all() else mask_infos(self._get_info(), mask)

    def _reset(self, ids, options=None):
        """New episodes of the environments `ids`, and their first frames. `options` are for all environments."""
        options = options or {}
        for i in ids:
            rng = self._rngs[i]
            x, y = rng.uniform(-START_EXTENT, START_EXTENT, 2)
            if self._starts is not None:
                x, y = self._starts[int((x + START_EXTENT) / (2 * START_EXTENT) * len(self._starts))]
            if "position" in options:
                x, y = options["position"][i]
            if self._randomization:
                self._randomization.sample_episode(i, rng)
            if self._commands:
                self._commands.begin(i, rng)
            ground = self.terrain.max_height(x, y, BALL_RADIUS)
            ground *= 1 if self._height_scale is None else self._height_scale[i]
            self.robots.start(i, x, y, ground)
            self._start[i] = x, y
        if self._randomization:
            options = self._randomization.starts(ids, options)
            self._randomization.change_models(ids)
        if options:
            zeros = np.zeros((self.num_envs, 2))
            defaults = {"heading": zeros[:, 0], "tilt": zeros, "velocity": zeros}
            self.robots.move(ids, **{name: options.get(name, default)[ids] for name, default in defaults.items()})
        self.last_actions[ids] = 0
        self._steps[ids] = 0
        self._returns[ids] = 0
        self._started[ids] = time.perf_counter()
        self._observed_at[ids] = self._clock[ids]
        self._pictures.forget(ids)
        self._take_frames(ids, self.robots.position[ids], self.robots.quaternion[ids], self._clock[ids])

    # A step

    def _step_physics(self, actions, running=None):
        """Hold actions for `frame_skip` physics steps, without autoreset.

        Environments that are not `running`, bool (num_envs,), are reset by the caller. Nothing is sampled for them.
        """
        if self._needs_reset:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions, np.float32)
        if actions.shape != (self.num_envs, 3):
            raise ValueError(f"actions have shape {actions.shape}, expected ({self.num_envs}, 3)")
        running = self._all_envs if running is None else running
        self.last_actions = np.where(running[:, None], np.minimum(np.maximum(actions, -1), 1), np.float32(0))
        controls = None
        if self._randomization:
            controls = self._randomization.before_action(self.last_actions, self._rngs, running)
        failed = self.robots.step(self.last_actions, controls)
        if len(failed):
            self.last_actions[failed] = np.nan_to_num(self.last_actions[failed])
            self.physics_errors[failed] += 1
            if self._randomization:
                self._randomization.forget_commands(failed)
        terminated, truncated, active = self._get_ends(failed)
        num_substeps = active.sum(1)
        self.robots.rewind(num_substeps)
        rewards, terms = self._get_rew(terminated, active)

        due = (self._clock + num_substeps) // self.frame_interval * self.frame_interval  # clock of the newest frame
        self.new_frames[:] = False
        ids = np.flatnonzero((due > self._clock) & running)
        if self.frames is not None and len(ids):
            at = ids, due[ids] - self._clock[ids] - 1
            self._take_frames(ids, self.robots.substep_position[at], self.robots.substep_quaternion[at], due[ids])
        self._observed_at = self._clock + num_substeps
        self._clock += self.frame_skip
        self._steps += num_substeps
        self._returns += rewards
        if self._commands:
            self._commands.advance(self._steps, self._rngs, running)
        infos = self._get_info() | terms | {f"_{name}": self._all_envs for name in terms}
        if self._randomization:
            self._randomization.after_action(self._rngs, running)
        if self.levels is not None:
            ended = (terminated | truncated).any(1) & running
            self._randomization.change_levels(ended, ~terminated.any(1) & self._is_fast())
        return self._get_obs(), rewards, terminated.any(1), truncated.any(1), infos

    def _is_fast(self):
        """Where robots have been fast enough for a success, bool (num_envs,): with commands everywhere."""
        if self.goal is None:
            return self._all_envs
        distance = (self.robots.position[:, :2] - self._start) @ self.goal
        return distance >= SUCCESS_SPEED * TIMESTEP * self._steps

    def _get_ends(self, failed):
        """Where episodes terminate and where they are truncated, by physics step: see `get_ends`.

        `failed`: indices of environments whose physics failed.
        """
        has_failed = np.zeros(self.num_envs, bool)
        has_failed[failed] = True
        steps = self._steps[:, None] + np.arange(1, self.frame_skip + 1)
        max_steps = self.max_episode_steps * self.frame_skip
        return get_ends(self.robots, has_failed, steps, max_steps, self._max_sin2_half_tilt)

    def _get_rew(self, terminated, active):
        """Rewards (num_envs,) of an action, and their terms: see `get_reward_terms`."""
        vel = self._observations["vel"]
        velocity = np.minimum(np.maximum(self.robots.substep_velocity(), vel.low), vel.high)
        weights = self.forward_reward_weight, self.ctrl_cost_weight, self.healthy_reward
        terms = get_reward_terms(
            velocity, self.goal, self.commands, self.last_actions.astype(float), terminated, active, *weights
        )
        if self._reward:
            terms[f"reward_{self._reward.__name__}"] = self._reward(self, self.last_actions) * active.sum(1)
        return sum(terms.values()), terms

    def _get_obs(self):
        values = {name: row.read(self) for name, row in self._observations.items()}
        if self._randomization and self._randomization.noise is not None:
            values |= add_sensor_noise(values, self._randomization.noise)
        for name, row in self._observations.items():
            if len(row.shape) == 1:  # frames are clipped where they are taken
                values[name] = np.minimum(np.maximum(values[name], row.low), row.high).astype(np.float32)
        return values

    def _get_info(self):
        infos = {"position": self.robots.position.copy(), "physics_errors": self.physics_errors.copy()}
        infos |= {"_position": self._all_envs, "_physics_errors": self._all_envs}
        kinds = self.terrain.kinds_at(self.robots.position[:, :2])
        if kinds is not None:
            infos |= {"terrain": kinds, "_terrain": self._all_envs}
        if self._randomization:
            sampled = {name: value.copy() for name, value in self._randomization.sampled.items() if name[0] != "_"}
            infos["randomization"] = sampled | {f"_{name}": self._all_envs for name in sampled}
            infos["_randomization"] = self._all_envs
        return infos

    def frame_view(self, camera: int) -> np.ndarray | torch.Tensor:
        """The newest frames (num_envs, 1, camera_size, camera_size), m, of a camera, as `copy` says."""
        frames = self._frame_views[:, camera : camera + 1]
        return copy_array(frames) if self._copy else frames

    def frame_ages(self) -> np.ndarray:
        """Seconds (num_envs, 1) since the frames were taken, at the last observation."""
        return ((self._observed_at - self._frame_time) * TIMESTEP)[:, None]

    def _take_frames(self, ids, position, quaternion, clock):
        """Frames of the environments `ids` from poses (n, 3) and (n, 4), taken at `clock` (n,)."""
        if self.frames is None:
            return
        started = time.perf_counter()
        with single_torch_thread():
            scale = None if self._height_scale is None else self._height_scale[ids]
            frames = self.renderer.render(position, quaternion, scale)
            if self._randomization:
                frames = self._randomization.disturb_frames(frames, [self._rngs[i] for i in ids], MAX_DEPTH)
            if len(ids) == self.num_envs:
                self.frames.copy_(frames)
            else:
                self.frames[torch.from_numpy(ids)] = frames
        self._frame_time[ids] = clock
        self.new_frames[ids] = True
        self.render_seconds += time.perf_counter() - started


def get_ends(robots, failed, steps, max_steps, max_sin2_half_tilt):
    """Where episodes terminate and where they are truncated, by physics step: bool (n, frame_skip) each.

    Third: the physics steps that count, up to the one at which the episode ends. All are NumPy arrays, or all tensors:
    `robots` have the poses after the steps of an action, `failed` (n,) is where the physics failed, `steps`
    (n, frame_skip) counts the episodes' steps.
    """
    x, y = robots.substep_quaternion[:, :, 1], robots.substep_quaternion[:, :, 2]
    terminated = x * x + y * y > max_sin2_half_tilt
    terminated[:, 0] |= failed
    truncated = steps >= max_steps
    truncated = truncated | (abs(robots.substep_position[:, :, :2]) > TERRAIN_EXTENT - TERRAIN_MARGIN).any(2)
    ended = terminated | truncated
    active = ended.cumsum(1) <= ended  # up to the first end
    return terminated & active, truncated & active & ~terminated, active


def get_reward_terms(
    velocity, goal, commands, actions, terminated, active, forward_reward_weight, ctrl_cost_weight, healthy_reward
):
    """The terms of the rewards of an action, by name, summed over the physics steps that are `active`: (n,) each.

    A term is a name that starts with "reward_" and a sum; all of them are in `info`. All are NumPy arrays, or all
    tensors: `velocity` (n, frame_skip, 2), m/s, as observed, `goal` (2,) or else `commands` (n, 2), m/s, the clipped
    `actions` (n, 3), and `terminated` and `active` of `get_ends`.
    """
    if commands is None:
        speed = velocity @ goal
    else:
        command, error = commands[:, None], velocity - commands[:, None]
        speed = 8 * ((command * command).sum(2) - (error * error).sum(2))
    return {
        "reward_forward": forward_reward_weight * (speed * active).sum(1),
        "reward_ctrl": -ctrl_cost_weight * (actions * actions).sum(1) * active.sum(1),
        "reward_healthy": healthy_reward * (active & ~terminated).sum(1),
    }


def load_reward(reward, envs, actions):
    """A user's reward term as a function, tried on new environments and `actions`, zeros (n, 3), or None without.

    Raises ValueError, of one line, if there is no such function or if it does not return numbers (n,).
    """
    if reward is None:
        return None
    if isinstance(reward, str):
        file = find_file(reward)
        check_value(file and file.path.suffix == ".py", "reward", reward, "FILE.py:FUNCTION")
        reward = load_function(file.path, file.sha, file.rest)
    name = reward.__name__
    check_value(name not in ("forward", "ctrl", "healthy"), "the name of the reward term", name, "another name")
    try:
        value = reward(envs, actions)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"reward {name} raises {type(error).__name__}: {' '.join(str(error).split())}") from None
    check_value(getattr(value, "shape", None) == (len(actions),), f"the result of reward {name}", value,
                f"an array of shape ({len(actions)},), a number for each robot")  # fmt: skip
    return reward


def reward_terms(infos: dict) -> dict:
    """The reward's terms in `infos`."""
    return {name: value for name, value in infos.items() if name.startswith("reward_")}


def spawn_seeds(seed: int, n: int) -> list[int]:
    """Seeds for `n` environments, independent of each other and of the seeds from any other `seed`.

    The first seeds of a longer list are those of a shorter one (`numpy.random.SeedSequence`).
    """
    return np.random.SeedSequence(seed).generate_state(n, np.uint64).tolist()


gym.register(
    "BallbotWarp-v0", vector_entry_point="ballbot_env_warp:BallbotWarpEnv", max_episode_steps=MAX_EPISODE_STEPS
)
gym.register(
    "Ballbot-v0",
    entry_point="ballbot_env:BallbotEnv",
    vector_entry_point="ballbot_env:BallbotVectorEnv",
    max_episode_steps=MAX_EPISODE_STEPS,
)
