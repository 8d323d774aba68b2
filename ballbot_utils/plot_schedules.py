"""Plots every schedule of ppo_ballbot_schedules.py: `python -m ballbot_utils.plot_schedules`.

The KL-adaptive learning rate depends on the run; here it follows an invented KL divergence, shown dotted.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import ppo_ballbot_schedules
from ballbot_utils.common import require_packages, require_writable, run_program, write
from ppo_ballbot_schedules import adapt_to_kl, learning_rate_at, scheduled


@dataclass
class Args:
    output: Path = Path("schedules.png")
    """file to write"""
    overwrite: bool = False
    """replace a file that exists"""


def main(flags: Args) -> None:
    require_writable("--output", flags.output, flags.overwrite, ".png")
    require_packages("plotting", "matplotlib")
    from matplotlib.figure import Figure

    args, done = ppo_ballbot_schedules.Args(), np.linspace(0, 1, 601)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    lr, ent, clip = figure.subplots(1, 3)
    lr.plot(done, [learning_rate_at(args, 1 - d) for d in done], label="guide (default)")
    for kind in ("constant", "linear", "cosine"):
        lr.plot(done, [scheduled(kind, 3e-4, 0, 1 - d) for d in done], label=f"{kind}, from 3e-4")
    rates, divergences = [3e-4], 0.01 * np.exp(1.2 * np.sin(2 * np.pi * done[::20]))
    for divergence in divergences[:-1]:
        rates.append(adapt_to_kl(rates[-1], divergence, 0.01))
    lr.step(done[::20], rates, where="post", label="kl, target 0.01")
    kl = lr.twinx()
    kl.plot(done[::20], divergences, "k:", lw=1)
    kl.set(yscale="log", ylabel="KL divergence (dotted)")
    lr.set(title="--lr-schedule", yscale="log", ylabel="learning rate", ylim=(3e-6, 2e-3))
    for axis, name, start, end in (
        (ent, "ent", args.ent_coef, args.ent_end),
        (clip, "clip", args.clip_coef, args.clip_end),
    ):
        for kind in ("constant", "linear", "cosine"):
            values = [scheduled(kind, start, end, 1 - d) for d in done]
            axis.plot(done, values, label=kind + (" (the guide's, default)" if kind == "linear" else ""))
        axis.set(title=f"--{name}-schedule", ylabel=f"{name} coefficient", ylim=(0, None))
    for axis in (lr, ent, clip):
        axis.set_xlabel("share of training")
        axis.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, ncols=2
        )  # below the curves
        axis.grid(alpha=0.3)
    figure.get_layout_engine().set(wspace=0.08)  # for the labels of the second axis
    write(flags.output, partial(figure.savefig, dpi=120))
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
