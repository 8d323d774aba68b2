"""One trial: run the script for each seed, follow its evaluations, and score them."""

import contextlib
import math
import os
import re
import select
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import optuna

from ballbot_utils.common import write
from ballbot_utils.flags import config_json
from ballbot_utils.runs import TARGET_LENGTH, TARGET_RETURN, read_metrics
from ballbot_utils.tune import Search

GRACE = 10  # seconds from the request to end a run until it is killed

Evaluation = tuple[int, float, float]  # steps, return, length


class TrialFailed(Exception):
    """A trial's run crashed or diverged: its parameters are the cause."""


class MachineFault(Exception):
    """A fault of the machine ended a trial's run: the trial does not count, and is queued again."""


class TrialAborted(Exception):
    """The trial is not needed, or the command ends: the trial does not count."""


def run_command(command: list[str | Path], log_path: Path) -> Generator[None, None, None]:
    """Run a command, with its output in a file; yields at least once a second, and once after its end.

    However this generator ends, the command and all processes that it started end too.
    """
    with open(log_path, "wb") as log:
        # A session of its own: Ctrl-C reaches it only through us. If we are killed, its next output fails.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 start_new_session=True)  # fmt: skip
        try:
            chunk = None
            while chunk != b"":
                yield
                if select.select([child.stdout], [], [], 1)[0]:
                    chunk = os.read(child.stdout.fileno(), 1 << 16)
                    log.write(chunk)
                    log.flush()
            if child.wait():
                raise explain_exit(child.returncode, log_path.read_text(encoding="utf-8", errors="replace"))
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def explain_exit(status: int, output: str) -> TrialFailed | MachineFault:
    """The error of a run with this exit status, not 0: a signal and status 75 are faults of the machine."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    reason = [*lines, "no output", *errors][-1]
    number = -status if status < 0 else status - 128  # as a shell reports it
    if number in list(signal.Signals):
        return MachineFault(f"killed by {signal.Signals(number).name}")
    if status == os.EX_TEMPFAIL:
        return MachineFault(re.split("[:;,] (?:make room|fix that|to resume)", reason.removeprefix("error: "))[0])
    return TrialFailed(reason)


def first_met(evaluations: list[Evaluation], hold: int) -> int | None:
    """Steps of the first of `hold` evaluations in a row that meet both targets, or None."""
    met = [value > TARGET_RETURN and length > TARGET_LENGTH for _, value, length in evaluations]
    return next((evaluations[i][0] for i in range(len(met) - hold + 1) if all(met[i : i + hold])), None)


def score(objective: str, evaluations: list[Evaluation], total: int, hold: int = 1) -> float:
    """A run's value of the objective, by its evaluations so far; `total`: the steps of a whole run."""
    _, last_return, last_length = evaluations[-1]
    if objective != "steps-to-target":
        return last_return if objective == "return" else last_length
    met = first_met(evaluations, hold)
    share = min(max(last_return, 0) / TARGET_RETURN, last_length / TARGET_LENGTH, 1)
    return total * (2 - share) if met is None else float(met)


def format_value(objective: str, value: float) -> str:
    """A value of the objective as text."""
    return f"{value:.1f}" if objective == "return" else f"{value:,.0f}"


def suggest(trial: optuna.Trial, name: str, spec: tuple | list) -> bool | int | float | str:
    """A parameter's value, by the study's sampler."""
    if not isinstance(spec, tuple):
        return trial.suggest_categorical(name, spec)
    low, high, log = spec
    return (trial.suggest_int if isinstance(low, int) else trial.suggest_float)(name, low, high, log=log)


def run_trial(trial: optuna.Trial, search: Search, tick: Callable[[], None]) -> float:
    """The objective: the median over the runs of all seeds. `tick` is called about once a second and may raise."""
    params = {name: suggest(trial, name, spec) for name, spec in search.space.specs.items()}
    text = config_json(search.space.settings(params))
    write(search.folder / f"trial-{trial.number}.json", lambda part: part.write_text(text))
    results = {int(seed): value for seed, value in trial.user_attrs.get("results", {}).items()}  # of an earlier attempt
    for seed in search.seeds[len(results) :]:
        try:
            results[seed] = run_seed(trial, search, seed, list(results.values()), tick)
        except TrialFailed as error:
            trial.set_user_attr("reason", f"seed {seed}: {error}")
            raise
        except MachineFault as error:
            raise MachineFault(f"trial {trial.number}, seed {seed}: {error}") from None
        trial.set_user_attr("results", results)
    return statistics.median(results.values())


def run_seed(trial: optuna.Trial, search: Search, seed: int, earlier: list[float], tick: Callable[[], None]) -> float:
    """Run one seed and return its score; `earlier`: the scores of the seeds before it. Reports each evaluation."""
    objective, hold, base = search.args.objective, search.args.hold, search.space.base
    total, interval = base["total_timesteps"], base["eval_interval"]
    run, config = f"{search.name}/trial-{trial.number}-seed-{seed}", search.folder / f"trial-{trial.number}.json"
    command = [sys.executable, search.args.script, "--config", config, "--seed", str(seed), "--run-name", run]
    folder, evaluations, value, met_at = Path("runs") / run, [], math.nan, 0
    with contextlib.closing(run_command(command, folder.with_name(f"{folder.name}.log"))) as ticks:
        for _ in ticks:
            tick()
            entries = [entry for entry in read_metrics(folder) if entry["kind"] != "best"]
            for entry in entries[len(evaluations) :] if not met_at else ():
                final, steps = entry["kind"] == "final", entry["global_step"]
                values = entry["episodic_return"], entry["episodic_length"]
                if not all(map(math.isfinite, values)):
                    raise TrialFailed(f"not finite: {'final policy' if final else 'evaluation'} at {steps:,} steps: "
                                      "return {}, length {}".format(*values))  # fmt: skip
                # Equal for all batch sizes: an evaluation comes at the first iteration after its interval
                step, steps = (total, total) if final else (steps // interval * interval, steps)
                evaluations.append((steps, *values))
                value = score(objective, evaluations, total, hold)
                if objective == "steps-to-target" and first_met(evaluations, hold) is not None:
                    met_at = (folder / "metrics.jsonl").stat().st_mtime_ns
                # A run that met the targets ends; it is compared with others at later steps too
                for known in range(step, total + 1, interval) if met_at else [step]:
                    trial.report(statistics.median([*earlier, value]), len(earlier) * total + known)
                if not final and not met_at and trial.should_prune():
                    raise optuna.TrialPruned
            checkpoint = folder / "last.pt"  # saved after the evaluation is logged
            if met_at and checkpoint.exists() and checkpoint.stat().st_mtime_ns >= met_at:
                break
    if not evaluations:
        raise MachineFault(
            f"{search.args.script} logged no evaluation in {folder}/metrics.jsonl, as ppo_ballbot.py does"
        )
    return value
