"""How fast does a policy drive, and how does it fall? `python -m benchmark.speeds runs/NAME/last.pt`.

Runs the policy without action noise in 48 evaluation episodes. Prints mean velocities and headings over time, and for
each fall the velocity and heading 0.5 s before.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import ppo_ballbot
from ballbot_utils.common import run_program
from ballbot_utils.geometry import in_body_frame

EPISODES, TIMES, BEFORE = 48, (0.8, 1.6, 2.4, 3.2, 4.8, 6.4, 7.9), 0.5  # s


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]
    """a checkpoint (.pt file), or the folder of a run, for its best.pt"""


def main(flags: Args) -> None:
    policy = ppo_ballbot.load_policy(flags.checkpoint)
    args, seconds = policy.args, 0.002 * policy.args.frame_skip
    envs = ppo_ballbot.make_envs(args, EPISODES, evaluation=True)
    obs, _ = envs.reset(seed=1_000_100)
    up, states, falls = np.ones(EPISODES, bool), [], []
    for step in range(int(8 / seconds) - 1):
        obs, _, terminations, *_ = envs.step(policy(obs))
        falls += [(step, i) for i in np.flatnonzero(terminations & up)]
        up &= ~terminations
        heading = in_body_frame(obs["orientation"], obs["vel"])[1]
        states.append(np.where(up[:, None], np.concatenate([obs["vel"][:, :2], heading], 1), np.nan))
    print(f"{flags.checkpoint}: {len(falls)} of {EPISODES} fall")
    for time in TIMES:
        (x, y, heading), spread = (f(states[int(time / seconds)], axis=0) for f in (np.nanmean, np.nanstd))
        print(f"after {time} s: velocity {x:.2f}, {y:.2f} m/s, heading {heading:.2f} ± {spread[2]:.2f} rad")
    for step, i in falls:
        x, y, heading = states[max(step - round(BEFORE / seconds), 0)][i]
        print(f"a fall after {step * seconds:.1f} s, {BEFORE} s before: {x:.2f}, {y:.2f} m/s, {heading:.2f} rad")


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
