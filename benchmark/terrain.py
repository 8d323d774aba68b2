"""Train on ground where a blind robot falls: `python -m benchmark.terrain --jobs 2`.

Each kind of ground is driven blind, with the true heights ahead, with cameras whose encoder learned to tell these
heights, turned up or not, and with the encoder of the default. All start from the preset tuned. Encoders are trained
first, in a minute each. Each run appends a line to benchmark/terrain/runs.jsonl, with evaluations of its best and its
last policy in 100 episodes on ground that is used for nothing else: of that kind, or the best on all kinds after
`mixed`. Runs whose line exists are skipped, interrupted ones are resumed. The tables in docs/terrain.md are made of
all lines; `--seeds` without values only makes these.
"""

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ballbot_utils.common import run_program
from ballbot_utils.terrain import TERRAINS, is_seeded
from benchmark.records import Experiment, evaluate, fill_marks, group_lines, read_lines, show_mean, train_all

FILE, PAGE = Path("benchmark/terrain/runs.jsonl"), Path("docs/terrain.md")
KINDS = {
    "potholes": "--terrain potholes:depth=0.1",
    "mounds": "--terrain hills:height=0.2,width=0.6,spacing=1.5",
    "hills": "--terrain-amplitude 0.25",
    "mixed": "--terrain mixed:patch=8",  # of 6 m, borders leave little of each kind
}
# An action is held for 16 ms instead of 8. So robots learn to steer, probably because its noise lasts long enough to
# move them to the side. The horizon is 1.6 s or more instead of 1.3 s: with a short one they risk a fall to go faster
TRAINING = (
    "--preset tuned --max-episode-steps 4000 --frame-skip 8 --gae-lambda 0.97 --num-envs 32 --num-steps 64 "
    "--eval-interval 500000"
)
MORE_TRAINING = {
    "potholes": "--gamma 0.994", "mounds": "--gamma 0.994",
    "hills": "--gamma 0.99 --total-timesteps 12000000", "mixed": "--gamma 0.994 --total-timesteps 8000000",
}  # fmt: skip
# Pitch of the cameras, degrees, and the encoder that is trained for them on each kind of ground
ENCODERS = {
    "cameras": (25, "runs/terrain_encoder_{}.pt"),
    "cameras not turned": (0, "runs/terrain_encoder_{}_0.pt"),
}
SENSORS = {
    sensor: f"--env-kwargs camera_pitch={pitch} camera_rate=30 --encoder-path {encoder} --depth-scale 1"
    for sensor, (pitch, encoder) in ENCODERS.items()
} | {
    "default encoder": "--env-kwargs camera_rate=30 --depth-scale 1",
    "heights": "--no-cameras --env-kwargs height_scan=True",
    "blind": "--no-cameras",
}
# The flags of `python -m ballbot_utils.evaluate` for each kind
CONDITIONS = {kind: (flags,) for kind, flags in KINDS.items()} | {
    "hills": ("--terrain-amplitude 0.2", "--terrain-amplitude 0.3"),
    "mixed": tuple(f"--terrain {kind}" for kind in TERRAINS),
}
POLICIES = dict.fromkeys(KINDS, ("best", "last")) | {"mixed": ("best",)}  # of a run, to be evaluated
TERRAIN_SEED = "--terrain-seed 5000000"  # neither of training, nor of its evaluations, nor of the encoders


@dataclass
class Args:
    kinds: tuple[Literal[*KINDS], ...] = tuple(KINDS)
    """kinds of ground"""
    sensors: tuple[Literal[*SENSORS], ...] = tuple(SENSORS)
    """what the robot observes"""
    seeds: tuple[int, ...] = (4, 5, 6, 7)
    """seeds of each experiment; 1 to 3 chose the settings"""
    jobs: int = 1
    """runs at a time, one core each"""


def evaluate_there(run: Path) -> dict:
    """Evaluations of a run's best and last policies, {condition: {policy: summary}}."""
    kind, there = run.name.split("_")[1], {}
    for flags in CONDITIONS[kind]:
        terrain = flags.partition("--terrain ")[2] or "perlin"
        more = TERRAIN_SEED.split() if is_seeded(terrain) else []
        results = evaluate([run / f"{policy}.pt" for policy in POLICIES[kind]], *flags.split(), *more, "--no-gap")
        there[flags] = {policy: result["summary"] for policy, result in zip(POLICIES[kind], results)}
    return {"there": there}


def make_table(kind: str, lines: list[dict]) -> str:
    """A Markdown table with a row for each sensor, condition and policy; brackets are intervals over seeds."""
    groups = group_lines(lines, {sensor: (kind, sensor) for sensor in SENSORS})
    columns = [kind, "evaluated on", "policy", "return", "falls", "speed (m/s)", "each seed"]
    columns[4:4] = ["more than blind"] * ("blind" in groups)
    rows = [columns, ["---"] * len(columns)]
    for sensor, flags, policy in itertools.product(groups, CONDITIONS[kind], POLICIES[kind]):
        group = sorted(groups[sensor], key=lambda line: line["seed"])
        summaries = [line["there"][flags][policy] for line in group]
        falls, episodes = (sum(summary[key] for summary in summaries) for key in ("falls", "episodes"))
        speed = sum(summary["speed"]["mean"] for summary in summaries) / len(summaries)
        returns = {line["seed"]: summary["return"]["mean"] for line, summary in zip(group, summaries)}
        row = [sensor, f"`{flags}`", policy, show_mean(list(returns.values())), f"{falls} of {episodes}"]
        row += [f"{speed:.2f}", ", ".join(f"{value:.1f}" for value in returns.values())]
        if "blind" in groups:
            others = [line for line in groups["blind"] if line["seed"] in returns and sensor != "blind"]
            gains = [returns[x["seed"]] - x["there"][flags][policy]["return"]["mean"] for x in others]
            row.insert(4, show_mean(gains))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_tables(lines: list[dict]) -> dict[str, str]:
    """The tables of docs/terrain.md, {kind: Markdown}."""
    return {kind: make_table(kind, lines) for kind in KINDS}


def main(args: Args) -> None:
    for kind, (sensor, (pitch, encoder)) in itertools.product(args.kinds, ENCODERS.items()):
        if args.seeds and sensor in args.sensors and not Path(encoder.format(kind)).exists():
            command = f"--heights {KINDS[kind]} --camera-pitch {pitch} --output {encoder.format(kind)} --num-threads 1"
            subprocess.run([sys.executable, "-m", "ballbot_utils.pretrain_encoder", *command.split()], check=True)
    experiments = [
        Experiment(kind, sensor, f"{TRAINING} {MORE_TRAINING[kind]} {KINDS[kind]} {SENSORS[sensor].format(kind)}", seed)
        for seed in args.seeds for kind in args.kinds for sensor in args.sensors
    ]  # fmt: skip
    train_all(FILE, experiments, args.jobs, evaluate_there)
    PAGE.write_text(fill_marks(PAGE.read_text(), make_tables(read_lines(FILE))))


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
