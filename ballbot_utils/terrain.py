"""Terrain: the kinds of ground, and what can be asked of it.

To add a kind, write a function of a seed that returns its heights, and add it to TERRAINS.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TERRAIN_EXTENT = 20.0  # m, half the side of the square terrain
TERRAIN_NODES = 1169  # per side
CELL = 2 * TERRAIN_EXTENT / (TERRAIN_NODES - 1)  # m, side of a cell: 10/292
TERRAIN_MARGIN = 1.0  # m, episodes are truncated this close to the terrain's edge


@functools.lru_cache(maxsize=2)
def perlin_terrain(seed: int) -> np.ndarray:
    """Hills of gradient noise: float32 (TERRAIN_NODES, TERRAIN_NODES), from 0 to 1. Rows run along y, columns along x.

    Perlin's noise ("Improving Noise", SIGGRAPH 2002) with 4 octaves, persistence 0.2, lacunarity 2 and a base
    wavelength of 25 cells, scaled to [0, 1] and cubed. The cube gives flat valleys between hills. At amplitude 0.1 m
    the slopes have median 0.05, 90th percentile 0.12 and 99th 0.19. The simplex-noise terrain of arXiv 2505.18417 has
    0.05, 0.13 and 0.20.
    """
    rng = np.random.default_rng(seed)
    noise = np.zeros((TERRAIN_NODES, TERRAIN_NODES))
    for octave in range(4):
        x = np.arange(TERRAIN_NODES) * (2.0**octave / 25)
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


# Kind to a function from a seed to heights from 0 to 1, float32 (TERRAIN_NODES, TERRAIN_NODES); None is a plane
TERRAINS: dict[str, Callable[[int], np.ndarray] | None] = {"perlin": perlin_terrain, "flat": None}


@dataclass(frozen=True)
class Terrain:
    """A square of ground around the origin: its kind (see TERRAINS), seed, and height from lowest to highest, m."""

    kind: str = "perlin"
    seed: int = 0
    amplitude: float = 0.1

    @property
    def is_plane(self) -> bool:
        return TERRAINS[self.kind] is None

    @functools.cached_property
    def unit_heights(self) -> np.ndarray | None:
        """Heights from 0 to 1, float32 (TERRAIN_NODES, TERRAIN_NODES), rows along y; None on a plane."""
        return None if self.is_plane else TERRAINS[self.kind](self.seed)

    @functools.cached_property
    def heights(self) -> np.ndarray | None:
        """Heights in m, float32 (TERRAIN_NODES, TERRAIN_NODES), rows along y; None on a plane at z = 0."""
        return None if self.is_plane else self.unit_heights * np.float32(self.amplitude)

    def max_height(self, x: float, y: float, radius: float) -> float:
        """The highest node, m, in the square of half side `radius`, m, and one cell more, around (x, y), m."""
        if self.is_plane:
            return 0.0
        reach = radius + CELL
        row, col = (slice(int((c + TERRAIN_EXTENT - reach) / CELL) + 1, int((c + TERRAIN_EXTENT + reach) / CELL) + 1)
                    for c in (y, x))  # fmt: skip
        return float(self.heights[row, col].max())

    def slopes(self, places: np.ndarray, reach: float, scale: np.ndarray | float = 1) -> np.ndarray:
        """Slopes (..., 2) along x and y at `places` (..., 2), m, between the nodes `reach`, m, to either side.

        `scale`: a factor on the heights, to be broadcast with (..., 1).
        """
        if self.is_plane:
            return np.zeros(places.shape)
        around = places[..., None, :] + reach * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # (..., 4, 2)
        nodes = (around + TERRAIN_EXTENT) * ((TERRAIN_NODES - 1) / (2 * TERRAIN_EXTENT)) + 0.5
        col, row = np.moveaxis(np.clip(nodes, 0, TERRAIN_NODES - 1).astype(int), -1, 0)
        heights = self.heights[row, col] * scale
        return (heights[..., :2] - heights[..., 2:]) / (2 * reach)
