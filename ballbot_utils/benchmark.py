"""How fast, and against what: `python -m ballbot_utils.benchmark --output speed.png`.

For each number of environments and threads, in steps per second: MuJoCo alone, the environment without and with
cameras, rollouts (with the policy's inference), and the whole of training, the last two in as many processes where they
can share the environments, all with the defaults of ppo_ballbot.py; then Stable-Baselines3's PPO with the same network
and hyperparameters on the single environment. Every measurement has a process of its own. All are repeated in turn, so
that what the machine does meanwhile falls on all of them and shows as spread: medians, with lowest and highest in
brackets. A second table has what no program on MuJoCo and PyTorch could do without, and the speed that this allows.
Writes the tables, the raw figures as JSON and a plot.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import mujoco
import numpy as np
import torch

import ppo_ballbot
from ballbot_utils.common import require_min, require_writable, run_program, write
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.model import MAX_TORQUE
from ballbot_utils.observations import PROPRIOCEPTION
from ballbot_utils.terrain import TERRAIN_EXTENT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MINIBATCH = ppo_ballbot.Args.minibatch_size
STAGES = {  # what is measured: the process that does it
    "physics": "steps", "env": "steps", "env, cameras": "steps", "rollout": "training", "training": "training",
    "training, no cameras": "training, no cameras",
}  # fmt: skip
FLOOR = ("MuJoCo", "height look-ups", "convolutions", "matrix products")  # parts that no Python is in
SB3 = ("SB3 DummyVecEnv", "SB3 SubprocVecEnv")
TARGETS = {(10, "training"): 10_000, (10, "training, no cameras"): 20_000, (256, "training"): 15_000}  # steps/s
UPRIGHT = 100  # steps that the robot stands by itself once it has settled
FALL = 250  # steps that it takes to fall, or nearly, when it is driven by noise


@dataclass
class Args:
    num_envs: tuple[int, ...] = (1, 10, 64, 256, 1024)
    """numbers of environments"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of threads of physics and env; rollouts and training have as many processes, or one"""
    repeats: int = 3
    """rounds; each measures everything once"""
    seconds: float = 1.0
    """time for each of physics and env"""
    train_steps: int = 20_480
    """steps of each training, two iterations"""
    sb3_envs: int = 10
    """environments for Stable-Baselines3, 0 to leave it out"""
    sb3_steps: int = 5_120
    """steps of each of its trainings, two iterations"""
    output: Path = Path("speed.png")
    """the plot; table (.md) and raw figures (.json) lie next to it"""
    overwrite: bool = False
    """replace outputs that exist"""


def check(args: Args) -> list[Path]:
    """Exit with one line on what cannot be, before any work starts. Returns the files to write."""
    for name in ("num_envs", "threads"):
        values = getattr(args, name)
        check_argument(
            values and min(values) >= 1, f"--{name.replace('_', '-')} is {values}: give numbers of 1 or more"
        )
    require_min(args, 1, "repeats", "train_steps", "sb3_steps")
    check_argument(args.seconds > 0, f"--seconds is {args.seconds}: give more than 0")
    require_min(args, 0, "sb3_envs")
    check_argument(args.output.suffix == ".png", f"--output is {args.output}: give a name ending in .png")
    files = [args.output.with_suffix(suffix) for suffix in (".png", ".md", ".json")]
    for file in files:
        require_writable("--output", file, args.overwrite, ".png", ".md", ".json")
    for package in ["matplotlib"] + ["stable_baselines3"] * (args.sb3_envs > 0):
        try:
            __import__(package)
        except ImportError:
            exit_with_error(f"{package} is missing: pip install -r requirements-dev.txt")
    return files


def rate(function: Callable[[], Any], steps: float, seconds: float) -> float:
    """Steps per second of a function that does `steps` of them, called for `seconds` after one call to warm up."""
    function()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        function()
        calls += 1
    return steps * calls / (time.perf_counter() - started)


def iteration(num_envs: int, steps: int) -> tuple[int, int]:
    """`num_steps` and `minibatch_size` of two iterations of some `steps` steps in all, in the default's minibatches."""
    num_steps = max(1, steps // (2 * num_envs))
    batch_size = num_steps * num_envs
    return num_steps, max(d for d in range(1, min(MINIBATCH, batch_size) + 1) if batch_size % d == 0)


def processes(num_envs: int, threads: int, steps: int) -> int:
    """How many processes `threads` cores train in: one each, or one for all where they cannot share a minibatch."""
    return 1 if num_envs % threads or iteration(num_envs, steps)[1] % threads else threads


def measure_steps(num_envs: int, threads: int, seconds: float) -> dict[str, float]:
    """Steps per second of physics, env, and env with cameras."""
    result = {}
    args = ppo_ballbot.Args(num_threads=threads)
    rng = np.random.default_rng(0)
    actions = rng.normal(0, 0.3, (100, num_envs, 3)).astype(np.float32)
    for cameras in (False, True):
        args = replace(args, cameras=cameras)
        envs = ppo_ballbot.make_envs(args, num_envs)
        envs.reset(seed=0)
        if not cameras:
            batch = envs.batch
            batch.step(nstep=UPRIGHT)
            settled = batch.state.copy()

            def physics(batch=batch, settled=settled):
                batch.state[:] = settled
                batch.step(nstep=UPRIGHT)

            result["physics"] = rate(physics, UPRIGHT * num_envs, seconds)
            envs.reset(seed=0)

        def step(envs=envs):
            for action in actions:
                envs.step(action)

        result["env, cameras" if cameras else "env"] = rate(step, len(actions) * num_envs, seconds)
    return result


def measure_floor(num_envs: int, seconds: float) -> dict[str, float]:
    """Steps per second of one core that does nothing but one of the parts of training that no Python is in.

    MuJoCo steps robots from the start until they fall, under the noise of an untrained policy. The rest are the
    largest operations of rendering, encoding and updating, with the shapes that the defaults give them.
    """
    args = ppo_ballbot.Args(num_threads=1)
    envs = ppo_ballbot.make_envs(args, num_envs)
    envs.reset(seed=0)
    batch, start = envs.batch, envs.batch.state.copy()
    controls = batch.bind("ctrl")[:, :3]
    limit = MAX_TORQUE
    torques = np.random.default_rng(0).normal(0, limit, (FALL, num_envs, 3)).clip(-limit, limit)

    def physics():
        batch.state[:] = start
        for torque in torques:
            controls[:] = torque
            batch.step()

    renderer, images = envs.renderer, 2 * min(num_envs, envs.renderer.chunk)
    sides = [64] + [len(renderer.coarse_pixels)] * (renderer.coarse_steps + 2)
    # Where the images of robots at random places look: some metre across
    places = torch.rand(2, images, 1, 1) - 0.5
    grids = [places + (torch.rand(2, images, side, side) - 0.5) / TERRAIN_EXTENT for side in sides]

    def lookups():
        for grid in grids:
            renderer.lookup(grid)

    agent = ppo_ballbot.Agent(args)
    first, second = (layer for layer in agent.encoder.layers if isinstance(layer, torch.nn.Conv2d))
    frames = torch.rand(2 * min(num_envs, 16), 1, 64, 64)

    def convolutions():
        second(first(frames))

    weights = [p.detach() for net in (agent.actor, agent.critic) for p in net.parameters() if p.dim() == 2]
    sizes = [(torch.rand(MINIBATCH, len(weight)), weight, torch.rand(MINIBATCH, weight.shape[1])) for weight in weights]

    def products():
        for x, weight, grad in sizes:
            x @ weight, grad @ weight.T, x.T @ grad

    per_frames = envs.frame_interval / 2  # steps for each image
    parts = {
        "MuJoCo": (physics, FALL * num_envs),
        "height look-ups": (lookups, images * per_frames),
        "convolutions": (convolutions, len(frames) * per_frames),
        "matrix products": (products, MINIBATCH / args.update_epochs),
    }
    with torch.no_grad():
        return {name: rate(function, steps, seconds) for name, (function, steps) in parts.items()}


def measure_training(num_envs: int, threads: int, cameras: bool, steps: int) -> dict[str, float]:
    """Steps per second of two iterations of `ppo_ballbot.train`, --frame-skip 1, as it logs them, without evaluations.

    With cameras also those of its rollouts, which is all but learning.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    num_steps, minibatch_size = iteration(num_envs, steps)
    ranks = processes(num_envs, threads, steps)
    args = ppo_ballbot.Args(
        frame_skip=1, num_envs=num_envs, num_processes=ranks, num_threads=threads // ranks, cameras=cameras,
        num_steps=num_steps, minibatch_size=minibatch_size, total_timesteps=2 * num_steps * num_envs,
        final_eval_episodes=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        log = EventAccumulator(str(ppo_ballbot.train(args))).Reload()
    training = log.Scalars("SPS/train")[-1].value
    if not cameras:
        return {"training, no cameras": training}
    learning = statistics.harmonic_mean([event.value for event in log.Scalars("SPS/learn")])
    return {"rollout": 1 / (1 / training - 1 / learning), "training": training}


def measure_sb3(kind: str, num_envs: int, steps: int) -> dict[str, float]:
    """Steps per second of Stable-Baselines3's PPO on the single environment: same network, same hyperparameters."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    class Features(BaseFeaturesExtractor):
        """Our frozen encoder's features of both frames, and proprioception."""

        def __init__(self, space: gym.spaces.Dict) -> None:
            super().__init__(space, 56)
            self.encoder = ppo_ballbot.DepthEncoder().to(memory_format=torch.channels_last).requires_grad_(False)

        def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
            depth = [self.encoder(obs[f"depth_{i}"]) for i in (0, 1)]
            keys = (*PROPRIOCEPTION, "relative_image_timestamp")
            return torch.cat([obs[key] for key in keys] + depth, 1)

    ours = ppo_ballbot.Args()
    num_steps, batch_size = iteration(num_envs, steps)
    env = make_vec_env("Ballbot-v0", num_envs, vec_env_cls=SubprocVecEnv if "Subproc" in kind else DummyVecEnv)
    model = PPO(
        "MultiInputPolicy", env, learning_rate=1e-4, n_steps=num_steps, batch_size=batch_size,
        n_epochs=ours.update_epochs, gamma=ours.gamma, gae_lambda=ours.gae_lambda, clip_range=ours.clip_coef,
        ent_coef=ours.ent_coef, vf_coef=ours.vf_coef, max_grad_norm=ours.max_grad_norm, target_kl=ours.target_kl,
        normalize_advantage=ours.norm_adv, device="cpu",
        policy_kwargs=dict(
            ortho_init=False, features_extractor_class=Features, activation_fn=torch.nn.LeakyReLU,
            net_arch=dict(pi=[ours.hidden_size] * ours.pi_layers, vf=[ours.hidden_size] * ours.vf_layers),
            optimizer_class=torch.optim.AdamW, optimizer_kwargs=dict(weight_decay=ours.weight_decay, eps=1e-5),
        ),
    )  # fmt: skip
    started = time.perf_counter()
    model.learn(2 * num_steps * num_envs)
    result = {kind: model.num_timesteps / (time.perf_counter() - started)}
    env.close()
    return result


def measure(process: str, num_envs: int, threads: int, args: Args) -> tuple[dict[str, float], float | None]:
    """One process's measurements: {stage: steps/s} and its peak memory in MiB, its children's added.

    SubprocVecEnv's processes are not its children, and their memory is not known (None).
    """
    torch.set_num_threads(1)
    if process == "steps":
        result = measure_steps(num_envs, threads, args.seconds)
    elif process == "floor":
        result = measure_floor(num_envs, args.seconds)
    elif process in SB3:
        result = measure_sb3(process, num_envs, args.sb3_steps)
    else:
        result = measure_training(num_envs, threads, process == "training", args.train_steps)
    if "Subproc" in process:
        return result, None
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    children = processes(num_envs, threads, args.train_steps) - 1 if "training" in process else 0
    return result, (own + children * child) / (2**20 if sys.platform == "darwin" else 2**10)


def silence() -> None:
    """Let this process and its children print nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args: Args) -> list[dict[str, Any]]:
    """All measurements: a list of {stage, num_envs, threads, round, steps_per_second, memory}."""
    setups = [(process, n, threads) for n in args.num_envs for threads in args.threads
              for process in dict.fromkeys(STAGES.values())]  # fmt: skip
    setups += [("floor", n, 1) for n in args.num_envs]
    setups += [(process, args.sb3_envs, 1) for process in SB3 if args.sb3_envs]
    records, started, total = [], time.perf_counter(), len(setups) * args.repeats
    context = multiprocessing.get_context("spawn")
    for done in range(total):
        process, num_envs, threads = setups[done % len(setups)]
        with ProcessPoolExecutor(1, mp_context=context, initializer=silence) as pool:
            result, memory = pool.submit(measure, process, num_envs, threads, args).result()
        for stage, speed in result.items():
            records.append(dict(stage=stage, num_envs=num_envs, threads=threads, round=done // len(setups) + 1,
                                steps_per_second=speed, memory=memory))  # fmt: skip
        left = (time.perf_counter() - started) / (done + 1) * (total - done - 1)
        speeds = ", ".join(f"{stage} {speed:,.0f}" for stage, speed in result.items())
        space = f"{memory:,.0f} MiB, " if memory else ""
        print(f"[{done + 1}/{total}] {num_envs} envs, {threads} thread{'s' * (threads > 1)}: {speeds} steps/s, {space}"
              f"{time.strftime('%H:%M:%S', time.gmtime(left))} left", flush=True)  # fmt: skip
    return records


def select(
    records: list[dict[str, Any]], stage: str, num_envs: int, threads: int, key: str = "steps_per_second"
) -> list:
    """The values of one stage and setup, by round."""
    wanted = (stage, num_envs, threads)
    return [r[key] for r in records if (r["stage"], r["num_envs"], r["threads"]) == wanted]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """`median (lowest to highest)` of values."""
    low, high = (f"{f(values):,.{digits}f}" for f in (min, max))
    return f"{statistics.median(values):,.{digits}f}" + (f" ({low} to {high})" if len(values) > 1 else "")


def table(records: list[dict[str, Any]], args: Args) -> str:
    """The results as Markdown."""
    head = ["envs", "threads", *STAGES, "training / physics", "memory (MiB)"]
    rows = []
    for n in args.num_envs:
        for threads in args.threads:
            values = {stage: select(records, stage, n, threads) for stage in STAGES}
            share = [t / p for t, p in zip(values["training"], values["physics"])]
            memory = max(select(records, "training", n, threads, "memory"))
            rows.append([str(n), str(threads), *map(spread, values.values()), spread(share, 2), f"{memory:,.0f}"])
    lines = ["Steps per second.", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    ours = select(records, "training", args.sb3_envs, max(args.threads))
    if args.sb3_envs:
        lines += ["", "| alternative | envs | training (steps/s) | ours / this | memory (MiB) |", "| --- " * 5 + "|"]
        for stage in SB3:
            theirs = select(records, stage, args.sb3_envs, 1)
            ratio = spread([a / b for a, b in zip(ours, theirs)], 1) if ours else ""
            memory = [m for m in select(records, stage, args.sb3_envs, 1, "memory") if m]
            cells = [
                stage,
                str(args.sb3_envs),
                spread(theirs),
                ratio,
                f"{max(memory):,.0f}" if memory else "not measured",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    cores = max(args.threads)
    lines += ["", "What a step costs one core at least, in µs, with MuJoCo's and PyTorch's own routines and nothing "
              f"between them, and the steps/s of {cores} cores if that were all:", "",
              "| envs | " + " | ".join(FLOOR) + " | sum | at most | at most, no cameras |",
              "| --- " * (len(FLOOR) + 4) + "|"]  # fmt: skip
    for n in args.num_envs:
        costs = [[1e6 / speed for speed in select(records, part, n, 1)] for part in FLOOR]
        sums = [list(map(sum, zip(*parts))) for parts in (costs, (costs[0], costs[-1]))]
        most = [[cores * 1e6 / value for value in values] for values in sums]
        cells = [spread(values, 1) for values in (*costs, sums[0])] + [spread(values) for values in most]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    targets = []
    for (n, stage), target in TARGETS.items():
        values = select(records, stage, n, max(args.threads))
        if values:
            verdict = "reached" if statistics.median(values) >= target else "missed"
            targets.append(f"{stage}, {n} envs: {target:,} steps/s {verdict}")
    return "\n".join(lines + [""] * bool(targets) + targets) + "\n"


def machine() -> str:
    """Processor, cores and versions, in a line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return (f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, PyTorch {torch.__version__}, "
            f"MuJoCo {mujoco.__version__}")  # fmt: skip


def draw(records: list[dict[str, Any]], args: Args) -> "Figure":
    """The figure: steps per second over the number of environments."""
    from matplotlib.figure import Figure

    from ballbot_utils.plot import COLORS, MARKERS

    fig = Figure(figsize=(8, 5), layout="constrained")
    ax = fig.subplots()
    for stage, color, marker in zip(STAGES, COLORS, MARKERS):
        for threads in args.threads:
            values = np.array([select(records, stage, n, threads) for n in args.num_envs])
            median = np.median(values, 1)
            ax.errorbar(
                args.num_envs, median, (median - values.min(1), values.max(1) - median), color=color, marker=marker,
                ms=5, ls="-" if threads == max(args.threads) else ":", elinewidth=1,
                label=stage if threads == max(args.threads) else None,
            )  # fmt: skip
    for stage, marker in zip(SB3, "P*"):
        values = select(records, stage, args.sb3_envs, 1)
        if values:
            ax.plot([args.sb3_envs] * len(values), values, "k" + marker, label=stage, ls="")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(args.num_envs, args.num_envs)
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("environments")
    ax.set_ylabel("steps per second")
    ax.grid(color="0.92")
    ax.spines[["top", "right"]].set_visible(False)
    most = max(args.threads)
    threads = f"solid: {most} threads or processes" if most > 1 else "1 thread"
    threads += ", dotted: fewer" if len(args.threads) > 1 else ""
    fig.legend(loc="outside upper center", frameon=False, ncols=3, title=threads, fontsize=9, title_fontsize=9)
    return fig


def main(args: Args) -> None:
    files = check(args)
    print(machine())
    records = run(args)
    text = machine() + "\n\n" + table(records, args)
    print("\n" + text)
    write(files[0], lambda part: draw(records, args).savefig(part, dpi=150))
    write(files[1], lambda part: part.write_text(text, "utf-8"))
    settings = {key: value for key, value in asdict(args).items() if key not in ("output", "overwrite")}
    figures = json.dumps({"machine": machine(), "settings": settings, "records": records}, indent=1) + "\n"
    write(files[2], lambda part: part.write_text(figures))
    print("wrote " + ", ".join(map(str, files)))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
