"""Train the presets with both cameras, to the end: `python -m benchmark.presets --jobs 2`.

Each run appends a line to benchmark/presets/runs.jsonl, with an evaluation on a third terrain, which is used for
nothing else. Runs whose line exists are skipped, interrupted ones are resumed.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ballbot_utils.common import run_program
from benchmark.records import Experiment, train_all


@dataclass
class Args:
    presets: tuple[str, ...] = ("balanced", "tuned", "aggressive", "conservative")
    """names of presets; balanced is the default"""
    seeds: tuple[int, ...] = tuple(range(1, 11))
    """seeds of each preset"""
    jobs: int = 1
    """runs at a time, one core each"""


def evaluate_elsewhere(run: Path) -> dict:
    """Return, its interval and falls of the last policy on terrain seed 3,000,000, in 100 episodes."""
    if not (run / "last.pt").exists():
        return {}
    command = [sys.executable, "-m", "ballbot_utils.evaluate", str(run / "last.pt"), "--terrain-seed", "3000000",
               "--no-gap", "--num-threads", "1", "--json", "-"]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"third_terrain": json.loads(output.stdout)[0]["summary"]}


def main(args: Args) -> None:
    experiments = [Experiment(preset, "", f"--preset {preset}", seed) for preset in args.presets for seed in args.seeds]
    train_all(Path("benchmark/presets/runs.jsonl"), experiments, args.jobs, evaluate_elsewhere)


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
