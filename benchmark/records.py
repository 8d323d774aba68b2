"""Trains the runs of a benchmark, in runs/, and keeps a line of raw data for each: command, versions, results."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter
from scipy import stats

from ballbot_utils import diagnose, plot
from ballbot_utils.runs import TARGET_LENGTH, TARGET_RETURN, read_metrics

CURVES = ("charts/episodic_return_mean100", "losses/approx_kl", "losses/clipfrac", "losses/policy_loss",
          "losses/value_loss", "losses/explained_variance", "charts/action_std", "SPS/train")  # fmt: skip
EVALUATION = ("global_step", "seconds", "episodic_return", "episodic_length", "falls")  # of a line's evaluations
PARTS = 12  # of a training, with a median of each curve


class Experiment(NamedTuple):
    """A run of a benchmark: `python SCRIPT FLAGS --seed SEED`."""

    name: str
    value: str
    flags: str
    seed: int
    script: str = "ppo_ballbot.py"


def read_lines(file: Path) -> list[dict]:
    """The lines of raw data in a file, or [] without a file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def train_all(
    file: Path, experiments: Sequence[Experiment], jobs: int, extra: Callable[[Path], dict] = lambda run: {}
) -> None:
    """Train `jobs` experiments at a time, one core each, and append a line to `file` when one ends.

    Those whose line exists are skipped; those with a checkpoint are resumed. `extra` gives more data on the folder of a
    run that has a last.pt.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["experiment"], line["value"], line["seed"]) for line in read_lines(file)}
    left = [each for each in experiments if (each.name, each.value, each.seed) not in done]
    print(f"{len(experiments)} runs, {len(left)} of them are left", flush=True)
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(train, file.parent.name, each, extra) for each in left]
        for number, future in enumerate(as_completed(futures), 1):
            if line := future.result():
                with open(file, "a") as lines:
                    lines.write(json.dumps(line) + "\n")
                print(f"{time.strftime('%H:%M')} {number} of {len(left)}: {line['command']}: "
                      f"{line['error'] or line['final']}", flush=True)  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failed run no other starts


def train(benchmark: str, experiment: Experiment, extra: Callable[[Path], dict]) -> dict | None:
    """Train one experiment, or resume it. Returns its line, or None if it was killed."""
    name = "_".join(f"{benchmark} {experiment.name} {experiment.value} {experiment.seed}".split())
    flags = shlex.split(f"{experiment.flags} --num-processes 1 --num-threads 1 --seed {experiment.seed}")
    script, run = shlex.split(experiment.script), Path("runs") / name
    command = [*script, *flags, "--run-name", name]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    resumed = [*script, "--resume", str(run)] if (run / "last.pt").exists() else command
    print(f"{time.strftime('%H:%M')} python {shlex.join(resumed)}", flush=True)
    output = subprocess.run([sys.executable, *resumed], capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    if output.returncode < 0:
        return None
    if output.returncode and "losses are not finite" not in output.stderr:
        raise RuntimeError(output.stderr)
    parameters, curves = plot.read_run(run, CURVES)
    metrics = read_metrics(run)
    edges = np.linspace(0, parameters["total_timesteps"], PARTS + 1)
    return {
        "experiment": experiment.name, "value": experiment.value, "seed": experiment.seed,
        "command": f"python {shlex.join(command)}", "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("torch", "mujoco", "gymnasium", "numpy")},
        "error": output.stderr.strip().splitlines()[-1] if output.returncode else "",
        "evaluations": [[entry[key] for key in EVALUATION] for entry in metrics if entry["kind"] == "evaluation"],
        "final": next((entry for entry in metrics if entry["kind"] == "final"), None),
        "curves": {tag: [medians(curve, *part) for part in pairwise(edges)] for tag, curve in curves.items()},
        "findings": [finding[0] for finding in diagnose.diagnose(*diagnose.read_run(run))],
    } | (extra(run) if (run / "last.pt").exists() else {})  # fmt: skip


def evaluate(policies: Sequence[Path], *flags: str) -> list[dict]:
    """What `python -m ballbot_utils.evaluate` says about each of the policies."""
    command = [sys.executable, "-m", "ballbot_utils.evaluate", *map(str, policies), *flags, "--num-threads", "1"]
    output = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=True)
    return json.loads(output.stdout)


def medians(curve: plot.Curve, low: float, high: float) -> float | None:
    """The median of a curve's values between two steps, with three digits."""
    steps, _, values = curve
    inside = values[(steps > low) & (steps <= high)]
    return float(f"{np.median(inside):.3g}") if len(inside) else None


def interquartile_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """The interquartile mean over seeds and its 95 % bootstrap interval: mean, low, high (arXiv 2108.13264)."""
    mean = stats.trim_mean(values, 0.25)
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    interval = stats.bootstrap((values,), lambda x, axis: stats.trim_mean(x, 0.25, axis), method="percentile", rng=0)
    return mean, *interval.confidence_interval


def show_mean(values: Sequence[float]) -> str:
    """The interquartile mean over seeds and its interval; the value of a single seed; nothing without seeds."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    mean, low, high = interquartile_mean(values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def group_lines(lines: Sequence[dict], keys: Mapping[str, tuple[str, str]]) -> dict[str, list[dict]]:
    """Lines by label, in the order of `keys`, {label: (experiment, value)}; labels without lines are left out."""
    groups = {label: [x for x in lines if (x["experiment"], x["value"]) == key] for label, key in keys.items()}
    return {label: group for label, group in groups.items() if group}


def final_values(lines: Sequence[dict], key: str = "episodic_return") -> list[float]:
    """A result of each run that trained to the end; one whose losses became infinite did not."""
    return [line["final"][key] for line in lines if line["final"]]


def median_of(lines: Sequence[dict], tag: str) -> float:
    """The median of a curve over the trainings of some runs."""
    return np.median([value for line in lines for value in line["curves"][tag] if value is not None])


def meets_targets(evaluation: Sequence[float]) -> bool:
    """Whether a row of a line's evaluations meets the guide's targets."""
    return evaluation[2] > TARGET_RETURN and evaluation[3] > TARGET_LENGTH


def first_met(line: dict) -> float | None:
    """The step at which a run first met the targets, in an evaluation or at its end."""
    final = [[line["final"][key] for key in EVALUATION]] if line["final"] else []
    return next((row[0] for row in line["evaluations"] + final if meets_targets(row)), None)


def fill_marks(page: str, results: Mapping[str, str]) -> str:
    """A page with each result, {name: text}, between its marks, if it has them."""
    for name, text in results.items():
        begin, end = f"<!-- results: {name} -->", "<!-- end -->"
        page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    return page


def draw(file: Path, label: str, groups: dict[str, list[dict]], default: str) -> None:
    """Draw evaluations against steps, and final returns: a dot for each seed, their interquartile mean and interval.

    `groups` are the lines of the seeds by value of `label`, {value: lines}; the `default` value is black.
    """
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 2), layout="constrained", sharey=True)
    colors = plt.cm.viridis(np.linspace(0, 0.9, len(groups)))
    for k, ((value, lines), color) in enumerate(zip(groups.items(), colors)):
        color = "black" if value == default else color
        shared = min(len(line["evaluations"]) for line in lines)
        rows = np.array([line["evaluations"][:shared] for line in lines]).reshape(len(lines), shared, 5)
        steps, returns = rows[0, :, 0], rows[:, :, 2]
        curves.plot(steps, returns.mean(0), "o-", ms=3, color=color, label=value)
        curves.fill_between(steps, returns.min(0), returns.max(0), color=color, alpha=0.15, lw=0)
        finals = final_values(lines)
        mean, low, high = interquartile_mean(finals) if finals else [np.nan] * 3
        ends.plot([k] * len(finals), finals, "o", ms=4, color=color, alpha=0.5)
        ends.plot([k, k], [low, high], "-", color=color, lw=1)
        ends.plot([k - 0.25, k + 0.25], [mean, mean], "-", color=color, lw=2)
    for ax in (curves, ends):
        ax.axhline(100, color="0.7", lw=1, ls="--", zorder=0)
        ax.grid(color="0.93")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    curves.set(xlabel="steps", ylabel="return, unseen terrain", title="on the way: mean and range of seeds")
    curves.xaxis.set_major_formatter(EngFormatter())
    curves.legend(frameon=False, fontsize=7)
    ends.set(title="at the end: interquartile mean, 95 %", xlabel=label)
    ends.set_xticks(range(len(groups)), groups, fontsize=8, rotation=0 if len("".join(groups)) < 40 else 30)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def make_table(label: str, groups: dict[str, list[dict]], default: str) -> str:
    """A Markdown table with a row for each value of `label`; the gap is training terrain minus unseen terrain."""
    columns = "return at the end | falls | gap | targets first met | KL | clipped | `diagnose` finds"
    rows = [f"| {label} | {columns} |", "| --- " * 8 + "|"]
    for value, lines in groups.items():
        falls = final_values(lines, "falls")
        result = f"{show_mean(final_values(lines))} | " + (f"{100 * np.mean(falls):.0f} %" if falls else "")
        met = sorted(filter(None, map(first_met, lines)))
        first = f"{met[len(met) // 2] / 1e6:.1f}e6 steps, " if met else ""
        first += f"{len(met)} of {len(lines)}"
        kl, clipped = (median_of(lines, tag) for tag in ("losses/approx_kl", "losses/clipfrac"))
        gaps = [line["gap"]["mean"] for line in lines if line.get("gap")]
        gap = f"{np.mean(gaps):+.1f}" if gaps else ""
        name = f"**{value}**" if value == default else value
        found = Counter(name for line in lines for name in line["findings"] + ["infinite losses"] * bool(line["error"]))
        found = ", ".join(f"{name} ({count})" for name, count in found.most_common())
        rows.append(f"| {name} | {result} | {gap} | {first} | {kl:.2g} | {100 * clipped:.0f} % | {found} |")
    return "\n".join(rows)
