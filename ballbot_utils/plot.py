"""Learning curves of several runs and seeds: `python -m ballbot_utils.plot runs/a_seed1 runs/a_seed2 runs/b_seed1`.

Runs that differ only in their seed are one group: a line is the median over its seeds at equal steps, with a band for
their range (from 5 seeds on, their quartiles). A PNG and an SVG show return and length, against steps and against the
minutes of the median seed. Reads evaluations from metrics.jsonl, where a run has it, and the rest from TensorBoard's
events. It also reads runs that are still being trained. It shows what was logged: where training episodes are shorter
than those of evaluations, their returns are smaller.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ballbot_utils.common import require_packages, require_writable, run_program, write
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.flags import format_flags
from ballbot_utils.runs import TARGET_LENGTH, TARGET_RETURN, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENT_FILES = "events.out.tfevents.*"
# One row of panels each: title, tags of the training means and of the deterministic evaluations, target
ROWS = (
    ("episode return", "charts/episodic_return_mean100", "eval/episodic_return", TARGET_RETURN),
    ("episode length (steps)", "charts/episodic_length_mean100", "eval/episodic_length", TARGET_LENGTH),
)
TAGS = tuple(tag for row in ROWS for tag in row[1:3])
IGNORED = ("run_name", "seed", "resume", "config", "preset", "num_processes", "num_threads", "capture_video", "track",
           "wandb_project_name", "wandb_entity", "script", "script_sha256")  # within a group  # fmt: skip
EVAL_STEPS = 4000  # length of an evaluation's episodes, steps
QUARTILES_FROM = 5  # seeds
MAX_FLAGS = 4  # in a legend entry
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito's, without yellow
MARKERS = "os^Dv<>"
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # steps, minutes, values


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, runs/<name>"""
    output: Path = Path("learning_curves.png")
    """file to write; the SVG and the PNG have the same name"""
    overwrite: bool = False
    """replace outputs that exist"""
    labels: tuple[str, ...] = ()
    """names of the groups in the legend, in the order of their first runs; default: the flags that differ"""
    lqr: float | None = None
    """return of the LQR baseline, python -m ballbot_utils.lqr: a line to compare with"""


def check_runs(runs: Sequence[Path]) -> None:
    """Exit with one line on the first of `runs` that is not the folder of a run."""
    check_argument(runs, "no runs given: give folders of runs, runs/<name>")
    for run in runs:
        problem = "is not a folder" if run.exists() else "does not exist"
        check_argument(run.is_dir(), f"{run} {problem}: give folders of runs, runs/<name>")
        check_argument(any(run.glob(EVENT_FILES)), f"{run} has no TensorBoard log, no {EVENT_FILES}")
    check_argument(len({run.resolve() for run in runs}) == len(runs), "a run is given twice")


def read_run(run: Path, tags: Sequence[str] = TAGS) -> tuple[dict[str, Any], dict[str, Curve]]:
    """The flags of a run, {name: value}, and its curves, {tag: (steps, minutes, values)}, arrays.

    Flags come from config.json; the dict is empty if this is missing or damaged. Minutes count from the first start,
    with evaluations and without pauses. Each start or resume of a run has its own event file. After a resume, repeated
    steps replace the earlier ones; if a step has several values (the last evaluation), the latest counts.
    """
    try:
        flags = {"run_name": run.name, **json.loads((run / "config.json").read_bytes())}
    except (OSError, ValueError, TypeError):
        flags = {}
    points, paused_at = {tag: {} for tag in tags}, 0.0
    for file in sorted(run.glob(EVENT_FILES)):
        log = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in points.keys() & log.Tags()["scalars"]:
            start = log.FirstEventTimestamp()
            new = {e.step: (paused_at + (e.wall_time - start) / 60, e.value) for e in log.Scalars(tag)}
            points[tag] = {step: point for step, point in points[tag].items() if step < min(new)} | new
        paused_at = max((minutes for curve in points.values() for minutes, _ in curve.values()), default=0.0)
    if evaluations := [entry for entry in read_metrics(run) if entry["kind"] != "best"]:
        for tag in (tag for tag in tags if tag.startswith("eval/")):
            name = tag.removeprefix("eval/")
            points[tag] = {entry["global_step"]: (entry["seconds"] / 60, entry[name]) for entry in evaluations}
    curves = {}
    for tag, curve in points.items():
        steps, minutes, values = np.array([(s, *curve[s]) for s in sorted(curve)]).reshape(-1, 3).T
        finite = np.isfinite(values)
        minutes = np.maximum.accumulate(minutes)  # the machine's clock may be set back
        curves[tag] = steps[finite], minutes[finite], values[finite]
    return flags, curves


def group_runs(flags: list[dict[str, Any]]) -> list[list[int]]:
    """Lists of indices of the runs that differ only in IGNORED flags, in the order of their first runs."""
    groups = {}
    for i, params in enumerate(flags):
        key = json.dumps({name: value for name, value in params.items() if name not in IGNORED}, sort_keys=True)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def differing_flags(flags: list[dict[str, Any]]) -> list[list[str]]:
    """For each group, the flags that not all groups share: `["--clip-coef 0.2", "--no-norm-adv"]`."""
    names = [name for name in dict.fromkeys(name for params in flags for name in params)
             if name not in IGNORED and any(params.get(name) != flags[0].get(name) for params in flags)]  # fmt: skip
    return [[format_flags({name: params[name]}) for name in names if name in params] for params in flags]


def has_short_episodes(flags: dict[str, Any]) -> bool:
    """Whether a run's training episodes are shorter than those of evaluations."""
    return flags.get("max_episode_steps", EVAL_STEPS) < EVAL_STEPS


def common_grid(curves: list[Curve], num: int = 500) -> Curve:
    """The runs of a group, a list of (steps, minutes, values), interpolated at even steps that all of them have.

    Returns steps (num,), the median minutes at which runs got there (num,), and values (runs, num). There is one point
    if the curves share one step, and none if they share no step.
    """
    first, last = max(steps[0] for steps, _, _ in curves), min(steps[-1] for steps, _, _ in curves)
    grid = np.unique(np.linspace(first, last, num)) if first <= last else np.empty(0)
    minutes = np.array([np.interp(grid, steps, minutes) for steps, minutes, _ in curves])
    return grid, np.median(minutes, 0), np.array([np.interp(grid, steps, values) for steps, _, values in curves])


def median_and_band(values: np.ndarray) -> np.ndarray:
    """Median, low and high (n,) of values (seeds, n): the band is the range, from 5 seeds on the quartiles."""
    band = (25, 75) if len(values) >= QUARTILES_FROM else (0, 100)
    return np.percentile(values, (50, *band), axis=0)


def common_evaluations(curves: list[Curve]) -> Curve:
    """Evaluations at the steps that all runs share, as `common_grid`: steps (n,), minutes (n,), values (runs, n)."""
    steps = sorted(set.intersection(*(set(steps) for steps, _, _ in curves)))
    columns = [np.searchsorted(curve[0], steps) for curve in curves]
    minutes, values = (np.array([curve[k][i] for curve, i in zip(curves, columns)]) for k in (1, 2))
    return np.array(steps), np.median(minutes, 0), values


def draw_figure(groups: list[list[dict[str, Curve]]], labels: Sequence[str], lqr: float | None = None) -> "Figure":
    """The figure of `groups`, a list of its runs' curves (of `read_run`) each; `lqr` is a return to mark."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter

    fig = Figure(figsize=(10, 6.5), layout="constrained")
    axes = fig.subplots(2, 2, sharex="col", sharey="row")
    entries, evaluated = [], False
    for i, (runs, label) in enumerate(zip(groups, labels)):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        dashes = ("-", "--", ":", "-.")[i // len(COLORS) % 4]
        label += f" ({len(runs)} seeds)" if len(runs) > 1 else ""
        entries.append(Line2D([], [], color=color, ls=dashes, marker=marker, label=textwrap.fill(label, 130)))
        for row, (_, training, evaluation, _) in enumerate(ROWS):
            curve = common_grid([run[training] for run in runs])
            points = common_evaluations([run[evaluation] for run in runs])
            evaluated |= len(points[0]) > 0
            line, lower, upper = median_and_band(curve[2])
            median, low, high = median_and_band(points[2])
            for column, ax in enumerate(axes[row]):
                ax.plot(curve[column], line, color=color, ls=dashes, lw=1.5, marker="." if len(line) == 1 else "")
                if len(runs) > 1:
                    ax.fill_between(curve[column], lower, upper, color=color, alpha=0.18, lw=0)
                ax.errorbar(
                    points[column], median, (median - low, high - median) if len(runs) > 1 else None,
                    color=color, ls="", marker=marker, ms=5, elinewidth=1, zorder=3,
                )  # fmt: skip

    for (name, _, _, target), (left, right) in zip(ROWS, axes):
        left.set_ylabel(name)
        for ax in (left, right):
            ax.grid(color="0.92")
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
        bottom, top = left.get_ylim()  # of both
        near = top > target / 3  # otherwise it would squash the curves, and is named at the top
        marked = lqr if name == ROWS[0][0] else None
        top = max(top, 1.05 * target, marked or 0) if near else top
        left.set_ylim(min(bottom, 0) if min(left.dataLim.ymin, right.dataLim.ymin) < 0 else 0, top)
        for ax in (left, right) if near else ():
            ax.axhline(target, color="0.35", ls=(0, (4, 3)), lw=1, zorder=1)
        at, y = ("target", target) if near else ("↑ target", left.get_ylim()[1])
        right.annotate(f"{at}\n> {target}", (1, y), (4, 0), right.get_yaxis_transform(), "offset points",
                       va="center" if near else "top", color="0.35", size=8)  # fmt: skip
        if marked is not None:
            for ax in (left, right) if near else ():
                ax.axhline(marked, color="0.35", ls=":", lw=1, zorder=1)
            at, y, up = ("LQR", marked, 3) if near else ("↑ LQR", y, -9)
            left.annotate(f"{at}: {marked:g}", (0, y), (4, up), left.get_yaxis_transform(), "offset points",
                          color="0.35", size=8)  # fmt: skip
    for ax, name in zip(axes[1], ("environment steps", "wall-clock time (minutes)")):
        ax.set_xlabel(name)
        ax.set_xlim(left=0)
    axes[1, 0].xaxis.set_major_formatter(EngFormatter(sep="\N{NARROW NO-BREAK SPACE}"))

    signs = [Line2D([], [], color="0.35", label="training: mean of the last 100 episodes")]
    if evaluated:
        signs.append(Line2D([], [], color="0.35", ls="", marker="o", label="evaluation: deterministic"))
    if any(len(runs) > 1 for runs in groups):
        note = f" (quartiles from {QUARTILES_FROM} seeds on)" if max(map(len, groups)) >= QUARTILES_FROM else ""
        signs.append(Patch(color="0.35", alpha=0.25, lw=0, label=f"range over seeds{note}"))
    widths = [len(entry.get_label()) + 9 for entry in entries]  # in letters, of which some 145 fit side by side
    columns = len(entries) if sum(widths) <= 145 else max(1, 145 // max(widths))
    fig.legend(handles=entries, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    fig.legend(handles=signs, loc="outside lower center", ncols=len(signs), frameon=False, fontsize=9)
    return fig


def main(args: Args) -> None:
    check_runs(args.runs)
    files = args.output.with_suffix(".png"), args.output.with_suffix(".svg")
    for file in (args.output, *files):
        require_writable("--output", file, args.overwrite, ".png", ".svg")
    require_packages("plotting", "matplotlib")
    runs, flags, curves = [], [], []
    for run in args.runs:
        params, curve = read_run(run)
        if not all(len(curve[training][0]) for _, training, _, _ in ROWS):
            print(f"note: {run} is left out: its log has no finished episodes yet, or is damaged")
            continue
        check_argument(params, f"{run} has no valid config.json: was it written by ppo_ballbot.py?")
        runs.append(run)
        flags.append(params)
        curves.append(curve)
    check_argument(runs, "nothing to plot: none of the runs has a finished episode in its log")

    groups = group_runs(flags)
    differences = differing_flags([flags[group[0]] for group in groups])
    if args.labels and len(args.labels) != len(groups):
        first = ", ".join(runs[group[0]].name for group in groups)
        exit_with_error(f"{len(args.labels)} --labels for {len(groups)} groups, whose first runs are {first}")
    labels = args.labels
    if not labels and 1 <= max(map(len, differences)) <= MAX_FLAGS:
        labels = [" ".join(words) for words in differences]
    elif not labels:  # a single group, or too many flags for a legend: they are printed
        names = [[runs[i].name for i in group] for group in groups]
        labels = [", ".join(few) if len(few) <= 3 else f"{few[0]} … {few[-1]}" for few in names]

    for group, words, label in zip(groups, differences, labels):
        params = flags[group[0]]
        print(label if label == " ".join(words) else f"{label} {' '.join(words)}".strip())
        print("  " + ", ".join(f"{runs[i]} (seed {flags[i].get('seed')})" for i in group))
        for name, training, _, _ in ROWS:
            steps, minutes, values = common_grid([curves[i][training] for i in group])
            if len(steps):
                median, low, high = median_and_band(values)[:, -1]
                band = f" ({low:.1f} to {high:.1f})" if len(group) > 1 else ""
                print(f"  {name} at {steps[-1]:,.0f} steps, {minutes[-1]:.1f} minutes: {median:.1f}{band}")
        if has_short_episodes(params):
            print(f"  note: training episodes last {params['max_episode_steps']} steps, evaluations {EVAL_STEPS}: "
                  "their returns and lengths cannot be compared")  # fmt: skip
        ends = [curves[i][ROWS[0][1]][0][-1] for i in group]
        if min(ends) < 0.95 * max(ends):
            print(f"  note: the line ends with the shortest run, {runs[group[int(np.argmin(ends))]]}: "
                  f"{min(ends):,.0f} steps, the longest has {max(ends):,.0f}")  # fmt: skip

    import matplotlib

    fig = draw_figure([[curves[i] for i in group] for group in groups], labels, args.lqr)
    with matplotlib.rc_context({"svg.hashsalt": "ballbot"}):  # the same curves make the same file
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            write(file, partial(fig.savefig, dpi=200, metadata=metadata))
    print(f"wrote {files[0]} and {files[1]}")


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
