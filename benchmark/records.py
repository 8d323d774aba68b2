"""Trains the runs of a benchmark, in runs/, and keeps a line of raw data for each: command, versions, results."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from ballbot_utils import diagnose, plot
from ballbot_utils.runs import read_metrics

CURVES = ("charts/episodic_return_mean100", "losses/approx_kl", "losses/clipfrac", "losses/policy_loss",
          "losses/value_loss", "losses/explained_variance", "charts/action_std")  # fmt: skip
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

    Those whose line exists are skipped; those with a checkpoint are resumed. `extra` gives more data on a run's folder.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["experiment"], line["value"], line["seed"]) for line in read_lines(file)}
    left = [each for each in experiments if (each.name, each.value, each.seed) not in done]
    print(f"{len(experiments)} runs, {len(left)} of them are left", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, file.parent.name, each, extra) for each in left]
        for number, future in enumerate(as_completed(futures), 1):
            if line := future.result():
                with open(file, "a") as lines:
                    lines.write(json.dumps(line) + "\n")
                print(f"{time.strftime('%H:%M')} {number} of {len(left)}: {line['command']}: "
                      f"{line['error'] or line['final']}", flush=True)  # fmt: skip


def train(benchmark: str, experiment: Experiment, extra: Callable[[Path], dict]) -> dict | None:
    """Train one experiment, or resume it. Returns its line, or None if a signal stopped it."""
    name = "_".join(f"{benchmark} {experiment.name} {experiment.value} {experiment.seed}".split())
    flags = shlex.split(f"{experiment.flags} --num-processes 1 --num-threads 1 --seed {experiment.seed}")
    command, run = [experiment.script, *flags, "--run-name", name], Path("runs") / name
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    resumed = [experiment.script, "--resume", str(run)] if (run / "last.pt").exists() else command
    print(f"{time.strftime('%H:%M')} python {shlex.join(resumed)}", flush=True)
    output = subprocess.run([sys.executable, *resumed], capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    if output.returncode < 0:
        return None
    if not (run / "metrics.jsonl").exists():
        raise RuntimeError(output.stderr)
    parameters, curves = plot.read_run(run, CURVES)
    metrics = read_metrics(run)
    keys = "global_step", "seconds", "episodic_return", "episodic_length", "falls"
    edges = np.linspace(0, parameters["total_timesteps"], PARTS + 1)
    return {
        "experiment": experiment.name, "value": experiment.value, "seed": experiment.seed,
        "command": f"python {shlex.join(command)}", "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("torch", "mujoco", "gymnasium", "numpy")},
        "error": output.stderr.strip().splitlines()[-1] if output.returncode else "",
        "evaluations": [[entry[key] for key in keys] for entry in metrics if entry["kind"] == "evaluation"],
        "final": next((entry for entry in metrics if entry["kind"] == "final"), None),
        "curves": {tag: [medians(curve, *part) for part in pairwise(edges)] for tag, curve in curves.items()},
        "findings": [finding[0] for finding in diagnose.diagnose(*diagnose.read_run(run))],
    } | extra(run)  # fmt: skip


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
