"""Planar depth images of the robot's cameras, computed with torch, without OpenGL."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
import torch
import torch.nn.functional as F

from ballbot_utils.geometry import rotation_matrix
from ballbot_utils.model import BASE_OVER_BALL, CAMERAS
from ballbot_utils.terrain import TERRAIN_EXTENT

MAX_DEPTH = 1.0  # m
STEEPEST_BLOCK = 16  # cells


@contextlib.contextmanager
def single_torch_thread() -> Iterator[None]:
    """A block in which PyTorch uses only the calling thread.

    PyTorch's own threads are slow on busy cores, and a forked process waits for them for ever.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread, and for the renderer's, which first use PyTorch here
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DepthRenderer:
    """Planar depth of all CAMERAS for any number of robots.

    The ray of each pixel is followed to its first crossing of the height field, which is bilinear between its nodes.
    A ray's direction has unit component along the optical axis. A point's parameter t is therefore its planar depth, m.

    A 16 times smaller image is traced first, in steps so short that no terrain of a bounded slope is missed (sphere
    tracing, Hart, 1996), and one Newton step. Its inverse depths are interpolated to the full size, as they are linear
    in the image of a plane, and refined by one Newton step. Where the terrain is steep, a pixel that this step moves by
    more than `tolerance` is near a silhouette. These pixels are traced one by one.

    The robot's own parts move by less than a millimetre in the base's frame. They are one constant depth map per
    camera, and the nearer of terrain and robot is visible.
    """

    coarse_steps, pixel_steps = 4, 20  # of tracing, for the small image and for single pixels
    tolerance = 0.02  # m
    min_clearance = 0.002  # m: a step of tracing is at least as long as at this height, and may miss a grazed edge
    gentle = 0.45  # slope up to which the small image shows nearly every hill
    chunk = 32  # robots rendered at a time: their images fit in a CPU core's cache

    def __init__(
        self,
        model: mujoco.MjModel,
        size: int,
        heights: np.ndarray | None = None,
        device: str | torch.device = "cpu",
        num_threads: int = 1,
        precise: bool = False,
    ) -> None:
        """Images of `size` by `size` pixels. `heights`: float32 (nodes, nodes), m, or None for the plane z = 0.

        `precise` finds edges and grazed ground more exactly, which takes twice as long. Perlin hills do without.
        """
        if precise:
            self.pixel_steps, self.tolerance, self.min_clearance, self.gentle = 40, 0.005, 0.0, 0.1
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
        cameras = [model.camera(name).id for name in CAMERAS]
        # Columns of `axes`: right, up and forward of each camera, in the base's frame
        axes = np.stack([rotation.T @ data.cam_xmat[c].reshape(3, 3) for c in cameras])
        axes[:, :, 2] *= -1  # MuJoCo's cameras look along -z
        self.axes = axes  # (cameras, 3, 3)
        self.offsets = np.stack([rotation.T @ (data.cam_xpos[c] - position) for c in cameras])  # (cameras, 3)
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
        self.self_depth = self_depth.to(device)  # (cameras, size, size)

    @staticmethod
    def _settle(model, data):
        """Place the robot upright on its ball, so high above the ground that the cameras see only the robot."""
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
        """Directions along x, y and z, (images, side, side) each, of the rays through the pixels of images.

        `pixels` are their coordinates along a side: 0 is the middle, ±1 the edges.
        """
        right, up, forward = axes[:, :, 0, None], axes[:, :, 1, None], axes[:, :, 2, None]
        across = (right * pixels)[:, :, None]  # (images, 3, 1, side)
        down = (forward - up * pixels)[:, :, :, None]  # (images, 3, side, 1)
        return [down[:, k] + across[:, k] for k in range(3)]

    def lookup(self, grid):
        """Bilinear heights (n, h, w) at grid (2, n, h, w), x and y in units of TERRAIN_EXTENT."""
        _, n, h, w = grid.shape
        points = grid.view(2, n, h * w).permute(1, 2, 0)[:, None]  # the layout in which grid_sample is fastest
        heights = self.heights.expand(n, 1, -1, -1)
        return F.grid_sample(heights, points, padding_mode="border", align_corners=True).view(n, h, w)

    def _clearance(self, origin, direction, height_scale, t):
        """Heights in m over the terrain of the rays' points at depths t (n, h, w); negative below it."""
        grid = t.new_empty(2, *t.shape)
        for k in (0, 1):
            torch.addcmul(origin[k], direction[k], t, out=grid[k])
        height = self.lookup(grid)
        if height_scale is not None:
            height *= height_scale
        return torch.addcmul(origin[2], direction[2], t).sub_(height)

    def _first_crossing(self, origin, direction, height_scale, steepest, steps):
        """Depths (n, h, w), m, at which rays first meet the terrain, and 1 / their loss of clearance per depth there.

        `origin` and `direction` are x, y and z. `steepest` is the terrain's largest slope.
        """
        x, y, z = direction
        loss = torch.hypot(x, y).mul_(TERRAIN_EXTENT * steepest).sub_(z).clamp_(min=0.05)  # of clearance, at most
        bound, t, probe = loss.reciprocal_(), torch.zeros_like(z), 0.02
        for _ in range(steps):
            clearance = self._clearance(origin, direction, height_scale, t).clamp_(min=self.min_clearance)
            t = torch.addcmul(t, clearance, bound)
        t.clamp_(max=1.2 * MAX_DEPTH)
        clearance = self._clearance(origin, direction, height_scale, t)
        loss = (clearance - self._clearance(origin, direction, height_scale, t + probe)) / probe
        inverse = loss.clamp_(min=0.05).reciprocal_()
        return torch.addcmul(t, clearance, inverse), inverse

    def render(
        self, position: np.ndarray, quaternion: np.ndarray, height_scale: np.ndarray | None = None
    ) -> torch.Tensor:
        """Depth frames, m, float32 (n, cameras, size, size), of bases at `position` (n, 3), m, `quaternion` (n, 4).

        `height_scale` (n,): a factor on the terrain's heights for each robot.
        """

        def render_part(part):
            return self._render(position[part], quaternion[part], None if height_scale is None else height_scale[part])

        with single_torch_thread():
            if self.device.type != "cpu" or len(position) <= self.chunk:
                return render_part(slice(None))
            parts = [slice(i, i + self.chunk) for i in range(0, len(position), self.chunk)]
            run = map if self._pool is None else self._pool.map
            return torch.cat(list(run(render_part, parts)))

    @torch.no_grad()
    def _render(self, position, quaternion, height_scale):
        n, size, cameras = len(position), self.size, len(CAMERAS)
        rotation = rotation_matrix(quaternion)[:, None]  # (n, 1, 3, 3)
        # Sums of products by hand, as a matrix product's rounding may depend on the batch size
        axes = sum(rotation[..., :, k, None] * self.axes[None, :, None, k, :] for k in range(3))  # (n, cameras, 3, 3)
        origin = position[:, None] + sum(rotation[..., k] * self.offsets[:, None, k] for k in range(3))
        # x and y in units of TERRAIN_EXTENT
        axes[:, :, :2] *= 1 / TERRAIN_EXTENT
        origin[:, :, :2] *= 1 / TERRAIN_EXTENT
        axes = torch.from_numpy(axes.reshape(-1, 3, 3).astype(np.float32)).to(self.device)
        origin = torch.from_numpy(origin.reshape(-1, 3).astype(np.float32).T.copy()).to(self.device)
        origin = origin.view(3, cameras * n, 1, 1).unbind()
        direction = self._rays(axes, self._pixels)
        if self.heights is None:
            depth = -origin[2] / direction[2].clamp_(max=-1e-3)
        else:
            steepest = self._steepest(position[:, :2]) * (1 if height_scale is None else height_scale)
            steep = (steepest > self.gentle).any()
            steepest = torch.from_numpy(steepest.astype(np.float32)).to(self.device)
            steepest = steepest.repeat_interleave(cameras).view(-1, 1, 1)
            if height_scale is not None:
                height_scale = torch.from_numpy(height_scale.astype(np.float32)).to(self.device)
                height_scale = height_scale.repeat_interleave(cameras).view(-1, 1, 1)
            depth = self._terrain_depth(axes, origin, direction, height_scale, steepest, steep)
        depth = depth.clamp_(min=0).view(n, cameras, size, size)
        return torch.minimum(depth, self.self_depth, out=depth)

    def _terrain_depth(self, axes, origin, direction, height_scale, steepest, steep):
        """Depths (images, size, size) of the terrain alone. `steep`: whether any of it is."""
        rays = origin, self._rays(axes, self.coarse_pixels), height_scale, steepest
        depth, inverse = self._first_crossing(*rays, self.coarse_steps)
        depth = self._enlarge(depth.clamp_(0.05, 1.2 * MAX_DEPTH).reciprocal_())
        depth = depth.clamp_(min=1 / (1.2 * MAX_DEPTH)).reciprocal_()
        change = self._clearance(origin, direction, height_scale, depth).mul_(self._enlarge(inverse))
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
            height_scale, steepest = (x if x is None else x.view(-1)[images] for x in (height_scale, steepest))
            crossings, _ = self._first_crossing(origin, direction, height_scale, steepest, self.pixel_steps)
            depth.view(-1)[pixels] = crossings.view(-1)
        return depth

    def _enlarge(self, image):
        """Small images interpolated to full size: (images, size // 4, size // 4) to (images, size, size)."""
        return self._interpolation @ image @ self._interpolation.T


def steepest_blocks(heights: np.ndarray) -> np.ndarray:
    """The terrain's largest slope within at least 1.1 m of each block of STEEPEST_BLOCK by STEEPEST_BLOCK cells."""
    cell = 2 * TERRAIN_EXTENT / (len(heights) - 1)
    slopes = np.hypot(np.diff(heights, axis=0)[:, 1:], np.diff(heights, axis=1)[1:]) / cell
    slopes = torch.from_numpy(slopes)[None, None]
    return F.max_pool2d(F.max_pool2d(slopes, STEEPEST_BLOCK), 5, 1, 2)[0, 0].numpy()


def steepest_nearby(heights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from places (n, 2), m, to the terrain's largest slope (n,) within at least 1.1 m along x and y."""
    blocks, side = steepest_blocks(heights), 2 * TERRAIN_EXTENT / (len(heights) - 1) * STEEPEST_BLOCK

    def steepest(places):
        column, row = ((places + TERRAIN_EXTENT) / side).astype(int).clip(0, len(blocks) - 1).T
        return blocks[row, column]

    return steepest
