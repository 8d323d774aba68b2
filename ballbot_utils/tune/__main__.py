"""The program: check the flags, then run one study, or one study for each step."""

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from optuna.trial import TrialState

import ballbot_runs
from ballbot_utils import tune
from ballbot_utils.common import clear_progress, command, need, need_from
from ballbot_utils.tune import GUIDE_SEEDS, SIX_STEPS, Args, Search
from ballbot_utils.tune.report import conclude, flags_text, report_trial, save_best, write_report
from ballbot_utils.tune.space import (
    SPACE,
    Space,
    build_space,
    find_error,
    fixed_values,
    load_script,
    on_grid,
    parse_space,
)
from ballbot_utils.tune.study import best_trial, configure_process, exit_on_machine_fault, run_study, valid_trials


def list_steps(args: Args, module: ModuleType) -> dict[str, dict[str, dict[str, Any]]]:
    """The steps of one-at-a-time or six-steps: {title: {label: {flag: value}}}."""
    titles = SIX_STEPS if args.strategy == "six-steps" else {text.partition("=")[0]: text for text in args.space}
    steps = {}
    for title, text in titles.items():
        ((key, values),) = on_grid(parse_space([text], module), args.points).items()
        changes = [dict.fromkeys(key.split("+"), value) for value in values]
        steps[title] = {flags_text(change): change for change in changes} if len(changes) > 1 else {}
    return steps


def run_steps(args: Args, module: ModuleType, base: dict[str, Any], deadline: float) -> None:
    """Run a study for each step, keep the best value of each, and write the report."""
    steps = {"baseline": {"baseline": {}}, **list_steps(args, module)}
    if args.strategy == "six-steps":
        steps["validation"] = {}
    current, best_value, rows, stopped, report = dict(base), None, [], "", ""
    for number, (title, changes) in enumerate(steps.items(), 1):
        seeds = GUIDE_SEEDS if title == "validation" else args.seeds
        if title == "validation":
            changes = {"baseline": base} | ({"winner": current} if current != base else {})
        elif title != "baseline":
            changes = {label: change for label, change in changes.items() if current | change != current}
        errors = {label: find_error(module, current | change) for label, change in changes.items()}
        changes = {label: change for label, change in changes.items() if not errors[label]}
        rows += [dict(step=title, label=label, values=[], kept=False, note=f"impossible: {error}")
                 for label, error in errors.items() if error]  # fmt: skip
        if not changes:
            continue
        space = Space(current, {"change": list(changes)}, {"change": changes})
        name = f"{args.study}/{number}-" + re.sub(r"\W+", "-", title)
        search = Search(args, name, space, seeds, len(changes), True, deadline)
        study = run_study(search, report_trial)
        best, by_label = best_trial(study), {trial.params.get("change"): trial for trial in valid_trials(study)}
        better = title != "validation" and best is not None and (
            best_value is None or (best.value < best_value if search.minimize else best.value > best_value))  # fmt: skip
        for label in changes:
            trial = by_label.get(label)
            state = trial.state if trial else TrialState.WAITING
            note = {TrialState.COMPLETE: "", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}.get(
                state, "not run"
            )
            if state == TrialState.FAIL:
                note += f": {trial.user_attrs['reason']}"
            values = list(trial.user_attrs["results"].values()) if state == TrialState.COMPLETE else []
            kept = better and trial.number == best.number if trial else False
            rows.append(dict(step=title, label=label, values=values, note=note, kept=kept))
        if better:
            best_value, current = best.value, current | changes[best.params["change"]]
        save_best(current, Path("runs") / args.study)
        if any(row["note"] == "not run" for row in rows):
            stopped = f"It ended in step {number}, {title}; the same command resumes there."
        elif title == "baseline" and not better:
            stopped = "The baseline failed: there is nothing to compare with."
        report = write_report(search, base, current, rows, stopped)
        if stopped:
            break
    clear_progress()
    folder = Path("runs") / args.study
    print(report)
    print(f"wrote {folder}/report.md, report.png and best.json: python {args.script} --config {folder}/best.json")


@exit_on_machine_fault()
def main(args: Args, flags: list[str]) -> None:
    """Run the strategy; `flags`: the words after `--`."""
    need(re.fullmatch(r"(?!\.+$)[\w.-]*", args.study), f"--study is {args.study}: give letters, digits, ., - and _")
    need_from(args, 2, "points")
    need_from(args, 1, "hold", "workers", "heartbeat", "trials")
    need_from(args, 0, "startup_trials", "warmup_steps")
    need(args.budget_minutes > 0, f"--budget-minutes is {args.budget_minutes}: give more than 0")
    need(args.seeds and len(set(args.seeds)) == len(args.seeds), "--seeds are none, or one is given twice")
    stepwise, grid = args.strategy in ("one-at-a-time", "six-steps"), args.strategy == "grid"
    need(not (stepwise and args.trials), f"--trials means nothing with {args.strategy}: its steps have their own")
    need(
        args.strategy != "six-steps" or args.space == SPACE, "--space means nothing with six-steps: it has the guide's"
    )
    configure_process()
    installed = Path(ballbot_runs.__file__).with_name(args.script.name)
    script = args.script if args.script.exists() or not installed.is_file() else installed
    args = replace(args, study=args.study or f"tune-{args.strategy}", script=script)
    module, base = load_script(args.script, flags)
    deadline = time.time() + 60 * args.budget_minutes
    try:
        if args.strategy == "six-steps":
            error = find_error(module, base)
            need(not error, f"the flags after --: {error}")
            return run_steps(args, module, base, deadline)
        specs = parse_space(args.space, module)
        space = build_space(on_grid(specs, args.points) if grid else specs, module, base)
        if args.strategy == "one-at-a-time":
            return run_steps(args, module, base | fixed_values(specs), deadline)
        search = Search(args, args.study, space, args.seeds, 0, grid, deadline)
        size = search.num_combinations
        need(args.trials or not grid or size <= 1000, f"the grid has {size:,} combinations: give a smaller --space, or "
             "--trials")  # fmt: skip
        search.num_trials = min(args.trials or (size if grid else 20), size)
        search.given = space.parameters(base) if args.strategy == "tpe" else None
        if flags and args.strategy == "tpe" and not search.given:
            print("the flags after -- lie outside --space: no trial has them, and TPE does not start near them")
        conclude(run_study(search, report_trial), search)
    except KeyboardInterrupt:
        clear_progress()
        sys.exit("stopped; the same command resumes")


def cli() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv[0] = sys.argv[0].replace("/__main__.py", ".py")  # for the name in --help
    command(lambda args: main(args, sys.argv[cut + 1 :]), Args, description=tune.__doc__, args=sys.argv[1:cut])


if __name__ == "__main__":
    cli()
