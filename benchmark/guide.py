"""Test the claims of the guide: `python -m benchmark.guide --jobs 2` trains, then makes tables and figures.

An experiment changes one hyperparameter of the defaults, over the guide's range. All runs have equal steps and no
cameras. Each run appends a line to benchmark/guide/runs.jsonl: command, commit, versions, machine, seed, evaluations,
curves, and what `diagnose` finds. Runs whose line exists are skipped, interrupted ones are resumed. The seeds come one
after the other: seed 1 of all experiments, then seed 2. `--seeds` without values only makes them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from ballbot_utils.common import run_program
from benchmark.records import Experiment, interquartile_mean, read_lines, train_all

FILE, FIGURES, PAGE = Path("benchmark/guide/runs.jsonl"), Path("docs/img/guide"), Path("docs/guide.md")
BASE = "--no-cameras --total-timesteps 3000000 --eval-interval 500000 --final-eval-episodes 32"
SCHEDULES = "--lr-schedule guide --ent-schedule {} --clip-schedule {}"
# {hyperparameter: {value: flags}}. The defaults have the value in DEFAULTS
EXPERIMENTS = {
    "defaults": {"": ""},
    "learning rate": {x: f"--learning-rate {x}" for x in ("1e-5", "5e-5", "1e-4", "3e-4", "1e-3", "1e-2")},
    "clip range": {x: f"--clip-coef {x}" for x in ("0.01", "0.03", "0.1", "0.2", "0.3")},
    "n_steps": {str(4 * x): f"--num-steps {x}" for x in (128, 256, 1024)},
    "epochs": {x: f"--update-epochs {x}" for x in ("3", "10")},
    "batch size": {x: f"--minibatch-size {x}" for x in ("64", "512")},
    "entropy coefficient": {x: f"--ent-coef {x}" for x in ("0.0001", "0.01")},
    "value coefficient": {x: f"--vf-coef {x}" for x in ("0.5", "1", "3")},
    "advantage normalization": {"on": "--norm-adv"},
    "hidden size": {x: f"--hidden-size {x}" for x in ("64", "256", "512")},
    "layers": {x: f"--pi-layers {x} --vf-layers {x}" for x in ("2", "3")},
    "weight decay": {x: f"--weight-decay {x}" for x in ("0", "0.1")},
    "environments": {x: f"--num-envs {x}" for x in ("4", "16", "32")},
    "schedules": {
        "entropy": SCHEDULES.format("linear --ent-coef 0.01 --ent-end 0", "constant --clip-coef 0.015"),
        "clip range": SCHEDULES.format("constant --ent-coef 0.001", "linear --clip-coef 0.04 --clip-end 0.01"),
    },
    "configurations": {x: f"--preset {x}" for x in ("aggressive", "conservative")},
}
DEFAULTS = {
    "learning rate": "1e-4 → 5e-5 → 1e-5", "clip range": "0.015", "n_steps": "2048", "epochs": "5", "batch size": "256",
    "entropy coefficient": "0.001", "value coefficient": "2", "advantage normalization": "off", "hidden size": "128",
    "layers": "4", "weight decay": "0.01", "environments": "10", "schedules": "learning rate",
    "configurations": "balanced",
}  # fmt: skip


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each experiment"""
    jobs: int = 1
    """runs at a time, one core each"""
    only: tuple[str, ...] = ()
    """hyperparameters to vary; empty: all"""


def group_lines(name: str, lines: list[dict]) -> dict[str, list[dict]]:
    """The lines of a hyperparameter by value, {value: lines of the seeds}, the default's too, in ascending order."""
    keys = {value: (name, value) for value in EXPERIMENTS[name]} | {DEFAULTS[name]: ("defaults", "")}
    order = sorted(keys, key=float) if DEFAULTS[name].replace(".", "").isdigit() else keys
    groups = {value: [x for x in lines if (x["experiment"], x["value"]) == keys[value]] for value in order}
    return {value: group for value, group in groups.items() if group}


def draw(name: str, groups: dict[str, list[dict]]) -> None:
    """Draw evaluations against steps, and final returns: a dot for each seed, their interquartile mean and interval."""
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 2), layout="constrained", sharey=True)
    colors = plt.cm.viridis(np.linspace(0, 0.9, len(groups)))
    for k, ((value, lines), color) in enumerate(zip(groups.items(), colors)):
        color = "black" if value == DEFAULTS[name] else color
        shared = min(len(line["evaluations"]) for line in lines)
        steps, returns = np.moveaxis([np.array(line["evaluations"])[:shared, [0, 2]] for line in lines], 2, 0)
        curves.plot(steps[0], returns.mean(0), "o-", ms=3, color=color, label=value)
        curves.fill_between(steps[0], returns.min(0), returns.max(0), color=color, alpha=0.15, lw=0)
        finals = [line["final"]["episodic_return"] for line in lines if line["final"]]
        mean, low, high = interquartile_mean(finals)
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
    ends.set(title="at the end: interquartile mean, 95 %", xlabel=name)
    ends.set_xticks(range(len(groups)), groups, fontsize=8, rotation=0 if len("".join(groups)) < 40 else 30)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name.replace(' ', '_')}.png", dpi=110)
    plt.close(figure)


def make_table(name: str, groups: dict[str, list[dict]]) -> str:
    """The Markdown table of a hyperparameter."""
    rows = [f"| {name} | return at the end | falls | first return > 100 | KL | clipped | seeds |", "| --- " * 7 + "|"]
    for value, lines in groups.items():
        finals = [line["final"] for line in lines if line["final"]]
        mean, low, high = interquartile_mean([final["episodic_return"] for final in finals])
        met = [next((row[0] for row in line["evaluations"] if row[2] > 100 and row[3] > 3000), None) for line in lines]
        met = sorted(step for step in met if step)
        first = f"{met[len(met) // 2] / 1e6:.1f}e6 steps, " * (len(met) > 0) + f"{len(met)} of {len(lines)}"
        kl, clipped = (np.median([np.median([x for x in line["curves"][f"losses/{key}"] if x is not None])
                                  for line in lines]) for key in ("approx_kl", "clipfrac"))  # fmt: skip
        name_of_value = f"**{value}**" if value == DEFAULTS[name] else value
        rows.append(f"| {name_of_value} | {mean:.1f} [{low:.1f}, {high:.1f}] | "
                    f"{100 * np.mean([final['falls'] for final in finals]):.0f} % | {first} | {kl:.2g} | "
                    f"{100 * clipped:.0f} % | {len(lines)} |")  # fmt: skip
    return "\n".join(rows)


def update_page(name: str, table: str) -> None:
    """Replace the table and figure of a hyperparameter between its marks in docs/guide.md."""
    begin, end = f"<!-- results: {name} -->", "<!-- end -->"
    figure = f"![{name}](img/guide/{name.replace(' ', '_')}.png)"
    text = PAGE.read_text()
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    PAGE.write_text(re.sub(pattern, lambda _: f"{begin}\n{table}\n\n{figure}\n{end}", text, flags=re.DOTALL))


def list_runs(seeds: tuple[int, ...], only: tuple[str, ...]) -> list[Experiment]:
    """All runs, seed by seed."""
    return [
        Experiment(name, value, f"{flags} {BASE}", seed, f"ppo_ballbot{'_schedules' * (name == 'schedules')}.py")
        for seed in seeds for name, values in EXPERIMENTS.items()
        for value, flags in values.items() if not only or name in only
    ]  # fmt: skip


def main(args: Args) -> None:
    train_all(FILE, list_runs(args.seeds, args.only), args.jobs)
    lines = read_lines(FILE)
    for name in DEFAULTS:
        if len(groups := group_lines(name, lines)) > 1:
            draw(name, groups)
            update_page(name, make_table(name, groups))


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
