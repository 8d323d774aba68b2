"""Compare search strategies: `python -m benchmark.strategies grid random tpe --output strategies.png`.

For each name, plots the best return so far against the number of trials: a thin line for each of the studies
runs/NAME-*, and a thick one for their median. Prints each study's result and its number of failed trials.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import tyro
from matplotlib.figure import Figure
from optuna.trial import TrialState

from ballbot_utils import plot
from ballbot_utils.common import run_program, write
from ballbot_utils.console import check_argument
from ballbot_utils.tune.study import finished, valid_trials


@dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]]
    """prefixes of the studies' names, one for each strategy"""
    output: Path = Path("strategies.png")
    """file to write"""


def main(args: Args) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    check_argument(args.names, "no names given: give prefixes of studies' names")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, color in zip(args.names, plot.COLORS):
        paths = sorted(Path("runs").glob(f"{name}-*/study.db"))
        check_argument(paths, f"runs/{name}-* holds no study: run them first")
        best = []
        for path in paths:
            study = optuna.load_study(study_name=path.parent.name, storage=f"sqlite:///{path}")
            ended = finished(valid_trials(study))
            values = [trial.value if trial.state == TrialState.COMPLETE else -np.inf for trial in ended]
            best.append(np.maximum.accumulate(values))
            failed = sum(trial.state == TrialState.FAIL for trial in ended)
            print(f"{study.study_name}: {len(values)} trials, {failed} failed, best {study.best_value:.1f}, trial "
                  f"{study.best_trial.number}: {study.best_params}")  # fmt: skip
        best = np.array([values[: min(map(len, best))] for values in best])
        edges = np.arange(best.shape[1] + 1) + 0.5
        for values in best:
            ax.stairs(values, edges, baseline=None, color=color, alpha=0.4, lw=1)
        ax.stairs(np.median(best, 0), edges, baseline=None, color=color, lw=2.5, label=f"{name}, {len(best)} studies")
    ax.set(xlabel="trial", ylabel="best return so far")
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    write(args.output, partial(figure.savefig, dpi=150))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
