"""Measures BallbotWarp-v0 and ppo_ballbot_gpu.py on a GPU: `python -m benchmark.gpu --out FOLDER`.

Each stage prints a table and appends its numbers to FOLDER/gpu.jsonl. A stage that fails does not stop the others.
"""

import json
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
import warp as wp

import ballbot_env
import ppo_ballbot_gpu as gpu


@dataclass
class Args:
    out: Path
    """folder for gpu.jsonl and the logs of trainings"""
    stages: tuple[str, ...] = ("versions", "agreement", "policies", "speed", "learning", "seeds", "cpu_physics")
    """what to measure"""
    device: str = "cuda"
    """where; "cpu" tries the script"""
    num_envs: tuple[int, ...] = (64, 256, 1024, 2048, 4096, 8192, 16384)
    """numbers of robots, for the stage speed"""
    cameras: tuple[bool, ...] = (False, True)
    """for the stages speed and learning"""
    learn_envs: tuple[int, ...] = (2048, 4096, 8192)
    """numbers of robots, for the stage learning"""
    actions: int = 50
    """actions that are timed"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """of the stage seeds"""
    flags: str = "preset=tuned no-cameras"
    """flags of the trainings in the stage seeds, without their dashes"""
    seconds: float = 120.0
    """limit of a training"""


def versions(args):
    """What the machine and the packages are."""
    import mujoco

    row = dict(python=platform.python_version(), torch=torch.__version__, mujoco=mujoco.__version__,
               warp=wp.config.version, cpus=torch.get_num_threads())  # fmt: skip
    if args.device != "cpu":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        row |= dict(gpu=name, memory_gib=round(memory / 2**30), cuda=torch.version.cuda)
    yield row


def agreement(args):
    """Largest differences from mujoco.batch, from a settled pose, under random actions."""
    for terrain in ("flat", "perlin"):
        n, rng, task = 64, np.random.default_rng(0), dict(terrain=terrain, cameras=True)
        cpu = gym.make_vec("Ballbot-v0", num_envs=n, **task)
        warp = gym.make_vec("BallbotWarp-v0", num_envs=n, device=args.device, **task)
        cpu.reset(seed=0)
        for _ in range(75):
            cpu.step(np.zeros((n, 3)))
        warp.reset(seed=0)
        state = warp.get_state()
        for name in ("qpos", "qvel"):
            state[name] = torch.tensor(getattr(cpu.batch, name), dtype=torch.float32, device=args.device)
        warp.set_state(state)
        for step in range(1, 21):
            action = rng.uniform(-1, 1, (n, 3)).astype(np.float32)
            a, _, _, _, _ = cpu.step(action)
            b, _, _, _, _ = warp.step(torch.tensor(action, device=args.device))
            if step in (1, 10, 20):
                row = dict(terrain=terrain, steps=step)
                for key in ("angular_vel", "vel", "motor_state"):
                    row[key] = float(np.abs(a[key] - b[key].cpu().numpy()).max())
                depth = np.abs(a["depth_0"] - b["depth_0"].cpu().numpy())
                yield row | dict(depth_median=float(np.median(depth)), depth_over_1cm=float((depth > 0.01).mean()))


def policies(args):
    """The LQR at 0.6 m/s, and benchmark/tuned__1.pt, on unseen terrain; their CPU results are in README.md."""
    from ballbot_utils import lqr

    policy = gpu.ppo_ballbot.load_policy("benchmark/tuned__1.pt")
    policy.agent.to(args.device)
    policy.args.cuda = args.device != "cpu"
    envs = gpu.make_envs(policy.args, 100, evaluation=True)
    yield dict(policy="tuned__1.pt") | gpu.evaluate(envs, policy.agent, policy.args, 100)
    gain, feedforward = lqr.design_regulator(0.4)
    task = dict(terrain_seed=1_000_000, cameras=False, frame_skip=lqr.FRAME_SKIP)
    envs = gym.make_vec("BallbotWarp-v0", num_envs=32, device=args.device, **task)
    act = lqr.regulator_factory(gain, feedforward, (0.0, 0.6))(envs)
    obs, _ = envs.reset(seed=ballbot_env.spawn_seeds(1_000_000, 32))
    for _ in range(4000 // lqr.FRAME_SKIP):
        obs, _, _, _, infos = envs.step(torch.tensor(act({key: x.cpu().numpy() for key, x in obs.items()})).float())
        if infos["_episode"].any():
            break
    episode = infos["episode"]
    yield dict(
        policy="LQR, until the first end", length=int(episode["l"].max()), episodic_return=episode["r"].mean().item()
    )


def timed(function, device):
    """Seconds that a function takes, after a first call."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1]


def speed(args):
    """Physics steps per second of the physics alone, and of the whole environment."""
    for cameras in args.cameras:
        for n in args.num_envs:
            yield dict(cameras=cameras, num_envs=n) | speed_of(args, n, cameras)
            if args.device != "cpu":
                torch.cuda.empty_cache()


def speed_of(args, num_envs, cameras):
    """The speeds of so many robots, and milliseconds per action."""
    envs = gym.make_vec("BallbotWarp-v0", num_envs=num_envs, device=args.device, frame_skip=4, cameras=cameras)
    envs.reset(seed=0)
    action = 0.1 * torch.randn(num_envs, 3, device=args.device)

    def steps():
        for _ in range(args.actions):
            envs.step(action)

    def physics():
        for _ in range(args.actions):
            envs.step_physics()

    seconds, total = timed(steps, args.device), 4 * num_envs * args.actions
    result = dict(env_steps_per_s=total / seconds, physics_steps_per_s=total / timed(physics, args.device))
    return result | dict(ms_per_action=1e3 * seconds / args.actions)


def kernels(args, n=4096):
    """Milliseconds of each of Warp's kernels in a physics step."""
    env = gym.make_vec("BallbotWarp-v0", num_envs=n, device=args.device, frame_skip=1, cameras=False)
    env.reset(seed=0)
    action = torch.zeros(n, 3, device=args.device)
    for _ in range(100):  # until the robots stand
        env.step(action)
    wp.timing_begin(cuda_filter=wp.TIMING_ALL)
    env.step_physics(graph=False)
    results = wp.timing_end()
    total = {}
    for result in results:
        count, elapsed = total.get(result.name, (0, 0.0))
        total[result.name] = count + 1, elapsed + result.elapsed
    for name, (count, elapsed) in sorted(total.items(), key=lambda item: -item[1][1])[:25]:
        yield dict(num_envs=n, kernel=name[:60], launches=count, ms=elapsed)
    yield dict(num_envs=n, kernel="all", launches=len(results), ms=sum(result.elapsed for result in results))


def learning(args):
    """Steps per second with learning, by part of an iteration."""
    for cameras in args.cameras:
        for n in args.learn_envs:
            given = gpu.PRESETS["tuned"] | dict(cameras=cameras, num_envs=n, cuda=args.device != "cpu")
            train_args = gpu.Args(**given)
            train_args.minibatch_size = n * train_args.num_steps // 8
            torch.manual_seed(0)
            agent = gpu.Agent(train_args).to(args.device)
            if cameras:
                agent.encoder.requires_grad_(False)
            learner, envs = gpu.Learner(agent, train_args), gpu.make_envs(train_args, n)
            obs, _ = envs.reset(seed=0)
            with torch.no_grad():
                observation = gpu.proprioception(obs, agent), gpu.encode(agent, obs)

            def sync():
                if args.device != "cpu":
                    torch.cuda.synchronize()
                return time.perf_counter()

            for _ in range(4):
                started = sync()
                batch, transitions, observation, _ = gpu.rollout(envs, agent, train_args, observation)
                rolled = sync()
                advantages = gpu.gae(*transitions, train_args.gamma, train_args.gae_lambda)
                learner.update(batch | {"advantages": advantages, "returns": advantages + batch["values"]}, 1e-4)
                ended = sync()
            steps = 4 * n * train_args.num_steps
            yield dict(cameras=cameras, num_envs=n, rollout_steps_per_s=steps / (rolled - started),
                       learn_ms=1e3 * (ended - rolled), steps_per_s=steps / (ended - started))  # fmt: skip
            del learner, envs, agent, batch, transitions, observation


def run(args, name, command):
    """Run a training; yields the evaluations in its metrics.jsonl."""
    started = time.perf_counter()
    with open(args.out / f"{name}.log", "w") as log:
        command = [sys.executable, *command.split(), "--run-name", name]
        try:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=args.seconds)
        except subprocess.TimeoutExpired:
            pass
    wall = time.perf_counter() - started
    path = Path("runs") / name / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        keys = ("kind", "global_step", "seconds", "episodic_return", "episodic_length", "falls")
        yield dict(run=name, wall_s=round(wall, 1)) | {key: entry[key] for key in keys}
    print((args.out / f"{name}.log").read_text()[-1500:])


def seeds(args):
    """Trainings from launch to the end."""
    cuda, flags = (
        "--cuda" if args.device != "cpu" else "--no-cuda",
        " ".join(f"--{flag}" for flag in args.flags.split()),
    )
    for seed in args.seeds:
        yield from run(args, f"gpu_{seed}_{int(time.time())}", f"ppo_ballbot_gpu.py {flags} {cuda} --seed {seed}")


def cpu_physics(args):
    """`ppo_ballbot.py --preset tuned --cuda`: physics on the CPU, networks and cameras on the GPU."""
    cuda = "--cuda" if args.device != "cpu" else "--no-cuda"
    yield from run(args, f"cpu_physics_{int(time.time())}",
                   f"ppo_ballbot.py --preset tuned {cuda} --num-processes 1 --total-timesteps 500000")  # fmt: skip


def main(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        started, header = time.perf_counter(), None
        print(f"\n== {stage}: {globals()[stage].__doc__.splitlines()[0]}", flush=True)
        try:
            for row in globals()[stage](args):
                with open(args.out / "gpu.jsonl", "a") as file:
                    file.write(json.dumps(dict(stage=stage) | row) + "\n")
                if header != list(row):
                    header = list(row)
                    print(" | ".join(header))
                print(" | ".join(f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row.values()), flush=True)
        except Exception:
            traceback.print_exc()
        print(f"({time.perf_counter() - started:.1f} s)", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
