"""Measure the speed of training: `python -m ballbot_utils.benchmark --output speed.png`.

For each number of environments and threads, in steps per second: MuJoCo alone, the environment without and with
cameras, rollouts (with the policy's inference), and complete training, all with the defaults of ppo_ballbot.py; then
Stable-Baselines3's PPO with the same network and hyperparameters on the single environment. Rollouts and training use
as many processes as threads where these can share the environments. Each measurement runs in a process of its own, and
all are repeated in turn, so that other load on the machine affects all of them. Medians are shown, with the lowest and
highest value in brackets. A second table shows the cost of the operations that every program on MuJoCo and PyTorch
needs, and the speed that they allow. A third shows a complete training by the clock. Writes the tables, the raw results
as JSON and a plot.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from pydantic import Field

import ppo_ballbot
from ballbot_utils.checkpoints import read_checkpoint
from ballbot_utils.common import check_flags, progress, require_packages, require_writable, run_program, write
from ballbot_utils.console import check_argument
from ballbot_utils.flags import Count, Positive
from ballbot_utils.model import MAX_TORQUE
from ballbot_utils.observations import PROPRIOCEPTION
from ballbot_utils.terrain import TERRAIN_EXTENT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MINIBATCH = ppo_ballbot.Args.minibatch_size
STAGES = {  # measurement: kind of process that does it
    "physics": "steps", "env": "steps", "env, cameras": "steps", "rollout": "training", "training": "training",
    "training, no cameras": "training, no cameras",
}  # fmt: skip
REQUIRED = ("MuJoCo", "height look-ups", "convolutions", "matrix products")  # operations without Python code
SB3 = ("SB3 DummyVecEnv", "SB3 SubprocVecEnv")
TARGETS = {(10, "training"): 10_000, (10, "training, no cameras"): 20_000, (256, "training"): 15_000}  # steps/s
UPRIGHT_STEPS = 100  # for which the settled robot stands without control
FALL_STEPS = 250  # in which it nearly falls, driven by noise


@dataclass
class Args:
    num_envs: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 10, 64, 256, 1024)
    """numbers of environments"""
    threads: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2)
    """numbers of threads of physics and env; rollouts and training have as many processes, or one"""
    repeats: Count = 3
    """rounds; each measures everything once"""
    seconds: Positive = 1.0
    """time for each of physics and env"""
    train_steps: Count = 20_480
    """steps of each training, two iterations"""
    clock: str = "--preset tuned"
    """flags of a complete training that each round measures by the clock, from the launch to the end; empty: none"""
    sb3_envs: Annotated[int, Field(ge=0)] = 10
    """environments for Stable-Baselines3, 0 to leave it out"""
    sb3_steps: Count = 5_120
    """steps of each of its trainings, two iterations"""
    output: Path = Path("speed.png")
    """the plot; the tables (.md) and raw results (.json) have the same name"""
    overwrite: bool = False
    """replace outputs that exist"""


def check_args(args: Args) -> list[Path]:
    """Exit with one line on the first invalid flag, before any work starts. Returns the files to write."""
    check_flags(args)
    check_argument(args.output.suffix == ".png", f"--output is {args.output}: give a name ending in .png")
    files = [args.output.with_suffix(suffix) for suffix in (".png", ".md", ".json")]
    for file in files:
        require_writable("--output", file, args.overwrite, ".png", ".md", ".json")
    require_packages("the benchmark", "matplotlib", *["stable_baselines3"] * (args.sb3_envs > 0))
    return files


def measure_rate(function: Callable[[], Any], steps: float, seconds: float) -> float:
    """Steps per second of a `function` that does `steps` per call, called for `seconds` after one call to warm up."""
    function()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        function()
        calls += 1
    return steps * calls / (time.perf_counter() - started)


def iteration_sizes(num_envs: int, steps: int) -> tuple[int, int]:
    """`num_steps` and `minibatch_size` for two iterations of about `steps` steps in total."""
    num_steps = max(1, steps // (2 * num_envs))
    batch_size = num_steps * num_envs
    return num_steps, max(d for d in range(1, min(MINIBATCH, batch_size) + 1) if batch_size % d == 0)


def num_processes(num_envs: int, threads: int, steps: int) -> int:
    """Number of training processes on `threads` cores: one per core, or 1 if they cannot share a minibatch."""
    return 1 if num_envs % threads or iteration_sizes(num_envs, steps)[1] % threads else threads


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
            batch.step(nstep=UPRIGHT_STEPS)
            settled = batch.state.copy()

            def physics(batch=batch, settled=settled):
                batch.state[:] = settled
                batch.step(nstep=UPRIGHT_STEPS)

            result["physics"] = measure_rate(physics, UPRIGHT_STEPS * num_envs, seconds)
            envs.reset(seed=0)

        def step(envs=envs):
            for action in actions:
                envs.step(action)

        result["env, cameras" if cameras else "env"] = measure_rate(step, len(actions) * num_envs, seconds)
    return result


def measure_required(num_envs: int, seconds: float) -> dict[str, float]:
    """Steps per second of one core, for each of the REQUIRED operations alone.

    MuJoCo steps robots from the start until they fall, driven by noise like that of a new policy. The others are the
    largest operations of rendering, encoding and updating, with the default shapes.
    """
    args = ppo_ballbot.Args(num_threads=1)
    envs = ppo_ballbot.make_envs(args, num_envs)
    envs.reset(seed=0)
    batch, start = envs.batch, envs.batch.state.copy()
    controls = batch.bind("ctrl")[:, :3]
    limit = MAX_TORQUE
    torques = np.random.default_rng(0).normal(0, limit, (FALL_STEPS, num_envs, 3)).clip(-limit, limit)

    def physics():
        batch.state[:] = start
        for torque in torques:
            controls[:] = torque
            batch.step()

    renderer, images = envs.renderer, 2 * min(num_envs, envs.renderer.chunk)
    sides = [64] + [len(renderer.coarse_pixels)] * (renderer.coarse_steps + 2)
    # Points that images show, about a meter across, of robots at random positions
    positions = torch.rand(2, images, 1, 1) - 0.5
    grids = [positions + (torch.rand(2, images, side, side) - 0.5) / TERRAIN_EXTENT for side in sides]

    def lookups():
        for grid in grids:
            renderer.lookup(grid)

    agent = ppo_ballbot.Agent(replace(args, small_encoder=False))
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
        "MuJoCo": (physics, FALL_STEPS * num_envs),
        "height look-ups": (lookups, images * per_frames),
        "convolutions": (convolutions, len(frames) * per_frames),
        "matrix products": (products, MINIBATCH / args.update_epochs),
    }
    with torch.no_grad():
        return {name: measure_rate(function, steps, seconds) for name, (function, steps) in parts.items()}


def measure_training(num_envs: int, threads: int, cameras: bool, steps: int) -> dict[str, float]:
    """Steps per second of two iterations of `ppo_ballbot.train` with --frame-skip 1, without evaluations, as logged.

    With cameras also those of its rollouts: all but learning.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    num_steps, minibatch_size = iteration_sizes(num_envs, steps)
    ranks = num_processes(num_envs, threads, steps)
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
    """Steps per second of Stable-Baselines3's PPO on the single environment, with our network and hyperparameters."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    class Features(BaseFeaturesExtractor):
        """Features of both frames by our frozen encoder, and proprioception."""

        def __init__(self, space: gym.spaces.Dict) -> None:
            super().__init__(space, 56)
            self.encoder = ppo_ballbot.DepthEncoder().to(memory_format=torch.channels_last).requires_grad_(False)

        def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
            depth = [self.encoder(obs[f"depth_{i}"]) for i in (0, 1)]
            keys = (*PROPRIOCEPTION, "relative_image_timestamp")
            return torch.cat([obs[key] for key in keys] + depth, 1)

    ours = ppo_ballbot.Args()
    num_steps, batch_size = iteration_sizes(num_envs, steps)
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


def measure_clock(flags: str) -> tuple[dict[str, float], dict[str, float]]:
    """Steps per second from the launch to the end of a training with these flags, and the seconds of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ppo_ballbot.__file__, *shlex.split(flags), "--run-name", "clock"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        check_argument(done.returncode == 0, f"--clock {flags}: {done.stderr.strip().splitlines()[-1:]}")
        content = read_checkpoint(Path(folder) / "runs" / "clock" / "last.pt")
    return {"clock": content["global_step"] / content["elapsed"]}, content["parts"]


def measure(process: str, num_envs: int, threads: int, args: Args) -> tuple[dict[str, float], float | None]:
    """The measurements of a process, {stage: steps/s}, and its peak memory, MiB, with its children's.

    The memory is None for SubprocVecEnv, whose processes are not children of this one.
    """
    torch.set_num_threads(1)
    if process == "steps":
        result = measure_steps(num_envs, threads, args.seconds)
    elif process == "required":
        result = measure_required(num_envs, args.seconds)
    elif process in SB3:
        result = measure_sb3(process, num_envs, args.sb3_steps)
    else:
        result = measure_training(num_envs, threads, process == "training", args.train_steps)
    if "Subproc" in process:
        return result, None
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    children = num_processes(num_envs, threads, args.train_steps) - 1 if "training" in process else 0
    return result, (own + children * child) / (2**20 if sys.platform == "darwin" else 2**10)


def silence_output() -> None:
    """Discard what this process and its children print."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_measurements(args: Args) -> list[dict[str, Any]]:
    """All measurements: a list of {stage, num_envs, threads, round, steps_per_second, memory}."""
    setups = [(process, n, threads) for n in args.num_envs for threads in args.threads
              for process in dict.fromkeys(STAGES.values())]  # fmt: skip
    setups += [("required", n, 1) for n in args.num_envs]
    setups += [(process, args.sb3_envs, 1) for process in SB3 if args.sb3_envs]
    setups += [("clock", 0, 1)] * bool(args.clock)
    records, total = [], len(setups) * args.repeats
    context = multiprocessing.get_context("spawn")
    for done in range(total):
        process, num_envs, threads = setups[done % len(setups)]
        if process == "clock":
            result, memory = measure_clock(args.clock)  # its parts take the place of the memory
        else:
            with ProcessPoolExecutor(1, mp_context=context, initializer=silence_output) as pool:
                result, memory = pool.submit(measure, process, num_envs, threads, args).result()
        for stage, speed in result.items():
            records.append(dict(stage=stage, num_envs=num_envs, threads=threads, round=done // len(setups) + 1,
                                steps_per_second=speed, memory=memory))  # fmt: skip
        speeds = ", ".join(f"{stage} {speed:,.0f}" for stage, speed in result.items())
        progress(f"{num_envs} envs, {threads} threads: {speeds} steps/s", (done + 1) / total)
    return records


def select_values(
    records: list[dict[str, Any]], stage: str, num_envs: int, threads: int, key: str = "steps_per_second"
) -> list:
    """The values of one stage and setup, by round."""
    setup = (stage, num_envs, threads)
    return [r[key] for r in records if (r["stage"], r["num_envs"], r["threads"]) == setup]


def format_spread(values: Sequence[float], digits: int = 0) -> str:
    """`median (lowest to highest)` of values."""
    low, high = (f"{f(values):,.{digits}f}" for f in (min, max))
    return f"{statistics.median(values):,.{digits}f}" + (f" ({low} to {high})" if len(values) > 1 else "")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def format_tables(records: list[dict[str, Any]], args: Args) -> str:
    """The results as Markdown."""
    cores, rows = max(args.threads), []
    for n in args.num_envs:
        for threads in args.threads:
            values = {stage: select_values(records, stage, n, threads) for stage in STAGES}
            share = [t / p for t, p in zip(values["training"], values["physics"])]
            memory = max(select_values(records, "training", n, threads, "memory"))
            speeds = map(format_spread, values.values())
            rows.append([str(n), str(threads), *speeds, format_spread(share, 2), f"{memory:,.0f}"])
    head = ["envs", "threads", *STAGES, "training / physics", "memory (MiB)"]
    lines = ["Steps per second.", "", *markdown_table(head, rows)]
    if args.sb3_envs:
        ours, rows = select_values(records, "training", args.sb3_envs, cores), []
        for stage in SB3:
            theirs = select_values(records, stage, args.sb3_envs, 1)
            ratio = format_spread([a / b for a, b in zip(ours, theirs)], 1) if ours else ""
            memory = [m for m in select_values(records, stage, args.sb3_envs, 1, "memory") if m]
            memory = f"{max(memory):,.0f}" if memory else "not measured"
            rows.append([stage, str(args.sb3_envs), format_spread(theirs), ratio, memory])
        head = ["alternative", "envs", "training (steps/s)", "ours / this", "memory (MiB)"]
        lines += ["", *markdown_table(head, rows)]
    rows = []
    for n in args.num_envs:
        costs = [[1e6 / speed for speed in select_values(records, part, n, 1)] for part in REQUIRED]
        sums = [list(map(sum, zip(*parts))) for parts in (costs, (costs[0], costs[-1]))]
        limits = [[cores * 1e6 / value for value in values] for values in sums]
        rows.append([str(n), *(format_spread(values, 1) for values in (*costs, sums[0])), *map(format_spread, limits)])
    lines += ["", "The least cost of a step on one core, in µs: the largest operations of MuJoCo and PyTorch. At most: "
              f"the steps/s of {cores} cores at this cost.", "",
              *markdown_table(["envs", *REQUIRED, "sum", "at most", "at most, no cameras"], rows)]  # fmt: skip
    if args.clock:
        speeds, parts = (select_values(records, "clock", 0, 1, key) for key in ("steps_per_second", "memory"))
        rows = [[name, format_spread([100 * part[name] / sum(part.values()) for part in parts])] for name in parts[0]]
        lines += ["", f"By the clock, from the launch to the end of `ppo_ballbot.py {args.clock}`: "
                  f"{format_spread(speeds)} steps/s.", ""]  # fmt: skip
        lines += markdown_table(["part", "share of the time (%)"], rows)
    targets = []
    for (n, stage), target in TARGETS.items():
        if values := select_values(records, stage, n, cores):
            verdict = "reached" if statistics.median(values) >= target else "missed"
            targets.append(f"{stage}, {n} envs: {target:,} steps/s {verdict}")
    return "\n".join(lines + [""] * bool(targets) + targets) + "\n"


def describe_machine() -> str:
    """Processor, cores and versions, in a line."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return (f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, PyTorch {torch.__version__}, "
            f"MuJoCo {mujoco.__version__}")  # fmt: skip


def draw_figure(records: list[dict[str, Any]], args: Args) -> "Figure":
    """The figure: steps per second over the number of environments."""
    from matplotlib.figure import Figure

    from ballbot_utils.plot import COLORS, MARKERS

    fig = Figure(figsize=(8, 5), layout="constrained")
    ax = fig.subplots()
    for stage, color, marker in zip(STAGES, COLORS, MARKERS):
        for threads in args.threads:
            values = np.array([select_values(records, stage, n, threads) for n in args.num_envs])
            median = np.median(values, 1)
            ax.errorbar(
                args.num_envs, median, (median - values.min(1), values.max(1) - median), color=color, marker=marker,
                ms=5, ls="-" if threads == max(args.threads) else ":", elinewidth=1,
                label=stage if threads == max(args.threads) else None,
            )  # fmt: skip
    for stage, marker in zip(SB3, "P*"):
        values = select_values(records, stage, args.sb3_envs, 1)
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
    files = check_args(args)
    machine = describe_machine()
    print(machine)
    records = run_measurements(args)
    text = machine + "\n\n" + format_tables(records, args)
    print("\n" + text)
    settings = {key: value for key, value in asdict(args).items() if key not in ("output", "overwrite")}
    results = json.dumps({"machine": machine, "settings": settings, "records": records}, indent=1) + "\n"
    write(files[0], lambda part: draw_figure(records, args).savefig(part, dpi=150))
    write(files[1], lambda part: part.write_text(text, "utf-8"))
    write(files[2], lambda part: part.write_text(results))
    print("wrote " + ", ".join(map(str, files)))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
