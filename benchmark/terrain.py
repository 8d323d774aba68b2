"""Train on ground where a blind robot falls: `python -m benchmark.terrain --jobs 2`.

On hills of 0.3 m, with and without a curriculum. On the other kinds, with cameras, blind, and with the true heights
ahead, the most that cameras could show. All start from the preset tuned. Each run appends a line to
benchmark/terrain/runs.jsonl, with evaluations of its last policy in 100 episodes on unseen ground. Runs whose line
exists are skipped, interrupted ones are resumed. It ends with a table of all lines.
"""

from dataclasses import dataclass
from pathlib import Path

from ballbot_utils.common import run_program
from benchmark.records import Experiment, evaluate, group_lines, interquartile_mean, read_lines, train_all

FILE = Path("benchmark/terrain/runs.jsonl")
KINDS = {"potholes": "potholes:depth=0.06", "steps": "steps:height=0.02", "waves": "waves:height=0.4"}
SENSORS = {"cameras": "", "blind": "--no-cameras", "heights": "--no-cameras --env-kwargs height_scan=True"}
HILLS = "--terrain-amplitude 0.3 --no-cameras"
EXPERIMENTS = {"hills": {"plain": HILLS, "curriculum": f"{HILLS} --curriculum"}} | {
    kind: {sensor: f"--terrain {terrain} {flags}" for sensor, flags in SENSORS.items()}
    for kind, terrain in KINDS.items()
}
# The flags of `python -m ballbot_utils.evaluate` for each kind
CONDITIONS = {"hills": ("--terrain-amplitude 0.2", "--terrain-amplitude 0.3")} | {
    kind: (f"--terrain {terrain}",) for kind, terrain in KINDS.items()
}


@dataclass
class Args:
    kinds: tuple[str, ...] = tuple(EXPERIMENTS)
    """hills, or kinds of ground"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of each experiment"""
    jobs: int = 1
    """runs at a time, one core each"""


def evaluate_there(run: Path) -> dict:
    """Evaluations of a run's last policy, {condition: summary}."""
    kind = run.name.split("_")[1]
    return {"there": {flags: evaluate(run, *flags.split(), "--no-gap")["summary"] for flags in CONDITIONS[kind]}}


def make_table(kind: str, lines: list[dict]) -> str:
    """A Markdown table with a row for each experiment and condition; brackets are intervals over seeds."""
    rows = [f"| {kind} | evaluated on | return | falls | speed (m/s) | returns of the seeds |", "| --- " * 6 + "|"]
    for label, group in group_lines(lines, {label: (kind, label) for label in EXPERIMENTS[kind]}).items():
        for flags in CONDITIONS[kind]:
            results = [line["there"][flags] for line in sorted(group, key=lambda line: line["seed"])]
            returns = [result["return"]["mean"] for result in results]
            mean, low, high = interquartile_mean(returns)
            falls, episodes = (sum(result[key] for result in results) for key in ("falls", "episodes"))
            speed = sum(result["speed"]["mean"] for result in results) / len(results)
            seeds = ", ".join(f"{value:.1f}" for value in returns)
            rows.append(f"| {label} | `{flags}` | {mean:.1f} [{low:.1f}, {high:.1f}] | {falls} of {episodes} | "
                        f"{speed:.2f} | {seeds} |")  # fmt: skip
    return "\n".join(rows)


def main(args: Args) -> None:
    experiments = [
        Experiment(kind, label, f"--preset tuned {flags}", seed)
        for seed in args.seeds for kind in args.kinds for label, flags in EXPERIMENTS[kind].items()
    ]  # fmt: skip
    train_all(FILE, experiments, args.jobs, evaluate_there)
    lines = read_lines(FILE)
    for kind in args.kinds:
        print(make_table(kind, lines))


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
