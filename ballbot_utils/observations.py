"""The table of observations. To add one, add a row: spaces, order, clipping, noise and PROPRIOCEPTION follow."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces

from ballbot_utils.commands import COMMAND_LIMIT
from ballbot_utils.depth import MAX_DEPTH
from ballbot_utils.geometry import Array, in_body_frame, namespace, rotation_vector
from ballbot_utils.model import CAMERAS, TIMESTEP

# Points of the height scan around the ball's contact, m: to the right of the goal's direction, and along it
SCAN = np.array([(right, ahead) for ahead in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) for right in (-0.2, -0.1, 0.0, 0.1, 0.2)])


class Observation(NamedTuple):
    """A row of the table."""

    shape: tuple[int, ...]
    low: float  # observations are clipped to [low, high]
    high: float
    unit: str
    read: Callable[[Any], Any]  # from a BallbotVectorEnv to the values (num_envs, *shape), before noise and clipping
    noisy: bool = False  # whether sensor noise is added
    needs: str = ""  # "cameras", "command" or "height_scan": observed with these only


def make_observations(camera_size: int = 64, frame_interval: int = 6) -> dict[str, Observation]:
    """The rows, in order, by key. Images have `camera_size` pixels a side, one each `frame_interval` physics steps."""
    oldest = max(frame_interval - 1, 1) * TIMESTEP  # s; a space needs some extent
    image = 1, camera_size, camera_size
    return {
        "orientation": Observation((3,), -math.pi, math.pi, "rad", read_orientation, noisy=True),
        "angular_vel": Observation((3,), -2, 2, "rad/s", lambda envs: envs.robots.angular_velocities, noisy=True),
        "vel": Observation((3,), -2, 2, "m/s", lambda envs: envs.robots.velocities, noisy=True),
        "motor_state": Observation((3,), -5, 5, "10 rad/s", lambda envs: envs.robots.wheel_speeds * 0.1, noisy=True),
        "actions": Observation((3,), -1, 1, "", lambda envs: envs.last_actions),
        **{name: Observation(image, 0, MAX_DEPTH, "m", lambda envs, i=i: envs.frame_view(i), needs="cameras")
           for i, name in enumerate(CAMERAS)},
        "relative_image_timestamp": Observation((1,), 0, oldest, "s", lambda envs: envs.frame_ages(), needs="cameras"),
        "heights": Observation((len(SCAN),), -0.5, 0.5, "m", lambda envs: envs.scan_heights(), needs="height_scan"),
        "command": Observation((2,), -COMMAND_LIMIT, COMMAND_LIMIT, "m/s", lambda envs: envs.commands, needs="command"),
    }  # fmt: skip


def make_space(rows: Mapping[str, Observation]) -> spaces.Dict:
    """The space of these rows, of one environment."""
    return spaces.Dict({
        name: spaces.Box(np.full(row.shape, row.low, np.float32), np.full(row.shape, row.high, np.float32))
        for name, row in rows.items()
    })  # fmt: skip


def read_orientation(envs: Any) -> np.ndarray | torch.Tensor:
    """Rotation vectors (num_envs, 3), rad, of the bases, float32."""
    orientation = rotation_vector(envs.robots.quaternion)
    return orientation if torch.is_tensor(orientation) else orientation.astype(np.float32)


PROPRIOCEPTION = tuple(name for name, row in make_observations().items() if not row.needs)

_noisy = {name: row.shape[0] for name, row in make_observations().items() if row.noisy}
_ends = np.cumsum(list(_noisy.values())).tolist()
NOISE_WIDTH = _ends[-1]  # number of values with sensor noise
NOISY_COLUMNS = {name: slice(end - width, end) for (name, width), end in zip(_noisy.items(), _ends)}


def add_sensor_noise(obs: Mapping[str, np.ndarray], noise: np.ndarray) -> dict[str, np.ndarray]:
    """The observations of `obs`, (n, ...) each, that have noise, with `noise` (n, NOISE_WIDTH) added."""
    return {name: obs[name] + noise[:, columns] for name, columns in NOISY_COLUMNS.items()}


def to_body_frame(obs: Mapping[str, Array]) -> dict[str, Array]:
    """The observations of a batch that change with the frame, as the robot sees them: arrays or tensors, as in `obs`.

    `orientation` (n, 4) is lean, and sine and cosine of the heading. `vel` (n, 3) and `command` (n, 2), if there is
    one, are in the robot's frame, m/s.
    """
    xp, orientation = namespace(obs["vel"]), obs["orientation"]
    lean, heading, vel = in_body_frame(orientation, obs["vel"])
    seen = {"orientation": xp.concatenate([lean, xp.sin(heading), xp.cos(heading)], 1), "vel": vel}
    if "command" in obs:
        command = xp.concatenate([obs["command"], xp.zeros_like(obs["command"][:, :1])], 1)
        seen["command"] = in_body_frame(orientation, command)[2][:, :2]
    return seen
