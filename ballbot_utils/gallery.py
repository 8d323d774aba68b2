"""Draw kinds of terrain: `python -m ballbot_utils.gallery terrain.png`.

Each map shows 12 by 12 m around the middle, with +y at the top, and below it the heights along its dashed line. Its
title has the kind and its arguments, the height from lowest to highest, and slopes: the median, and those that 90 %
and all of the terrain stay below. `--terrains ramp:angle=15 my_terrain.py:canyon` draws others.
"""

import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ballbot_utils.common import check_flags, require_packages, require_writable, run_program, write
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.flags import Seed
from ballbot_utils.terrain import CELL, TERRAIN_EXTENT, TERRAINS, Terrain, cell_slopes, find_function

HALF, COLUMNS = 6.0, 5  # m of terrain around the middle, maps per row


@dataclass
class Args:
    output: tyro.conf.Positional[Path]
    """file to write, .png"""
    terrains: tuple[str, ...] = tuple(TERRAINS)
    """which terrains"""
    terrain_seed: Seed = 0
    """the seed of random kinds"""
    overwrite: bool = False
    """replace a file that exists"""


def describe(terrain: str) -> str:
    """A terrain with all its arguments: "ramp:angle=10,length=2,landing=2"."""
    if terrain in ("flat", "perlin"):
        return terrain
    function, given = find_function(terrain)
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    known = {name: value for name, value in (defaults | given).items() if isinstance(value, (int, float))}
    name = terrain if not given else terrain.rpartition(":")[0]
    return name + (":" if known else "") + ",".join(f"{key}={value:g}" for key, value in known.items())


def draw(terrains: list[Terrain], titles: list[str], path: Path) -> None:
    """Write a picture of terrains."""
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LightSource

    rows = -(-len(terrains) // COLUMNS)
    figure = pyplot.figure(figsize=(2.9 * COLUMNS, 3.9 * rows), dpi=90, layout="constrained")
    grid = figure.add_gridspec(2 * rows, COLUMNS, height_ratios=[3, 1] * rows)
    low, high = (round((TERRAIN_EXTENT + c) / CELL) for c in (-HALF, HALF))
    for k, (terrain, title) in enumerate(zip(terrains, titles)):
        heights = np.zeros((high, high)) if terrain.is_plane else terrain.heights
        slopes = np.degrees(np.arctan(np.percentile(cell_slopes(heights), (50, 90, 100))))
        heights = heights[low : high + 1, low : high + 1]
        image, profile = (figure.add_subplot(grid[2 * (k // COLUMNS) + i, k % COLUMNS]) for i in (0, 1))
        low_color, high_color = np.array([-0.4, 1.4]) * np.ptp(heights) + [-0.001, 0.002]
        colors = LightSource(315, 40).shade(heights, pyplot.cm.terrain, blend_mode="soft", vert_exag=2, dx=CELL,
                                            dy=-CELL, vmin=low_color, vmax=high_color)  # fmt: skip
        image.imshow(colors, origin="lower", extent=(-HALF, HALF, -HALF, HALF))
        title = textwrap.fill(title.replace(",", ", ").replace(":", ": "), 42)
        image.set_title(f"{title}\n{terrain.relief:.2f} m; slopes {slopes[0]:.0f}°, "
                        f"90 %: {slopes[1]:.0f}°, all: {slopes[2]:.0f}°", fontsize=7)  # fmt: skip
        image.tick_params(labelsize=6)
        along, column = np.linspace(-HALF, HALF, len(heights)), heights.std(0).argmax()
        image.axvline(along[column], color="white", linestyle="--", linewidth=0.7)
        profile.fill_between(along, 100 * heights[:, column], color="0.6")
        profile.set_xlim(-HALF, HALF)
        profile.set_ylim(0, max(2, 110 * np.max(heights)))
        profile.set_ylabel("cm", fontsize=6)
        profile.tick_params(labelsize=6)
    figure.savefig(path)
    pyplot.close(figure)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(96).save(path, optimize=True)


def main(args: Args) -> None:
    check_flags(args)
    check_argument(args.terrains, "--terrains is empty: give kinds or files")
    require_writable("output", args.output, args.overwrite, ".png")
    require_packages("the gallery", "matplotlib")
    try:
        terrains = [Terrain(name, args.terrain_seed) for name in args.terrains]
    except (ValueError, OSError) as error:
        exit_with_error(error)
    write(args.output, lambda part: draw(terrains, [describe(name) for name in args.terrains], part))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
