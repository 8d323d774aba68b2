"""Rotations: quaternions (w first), rotation vectors, and the robot's own frame. All arrays have a leading axis n."""

import numpy as np


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrices (n, 3, 3) of unit quaternions (n, 4)."""
    products = 2 * quaternion[:, :, None] * quaternion[:, None]  # (n, 4, 4)
    _, wx, wy, wz, _, xx, xy, xz, _, _, yy, yz, _, _, _, zz = products.reshape(-1, 16).T.copy()
    matrix = np.empty((3, 3, len(quaternion)))
    matrix[0] = 1 - yy - zz, xy - wz, xz + wy
    matrix[1] = xy + wz, 1 - xx - zz, yz - wx
    matrix[2] = xz - wy, yz + wx, 1 - xx - yy
    return matrix.transpose(2, 0, 1)


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vectors (n, 3), axis times angle in rad, of unit quaternions (n, 4). Angles are from 0 to π."""
    w, x, y, z = quaternion.T.copy()
    sine = np.sqrt(x * x + y * y + z * z)
    half_angle = np.arctan2(np.copysign(sine, w), np.abs(w))
    return quaternion[:, 1:] * (2 * half_angle / np.maximum(sine, 1e-9))[:, None]


def heading_then_tilt(heading: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Quaternions (n, 4) of a turn by `heading` (n,) about z, then by the rotation vector `tilt` (n, 2), rad."""
    angle = np.linalg.norm(tilt, axis=1)
    w, (x, y) = np.cos(angle / 2), tilt.T * np.sinc(angle / (2 * np.pi)) / 2
    cos, sin = np.cos(heading / 2), np.sin(heading / 2)
    return np.stack([w * cos, x * cos + y * sin, y * cos - x * sin, w * sin], 1)


def in_body_frame(orientation: np.ndarray, vel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lean, heading and velocity of robots with rotation vectors (n, 3), rad, and velocities (n, 3) in the world.

    Lean (n, 2) is x and y of the world's upward direction in the robot's frame. Heading (n, 1) is in rad, from -π to π;
    0 faces +y. The velocity (n, 3) is in the robot's frame, in the unit of `vel`.
    """
    angle = np.linalg.norm(orientation, axis=1, keepdims=True)
    quaternion = np.concatenate([np.cos(angle / 2), orientation * np.sinc(angle / (2 * np.pi)) / 2], 1)
    rotation = rotation_matrix(quaternion)  # columns: the robot's axes in the world
    heading = np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
    return rotation[:, 2, :2], heading[:, None], (rotation * vel[:, :, None]).sum(1)
