"""The program: check the flags, then run one study, or one study for each step."""

import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from optuna.trial import TrialState

import ballbot_env
from ballbot_utils import tune
from ballbot_utils.common import require_min, run_program
from ballbot_utils.console import check_argument
from ballbot_utils.flags import format_flags
from ballbot_utils.tune import GUIDE_SEEDS, SIX_STEPS, Args, Search
from ballbot_utils.tune.report import compare, conclude, describe, report_trial, save_best, write_report
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
from ballbot_utils.tune.study import (
    best_trial,
    configure_process,
    exit_on_machine_fault,
    finished,
    run_study,
    valid_trials,
)

Changes = dict[str, dict[str, Any]]  # {label: {flag: value}}


def list_steps(args: Args, module: ModuleType) -> dict[str, Changes]:
    """The steps of one-at-a-time or six-steps, {title: changes to try}, between baseline and validation."""
    texts = SIX_STEPS if args.strategy == "six-steps" else {text.partition("=")[0]: text for text in args.space}
    steps = {"baseline": {"baseline": {}}}
    for title, text in texts.items():
        ((key, values),) = on_grid(parse_space([text], module), args.points).items()
        changes = [dict.fromkeys(key.split("+"), value) for value in values]
        steps[title] = {format_flags(change): change for change in changes} if len(changes) > 1 else {}
    return steps | ({"validation": {}} if args.strategy == "six-steps" else {})


def run_steps(args: Args, module: ModuleType, base: dict[str, Any], deadline: float) -> None:
    """Run a study for each step on top of the best changes so far, and write the report after each."""
    current, best, kept, tried, stopped = dict(base), None, [], [], ""
    lines = [f"# {args.strategy}: {args.study}", "",
             f"Objective: {args.objective} on unseen terrain, the median (and range) over seeds; `{args.script.name}`, "
             f"{base['total_timesteps']:,} steps. Each step keeps its best change if it improves."]  # fmt: skip
    for number, (title, changes) in enumerate(list_steps(args, module).items(), 1):
        validation = title == "validation"
        if validation:
            changes = {"baseline": base, "winner": current} if current != base else {"baseline": base}
        elif title != "baseline":
            changes = {label: change for label, change in changes.items() if current | change != current}
        errors = {label: find_error(module, current | change) for label, change in changes.items()}
        possible = [label for label, error in errors.items() if not error]
        lines += ["", f"## {number}. {title.capitalize()}", "",
                  *(f"- impossible: {label}: {error}" for label, error in errors.items() if error)]  # fmt: skip
        if not possible:
            continue
        space = Space(current, {"change": possible}, {"change": changes})
        name, seeds = f"{args.study}/{number}-" + re.sub(r"\W+", "-", title), GUIDE_SEEDS if validation else args.seeds
        search = Search(args, name, space, space.combinations(), len(possible), seeds, deadline)
        study = run_study(search, report_trial)
        trials, winner, values = finished(valid_trials(study)), best_trial(study), {}
        if winner and not validation and (best is None or search.best(winner.value, best) != best):
            best, current = winner.value, current | changes[winner.params["change"]]
            kept.append(winner.params["change"])
        for trial in trials:
            label, keep = trial.params["change"], not validation and trial.params["change"] in kept
            lines.append(f"- {'**kept** ' if keep else ''}{describe(trial, search)}")
            if trial.state == TrialState.COMPLETE:
                values[label] = list(trial.user_attrs["results"].values())
                tried.append((f"{title}: {label}", values[label], keep))
        save_best(current, search.root)
        if len(trials) < len(possible):
            stopped = f"It ended in step {number}, {title}; the same command resumes there."
        elif not kept:
            stopped = "The baseline failed: there is nothing to compare with."
        if stopped:
            break
    changed = {key: value for key, value in current.items() if value != base[key]}
    lines += ["", "## Result", "", "Changes kept: " + (f"`{format_flags(changed)}`" if changed else "none") + "."]
    results = [values for _, values, keep in tried if keep]
    if not stopped and validation and len(values) == 2:
        fresh = " These seeds took no part in the choice." if not set(GUIDE_SEEDS) & set(args.seeds) else ""
        lines.append(compare(search, values["baseline"], values["winner"]) + fresh)
    elif len(results) > 1:
        lines.append(compare(search, results[0], results[-1]))
        lines.append("The choice was made on these seeds, which favours the winner.")
    write_report(search, [*lines, stopped] if stopped else lines, tried)
    print((search.root / "report.md").read_text(encoding="utf-8"))
    print(f"wrote report.md, report.png and best.json: python {args.script} --config {search.root}/best.json")


@exit_on_machine_fault()
def main(args: Args, flags: list[str]) -> None:
    """Run the strategy; `flags`: the words after `--`."""
    check_argument(
        re.fullmatch(r"(?!\.+$)[\w.-]*", args.study), f"--study is {args.study}: give letters, digits, ., - and _"
    )
    require_min(args, 2, "points")
    require_min(args, 1, "hold", "workers", "heartbeat", "trials")
    require_min(args, 0, "startup_trials", "warmup_steps")
    check_argument(args.budget_minutes > 0, f"--budget-minutes is {args.budget_minutes}: give more than 0")
    check_argument(args.seeds and len(set(args.seeds)) == len(args.seeds), "--seeds are none, or one is given twice")
    stepwise, grid = args.strategy in ("one-at-a-time", "six-steps"), args.strategy == "grid"
    check_argument(
        not (stepwise and args.trials), f"--trials has no effect with {args.strategy}: its steps have their own"
    )
    check_argument(
        args.strategy != "six-steps" or args.space == SPACE, "--space has no effect with six-steps: it has the guide's"
    )
    configure_process()
    installed = Path(ballbot_env.__file__).with_name(args.script.name)
    script = args.script if args.script.exists() or not installed.is_file() else installed
    args = replace(args, study=args.study or f"tune-{args.strategy}", script=script)
    module, base = load_script(args.script, flags)
    deadline = time.time() + 60 * args.budget_minutes
    try:
        if args.strategy == "six-steps":
            error = find_error(module, base)
            check_argument(not error, f"the flags after --: {error}")
            return run_steps(args, module, base, deadline)
        specs = parse_space(args.space, module)
        space = build_space(on_grid(specs, args.points) if grid else specs, module, base)
        if stepwise:
            return run_steps(args, module, base | fixed_values(specs), deadline)
        size = math.prod(map(len, space.specs.values()))
        fits = args.trials or not grid or size <= 1000
        check_argument(fits, f"the grid has {size:,} combinations: give a smaller --space, or --trials")
        combinations = space.combinations() if args.strategy != "tpe" else None
        num_trials = min(args.trials or (size if grid else 20), len(combinations) if combinations else math.inf)
        search = Search(args, args.study, space, combinations, num_trials, args.seeds, deadline)
        conclude(run_study(search, report_trial), search)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")


def cli() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv[0] = sys.argv[0].replace("/__main__.py", ".py")  # for the name in --help
    run_program(lambda args: main(args, sys.argv[cut + 1 :]), Args, description=tune.__doc__, args=sys.argv[1:cut])


if __name__ == "__main__":
    cli()
