"""The guide's tuning strategies: `python -m ballbot_utils.tune --strategy tpe --trials 50 -- --preset tuned`.

A trial is an ordinary run of ppo_ballbot.py for each of --seeds, with the flags that a strategy chose from --space
and those after `--`. Everything lies in runs/<study>/: for each trial its flags (trial-3.json), and for each seed
its run (trial-3-seed-1/) and what that printed (trial-3-seed-1.log). Trials are judged by their runs' metrics.jsonl.
The same command again goes on where it was, and on other machines, with the same --storage, joins in. Samplers,
pruners, storages and plots are Optuna's.

- grid: every combination; a range stands for --points values.
- one-at-a-time: the first hyperparameter of --space, then the next with the first's best value, and so on.
- random: --trials combinations, drawn independently, but none twice.
- tpe: --trials combinations by the tree-structured Parzen estimator, which begins with the flags after `--` where they
  lie in --space.
- six-steps: the guide's systematic process, with its values: baseline, learning rate, clip range, exploration,
  architecture, validation on its five seeds; --space is not used.
"""

import contextlib
import fcntl
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import select
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Generator, Iterable, Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

import ballbot_runs
import numpy as np

from ballbot_utils import diagnose, plot
from ballbot_utils.common import clear_progress, command, need, need_from, progress, write
from ppo_ballbot import TARGET_LENGTH, TARGET_RETURN

try:
    import optuna
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError:
    sys.exit("error: tuning needs Optuna: pip install -r requirements-tune.txt")

# The guide's typical ranges. It gives two for the clip range, 0.01 to 0.05 and 0.1 to 0.3, and values for what is no
# range; num_envs 8 and 16 are ours, between its 4, 10 and 32. Its n_steps are physics steps, ours actions of four.
SPACE = (
    "learning-rate=1e-5:1e-3:log", "clip-coef=0.01:0.3:log", "num-steps=128,256,512,1024", "update-epochs=3:10",
    "minibatch-size=64,128,256,512", "ent-coef=0.0001:0.01:log", "vf-coef=0.5:2", "norm-adv=false,true",
    "hidden-size=64,128,256,512", "weight-decay=0:0.1", "num-envs=4,8,10,16,32",
)  # fmt: skip
# The guide's process, step by step. It has no values for the initial noise and "different depths": those are ours.
SIX_STEPS = {
    "learning rate": ("learning-rate=1e-5,5e-5,1e-4,5e-4,1e-3",),
    "clip range": ("clip-coef=0.01,0.015,0.02,0.03",),
    "exploration, entropy": ("ent-coef=0.0001,0.001,0.01",),
    "exploration, initial noise": ("init-log-std=-1,-0.5,0",),
    "architecture, width": ("hidden-size=64,128,256",),
    "architecture, layers": ("pi-layers+vf-layers=2,3,4",),
}
GUIDE_SEEDS = (10, 42, 100, 200, 300)
SIZES = ("num_steps", "num_envs", "minibatch_size")  # only combinations that divide
# What says where a run lies, how long it is and how it is judged is the same in all trials.
NOT_TUNED = ("exp_name run_name preset config resume seed total_timesteps terrain eval_terrain_seed wheel_damping "
             "randomization eval_interval eval_episodes final_eval_episodes").split()  # fmt: skip
GRACE = 10  # seconds that a run has to end in before it is killed


@dataclass
class Args:
    strategy: Literal["grid", "one-at-a-time", "random", "tpe", "six-steps"] = "tpe"
    """the guide's strategies 1 (both grid and one-at-a-time), 2 and 3, or its systematic process"""
    space: tuple[str, ...] = SPACE
    """what to try, in flags' own names: name=low:high, name=low:high:log, name=a,b,c or one value. The default: the
    guide's typical ranges"""
    study: str = ""
    """folder under runs/ and name in the storage; empty: tune-<strategy>"""
    script: Path = Path("ppo_ballbot.py")
    """the program to tune: this one, ppo_ballbot_schedules.py or a copy of yours"""
    objective: Literal["return", "length", "steps-to-target"] = "return"
    """what is judged, on unseen terrain: the final policy's return or length, or the steps until an evaluation met both
    targets (a run ends there). Where none did: once to twice --total-timesteps, less the nearer it came"""
    hold: int = 1
    """steps-to-target: evaluations in a row that must meet both; the first of them counts"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """each trial's runs, one after the other; their median counts"""
    trials: int | None = None
    """trials in all, with those of earlier and other commands; default: 20, or the whole grid. grid and random end when
    all combinations are tried"""
    points: int = 3
    """values of a range for grid and one-at-a-time"""
    budget_minutes: float = math.inf
    """end after this time; a trial cut short goes on by the next command, with its first seed that is not finished"""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """end bad trials early: their best so far below the median of others at equal steps, or by Hyperband"""
    warmup_steps: int = 0
    """steps of a trial that the median does not judge"""
    startup_trials: int = 10
    """random trials before tpe chooses, and finished ones before the median prunes"""
    workers: int = 1
    """trials at a time on this machine"""
    storage: str = ""
    """a database that many machines share, postgresql+psycopg://user:password@host/name; empty: a file in the folder"""
    heartbeat: int = 60
    """seconds between a trial's signs of life in a database; dead and tried again after twice that"""


@dataclass
class Search:
    """One Optuna study: all that its workers need."""

    args: Args
    name: str  # of the study, and of its folder under runs/
    base: dict  # every flag, as trials have them where nothing else is chosen
    space: dict  # of each parameter (low, high, log) or a list of choices
    options: dict  # for parameters whose choices are labels: {parameter: {label: {flag: value}}}
    seeds: tuple
    trials: int
    grid: bool
    deadline: float
    given: dict | None = None  # the parameters of the flags given, for the first trial

    @property
    def folder(self) -> Path:
        """Where its trials lie."""
        return Path("runs") / self.name

    def settings(self, params: dict[str, Any]) -> dict[str, Any]:
        """Every flag of a trial."""
        chosen = {}
        for name, value in params.items():
            chosen |= self.options[name][value] if name in self.options else {name.replace("-", "_"): value}
        return self.base | chosen


class Failed(Exception):
    """A trial's run crashed or diverged: its parameters are at fault."""


class MachineFault(Exception):
    """A trial's run was ended by a fault of the machine: the trial does not count, and is tried again."""


class TimeUp(Exception):
    """A trial is not to be run, or to its end: it does not count."""


@contextlib.contextmanager
def machine_faults_end() -> Iterator[None]:
    """A block in which a fault of the machine ends the program with one line: no space, no memory, no database."""
    try:
        yield
    except (MachineFault, OSError, MemoryError, optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"error: {line}: mend that (make room, or give fewer --workers); then the same command goes on")


# The space


def base_settings(script: Path, flags: list[str]) -> tuple[ModuleType, dict[str, Any]]:
    """The script's module, and every flag as a trial has it: the script's own parser on what came after `--`."""
    need(script.is_file() and script.suffix == ".py", f"--script {script} does not exist, or is no .py file")
    sys.path.insert(0, str(script.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"tuned_{script.stem}", script)  # a copy may have our script's name
    module, argv, said = importlib.util.module_from_spec(spec), sys.argv, io.StringIO()
    sys.modules[spec.name], sys.argv = module, [str(script), *flags]
    spec.loader.exec_module(module)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            settings = module.parse()
    except SystemExit as error:
        text = error.code if isinstance(error.code, str) else re.sub(r"[^ -~]+|-{3,}", " ", said.getvalue())
        sys.exit(f"error: {script.name} refuses the flags after --: {' '.join(text.removeprefix('error: ').split())}")
    finally:
        sys.argv = argv
    need(not (settings.resume or settings.run_name), "trials have run names of their own: give no --run-name or "
         "--resume after --")  # fmt: skip
    return module, asdict(settings)


def refused(module: ModuleType, settings: dict[str, Any]) -> str | None:
    """Why the script would not run with these flags, or None."""
    try:
        check = getattr(module, "check", ballbot_runs.check)  # a script may have its own
        check(module.Args(**settings), settings["num_processes"])
    except SystemExit as error:
        return str(error.code).removeprefix("error: ")


def read_value(word: str, kind: type, text: str) -> bool | int | float | str:
    """A value of --space `text`, of the flag's type."""
    word = word.strip()
    try:
        value = {"true": True, "false": False}[word] if kind is bool else kind(word)
    except (ValueError, KeyError):
        names = {bool: "neither true nor false", int: "no whole number", float: "no number", dict: "no value to try"}
        sys.exit(f"error: --space {text}: {word!r} is {names[kind]}")
    need(kind is str or math.isfinite(value), f"--space {text}: {word} is not finite")
    return value


def parse_space(texts: Iterable[str], module: ModuleType) -> dict[str, tuple | list]:
    """Texts `name=low:high[:log]`, `name=a,b` or `name=value` to {name: (low, high, log) or list of values}.

    Names joined by + have their value in common.
    """
    default, space, seen = asdict(module.Args()), {}, set()
    for text in texts:
        key, _, values = text.partition("=")
        names = [name.replace("-", "_") for name in key.split("+")]
        for name in names:
            need(
                name in default, f"--space {text}: {Path(module.__file__).name} has no flag --{name.replace('_', '-')}"
            )
            need(name not in NOT_TUNED, f"--space {text}: not for tuning; give it after --, for all trials")
            need(name not in seen, f"--space {text}: {name.replace('_', '-')} is given twice")
            seen.add(name)
        need(values.strip(), f"--space {text}: give name=low:high, name=low:high:log, name=a,b,c or name=value")
        kind = type(default[names[0]])
        if ":" in values and kind in (int, float):
            words = values.split(":")
            log = words[2:] == ["log"]
            need(len(words) == 2 or log, f"--space {text}: a range is low:high or low:high:log")
            low, high = (read_value(word, kind, text) for word in words[:2])
            need(low < high, f"--space {text}: the range is empty")
            need(low > 0 or not log, f"--space {text}: a logarithmic range starts above 0")
            spec = (low, high, log)
            if names[0] in SIZES:  # the low end doubled, and again: others would hardly divide
                need(low > 0, f"--space {text}: give sizes of 1 or more")
                spec = [low * 2**i for i in range(int(math.log2(high / low)) + 1)]
        else:
            spec = list(dict.fromkeys(read_value(word, kind, text) for word in values.split(",")))
        space["+".join(names)] = spec
    return space


def fixed_values(space: dict[str, tuple | list]) -> dict[str, Any]:
    """Flags for which a space has one value."""
    return {name: spec[0] for key, spec in space.items() if len(spec) == 1 for name in key.split("+")}


def check_space(
    space: dict[str, tuple | list], module: ModuleType, base: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple | list], dict[str, dict[str, dict[str, Any]]]]:
    """Exit with one line on values that the script refuses.

    Returns the base with what is fixed, the space of what varies, and options: where not every combination of sizes
    divides, they are one parameter whose choices are those that do.
    """
    sizes = {name: space[name] for name in SIZES if name in space}
    space = {key: spec for key, spec in space.items() if key not in sizes}
    good, why, fixed = [], None, fixed_values(space)
    for values in itertools.product(*sizes.values()):
        why = refused(module, base | fixed | dict(zip(sizes, values))) or why
        if not refused(module, base | fixed | dict(zip(sizes, values))):
            good.append(dict(zip(sizes, values)))
    need(good, f"--space leaves no possible trial: {why}")
    base = base | fixed | good[0]
    for key, spec in space.items():
        for value in spec[:2] if isinstance(spec, tuple) else spec:
            why = refused(module, base | dict.fromkeys(key.split("+"), value))
            need(not why, f"--space {key.replace('_', '-')}: {why}")
    for name in [] if hasattr(module, "check") else [name for key in space | sizes for name in key.split("+")]:
        # Another parameter may give it an effect
        bases = [base | dict.fromkeys(key.split("+"), value) for key, spec in (space | sizes).items()
                 for value in (spec[:2] if isinstance(spec, tuple) else spec)]  # fmt: skip
        reasons = [ballbot_runs.without_effect(module.Args(**settings)).get(name) for settings in [base, *bases]]
        need(not all(reasons), f"--space {name.replace('_', '-')} has no effect {reasons[0]}")
    varied = {key.replace("_", "-"): spec for key, spec in space.items() if len(spec) > 1}
    options = {key: {str(v): dict.fromkeys(key.replace("-", "_").split("+"), v) for v in spec}
               for key, spec in varied.items() if "+" in key}  # fmt: skip
    varied |= {key: list(labels) for key, labels in options.items()}
    if len(good) == math.prod(map(len, sizes.values())):
        varied |= {name.replace("_", "-"): values for name, values in sizes.items() if len(values) > 1}
    else:
        several = {name: values for name, values in sizes.items() if len(values) > 1}
        key = ", ".join(several).replace("_", "-")
        labels = {", ".join(str(sizes[name]) for name in several): sizes for sizes in good}
        if len(labels) > 1:
            options[key], varied[key] = labels, list(labels)
            print(f"{key}: the {len(labels)} combinations that divide are one parameter")
    need(varied, "--space has nothing that varies: give a range or several values")
    return base, varied, options


def parameters(settings: dict[str, Any], search: Search) -> dict[str, Any] | None:
    """The parameters that stand for these flags, every one of them; None if they lie outside the space."""
    params = {}
    for name, spec in search.space.items():
        if name in search.options:
            fitting = [label for label, flags in search.options[name].items() if settings | flags == settings]
        else:
            value = settings[name.replace("-", "_")]
            fitting = [value] if (spec[0] <= value <= spec[1] if isinstance(spec, tuple) else value in spec) else []
        if not fitting:
            return None
        params[name] = fitting[0]
    return params if search.settings(params) == settings else None


def on_grid(space: dict[str, tuple | list], points: int) -> dict[str, list]:
    """The space with `points` values in place of each range."""

    def values(low, high, log):
        even = (np.geomspace if log else np.linspace)(low, high, points)
        if isinstance(low, int):
            return list(dict.fromkeys(even.round().astype(int).tolist()))
        return list(dict.fromkeys(float(f"{value:.3g}") for value in even))

    return {key: values(*spec) if isinstance(spec, tuple) else spec for key, spec in space.items()}


# A trial


def run_command(command: list[str | Path], log_path: Path) -> Generator[None, None, None]:
    """Run a command, with its output in a file; yields at least once a second, and once after its end.

    However this ends, so does the command, with all processes that it started.
    """
    with open(log_path, "wb") as log:
        # A session of its own: Ctrl-C reaches it through us alone. If we are killed, its next line finds no reader.
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
            code = child.wait()
            if code:
                raise why_ended(code, log_path.read_text(encoding="utf-8", errors="replace"))
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def why_ended(code: int, text: str) -> Failed | MachineFault:
    """Whose fault the end of a run with this exit status was, and for people the reason in what it printed."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    reason = [*lines, "no output", *errors][-1]
    number = -code if code < 0 else code - 128  # as a shell has it
    if number in list(signal.Signals):
        return MachineFault(f"killed by {signal.Signals(number).name}")
    if code == os.EX_TEMPFAIL:
        return MachineFault(
            re.split("(?:: make room|: mend that), then |; to go on", reason.removeprefix("error: "))[0]
        )
    return Failed(reason)


def reached(evaluation: tuple[int, float, float]) -> bool:
    """Whether (steps, return, length) meets both targets."""
    return evaluation[1] > TARGET_RETURN and evaluation[2] > TARGET_LENGTH


def first_met(evaluations: list[tuple[int, float, float]], hold: int) -> int | None:
    """Steps of the first of `hold` evaluations in a row that meet both targets, or None."""
    for i in range(len(evaluations) - hold + 1):
        if all(map(reached, evaluations[i : i + hold])):
            return evaluations[i][0]


def score(objective: str, evaluations: list[tuple[int, float, float]], total: int, hold: int = 1) -> float:
    """What a run is worth by its evaluations so far, [(steps, return, length)]."""
    if objective != "steps-to-target":
        return evaluations[-1][1 if objective == "return" else 2]
    met = first_met(evaluations, hold)
    _, last_return, last_length = evaluations[-1]
    share = min(max(last_return, 0) / TARGET_RETURN, last_length / TARGET_LENGTH, 1)
    return total * (2 - share) if met is None else float(met)


def shown(objective: str, value: float) -> str:
    """A value of the objective as text."""
    return f"{value:.1f}" if objective == "return" else f"{value:,.0f}"


def direction(objective: str) -> str:
    """Whether Optuna is to maximize or minimize it."""
    return "minimize" if objective == "steps-to-target" else "maximize"


def process_mark(pid: int) -> str | None:
    """A process's pid and start, which no other shares; None where it does not run."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        state, *rest = stat.read_text().rpartition(")")[2].split() if stat.exists() else "?"
    except (ProcessLookupError, FileNotFoundError):
        return None
    except PermissionError:
        return str(pid)
    return None if state == "Z" else " ".join([str(pid), *rest[18:19]])


def run_trial(trial: optuna.Trial, search: Search, study: optuna.Study) -> float:
    """The objective: the median over the seeds' runs."""
    trial.set_user_attr("host", socket.gethostname())
    trial.set_user_attr("process", process_mark(os.getpid()))
    study.sampler = make_sampler(search, trial.number)
    if num_combinations(search) < math.inf:
        trials = [t for t in study.get_trials(deepcopy=False) if t.number <= trial.number]
        params = untried(search, sorted(trials, key=lambda t: t.number))
        if params is None:
            raise TimeUp
        study.sampler = optuna.samplers.PartialFixedSampler(params, study.sampler)
    params = {name: suggest(trial, name, spec) for name, spec in search.space.items()}
    # Of workers that began at once, the later ones may be too many.
    numbers = [t.number for t in counted(study) if t.state != TrialState.WAITING]
    if trial.number not in numbers:
        raise TimeUp
    if numbers.index(trial.number) >= search.trials:
        trial.set_user_attr("lost", "one too many")
        raise TimeUp
    text = ballbot_runs.as_config(search.settings(params))
    write(search.folder / f"trial-{trial.number}.json", lambda part: part.write_text(text))
    results = {int(seed): value for seed, value in trial.user_attrs.get("results", {}).items()}  # if tried again
    for seed in search.seeds[len(results) :]:
        try:
            results[seed] = run_seed(trial, search, study, seed, list(results.values()))
        except Failed as error:
            trial.set_user_attr("reason", f"seed {seed}: {error}")
            raise
        except MachineFault as error:
            raise MachineFault(f"trial {trial.number}, seed {seed}: {error}") from None
        trial.set_user_attr("results", results)
    return statistics.median(results.values())


def num_combinations(search: Search) -> float:
    """How many combinations grid or random search has to try; infinitely many in a range of floats, and for tpe."""
    if not search.grid and search.args.strategy != "random":
        return math.inf
    sizes = (len(spec) if isinstance(spec, list) else spec[1] - spec[0] + 1 if isinstance(spec[0], int) else math.inf
             for spec in search.space.values())  # fmt: skip
    return math.prod(sizes)


def untried(search: Search, trials: list[FrozenTrial]) -> dict[str, Any] | None:
    """The combination that the last of all `trials` so far is to try, and no other does; None if there is none left.

    It follows from the study's name and the trials before, also those whose worker has not yet said what they try.
    """
    rng, combinations, used = random.Random(search.name), {}, set()
    for trial in trials:
        history = trial.system_attrs.get("retry_history")
        drawn = combinations.get(history[-1]) if history else None
        while drawn is None and len(used) < num_combinations(search):
            drawn = tuple(draw(rng, spec) for spec in search.space.values())
            drawn = None if drawn in used else drawn
        known = trial.params.keys() == search.space.keys()  # earlier versions drew others
        combinations[trial.number] = tuple(trial.params[name] for name in search.space) if known else drawn
        used.add(combinations[trial.number])
    return drawn and dict(zip(search.space, drawn))


def draw(rng: random.Random, spec: tuple | list) -> bool | int | float | str:
    """A random one of a parameter's values; of a logarithmic range the small ones are as likely as for Optuna."""
    if isinstance(spec, list):
        return rng.choice(spec)
    low, high, log = spec
    if not log:
        return rng.randint(low, high)
    return min(max(round(math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))), low), high)


def suggest(trial: optuna.Trial, name: str, spec: tuple | list) -> bool | int | float | str:
    """A parameter's value, by the study's sampler."""
    if not isinstance(spec, tuple):
        return trial.suggest_categorical(name, spec)
    low, high, log = spec
    return (trial.suggest_int if isinstance(low, int) else trial.suggest_float)(name, low, high, log=log)


def run_seed(trial: optuna.Trial, search: Search, study: optuna.Study, seed: int, scores: list[float]) -> float:
    """What a trial's run with one seed is worth; `scores`: those of the seeds before."""
    objective, hold, total = search.args.objective, search.args.hold, search.base["total_timesteps"]
    run, config = f"{search.name}/trial-{trial.number}-seed-{seed}", search.folder / f"trial-{trial.number}.json"
    command = [sys.executable, search.args.script, "--config", config, "--seed", str(seed), "--run-name", run]
    folder, evaluations, known, value = Path("runs") / run, [], 0, math.nan
    met, met_time, interval = None, math.inf, search.base["eval_interval"]
    with contextlib.closing(run_command(command, folder.with_name(f"{folder.name}.log"))) as ticks:
        for _ in ticks:
            if time.time() > search.deadline:
                trial.set_user_attr("lost", "the budget was spent")
                raise TimeUp
            show(study, search)
            entries = [entry for entry in ballbot_runs.read_metrics(folder) if entry["kind"] != "best"]
            for entry in entries[len(evaluations) :]:
                final = entry["kind"] == "final"
                steps, values = entry["global_step"], (entry["episodic_return"], entry["episodic_length"])
                if not all(map(math.isfinite, values)):
                    at = "final policy" if final else f"evaluation at {steps:,} steps"
                    raise Failed("not finite: {}: return {}, length {}".format(at, *values))
                before = evaluations[-1][0] if evaluations else 0
                evaluations.append((total if final else steps, *values))
                met = objective == "steps-to-target" and first_met(evaluations, hold)
                if evaluations[-1][0] > before:  # the final policy's may be the second at its step: one is reported
                    known = total if final else steps // interval * interval  # the same for all batch sizes
                    value = statistics.median([*scores, score(objective, evaluations, total, hold)])
                    trial.report(value, len(scores) * total + known)
                    if not final and not met and trial.should_prune():
                        raise optuna.TrialPruned
            if met:  # the checkpoint is saved after the evaluation is logged
                met_time = min(met_time, modified(folder / "metrics.jsonl"))
            if met and modified(folder / "last.pt") >= met_time:
                for step in range(known + interval, total + 1, interval):  # among others it counts at later steps too
                    trial.report(value, len(scores) * total + step)
                break
    need(evaluations, f"{search.args.script} ended without an evaluation in {folder}/metrics.jsonl: log evaluations as "
         "ppo_ballbot.py does")  # fmt: skip
    return score(objective, evaluations, total, hold)


def modified(path: Path) -> int:
    """When a file was last written, ns; 0 if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else 0


# A study


def open_study(search: Search) -> optuna.Study:
    """The Optuna study of a search, begun or joined; exits with one line where it cannot be."""
    args = search.args
    interval, total = search.base["eval_interval"], search.base["total_timesteps"]
    pruner = {
        "median": lambda: optuna.pruners.MedianPruner(args.startup_trials, args.warmup_steps),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min(interval, total), total * len(search.seeds)),
        "none": optuna.pruners.NopPruner,
    }[args.pruner]()
    search.folder.mkdir(parents=True, exist_ok=True)
    foreign = any(search.folder.glob("trial-*"))  # unless the study says that they are its own
    for attempt in range(10):
        try:
            study = optuna.create_study(
                study_name=search.name, storage=open_storage(search), sampler=make_sampler(search),
                pruner=pruner, direction=direction(args.objective), load_if_exists=True,
            )  # fmt: skip
            break
        except Exception as error:  # SQLAlchemy and its drivers raise many kinds
            text = str(error).strip() or type(error).__name__
            # Where two commands begin at once, one finds what the other is just making.
            if attempt == 9 or not re.search("unique|duplicate key|already exists", text, re.IGNORECASE):
                kind = args.storage.partition("://")[0] or "file"  # and not the password in it
                sys.exit(f"error: the {kind} --storage cannot be used: {text.splitlines()[0]}")
            time.sleep(0.5)
    asked = json.loads(json.dumps(dict(
        script=args.script.name, strategy=args.strategy, objective=args.objective, hold=args.hold, seeds=search.seeds,
        base=search.base, space=search.space, options=search.options,
    )))  # fmt: skip
    begun = study.user_attrs.get("settings")
    if begun is None:
        need(not foreign, f"{search.folder} has trials of another study: move it away, or "
             "give another --study")  # fmt: skip
        study.set_user_attr("settings", asked)
        if search.given:
            study.enqueue_trial(search.given)
    else:
        wrong = [key for key in asked if asked[key] != begun.get(key)]
        need(not wrong, f"study {search.name} was begun with other flags ({', '.join(wrong)}): give those again, or "
             "another --study")  # fmt: skip
    return study


def make_sampler(search: Search, number: int = 0) -> optuna.samplers.BaseSampler:
    """Chooses a trial's values where `untried` does not. They follow from the study's name and the trial's number."""
    seed = zlib.crc32(f"{search.name} {number}".encode())
    if search.grid or search.args.strategy == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.args.startup_trials)


def open_storage(search: Search) -> optuna.storages.BaseStorage:
    """Where a search's study is kept."""
    args = search.args
    if args.storage:
        return optuna.storages.RDBStorage(
            args.storage, heartbeat_interval=args.heartbeat, grace_period=2 * args.heartbeat,
            heartbeat_stale_trial_callback=again,
        )  # fmt: skip
    file = Path("runs") / root(search) / "study.log"
    return optuna.storages.JournalStorage(Journal(str(file)))


class Journal(optuna.storages.journal.JournalFileBackend):
    """Optuna's file of a study, for processes that are killed and disks that are full.

    The kernel releases its lock when the process that has it dies; Optuna's lock files stay. A last line that was not
    written to its end, which Optuna would continue, is dropped.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with open(self._file_path, "r+b") as file:
            with contextlib.suppress(OSError):  # a disk without locks keeps nobody out
                fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            while end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                end -= 1
            file.truncate(end)
            file.seek(end)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())


def root(search: Search) -> str:
    """The folder of the whole command under runs/: that of a step lies in it."""
    return search.name.partition("/")[0]


def again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Try a lost trial's parameters again, from the first seed that it did not finish."""
    trial = copy(trial)
    results = trial.user_attrs.get("results", {})
    known = len(results) * study.user_attrs["settings"]["base"]["total_timesteps"]
    trial.intermediate_values = {step: value for step, value in trial.intermediate_values.items() if step <= known}
    trial.user_attrs = {"results": results}  # the others are of its process
    optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, trial)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial ended, but not by its parameters."""
    return "lost" in trial.user_attrs or (trial.state == TrialState.FAIL and "reason" not in trial.user_attrs)


def lost_numbers(trials: list[FrozenTrial]) -> set[int]:
    """Trials that do not count: what they were to try is tried again, or was queued twice at the same moment."""
    lost, retried = {trial.number for trial in trials if is_lost(trial)}, set()
    for trial in trials:
        history = trial.system_attrs.get("retry_history", ())
        if retried.issuperset(history[-1:]) and history:
            lost.add(trial.number)
        retried.update(history)
    return lost | retried


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """All trials but those lost."""
    trials = study.get_trials(deepcopy=False)
    lost = lost_numbers(trials)
    return [trial for trial in trials if trial.number not in lost]


def revive(study: optuna.Study) -> None:
    """Try trials again whose process is gone: by their heartbeat in a database, else by their pid on this machine."""
    storage = study._storage
    if optuna.storages._heartbeat.is_heartbeat_enabled(storage):
        return optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        mark = trial.user_attrs.get("process")
        if mark is None:  # it says so in its first moment, or died in it
            dead = time.time() - trial.datetime_start.timestamp() > 60
        else:
            dead = trial.user_attrs["host"] == socket.gethostname() and process_mark(int(mark.split()[0])) != mark
        if dead:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker was first
                if storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                    again(study, trial)


def retry_lost(study: optuna.Study) -> None:
    """Queue what was interrupted and not queued yet."""
    trials = study.get_trials(deepcopy=False)
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    for trial in trials:
        if is_lost(trial) and trial.number not in retried:
            again(study, trial)


_shown = 0.0


def show(study: optuna.Study, search: Search) -> None:
    """The live line."""
    global _shown
    if time.monotonic() - _shown < 1:
        return
    _shown = time.monotonic()
    trials, args = counted(study), search.args
    done, running = finished(trials), sum(trial.state == TrialState.RUNNING for trial in trials)
    states = [trial.state for trial in done]
    seconds = [(t.datetime_complete - t.datetime_start).total_seconds() for t in done if t.datetime_start]
    left = search.deadline - time.time()
    if seconds:
        left = min(left, statistics.mean(seconds) * (search.trials - len(done)) / max(running, 1))
    complete = [trial.value for trial in done if trial.state == TrialState.COMPLETE]
    best = (min if study.direction.name == "MINIMIZE" else max)(complete, default=None)
    text = "none yet" if best is None else shown(args.objective, best)
    left = time.strftime("%H:%M:%S", time.gmtime(max(left, 0))) if left < 86400 else "?"
    step = f"{search.name.partition('/')[2]}: ".removeprefix(": ")
    progress(f"{step}{len(done)} of {search.trials} trials, {states.count(TrialState.PRUNED)} pruned, "
             f"{states.count(TrialState.FAIL)} failed, best {args.objective} {text}, {left} left",
             len(done) / search.trials)  # fmt: skip


def finished(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that ended, in whatever way."""
    return [trial for trial in trials if trial.state.is_finished()]


def describe(trial: FrozenTrial, search: Search) -> str:
    """A finished trial in one line."""
    words = " ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in trial.params.items())  # fmt: skip
    if trial.state == TrialState.FAIL:
        return f"trial {trial.number} failed ({words}): {trial.user_attrs.get('reason', 'no reason known')}"
    value = "" if trial.value is None else f" {search.args.objective} {shown(search.args.objective, trial.value)}"
    if trial.state == TrialState.PRUNED:
        return f"trial {trial.number} pruned after {trial.last_step:,} steps:{value} ({words})"
    return f"trial {trial.number}:{value}{spread(trial, search)} ({words})"


def spread(trial: FrozenTrial, search: Search) -> str:
    """The range over a trial's seeds, as text."""
    values = trial.user_attrs["results"].values()
    if len(values) < 2:
        return ""
    return f" ({' to '.join(shown(search.args.objective, end) for end in (min(values), max(values)))})"


def interrupt_once(*_: Any) -> NoReturn:
    """Ctrl-C, or SIGTERM; a second one does not disturb what the first began, and what hangs is killed."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE + 5)
    raise KeyboardInterrupt


def next_trial(study: optuna.Study, search: Search) -> FrozenTrial:
    """Run a trial. Optuna's `optimize` would hide an interrupt and a full disk where it stores a trial's end."""
    trial, value, state = study.ask(), None, TrialState.FAIL
    try:
        with optuna.storages._heartbeat.get_heartbeat_thread(trial._trial_id, study._storage):
            value, state = run_trial(trial, search, study), TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except (Failed, TimeUp, optuna.exceptions.UpdateFinishedTrialError):
        pass  # the last: found dead by others, as if this machine slept
    finally:
        ended = study.tell(trial, value, state, skip_if_finished=True)
    return ended


@machine_faults_end()
def work(search: Search) -> None:
    """Run trials until there are enough, or the time is up."""
    quiet()
    study = open_study(search)
    while time.time() < search.deadline:
        revive(study)
        trials = counted(study)
        done = len(finished(trials))
        if done >= search.trials:
            break
        if done + sum(trial.state == TrialState.RUNNING for trial in trials) >= search.trials:
            show(study, search)  # others are at the last ones; should they die, those are ours
            time.sleep(1)
            continue
        try:
            tell(study, next_trial(study, search), search)
        except (MachineFault, OSError):
            with contextlib.suppress(OSError):
                retry_lost(study)  # other workers may have better luck
            raise


def tell(study: optuna.Study, trial: FrozenTrial, search: Search) -> None:
    """Print a trial's end, log it, and save it if it is the best."""
    if trial.number not in lost_numbers(study.get_trials(deepcopy=False)):
        clear_progress()
        print(describe(trial, search), flush=True)
        log_hparams(trial, search)
        best = best_trial(study)
        if best and best.number == trial.number:
            save_best(search.settings(trial.params), search.folder)


def be_worker(search: Search) -> None:
    """What the processes do that `run` starts."""
    with contextlib.suppress(KeyboardInterrupt):
        work(search)


def quiet() -> None:
    """Say nothing but our own lines, in any encoding, and end in order."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Heartbeat of storage")  # `next_trial` starts it as `optimize` does
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt_once)


def run(search: Search) -> optuna.Study:
    """Run a search with --workers; returns its study."""
    study = open_study(search)
    revive(study)
    retry_lost(study)
    before = len(finished(counted(study)))
    if before:
        print(f"{search.folder}: goes on after {before} trials of {search.trials}", flush=True)
    if search.args.workers == 1:
        work(search)
        return study
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=be_worker, args=(search,)) for _ in range(search.args.workers)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()
    if any(worker.exitcode for worker in workers) and len(finished(counted(study))) < search.trials:
        sys.exit("error: workers ended before the trials; the same command goes on")
    return study


# Results


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best complete trial, or None."""
    if any(trial.state == TrialState.COMPLETE for trial in counted(study)):
        return study.best_trial


def save_best(settings: dict[str, Any], folder: Path) -> None:
    """best.json, which both scripts take by --config."""
    write(folder / "best.json", lambda part: part.write_text(ballbot_runs.as_config(settings)))


def log_hparams(trial: FrozenTrial, search: Search) -> None:
    """A trial for TensorBoard's HParams tab."""
    if trial.value is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(search.folder / "hparams" / f"trial-{trial.number}") as writer:
        writer.add_hparams(dict(trial.params), {f"tune/{search.args.objective}": trial.value}, run_name=".")


def trial_runs(trial: FrozenTrial, search: Search) -> list[Path]:
    """The folders of a trial's runs that have a log."""
    numbers = [trial.number, *reversed(trial.system_attrs.get("retry_history", []))]  # of tries, the newest first
    runs = [[search.folder / f"trial-{number}-seed-{seed}" for number in numbers] for seed in search.seeds]
    runs = [[run for run in tries if any(run.glob(plot.EVENT_FILES))] for tries in runs]
    return [tries[0] for tries in runs if tries]


def draw_curves(trials: list[tuple[str, FrozenTrial]], search: Search, path: Path) -> None:
    """Learning curves of trials, [(label, trial)], where there are finished episodes."""
    groups, labels = [], []
    for label, trial in trials:
        curves = [plot.read(run)[1] for run in trial_runs(trial, search)]
        curves = [curve for curve in curves if all(len(curve[row[1]][0]) for row in plot.ROWS)]
        if curves:
            groups.append(curves)
            labels.append(label)
    if groups:
        write(path, partial(plot.draw(groups, labels).savefig, dpi=150))


def draw_study(study: optuna.Study, search: Search) -> list[str]:
    """Optuna's pictures of a study, and the learning curves of its three best trials beside those of the flags given.

    Returns the files' names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    kinds = {"history": pictures.plot_optimization_history, "importances": pictures.plot_param_importances,
             "slices": pictures.plot_slice, "interactions": pictures.plot_parallel_coordinate}  # fmt: skip
    complete = [trial for trial in counted(study) if trial.state == TrialState.COMPLETE]
    if len({trial.value for trial in complete}) < 2 or len(study.best_params) < 2:
        del kinds["importances"], kinds["interactions"]  # they compare parameters by what differs
    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna changes the style of all that comes after
        warnings.simplefilter("ignore", UserWarning)  # of axes with one value
        for name, picture in kinds.items():
            axes = np.ravel(picture(study, target_name=search.args.objective))
            figure = axes[0].figure
            figure.set_size_inches(max(8, 4 * len(axes)), 5)
            if name in ("slices", "interactions"):  # numbers and names that would lie on each other
                for ax in axes:
                    ax.tick_params(axis="x", which="both", rotation=45)
            write(search.folder / f"{name}.png", partial(figure.savefig, dpi=150, bbox_inches="tight"))
            pyplot.close(figure)
    ranked = sorted(complete, key=lambda trial: trial.value, reverse=study.direction.name == "MAXIMIZE")[:3]
    given = [trial for trial in complete if trial.params == search.given]
    draw_curves([(f"trial {trial.number}" + ", the flags given" * (trial in given), trial)
                 for trial in ranked + [trial for trial in given if trial not in ranked]],
                search, search.folder / "curves.png")  # fmt: skip
    return [f"{name}.png" for name in (*kinds, "curves") if (search.folder / f"{name}.png").exists()]


def advice(trial: FrozenTrial, search: Search, rank: str) -> list[str]:
    """What `diagnose` says of a trial's first run, with flags to paste: lines of text."""
    name = f"trial {trial.number}, the {rank}"
    for run in trial_runs(trial, search)[:1]:
        params, curves = diagnose.read(run)
        if params and all(len(curves[tag][0]) for tag in (diagnose.RETURN, diagnose.LENGTH, diagnose.KL)):
            command = (
                f"python {search.args.script} --config {shlex.quote(f'{search.folder}/trial-{trial.number}.json')}"
            )
            found = diagnose.diagnose(params, curves)
            lines = [f"  {finding}: {evidence}\n      {command} {flags}" for finding, evidence, flags in found]
            return [f"{name}:", *lines] if lines else [f"{name}: nothing is wrong"]
    return [f"{name}: too short for a diagnosis, no episode ended"]


def conclude(study: optuna.Study, search: Search) -> None:
    """Write and print what a study found."""
    clear_progress()
    trials, best = finished(counted(study)), best_trial(study)
    states = [trial.state for trial in trials]
    print(f"{search.folder}: {len(trials)} of {search.trials} trials, {states.count(TrialState.PRUNED)} pruned, "
          f"{states.count(TrialState.FAIL)} failed")  # fmt: skip
    if len(trials) == num_combinations(search):
        print(f"all {len(trials)} combinations of --space are tried")
    if best is None:
        return print("none was complete: there is no best")
    save_best(search.settings(best.params), search.folder)
    names = draw_study(study, search)
    judged = sorted((t for t in trials if t.value is not None), key=lambda trial: trial.value)
    worst = judged[0 if study.direction.name == "MAXIMIZE" else -1]
    print("\n".join(advice(best, search, "best") + (advice(worst, search, "worst") if worst != best else [])))
    print(f"best: {describe(best, search)}")
    print(f"  python {search.args.script} --config {shlex.quote(str(search.folder / 'best.json'))}")
    print(f"pictures: {', '.join(names)}; tensorboard --logdir {search.folder} has an HParams tab")


# Step by step


def steps_of(args: Args, module: ModuleType) -> dict[str, dict[str, dict[str, Any]]]:
    """The steps of one-at-a-time or six-steps: {title: {label: {flag: value}}}."""
    titles = SIX_STEPS if args.strategy == "six-steps" else {text.partition("=")[0]: (text,) for text in args.space}
    steps = {}
    for title, texts in titles.items():
        steps[title] = {}
        for key, values in on_grid(parse_space(texts, module), args.points).items():
            for value in values if len(values) > 1 else ():
                names = key.split("+")
                label = as_flags(dict.fromkeys(names, value))
                steps[title][label] = dict.fromkeys(names, value)
    return steps


def as_flags(settings: dict[str, Any]) -> str:
    """Settings as words of a command line."""

    def text(value):
        return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)

    return " ".join(plot.as_flag(name, text(value)) for name, value in settings.items())


def take_steps(args: Args, module: ModuleType, base: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
    """Keep the best of each step, and write the report."""
    name, folder = args.study, Path("runs") / args.study
    steps = steps_of(args, module)
    last = "validation" if args.strategy == "six-steps" else None
    current, value, rows, stopped, number = dict(base), None, [], "", 0
    for number, title in enumerate(["baseline", *steps, *filter(None, [last])], 1):
        seeds = args.seeds if title != "validation" else GUIDE_SEEDS
        if title == "baseline":
            changes = {"baseline": {}}
        elif title == "validation":
            changes = {"baseline": base} | ({"winner": current} if current != base else {})
        else:
            changes = {label: change for label, change in steps[title].items() if current | change != current}
            for label in [label for label, change in changes.items() if refused(module, current | change)]:
                rows.append(dict(step=title, label=label, values=[], kept=False,
                                 note=f"cannot be: {refused(module, current | changes.pop(label))}"))  # fmt: skip
        if not changes:
            continue
        slug = re.sub(r"\W+", "-", title)
        search = Search(args, f"{name}/{number}-{slug}", current, {"change": list(changes)}, {"change": changes}, seeds,
                        len(changes), True, deadline)  # fmt: skip
        study = run(search)
        clear_progress()
        trials = finished(counted(study))
        best = best_trial(study)
        better = title != "validation" and is_better(args, best and best.value, value)
        by_label = {trial.params["change"]: trial for trial in trials if "change" in trial.params}
        for label in changes:
            trial = by_label.get(label)
            state, values = trial and trial.state, []
            note = {None: "not run", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}.get(state, "")
            if state == TrialState.FAIL:
                note += f": {trial.user_attrs.get('reason', 'no reason known')}"
            if state == TrialState.COMPLETE:
                values = list(trial.user_attrs["results"].values())
            kept = better and trial == best
            rows.append(dict(step=title, label=label, values=values, note=note, kept=kept))
        if better:
            value, current = best.value, current | changes[best.params["change"]]
        save_best(current, folder)
        if len(trials) < len(changes):
            stopped = f"It ended in step {number}, {title}; the same command goes on there."
        elif title == "baseline" and not better:
            stopped = "The baseline failed: nothing to compare with."
        report = write_report(args, base, current, rows, stopped)
        if stopped:
            break
    clear_progress()
    print(report)
    print(f"wrote {folder}/report.md, report.png and best.json: python {args.script} --config {folder}/best.json")
    return rows


def is_better(args: Args, value: float | None, than: float | None) -> bool:
    """Whether an objective's value is better than another; None is none."""
    if value is None or than is None:
        return value is not None
    return value < than if direction(args.objective) == "minimize" else value > than


def verdict(args: Args, before: list[float], after: list[float]) -> str:
    """By how much `after` is better than `before`, values over seeds, and whether that is more than their spread."""
    gain = statistics.median(after) - statistics.median(before)
    gain = -gain if direction(args.objective) == "minimize" else gain
    spread = max(max(values) - min(values) for values in (before, after))
    say = partial(shown, args.objective)
    more = f"That is {'' if gain > spread else 'not '}more than the seeds' spread, {say(spread)} from worst to best."
    if len(before) == 1 or len(after) == 1:
        more = "With one seed, nobody knows whether that is more than seeds differ by."
    better = "better" if gain >= 0 else "worse"
    return (f"The winner's median {args.objective} is {say(statistics.median(after))}, the baseline's "
            f"{say(statistics.median(before))}: {better} by {say(abs(gain))}. {more}")  # fmt: skip


def write_report(
    args: Args, base: dict[str, Any], current: dict[str, Any], rows: list[dict[str, Any]], stopped: str
) -> str:
    """report.md, whose text it returns, and report.png: what was tried, and what won by how much."""
    folder, say = Path("runs") / args.study, partial(shown, args.objective)
    changed = {key: value for key, value in current.items() if value != base[key]}
    flags = f"`{as_flags(changed)}`" if changed else "none: the baseline is best"
    lines = [
        f"# {args.strategy}: {args.study}", "",
        f"Objective: {args.objective} on unseen terrain, the median over seeds {', '.join(map(str, args.seeds))}; "
        f"{base['total_timesteps']:,} steps each, `{args.script.name}`. Each step keeps its best change if that is "
        "better than what was kept before.", "", f"Changes kept: {flags}", "",
    ]  # fmt: skip

    def in_table(label: str, values: list[float], note: str) -> str:
        ends = sorted(values, reverse=direction(args.objective) == "minimize")
        seeds = f"{say(statistics.median(ends))} | {say(ends[0])} to {say(ends[-1])}" if values else " | "
        return f"| {label} | {seeds} | {note} |"

    kept = []  # the values of what is kept, step by step
    for number, step in enumerate(dict.fromkeys(row["step"] for row in rows), 1):
        lines += [f"## {number}. {step.capitalize()}", "",
                  f"| tried | median {args.objective} | seeds, worst to best |  |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        tried = [row for row in rows if row["step"] == step]
        if kept and step != "validation":
            lines.append(in_table("as before", kept[-1], ""))
        for row in tried:
            note = "**kept**" if row["kept"] and step != "baseline" else row["note"].replace("|", "/")
            lines.append(in_table(f"`{row['label']}`", row["values"], note))
        kept += [row["values"] for row in tried if row["kept"]]
        lines.append("")
    validated = {row["label"]: row["values"] for row in rows if row["step"] == "validation"}
    lines += ["## Result", ""]
    if validated.get("baseline") and validated.get("winner"):
        fresh = " These seeds took no part in the choice." if not set(GUIDE_SEEDS) & set(args.seeds) else ""
        lines.append(verdict(args, validated["baseline"], validated["winner"]) + fresh)
    elif len(kept) > 1:
        lines.append(verdict(args, kept[0], kept[-1]) + " These are the seeds that the choice was made by, which "
                     "flatters the winner.")  # fmt: skip
    else:
        lines.append("Nothing was better than the baseline.")
    lines += ["", stopped] if stopped else []
    write(folder / "report.md", lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    draw_report(args, rows, folder / "report.png")
    return "\n".join(lines)


def draw_report(args: Args, rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each step: the seeds as points, their median as a line, what is kept in colour, and before dashed."""
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys(row["step"] for row in rows if row["values"]))
    if not steps:
        return
    widths = [sum(row["step"] == step and bool(row["values"]) for row in rows) for step in steps]
    figure = Figure(figsize=(max(6, 2 + 0.7 * sum(widths)), 4.5), layout="constrained")
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False, width_ratios=[n + 0.5 for n in widths])[0]
    before = math.nan
    for ax, step in zip(axes, steps):
        shown_rows = [row for row in rows if row["step"] == step and row["values"]]
        for x, row in enumerate(shown_rows):
            color = plot.COLORS[1] if row["kept"] or row["label"] == "winner" else plot.COLORS[0]
            ax.plot([x] * len(row["values"]), row["values"], "o", ms=4, color=color, alpha=0.6)
            ax.hlines(statistics.median(row["values"]), x - 0.35, x + 0.35, color=color, lw=2)
        if step != "validation":
            ax.axhline(before, color="0.6", lw=1, ls="--")
        before = next((statistics.median(row["values"]) for row in shown_rows if row["kept"]), before)
        ax.set_xticks(range(len(shown_rows)), [row["label"].replace(" --", "\n--") for row in shown_rows],
                      rotation=45, ha="right", size=7)  # fmt: skip
        ax.set_title(step, size=9)
        ax.set_xlim(-0.6, len(shown_rows) - 0.4)
        ax.grid(axis="y", color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(args.objective)
    figure.suptitle("points: seeds; line: their median; orange: kept; dashed: what was kept before", size=9)
    write(path, partial(figure.savefig, dpi=200))


@machine_faults_end()
def main(args: Args, flags: list[str]) -> list[dict[str, Any]] | None:
    need(re.fullmatch(r"(?!\.+$)[\w.-]*", args.study), f"--study is {args.study}: give letters, digits, ., - and _")
    args = replace(args, study=args.study or f"tune-{args.strategy}")
    need_from(args, 2, "points")
    need_from(args, 1, "hold", "workers", "heartbeat", "trials")
    need_from(args, 0, "startup_trials", "warmup_steps")
    need(args.budget_minutes > 0, f"--budget-minutes is {args.budget_minutes}: give more than 0")
    need(args.seeds and len(set(args.seeds)) == len(args.seeds), "--seeds are none, or one is given twice")
    stepwise = args.strategy in ("one-at-a-time", "six-steps")
    need(not (stepwise and args.trials), f"--trials means nothing with {args.strategy}: its steps have their own")
    given = args.space != SPACE
    need(not (args.strategy == "six-steps" and given), "--space means nothing with six-steps: it has the guide's")
    quiet()
    installed = Path(ballbot_runs.__file__).with_name(args.script.name)
    if not args.script.exists() and installed.is_file():
        args = replace(args, script=installed)
    module, base = base_settings(args.script, flags)
    deadline = time.time() + 60 * args.budget_minutes
    try:
        if stepwise:
            need(not refused(module, base), f"the flags after --: {refused(module, base)}")
            if args.strategy == "one-at-a-time":
                space = parse_space(args.space, module)
                check_space(space, module, base)
                base |= fixed_values(space)
            return take_steps(args, module, base, deadline)
        given = base
        base, space, options = check_space(parse_space(args.space, module), module, base)
        grid = args.strategy == "grid"
        space = on_grid(space, args.points) if grid else space
        search = Search(args, args.study, base, space, options, args.seeds, 0, grid, deadline)
        size = num_combinations(search)
        need(args.trials or not grid or size <= 1000, f"the grid has {size:,} combinations: give a smaller --space, or "
             "--trials")  # fmt: skip
        search.trials = min(args.trials or (size if grid else 20), size)
        search.given = parameters(given, search) if args.strategy == "tpe" else None
        if flags and args.strategy == "tpe" and not search.given:
            print("the flags after -- lie outside --space: no trial has them, and what is near them is not tried")
        conclude(run(search), search)
    except KeyboardInterrupt:
        clear_progress()
        sys.exit("stopped; the same command goes on")


def cli() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command(lambda args: main(args, sys.argv[cut + 1 :]), Args, description=__doc__, args=sys.argv[1:cut])


if __name__ == "__main__":
    cli()
