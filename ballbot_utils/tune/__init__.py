"""The guide's tuning strategies: `python -m ballbot_utils.tune --strategy tpe --trials 50 -- --preset tuned`.

A trial runs ppo_ballbot.py once for each of --seeds, with the flags that a strategy chose from --space and the flags
after `--`. Its results are read from metrics.jsonl. Everything lies in runs/<study>/: for each trial its flags
(trial-3.json), and for each seed its run (trial-3-seed-1/) and the run's output (trial-3-seed-1.log). The same command
resumes the study. On other machines, with the same --storage, it joins the study.
Samplers, pruners, storages and plots are Optuna's.

- grid: every combination; a range stands for --points values.
- one-at-a-time: the first hyperparameter of --space, then the next with the best value of the first, and so on.
- random: --trials combinations, sampled independently. In a space of lists and linear ranges of whole numbers, none is
  repeated.
- tpe: --trials combinations by the tree-structured Parzen estimator. It starts with the flags after `--` if they lie in
  --space.
- six-steps: the guide's systematic process, with its values: baseline, learning rate, clip range, exploration,
  architecture, validation on its five seeds; --space is not used.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ballbot_utils.console import exit_with_error
from ballbot_utils.tune.space import SPACE, Space

try:
    import optuna as _optuna  # noqa: F401
except ImportError:
    exit_with_error("tuning needs Optuna: pip install -r requirements-tune.txt")

# The guide's process, step by step. It has no values for the initial noise and "different depths": those are ours.
SIX_STEPS = {
    "learning rate": "learning-rate=1e-5,5e-5,1e-4,5e-4,1e-3",
    "clip range": "clip-coef=0.01,0.015,0.02,0.03",
    "exploration, entropy": "ent-coef=0.0001,0.001,0.01",
    "exploration, initial noise": "init-log-std=-1,-0.5,0",
    "architecture, width": "hidden-size=64,128,256",
    "architecture, layers": "pi-layers+vf-layers=2,3,4",
}
GUIDE_SEEDS = (10, 42, 100, 200, 300)


@dataclass
class Args:
    strategy: Literal["grid", "one-at-a-time", "random", "tpe", "six-steps"] = "tpe"
    """the guide's strategies 1 (both grid and one-at-a-time), 2 and 3, or its systematic process"""
    space: tuple[str, ...] = SPACE
    """what to try, with the names of flags: name=low:high, name=low:high:log, name=a,b,c or one value. The default: the
    guide's typical ranges"""
    study: str = ""
    """folder under runs/ and name in the storage; empty: tune-<strategy>"""
    script: Path = Path("ppo_ballbot.py")
    """the program to tune: this one, ppo_ballbot_schedules.py or a copy of yours"""
    objective: Literal["return", "length", "steps-to-target"] = "return"
    """on unseen terrain: the final policy's return or length, or the steps until an evaluation met both targets (a run
    ends there). A run that missed them scores once to twice --total-timesteps, less the nearer it came"""
    hold: int = 1
    """steps-to-target: evaluations in a row that must meet both; the first of them counts"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """each trial's runs, one after the other; their median counts"""
    trials: int | None = None
    """trials in total, with those of earlier and other commands; default: 20, or the whole grid. grid and random end
    when all combinations are tried"""
    points: int = 3
    """values of a range for grid and one-at-a-time"""
    budget_minutes: float = math.inf
    """end after this time; the next command resumes an interrupted trial at its first unfinished seed"""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """end bad trials early: their best so far is below the median of others at equal steps, or by Hyperband"""
    warmup_steps: int = 0
    """steps of a trial before the median can prune it"""
    startup_trials: int = 10
    """random trials before tpe chooses, and finished ones before the median prunes"""
    workers: int = 1
    """trials at a time on this machine"""
    storage: str = ""
    """a database that several machines share, postgresql+psycopg://user:password@host/name; empty: an SQLite file in
    the folder"""
    heartbeat: int = 30
    """seconds between a trial's heartbeats; after twice that without one, others take the trial over"""


@dataclass
class Search:
    """One Optuna study and the limits of this command."""

    args: Args
    name: str  # of the study, and of its folder under runs/
    space: Space
    combinations: list[dict[str, Any]] | None  # to try, each once; None: the sampler chooses
    num_trials: int
    seeds: tuple[int, ...]
    deadline: float  # in seconds since the epoch

    @property
    def folder(self) -> Path:
        """The folder of its trials."""
        return Path("runs") / self.name

    @property
    def root(self) -> Path:
        """The folder of the whole command; the folder of a step lies in it."""
        return Path("runs") / self.args.study

    @property
    def best(self) -> Callable[[Iterable[float]], float]:
        """The function that returns the best of several values of the objective."""
        return min if self.args.objective == "steps-to-target" else max
