"""What a study found: a line for each trial, best.json, pictures, advice, and the report of step-by-step strategies."""

import shlex
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

import ballbot_runs
from ballbot_utils import diagnose, plot
from ballbot_utils.common import write
from ballbot_utils.tune import GUIDE_SEEDS, Search
from ballbot_utils.tune.study import attempts, best_trial, finished, print_line, valid_trials
from ballbot_utils.tune.trial import format_value

# A value that a step tried: its step and label, its results over seeds, a note, and whether it was kept.
Row = dict[str, Any]


def describe(trial: FrozenTrial, search: Search) -> str:
    """A finished trial in one line."""
    show = partial(format_value, search.args.objective)
    words = " ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in trial.params.items())  # fmt: skip
    if trial.state == TrialState.FAIL:
        return f"trial {trial.number} failed ({words}): {trial.user_attrs['reason']}"
    value = "" if trial.value is None else f" {search.args.objective} {show(trial.value)}"
    if trial.state == TrialState.PRUNED:
        return f"trial {trial.number} pruned after {trial.last_step:,} steps:{value} ({words})"
    results = trial.user_attrs["results"].values()
    spread = f" ({show(min(results))} to {show(max(results))})" if len(results) > 1 else ""
    return f"trial {trial.number}:{value}{spread} ({words})"


def report_trial(study: optuna.Study, trial: FrozenTrial, search: Search) -> None:
    """Print a finished trial, log it for TensorBoard's HParams tab, and save it if it is the best."""
    from torch.utils.tensorboard import SummaryWriter

    print_line(describe(trial, search))
    if trial.value is not None:
        with SummaryWriter(search.folder / "hparams" / f"trial-{trial.number}") as writer:
            writer.add_hparams(dict(trial.params), {f"tune/{search.args.objective}": trial.value}, run_name=".")
    best = best_trial(study)
    if best and best.number == trial.number:
        save_best(search.space.settings(trial.params), search.folder)


def save_best(settings: dict[str, Any], folder: Path) -> None:
    """Write best.json, which both scripts read by --config."""
    write(folder / "best.json", lambda part: part.write_text(ballbot_runs.as_config(settings)))


def trial_runs(trial: FrozenTrial, search: Search) -> tuple[Path, ...]:
    """The folder of each seed's run that has a log; a seed's newest attempt counts."""
    runs = {seed: run for number in [*attempts(trial), trial.number] for seed in search.seeds
            if any((run := search.folder / f"trial-{number}-seed-{seed}").glob(plot.EVENT_FILES))}  # fmt: skip
    return tuple(runs.values())


def draw_study(study: optuna.Study, search: Search) -> None:
    """Draw Optuna's pictures of a study, and the learning curves of its three best trials and of the flags given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    kinds = {"history": pictures.plot_optimization_history, "slices": pictures.plot_slice}
    complete = [trial for trial in valid_trials(study) if trial.state == TrialState.COMPLETE]
    if len({trial.value for trial in complete}) > 1 and len(study.best_params) > 1:
        kinds |= {"importances": pictures.plot_param_importances, "interactions": pictures.plot_parallel_coordinate}
    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna changes the style of later figures
        warnings.simplefilter("ignore", UserWarning)  # of axes with one value
        for name, picture in kinds.items():
            axes = np.ravel(picture(study, target_name=search.args.objective))
            axes[0].figure.set_size_inches(max(8, 4 * len(axes)), 5)
            for ax in axes if name in ("slices", "interactions") else ():
                ax.tick_params(axis="x", which="both", rotation=45)  # long labels would overlap
            write(search.folder / f"{name}.png", partial(axes[0].figure.savefig, dpi=150, bbox_inches="tight"))
            pyplot.close(axes[0].figure)
    ranked = sorted(complete, key=lambda trial: trial.value, reverse=not search.minimize)
    shown = ranked[:3] + [trial for trial in ranked[3:] if trial.params == search.given]
    runs = tuple(run for trial in shown for run in trial_runs(trial, search))
    try:
        plot.main(plot.Args(runs, search.folder / "curves.png", overwrite=True))
    except SystemExit:
        print("no learning curves: no episode ended")
    print(
        f"wrote {', '.join(kinds)} (.png) in {search.folder}; tensorboard --logdir {search.folder} has an HParams tab"
    )


def conclude(study: optuna.Study, search: Search) -> None:
    """Write and print what a study found, and the findings of `diagnose` on its best and worst trial."""
    trials, best = finished(valid_trials(study)), best_trial(study)
    states = [trial.state for trial in trials]
    print_line(f"{search.folder}: {len(trials)} of {search.num_trials} trials, {states.count(TrialState.PRUNED)} "
               f"pruned, {states.count(TrialState.FAIL)} failed")  # fmt: skip
    if len(trials) == search.num_combinations:
        print(f"all {len(trials)} combinations of --space are tried")
    if best is None:
        return print("no trial is complete: there is no best")
    save_best(search.space.settings(best.params), search.folder)
    draw_study(study, search)
    worst = (max if search.minimize else min)((t for t in trials if t.value is not None), key=lambda t: t.value)
    for rank, trial in {"best": best, "worst": worst}.items() if worst.number != best.number else [("best", best)]:
        print(f"trial {trial.number}, the {rank}:")
        try:
            diagnose.main(diagnose.Args(trial_runs(trial, search)[:1]))
        except SystemExit:
            print("  too short for a diagnosis")
    print(f"best: {describe(best, search)}")
    print(f"  python {search.args.script} --config {shlex.quote(str(search.folder / 'best.json'))}")


# The report of one-at-a-time and six-steps


def flags_text(settings: dict[str, Any]) -> str:
    """Settings as words of a command line."""

    def text(value):
        return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)

    return " ".join(plot.as_flag(name, text(value)) for name, value in settings.items())


def compare(search: Search, before: list[float], after: list[float]) -> str:
    """How much better `after` is than `before`, values over seeds, and whether that exceeds their spread."""
    show, objective = partial(format_value, search.args.objective), search.args.objective
    old, new = statistics.median(before), statistics.median(after)
    gain, spread = (old - new if search.minimize else new - old), max(max(v) - min(v) for v in (before, after))
    more = f"That is {'' if gain > spread else 'not '}more than the seeds' spread, {show(spread)} from worst to best."
    if len(before) == 1 or len(after) == 1:
        more = "With one seed, the spread over seeds is unknown."
    return (f"The winner's median {objective} is {show(new)}, the baseline's {show(old)}: "
            f"{'better' if gain >= 0 else 'worse'} by {show(abs(gain))}. {more}")  # fmt: skip


def write_report(search: Search, base: dict[str, Any], current: dict[str, Any], rows: list[Row], stopped: str) -> str:
    """Write report.md and report.png: what was tried, what won, and by how much. Returns the text.

    `base` and `current`: the flags before and after all steps; `stopped`: why the steps ended early, or "".
    """
    args, show = search.args, partial(format_value, search.args.objective)
    changed = {key: value for key, value in current.items() if value != base[key]}
    lines = [
        f"# {args.strategy}: {args.study}", "",
        f"Objective: {args.objective} on unseen terrain, the median over seeds {', '.join(map(str, args.seeds))}; "
        f"{base['total_timesteps']:,} steps each, `{args.script.name}`. Each step keeps its best change if that is "
        "better than what was kept before.", "",
        "Changes kept: " + (f"`{flags_text(changed)}`" if changed else "none: the baseline is best"), "",
    ]  # fmt: skip
    for number, step in enumerate(dict.fromkeys(row["step"] for row in rows), 1):
        lines += [f"## {number}. {step.capitalize()}", "",
                  f"| tried | median {args.objective} | seeds, worst to best |  |", "| --- | --- | --- | --- |"]  # fmt: skip
        for row in (row for row in rows if row["step"] == step):
            ends, note = sorted(row["values"], reverse=search.minimize), row["note"].replace("|", "/")
            seeds = f"{show(statistics.median(ends))} | {show(ends[0])} to {show(ends[-1])}" if ends else " | "
            lines.append(f"| `{row['label']}` | {seeds} | {'**kept**' if row['kept'] else note} |")
        lines.append("")
    kept = [row["values"] for row in rows if row["kept"]]
    validated = {row["label"]: row["values"] for row in rows if row["step"] == "validation"}
    if validated.get("baseline") and validated.get("winner"):
        fresh = " These seeds took no part in the choice." if not set(GUIDE_SEEDS) & set(args.seeds) else ""
        result = compare(search, validated["baseline"], validated["winner"]) + fresh
    elif len(kept) > 1:
        result = compare(search, kept[0], kept[-1]) + " The choice was made on these seeds, which favours the winner."
    else:
        result = "Nothing was better than the baseline."
    lines += ["## Result", "", result] + (["", stopped] if stopped else [])
    write(search.root / "report.md", lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    draw_report(args.objective, [row for row in rows if row["values"]], search.root / "report.png")
    return "\n".join(lines)


def draw_report(objective: str, rows: list[Row], path: Path) -> None:
    """Draw the seeds of each value tried as points and their median as a line; what is kept has another colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 2 + 0.7 * len(rows)), 4.5), layout="constrained")
    ax = figure.subplots()
    for x, row in enumerate(rows):
        color = plot.COLORS[1] if row["kept"] or row["label"] == "winner" else plot.COLORS[0]
        ax.plot([x] * len(row["values"]), row["values"], "o", ms=4, color=color, alpha=0.6)
        ax.hlines(statistics.median(row["values"]), x - 0.35, x + 0.35, color=color, lw=2)
        if row["step"] != rows[x - 1]["step"]:
            ax.axvline(x - 0.5, color="0.8", lw=1)
    labels = [f"{row['step']}: {row['label']}" if row["step"] == "validation" else row["label"] for row in rows]
    ax.set_xticks(range(len(rows)), labels, rotation=45, ha="right", size=7)
    ax.set_ylabel(objective)
    ax.set_title("points: seeds; line: their median; orange: kept", size=9)
    write(path, partial(figure.savefig, dpi=200))
