"""Pictures of the robot by MuJoCo's OpenGL renderer. OpenGL is needed when a SceneRenderer is made, not before."""

from collections.abc import Iterable

import mujoco
import numpy as np
import torch
import torch.nn.functional as F

from ballbot_utils.model import load_spec
from ballbot_utils.terrain import CELL, TERRAIN_EXTENT, TERRAIN_NODES, Terrain

PICTURE_STEPS = 20  # physics steps between pictures of an environment: 25 pictures a second


def make_scene(places: np.ndarray, terrain: Terrain) -> mujoco.MjModel:
    """An MjModel for pictures, with only the part of the terrain that the camera sees from `places` (n, 2), m.

    The whole terrain would take a second a picture without a GPU. The texture shows the heights: green valleys, sandy
    hills, and the shading of a low sun.
    """
    spec = load_spec()
    spec.visual.map.fogstart, spec.visual.map.fogend = 4, 8
    spec.visual.rgba.fog = [0.8, 0.88, 0.95, 1]  # as the sky at the horizon
    spec.visual.quality.shadowsize = 2048  # faster
    spec.visual.map.shadowclip = 0.6  # and yet as sharp
    model = spec.compile()
    if terrain.is_plane:
        return model
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    right, _, back = data.camera("track").xmat.reshape(3, 3).T[:, :2]
    corners = np.array([(2, 2), (-2, -2), 5 * right - 8 * back, -5 * right - 8 * back])  # of what is in view
    low, high = np.min(places, 0) + corners.min(0), np.max(places, 0) + corners.max(0)
    stride = 2  # every other node is enough to see
    low, high = (np.clip((c + TERRAIN_EXTENT) / CELL, 0, TERRAIN_NODES - 1).astype(int) for c in (low, high))
    heights = terrain.unit_heights[low[1] : high[1] + 1 : stride, low[0] : high[0] + 1 : stride]
    bottom, span = heights.min(), max(np.ptp(heights), 1e-6)  # it may be level here
    rows, cols = heights.shape
    half = np.array([cols - 1, rows - 1]) * stride * CELL / 2
    middle = low * CELL - TERRAIN_EXTENT + half
    spec.add_hfield(name="terrain", nrow=rows, ncol=cols, size=[*half, terrain.relief * span, 0.1],
                    userdata=((heights - bottom) / span).ravel())  # fmt: skip
    ground = spec.geom("ground")
    ground.type, ground.hfieldname = mujoco.mjtGeom.mjGEOM_HFIELD, "terrain"
    ground.pos = [*middle, terrain.relief * bottom]

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
    slope_y, slope_x = np.gradient(terrain.relief * height, 2 * half[1] / (pixels - 1), 2 * half[0] / (pixels - 1))
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


class SceneRenderer:
    """Pictures of one robot, with arrows."""

    def __init__(self, height: int, width: int, places: np.ndarray, terrain: Terrain, samples: int = 4) -> None:
        """Pictures of `height` by `width` pixels of a robot that stays within `places` (n, 2), m.

        `samples` smooth a pixel. Without a GPU 0 take 0.08 s a picture, 4 take 0.2 s. Raises RuntimeError without
        OpenGL.
        """
        self._model = make_scene(places, terrain)
        self._model.vis.quality.offsamples = samples
        self._data = mujoco.MjData(self._model)
        try:
            self._renderer = mujoco.Renderer(self._model, height, width)
        except Exception as error:  # whatever the platform's OpenGL raises
            raise RuntimeError(
                "pictures need OpenGL, training does not: without a display install a renderer (Debian: apt-get "
                "install libosmesa6) and set MUJOCO_GL=osmesa, or MUJOCO_GL=egl on a GPU"
            ) from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_FOG] = True
        self.terrain, self._low, self._high = terrain, np.min(places, 0), np.max(places, 0)
        if terrain.is_plane:
            self._low, self._high = -np.inf, np.inf

    def contains(self, place: np.ndarray) -> bool:
        """Whether the terrain around `place` (2,), m, is in the scene."""
        return bool(((self._low <= place) & (place <= self._high)).all())

    def render(self, qpos: np.ndarray, arrows: list[tuple]) -> np.ndarray:
        """The RGB picture, uint8 (height, width, 3), of the robot at `qpos` (nq,), with `arrows` of `make_arrows`."""
        self._data.qpos[:] = qpos
        mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera="track")
        scene = self._renderer.scene
        for geom in scene.geoms[: scene.ngeom]:
            if geom.category == mujoco.mjtCatBit.mjCAT_STATIC:  # the ground, whose shadows on itself are ragged:
                geom.category = mujoco.mjtCatBit.mjCAT_DECOR  # decoration casts no shadow
        draw_arrows(scene, arrows)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()


def make_arrows(position: np.ndarray, goal: np.ndarray, velocity: np.ndarray, force: np.ndarray) -> list[tuple]:
    """Arrows, (start, end, colour), for a base at `position` (3,), m.

    Green for `goal` (2,), 0.5 m long for 1 m/s or a unit vector; white for `velocity` (3,), m/s, to the same scale; red
    for a `force` (3,), N.
    """
    above, higher, rim = (np.add(position, [0, 0, z]) for z in (0.36, 0.4, 0.32))
    arrows = [
        (above, above + np.append(goal, 0) / 2, (0.1, 0.75, 0.2, 1)),
        (higher, higher + np.divide(velocity, 2), (1, 1, 1, 1)),
    ]
    strength = np.linalg.norm(force)
    if strength > 0:
        direction, length = np.divide(force, strength), 0.2 + min(strength, 100) / 200
        end = rim - 0.12 * direction  # on the tower, which hides no arrow here
        arrows.append((end - length * direction, end, (0.9, 0.1, 0.1, 1)))
    return arrows


def draw_arrows(scene: mujoco.MjvScene, arrows: list[tuple]) -> None:
    """Add `arrows` of `make_arrows` to a scene."""
    kind = mujoco.mjtGeom.mjGEOM_ARROW
    for start, end, colour in arrows:
        if scene.ngeom < scene.maxgeom and np.linalg.norm(np.subtract(end, start)) > 0.01:
            geom = scene.geoms[scene.ngeom]
            mujoco.mjv_initGeom(geom, kind, np.zeros(3), np.zeros(3), np.zeros(9), np.array(colour, np.float32))
            mujoco.mjv_connector(geom, kind, 0.012, start, end)
            geom.size[2] *= 2  # an arrow would else be half as long
            geom.category = mujoco.mjtCatBit.mjCAT_DECOR  # casts no shadow
            scene.ngeom += 1


class PictureCache:
    """Pictures of many robots, 480 by 640 pixels, each rendered again only after PICTURE_STEPS physics steps."""

    def __init__(self, num_envs: int) -> None:
        self._renderers = [None] * num_envs
        self._pictures = [(None, None)] * num_envs  # when each was rendered, and the picture

    def forget(self, ids: Iterable[int]) -> None:
        """Render the robots `ids` again next time."""
        for i in ids:
            self._pictures[i] = None, None

    def get(self, i: int, step: int, qpos: np.ndarray, place: np.ndarray, terrain: Terrain, arrows: list[tuple]):
        """The picture, read-only uint8 (480, 640, 3), of robot i at `place` (2,), m, in physics step `step`."""
        due, picture = self._pictures[i]
        if due == step // PICTURE_STEPS:
            return picture
        renderer = self._renderers[i]
        if renderer is None or renderer.terrain != terrain or not renderer.contains(place):
            if renderer is not None:
                renderer.close()
            renderer = self._renderers[i] = SceneRenderer(480, 640, np.array([place - 2, place + 2]), terrain, 0)
        picture = renderer.render(qpos, arrows)
        picture.flags.writeable = False
        self._pictures[i] = step // PICTURE_STEPS, picture
        return picture

    def close(self) -> None:
        for renderer in filter(None, self._renderers):
            renderer.close()
        self._renderers = [None] * len(self._renderers)
