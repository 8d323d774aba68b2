"""Compare with the PPO of other libraries: `python -m benchmark.peers --cleanrl ppo_continuous_action.py --jobs 2`.

`benchmark.other_ppo` trains with Stable-Baselines3 and CleanRL, with our hyperparameters, networks and environments. It
says which differences remain. Each run appends a line to benchmark/peers/runs.jsonl. The end is a table, speeds
and a figure of each setting. `--seeds` without values only makes them.
"""

from dataclasses import dataclass
from pathlib import Path

from ballbot_utils.common import run_program
from benchmark.records import Experiment, draw, group_lines, make_table, median_of, read_lines, train_all

FILE, OURS = Path("benchmark/peers/runs.jsonl"), "ppo_ballbot.py"
SETTINGS = {
    "paper": "--preset paper --no-cameras",
    "defaults": "--no-cameras --no-privileged-critic",  # every option that the others have
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each library and setting"""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """paper, or the defaults without the privileged critic"""
    steps: int = 3_000_000
    """physics steps of a run"""
    cleanrl: str = ""
    """a copy of CleanRL's cleanrl/ppo_continuous_action.py; empty: without CleanRL"""
    jobs: int = 1
    """runs at a time, one core each"""


def main(args: Args) -> None:
    scripts = {OURS: OURS, "Stable-Baselines3": "-m benchmark.other_ppo sb3"}
    scripts |= {"CleanRL": f"-m benchmark.other_ppo {args.cleanrl}"} if args.cleanrl else {}
    experiments = [
        Experiment(setting, peer, f"{SETTINGS[setting]} --total-timesteps {args.steps}", seed, script)
        for seed in args.seeds for setting in args.settings for peer, script in scripts.items()
    ]  # fmt: skip
    train_all(FILE, experiments, args.jobs)
    lines = read_lines(FILE)
    for setting in args.settings:
        if groups := group_lines(lines, {peer: (setting, peer) for peer in (OURS, "Stable-Baselines3", "CleanRL")}):
            draw(FILE.with_name(f"{setting}.png"), setting, groups, OURS)
            print(make_table(setting, groups, OURS))
            for peer, group in groups.items():
                print(f"{peer}: {median_of(group, 'SPS/train'):,.0f} steps/s")


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
