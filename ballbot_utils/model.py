"""The robot's MuJoCo model, from assets/ballbot.xml, on a terrain."""

import math
from collections.abc import Sequence
from pathlib import Path

import mujoco

from ballbot_utils.terrain import TERRAIN_EXTENT, TERRAIN_NODES, Terrain

ASSETS = Path(__file__).resolve().parent / "assets"  # where a wheel has them
if not ASSETS.is_dir():
    ASSETS = Path(__file__).resolve().parents[1] / "assets"

TIMESTEP = 0.002  # s, of a physics step
MAX_TORQUE = 10.0  # N·m at |action| = 1
BALL_RADIUS = 0.09  # m
BASE_OVER_BALL = 0.1313  # m, base origin above the ball's centre when the robot rests upright on it
BASE_START = 0.24  # m, base origin above the ground at the start
BALL_START = 0.12  # m, ball centre above the ground at the start
CAMERAS = ("depth_0", "depth_1")  # depth cameras of the model, right and left: also the keys of their observations


def load_spec() -> mujoco.MjSpec:
    """The MjSpec of assets/ballbot.xml, on a plane. Raises FileNotFoundError without the file."""
    path = ASSETS / "ballbot.xml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: ballbot_env.py needs the folder assets/")
    return mujoco.MjSpec.from_file(str(path))


def make_model(
    terrain: Terrain | None = None,
    wheel_damping: float = 0.4,
    height_scales: Sequence[float] = (1.0,),
    camera_pitch: float = 0.0,
) -> mujoco.MjModel:
    """The robot's MjModel on a terrain, by default the plane.

    `wheel_damping` is in N·m·s/rad. The cameras are turned up by `camera_pitch`, degrees. There is one height field for
    each of `height_scales`, factors on the terrain's heights. The ground is the one whose factor is nearest to 1.
    """
    spec = load_spec()
    for i in range(3):
        spec.joint(f"wheel_{i}").damping = [wheel_damping, 0, 0]
    half = math.radians(camera_pitch) / 2
    for name in CAMERAS:
        spec.camera(name).quat = math.cos(half), math.sin(half), 0, 0  # about the camera's own x, which points right
    if terrain is not None and not terrain.is_plane:
        for k, scale in enumerate(height_scales):
            extent = [TERRAIN_EXTENT, TERRAIN_EXTENT, terrain.relief * scale, 0.1]
            spec.add_hfield(name=f"terrain_{k}", nrow=TERRAIN_NODES, ncol=TERRAIN_NODES,
                            size=extent, userdata=terrain.unit_heights.ravel())  # fmt: skip
        ground = spec.geom("ground")
        ground.type = mujoco.mjtGeom.mjGEOM_HFIELD
        ground.hfieldname = f"terrain_{min(range(len(height_scales)), key=lambda k: abs(height_scales[k] - 1))}"
        # The ball touches several cells at once. With so many contacts sparse is a fifth faster, with the same result.
        spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    return spec.compile()
