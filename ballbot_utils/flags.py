"""Command-line flags: their bounds, presets and config files, and one-line errors on values that make no sense."""

import argparse
import ast
import contextlib
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pydantic
import torch
import tyro
from pydantic import Field

from ballbot_utils.arguments import ARGUMENTS, check_arguments
from ballbot_utils.console import check_argument, exit_with_error, print_rank0
from ballbot_utils.randomization import check_randomization
from ballbot_utils.terrain import Terrain, is_scaled, is_seeded
from ballbot_utils.user_files import pin

# Types of flags with bounds
Count = Annotated[int, Field(ge=1, le=10**12)]
Few = Annotated[int, Field(ge=1, le=1000)]
Seed = Annotated[int, Field(ge=0, le=10**18)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
LogScale = Annotated[float, Field(ge=-10, le=10)]

# Flags of earlier versions, and the value with which they had no effect
REMOVED_FLAGS = dict(spin_cost=0, drift_cost=0, heading_cost=0, bound_coef=0, log_std_lr_scale=1, norm_value=False)
NOT_IN_CONFIG = "run_name", "config", "resume"  # flags that config.json leaves out


class BaseArgs:
    """Base class of a script's Args: values that the library and the programs take for flags that the script lacks.

    Each Args needs the flags exp_name, run_name, resume, seed, total_timesteps and num_envs. Some parts of the library
    read more: `Run.save_is_due` reads save_interval.
    """

    # The task: the defaults of the environment
    terrain, terrain_seed, eval_terrain_seed, randomization = "perlin", 0, 1_000_000, {}
    cameras, wheel_damping, frame_skip, goal, env_kwargs, reward, curriculum = True, 0.4, 1, "forward", (), "", False
    # What a script does not do
    num_processes, cuda, track, capture_video, init_from, freeze_encoder = 1, False, False, False, "", False
    norm_adv, learning_rate, clip_coef, ent_coef, gamma, vf_coef, update_epochs = False, 1.0, 1.0, 1.0, 1.0, 1.0, 0
    num_steps, eval_interval, hidden_size, pi_layers, vf_layers = 1, 0, 0, 0, 0

    @property
    def minibatch_size(self) -> int:
        return self.num_envs * self.num_steps


@functools.cache
def validator(cls: type) -> pydantic.TypeAdapter:
    """Checks types and bounds of the dataclass `cls`."""
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return pydantic.TypeAdapter(pydantic.dataclasses.dataclass(cls, config=config))


def validate_types(settings: dict, cls: type) -> Any:
    """A `cls` from a dict of flags; raises ValueError on the first unknown name, wrong type or value out of bounds."""
    try:
        return cls(**asdict(validator(cls).validate_json(json.dumps(settings))))
    except pydantic.ValidationError as errors:
        error = errors.errors()[0]
        flag = "--" + "-".join(map(str, error["loc"])).replace("_", "-")
        if error["type"] == "unexpected_keyword_argument":
            raise ValueError(f"there is no flag {flag:.40}") from None
        words = {"ge": "give {:,} or more", "gt": "give more than {:,}", "le": "give {:,} or less"}
        problem = error["msg"].replace("Input should be", "give")
        for bound, limit in error.get("ctx", {}).items():
            problem = words.get(bound, problem).format(limit)
        raise ValueError(f"{flag} is {error['input']!s:.40}: {problem}") from None


def parse_args(cls: type, presets: dict[str, dict], translate: Callable[[dict], dict] = lambda settings: settings):
    """A `cls`, a dataclass, from the command line. Flags win over --config, which wins over --preset.

    `translate` changes a config file's settings into this script's flags. A flag on the command line that has no effect
    is an error; presets and config files may have such flags.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="")
    early.add_argument("--config", default="")
    early.add_argument("--total-timesteps", "--total_timesteps")
    start, _ = early.parse_known_args()
    settings = {}
    if start.config:
        try:
            if not Path(start.config).is_file():  # reading a pipe may never end
                raise ValueError("there is no such file")
            settings = json.loads(Path(start.config).read_bytes())
            removed = [name for name, value in REMOVED_FLAGS.items() if settings.pop(name, value) != value]
            if removed:
                print_rank0(f"note: {', '.join(removed)} in {start.config} no longer exist", file=sys.stderr)
            settings = translate({name: value for name, value in settings.items() if not name.startswith("script")})
            validate_types(settings, cls)
            settings = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            exit_with_error(f"--config {start.config} is not a run's config.json: {error}")
        other_preset = start.preset and start.preset != settings.get("preset", start.preset)
        check_argument(not other_preset, f"--config {start.config} sets all flags: leave out --preset {start.preset}")
    default = replace(cls(), **presets.get(start.preset or settings.get("preset", ""), {}) | settings)
    if {"-h", "--help"} & set(sys.argv):
        print(format_help(default))
        raise SystemExit(0)
    args = tyro.cli(cls, default=default)
    if args.resume:
        same = args == cls(resume=args.resume, total_timesteps=args.total_timesteps)
        check_argument(same, "--resume takes its flags from the run: add only --total-timesteps")
        args.total_timesteps_given = start.total_timesteps is not None
    if args.terrain == "flat" and args.randomization == default.randomization:  # a preset's is for hills
        args.randomization = {key: value for key, value in args.randomization.items() if key != "terrain_amplitude"}
    for name, reason in ineffective_flags(args).items():
        given = getattr(args, name) != getattr(default, name)
        check_argument(not given, f"--{name.replace('_', '-')} has no effect {reason}: leave it out")
    return args


def read_flag_comments(cls: type) -> dict[str, dict[str, str]]:
    """The flags of a dataclass and their comments, by section: a comment after an empty line is a section's title."""
    sections: dict[str, dict[str, str]] = {}
    for parent in reversed(cls.__mro__[:-1]):
        section, comment, after_blank = "Run", "", False
        for line in inspect.getsource(parent).splitlines():
            match = re.match(r"    (?:(\w+): .*? = .*?)?(?:  )?(?:# (.*))?$", line)
            name, text = match.groups() if match else (None, None)
            if text and not name and after_blank:
                section = text
            elif name:
                old = next((flags for flags in sections.values() if name in flags), None)
                (sections.setdefault(section, {}) if old is None else old)[name] = f"{comment} {text or ''}".strip()
                comment = ""
            elif text:
                comment = f"{comment} {text}".strip()
            after_blank = not line.strip()
    return sections


def format_help(args: Any) -> str:
    """The text of --help: the flags of a dataclass by section, the first clause of their comments, their values."""
    lines, types = [f"usage: {Path(sys.argv[0]).name} [FLAGS]"], get_type_hints(type(args))
    for section, flags in read_flag_comments(type(args)).items():
        lines += ["", f"{section}:"]
        for name, comment in flags.items():
            value, flag, choices = getattr(args, name), name.replace("_", "-"), get_args(types[name])
            if isinstance(value, tuple):
                usage, shown = f"--{flag} NAME=VALUE ...", " ".join(value)
            elif isinstance(value, bool):
                usage, shown = f"--[no-]{flag}", "on" if value else "off"
            elif isinstance(value, dict):
                usage, shown = f"--{flag} NAME VALUE ...", " ".join(f"{key} {x:g}" for key, x in value.items())
            else:
                kind = f"{{{','.join(filter(None, choices))}}}" if choices else type(value).__name__.upper()
                usage, shown = f"--{flag} {kind}", str(value)
            clause = re.split(r"[;.] ", comment)[0] + f" ({shown})" * bool(shown)
            lines.append(f"  {usage:28}{clause}" if len(usage) < 28 else f"  {usage}\n{'':30}{clause}")
    return "\n".join(lines)


def format_flags(settings: dict[str, Any]) -> str:
    """Settings as a part of a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
            values = values if isinstance(values, (list, tuple)) else [values]
            short = [f"{x:g}" if isinstance(x, float) and float(f"{x:g}") == x else str(x) for x in values]
            words += [f"--{flag}", *map(shlex.quote, short)]
    return " ".join(words)


# Arguments of the environment that the script itself sets
SET_BY_SCRIPT = ("num_envs", "num_threads", "device", "render_mode", "autoreset_mode", "copy", "reward")


def env_kwargs(args: Any) -> dict[str, Any]:
    """The arguments of the environment that --env-kwargs and --reward give. Raises ValueError for an invalid one."""
    given = {"reward": pin(args.reward)} if getattr(args, "reward", "") else {}
    for pair in getattr(args, "env_kwargs", ()):
        name, equals, value = pair.partition("=")
        if not equals or name in given:
            raise ValueError(f"--env-kwargs has {pair!r}: give each argument once, as NAME=VALUE")
        with contextlib.suppress(ValueError, SyntaxError):  # what is no literal is a string
            value = ast.literal_eval(value)
        direction = name == "goal" and not isinstance(value, str) and getattr(args, name, "") != "command"
        if name in SET_BY_SCRIPT or (hasattr(args, name) and not direction):
            flag = f"use --{name.replace('_', '-')}" if hasattr(args, name) else "the script sets it"
            raise ValueError(f"--env-kwargs cannot set {name}: {flag}")
        if name not in ARGUMENTS:
            free = [key for key in ARGUMENTS if key not in SET_BY_SCRIPT and (key == "goal" or not hasattr(args, key))]
            raise ValueError(f"--env-kwargs has {name!r}, which the environment lacks: it has {', '.join(free)}")
        given[name] = value
    try:
        check_arguments(given)
    except ValueError as error:
        raise ValueError(f"--env-kwargs: {error}") from None
    return given


def pin_files(args: Any) -> None:
    """Add the SHA-256 of the files that --terrain and --reward name, or exit with one line if a file has changed."""
    try:
        args.terrain = pin(args.terrain)
        if getattr(args, "reward", ""):
            args.reward = pin(args.reward)
    except (ValueError, OSError) as error:
        exit_with_error(error)


def check_environment(args: Any) -> None:
    """Raise ValueError, of one line, if the environment's arguments are invalid, before any work starts."""
    given = env_kwargs(args)
    Terrain(args.terrain, args.terrain_seed, getattr(args, "terrain_amplitude", 0.1))
    curriculum = getattr(args, "curriculum", False)
    check_randomization(args.randomization, args.terrain, given.get("max_tilt", 20.0), curriculum)
    if "reward" in given:
        from ballbot_env import BallbotVectorEnv  # which imports much that flags do not need

        BallbotVectorEnv(2, "flat", cameras=False, num_threads=1, reward=given["reward"],
                         goal="command" if args.goal == "command" else (0, 1)).close()  # fmt: skip


def config_json(flags: dict[str, Any]) -> str:
    """The text of a run's config.json, which --config reads."""
    return json.dumps({key: value for key, value in flags.items() if key not in NOT_IN_CONFIG}, indent=2) + "\n"


def ineffective_flags(args: Any) -> dict[str, str]:
    """The flags that change nothing beside the others, whatever their values, and the reason for each."""
    schedules = {name: getattr(args, f"{name}_schedule", "") for name in ("lr", "clip", "ent")}  # "" without schedules
    start = {"lr": args.learning_rate, "clip": args.clip_coef, "ent": args.ent_coef}
    size, gpus = int(os.environ.get("WORLD_SIZE", 0)), torch.cuda.device_count() if args.cuda else 0
    one_step = args.update_epochs == 1 and args.minibatch_size == args.num_envs * args.num_steps
    never_evaluated = hasattr(args, "final_eval_episodes") and args.eval_interval > args.total_timesteps
    try:
        seeded, scaled = is_seeded(args.terrain), is_scaled(args.terrain)
    except (ValueError, OSError):  # check_environment reports it
        seeded = scaled = True
    table = [
        (not seeded, "terrain_seed eval_terrain_seed", f"on --terrain {args.terrain}, which is not random"),
        (not scaled, "terrain_amplitude", f"on --terrain {args.terrain}, whose height is not scaled"),
        (args.terrain == "flat", "terrain_seed terrain_amplitude eval_terrain_seed", "on --terrain flat"),
        (args.terrain == "flat" and not args.init_from, "privileged_critic", "on --terrain flat, which has no slopes"),
        (not args.cameras, "depth_scale freeze_encoder small_encoder encoder_path", "with --no-cameras"),
        (not args.freeze_encoder, "encoder_path", "with --no-freeze-encoder, which trains an encoder from scratch"),
        (args.init_from, "encoder_path", "with --init-from, whose policy has its own encoder"),
        (args.init_from, "init_log_std", "with --init-from, whose policy has its own action noise"),
        (args.gamma == 0, "gae_lambda", "with --gamma 0"),
        (args.vf_coef == 0, "clip_vloss", "with --vf-coef 0"),
        (args.update_epochs == 1 and schedules["lr"] != "kl", "target_kl", "with --update-epochs 1"),
        (one_step, "clip_coef clip_vloss clip_schedule clip_end", "in a single gradient step per iteration"),
        (never_evaluated, "eval_episodes", "with --eval-interval above --total-timesteps"),
        (not args.track, "wandb_project_name wandb_entity", "without --track"),
        (not args.cuda, "torch_deterministic", "without --cuda: the CPU's algorithms are deterministic"),
        (args.cuda, "torch_threads", "with --cuda, where the networks run on the GPU"),
        (size and size != args.num_processes, "num_processes", f"here, as torchrun starts {size} processes"),
        (not size and 0 < gpus < args.num_processes, "num_processes", f"above the number of GPUs, {gpus}"),
        (schedules["lr"] == "guide" and args.learning_rate > 0, "lr_schedule", "unless --learning-rate is -1"),
    ]
    for name, schedule in schedules.items():
        fixed, end = schedule not in ("linear", "cosine"), f"{name}_end"
        table.append((schedule and fixed, end, f"with --{name}-schedule {schedule}"))
        same = schedule and not fixed and getattr(args, end, 0) == start[name]
        table.append((same, f"{name}_schedule", "where start and end are the same"))
    return {name: reason for holds, names, reason in reversed(table) if holds for name in names.split()
            if name in vars(args)}  # fmt: skip


def validate_args(args: Any, world_size: int | None = None) -> None:
    """Exit with one line on the first invalid flag, before any work starts."""
    try:
        validate_types(asdict(args), type(args))
        check_environment(args)
    except (ValueError, OverflowError) as error:
        exit_with_error(error)
    world_size, size = world_size or args.num_processes, args.minibatch_size
    batch_size = args.num_envs * args.num_steps
    steps = batch_size * args.frame_skip
    divisors = (d for k in range(1, math.isqrt(min(batch_size, 10**12)) + 1) if batch_size % k == 0
                for d in (k, batch_size // k))  # fmt: skip
    for wrong, message in (
        (args.learning_rate != -1 and args.learning_rate <= 0, f"--learning-rate is {args.learning_rate}: give -1 for "
         "the schedule, or a positive constant"),
        (getattr(args, "anneal_lr", False) and args.learning_rate < 0, "--anneal-lr needs a positive --learning-rate"),
        (is_seeded(args.terrain) and args.terrain_seed == args.eval_terrain_seed,
         "--terrain-seed and --eval-terrain-seed are the same: evaluate on terrain not trained on"),
        (batch_size % size, f"--minibatch-size is {size}, which does not divide --num-envs * --num-steps = "
         f"{batch_size}: {max(d for d in divisors if d <= size)} does"),
        (args.norm_adv and size == 1, "--norm-adv needs a --minibatch-size above 1"),
        (args.num_envs % world_size or size % world_size, f"{world_size} processes cannot share --num-envs "
         f"{args.num_envs} and --minibatch-size {size}: give multiples of {world_size}, or --num-processes 1"),
        (args.total_timesteps < steps, f"--total-timesteps is {args.total_timesteps}: give at least "
         f"--num-envs * --num-steps * --frame-skip = {steps}, one iteration"),
        (args.track and not importlib.util.find_spec("wandb"), "--track needs Weights & Biases: pip install wandb"),
        (args.cuda and not torch.cuda.is_available(), "--cuda: PyTorch finds no GPU here; leave the flag out"),
    ):  # fmt: skip
        check_argument(not wrong, message)
    # Samples and a layer on all of them, environments, networks with gradients, moments and copies
    images = 8 * env_kwargs(args).get("camera_size", 64) ** 2
    sample = 4 * (150 + 3 * args.hidden_size) + images * (not args.freeze_encoder)
    network = 24 * args.hidden_size * (120 + args.hidden_size * (args.pi_layers + args.vf_layers))
    memory = args.num_envs * (args.num_steps * sample + 2**16 + 2**11 * args.frame_skip) + world_size * (network + 3e8)
    memory *= int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) / world_size / 1e9
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    check_argument(memory < available, f"this takes about {memory:,.0f} GB of memory, and there are {available:,.0f}: "
                   "give fewer --num-envs, --num-steps or --num-processes, or a smaller --hidden-size")  # fmt: skip
