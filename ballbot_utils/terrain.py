"""Terrain: the kinds of ground, and what can be asked of it.

One string says which ground: a kind, `ramp`, and after a colon its arguments, `ramp:angle=15,length=3`. It has no
spaces, brackets or quotes, so that a command line takes it as it is. It may also name a user's file:
`my_terrain.py:canyon`, `heights.png` or `heights.npy` (see `user_files`). From Python a function or an array does too.

To add a kind, write a function of x and y that returns heights, and add it to TERRAINS. x and y are arrays (nodes,
nodes), m, and so are the heights; their lowest point becomes 0 m. The function's other parameters are the kind's
arguments, in m or degrees, with defaults; one named `rng` gets a generator seeded by `terrain_seed`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ballbot_utils.checks import check_value, is_number
from ballbot_utils.user_files import find_file, load_function, pin

TERRAIN_EXTENT = 20.0  # m, half the side of the square terrain
TERRAIN_NODES = 1169  # per side
CELL = 2 * TERRAIN_EXTENT / (TERRAIN_NODES - 1)  # m, side of a cell: 10/292
TERRAIN_MARGIN = 1.0  # m, episodes are truncated this close to the terrain's edge
MAX_HEIGHT = 100.0  # m
START_SLOPE = 0.15  # largest slope under the ball at the start, where the terrain has such places
START_REACH = 4  # cells around a start that must not be steeper: a little more than the ball's radius


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


# Kinds. One cell, 3.4 cm, is the shortest length: the face of a step of height h has the slope h / CELL.


def up_and_down(y: np.ndarray, length: float, landing: float) -> np.ndarray:
    """A coordinate that goes from 0 to `length` and back again along y, with `landing` m of rest at both ends."""
    y = np.mod(y, 2 * (length + landing))
    return np.clip(y, 0, length) - np.clip(y - length - landing, 0, length)


def ramp_terrain(x, y, angle=10.0, length=2.0, landing=2.0):
    """Ramps of `angle`°, `length` m long on the map, up and down along y, with landings between them."""
    return np.tan(np.radians(angle)) * up_and_down(y, length, landing)


def steps_terrain(x, y, height=0.01, depth=1.0):
    """Single steps across y, up and down by turns, `depth` m apart."""
    return height * np.mod(np.floor(y / depth), 2)


def stairs_terrain(x, y, height=0.01, depth=0.4, count=5, landing=2.0):
    """Flights of `count` steps, up and down along y, with landings between them."""
    return height * np.round(up_and_down(y, count * depth, landing) / depth)


def waves_terrain(x, y, height=0.1, length=3.0):
    """Sine waves across y, `height` m from trough to crest. Largest slope: pi height / length."""
    return height / 2 * (1 - np.cos(2 * np.pi * y / length))


def ridges_terrain(x, y, height=0.05, angle=10.0, spacing=2.0):
    """Sharp ridges across y, like roofs: `height` m high with flanks of `angle`°, `spacing` m from crest to crest."""
    distance = np.abs(np.mod(y, spacing) - spacing / 2)
    return np.maximum(height - np.tan(np.radians(angle)) * distance, 0)


def bumps(x, y, rng, width, spacing):
    """Round bumps of height 1 and diameter `width`, one at a random place in each square of side `spacing`."""
    check_value(width <= spacing, "width", width, f"at most the spacing, {spacing:g} m")
    centres = (width + (spacing - width) * 2 * rng.random((2, *[int(2 * TERRAIN_EXTENT / spacing) + 2] * 2))) / 2
    col, row = (np.floor((c + TERRAIN_EXTENT) / spacing).astype(int) for c in (x, y))
    along, across = (np.mod(c + TERRAIN_EXTENT, spacing) - centre[row, col] for c, centre in zip((x, y), centres))
    return (1 + np.cos(np.pi * np.minimum(2 * np.hypot(along, across) / width, 1))) / 2


def hills_terrain(x, y, rng, height=0.2, width=4.0, spacing=5.0):
    """Round hills at random places, one per square of side `spacing`. Largest slope: pi/2 height / (width / 2)."""
    return height * bumps(x, y, rng, width, spacing)


def potholes_terrain(x, y, rng, depth=0.02, width=0.4, spacing=1.0):
    """Round holes at random places, one per square of side `spacing`. Largest slope: pi/2 depth / (width / 2)."""
    return -depth * bumps(x, y, rng, width, spacing)


def bowl_terrain(x, y, depth=0.2, width=6.0, spacing=8.0):
    """Bowls in a grid, parabolic: they are steepest at the rim, with a slope of 4 depth / width."""
    check_value(width <= spacing, "width", width, f"at most the spacing, {spacing:g} m")
    radius = np.hypot(*(np.mod(c + spacing / 2, spacing) - spacing / 2 for c in (x, y)))
    return depth * np.minimum(2 * radius / width, 1) ** 2


def spiral_terrain(x, y, height=0.1, spacing=3.0):
    """A round ridge that winds out from the middle, with `spacing` m from one turn to the next."""
    radius, turn = np.hypot(x, y), np.arctan2(y, x) / (2 * np.pi)
    return height / 2 * (1 - np.minimum(radius / spacing, 1) ** 2 * np.cos(2 * np.pi * (radius / spacing - turn)))


def random_grid(x, y, rng, size):
    """Uniform random values in a grid of squares of side `size`, and the grid's coordinates of x and y."""
    n = int(2 * TERRAIN_EXTENT / size) + 2
    return rng.random((n, n)), (y + TERRAIN_EXTENT) / size, (x + TERRAIN_EXTENT) / size


def rough_terrain(x, y, rng, height=0.02, size=0.2):
    """Random heights from 0 to `height` in a grid of points `size` m apart, with straight lines between them."""
    values, row, col = random_grid(x, y, rng, size)
    i, j = row.astype(int), col.astype(int)
    row, col = row - i, col - j
    near, far = (values[i + k, j] * (1 - col) + values[i + k, j + 1] * col for k in (0, 1))
    return height * (near * (1 - row) + far * row)


def blocks_terrain(x, y, rng, height=0.01, size=0.6):
    """Square blocks of side `size`, each with its own level between 0 and `height`."""
    values, row, col = random_grid(x, y, rng, size)
    return height * values[row.astype(int), col.astype(int)]


MIXED_KINDS = ("flat", "ramp", "steps", "stairs", "waves", "ridges", "hills", "potholes", "spiral", "rough", "blocks")


def mixed_patches(rng, patch):
    """The number in MIXED_KINDS of each patch: (rows, columns). Any 4 rows of 3 patches have all kinds."""
    n = np.arange(int(2 * TERRAIN_EXTENT / patch) + 1)
    return rng.permutation(len(MIXED_KINDS))[(3 * n[:, None] + n) % len(MIXED_KINDS)]


def mixed_terrain(x, y, rng, patch=6.0):
    """Square patches of side `patch`, each of one of MIXED_KINDS, that become level towards their borders."""
    kinds = mixed_patches(rng, patch)[tuple(((c + TERRAIN_EXTENT) / patch).astype(int) for c in (y, x))]
    border = np.ones_like(x)  # from 0 at the border to 1 in the middle half of the patch
    for c in (x, y):
        inside = np.mod(c + TERRAIN_EXTENT, patch)
        share = np.clip(np.minimum(inside, patch - inside) * 4 / patch, 0, 1)
        border *= share**2 * (3 - 2 * share)
    heights = np.zeros_like(x)
    for k, kind in enumerate(MIXED_KINDS):
        if TERRAINS[kind]:
            here = kinds == k
            more = {"rng": rng} if "rng" in inspect.signature(TERRAINS[kind]).parameters else {}
            heights[here] = TERRAINS[kind](x[here], y[here], **more)
            heights[here] -= heights[here].min(initial=0)
    return heights * border


# Kind to its function. A plane has none. Perlin's is of the seed, and its heights are scaled by `terrain_amplitude`
TERRAINS: dict[str, Callable[..., np.ndarray] | None] = {
    "flat": None, "perlin": perlin_terrain, "ramp": ramp_terrain, "steps": steps_terrain, "stairs": stairs_terrain,
    "waves": waves_terrain, "ridges": ridges_terrain, "hills": hills_terrain, "bowl": bowl_terrain,
    "spiral": spiral_terrain, "rough": rough_terrain, "potholes": potholes_terrain, "blocks": blocks_terrain,
    "mixed": mixed_terrain,
}  # fmt: skip


# A user's own terrain


def resample(heights: np.ndarray, name: str = "terrain") -> np.ndarray:
    """Heights of any shape, which cover the terrain, at its nodes: linear in between. Raises ValueError."""
    heights = np.asarray(heights)
    valid = heights.ndim == 2 and min(heights.shape) >= 2 and heights.dtype.kind in "fiu" and np.isfinite(heights).all()
    check_value(valid, name, f"an array of {heights.dtype} {heights.shape}", "finite heights, m, (rows, columns)")
    for axis in (0, 1):
        n = heights.shape[axis]
        if n != TERRAIN_NODES:
            place = np.linspace(0, n - 1, TERRAIN_NODES)
            low = np.minimum(place.astype(int), n - 2)
            share = (place - low)[:, None] if axis == 0 else place - low
            heights = heights.take(low, axis) * (1 - share) + heights.take(low + 1, axis) * share
    return heights


def read_heights(path) -> np.ndarray:
    """The array in an .npy file, or the pixels of a 16-bit PNG, from 0 to 1, its top row last. Raises ValueError."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        from PIL import Image

        with Image.open(path) as image:
            check_value(image.mode.startswith("I;16"), str(path), f"a {image.format} of mode {image.mode}",
                        "a grey PNG of 16 bits")  # fmt: skip
            return np.asarray(image)[::-1] / 65535
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def png_terrain(x, y, path, height=0.1):
    """A grey PNG of 16 bits, from black at 0 m to white at `height`, over the whole terrain. Its top is at +y."""
    return height * resample(read_heights(path), str(path))


def npy_terrain(x, y, path):
    """Heights in m in a file of `numpy.save`. Row 0 is at -y, column 0 at -x."""
    return resample(read_heights(path), str(path))


def find_function(terrain: Any) -> tuple[Callable[..., np.ndarray], dict[str, float]]:
    """The function of x and y that a string, function or array stands for, and the arguments that the string gives.

    Raises ValueError, of one line, for anything else.
    """
    if callable(terrain):
        return terrain, {}
    if isinstance(terrain, np.ndarray):
        return lambda x, y: resample(terrain), {}
    names = f"{', '.join(TERRAINS)}, FILE.py:FUNCTION, FILE.png or FILE.npy"
    check_value(isinstance(terrain, str), "terrain", terrain, names)
    file = find_file(terrain)
    if file:
        path, sha, text = file
        if path.suffix == ".py":
            name, _, text = text.partition(":")
            function = load_function(path, sha, name)
        else:
            function = functools.partial(png_terrain if path.suffix == ".png" else npy_terrain, path=path)
    else:
        kind, _, text = terrain.partition(":")
        check_value(kind in TERRAINS, "terrain", terrain, names)
        function = TERRAINS[kind] if kind != "flat" else lambda x, y: np.zeros_like(x)
    known = [name for name in inspect.signature(function).parameters if name not in ("x", "y", "rng", "seed", "path")]
    arguments = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            arguments[name] = float(value)
        except ValueError:
            arguments[name] = np.nan
        if name not in known:
            raise ValueError(f"terrain {terrain} has no argument {name!r}: there are {', '.join(known) or 'none'}")
        check_value(is_number(arguments[name]), f"terrain {terrain}", part, f"{name}=NUMBER")
        check_bounds(terrain, name, arguments[name])
    return function, arguments


BOUNDS = {"angle": (0.1, 60), "height": (1e-4, 10), "depth": (1e-4, 10), "count": (1, 100)}  # of kinds' arguments


def check_bounds(terrain: str, name: str, value: float) -> None:
    """Raise ValueError if an argument of a kind is out of BOUNDS, or another length not from two cells to 40 m."""
    low, high = BOUNDS.get(name, (2 * CELL, 2 * TERRAIN_EXTENT))
    own, whole = terrain.partition(":")[0] in TERRAINS, " as a whole number" if name == "count" else ""
    valid = low <= value <= high and (not whole or value == int(value))
    check_value(not own or valid, f"terrain {terrain}: {name}", value, f"{low:.3g} to {high:g}{whole}")


def is_plane(terrain: Any) -> bool:
    """Whether a terrain's name is the plane's."""
    return isinstance(terrain, str) and terrain == "flat"


def is_seeded(terrain: Any) -> bool:
    """Whether a valid terrain's name stands for one that `terrain_seed` changes."""
    names = inspect.signature(find_function(terrain)[0]).parameters
    return "rng" in names or "seed" in names


def is_scaled(terrain: Any) -> bool:
    """Whether `terrain_amplitude` sets the height of a terrain of this name."""
    return isinstance(terrain, str) and terrain == "perlin"


@functools.lru_cache(maxsize=4)
def compute_heights(terrain: Any, seed: int) -> tuple[np.ndarray, float]:
    """Heights from 0 to 1, float32 (TERRAIN_NODES, TERRAIN_NODES), and how high 1 is, m. Raises ValueError."""
    function, arguments = find_function(terrain)
    if "rng" in inspect.signature(function).parameters:
        arguments["rng"] = np.random.default_rng(seed)
    side = np.linspace(-TERRAIN_EXTENT, TERRAIN_EXTENT, TERRAIN_NODES)
    name = terrain if isinstance(terrain, str) else getattr(terrain, "__name__", "terrain")
    try:
        heights = np.asarray(function(*np.meshgrid(side, side), **arguments))
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"terrain {name}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    check_value(heights.shape == (TERRAIN_NODES,) * 2 and heights.dtype.kind in "fiu", f"the result of terrain {name}",
                f"{heights.dtype} {heights.shape}", f"heights {(TERRAIN_NODES,) * 2}, as x and y")  # fmt: skip
    low, relief = float(heights.min()), float(np.ptp(heights))
    check_value(1e-6 < relief <= MAX_HEIGHT, f"the height of terrain {name}", relief,
                f'finite heights that differ by up to {MAX_HEIGHT:g} m, or terrain="flat"')  # fmt: skip
    heights = ((heights - low) / relief).astype(np.float32)
    heights.flags.writeable = False  # cached: every environment of this terrain shares it
    return heights, relief


class HeightArray(np.ndarray):
    """An array of heights that can be a key: it equals only itself."""

    __hash__, __eq__ = object.__hash__, object.__eq__


@dataclass(frozen=True)
class Terrain:
    """A square of ground around the origin, from a string, function or array (see the module's docstring).

    `seed` is that of a random kind. `amplitude` is the height of Perlin hills from lowest to highest, m; other kinds
    have their own arguments. `scale` is a factor on all heights.
    """

    kind: Any = "perlin"
    seed: int = 0
    amplitude: float = 0.1
    scale: float = 1.0

    def __post_init__(self):
        if isinstance(self.kind, np.ndarray) and not isinstance(self.kind, HeightArray):
            object.__setattr__(self, "kind", self.kind.copy().view(HeightArray))
        elif isinstance(self.kind, str):
            object.__setattr__(self, "kind", pin(self.kind))
        if self.has_edges:
            compute_heights(self.kind, self.seed)  # raises errors

    @property
    def is_plane(self) -> bool:
        return is_plane(self.kind)

    @property
    def has_edges(self) -> bool:
        """Whether its slope may change suddenly: on all kinds but Perlin hills."""
        return not (self.is_plane or is_scaled(self.kind))

    @functools.cached_property
    def _heights_and_relief(self):
        if is_scaled(self.kind):
            return perlin_terrain(self.seed), self.amplitude * self.scale
        heights, relief = compute_heights(self.kind, self.seed)
        return heights, relief * self.scale

    @property
    def unit_heights(self) -> np.ndarray | None:
        """Heights from 0 to 1, float32 (TERRAIN_NODES, TERRAIN_NODES), rows along y; None on a plane."""
        return None if self.is_plane else self._heights_and_relief[0]

    @property
    def relief(self) -> float:
        """Height from lowest to highest, m."""
        return 0.0 if self.is_plane else self._heights_and_relief[1]

    @functools.cached_property
    def heights(self) -> np.ndarray | None:
        """Heights in m, float32 (TERRAIN_NODES, TERRAIN_NODES), rows along y; None on a plane at z = 0."""
        return None if self.is_plane else self.unit_heights * np.float32(self.relief)

    def max_height(self, x: float, y: float, radius: float) -> float:
        """The highest node, m, in the square of half side `radius`, m, and one cell more, around (x, y), m."""
        if self.is_plane:
            return 0.0
        reach = radius + CELL
        row, col = (slice(int((c + TERRAIN_EXTENT - reach) / CELL) + 1, int((c + TERRAIN_EXTENT + reach) / CELL) + 1)
                    for c in (y, x))  # fmt: skip
        return float(self.heights[row, col].max())

    def heights_at(self, places: np.ndarray) -> np.ndarray:
        """Heights (...), m, of the nodes nearest to `places` (..., 2), m."""
        if self.is_plane:
            return np.zeros(places.shape[:-1])
        nodes = (places + TERRAIN_EXTENT) * ((TERRAIN_NODES - 1) / (2 * TERRAIN_EXTENT)) + 0.5
        col, row = np.moveaxis(np.clip(nodes, 0, TERRAIN_NODES - 1).astype(int), -1, 0)
        return self.heights[row, col]

    def slopes(self, places: np.ndarray, reach: float, scale: np.ndarray | float = 1) -> np.ndarray:
        """Slopes (..., 2) along x and y at `places` (..., 2), m, between the nodes `reach`, m, to either side.

        `scale`: a factor on the heights, to be broadcast with (..., 1).
        """
        around = places[..., None, :] + reach * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # (..., 4, 2)
        heights = self.heights_at(around) * scale
        return (heights[..., :2] - heights[..., 2:]) / (2 * reach)

    @functools.cached_property
    def _patches(self):
        """The kinds of the patches of the terrain "mixed", (rows, columns), and their side, m; None elsewhere."""
        function, arguments = find_function(self.kind)
        if function is not mixed_terrain:
            return None
        patch = arguments.get("patch", inspect.signature(mixed_terrain).parameters["patch"].default)
        return np.array(MIXED_KINDS)[mixed_patches(np.random.default_rng(self.seed), patch)], patch

    def kinds_at(self, places: np.ndarray) -> np.ndarray | None:
        """On the terrain "mixed", the names of the kinds at `places` (n, 2), m: strings (n,). Otherwise None."""
        if self._patches is None:
            return None
        kinds, patch = self._patches
        col, row = ((places + TERRAIN_EXTENT) / patch).astype(int).clip(0, len(kinds) - 1).T
        return kinds[row, col]

    def find_starts(self, low: tuple[float, float], high: tuple[float, float]) -> np.ndarray | None:
        """Nodes (n, 2), m, between the corners `low` and `high`, m, where a robot can start; None if it can anywhere.

        Within START_REACH cells no slope is above START_SLOPE, or this is one of the gentlest tenth of all nodes there.
        On a plane and on Perlin hills robots start anywhere.
        """
        if not self.has_edges:
            return None
        first, last = (((np.array(c) + TERRAIN_EXTENT) / CELL).astype(int) for c in (low, high))
        slopes = torch.from_numpy(cell_slopes(self.heights))[None]
        reach = 2 * START_REACH
        slopes = F.max_pool2d(slopes, reach, 1)[0].numpy()  # of the cells around node (START_REACH, START_REACH) and on
        first, last = np.maximum(first + 1 - START_REACH, 0), last + 1 - START_REACH
        around = slopes[first[1] : last[1], first[0] : last[0]]
        row, col = np.nonzero(around <= max(START_SLOPE, np.quantile(around, 0.1)))
        return (np.stack([col, row], 1) + first + START_REACH) * CELL - TERRAIN_EXTENT


def cell_slopes(heights: np.ndarray) -> np.ndarray:
    """The largest slope in each cell, (nodes - 1, nodes - 1), of heights (nodes, nodes), m, over the terrain."""
    x, y = np.abs(np.diff(heights, axis=1)), np.abs(np.diff(heights, axis=0))
    steepest = np.hypot(np.maximum(x[1:], x[:-1]), np.maximum(y[:, 1:], y[:, :-1]))
    return steepest * ((len(heights) - 1) / (2 * TERRAIN_EXTENT))
