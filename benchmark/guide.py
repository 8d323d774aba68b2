"""Test the claims of the guide: `python -m benchmark.guide --jobs 2` trains, then makes tables and figures.

An experiment changes one hyperparameter of the defaults, over the guide's range. All runs have equal steps and no
cameras. Each run appends a line to benchmark/guide/runs.jsonl: command, commit, versions, machine, seed, evaluations,
curves, what `diagnose` finds, and the gap between the training terrain and unseen terrain. Runs whose line exists are
skipped, interrupted ones are resumed. The seeds come one after the other: seed 1 of all experiments, then seed 2.
`--seeds` without values only makes the tables and figures.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ballbot_utils.common import run_program
from benchmark.records import Experiment, draw, evaluate, group_lines, make_table, read_lines, train_all

FILE, FIGURES, PAGE = Path("benchmark/guide/runs.jsonl"), Path("docs/img/guide"), Path("docs/guide.md")
BASE = "--no-cameras --total-timesteps 3000000 --eval-interval 500000 --final-eval-episodes 32"
SCHEDULES = "--lr-schedule guide --ent-schedule {} --clip-schedule {}"
UNSTABLE = "--learning-rate {} --clip-coef {} --vf-coef {}"
# {hyperparameter: {value: flags}}; a pair is the value of another hyperparameter. The defaults have the value in
# DEFAULTS. The last four are the guide's remedies for each problem of its troubleshooting
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
    "not learning": {
        "learning rate 1e-5": ("learning rate", "1e-5"),
        "learning rate 1e-4": ("learning rate", "1e-4"),
        "entropy 0.01": "--learning-rate 1e-5 --ent-coef 0.01",
        "clip range 0.02": "--learning-rate 1e-5 --clip-coef 0.02",
    },
    "unstable": {
        "learning rate 1e-3": UNSTABLE.format("1e-3", 0.2, 1),
        "learning rate 1e-4": UNSTABLE.format("1e-4", 0.2, 1),
        "clip range 0.015": UNSTABLE.format("1e-3", 0.015, 1),
        "value coefficient 2": UNSTABLE.format("1e-3", 0.2, 2),
    },
    "slow": {
        "n_steps 4096": ("n_steps", "4096"), "epochs 10": ("epochs", "10"), "environments 16": ("environments", "16"),
        "clip range 0.03": ("clip range", "0.03"), "learning rate 1e-3": ("learning rate", "1e-3"),
        "entropy 0.01": ("entropy coefficient", "0.01"),
    },
    "overfitting": {
        "weight decay 0.1": ("weight decay", "0.1"), "entropy 0.01": ("entropy coefficient", "0.01"),
        "hidden size 64": ("hidden size", "64"),
    },
}  # fmt: skip
DEFAULTS = {
    "learning rate": "1e-4 → 5e-5 → 1e-5", "clip range": "0.015", "n_steps": "2048", "epochs": "5", "batch size": "256",
    "entropy coefficient": "0.001", "value coefficient": "2", "advantage normalization": "off", "hidden size": "128",
    "layers": "4", "weight decay": "0.01", "environments": "10", "schedules": "learning rate",
    "configurations": "balanced", "not learning": "defaults", "unstable": "defaults", "slow": "defaults",
    "overfitting": "defaults",
}  # fmt: skip


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each experiment"""
    jobs: int = 1
    """runs at a time, one core each"""
    only: tuple[str, ...] = ()
    """hyperparameters to vary; empty: all"""


def group_values(name: str, lines: list[dict]) -> dict[str, list[dict]]:
    """The lines of a hyperparameter by value, {value: lines of the seeds}, the default's too, in ascending order."""
    keys = {value: x if isinstance(x, tuple) else (name, value) for value, x in EXPERIMENTS[name].items()}
    keys[DEFAULTS[name]] = ("defaults", "")
    order = sorted(keys, key=float) if DEFAULTS[name].replace(".", "").isdigit() else keys
    return group_lines(lines, {value: keys[value] for value in order})


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
        for value, flags in values.items() if isinstance(flags, str) and (not only or name in only)
    ]  # fmt: skip


def measure_gap(run: Path) -> dict:
    """The return of the last policy on the training terrain minus that on unseen terrain, and its 95 % interval."""
    return {"gap": evaluate(run, "--episodes", "32")["gap"]}


def main(args: Args) -> None:
    train_all(FILE, list_runs(args.seeds, args.only), args.jobs, measure_gap)
    lines = read_lines(FILE)
    for name in DEFAULTS:
        if len(groups := group_values(name, lines)) > 1:
            draw(FIGURES / f"{name.replace(' ', '_')}.png", name, groups, DEFAULTS[name])
            update_page(name, make_table(name, groups, DEFAULTS[name]))


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
