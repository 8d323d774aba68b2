"""Test the claims of the guide: `python -m benchmark.guide --jobs 2` trains, then makes tables and figures.

An experiment changes one hyperparameter of the defaults, over the guide's range. All runs have equal steps. Only
those of "cameras" have cameras. Each run appends a line to benchmark/guide/runs.jsonl: command, commit, versions,
machine, seed, evaluations, curves, what `diagnose` finds, and the gap between the training terrain and unseen terrain.
Runs whose line exists are skipped, interrupted ones are resumed. The seeds come one after the other: seed 1 of all
experiments, then seed 2. `--seeds` without values only makes the tables and figures. `--speed` measures speeds instead.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ballbot_utils import benchmark as speed
from ballbot_utils.common import run_program
from ballbot_utils.diagnose import stalled_for
from benchmark import presets, records
from benchmark.records import Experiment

FILE, FIGURES, PAGE = Path("benchmark/guide/runs.jsonl"), Path("docs/img/guide"), Path("docs/guide.md")
BASE = "--total-timesteps 4000000 --eval-interval 500000 --final-eval-episodes 32"
LOWEST = 70  # return in the figure of all values
SCHEDULES = "--lr-schedule guide --ent-schedule {} --clip-schedule {}"
UNSTABLE = "--learning-rate {} --clip-coef {} --vf-coef {}"
# {hyperparameter: {value: flags}}; a pair is the value of another hyperparameter. The defaults have the value in
# DEFAULTS. The last four are the guide's remedies for each problem of its troubleshooting
EXPERIMENTS = {
    "defaults": {"": ""},
    "learning rate": {x: f"--learning-rate {x}" for x in ("1e-6", "1e-5", "5e-5", "1e-4", "3e-4", "1e-3", "1e-2")},
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
    "cameras": {
        "on": "", "learning rate 3e-4": "--learning-rate 3e-4", "clip range 0.2": "--clip-coef 0.2",
    },
    "configurations": {x: f"--preset {x}" for x in ("aggressive", "conservative")},
    "not learning": {
        "learning rate 1e-5": ("learning rate", "1e-5"),
        "learning rate 1e-4": ("learning rate", "1e-4"),
        "entropy 0.01": "--learning-rate 1e-5 --ent-coef 0.01",
        "clip range 0.02": "--learning-rate 1e-5 --clip-coef 0.02",
        "clip range 0.1": "--learning-rate 1e-5 --clip-coef 0.1",  # what `diagnose` advises
    },
    "unstable": {
        "learning rate 1e-3": UNSTABLE.format("1e-3", 0.2, 1),
        "learning rate 1e-4": UNSTABLE.format("1e-4", 0.2, 1),
        "clip range 0.015": UNSTABLE.format("1e-3", 0.015, 1),
        "clip range 0.1": UNSTABLE.format("1e-3", 0.1, 1),  # half, instead of the guide's small value
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
    "learning rate": "scheduled", "clip range": "0.015", "n_steps": "2048", "epochs": "5", "batch size": "256",
    "entropy coefficient": "0.001", "value coefficient": "2", "advantage normalization": "off", "hidden size": "128",
    "layers": "4", "weight decay": "0.01", "environments": "10", "schedules": "learning rate",
    "cameras": "off", "configurations": "balanced", "not learning": "defaults", "unstable": "defaults",
    "slow": "defaults", "overfitting": "defaults",
}  # fmt: skip

# What seeds 1 to 3 chose, on other seeds and with cameras: {label: experiment and value in benchmark.presets}
JUDGED = {
    "0.015, 8,000,000 steps": ("balanced", ""),
    "0.1": ("balanced", "--clip-coef 0.1 --total-timesteps 4000000"),
    "0.2": ("balanced", "--clip-coef 0.2 --total-timesteps 4000000"),
}

# How fast each value trains: on one core of an idle machine, without evaluations
SPEED_FILE = FILE.with_name("speed.json")
SPEED_OF = ("n_steps", "epochs", "batch size", "hidden size", "layers", "environments")
SPEED = "--no-cameras --num-processes 1 --num-threads 1 --eval-interval 100000000 --final-eval-episodes 1"


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each experiment"""
    jobs: int = 1
    """runs at a time, one core each"""
    only: tuple[str, ...] = ()
    """hyperparameters to vary; empty: all"""
    speed: bool = False
    """measure the speed of training, on an idle machine, instead"""


def group_values(name: str, lines: list[dict]) -> dict[str, list[dict]]:
    """The lines of a hyperparameter by value, {value: lines of the seeds}, the default's too, in ascending order."""
    keys = {value: x if isinstance(x, tuple) else (name, value) for value, x in EXPERIMENTS[name].items()}
    keys[DEFAULTS[name]] = ("defaults", "")
    order = sorted(keys, key=float) if DEFAULTS[name].replace(".", "").isdigit() else keys
    return records.group_lines(lines, {value: keys[value] for value in order})


def group_all(lines: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The lines of the hyperparameters that were varied, {hyperparameter: {value: lines}}."""
    groups = {name: group_values(name, lines) for name in DEFAULTS}
    return {name: group for name, group in groups.items() if len(group) > 1}


def make_metrics_table(lines: list[dict]) -> str:
    """A Markdown table: in how many runs each metric behaves as the guide says, in the best and worst third of them."""
    lines = sorted((line for line in lines if line["final"]), key=lambda line: line["final"]["episodic_return"])
    third = len(lines) // 3

    def change(line, tag):
        values = [value for value in line["curves"][tag] if value is not None]
        return values[-1] - values[0]

    def settles(line):
        parts = np.array_split([value for value in line["curves"]["losses/policy_loss"] if value is not None], 3)
        return np.ptp(parts[-1]) < np.ptp(parts[0])

    claims = {
        "return in training rises": lambda line: change(line, "charts/episodic_return_mean100") > 0,
        "length in evaluations rises, or is 4000": lambda line: (
            line["evaluations"][-1][3] > min(line["evaluations"][0][3], 3999)
        ),
        "value loss falls": lambda line: change(line, "losses/value_loss") < 0,
        "policy loss settles: its range in the last third is smaller than in the first": settles,
        "entropy falls": lambda line: change(line, "charts/action_std") < 0,
    }
    rows = [f"| from start to end | best third of {len(lines)} runs | worst third |", "| --- | --- | --- |"]
    for claim, holds in claims.items():
        best, worst = (sum(map(holds, part)) for part in (lines[-third:], lines[:third]))
        rows.append(f"| {claim} | {best} of {third} | {worst} of {third} |")
    return "\n".join(rows)


def make_stopping_table(lines: list[dict]) -> str:
    """A Markdown table: what runs gained after they had not improved for some steps, by `diagnose`'s rule."""
    rows = ["| no improvement for | runs | gained 5 or more later | largest gain |", "| --- " * 4 + "|"]
    for wait in (500_000, 1_000_000, 1_500_000, 2_000_000):
        gains = []
        for line in lines:
            steps, _, returns, *_ = np.array(line["evaluations"]).reshape(-1, 5).T
            stop = next((k for k in range(1, len(steps)) if stalled_for(steps[:k], returns[:k]) >= wait), None)
            if stop:
                gains.append(returns.max() - returns[:stop].max())
        largest = f"{max(gains):.1f}" if gains else ""
        rows.append(f"| {wait:,} steps | {len(gains)} of {len(lines)} | {sum(g >= 5 for g in gains)} | {largest} |")
    return "\n".join(rows)


def make_speed_table(measured: list[dict]) -> str:
    """A Markdown table: steps/s, and µs per step of each part, medians of what `ballbot_utils.benchmark` measured."""
    rows = ["| flags | steps/s | simulate (µs per step) | infer | learn |", "| --- " * 5 + "|"]
    for flags in dict.fromkeys(run["flags"] for run in measured):
        runs = [run for run in measured if run["flags"] == flags]
        parts = [1e6 * np.median([run["seconds"][part] / run["steps"] for run in runs])
                 for part in ("simulate", "infer", "learn")]  # fmt: skip
        changed = flags.removesuffix(SPEED).strip()
        cells = [f"`{changed}`" if changed else "**defaults**", f"{1e6 / sum(parts):,.0f}"]
        rows.append("| " + " | ".join(cells + [f"{part:.0f}" for part in parts]) + " |")
    return "\n".join(rows)


def update_page(page: str, lines: list[dict], others: list[dict], measured: list[dict]) -> str:
    """docs/guide.md with tables and figures between their marks: of `lines`, and of all runs, `others` too.

    `measured` are the trainings of `measure_speed`.
    """
    runs = lines + others
    results = {"metrics": make_metrics_table(runs), "when to stop": make_stopping_table(runs)}
    results["speed"] = make_speed_table(measured)
    judged = records.group_lines([line for line in others if line["seed"] > 3], JUDGED)
    results["clip range, judged"] = records.make_table("clip range", judged, "")
    for name, group in group_all(lines).items():
        figure = f"![{name}](img/guide/{name.replace(' ', '_')}.png)"
        results[name] = f"{records.make_table(name, group, DEFAULTS[name])}\n\n{figure}"
    return records.fill_marks(page, results)


def draw_all(file: Path, groups: dict[str, dict[str, list[dict]]]) -> None:
    """Draw the returns at the end of all hyperparameters, {name: {value: lines}}: a line each, its values on it.

    A return below LOWEST is shown at LOWEST, with its number.
    """
    figure, ax = plt.subplots(figsize=(9, 0.5 + 0.45 * len(groups)), layout="constrained")
    for row, (name, values) in enumerate(groups.items()):
        finals = {value: records.final_values(lines) for value, lines in values.items()}
        means = {value: records.interquartile_mean(returns)[0] for value, returns in finals.items() if returns}
        ax.plot([max(LOWEST, min(means.values())), max(means.values())], [row, row], color="0.8", zorder=0)
        for k, (value, mean) in enumerate(sorted(means.items(), key=lambda item: item[1])):
            color = "black" if value == DEFAULTS[name] else "#0072B2"
            at, text = max(LOWEST, mean), value if mean >= LOWEST else f"{value}: {mean:.0f}"
            ax.plot(at, row, "o", ms=5, color=color)
            ax.annotate(text, (at, row), (0, 5 if k % 2 else -12), textcoords="offset points", ha="center",
                        fontsize=7, color=color)  # fmt: skip
    ax.set(xlabel="return at the end, unseen terrain, interquartile mean of the seeds; black: the default")
    ax.set_yticks(range(len(groups)), groups)
    ax.axvline(100, color="0.7", lw=1, ls="--", zorder=0)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def list_runs(seeds: tuple[int, ...], only: tuple[str, ...]) -> list[Experiment]:
    """All runs, seed by seed."""
    return [
        Experiment(name, value, f"{flags} {'--no-cameras ' * (name != 'cameras')}{BASE}".strip(), seed,
                   f"ppo_ballbot{'_schedules' * (name == 'schedules')}.py")
        for seed in seeds for name, values in EXPERIMENTS.items()
        for value, flags in values.items() if isinstance(flags, str) and (not only or name in only)
    ]  # fmt: skip


def measure_gap(run: Path) -> dict:
    """The return of the last policy on the training terrain minus that on unseen terrain, and its 95 % interval."""
    return {"gap": records.evaluate([run / "last.pt"], "--episodes", "32")[0]["gap"]}


def measure_speed() -> None:
    """Train shortly with each value of the hyperparameters that change the speed, by `ballbot_utils.benchmark`."""
    values = ["", *(flags for name in SPEED_OF for flags in EXPERIMENTS[name].values())]
    runs = tuple(f"{flags} {SPEED}" for flags in values)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "speed.png"
        speed.main(speed.Args(run=runs, steps=163_840, repeats=2, output=output))
        shutil.copy(output.with_suffix(".json"), SPEED_FILE)


def main(args: Args) -> None:
    if args.speed:
        measure_speed()
    else:
        records.train_all(FILE, list_runs(args.seeds, args.only), args.jobs, measure_gap)
    lines, page = records.read_lines(FILE), PAGE.read_text()
    measured = json.loads(SPEED_FILE.read_text())["records"]
    PAGE.write_text(update_page(page, lines, records.read_lines(presets.FILE), measured))
    groups = {name: group for name, group in group_all(lines).items() if f"<!-- results: {name} -->" in page}
    for name, group in groups.items():
        records.draw(FIGURES / f"{name.replace(' ', '_')}.png", name, group, DEFAULTS[name])
    if varied := {name: group for name, group in groups.items() if DEFAULTS[name] != "defaults"}:
        draw_all(FIGURES / "all.png", varied)


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
