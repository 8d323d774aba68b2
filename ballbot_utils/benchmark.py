"""Measure the speed of training: `python -m ballbot_utils.benchmark --output speed.png`.

Trains by `ppo_ballbot.py` with each `--run`, in turn, and shows where the time goes by the clock, from the launch to
the end. Beside it stands a lower bound: what the largest operations of MuJoCo and PyTorch take alone, on as many cores
as the run has processes. Medians over `--repeats` are shown, with the lowest and highest value in brackets. Writes the
tables, the raw results as JSON and a plot. For other flags: `--run="--preset tuned" --run="--num-envs 32"`.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
import torch
import tyro

import ppo_ballbot
from ballbot_utils.checkpoints import read_checkpoint
from ballbot_utils.common import check_flags, progress, require_packages, require_writable, run_program, write
from ballbot_utils.console import check_argument, print_rank0
from ballbot_utils.flags import Count
from ballbot_utils.model import MAX_TORQUE
from ballbot_utils.terrain import TERRAIN_EXTENT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS = "", "--preset tuned", "--preset tuned --no-cameras"
FALL_STEPS = 240  # physics steps in which a robot that is driven by noise nearly falls
SECONDS = 1.0  # for which each operation is repeated


@dataclass
class Args:
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """flags of a training, in quotes after =; without any: the defaults, and tuned with and without cameras"""
    steps: Count = 1_000_000
    """steps of each training"""
    repeats: Count = 3
    """rounds; each measures everything once"""
    output: Path = Path("speed.png")
    """the plot; the tables (.md) and raw results (.json) have the same name"""
    overwrite: bool = False
    """replace outputs that exist"""


def check_args(args: Args) -> list[Path]:
    """Exit with one line on the first invalid flag, before any work starts. Returns the files to write."""
    check_flags(args)
    check_argument(args.output.suffix == ".png", f"--output is {args.output}: give a name ending in .png")
    files = [args.output.with_suffix(suffix) for suffix in (".png", ".md", ".json")]
    for file in files:
        require_writable("--output", file, args.overwrite, ".png", ".md", ".json")
    require_packages("the benchmark", "matplotlib")
    return files


def measure_run(flags: str, steps: int) -> dict[str, Any]:
    """Train with `flags`. Returns {flags, steps, seconds: {part: by the clock}, bounds: {part: at least}}."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ppo_ballbot.__file__, *shlex.split(flags), "--total-timesteps", str(steps)]
        done = subprocess.run([*command, "--run-name", "speed"], cwd=folder, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
        check_argument(done.returncode == 0, f"--run={flags!r}: {done.stderr.strip().splitlines()[-1:]}")
        content = read_checkpoint(Path(folder) / "runs" / "speed" / "last.pt")
    names = {field.name for field in fields(ppo_ballbot.Args)}
    args = ppo_ballbot.Args(**{name: value for name, value in content["args"].items() if name in names})
    return {"flags": flags, "steps": content["global_step"], "seconds": content["parts"],
            "bounds": lower_bounds(args, content["global_step"])}  # fmt: skip


def time_of(function: Callable[[], Any]) -> float:
    """Seconds of a call, on average over SECONDS, after one call to warm up."""
    function()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        function()
        calls += 1
    return (time.perf_counter() - started) / calls


@torch.no_grad()
def lower_bounds(args: ppo_ballbot.Args, steps: int) -> dict[str, float]:
    """Seconds that the largest operations of a training take alone: {part: seconds}.

    MuJoCo steps robots that noise like that of a new policy drives until they fall. The others are the height look-ups
    of the depth renderer and the matrix products of the networks, forward and backward.
    """
    torch.set_num_threads(1)
    alone = replace(args, num_threads=1, num_processes=1, cuda=False)
    envs = ppo_ballbot.make_envs(alone, args.num_envs // args.num_processes)
    envs.reset(seed=0)
    batch, start = envs.batch, envs.batch.state.copy()
    controls, limit = batch.bind("ctrl")[:, :3], MAX_TORQUE
    noise = np.random.default_rng(0).normal(0, limit * np.exp(args.init_log_std), (FALL_STEPS, envs.num_envs, 3))
    torques = noise.clip(-limit, limit)[:: args.frame_skip]

    def physics():
        batch.state[:] = start
        for torque in torques:
            controls[:] = torque
            batch.step(nstep=args.frame_skip)

    agent = ppo_ballbot.Agent(args)
    weights = [p.T for net in (agent.actor, agent.critic) for p in net.parameters() if p.dim() == 2]
    samples = args.minibatch_size // args.num_processes

    def products(rows, names):
        sizes = [(torch.rand(rows, len(weight)), weight, torch.rand(rows, weight.shape[1])) for weight in weights]
        return lambda: [{"x": x @ weight, "w": x.T @ grad if "w" in names else 0, "g": grad @ weight.T if "g" in names
                         else 0} for x, weight, grad in sizes]  # fmt: skip

    actions, cores = steps / args.frame_skip, args.num_processes
    bounds = {
        "simulate": time_of(physics) * steps / (len(torques) * args.frame_skip * envs.num_envs),
        "infer": time_of(products(envs.num_envs, "x")) * actions / envs.num_envs,
        "learn": time_of(products(samples, "xwg")) * args.update_epochs * actions / samples,
    }
    if args.cameras and envs.renderer.heights is not None:  # not on flat ground
        renderer, images = envs.renderer, 2 * min(envs.num_envs, envs.renderer.chunk)
        sides = [renderer.size] + [len(renderer.coarse_pixels)] * (renderer.coarse_steps + 2)
        # Points that images show, about a meter across, of robots at random positions
        positions = torch.rand(2, images, 1, 1) - 0.5
        grids = [positions + (torch.rand(2, images, side, side) - 0.5) / TERRAIN_EXTENT for side in sides]
        seconds = time_of(lambda: [renderer.lookup(grid) for grid in grids])
        bounds["render"] = seconds * 2 * steps / (images * envs.frame_interval)
    return {part: seconds / cores for part, seconds in bounds.items()}


def format_spread(values: Sequence[float], digits: int = 0) -> str:
    """`median (lowest to highest)` of values."""
    low, high = (f"{f(values):,.{digits}f}" for f in (min, max))
    return f"{statistics.median(values):,.{digits}f}" + (f" ({low} to {high})" if len(values) > 1 else "")


def format_tables(records: list[dict[str, Any]]) -> str:
    """The results as Markdown: a table for each of the runs."""
    lines = []
    for flags in dict.fromkeys(record["flags"] for record in records):
        mine = [record for record in records if record["flags"] == flags]
        totals = [sum(record["seconds"].values()) for record in mine]
        speeds = format_spread([record["steps"] / total for record, total in zip(mine, totals)])
        lines += [f"`python ppo_ballbot.py {flags}`, {mine[0]['steps']:,} steps: {speeds} steps/s by the clock.", "",
                  "| part | seconds | share (%) | at least (s) |", "| --- | --- | --- | --- |"]  # fmt: skip
        for part in mine[0]["seconds"]:
            seconds = [record["seconds"][part] for record in mine]
            share = format_spread([100 * x / total for x, total in zip(seconds, totals)])
            bounds = [record["bounds"][part] for record in mine if part in record["bounds"]]
            cells = [part, format_spread(seconds, 1), share, format_spread(bounds, 1) if bounds else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def describe_machine() -> str:
    """Processor, cores and versions, in a line."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return (f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, PyTorch {torch.__version__}, "
            f"MuJoCo {mujoco.__version__}")  # fmt: skip


def draw_figure(records: list[dict[str, Any]]) -> "Figure":
    """The figure: a bar of the parts for each run, medians, with a dark core for the lower bounds."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(record["flags"] for record in records))
    labels = [textwrap.fill(name or "the defaults", 32) for name in names]
    lines = max(label.count("\n") + 1 for label in labels)
    fig = Figure(figsize=(8, 1.5 + max(0.6, 0.18 * lines) * len(names)), layout="constrained")
    ax = fig.subplots()
    parts, left = list(records[0]["seconds"]), np.zeros(len(names))
    for k, part in enumerate(parts):
        seconds, bounds = (np.array([statistics.median(r[key].get(part, 0) for r in records if r["flags"] == name)
                                     for name in names]) for key in ("seconds", "bounds"))  # fmt: skip
        ax.barh(names, seconds, left=left, color=f"C{k}", label=part, height=0.6)
        ax.barh(names, bounds, left=left, color="black", alpha=0.35, height=0.2)
        left += seconds
    ax.set_yticks(range(len(names)), labels)
    ax.invert_yaxis()
    ax.set_xlabel("seconds by the clock; dark: the lower bound")
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper center", frameon=False, ncols=5)
    return fig


def main(args: Args) -> None:
    files, machine, records = check_args(args), describe_machine(), []
    print(machine)
    runs = (args.run or RUNS) * args.repeats
    for done, flags in enumerate(runs, 1):
        records.append(measure_run(flags, args.steps))
        speed = records[-1]["steps"] / sum(records[-1]["seconds"].values())
        progress(f"{flags or 'defaults'}: {speed:,.0f} steps/s", done / len(runs))
    text = machine + "\n\n" + format_tables(records)
    print_rank0("\n" + text)
    settings = {key: value for key, value in asdict(args).items() if key not in ("output", "overwrite")}
    results = json.dumps({"machine": machine, "settings": settings, "records": records}, indent=1) + "\n"
    write(files[0], lambda part: draw_figure(records).savefig(part, dpi=150))
    write(files[1], lambda part: part.write_text(text, "utf-8"))
    write(files[2], lambda part: part.write_text(results))
    print("wrote " + ", ".join(map(str, files)))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
