"""What is valid as an argument of the environments, and as an option of their reset."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from ballbot_utils.checks import check_value, is_number, is_whole
from ballbot_utils.terrain import TERRAIN_EXTENT, TERRAIN_MARGIN


def is_goal(goal: Any) -> bool:
    """Whether it is "command" or a direction (x, y) other than (0, 0)."""
    if isinstance(goal, str):
        return goal == "command"
    direction = np.asarray(goal, dtype=object)
    return direction.shape == (2,) and all(map(is_number, direction)) and any(direction)


def is_device(device: Any) -> bool:
    """Whether PyTorch finds this device."""
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, TypeError, AssertionError):  # an unknown string, another type, no GPU
        return False
    return True


# Arguments of BallbotVectorEnv: what is valid, and in words. `Terrain` checks `terrain`, `check_randomization` its own.
ARGUMENTS = {
    "num_envs": (lambda value: is_whole(value, 1), "a whole number from 1 on"),
    "terrain_seed": (lambda value: is_whole(value, 0), "a whole number from 0 on"),
    "terrain_amplitude": (lambda value: is_number(value) and 0 < value <= 100,
                          'a height above 0 m, up to 100 m, or terrain="flat"'),
    "cameras": (lambda value: isinstance(value, bool), "True or False"),
    "camera_size": (lambda value: is_whole(value, 8), "a whole number from 8 on"),
    "camera_pitch": (lambda value: is_number(value) and -60 <= value <= 60, "an angle from -60 to 60 degrees"),
    "camera_rate": (lambda value: is_number(value) and value > 0, "a rate above 0 Hz"),
    "height_scan": (lambda value: isinstance(value, bool), "True or False"),
    "wheel_damping": (lambda value: is_number(value) and 0 <= value <= 1e6, "a damping from 0 to 1e6 N·m·s/rad"),
    "frame_skip": (lambda value: is_whole(value, 1), "a whole number from 1 on"),
    "max_episode_steps": (lambda value: value is None or is_whole(value, 1) or (is_whole(value, -1) and value == -1),
                          "a whole number from 1 on, or -1 for no limit"),
    "max_tilt": (lambda value: is_number(value) and 0 < value < 90, "an angle between 0 and 90 degrees"),
    "goal": (is_goal, 'a direction (x, y) other than (0, 0), or "command"'),
    "forward_reward_weight": (is_number, "a finite number"),
    "ctrl_cost_weight": (is_number, "a finite number"),
    "healthy_reward": (is_number, "a finite number"),
    "reward": (lambda value: value is None or isinstance(value, str) or hasattr(value, "__name__"),
               "a function of environments and actions, or FILE.py:FUNCTION"),
    "curriculum": (lambda value: isinstance(value, bool), "True or False"),
    "num_threads": (lambda value: is_whole(value, 0), "a whole number from 0 on"),
    "device": (is_device, 'a device that PyTorch finds here, such as "cpu"'),
    "render_mode": (lambda value: value in (None, "rgb_array"), 'None or "rgb_array"'),
    "autoreset_mode": (lambda value: value in [name for mode in AutoresetMode for name in (mode, mode.value)],
                       '"SameStep", "NextStep" or "Disabled"'),
    "copy": (lambda value: isinstance(value, bool), "True or False"),
}  # fmt: skip


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError of one line for the first invalid one of the arguments named in ARGUMENTS."""
    for name, (is_valid, expected) in ARGUMENTS.items():
        if name in arguments:
            check_value(is_valid(arguments[name]), name, arguments[name], expected)


def check_options(options: Mapping[str, Any], num_envs: int, max_tilt: float) -> dict[str, np.ndarray]:
    """The options of a reset, as arrays (num_envs, ...). Raises a ValueError of one line for an invalid one.

    Each is given once for all environments or for each of them. `max_tilt` is in degrees.
    """
    limit = TERRAIN_EXTENT - TERRAIN_MARGIN
    known = {
        "position": ((2,), f"x and y from {-limit:g} to {limit:g} m", lambda xy: np.abs(xy).max() <= limit),
        "heading": ((), "an angle in rad", lambda angle: True),
        "tilt": ((2,), "angles about x and y in rad, less than max_tilt",
                 lambda xy: np.sin(np.linalg.norm(xy, axis=-1).max() / 2) < np.sin(np.radians(max_tilt) / 2)),
        "velocity": ((2,), "x and y in m/s", lambda xy: True),
    }  # fmt: skip
    checked = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"reset() has no option {name!r}: there are {', '.join(known)}")
        shape, expected, is_valid = known[name]
        try:
            array = np.asarray(value, float)
        except (TypeError, ValueError):
            array = np.array(np.nan)
        valid = array.shape in (shape, (num_envs, *shape)) and np.isfinite(array).all() and is_valid(array)
        shapes = f"{shape}" + f" or {(num_envs, *shape)}" * (num_envs > 1)
        check_value(valid, name, value, f"{expected}, of shape {shapes}")
        checked[name] = np.broadcast_to(array, (num_envs, *shape))
    return checked
