"""Train the presets with both cameras, to the end: `python -m benchmark.presets --jobs 2`.

Each run appends a line to benchmark/presets/runs.jsonl, with an evaluation on a third terrain, which is used for
nothing else. Runs whose line exists are skipped, interrupted ones are resumed. It ends with a table of all lines.
`--flags="--no-body-frame --no-cameras"` trains with other flags.
"""

from dataclasses import dataclass
from pathlib import Path

from ballbot_utils.common import run_program
from benchmark.records import Experiment, evaluate, meets_targets, read_lines, train_all

FILE = Path("benchmark/presets/runs.jsonl")


@dataclass
class Args:
    presets: tuple[str, ...] = ("balanced", "tuned", "aggressive", "conservative")
    """names of presets; balanced is the default"""
    seeds: tuple[int, ...] = tuple(range(1, 11))
    """seeds of each preset"""
    flags: str = ""
    """flags that replace the preset's"""
    jobs: int = 1
    """runs at a time, one core each"""


def evaluate_elsewhere(run: Path) -> dict:
    """Return, its interval and falls of the last policy on terrain seed 3,000,000, in 100 episodes."""
    return {"third_terrain": evaluate([run / "last.pt"], "--terrain-seed", "3000000", "--no-gap")[0]["summary"]}


def format_table(lines: list[dict]) -> str:
    """A Markdown table with a row for each run."""
    rows = ["| preset | seed | return | falls of 100 | both targets first met (steps) | evaluations with falls after "
            "that | third terrain: return | falls of 100 | speed (m/s) |", "| --- " * 9 + "|"]  # fmt: skip
    for line in sorted(lines, key=lambda line: (line["experiment"], line["value"], line["seed"])):
        if line["error"]:
            rows.append(f"| {line['experiment']} {line['value']} | {line['seed']} | {line['error']} " + "| " * 6 + "|")
            continue
        final, third, met, later = line["final"], line["third_terrain"], "never", ""
        good = [meets_targets(row) for row in line["evaluations"]]
        if True in good:
            rest = line["evaluations"][good.index(True) :]
            met, later = f"{rest[0][0]:,}", f"{sum(row[4] > 0 for row in rest)} of {len(rest)}"
        name = f"`{line['experiment']} {line['value']}`" if line["value"] else line["experiment"]
        cells = [name, line["seed"], f"{final['episodic_return']:.1f}"]
        cells += [f"{100 * final['falls']:.0f}", met, later]
        cells += [f"{third['return']['mean']:.1f}", third["falls"], f"{third['speed']['mean']:.2f}"]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def main(args: Args) -> None:
    experiments = [
        Experiment(preset, args.flags, f"--preset {preset} {args.flags}", seed)
        for seed in args.seeds for preset in args.presets
    ]  # fmt: skip
    train_all(FILE, experiments, args.jobs, evaluate_elsewhere)
    print(format_table(read_lines(FILE)))


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
