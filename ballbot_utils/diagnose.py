"""Find what is wrong in training runs, and what to do: `python -m ballbot_utils.diagnose runs/a_seed1 runs/a_seed2`.

Looks for the problems in the troubleshooting section of openballbot-rl's hyperparameter guide (not learning, unstable,
slow, overfitting) and for their causes: entropy collapse or growth, a value function that explains little, and updates
of the policy (KL divergence) that are too large or too small. Each finding comes with its evidence and with flags to
paste. Then it applies the guide's rule for when to stop, over all seeds: runs that differ only in their seed are one
group. Reads the same logs as `python -m ballbot_utils.plot`, also of runs that are still being trained.

Evaluations alone count as soon as a run has two. Training acts with noise: a robot that learns to drive faster may
fall more often in training, and never in evaluations. Training returns say nothing if training episodes are shorter
than the task's, or if the run started from a policy (--init-from). A run that meets the targets has no findings. A run
of another algorithm than PPO is rejected.

Each finding is a function of a curve's steps and values, with its threshold above it. Where the guide gives no number,
the threshold comes from runs of this project, with a margin to healthy ones.
"""

import json
import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from ballbot_utils import plot
from ballbot_utils.checkpoints import find_script, import_script
from ballbot_utils.common import require_writable, run_program, write
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.flags import format_flags, ineffective_flags, validate_args, validate_types
from ballbot_utils.runs import NETWORK_FLAGS, TARGET_LENGTH, TARGET_RETURN
from ppo_ballbot import PRESETS

RETURN, LENGTH = "charts/episodic_return_mean100", "charts/episodic_length_mean100"
EVAL_RETURN, EVAL_LENGTH, EVAL_FALLS = "eval/episodic_return", "eval/episodic_length", "eval/falls"
KL, EXPLAINED = "losses/approx_kl", "losses/explained_variance"
STD = "charts/action_std"
TAGS = (RETURN, LENGTH, EVAL_RETURN, EVAL_LENGTH, EVAL_FALLS, KL, EXPLAINED, STD)
# Logged in each iteration of PPO, and flags that its remedies change: a run of another algorithm is not diagnosed
PPO_TAGS, PPO_FLAGS = (KL, EXPLAINED, STD), ("clip_coef", "learning_rate")
WINDOW = 10  # iterations whose median smooths a curve
Curve = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, runs/<name>"""
    json: str = ""
    """file for all findings; - is standard output, instead of the text"""
    overwrite: bool = False
    """replace a --json file that exists"""


def read_run(run: Path) -> tuple[dict[str, Any], dict[str, Curve]]:
    """The flags of a run, {name: value}, and its curves, {tag: (steps, values)}, arrays."""
    flags, curves = plot.read_run(run, TAGS)
    return flags, {tag: (steps, values) for tag, (steps, _, values) in curves.items()}


def counts_evaluations_only(flags: dict[str, Any], curves: dict[str, Curve]) -> bool:
    """Whether evaluations alone measure a run's progress."""
    evaluated = len(curves[EVAL_RETURN][1]) >= EVAL_TIMES
    return evaluated or plot.has_short_episodes(flags) or bool(flags.get("init_from"))


def last_result(curves: dict[str, Curve], evaluations_only: bool) -> tuple[float, float] | None:
    """Return and length of the last evaluation, or else of training; None if neither counts."""
    for tags in ((EVAL_RETURN, EVAL_LENGTH), (RETURN, LENGTH))[: 1 if evaluations_only else 2]:
        if all(len(curves[tag][1]) for tag in tags):
            return tuple(curves[tag][1][-1] for tag in tags)


def meets_targets(result: tuple[float, float] | None) -> bool:
    """Whether return and length exceed the guide's targets."""
    return result is not None and result[0] > TARGET_RETURN and result[1] > TARGET_LENGTH


def smooth(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Medians over WINDOW iterations (of a short curve, over a quarter of it), each at its window's last step."""
    if not len(values):
        return steps, values
    n = min(WINDOW, max(1, len(values) // 4))
    return steps[n - 1 :], np.median(np.lib.stride_tricks.sliding_window_view(values, n), 1)


# Findings: the evidence as text, or None

# Without learning, means of 100 episodes differ by up to 10 %. Healthy runs return half as much again, or more, at
# 250,000 steps.
LEARNING_FROM, LEARNING_AFTER, LEARNING_GAIN = 100_000, 250_000, 1.2


def not_learning(steps: np.ndarray, returns: np.ndarray) -> str | None:
    """The return never rose above its value in the first 100,000 steps."""
    if not len(steps) or steps[-1] < LEARNING_AFTER:
        return None
    early = steps <= max(LEARNING_FROM, steps[0])
    start, until = np.median(returns[early]), steps[early][-1]
    steps, returns = smooth(steps, returns)
    best = returns.argmax()
    if returns[best] >= LEARNING_GAIN * start:
        return None
    return (f"return {start:.1f} in the first {until:,.0f} steps and never more than {returns[best]:.1f} "
            f"(at {steps[best]:,.0f}) in {steps[-1]:,.0f}")  # fmt: skip


def evaluations_flat(steps: np.ndarray, returns: np.ndarray) -> str | None:
    """Evaluations never rose above the first, and return less than standing still."""
    if len(steps) < EVAL_TIMES or steps[-1] < LEARNING_AFTER:
        return None
    if returns.max() >= min(LEARNING_GAIN * returns[0], STANDING):
        return None
    return (f"evaluations return {returns[0]:.1f} at {steps[0]:,.0f} steps and never more than {returns.max():.1f} in "
            f"{steps[-1]:,.0f}")  # fmt: skip


# In healthy runs the mean of 100 training episodes decreases by up to 20 % for a while, and evaluations by 7 %. The
# guide also names a policy loss that oscillates and a value loss that rises, but good runs have both: the value loss of
# one `conservative` that met the targets rose to 36 times its lowest, and that of one `aggressive` that failed to 6.
RETURN_DROP = 0.25


def return_falling(steps: np.ndarray, returns: np.ndarray, whose: str = "") -> str | None:
    """The return is below its best."""
    if not len(steps) or returns.max() <= 0:
        return None
    best = returns.argmax()
    drop = 1 - returns[-1] / returns[best]
    if drop < RETURN_DROP:
        return None
    return (f"{whose}return {returns[best]:.1f} at {steps[best]:,.0f} steps, {returns[-1]:.1f} at {steps[-1]:,.0f}: "
            f"{100 * drop:.0f} % down")  # fmt: skip


# Of 162 runs in benchmark/guide/ and benchmark/presets/ 19 have this: with a learning rate of 1e-2 or 1e-3 or a clip
# range of 0.2 or 0.3, `aggressive`, `tuned --no-body-frame`, and two with a clip range of 0.1 that recover.
FALLS_FEW, FALLS_MANY = 0.15, 0.3


def falls_again(steps: np.ndarray, falls: np.ndarray) -> str | None:
    """After an evaluation with few falls, another has many."""
    if not len(steps) or falls.min() > FALLS_FEW:
        return None
    stood = np.argmax(falls <= FALLS_FEW)
    worst = stood + np.argmax(falls[stood:])
    if falls[worst] < FALLS_MANY:
        return None
    return (f"{falls[stood]:.0%} of the episodes of the evaluation at {steps[stood]:,.0f} steps end in a fall, "
            f"{falls[worst]:.0%} at {steps[worst]:,.0f}")  # fmt: skip


# The reference reaches 85.5 in 8e6 steps (arXiv 2505.18417, figure 6): 10.7 in 1e6; less than half of that is slow.
# Standing for a whole episode returns 80: above that, small gains are normal.
PACE_STEPS, REFERENCE_PACE, SLOW_PACE, STANDING = 1_000_000, 10.7, 5, 80


def slow(steps: np.ndarray, returns: np.ndarray) -> str | None:
    """The return rises more slowly than the reference's, and is less than for standing still."""
    steps, returns = smooth(steps, returns)
    if not len(steps) or steps[-1] - steps[0] < PACE_STEPS or returns[-1] >= STANDING:
        return None
    then = np.interp(steps[-1] - PACE_STEPS, steps, returns)
    if returns[-1] - then >= SLOW_PACE:
        return None
    return (f"return {then:.1f} at {steps[-1] - PACE_STEPS:,.0f} steps, {returns[-1]:.1f} at {steps[-1]:,.0f}: "
            f"{returns[-1] - then:+.1f} in {PACE_STEPS:,} steps, the paper's gain is {REFERENCE_PACE}")  # fmt: skip


# In healthy runs, returns with and without action noise differ by up to 20 of 80, and an evaluation has only 16
# episodes: the threshold is 3/4, twice in a row.
EVAL_SHARE, EVAL_TIMES = 0.75, 2


def overfitting(steps: np.ndarray, returns: np.ndarray, eval_steps: np.ndarray, eval_returns: np.ndarray) -> str | None:
    """Evaluations on unseen terrain stay below training."""
    if not len(steps) or len(eval_steps) < EVAL_TIMES:
        return None
    eval_steps, evaluation = eval_steps[-EVAL_TIMES:], eval_returns[-EVAL_TIMES:]
    training = np.interp(eval_steps, steps, returns)
    if np.any(evaluation >= EVAL_SHARE * training):
        return None
    return "return in training and evaluation: " + ", ".join(
        f"{t:.1f} and {e:.1f} at {step:,.0f} steps" for t, e, step in zip(training, evaluation, eval_steps)
    )


# In a healthy run with short episodes, all of the first evaluations may end in falls, but then their returns rise.
FALLS_ALL, LASTS = 0.99, 0.9


def falls_unseen(
    steps: np.ndarray, lengths: np.ndarray, eval_steps: np.ndarray, falls: np.ndarray, returns: np.ndarray, limit: int
) -> str | None:
    """All episodes of evaluations end in a fall, but those of training last for nearly `limit` steps, their maximum."""
    if not len(steps) or min(len(falls), len(returns)) < EVAL_TIMES:
        return None
    length = np.interp(eval_steps[-EVAL_TIMES:], steps, lengths).min()
    if falls[-EVAL_TIMES:].min() < FALLS_ALL or length < LASTS * limit:
        return None
    if returns[-1] >= LEARNING_GAIN * returns[-EVAL_TIMES]:
        return None
    return (f"all episodes of the last {EVAL_TIMES} evaluations end in a fall, and those of training last for "
            f"{length / limit:.0%} of their limit")  # fmt: skip


# Actions are in [-1, 1]. Healthy runs start from a standard deviation of 1 or 0.6 and have 0.35 to 0.4 when the robot
# balances. Below 0.1 there is hardly any exploration, above 1 a third of the noise is clipped.
STD_SMALL, STD_LARGE, STD_GROWTH = 0.1, 1.0, 1.01


def entropy_collapse(steps: np.ndarray, stds: np.ndarray, length_steps: np.ndarray, lengths: np.ndarray) -> str | None:
    """Actions are almost deterministic before the robot balances."""
    if not len(steps) or stds[-1] >= STD_SMALL or (len(lengths) and lengths[-1] > TARGET_LENGTH):
        return None
    first = (stds < STD_SMALL).argmax()
    return (f"action std {stds[-1]:.2g} at {steps[-1]:,.0f} steps, below {STD_SMALL} since {steps[first]:,.0f}, "
            f"and episodes are shorter than {TARGET_LENGTH} steps")  # fmt: skip


def entropy_growing(steps: np.ndarray, stds: np.ndarray) -> str | None:
    """The action noise grows beyond the range of actions: the entropy bonus outweighs the return."""
    if not len(steps) or stds[-1] <= STD_LARGE or stds[-1] < STD_GROWTH * stds.min():
        return None
    return (f"action std {stds.min():.3g} at {steps[stds.argmin()]:,.0f} steps, {stds[-1]:.3g} at {steps[-1]:,.0f}; "
            "actions are clipped at ±1")  # fmt: skip


# Explained variance is 1 for perfect values and 0 for a constant. In healthy runs it is above 0.5 from 80,000 steps on,
# and above 0.9 from 200,000.
EXPLAINED_SMALL, EXPLAINED_AFTER = 0.5, 80_000


def value_lagging(steps: np.ndarray, explained: np.ndarray) -> str | None:
    """The value function explains too little of the returns."""
    steps, explained = smooth(steps, explained)
    if not len(steps) or steps[-1] < EXPLAINED_AFTER or explained[-1] >= EXPLAINED_SMALL:
        return None
    return f"explained variance {explained[-1]:.2g} at {steps[-1]:,.0f} steps (perfect: 1, a constant: 0)"


# Usual targets are 0.01 (rsl_rl) to 0.05 (Spinning Up's upper end). Healthy runs here have a median of 0.005 to 0.015
# and few iterations above 0.04; the guide's defaults have 0.0001.
KL_LARGE, KL_TIMES, KL_SHARE, KL_SMALL = 0.05, 3, 0.01, 0.001


def kl_large(steps: np.ndarray, kls: np.ndarray) -> str | None:
    """Updates of the policy are too large, in 1 % of the iterations or more."""
    large = kls > KL_LARGE
    if large.sum() < max(KL_TIMES, KL_SHARE * len(kls)):
        return None
    return (f"KL above {KL_LARGE} in {large.sum()} of {len(kls)} iterations, first at {steps[large.argmax()]:,.0f} "
            f"steps, most at {steps[kls.argmax()]:,.0f}: {kls.max():.2g}")  # fmt: skip


def kl_small(steps: np.ndarray, kls: np.ndarray) -> str | None:
    """The policy hardly changes. The median of all iterations counts: a learning rate may fall to 0 at the end."""
    if len(kls) < KL_TIMES or np.median(kls) >= KL_SMALL:
        return None
    return f"median KL {np.median(kls):.1g} in {steps[-1]:,.0f} steps; about 0.01 is usual"


# Remedies: the guide's, as factors on the run's own values and within the guide's ranges, less what did not help in the
# runs of benchmark/guide/. There longer rollouts and more environments make learning slower; a clip range of 0.1, half
# the clip range and 3 times the learning rate are from these runs


def parse_flags(flags: dict[str, Any]) -> Any:
    """The Args of a run's script with its `flags`, {name: value}. ValueError if they do not fit each other."""
    name = flags.get("script", "ppo_ballbot_schedules.py" if "lr_schedule" in flags else "ppo_ballbot.py")
    script = find_script(name)
    if script is None:
        raise ValueError(f"was trained by {name!r:.80}, which is no script in the working directory: put it there")
    cls = import_script(script).Args
    return validate_types({name: value for name, value in flags.items() if name in vars(cls())}, cls)


def accepted_flags(args: Any, flags: dict[str, Any]) -> dict[str, Any]:
    """The part of `flags`, {name: new value}, that the script accepts with `args` and that has an effect."""
    independent = {name: False for name in ("cuda", "track", "capture_video") if name in vars(args)}  # of this machine
    args, accepted = replace(args, **independent), {}
    for name, value in flags.items():
        if name not in vars(args):
            continue
        changed = replace(args, **{name: value})
        fixed = name in NETWORK_FLAGS and args.init_from
        try:
            validate_args(changed)
        except SystemExit:
            continue
        if not fixed and changed != args and name not in ineffective_flags(changed):
            args, accepted = changed, accepted | {name: value}
    return accepted


def remedies(args: Any) -> dict[str, dict[str, Any]]:
    """{finding: {flag: value}} for a run with the flags `args`: changes that its script accepts."""
    schedule = getattr(args, "lr_schedule", "guide")

    def scaled(name, factor, low, high, zero=0.0):
        """The flag with its value times `factor`, within the range; {} if that does not change it in this direction."""
        old = getattr(args, name, 0)
        new = min(max(old * factor, low), high) if old else zero
        new = round(new) if isinstance(old, int) else float(f"{new:.2g}")
        return {name: new} if (new > old if factor > 1 else new < old) else {}

    def learning_rate(factor):
        if schedule == "kl":  # the KL divergence sets the learning rate
            return scaled("target_kl", factor**0.5, 0.003, 0.05)
        old = args.learning_rate
        start = old if old > 0 else 1e-4 if schedule == "guide" else 3e-4
        new = float(f"{min(max(start * factor, 1e-5 if factor > 1 else 1e-4), 1e-3):.2g}")
        return {"learning_rate": new} if (new > start) == (factor > 1) and new != start else {}

    larger_clip = {"clip_coef": 0.1} if args.clip_coef < 0.1 else {}
    higher_rate = learning_rate(10) if 0 < args.learning_rate < 1e-4 else {}
    larger_updates = larger_clip | higher_rate or learning_rate(3)
    more_value = scaled("vf_coef", 2, 0.5, 3, zero=1)
    more_entropy = scaled("ent_coef", 10, 0.0001, 0.01, zero=0.001)
    norm_adv = {"norm_adv": True}
    smaller_kl = {"target_kl": 0.02} if getattr(args, "target_kl", 0) > 0.02 and schedule != "kl" else {}
    smaller_net = scaled("hidden_size", 1 / 2, 64, 512)
    larger_std = {"init_log_std": -0.5} if getattr(args, "init_log_std", 0) < -0.5 else {}
    found = {
        "unstable": learning_rate(1 / 10) | scaled("clip_coef", 1 / 2, 0.01, 0.3),
        "KL too large": learning_rate(1 / 10) | smaller_kl,
        "value function lagging": higher_rate or more_value,
        "entropy collapse": more_entropy | larger_std,
        "entropy growing": scaled("ent_coef", 0, 0, 0) | norm_adv,
        "KL too small": larger_updates,
        "not learning": larger_updates,
        "slow learning": larger_updates or scaled("update_epochs", 2, 1, 10),
        "overfitting": scaled("weight_decay", 5, 0, 0.1, zero=0.01) | more_entropy | smaller_net,
    }  # fmt: skip
    full_length = {"max_episode_steps": plot.EVAL_STEPS} if plot.has_short_episodes(vars(args)) else {}
    found["falls in evaluations"] = full_length or found["overfitting"]
    return {name: accepted_flags(args, flags) for name, flags in found.items()}


def diagnose(flags: dict[str, Any], curves: dict[str, Curve]) -> list[tuple[str, str, str]]:
    """Findings of a run with these flags, [(name, evidence, flags to paste)], causes before their consequences.

    A flag that an earlier finding sets to another value is left out.
    """
    evaluations_only = counts_evaluations_only(flags, curves)
    if meets_targets(last_result(curves, evaluations_only)):
        return []
    training, evaluations, kls, stds = (curves[tag] for tag in (RETURN, EVAL_RETURN, KL, STD))
    stuck = not_learning(*training)
    if evaluations_only:
        unstable = return_falling(*evaluations, "evaluations ") or falls_again(*curves[EVAL_FALLS])
        stuck = stuck and evaluations_flat(*evaluations)
    else:
        unstable = return_falling(*smooth(*training))
    limit = min(flags.get("max_episode_steps", plot.EVAL_STEPS), plot.EVAL_STEPS)
    evidence = {
        "unstable": unstable,
        "KL too large": kl_large(*kls),
        "value function lagging": value_lagging(*curves[EXPLAINED]),
        "entropy collapse": entropy_collapse(*stds, *curves[EVAL_LENGTH if evaluations_only else LENGTH]),
        "entropy growing": entropy_growing(*stds),
        "KL too small": kl_small(*kls),
        "not learning": stuck,
        "slow learning": None if unstable or stuck else slow(*(evaluations if evaluations_only else training)),
        # returns of shorter episodes cannot be compared
        "overfitting": None if unstable or plot.has_short_episodes(flags) else overfitting(*training, *evaluations),
        "falls in evaluations": falls_unseen(*curves[LENGTH], *curves[EVAL_FALLS], evaluations[1], limit),
    }
    evidence = {name: text for name, text in evidence.items() if text}
    findings, chosen, remedy = [], {}, remedies(parse_flags(flags)) if evidence else {}
    for name, text in evidence.items():
        changes = {flag: value for flag, value in remedy[name].items() if chosen.get(flag, value) == value}
        chosen |= changes
        findings.append((name, text, format_flags(changes)))
    return findings


# When to stop. The guide: no improvement for 1e6 steps, consistent across seeds (3 to 5), targets met. Its terms are
# not defined. Here an improvement is a hundredth of the target return, and the worst seed within a fifth of the best.
PLATEAU_STEPS, IMPROVEMENT, SEEDS, SEED_SPREAD = 1_000_000, TARGET_RETURN / 100, 3, 0.8


def stalled_for(steps: np.ndarray, returns: np.ndarray) -> float:
    """Steps since the return last improved."""
    best, at = -np.inf, steps[-1]
    for step, value in zip(*smooth(steps, returns)):
        if value > best + IMPROVEMENT:
            best, at = value, step
    return steps[-1] - at


def stop_rule(
    curves: list[dict[str, Curve]], ended: bool, found: bool, evaluations_only: bool = False
) -> tuple[dict[str, tuple[bool, str]], str]:
    """The guide's conditions for runs that differ only in their seed, {condition: (holds, evidence)}, and the advice.

    `ended`: they trained for --total-timesteps; `found`: one of them has a finding; `evaluations_only`: evaluations
    alone measure their progress.
    """
    results = [last_result(run, evaluations_only) for run in curves]
    evaluated = None not in results
    progress = [run[EVAL_RETURN if evaluations_only else RETURN] for run in curves] if evaluated else []
    stalled = [stalled_for(*curve) for curve in progress]
    last = min((steps[-1] for steps, _ in progress), default=0)
    returns = [np.interp(last, *curve) for curve in progress]
    plateau = evaluated and min(stalled) >= PLATEAU_STEPS
    consistent = evaluated and len(curves) >= SEEDS and min(returns) >= SEED_SPREAD * max(returns)
    targets = all(map(meets_targets, results))
    missing = "not all runs are evaluated yet"
    conditions = {
        f"no improvement for {PLATEAU_STEPS:,} steps": (
            plateau, "so far " + ", ".join(f"{steps:,.0f}" for steps in stalled) if evaluated else missing,
        ),
        "consistent across seeds": (
            consistent,
            (f"returns {', '.join(f'{value:.1f}' for value in returns)} at {last:,.0f} steps" if evaluated else missing)
            + (f"; give {SEEDS} to 5 seeds" if len(curves) < SEEDS else ""),
        ),
        f"targets met, return > {TARGET_RETURN} and length > {TARGET_LENGTH}": (
            targets,
            ", ".join(f"{a:.1f} and {b:.0f}" for a, b in results) if evaluated else missing,
        ),
    }  # fmt: skip
    if targets:
        verdict = "stop" if consistent else f"stop, and repeat it with other seeds, {SEEDS} to 5 in all"
        verdict += "" if plateau else ", or continue: it still improves"
    elif plateau:
        verdict = "stop: more steps will not help, change hyperparameters"
    elif found:
        verdict = "not by this rule, but fix the findings first"
    else:
        verdict = "not yet: --resume it with more --total-timesteps" if ended else "not yet: continue"
    return conditions, verdict


def describe_run(
    run: Path, flags: dict[str, Any], curves: dict[str, Curve], found: list[tuple[str, str, str]]
) -> list[str]:
    """Lines of text on a run and its findings."""
    step, total = curves[RETURN][0][-1], flags.get("total_timesteps", math.nan)
    evaluation = f", evaluation {curves[EVAL_RETURN][1][-1]:.1f}" if len(curves[EVAL_RETURN][1]) else ""
    lines = [f"{run}: {step:,.0f} of {total:,.0f} steps, return {curves[RETURN][1][-1]:.1f}{evaluation}, "
             f"length {curves[LENGTH][1][-1]:.0f}"]  # fmt: skip
    if plot.has_short_episodes(flags):
        lines.append(f"  training episodes last {flags['max_episode_steps']} steps, evaluations {plot.EVAL_STEPS}")
    if counts_evaluations_only(flags, curves):
        lines.append("  only evaluations count" + ("" if evaluation else ", and it has none yet"))
    script = flags.get("script", "ppo_ballbot_schedules.py" if "lr_schedule" in flags else "ppo_ballbot.py")
    best = (run / "best.pt").is_file()
    for name, evidence, changes in found:
        lines.append(f"  {name}: {evidence}")
        command = f"python {script} --config {shlex.quote(str(run / 'config.json'))} {changes}"
        lines.append(f"      {command}" if changes else "      the guide has no further advice")
        if name == "unstable" and best:
            lines.append(f"      the policy of its best evaluation is in {run}/best.pt")
        if name == "overfitting" and best:
            lines.append("      terrain or missing action noise? python -m ballbot_utils.evaluate "
                         f"{shlex.quote(str(run))} --stochastic")  # fmt: skip
    if not found:
        early = f" so far; learning shows after {LEARNING_AFTER:,} steps" if step < LEARNING_AFTER else ""
        lines.append(f"  nothing is wrong{early}")
    elif any(value != flags.get(name, value) for name, value in PRESETS["tuned"].items()):
        lines.append(f"  or start from the best known configuration: python {script} --preset tuned")
    return lines


def main(args: Args) -> None:
    plot.check_runs(args.runs)
    if args.json not in ("", "-"):
        require_writable("--json", Path(args.json), args.overwrite, ".json")
    params, curves, findings = [], [], []
    for run in args.runs:
        flags, curve = read_run(run)
        check_argument(len(curve[RETURN][0]) and len(curve[LENGTH][0]), f"{run} has no finished episode in its log "
                       "yet, or its log is damaged")  # fmt: skip
        check_argument(flags, f"{run} has no valid config.json: was it written by ppo_ballbot.py?")
        try:
            missing = [f"--{name}".replace("_", "-") for name in PPO_FLAGS if name not in vars(parse_flags(flags))]
        except ValueError as error:
            exit_with_error(f"{run} has an invalid config.json: {error}")
        missing += [tag for tag in PPO_TAGS if not len(curve[tag][0])]
        check_argument(not missing, f"{run} cannot be diagnosed: it has no {', '.join(missing)}, which every run of "
                       "PPO has")  # fmt: skip
        params.append(flags)
        curves.append(curve)
        findings.append(diagnose(flags, curve))

    report, lines, ended = {"runs": {}, "stop": []}, [], []
    for run, flags, curve, found in zip(args.runs, params, curves, findings):
        step = curve[RETURN][0][-1]
        iteration = math.prod(flags.get(name, 0) for name in ("num_envs", "num_steps", "frame_skip"))
        ended.append(step + iteration > flags.get("total_timesteps", math.nan))
        rows = [{"name": name, "evidence": evidence, "flags": changes} for name, evidence, changes in found]
        report["runs"][str(run)] = {"steps": int(step), "findings": rows}
        lines += describe_run(run, flags, curve, found)
    for group in plot.group_runs(params):
        conditions, verdict = stop_rule(
            [curves[i] for i in group], all(ended[i] for i in group), any(findings[i] for i in group),
            any(counts_evaluations_only(params[i], curves[i]) for i in group),
        )  # fmt: skip
        names = [str(args.runs[i]) for i in group]
        rows = [{"name": name, "holds": bool(holds), "evidence": text} for name, (holds, text) in conditions.items()]
        report["stop"].append({"runs": names, "verdict": verdict, "conditions": rows})
        lines.append(f"stop {', '.join(names)}? {verdict}")
        lines += [f"  [{'x' if row['holds'] else ' '}] {row['name']}: {row['evidence']}" for row in rows]

    text = json.dumps(report, indent=2)
    if args.json not in ("", "-"):
        write(Path(args.json), lambda part: part.write_text(text + "\n"))
    print(text if args.json == "-" else "\n".join(lines))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
