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

from ballbot_utils import diagnose, plot
from ballbot_utils.common import write
from ballbot_utils.console import print_rank0
from ballbot_utils.flags import config_json
from ballbot_utils.tune import Search
from ballbot_utils.tune.study import attempts, best_trial, finished, valid_trials
from ballbot_utils.tune.trial import format_value


def describe(trial: FrozenTrial, search: Search) -> str:
    """A finished trial in one line."""
    show, results = partial(format_value, search.args.objective), trial.user_attrs.get("results", {}).values()
    words = " ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in trial.params.items())  # fmt: skip
    if trial.state == TrialState.FAIL:
        return f"trial {trial.number} failed ({words}): {trial.user_attrs['reason']}"
    value = "" if trial.value is None else f" {search.args.objective} {show(trial.value)}"
    if trial.state == TrialState.PRUNED:
        return f"trial {trial.number} pruned after {trial.last_step:,} steps:{value} ({words})"
    spread = f" ({show(min(results))} to {show(max(results))})" if len(results) > 1 else ""
    return f"trial {trial.number}:{value}{spread} ({words})"


def report_trial(study: optuna.Study, trial: FrozenTrial, search: Search) -> None:
    """Print a finished trial, log it for TensorBoard's HParams tab, and save it if it is the best."""
    from torch.utils.tensorboard import SummaryWriter

    print_rank0(describe(trial, search))
    if trial.value is not None:
        with SummaryWriter(search.folder / "hparams" / f"trial-{trial.number}") as writer:
            writer.add_hparams(dict(trial.params), {f"tune/{search.args.objective}": trial.value}, run_name=".")
    best = best_trial(study)
    if best and best.number == trial.number:
        save_best(search.space.settings(trial.params), search.folder)


def save_best(settings: dict[str, Any], folder: Path) -> None:
    """Write best.json, which both scripts read by --config."""
    write(folder / "best.json", lambda part: part.write_text(config_json(settings)))


def trial_runs(trial: FrozenTrial, search: Search) -> tuple[Path, ...]:
    """The folder of each seed's run that has a log; a seed's newest attempt counts."""
    runs = {seed: run for number in [*attempts(trial), trial.number] for seed in search.seeds
            if any((run := search.folder / f"trial-{number}-seed-{seed}").glob(plot.EVENT_FILES))}  # fmt: skip
    return tuple(runs.values())


def draw_study(study: optuna.Study, search: Search) -> None:
    """Draw Optuna's pictures of a study, and the learning curves of its three best trials."""
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
    ranked = sorted(complete, key=lambda trial: trial.value, reverse=search.best is max)
    runs = tuple(run for trial in ranked[:3] for run in trial_runs(trial, search))
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
    print_rank0(f"{search.folder}: {len(trials)} of {search.num_trials} trials, {states.count(TrialState.PRUNED)} "
               f"pruned, {states.count(TrialState.FAIL)} failed")  # fmt: skip
    if len(trials) == len(search.combinations or ()):
        print(f"all {len(trials)} combinations of --space are tried")
    if best is None:
        return print("no trial is complete: there is no best")
    save_best(search.space.settings(best.params), search.folder)
    draw_study(study, search)
    by_value = {trial.value: trial for trial in trials if trial.value is not None}
    worst = by_value[(min if search.best is max else max)(by_value)]
    for rank, trial in ({worst.number: ("worst", worst)} | {best.number: ("best", best)}).values():
        print(f"trial {trial.number}, the {rank}:")
        try:
            diagnose.main(diagnose.Args(trial_runs(trial, search)[:1]))
        except SystemExit:
            print("  too short for a diagnosis")
    print(f"best: {describe(best, search)}")
    print(f"  python {search.args.script} --config {shlex.quote(str(search.folder / 'best.json'))}")


# The report of one-at-a-time and six-steps


def compare(search: Search, before: list[float], after: list[float]) -> str:
    """How much better `after` is than `before`, values over seeds, and whether that exceeds their spread."""
    show, old, new = partial(format_value, search.args.objective), statistics.median(before), statistics.median(after)
    better, spread = search.best(old, new) == new, max(max(values) - min(values) for values in (before, after))
    more = f"That is {'' if abs(new - old) > spread else 'not '}more than the spread over seeds, {show(spread)}."
    if len(before) == 1:
        more = "With one seed, the spread over seeds is unknown."
    return (f"The winner's median {search.args.objective} is {show(new)}, the baseline's {show(old)}: "
            f"{'better' if better else 'worse'} by {show(abs(new - old))}. {more}")  # fmt: skip


def write_report(search: Search, lines: list[str], tried: list[tuple[str, list[float], bool]]) -> None:
    """Write report.md, the lines, and report.png, the values over seeds of what was tried, [(label, values, kept)]."""
    from matplotlib.figure import Figure

    write(search.root / "report.md", lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    figure = Figure(figsize=(max(6, 2 + 0.7 * len(tried)), 4.5), layout="constrained")
    ax = figure.subplots()
    for x, (_, values, kept) in enumerate(tried):
        ax.plot([x] * len(values), values, "o", ms=4, color=plot.COLORS[kept], alpha=0.6)
        ax.hlines(statistics.median(values), x - 0.35, x + 0.35, color=plot.COLORS[kept], lw=2)
    ax.set_xticks(range(len(tried)), [label for label, _, _ in tried], rotation=45, ha="right", size=7)
    ax.set_ylabel(search.args.objective)
    ax.set_title("points: seeds; line: their median; orange: kept", size=9)
    write(search.root / "report.png", partial(figure.savefig, dpi=200))
