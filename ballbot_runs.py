"""What surrounds the learning in ppo_ballbot.py: flags, files of runs, processes and output. It knows nothing of PPO.

What cannot be ends the program with one line, by `stop`. A run is a folder runs/NAME with config.json (the flags),
TensorBoard's events, metrics.jsonl (every evaluation, a JSON object a line), last.pt and previous.pt (checkpoints to
resume from) and best.pt (the best policy so far). A checkpoint is a file of `torch.save` that ends in its checksum
(`sealed`); no code in one is ever run. It names the script that trained it, from which programs take the policy's
classes (`script_for`).
"""

import argparse
import ast
import atexit
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from datetime import timedelta
from itertools import chain
from multiprocessing import resource_tracker
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any, Literal, NoReturn, TextIO, get_args, get_origin

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter

from ballbot_utils.checks import find_mismatch as unlike
from ballbot_utils.model import ASSETS
from ballbot_utils.randomization import check_randomization as checked_randomization

# What a checkpoint's flags must say, of how its policy is played. All others are for training and have their defaults
NEEDED = ("cameras", "hidden_size", "pi_layers", "vf_layers", "terrain", "terrain_seed", "eval_terrain_seed",
          "wheel_damping", "frame_skip")  # fmt: skip
# What must be as it was in the training of the policy that --init-from names
NETWORK_FLAGS = ("cameras", "goal", "body_frame", "hidden_size", "pi_layers", "vf_layers", "norm_obs",
                 "privileged_critic", "depth_scale")  # fmt: skip
SCRIPT_KEYS = ("script", "script_sha256")  # in checkpoints and config.json: a script's name, and its text's SHA-256
INSTALLED_SCRIPTS = ("ppo_ballbot.py", "ppo_ballbot_schedules.py")


# Output


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal on which a line can be replaced in place."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


CLEAR_LINE = "\r\x1b[K" if is_terminal(sys.stdout) else ""


def escape_unprintable() -> None:
    """Print a character that the output's encoding lacks, as ASCII lacks "·", as its escape sequence."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")


def is_first() -> bool:
    """Whether this process is the first of a run's: what is said, it says."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, end: str = "\n") -> None:
    """Print it, in the first process, in place of the line of progress."""
    if is_first():
        try:
            print(CLEAR_LINE + text, end=end, flush=True)
        except OSError:
            sys.stdout = None  # nothing more is written there
            raise


class MachineFault(SystemExit):
    """Ends a program with one line on a fault of the machine: no space, no memory, or a process killed.

    A training's exit status is then 75, `os.EX_TEMPFAIL`: its flags are not at fault, and it can be tried again.
    """


def stop(message: str | Exception, kind: type[SystemExit] = SystemExit) -> NoReturn:
    """Exit with one line. All processes come to the same end: the first says it."""
    message = "".join(letter if letter.isprintable() else "?" for letter in f"error: {message}")
    raise kind(message if is_first() else 0)


def summary(result: dict) -> str:
    """An evaluation in words."""
    return ("return {episodic_return:.1f} ± {episodic_return_std:.1f}, length {episodic_length:.0f} ± "
            "{episodic_length_std:.0f}, falls {falls:.0%} ({episodes} episodes)").format(**result)  # fmt: skip


class Progress:
    """The line of progress: in place and twice a second on a terminal, else every 10 s as there is `more` to say."""

    def __init__(self, total_timesteps: int) -> None:
        self.total_timesteps, self.shown = total_timesteps, -math.inf

    def show(self, steps: int, clock: float, finished: Sequence[tuple[float, int]], more: str = "") -> None:
        """Of so many steps in `clock` s, and of the (return, length) of the last episodes `finished`."""
        if time.perf_counter() - self.shown < (0.5 if CLEAR_LINE else 10) or not (CLEAR_LINE or more):
            return
        self.shown = time.perf_counter()
        left = timedelta(seconds=int(clock * (self.total_timesteps / max(steps, 1) - 1)))
        result = (
            "return {:.1f}, length {:.0f}".format(*map(mean, zip(*finished))) if finished else "no episode ended yet"
        )
        line = f"[{'#' * (10 * steps // self.total_timesteps):<10}] {steps:,} steps, {steps / clock:,.0f} SPS, "
        line += f"{left} left, {result}{more}"
        say(line[: shutil.get_terminal_size().columns - 1] if CLEAR_LINE else line, end="" if CLEAR_LINE else "\n")


@contextlib.contextmanager
def closed_output_ends() -> Iterator[None]:
    """A block that ends without a traceback where its output is full, or closed as by `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout and sys.stdout.flush()
    except OSError as error:
        sys.stdout = None  # nothing more is written there
        stop(error, MachineFault)


@contextlib.contextmanager
def machine_faults_exit_75() -> Iterator[None]:
    """A block whose MachineFault becomes its line on stderr and its exit status."""
    try:
        yield
    except MachineFault as fault:
        with contextlib.suppress(OSError):
            fault.code and sys.stderr and print(fault.code, file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if fault.code else 0)


@contextlib.contextmanager
def ranks_end_at_once() -> Iterator[None]:
    """A block that is all of a program: a rank exits with its code as it ends, without Python's own end.

    Other processes end as usual, and so does a rank with a traceback.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        code = end.code
    if "RANK" in os.environ:
        atexit._run_exitfuncs()  # Weights & Biases has one
        with contextlib.suppress(OSError):
            if isinstance(code, str) and sys.stderr:
                print(code, file=sys.stderr)
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
        # ProcessGroupGloo's worker thread, "pt_gloo_runloop", aborts if it waits for the GIL as Python's own end begins
        os._exit(code if isinstance(code, int) else bool(code))


# Flags


def parse(kind: type, presets: dict[str, dict], translated: Callable[[dict], dict] = lambda settings: settings) -> Any:
    """A `kind`, a dataclass, from the command line: flags win over --config, which wins over --preset.

    The config file's settings are `translated` into this program's flags first. Exits with one line where a flag on the
    command line has no effect; the preset and the config file may hold such flags.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="")
    early.add_argument("--config", default="")
    early.add_argument("--total-timesteps", "--total_timesteps")
    start, _ = early.parse_known_args()
    settings = {}
    if start.config:
        flag = f"--config {start.config}"
        try:
            if not Path(start.config).is_file():
                raise ValueError("there is no such file")
            settings = json.loads(Path(start.config).read_bytes())
            settings = {k: v for k, v in settings.items() if k not in SCRIPT_KEYS or type(v) is not str}
            settings = typed(translated(settings), kind)
        except (OSError, ValueError, AttributeError, OverflowError, RecursionError, TypeError) as error:
            stop(f"{flag} is not a run's config.json: {error}")
        if start.preset and start.preset != settings.get("preset", start.preset):
            stop(f"{flag} has all flags of its own, so that --preset {start.preset} would do nothing: give one of them")
    preset = start.preset or settings.get("preset", "")
    default = replace(kind(), **presets.get(preset, {}) | settings)
    args = tyro.cli(kind, default=default)
    if args.resume and args != kind(resume=args.resume, total_timesteps=args.total_timesteps):
        stop("--resume takes its flags from the run: give no others, but for more --total-timesteps")
    if args.resume and start.total_timesteps and args.total_timesteps == kind.total_timesteps:
        args.total_is_given = True  # though it is the default
    if args.terrain == "flat" and args.randomization == default.randomization:  # a preset's is for hills
        args.randomization = {key: value for key, value in args.randomization.items() if key != "terrain_amplitude"}
    for name, reason in without_effect(args).items():
        if getattr(args, name) != getattr(default, name):  # it was given on the command line
            stop(f"--{name.replace('_', '-')} has no effect {reason}: leave it out")
    return args


def typed(settings: dict, kind: type) -> dict:
    """A dict of values of the flags in `kind`, each of its flag's type or a whole number for a float, or ValueError."""
    defaults, kinds, values = vars(kind()), {flag.name: flag.type for flag in fields(kind)}, {}
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"there is no flag {name!r:.40}")
        wanted, choices = type(defaults[name]), get_args(kinds[name]) if get_origin(kinds[name]) is Literal else ()
        values[name] = float(value) if wanted is float and type(value) is int else value
        if type(values[name]) is not wanted:
            raise ValueError(f"{name} is of type {type(value).__name__}, not {wanted.__name__}")
        if wanted is str and not value.isprintable():
            raise ValueError(f"--{name.replace('_', '-')} has a character that cannot be printed")
        if choices and value not in choices:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: give {', '.join(filter(None, choices))}")
    return values


def without_effect(args: Any) -> dict[str, str]:
    """The flags that change nothing beside the others, whatever their values, and the reason for each."""
    schedules = {name: getattr(args, f"{name}_schedule", "") for name in ("lr", "clip", "ent")}  # "" without schedules
    start = {"lr": args.learning_rate, "clip": args.clip_coef, "ent": args.ent_coef}
    steps = args.num_envs * args.num_steps
    size, gpus = int(os.environ.get("WORLD_SIZE", 0)), torch.cuda.device_count() if args.cuda else 0
    table = [
        (args.terrain == "flat", "terrain_seed terrain_amplitude eval_terrain_seed", "on --terrain flat"),
        (args.terrain == "flat" and not args.init_from, "privileged_critic", "on --terrain flat, which has no slopes"),
        (not args.cameras, "depth_scale freeze_encoder encoder_path", "with --no-cameras"),
        (not args.freeze_encoder, "encoder_path", "with --no-freeze-encoder, which trains an encoder from scratch"),
        (args.init_from, "encoder_path", "with --init-from, whose policy has its own encoder"),
        (args.init_from, "init_log_std", "with --init-from, whose policy has its own action noise"),
        (args.goal == "command", "drift_cost heading_cost", "with --goal command"),
        (args.gamma == 0, "gae_lambda", "with --gamma 0"),
        (args.vf_coef == 0, "clip_vloss", "with --vf-coef 0"),
        (args.update_epochs == 1 and schedules["lr"] != "kl", "target_kl", "with --update-epochs 1"),
        (args.update_epochs == 1 and args.minibatch_size == steps, "clip_coef clip_vloss clip_schedule clip_end",
         "in a single gradient step per iteration"),
        (args.eval_interval > args.total_timesteps, "eval_episodes", "with --eval-interval above --total-timesteps"),
        (not args.track, "wandb_project_name wandb_entity", "without --track"),
        (not args.cuda, "torch_deterministic", "without --cuda: the CPU's algorithms are deterministic"),
        (args.cuda, "torch_threads", "with --cuda, where the networks run on the GPU"),
        (size and size != args.num_processes, "num_processes", f"here, as torchrun starts {size} processes"),
        (not size and 0 < gpus < args.num_processes, "num_processes", f"above the number of GPUs, {gpus}"),
        (schedules["lr"] == "guide" and args.learning_rate > 0, "lr_schedule", "unless --learning-rate is -1"),
    ]  # fmt: skip
    for name, schedule in schedules.items():
        fixed, end = schedule not in ("linear", "cosine"), f"{name}_end"
        table += [
            (schedule and fixed, end, f"with --{name}-schedule {schedule}"),
            (schedule and not fixed and getattr(args, end, 0) == start[name], f"{name}_schedule",
             "where start and end are the same"),
        ]  # fmt: skip
    return {name: reason for holds, names, reason in reversed(table) if holds for name in names.split()
            if name in vars(args)}  # fmt: skip


def check(args: Any, world_size: int | None = None) -> float:
    """Exit with one line on the first flag that cannot be, before any work starts. Returns the memory it takes, GB."""
    try:
        typed(vars(args), type(args))
        checked_randomization(args.randomization, args.terrain)
    except (ValueError, OverflowError) as error:
        stop(error)
    for low, high, names in (
        (1, 1e12, "total_timesteps max_episode_steps num_envs num_steps update_epochs minibatch_size eval_interval "
         "eval_episodes final_eval_episodes hidden_size"),
        (1, 1000, "frame_skip num_processes torch_threads pi_layers vf_layers"),
        (0, 1000, "num_threads"),
        (0, 1e6, "save_interval"),
        (0, 1e18, "seed terrain_seed eval_terrain_seed"),
        (0, 1e6, "ent_coef vf_coef bound_coef weight_decay spin_cost drift_cost heading_cost wheel_damping "
         "log_std_lr_scale lr_end ent_end"),
        (1e-9, 1e6, "terrain_amplitude max_grad_norm target_kl clip_coef clip_end"),
        (0, 1, "gamma gae_lambda"),
        (-10, 10, "init_log_std depth_scale"),
    ):  # fmt: skip
        for name in set(names.split()) & vars(args).keys():
            if not low <= getattr(args, name) <= high:
                stop(f"--{name.replace('_', '-')} is {getattr(args, name)}: give {low:g} to {high:g}")
    world_size, size = world_size or args.num_processes, args.minibatch_size
    batch_size = args.num_envs * args.num_steps
    steps = batch_size * args.frame_skip
    divisors = (d for k in range(1, math.isqrt(min(batch_size, 10**12)) + 1) if batch_size % k == 0
                for d in (k, batch_size // k))  # fmt: skip
    for wrong, message in (
        (args.learning_rate != -1 and not 0 < args.learning_rate <= 1e6, f"--learning-rate is {args.learning_rate}: "
         "give -1 for the schedule, or a positive constant"),
        (getattr(args, "anneal_lr", False) and args.learning_rate < 0,
         "--anneal-lr needs a positive --learning-rate: -1 has its own"),
        (args.terrain != "flat" and args.terrain_seed == args.eval_terrain_seed,
         "--terrain-seed and --eval-terrain-seed are the same: evaluate on terrain not trained on"),
        (args.terrain_amplitude > 100, f"--terrain-amplitude is {args.terrain_amplitude}: give 100 m or less"),
        (batch_size % size, f"--minibatch-size is {size}, which does not divide --num-envs * --num-steps = "
         f"{batch_size}: {max(d for d in divisors if d <= size)} does"),
        (args.norm_adv and size == 1, "--norm-adv needs a --minibatch-size above 1"),
        (args.num_envs % world_size or size % world_size, f"{world_size} processes cannot share --num-envs "
         f"{args.num_envs} and --minibatch-size {size}: give multiples of {world_size}, or --num-processes 1"),
        (args.total_timesteps < steps, f"--total-timesteps is {args.total_timesteps}: give at least "
         f"--num-envs * --num-steps * --frame-skip = {steps}, one iteration"),
        (args.capture_video and not importlib.util.find_spec("ballbot_utils"),
         "--capture-video needs ballbot_utils/ beside this file"),
        (args.track and not importlib.util.find_spec("wandb"), "--track needs Weights & Biases: pip install wandb"),
        (args.cuda and not torch.cuda.is_available(), "--cuda: PyTorch finds no GPU here; leave the flag out"),
    ):  # fmt: skip
        if wrong:
            stop(message)
    return memory_needed(args, world_size)


def memory_needed(args: Any, world_size: int) -> float:
    """About how much memory a run takes on this machine, GB; exits with one line where there is less."""
    # Samples and a layer on all of them, environments, networks with gradients, moments and copies
    sample = 4 * (150 + 3 * args.hidden_size) + 2**15 * (not args.freeze_encoder)
    network = 24 * args.hidden_size * (120 + args.hidden_size * (args.pi_layers + args.vf_layers))
    memory = args.num_envs * (args.num_steps * sample + 2**16 + 2**11 * args.frame_skip) + world_size * (network + 3e8)
    memory *= int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) / world_size / 1e9
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if memory > there:
        stop(f"this takes about {memory:,.0f} GB of memory, and there are {there:,.0f}: give fewer "
             "--num-envs, --num-steps or --num-processes, or a smaller --hidden-size")  # fmt: skip
    return memory


# Files


def load_encoder(path: Path, like: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the pretrained depth encoder, a module `like` it, or exit with one line."""
    problem = "is not a depth encoder"
    try:
        state = unsealed(path)["encoder"]
        if not unlike(state, like.state_dict()):
            return state
    except Exception as error:
        problem = error if isinstance(error, ValueError) else problem
    stop(f"{path} {problem}: restore it, make it by python -m ballbot_utils.pretrain_encoder, or train one with "
         "--no-freeze-encoder")  # fmt: skip


def sealed(content: Any) -> bytes:
    """The bytes of a checkpoint: a file of `torch.save` that ends in the SHA-256 of all before it.

    Such a file is a ZIP archive, and the checksum, 64 letters, is its comment: `torch.load` reads it as any other.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()[:-2] + b"\x40\0"  # the comment's length
    return data + hashlib.sha256(data).hexdigest().encode()


def unsealed(path: Path) -> Any:
    """What `sealed` has made the bytes of a file of, plain data alone: no code in it is run.

    Raises ValueError, which says what is wrong with the file, or OSError where it cannot be read.
    """
    if not path.is_file():  # a pipe may have no end
        raise ValueError("is missing" if not path.exists() else "is no file")
    data = path.read_bytes()
    whole = hashlib.sha256(data[:-64]).hexdigest().encode() == data[-64:]
    bare = data[:2], data[-22:-18], data[-2:]  # as torch.save alone begins and ends, without a comment
    if not whole and bare != (b"PK", b"PK\5\6", b"\0\0"):
        raise ValueError("is damaged, or not a checkpoint: its checksum is not that of its content")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(record.file_size for record in archive.infolist()) > len(data):
                raise ValueError("it would grow as it is unpacked")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # many kinds
        raise ValueError("is damaged, or not a checkpoint, or holds code, which is never run") from None
    if not whole and is_first():
        print(f"note: {path} has no checksum, as in versions before: damage to it goes unseen", file=sys.stderr)
    return content


def save(path: Path, content: Any, keep_as: Path | None = None) -> None:
    """Write a checkpoint in one piece, what was there staying as the file `keep_as` if its disk has links.

    Exits with one line where the disk fails, which leaves what was there, as does the end of the process at any moment.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(sealed(content))
            file.flush()
            os.fsync(file.fileno())
        if keep_as and path.exists():
            keep_as.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.link(path, keep_as)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        stop(f"cannot write {path} ({error.strerror}): make room, then {going_on(path.parent)}", MachineFault)


def claim(folder: Path) -> int:
    """Make a folder, and keep it to this process until the file descriptor returned is closed.

    Raises BlockingIOError where another process has it. On a disk without locks nobody is kept out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor


def new_folder(args: Any, make: bool) -> Path:
    """The folder of a new run, which gets a name if it has none; exits with one line unless it can be one's own.

    Only one process is to `make` it.
    """
    if not args.run_name and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        stop("torchrun --max-restarts goes on with the run of a --run-name: give one")
    args.run_name = args.run_name or f"Ballbot-v0__{args.exp_name}__{args.seed}__{int(time.time())}_{os.getpid()}"
    folder, parts = Path("runs") / args.run_name, args.run_name.split("/")  # a study's runs lie in its folder
    if {"", ".", ".."} & set(parts) or parts[-1].endswith(".pt") or max(map(len, parts)) > 200:
        stop("--run-name or --exp-name is no name of a folder under runs/: give letters, digits, _ and -")
    try:
        if make:
            folder.mkdir(parents=True)
    except FileExistsError:
        stop(f"{folder} exists: give another --run-name, move it away, or --resume {folder}")
    except OSError as error:
        stop(f"{folder} cannot be made: {error.strerror}", MachineFault)
    return folder


def fitting(run: dict, kind: type, network: Callable) -> tuple[nn.Module, Any]:
    """The Agent, its weights loaded, and the Args, a `kind`, of a checkpoint's content; ValueError if they misfit.

    `network` makes an Agent of Args. Flags that the checkpoint lacks have their defaults, but for NEEDED ones.
    """
    model, settings = run["model"], run["args"]
    if "frame_skip" not in settings:
        raise ValueError("was trained on the robot before its rollers were mended, which spun up at speed: train anew")
    missing = [name for name in NEEDED if name not in settings]
    if missing:
        raise ValueError(f"has no {', '.join(missing)} in its args: it is of no version of this program")
    args = kind(**typed({name: settings[name] for name in vars(kind()) if name in settings}, kind))
    wrong = "size of the networks" * (max(args.hidden_size, 1000 * args.pi_layers, 1000 * args.vf_layers) > 10**6)
    with float32_by_default():
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            wrong = wrong or unlike(model, network(args).state_dict(), "model")
        if wrong:
            raise ValueError(f"is damaged or of another version: {wrong} is not as its flags imply")
        agent = network(args)
    agent.load_state_dict(dict(model))
    return agent, args


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """A block whose tensors are float32, whatever PyTorch's default is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def policy_in(path: Path, kind: type) -> Any:
    """The Policy in a checkpoint, or in the best.pt of a run's folder; exits with one line if there is none.

    Its classes are those of the script that trained it, or of the script of the Args `kind` if it names none.
    """
    path, advice = path / "best.pt" if path.is_dir() else path, ": give runs/<run name>, or a checkpoint in it"
    try:
        content = unsealed(path)
        script = script_for(content, path, kind=kind)
        return script.Policy(*fitting(content, script.Args, script.Agent))
    except ScriptError as error:
        problem, advice = error, ""
    except Exception as error:
        problem = error if isinstance(error, ValueError) else "holds no policy of this program"
    stop(f"{path} {problem}{advice}")


def load_run(path: Path, kind: type, network: Callable) -> dict:
    """The content of a checkpoint to go on from, or exit with one line."""
    other, offer = path.with_name("previous.pt" if path.name == "last.pt" else "last.pt"), ""
    try:
        offer = f"; {other} is there too: --resume {shlex.quote(str(other))}" if other.is_file() else ""
        script, run = script_of(kind), unsealed(path)
        if run.get("script", script["script"]) != script["script"]:
            offer = ""
            raise ValueError(f"was trained by {run['script']!r:.80}, not by {script['script']}: --resume it by that")
        _, args = fitting(run, kind, network)
        if "optimizer" not in run:
            raise ValueError("is a policy alone: --resume its run's folder, or give it to --init-from")
        run = script | run  # older checkpoints name none
        run["best"] = script | run["best"] if isinstance(run["best"], dict) else run["best"]
        if wrong := set(vars(args)) ^ set(run["args"]):
            offer = ""  # of the same program
            raise ValueError(f"is of another program or version: its flags differ in {', '.join(sorted(wrong))}")
        check(args)
        return run | {"args": vars(args)}
    except Exception as error:
        problem = error if isinstance(error, ValueError) else "is no checkpoint to go on from"
    stop(f"{path} {problem}{offer}")


def judged(agent: nn.Module) -> dict:
    """What a best.pt is like, of a policy like `agent`."""
    keys = [key + end for key in ("episodic_return", "episodic_length", "falls") for end in ("", "_std")]
    evaluation = {"episodes": 1} | dict.fromkeys(keys, 0.0)
    return dict(model=agent.state_dict(), args=..., global_step=1, eval=evaluation) | dict.fromkeys(SCRIPT_KEYS, "")


def best_of(run: dict, folder: Path, agent: nn.Module) -> dict | None:
    """The best policy so far of a `run` that goes on: its folder's best.pt, which the run's end may have chosen.

    Where that is missing, damaged or newer than the checkpoint, it is the one that the checkpoint knows.
    """
    with contextlib.suppress(OSError, ValueError):
        best, like = {key: run[key] for key in SCRIPT_KEYS} | unsealed(folder / "best.pt"), judged(agent)
        fits = not unlike(best, like) or not unlike(best, like | {"ended_at": 1})  # a run that has ended says where
        if fits and 0 < best["global_step"] <= run["global_step"]:
            return best
    return run["best"]


def misfit(run: dict, args: Any, agent: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """What in a checkpoint has other keys, types or shapes than a run by its args would save; "" if nothing."""
    n = args.num_envs // args.num_processes
    state = dict(envs=..., proprio=torch.zeros(n, agent.num_proprio), depth=torch.zeros(n, agent.num_depth),
                 rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state() if args.cuda else None)  # fmt: skip
    policy = {key: value for key, value in judged(agent).items() if key != "eval"}
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    moments = {i: dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p) for i, p in enumerate(parameters)}
    fresh, best, met = optimizer.state_dict(), run.get("best"), run.get("targets_met")
    wrong = unlike(run, policy | dict(
        optimizer=fresh | {"state": moments}, iteration=1, elapsed=0.0, startup=0.0, training=0.0,
        finished=[(0.0, 1), ...],
        best=None if best is None else judged(agent),
        targets_met=None if met is None else "", ranks=[state] * args.num_processes,
    ))  # fmt: skip
    if wrong:
        return wrong
    same, other = ([g | {"lr": 0.0} for g in o["param_groups"]] for o in (fresh, run["optimizer"]))
    steps = run["iteration"] * args.num_envs * args.num_steps * args.frame_skip
    good = same == other and 0 < (best or run)["global_step"] <= run["global_step"] == steps <= args.total_timesteps
    times = 0 <= run["startup"] and 0 <= run["training"] and run["startup"] + run["training"] <= run["elapsed"] < 1e9
    return "" if good and times else "its count of steps, time or optimizer"


def going_on(run_dir: Path) -> str:
    """What to do when a run has ended too soon."""
    program = f"python {shlex.quote(sys.argv[0])}" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    if (run_dir / "last.pt").is_file():
        return f"to go on: {program} --resume {shlex.quote(str(run_dir))}"
    return "start anew, under another --run-name: there is no checkpoint yet"


# Scripts


class ScriptError(Exception):
    """A checkpoint's script is missing or of no use."""


def describe_script(path: Path) -> dict[str, str]:
    """What a checkpoint says of the script that trained it: its name, and the SHA-256 of its text."""
    return dict(zip(SCRIPT_KEYS, (path.name, hashlib.sha256(path.read_bytes()).hexdigest())))


@functools.cache
def script_of(kind: type) -> dict[str, str]:
    """`describe_script` of the script that defines the Args `kind`, as it was at the first call."""
    try:
        return describe_script(Path(inspect.getfile(kind)))
    except (OSError, TypeError):  # not defined in a file
        return dict.fromkeys(SCRIPT_KEYS, "")


def find_script(name: Any) -> Path | None:
    """The file of a script that a checkpoint names, in the working directory or installed with this program, or None.

    A checkpoint can hold any name: none leads out of the working directory, not by a link either.
    """
    if not isinstance(name, str) or not name.endswith(".py") or not name[:-3].isidentifier():
        return None
    path = Path(name).resolve()
    if path.is_file() and path.is_relative_to(Path.cwd().resolve()):
        return path
    spec = importlib.util.find_spec(name[:-3]) if name in INSTALLED_SCRIPTS else None
    return Path(spec.origin) if spec else None


def import_script(path: Path) -> ModuleType:
    """The module of a script that defines Args, Agent and Policy; raises ScriptError if it cannot be imported."""
    path = path.resolve()
    modules = (m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get("__file__") == str(path))
    module = next(modules, None)
    if module is None:
        name = f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"  # unlike that of any other file
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # for modules beside it
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[spec.name]
            raise ScriptError(f"needs {path}, which cannot be imported: {type(error).__name__}: {error}") from None
    missing = [name for name in ("Args", "Agent", "Policy") if not hasattr(module, name)]
    if missing:
        raise ScriptError(f"needs a script with {' and '.join(missing)}, which {path} lacks")
    return module


def script_for(content: dict, path: Path, script: Path | None = None, kind: type | None = None) -> ModuleType:
    """The module with the classes of the checkpoint `content`, read from `path`; raises ScriptError if there is none.

    It is that of the file `script`, if given, else that of the script that trained it. Older checkpoints name none:
    they are taken as of the script that defines the Args `kind`, or of ppo_ballbot.py.
    """
    own = script_of(kind) if kind else {"script": "ppo_ballbot.py"}
    name = content.get("script", own["script"])
    if kind and not script and name == own["script"]:
        module = sys.modules[kind.__module__]
    else:
        found = script or find_script(name)
        if not found:
            raise ScriptError(f"was trained by {name!r:.80}, which is no script in the working directory: "
                              + ("put it there" if kind else "put it there, or give --script"))  # fmt: skip
        module, own = import_script(found), describe_script(found)
    warn_if_changed(content, path, own)
    return module


def warn_if_changed(content: dict, path: Path, script: dict[str, str]) -> None:
    """Warn with one line if the checkpoint `content`, read from `path`, was trained by another text than `script`'s."""
    if is_first() and content.get("script_sha256", script["script_sha256"]) != script["script_sha256"]:
        same = content.get("script") == script["script"]
        what = f"{script['script']} has changed since it trained" if same else f"{script['script']} did not train"
        print(f"warning: {what} {path}", file=sys.stderr)


def networks(script: ModuleType) -> dict[str, str]:
    """The code that computes a script's policies, by name: its classes except Args, and `proprioception`."""
    parts = [node for node in ast.parse(Path(script.__file__).read_bytes()).body if hasattr(node, "name")]
    parts = [node for node in parts if isinstance(node, ast.ClassDef) or node.name == "proprioception"]
    return {node.name: ast.dump(node) for node in parts if node.name != "Args"}


# A run


def begin(args: Any, started: float | None, kind: type, network: Callable) -> tuple[Path, dict | None, dict]:
    """What a run begins with: its folder, the checkpoint that it goes on from or None, and weights to start from.

    Settles its `args`, a `kind`, and checks all of them. `network` makes an Agent of Args. In the processes of a run
    that has `started`, nothing is made or said.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, as a rank was lost
    if restarted and not args.resume:
        folder = Path("runs") / args.run_name
        if not began(args, folder):
            stop(f"{folder} exists, and is of other flags: give another --run-name, or move it away")
        if (folder / "last.pt").is_file():
            args.resume = str(folder)
    run, weights, makes = None, {}, is_first() and started is None and not restarted
    script = script_of(kind)  # reads it before it can change
    if args.resume:
        path = Path(args.resume) if args.resume.endswith(".pt") else Path(args.resume) / "last.pt"
        run, run_dir = load_run(path, kind, network), path.parent
        given, before = args.total_timesteps, run["args"]["total_timesteps"]
        vars(args).update(run["args"] | {"resume": args.resume})
        if started is None:
            warn_if_changed(run, path, script)
        if given != kind.total_timesteps or hasattr(args, "total_is_given"):
            args.total_timesteps = given
            if given < before:
                stop(f"{path} is of a run of {before} steps: give more --total-timesteps, or none")
            if given > before and started is None:
                say(f"{before:,} steps become {given:,}: what is scheduled is stretched over all of them")
    size = min(args.num_processes, max(1, torch.cuda.device_count())) if args.cuda else args.num_processes
    size = int(os.environ.get("WORLD_SIZE", size))
    if args.capture_video and is_first():
        from ballbot_utils.watch import check_video

        check_video(Path("video.mp4"), "--capture-video")
    if run is None:
        memory = check(args, size)
        if args.init_from:
            policy = policy_in(Path(args.init_from), kind)
            weights, trained_by = policy.agent.state_dict(), policy.args
            theirs, ours = (sys.modules[defined.__module__] for defined in (type(policy), kind))
            if theirs is not ours and networks(theirs) != networks(ours):
                stop(f"--init-from {args.init_from} was trained by {Path(theirs.__file__).name}, whose networks differ "
                     "from this script's")  # fmt: skip
            differ = [name for name in NETWORK_FLAGS if getattr(args, name) != getattr(trained_by, name)
                      and name not in without_effect(args)]  # fmt: skip
            if differ:
                stop(f"--init-from {args.init_from}: give {', '.join(differ)} as it was trained with")
        elif args.cameras and args.freeze_encoder:
            like = network(args).encoder.to(memory_format=torch.contiguous_format)
            encoder = load_encoder(ASSETS.parent / args.encoder_path, like)
            weights = {f"encoder.{key}": value for key, value in encoder.items()}
        run_dir = new_folder(args, makes)
        if makes and memory > 2:
            say(f"this takes about {memory:.0f} GB of memory")
    elif size != args.num_processes:
        stop(f"{path} is of a run on {args.num_processes} processes, here are {size}: give it as many")
    args.num_processes = size
    return run_dir, run, weights


def as_config(flags: dict[str, Any]) -> str:
    """Flags, and what `script_of` returns, as the text of a run's config.json, which --config takes."""
    kept = {key: value for key, value in flags.items() if key not in ("run_name", "config", "resume")}
    return json.dumps(kept, indent=2) + "\n"


def began(args: Any, folder: Path) -> bool:
    """Whether a run's folder is of a run with these flags, empty or not there."""
    other = {"num_processes": 0} | dict.fromkeys(SCRIPT_KEYS, "")  # the number of ranks is torchrun's
    try:
        before, now = (folder / "config.json").read_text(), as_config(asdict(args))
        return json.loads(before) | other == json.loads(now) | other
    except (OSError, ValueError, TypeError):
        return not folder.exists() or not any(folder.iterdir())


def open_log(args: Any, run_dir: Path, run: dict | None) -> SummaryWriter:
    """The writer of TensorBoard's events, with Weights & Biases beside it where they are wanted.

    A run's flags go there and to config.json, which names the script too, again if it goes on for more steps.
    """
    flags = asdict(args)
    if args.track:
        import wandb

        name = args.run_name.replace("/", "__")  # a study's trials lie in its folder
        names = dict(project=args.wandb_project_name, entity=args.wandb_entity or None, name=name)
        wandb.init(**names, dir=run_dir, id=name, resume="allow", config=flags, sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=run["global_step"] + 1 if run else None)
    if run is None or run["args"]["total_timesteps"] != args.total_timesteps:
        part = run_dir / "config.json.part"
        part.write_text(as_config(flags | script_of(type(args))))
        os.replace(part, run_dir / "config.json")
        rows = "\n".join(f"|{key}|{value}|" for key, value in flags.items())
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + rows)
    return writer


def log_evaluation(run_dir: Path, kind: str, global_step: int, seconds: float, result: dict) -> None:
    """Add an evaluation to metrics.jsonl, in the first process.

    `kind`: "evaluation" on the way, "final" for the final policy, or "best" for the best policy, evaluated once more.
    """
    if is_first():
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "global_step": global_step, "seconds": seconds} | result) + "\n")


def read_metrics(run_dir: Path) -> list[dict]:
    """The evaluations in a run's metrics.jsonl; a line that is not (yet) whole is left out."""
    path, evaluations = run_dir / "metrics.jsonl", []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError):
            evaluations += [json.loads(line)] if line.endswith(b"\n") else []
    return evaluations


def trim_metrics(run_dir: Path, global_step: int) -> int:
    """Drop from metrics.jsonl what a run that goes on from `global_step` evaluates again.

    Returns the steps of the last evaluation until then, at the end of the run too, or 0.
    """
    before = [entry for entry in read_metrics(run_dir) if entry["global_step"] <= global_step]
    part = run_dir / "metrics.jsonl.part"
    part.write_text("".join(json.dumps(entry) + "\n" for entry in before if entry["kind"] == "evaluation"))
    os.replace(part, run_dir / "metrics.jsonl")
    return max((entry["global_step"] for entry in before if entry["kind"] != "best"), default=0)


def close_log(args: Any, writer: SummaryWriter) -> None:
    """End what `open_log` began."""
    writer.close()
    if args.track:
        sys.modules["wandb"].finish()


def film(policy: Any, run_dir: Path, global_step: int) -> None:
    """An episode on the evaluation terrain, as runs/<run name>/videos/<steps>.mp4."""
    from ballbot_utils import watch

    (run_dir / "videos").mkdir(exist_ok=True)
    flags = watch.Args(checkpoint=run_dir, video=run_dir / "videos" / f"{global_step}.mp4", overwrite=True)
    watch.video(watch.trained(policy), flags, watch.conditions(flags, policy.args, run_dir))


# Processes


INTERRUPTED = 130  # a rank's exit code, as a shell has it


def interrupt(*_, last=[-9.0]):  # noqa: B006
    """Raise KeyboardInterrupt, but not on a second signal within a second: it would only disturb the end."""
    before, last[0] = last[0], time.monotonic()
    if last[0] - before > 1:
        raise KeyboardInterrupt


def start_ranks(train: Callable, args: Any, started: float) -> None:
    """Start this machine's ranks as torchrun does, and wait for their end: each calls `train(args, started)`."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logging.getLogger(mp.spawn.__module__).setLevel(logging.ERROR)  # which ranks it ends is not for users
    resource_tracker.ensure_running()  # it would let SIGINT through
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # ranks hear of Ctrl-C once they can end by it
    ranks = mp.spawn(be_rank, (train, args, store.port, started), args.num_processes, join=False, daemon=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        while not ranks.join(grace_period=2):
            pass
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        code = getattr(error, "exit_code", 0)
        if code == INTERRUPTED:
            raise KeyboardInterrupt from None
        if code > 0:
            sys.exit(code)  # it has said why
        raise RuntimeError(str(error)) from None


@ranks_end_at_once()
@machine_faults_exit_75()
@closed_output_ends()
def be_rank(rank, train, args, port, started):
    """What the processes do that `start_ranks` starts."""
    escape_unprintable()
    # They are sent SIGINT when that process dies; nohup and & have it ignored
    signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    size = args.num_processes
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE=True)  # fmt: skip
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        train(args, started)
    except KeyboardInterrupt:  # of which the parent need not know
        sys.exit(INTERRUPTED)


@functools.cache
def own_cores() -> int:
    """The cores that are this rank's share of its machine's; from the first call on it stays on them.

    The threads that send its gradients then need not wait for a core that another rank computes on.
    """
    rank, size = (int(os.environ.get(f"LOCAL_{name}", default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else range(os.cpu_count())
    share = cores[rank * len(cores) // size : (rank + 1) * len(cores) // size]
    if size <= len(cores) and isinstance(cores, list):
        os.sched_setaffinity(0, share)
    return max(1, len(share))


def join_ranks(args: Any) -> None:
    """Meet the other ranks, if there are any."""
    if "RANK" in os.environ:
        own_cores()  # threads that start from here on stay there too
        # A restart has the store of before, with the addresses of ranks that are gone: its own are under another name
        store, number, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if args.cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=args.num_processes)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """A block that works in a run's folder, which no other process is to use meanwhile."""
    folder = None
    if is_first():
        # What TensorBoard's thread meets on the disk is raised here as well: it need not be shown twice
        threading.excepthook = lambda hook: issubclass(hook.exc_type, OSError) or threading.__excepthook__(hook)
        try:
            folder = claim(run_dir)
        except OSError as error:
            stop(f"{run_dir} is in use by another process, or cannot be used ({error.strerror})", MachineFault)
    try:
        yield
    except OSError as error:  # a disk or an output that is full, closed or gone
        stop(f"cannot write ({error}): mend that, then {going_on(run_dir)}", MachineFault)
    finally:
        if folder is not None:
            os.close(folder)  # another may go on with it


@ranks_end_at_once()
@machine_faults_exit_75()
@closed_output_ends()
def main(parse: Callable[[], Any], train: Callable) -> None:
    """A program that trains by its command line: `train(parse())`, and one line where that ends too soon."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # a closed output's number is not for the files of a run
        pass
    escape_unprintable()
    args, why = parse(), f"{CLEAR_LINE}stopped"
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        train(args)
        return
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except (RuntimeError, ConnectionError, MemoryError) as error:
        if any(word in repr(error) for word in ("MemoryError", "out of memory", "allocate memory")):
            why = "error: there is not enough memory"
        elif any(word in str(error) for word in ("gloo", "NCCL", "signal SIG")):  # which say that a rank is gone
            why = "error: a process of this run is gone"
        else:
            raise
    path = Path(args.resume or Path("runs") / args.run_name)
    advice = going_on(path.parent if path.suffix == ".pt" else path)
    raise MachineFault(f"{why}; {advice}" if is_first() else 0)
