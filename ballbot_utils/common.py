"""What the programs beside it share: their conditions, checks of flags and files, progress, policies and episodes."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import ballbot_runs
import ppo_ballbot
from ballbot_env import START_EXTENT, BallbotVectorEnv
from ballbot_utils.depth import MAX_DEPTH
from ballbot_utils.model import CAMERAS, TIMESTEP
from ballbot_utils.observations import NOISE_WIDTH, add_sensor_noise
from ballbot_utils.randomization import PUSH_STEPS, Pushes, add_depth_noise
from ballbot_utils.terrain import TERRAIN_EXTENT, TERRAIN_MARGIN, TERRAINS

TOP_SPEED = 1.0  # m/s, more than the robot can reach at wheel damping 0.4


@dataclass
class Conditions:
    """Flags on how episodes are played, for the programs that play some."""

    horizon: int = 4000
    """steps at which an episode ends, up to whole actions; 10000 is the paper's test of generalisation (fig. 7)"""
    seed: int = 1_000_000
    """seed of start poses, pushes and noise; the default is that of ppo_ballbot.py's own evaluations"""
    terrain: str | None = None
    """ground: perlin or flat; default: that of training"""
    terrain_seed: int | None = None
    """which Perlin terrain; default: that of the training's own evaluations"""
    terrain_amplitude: float | None = None
    """height of the hills, m; default: 0.1, as in training"""
    wheel_damping: float | None = None
    """damping of the wheels' axles, N·m·s/rad; default: that of training"""
    push: float = 0.0
    """impulse of random horizontal pushes on the base, N·s"""
    push_interval: float = 1.0
    """seconds from one push to the next, and from the start to the first"""
    obs_noise: float = 0.0
    """standard deviation of Gaussian noise on the observations, each in its own unit"""
    overwrite: bool = False
    """replace a file that exists"""


# Flags and files


@ballbot_runs.closed_output_ends()
def command(main: Callable[[Any], Any], flags: type, **kwargs: Any) -> None:
    """Run a program on the flags of the command line, a `flags`; `kwargs` are those of `tyro.cli`."""
    ballbot_runs.escape_unprintable()
    called = Path(sys.argv[0])
    name = f"python -m {called.resolve().parent.name}.{called.stem}" if called.suffix == ".py" else called.name
    main(tyro.cli(flags, prog=name, **kwargs))


def need(good: Any, message: str) -> None:
    """Exit with one line unless `good`."""
    if not good:
        ballbot_runs.stop(message)


def need_from(args: Any, low: float, *names: str) -> None:
    """Exit with one line on the first of these flags that is given and not a finite number from `low` on."""
    for name in names:
        value = getattr(args, name)
        need(value is None or low <= value < math.inf, f"--{name.replace('_', '-')} is {value}: give {low} or more")


def need_file(flag: str, path: Path, overwrite: bool, *suffixes: str) -> None:
    """Exit with one line where the file `path` of a flag cannot be written, or its name ends in none of `suffixes`."""
    try:
        need(not path.is_dir(), f"{flag} is {path}, a folder: give a file")
        need(path.suffix in suffixes, f"{flag} is {path}: give a name ending in {' or '.join(suffixes)}")
        need(path.parent.is_dir(), f"{flag} is {path}: there is no folder {path.parent}")
        need(overwrite or not path.exists(), f"{path} exists: give --overwrite or another {flag}")
        need(path.is_file() or not path.exists(), f"{flag} is {path}, which is no file: give another name")
        part_of(path).touch()
        part_of(path).unlink()
    except (OSError, ValueError) as error:
        need(False, f"{flag} is {path}, which cannot be written: {getattr(error, 'strerror', None) or error}")


def part_of(path: Path) -> Path:
    """The file beside `path` that takes its place once it is whole."""
    return path.with_name(f"part_{os.getpid()}_{path.name}")


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save(part)` write a file beside `path`, which then takes its place: what was there outlives a failure.

    Exits with one line where the disk fails.
    """
    part = part_of(path)
    try:
        save(part)
        os.replace(part, path)
    except OSError as error:
        sys.exit(f"error: {path} cannot be written: {error.strerror or error}")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_conditions(args: Conditions) -> None:
    """Exit with one line on the first of the flags in `Conditions` that cannot be."""
    need_from(args, 1, "horizon")
    need_from(args, 0, "seed", "terrain_seed", "wheel_damping", "push", "obs_noise")
    for name in ("terrain_amplitude", "push_interval"):
        value = getattr(args, name)
        need(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')} is {value}: give more than 0")
    for name, high in (("terrain_amplitude", 100), ("wheel_damping", 1e6), ("seed", 1e18), ("terrain_seed", 1e18)):
        value = getattr(args, name)
        need(value is None or value <= high, f"--{name.replace('_', '-')} is {value}: give {high:,.0f} or less")
    shortest = 2 * PUSH_STEPS * TIMESTEP
    need(args.push_interval >= shortest, f"--push-interval is {args.push_interval}: give {shortest} s or more")
    need(args.terrain in (None, *TERRAINS), f"--terrain is {args.terrain}: give {' or '.join(TERRAINS)}")
    for name in ("terrain_seed", "terrain_amplitude"):
        unused = args.terrain == "flat" and getattr(args, name) is not None
        need(not unused, f"--{name.replace('_', '-')} means nothing on --terrain flat: leave one out")


_progress_shown = 0.0


def progress(line: str, share: float) -> None:
    """Show how far a long job is: in place on a terminal, else a line every half minute."""
    global _progress_shown
    now, terminal = time.monotonic(), ballbot_runs.is_terminal(sys.stderr)
    if now - _progress_shown < (0.2 if terminal else 30):
        return
    _progress_shown = now
    bar = "#" * int(20 * share)
    print(f"[{bar:<20}] {line}".ljust(100), end="\r" if terminal else "\n", file=sys.stderr, flush=True)


def clear_progress() -> None:
    """Wipe the line of progress off a terminal."""
    if ballbot_runs.is_terminal(sys.stderr):
        print(" " * 100, end="\r", file=sys.stderr, flush=True)


# Policies

Act = Callable[[dict], np.ndarray]  # observations, (n, ...), to actions, (n, 3)
EpisodePolicy = Callable[[BallbotVectorEnv, list[torch.Generator]], Act]  # as `play` wants it


def load(path: Path, script: Path | None = None) -> tuple[ppo_ballbot.Policy, int]:
    """The Policy in a checkpoint and its steps; exits with one line on a bad file.

    Its classes are those of the script that trained it, or of the file `script`.
    """
    need(script is None or script.is_file(), f"--script is {script}: there is no such file")

    def must(good, problem):
        need(good, f"{path} {problem}")

    try:
        if path.is_dir():
            folder, path = path, path / "best.pt"
            other = "name its last.pt" if (folder / "last.pt").exists() else "give a .pt file or the folder of a run"
            need(path.exists(), f"{folder} has no best.pt (no evaluation yet?): {other}")
        must(path.exists(), "does not exist: give a .pt file or the folder of a run, runs/<name>")
        content = ballbot_runs.unsealed(path)
        module = ballbot_runs.script_for(content, path, script)
        agent, train_args = ballbot_runs.fitting(content, module.Args, module.Agent)
        policy, step = module.Policy(agent, train_args), content.get("global_step", 0)
    except (OSError, ValueError, ballbot_runs.ScriptError) as error:
        must(False, getattr(error, "strerror", None) or error)
    except Exception:  # its content can be anything
        must(False, "is no checkpoint of ppo_ballbot.py or a copy")
    must(type(step) is int and 0 <= step < 2**63, "has a global_step that is no number of steps")
    for name, low, high in (("frame_skip", 1, 1000), ("terrain_seed", 0, 1e18), ("eval_terrain_seed", 0, 1e18),
                            ("wheel_damping", 0, 1e6), ("depth_scale", -1e6, 1e6)):  # fmt: skip
        value = getattr(train_args, name)
        must(low <= value <= high, f"has a {name} that is not from {low:g} to {high:g} in its args")
    return policy, step


def trained(policy: ppo_ballbot.Policy, stochastic: bool = False) -> EpisodePolicy:
    """A trained policy for `play`; a stochastic one draws its actions."""

    def start(envs, generators):
        act = type(policy)(policy.agent, policy.args)
        return lambda obs: act(obs, not stochastic, generators)

    return start


# Episodes


def conditions(args: Conditions, train_args: ppo_ballbot.Args, policy: str | Path) -> dict[str, Any]:
    """The arguments of the environment for a policy trained by `train_args`; `policy` names it in an error."""
    task = {
        "terrain": args.terrain or train_args.terrain,
        "cameras": train_args.cameras,
        "wheel_damping": train_args.wheel_damping if args.wheel_damping is None else args.wheel_damping,
        "frame_skip": train_args.frame_skip,
        "max_episode_steps": -(-args.horizon // train_args.frame_skip),  # actions
    }
    if train_args.goal == "command":
        task["goal"] = "command"
    if task["terrain"] != "flat":
        task["terrain_seed"] = train_args.eval_terrain_seed if args.terrain_seed is None else args.terrain_seed
        task["terrain_amplitude"] = args.terrain_amplitude or 0.1
    else:
        unused = args.terrain_seed is None and args.terrain_amplitude is None
        need(unused, f"{policy} was trained on flat ground, where --terrain-seed and --terrain-amplitude mean nothing: "
             "give --terrain perlin with them")  # fmt: skip
    return task


def begin(envs: BallbotVectorEnv, seeds: list[int], horizon: int) -> tuple[dict, dict]:
    """`envs.reset(seed=seeds)`, further back along y where a long episode could otherwise end at the terrain's edge.

    Up to 4000 steps nothing changes, nor with commands, which lead anywhere. For longer ones the starts are squeezed
    towards y = -18 m so that at TOP_SPEED none reaches the far edge; from 18,000 steps on the terrain is too small.
    """
    obs, info = envs.reset(seed=seeds)
    limit = TERRAIN_EXTENT - 2 * TERRAIN_MARGIN
    latest = max(limit - TOP_SPEED * horizon * TIMESTEP, -limit)
    if latest < START_EXTENT and envs.commands is None:
        x, y = info["position"][:, :2].T
        y = -limit + (y + START_EXTENT) / (2 * START_EXTENT) * (latest + limit)
        obs, info = envs.reset(options={"position": np.stack([x, y], 1)})
    return obs, info


def play(
    envs: BallbotVectorEnv,
    obs: dict,
    policy: EpisodePolicy,
    args: Conditions,
    seeds: list[int],
) -> Iterator[tuple[int, np.ndarray, tuple]]:
    """Go on for ever from the first observations of new episodes, disturbed as `args` (Conditions) say.

    `policy(envs, generators)` begins new episodes and returns a function from observations, a dict of (n, ...), to
    actions (n, 3). Each episode has generators of its own, from its seed in `seeds` (n), so that it is the same among
    any number of others. After each step yields the physics steps so far, the actions, and what `envs.step` returned.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # of noise and actions
    rngs = [np.random.default_rng([seed, 1]) for seed in seeds]  # of pushes; default_rng(seed) samples the start
    pushes, act, steps = Pushes(envs.forces, envs.frame_skip), policy(envs, generators), 0
    while True:
        actions = act(add_obs_noise(obs, envs, args.obs_noise, generators))
        push(pushes, args, steps // envs.frame_skip, rngs)
        steps += envs.frame_skip
        result = envs.step(actions)
        obs = result[0]
        yield steps, actions, result


def add_obs_noise(obs: dict, envs: BallbotVectorEnv, std: float, generators: list[torch.Generator]) -> dict:
    """A batch of observations with noise of standard deviation `std` on its sensors, and on new frames, in place.

    Each environment's noise is sampled by its own generator.
    """
    if not std:
        return obs
    noise = std * torch.stack([torch.randn(NOISE_WIDTH, generator=generator) for generator in generators])
    noisy = obs | add_sensor_noise(obs, noise.numpy())
    for i in np.flatnonzero(envs.new_frames) if envs.frames is not None else ():
        noise = std * torch.randn(envs.frames[i].shape, generator=generators[i])
        envs.frames[i] = add_depth_noise(envs.frames[i], noise, MAX_DEPTH)
    if envs.frames is not None:
        noisy |= {name: envs.frames[:, i : i + 1].numpy() for i, name in enumerate(CAMERAS)}  # `obs` may have copies
    return noisy


def push(pushes: Pushes, args: Conditions, action: int, rngs: list[np.random.Generator]) -> None:
    """Begin or end the push that is due before `action` (0 is the first of an episode), each by its own generator."""
    pushes.end_due()
    interval = max(1, round(args.push_interval / TIMESTEP / pushes.frame_skip))  # actions
    if args.push and action > 0 and action % interval == 0:
        angle = np.array([rng.uniform(0, 2 * np.pi) for rng in rngs])
        pushes.begin(slice(None), args.push / pushes.seconds * np.stack([np.cos(angle), np.sin(angle)], 1))
