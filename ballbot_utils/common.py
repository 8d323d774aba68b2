"""Shared by the programs: settings of evaluations, checks of flags and files, progress, policies and episodes."""

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from pydantic import Field

from ballbot_env import START_EXTENT, BallbotVectorEnv
from ballbot_utils.checkpoints import load_policy
from ballbot_utils.console import ProgressLine, check_argument, exit_with_error, one_line_errors
from ballbot_utils.depth import MAX_DEPTH
from ballbot_utils.flags import Count, NonNegative, Seed, env_kwargs, validate_types
from ballbot_utils.model import CAMERAS, TIMESTEP
from ballbot_utils.observations import NOISE_WIDTH, add_sensor_noise
from ballbot_utils.randomization import PUSH_STEPS, Pushes, add_depth_noise
from ballbot_utils.terrain import (
    CELL,
    TERRAIN_EXTENT,
    TERRAIN_MARGIN,
    Terrain,
    is_scaled,
    is_seeded,
)
from ballbot_utils.user_files import pin

TOP_SPEED = 1.0  # m/s, more than the robot can reach at wheel damping 0.4


@dataclass
class EvalSettings:
    """Flags of the programs that run episodes."""

    horizon: Count = 4000
    """steps at which an episode ends, rounded up to whole actions; 10000 is the paper's test of generalization
    (fig. 7)"""
    seed: Seed = 1_000_000
    """seed of start poses, pushes and noise; the default is that of ppo_ballbot.py's own evaluations"""
    terrain: str | None = None
    """ground: a kind, such as ramp or ramp:angle=15, or a file (docs/terrain.md); default: as in training"""
    terrain_seed: Seed | None = None
    """which terrain of a random kind; default: the evaluation terrain of the training run"""
    terrain_amplitude: Annotated[float, Field(gt=0, le=100)] | None = None
    """height of Perlin hills, m; default: 0.1"""
    wheel_damping: NonNegative | None = None
    """damping of the wheels' axles, N·m·s/rad; default: as in training"""
    push: NonNegative = 0.0
    """impulse of random horizontal pushes on the base, N·s"""
    push_interval: Annotated[float, Field(ge=2 * PUSH_STEPS * TIMESTEP)] = 1.0
    """seconds from one push to the next, and from the start to the first"""
    obs_noise: NonNegative = 0.0
    """standard deviation of Gaussian noise on the observations, each in its own unit"""
    overwrite: bool = False
    """replace a file that exists"""


# Flags and files


@one_line_errors()
def run_program(main: Callable[[Any], Any], flags: type, **kwargs: Any) -> None:
    """Run a program with the flags of the command line, a `flags`; `kwargs` are those of `tyro.cli`."""
    called = Path(sys.argv[0])
    name = f"python -m {called.resolve().parent.name}.{called.stem}" if called.suffix == ".py" else called.name
    main(tyro.cli(flags, prog=name, **kwargs))


def check_flags(args: Any) -> None:
    """Exit with one line on the first flag whose value does not fit its type, bounds included."""
    try:
        validate_types(json.loads(json.dumps(vars(args), default=str)), type(args))  # paths as strings
    except ValueError as error:
        exit_with_error(error)


def require_min(args: Any, low: float, *names: str) -> None:
    """Exit with one line on the first of these flags that is given and not a finite number of at least `low`."""
    for name in names:
        value = getattr(args, name)
        valid = value is None or low <= value < math.inf
        check_argument(valid, f"--{name.replace('_', '-')} is {value}: give {low} or more")


def check_settings(args: EvalSettings) -> None:
    """Exit with one line on the first invalid flag of `args`."""
    check_flags(args)
    if args.terrain is not None:
        check_terrain(args, args.terrain)


def check_terrain(args: EvalSettings, terrain: str, policy: str | Path = "") -> dict[str, Any]:
    """The environment's arguments for a terrain, or exit with one line if it is invalid or a flag is useless on it.

    `policy` names the policy that was trained on it, for the error.
    """
    try:
        task = {"terrain": pin(terrain)}
        used = {"terrain_seed": is_seeded(terrain), "terrain_amplitude": is_scaled(terrain)}
        Terrain(terrain, args.terrain_seed or 0)
    except (ValueError, OSError) as error:
        exit_with_error(f"{policy} was trained on terrain that is not here: {error}" if policy else error)
    for name, is_used in used.items():
        given = getattr(args, name)
        check_argument(is_used or given is None,
                       f"--{name.replace('_', '-')} has no effect on --terrain {terrain}: leave it out")  # fmt: skip
        task |= {name: given} if is_used else {}
    return task


def require_packages(purpose: str, *packages: str, requirements: str = "requirements-tune.txt") -> None:
    """Exit with one line if a package cannot be imported. `purpose` names what needs it."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            exit_with_error(f"{purpose} needs {error.name}: pip install -r {requirements}")


def require_writable(flag: str, path: Path, overwrite: bool, *suffixes: str) -> None:
    """Exit with one line if the file `path` of a flag cannot be written, or its name has none of the `suffixes`."""
    try:
        check_argument(not path.is_dir(), f"{flag} is {path}, a folder: give a file")
        check_argument(path.suffix in suffixes, f"{flag} is {path}: give a name ending in {' or '.join(suffixes)}")
        check_argument(path.parent.is_dir(), f"{flag} is {path}: there is no folder {path.parent}")
        check_argument(overwrite or not path.exists(), f"{path} exists: give --overwrite or another {flag}")
        check_argument(path.is_file() or not path.exists(), f"{flag} is {path}, which is no file: give another name")
        part_of(path).touch()
        part_of(path).unlink()
    except (OSError, ValueError) as error:
        exit_with_error(f"{flag} is {path}, which cannot be written: {getattr(error, 'strerror', None) or error}")


def part_of(path: Path) -> Path:
    """A temporary file beside `path`, with the same suffix."""
    return path.with_name(f"part_{os.getpid()}_{path.name}")


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a file in one step: `save(part)` writes a temporary file, which then replaces `path`.

    Exits with one line if the disk fails; `path` is then unchanged.
    """
    part = part_of(path)
    try:
        save(part)
        os.replace(part, path)
    except OSError as error:
        exit_with_error(f"{path} cannot be written: {error.strerror or error}")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


_line, _started = ProgressLine(interval=30), time.monotonic()


def progress(text: str, share: float) -> None:
    """Show how much of the program's work is done, from 0 to 1."""
    _line.show(share, 1, time.monotonic() - _started, text)


# Policies

Act = Callable[[dict], np.ndarray]  # observations, (n, ...), to actions, (n, 3)
PolicyFactory = Callable[[BallbotVectorEnv, list[torch.Generator]], Act]  # called once for each set of new episodes


def load(path: Path, script: Path | None = None) -> tuple[Any, int]:
    """The Policy in a checkpoint, and its training steps. Exits with one line if there is no valid policy.

    Its classes come from `script`, or else from the script that trained it.
    """
    check_argument(script is None or script.is_file(), f"--script is {script}: there is no such file")
    policy, content = load_policy(path, script)
    step = content.get("global_step", 0)
    check_argument(type(step) is int and 0 <= step < 2**63, f"{path} has a global_step that is no number of steps")
    return policy, step


def policy_factory(policy: Any, stochastic: bool = False) -> PolicyFactory:
    """A trained policy for `step_policy`. A stochastic one samples its actions."""

    def make_act(envs, generators):
        act = type(policy)(policy.agent, policy.args)
        return lambda obs: act(obs, not stochastic, generators)

    return make_act


# Episodes


def eval_task(args: EvalSettings, train_args: Any, policy: str | Path) -> dict[str, Any]:
    """The environment's arguments for a policy trained with the flags `train_args`; `policy` names it in an error."""
    terrain = check_terrain(args, args.terrain or train_args.terrain, "" if args.terrain else policy)
    task = terrain | {
        "cameras": train_args.cameras,
        "wheel_damping": train_args.wheel_damping if args.wheel_damping is None else args.wheel_damping,
        "frame_skip": train_args.frame_skip,
        "max_episode_steps": -(-args.horizon // train_args.frame_skip),  # actions
    }
    if train_args.goal == "command":
        task["goal"] = "command"
    for name, default in (("terrain_seed", train_args.eval_terrain_seed), ("terrain_amplitude", 0.1)):
        if task.get(name, 0) is None:
            task[name] = default
    try:
        return task | env_kwargs(train_args)
    except ValueError as error:
        exit_with_error(f"{policy}: {error}")


def reset_for_horizon(envs: BallbotVectorEnv, seeds: list[int], horizon: int) -> tuple[dict, dict]:
    """`envs.reset(seed=seeds)`, but long episodes start at lower y, so that they do not end at the terrain's edge.

    Nothing changes up to a `horizon` of 4000 steps, nor with commands or another goal than +y. For longer episodes the
    starts are moved towards y = -18 m: a robot at TOP_SPEED does not reach the far edge. From 18,000 steps on the
    terrain is too small for this.
    """
    obs, info = envs.reset(seed=seeds)
    limit = TERRAIN_EXTENT - 2 * TERRAIN_MARGIN
    latest = max(limit - TOP_SPEED * horizon * TIMESTEP, -limit)
    if latest < START_EXTENT and np.array_equal(envs.goal, (0, 1)):  # with commands it is None
        x, y = info["position"][:, :2].T
        share = (y + START_EXTENT) / (2 * START_EXTENT)
        y = -limit + share * (latest + limit)
        starts = envs.terrain.find_starts((-START_EXTENT, -limit), (START_EXTENT, latest + CELL))
        if starts is not None:
            x, y = starts[(share * len(starts)).astype(int)].T
        obs, info = envs.reset(options={"position": np.stack([x, y], 1)})
    return obs, info


def step_policy(
    envs: BallbotVectorEnv, obs: dict, policy: PolicyFactory, args: EvalSettings, seeds: list[int]
) -> Iterator[tuple[int, np.ndarray, tuple]]:
    """Step the environments without end, from the first observations `obs` of new episodes.

    Pushes and noise are those of `args`. Each episode has its own generators, from its seed in `seeds` (n): it does not
    depend on the number of episodes. Yields after each step: physics steps so far, the actions (n, 3), and the result
    of `envs.step`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # of noise and actions
    rngs = [np.random.default_rng([seed, 1]) for seed in seeds]  # of pushes; default_rng(seed) samples the start
    pushes, act, steps = Pushes(envs.forces, envs.frame_skip), policy(envs, generators), 0
    while True:
        actions = act(add_obs_noise(obs, envs, args.obs_noise, generators))
        update_pushes(pushes, args, steps // envs.frame_skip, rngs)
        steps += envs.frame_skip
        result = envs.step(actions)
        obs = result[0]
        yield steps, actions, result


def add_obs_noise(obs: dict, envs: BallbotVectorEnv, std: float, generators: list[torch.Generator]) -> dict:
    """A batch of observations with noise of standard deviation `std` on its sensors. New frames change in place.

    The noise of each environment comes from its own generator.
    """
    if not std:
        return obs
    noise = std * torch.stack([torch.randn(NOISE_WIDTH, generator=generator) for generator in generators])
    noisy = obs | add_sensor_noise(obs, noise.numpy())
    if envs.frames is not None:
        for i in np.flatnonzero(envs.new_frames):
            noise = std * torch.randn(envs.frames[i].shape, generator=generators[i])
            envs.frames[i] = add_depth_noise(envs.frames[i], noise, MAX_DEPTH)
        noisy |= {name: envs.frames[:, i : i + 1].numpy() for i, name in enumerate(CAMERAS)}  # `obs` may have copies
    return noisy


def update_pushes(pushes: Pushes, args: EvalSettings, action: int, rngs: list[np.random.Generator]) -> None:
    """Begin and end the pushes that are due before `action`, counted from 0 in an episode."""
    pushes.end_due()
    interval = max(1, round(args.push_interval / TIMESTEP / pushes.frame_skip))  # actions
    if args.push and action > 0 and action % interval == 0:
        angle = np.array([rng.uniform(0, 2 * np.pi) for rng in rngs])
        pushes.begin(slice(None), args.push / pushes.seconds * np.stack([np.cos(angle), np.sin(angle)], 1))
