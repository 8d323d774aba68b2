"""A study: its Optuna storage, which of its trials count, and the loop that runs them."""

import contextlib
import json
import random
import signal
import statistics
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ballbot_utils.common import progress
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.tune import Search
from ballbot_utils.tune.trial import GRACE, MachineFault, TrialAborted, TrialFailed, format_value, run_trial

STOPPED = threading.Event()  # by Ctrl-C


@contextlib.contextmanager
def exit_on_machine_fault() -> Iterator[None]:
    """A block in which a fault of the machine exits with a one-line error: no space, no memory, no database."""
    try:
        yield
    except (MachineFault, OSError, MemoryError, StorageInternalError, SQLAlchemyError, AssertionError) as error:
        if isinstance(error, AssertionError):  # Optuna's own hides the error of a storage
            error = error.__context__ or error
        error = error.__cause__ or error
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        exit_with_error(f"{text}: fix that (make room, or give fewer --workers); then the same command resumes")


def interrupt_once(*_: Any) -> NoReturn:
    """Handle Ctrl-C and SIGTERM: ignore a second one, and kill this process if it does not end in time."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE + 20)
    STOPPED.set()
    raise KeyboardInterrupt


class Storage(optuna.storages.RDBStorage):
    """The database of a study. SQLite cannot lock rows: a file keeps two workers from taking the same queued trial."""

    def __init__(self, search: Search) -> None:
        self.lock = FileLock(search.root / "study.lock")
        url, heartbeat = search.args.storage or f"sqlite:///{search.root}/study.db", search.args.heartbeat
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        super().__init__(url, options, heartbeat_interval=heartbeat, heartbeat_stale_trial_callback=requeue)

    def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
        with self.lock:
            return super().set_trial_state_values(*args, **kwargs)


class SeededSampler(optuna.samplers.RandomSampler):
    """Random or TPE samples that follow from the study's name, the trial's number and the parameter's name."""

    def __init__(self, make: Callable[..., optuna.samplers.BaseSampler]) -> None:
        super().__init__()
        self.make = make

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        seed = zlib.crc32(f"{study.study_name} {trial.number} {name}".encode())
        return self.make(seed=seed).sample_independent(study, trial, name, distribution)


def open_study(search: Search) -> tuple[optuna.Study, Storage]:
    """Create or join the Optuna study of a search, and queue what it tries first; exits with a one-line error."""
    args, total = search.args, search.space.base["total_timesteps"]
    shortest = min(search.space.base["eval_interval"], total)
    pruner = {"median": lambda: optuna.pruners.MedianPruner(args.startup_trials, args.warmup_steps),
              "hyperband": lambda: optuna.pruners.HyperbandPruner(shortest, total * len(search.seeds)),
              "none": optuna.pruners.NopPruner}[args.pruner]()  # fmt: skip
    tpe = partial(optuna.samplers.TPESampler, n_startup_trials=args.startup_trials)
    sampler = SeededSampler(tpe if args.strategy == "tpe" else optuna.samplers.RandomSampler)
    search.folder.mkdir(parents=True, exist_ok=True)
    check_argument(
        not (search.root / "study.log").exists(), f"{search.root} is of an earlier version: give another --study"
    )
    foreign = any(search.folder.glob("trial-*"))  # unless they are of this study
    settings = json.loads(json.dumps(dict(
        script=args.script.name, strategy=args.strategy, objective=args.objective, hold=args.hold, seeds=search.seeds,
        base=search.space.base, space=search.space.specs, options=search.space.options,
    )))  # fmt: skip
    with FileLock(search.root / "study.lock"):
        try:
            storage = Storage(search)
            study = optuna.create_study(
                storage=storage, sampler=sampler, pruner=pruner, study_name=search.name, load_if_exists=True,
                direction="minimize" if search.best is min else "maximize",
            )  # fmt: skip
        except Exception as error:  # SQLAlchemy and its drivers raise many kinds
            kind = args.storage.partition("://")[0] or "file"  # without the password in the address
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            exit_with_error(f"the {kind} --storage cannot be used: {text}")
        begun = study.user_attrs.get("settings")
        check_argument(
            begun or not foreign, f"{search.folder} has trials of another study: move it away, or give another --study"
        )
        wrong = [key for key in settings if begun and settings[key] != begun.get(key)]
        names = ", ".join(wrong)
        check_argument(
            not wrong, f"study {search.name} has other flags ({names}): give the same flags, or another --study"
        )
        study.set_user_attr("settings", settings)
        first = list(search.combinations or [])
        random.Random(search.name).shuffle(first)
        if args.strategy == "tpe":
            first = [search.space.parameters(search.space.base)]
        for params in first[: search.num_trials]:
            study.enqueue_trial(params, skip_if_exists=True)
    return study, storage


def valid_trials(study: optuna.Study) -> list[FrozenTrial]:
    """All trials except the aborted, lost and superfluous ones: a trial that fails by its parameters has a reason."""
    return [trial for trial in study.get_trials(deepcopy=False)
            if trial.state != TrialState.FAIL or "reason" in trial.user_attrs]  # fmt: skip


def finished(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that ended, in any state."""
    return [trial for trial in trials if trial.state.is_finished()]


def attempts(trial: FrozenTrial) -> list[int]:
    """The numbers of a requeued trial's earlier attempts, oldest first."""
    return optuna.storages.RetryHeartbeatStaleTrialCallback.retry_history(trial)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best complete trial, or None."""
    return study.best_trial if study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]) else None


def requeue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a lost trial again, with its finished seeds. Runs are repeatable, and so are the values they reported."""
    optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, trial)


def requeue_dead(study: optuna.Study, storage: Storage) -> None:
    """Queue again the trials of workers whose heartbeat stopped, and interrupted trials that are not queued yet."""
    with storage.lock:
        optuna.storages.fail_stale_trials(study)  # calls `requeue`
        trials = study.get_trials()
        requeued = {number for trial in trials for number in attempts(trial)}
        for trial in trials:
            lost = trial.state == TrialState.FAIL and not {"reason", "superfluous"} & trial.user_attrs.keys()
            if lost and trial.number not in requeued:
                requeue(study, trial)


ReportTrial = Callable[[optuna.Study, FrozenTrial, Search], None]


def run_study(search: Search, report_trial: ReportTrial) -> optuna.Study:
    """Run a search on --workers threads, each of which starts trainings as processes; returns its study."""
    study, storage = open_study(search)
    done = len(finished(valid_trials(study)))
    if done:
        print(f"{search.folder}: resumes after {done} of {search.num_trials} trials", flush=True)

    def objective(trial: optuna.Trial) -> float:
        earlier = [other for other in valid_trials(study) if other.number < trial.number]
        fixed = trial.study.get_trials(deepcopy=False)[trial.number].system_attrs.get("fixed_params")
        twice = search.combinations and fixed in [other.params for other in earlier]
        if twice or sum(other.state != TrialState.WAITING for other in earlier) >= search.num_trials:
            trial.set_user_attr("superfluous", True)  # two machines took trials at the same moment
            raise TrialAborted
        try:
            return run_trial(trial, search, lambda: tick(study, search))
        except (MachineFault, OSError, StorageInternalError) as error:
            faults.append(error)  # `optimize` ignores the last errors of several workers
            raise

    def callback(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.state != TrialState.FAIL or "reason" in trial.user_attrs:
            report_trial(study, trial, search)

    faults: list[Exception] = []
    while not faults and (left := search.deadline - time.time()) > 0:
        requeue_dead(study, storage)
        trials = valid_trials(study)
        if len(finished(trials)) >= search.num_trials:
            break
        missing = search.num_trials - sum(trial.state != TrialState.WAITING for trial in trials)
        if missing <= 0:
            time.sleep(1)  # other machines run the last trials; if they die, this one takes over
            continue
        try:
            study.optimize(objective, missing, left, search.args.workers, (TrialFailed, TrialAborted), [callback])
        except ValueError as error:
            if "Cannot tell a FAIL trial" not in str(error):
                raise
            # Another worker took the trial over, for example while this machine was suspended
    if faults:
        raise faults[0]
    return study


def tick(study: optuna.Study, search: Search) -> None:
    """Show the live line; raises TrialAborted if the command ends. Trials call this about once a second."""
    left = search.deadline - time.time()
    if STOPPED.is_set() or left < 0:
        raise TrialAborted
    done, best = finished(valid_trials(study)), best_trial(study)
    if done:
        seconds = statistics.mean(trial.duration.total_seconds() for trial in done)
        left = min(left, seconds * (search.num_trials - len(done)) / search.args.workers)
    text = format_value(search.args.objective, best.value) if best else "none yet"
    clock = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else "?"
    progress(f"{search.name}: {len(done)} of {search.num_trials} trials, best {search.args.objective} {text}, "
             f"{clock} left", len(done) / search.num_trials)  # fmt: skip


def configure_process() -> None:
    """Print only our own lines, in any encoding, and end in order on signals."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "The reported value is ignored")
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt_once)
