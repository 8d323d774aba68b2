"""Rotations: quaternions (w first), rotation vectors, and the robot's own frame. All arrays have a leading axis n.

Functions of `Array` take NumPy arrays, or torch tensors on any device, and return the same kind.
"""

from types import ModuleType

import numpy as np
import torch

from ballbot_utils.state import copy_array

Array = np.ndarray | torch.Tensor


def namespace(array: Array) -> ModuleType:
    """The module with the functions for an array: `torch` or `numpy`."""
    return torch if torch.is_tensor(array) else np


def rotation_matrix(quaternion: Array) -> Array:
    """Rotation matrices (n, 3, 3) of unit quaternions (n, 4). Arrays are float64, tensors have the input's type."""
    products = 2 * quaternion[:, :, None] * quaternion[:, None]  # (n, 4, 4)
    _, wx, wy, wz, _, xx, xy, xz, _, _, yy, yz, _, _, _, zz = copy_array(products.reshape(-1, 16).T)
    entries = (
        1 - yy - zz, xy - wz, xz + wy,
        xy + wz, 1 - xx - zz, yz - wx,
        xz - wy, yz + wx, 1 - xx - yy,
    )  # fmt: skip
    stacked = torch.stack(entries) if torch.is_tensor(quaternion) else np.stack(entries, dtype=np.float64)
    return stacked.T.reshape(-1, 3, 3)


def rotation_vector(quaternion: Array) -> Array:
    """Rotation vectors (n, 3), axis times angle in rad, of unit quaternions (n, 4). Angles are from 0 to π."""
    xp = namespace(quaternion)
    w, x, y, z = copy_array(quaternion.T)
    sine = xp.sqrt(x * x + y * y + z * z)
    half_angle = xp.arctan2(xp.copysign(sine, w), xp.abs(w))
    return quaternion[:, 1:] * (2 * half_angle / sine.clip(1e-9))[:, None]


def heading_then_tilt(heading: Array, tilt: Array) -> Array:
    """Quaternions (n, 4) of a turn by `heading` (n,) about z, then by the rotation vector `tilt` (n, 2), rad."""
    xp = namespace(heading)
    angle = xp.linalg.norm(tilt, axis=1)
    w, (x, y) = xp.cos(angle / 2), tilt.T * xp.sinc(angle / (2 * np.pi)) / 2
    cos, sin = xp.cos(heading / 2), xp.sin(heading / 2)
    return xp.stack([w * cos, x * cos + y * sin, y * cos - x * sin, w * sin], 1)


def in_body_frame(orientation: Array, vel: Array) -> tuple[Array, Array, Array]:
    """Lean, heading and velocity of robots with rotation vectors (n, 3), rad, and velocities (n, 3) in the world.

    Lean (n, 2) is x and y of the world's upward direction in the robot's frame. Heading (n, 1) is in rad, from -π to π;
    0 faces +y. The velocity (n, 3) is in the robot's frame, in the unit of `vel`.
    """
    xp = namespace(orientation)
    angle = xp.linalg.norm(orientation, axis=1, keepdims=True)
    quaternion = xp.concatenate([xp.cos(angle / 2), orientation * xp.sinc(angle / (2 * np.pi)) / 2], 1)
    rotation = rotation_matrix(quaternion)  # columns: the robot's axes in the world
    heading = xp.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
    return rotation[:, 2, :2], heading[:, None], (rotation * vel[:, :, None]).sum(1)
