"""A run: its folder, lock, clock, logs and checkpoints. Nothing here knows which algorithm trains.

runs/NAME has config.json (the flags), TensorBoard's events, metrics.jsonl (each evaluation, one JSON object per line),
last.pt (the checkpoint to resume from) and best.pt (the best policy so far).
"""

import contextlib
import copy
import fcntl
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pydantic
import torch
from torch.utils.tensorboard import SummaryWriter

from ballbot_utils.checkpoints import (
    build_agent,
    describe_script,
    find_module,
    load_encoder,
    load_policy,
    read_checkpoint,
    replace_file,
    save_checkpoint,
)
from ballbot_utils.console import (
    MACHINE_FAULT,
    ProgressLine,
    check_argument,
    exit_with_error,
    is_rank_zero,
    one_line_errors,
    print_rank0,
)
from ballbot_utils.distributed import all_reduce_mean, gather_objects, must_spawn
from ballbot_utils.flags import (
    NonNegative,
    Seed,
    config_json,
    env_kwargs,
    ineffective_flags,
    pin_files,
    validate_args,
    validator,
)

TARGET_RETURN, TARGET_LENGTH = 100, 3000  # the guide's targets: means over 100 episodes
# Flags that must be the same for a policy and for the run that starts from it
NETWORK_FLAGS = ("cameras", "goal", "body_frame", "hidden_size", "pi_layers", "vf_layers", "norm_obs",
                 "privileged_critic", "depth_scale", "small_encoder")  # fmt: skip


@dataclass
class Record:
    """The progress of a run, which last.pt stores beside the policy and the script's own state."""

    global_step: Seed = 0
    elapsed: NonNegative = 0.0  # s from the launch; pauses between an interruption and its resume do not count
    startup: NonNegative = 0.0  # s, of `elapsed`
    training: NonNegative = 0.0  # s, of `elapsed`: without evaluations and checkpoints
    parts: dict[str, float] = field(default_factory=dict)  # s, where `elapsed` went
    finished: list[tuple[float, int]] = field(default_factory=list)  # (return, length) of the last episodes
    best: dict | None = None  # the best policy on the way, and its evaluation
    targets_met: str | None = None  # when, in words
    final: dict | None = None  # the last evaluation of a run that has finished


class Run:
    """The record of one training run, in each of its ranks; only rank 0 writes files.

    `checkpoint` is the content of the checkpoint to resume from, or None; `weights` are initial weights, by name.
    `open` locks the folder and opens the logs.
    """

    def __init__(self, args: Any, run_dir: Path, checkpoint: dict | None, weights: dict, started: float) -> None:
        self.args, self.dir, self.checkpoint, self.weights = args, run_dir, checkpoint, weights
        self.script, self.progress = describe_script(type(args)), ProgressLine()
        self.started = time.perf_counter() if checkpoint else started
        vars(self).update(vars(read_record(checkpoint or {})))
        self.finished = deque(self.finished, maxlen=100)
        self.last_evaluation, self.last_save = 0, time.perf_counter()  # its step, and a time
        self.last_part = self.started  # when the last one of `parts` ended

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """A block that trains. Rank 0 holds a lock of the folder and the logs; errors say how to resume the run."""
        with contextlib.ExitStack() as stack:
            try:
                if is_rank_zero() and not must_spawn(self.args):
                    lock = os.open(self.dir, os.O_RDONLY)
                    stack.callback(os.close, lock)
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.open_logs()
                    stack.push(self.close_logs)
                yield
            except BlockingIOError:
                exit_with_error(f"{self.dir} is in use by another process", MACHINE_FAULT)
            except (KeyboardInterrupt, OSError, RuntimeError, MemoryError) as error:
                error.add_note(resume_hint(self.dir))
                raise

    def close_logs(self, kind, error, traceback) -> None:
        """Close TensorBoard's log, and W&B's."""
        with contextlib.suppress(OSError):
            self.writer.close()
        if self.args.track:
            sys.modules["wandb"].finish(exit_code=int(error is not None))

    def open_logs(self) -> None:
        """Write config.json, drop evaluations that will be repeated, and open TensorBoard and Weights & Biases."""
        flags, resumed = asdict(self.args), self.checkpoint
        # TensorBoard's thread prints no error of a disk: `add_scalar` raises it again
        threading.excepthook = lambda hook: issubclass(hook.exc_type, OSError) or threading.__excepthook__(hook)
        if resumed:
            kept = [
                e for e in read_metrics(self.dir) if e["kind"] == "evaluation" and e["global_step"] <= self.global_step
            ]
            replace_file(self.dir / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept).encode())
            self.last_evaluation = max((entry["global_step"] for entry in kept), default=0)
        if self.args.track:
            import wandb

            name = self.args.run_name.replace("/", "__")
            names = dict(project=self.args.wandb_project_name, entity=self.args.wandb_entity or None, name=name)
            wandb.init(**names, dir=self.dir, id=name, resume="allow", config=flags, sync_tensorboard=True)
        self.writer = SummaryWriter(self.dir, purge_step=self.global_step + 1 if resumed else None)
        if not resumed or resumed["args"]["total_timesteps"] != self.args.total_timesteps:
            replace_file(self.dir / "config.json", config_json(flags | self.script).encode())
            rows = "\n".join(f"|{key}|{value}|" for key, value in flags.items())
            self.writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + rows)

    def clock(self) -> float:
        """Seconds from the launch, without pauses."""
        return self.elapsed + time.perf_counter() - self.started

    def add_part(self, name: str) -> None:
        """Count the time since the last part ended as spent on the part `name`."""
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.last_part
        self.last_part = now

    def show(self, steps: int, more: str = "") -> None:
        """Show the progress, so many steps into an iteration."""
        if not self.startup:
            self.startup = self.clock()
            self.add_part("start-up")
        if not (more or self.progress.is_terminal) or not self.progress.is_due():  # it is called for each action
            return
        steps += self.global_step
        seconds, result = max(self.clock() - self.startup, 1e-9), "no episode ended yet"
        if self.finished:
            result = "return {:.1f}, length {:.0f}".format(*np.mean(self.finished, 0))
        text = f"{steps:,} steps, {steps / seconds:,.0f} SPS, {result}{more}"
        self.progress.show(steps, self.args.total_timesteps, seconds, text)

    def log_iteration(self, steps: int, seconds: dict[str, float], episodes: list, scalars: dict[str, float]) -> None:
        """Log an iteration of so many steps: its `seconds` by part, and `scalars` by their tag.

        `episodes` lists (return, length, action) of the episodes that ended on this rank.
        """
        episodes = sorted((episode for each in gather_objects(episodes) for episode in each), key=lambda e: e[2])
        start, self.global_step = self.global_step, self.global_step + steps
        spent = sum(seconds.values())
        losses = {key: value for key, value in scalars.items() if key.endswith(("_loss", "grad_norm"))}
        if not all(map(np.isfinite, losses.values())):
            saved = f"; {self.dir}/last.pt is an earlier policy" if (self.dir / "last.pt").is_file() else ""
            exit_with_error(f"losses are not finite after step {start}: lower --learning-rate or --max-grad-norm"
                            f"{saved} ({losses})")  # fmt: skip
        self.training += spent
        for name, part in seconds.items():
            self.parts[name] = self.parts.get(name, 0.0) + part
        self.last_part += spent
        self.finished.extend(episode[:2] for episode in episodes)
        if not is_rank_zero():
            return
        for episodic_return, length, action in episodes:
            at = start + (action + 1) * self.args.num_envs * self.args.frame_skip
            self.writer.add_scalar("charts/episodic_return", episodic_return, at)
            self.writer.add_scalar("charts/episodic_length", length, at)
        for key, mean in zip(("return", "length"), np.mean(self.finished, 0) if self.finished else ()):
            scalars = scalars | {f"charts/episodic_{key}_mean100": mean}
        speeds = {"charts/SPS": self.global_step / (self.clock() - self.startup),
                  "SPS/train": self.global_step / self.training}  # fmt: skip
        speeds |= {f"SPS/{name}": steps / part for name, part in seconds.items() if part}
        for key, value in (scalars | speeds).items():
            self.writer.add_scalar(key, value, self.global_step)
        shares = "/".join(f"{100 * part / spent:.0f}" for part in seconds.values())
        level = f", level {scalars['charts/level']:.1f}" if "charts/level" in scalars else ""
        self.show(0, f"{level}, {'/'.join(seconds)} {shares} %")
        self.add_part("log")

    def describe_policy(self, agent: torch.nn.Module) -> dict[str, Any]:
        """What a checkpoint stores of a policy; the weights are those of `agent`, not a copy."""
        return dict(model=agent.state_dict(), args=asdict(self.args), global_step=self.global_step, **self.script)

    def log_evaluation(self, agent: torch.nn.Module, result: dict) -> None:
        """Log an evaluation of the current policy. The policy is saved as best.pt if its return is the highest."""
        self.write_evaluation("evaluation", f"evaluation at {self.global_step:,} steps", self.global_step, result)
        if self.targets_met is None and all(meets_targets(result)):
            seconds = int(self.clock())
            self.targets_met = f"{self.global_step:,} steps, {seconds // 60} min {seconds % 60:02} s"
            print_rank0(f"targets met after {self.targets_met}")
        if self.best is None or result["episodic_return"] > self.best["eval"]["episodic_return"]:
            self.best = copy.deepcopy(self.describe_policy(agent) | {"eval": result})
            self.save("best.pt", self.best)
        self.add_part("evaluate")

    def finish(self, agent: torch.nn.Module, evaluate: Callable[[], dict]) -> None:
        """Evaluate the final policy; again the best one on the way, if that returned more. The better is best.pt.

        `evaluate` evaluates `agent`, whose weights may be those of the best policy afterwards.
        """
        best, end = copy.deepcopy(self.describe_policy(agent)) | {"eval": evaluate()}, self.global_step
        self.write_evaluation("final", "final policy", end, best["eval"])
        returned = best["eval"]["episodic_return"]
        if self.best is not None and self.best["global_step"] < end and self.best["eval"]["episodic_return"] > returned:
            agent.load_state_dict(self.best["model"])
            other, step = self.best | {"eval": evaluate()}, self.best["global_step"]
            self.write_evaluation("best", f"policy of {step:,} steps, the best one on the way", step, other["eval"])
            best = max(best, other, key=lambda policy: policy["eval"]["episodic_return"])
        self.save("best.pt", best)
        self.add_part("final evaluation")
        if is_rank_zero():
            ended = dict(best=best, final=best["eval"], elapsed=self.clock(), parts=self.parts)
            self.save("last.pt", read_checkpoint(self.dir / "last.pt") | ended)
        shares = ", ".join(f"{name} {part / self.clock():.0%}" for name, part in self.parts.items())
        print_rank0(f"{self.clock():.0f} s from the launch, {end / self.clock():,.0f} steps/s: {shares}")
        targets = zip((f"return > {TARGET_RETURN}", f"length > {TARGET_LENGTH}"), meets_targets(best["eval"]))
        text = ", ".join(f"{target} {'reached' if met else 'missed'}" for target, met in targets)
        text += f" ({self.dir}/best.pt)" + (f"; first met after {self.targets_met}" if self.targets_met else "")
        print_rank0(f"targets, mean over {best['eval']['episodes']} episodes on unseen terrain: {text}")

    def write_evaluation(self, kind: str, title: str, step: int, result: dict) -> None:
        """Print an evaluation of the policy of a `step`; append it to metrics.jsonl and TensorBoard's events.

        `kind`: "evaluation" on the way, "final" of the last policy, or "best" of the best one again.
        """
        print_rank0(f"{title}: {format_evaluation(result)}")
        if is_rank_zero():
            with open(self.dir / "metrics.jsonl", "a") as file:
                entry = {"kind": kind, "global_step": step, "seconds": self.clock()} | result
                file.write(json.dumps(entry) + "\n")
            for key in ("episodic_return", "episodic_length", "falls") if step > self.last_evaluation else ():
                self.writer.add_scalar(f"eval/{key}", result[key], step)
        self.last_evaluation = max(step, self.last_evaluation)

    def save_is_due(self) -> bool:
        """Whether `--save-interval` seconds have passed, by the clock of any rank."""
        now = time.perf_counter()
        due = all_reduce_mean(torch.tensor(float(now > self.last_save + self.args.save_interval))).item() > 0
        self.last_save = now if due else self.last_save
        return due

    def save(self, name: str, content: dict) -> None:
        """Write a checkpoint to the run's folder."""
        if is_rank_zero():
            save_checkpoint(self.dir / name, content)

    def save_last(self, agent: torch.nn.Module, state: dict) -> None:
        """Save last.pt: the policy, the script's `state` to resume from, and this record. All ranks call it."""
        record = {f.name: getattr(self, f.name) for f in fields(Record)}
        record |= dict(elapsed=self.clock(), finished=list(self.finished), final=None)
        self.save("last.pt", self.describe_policy(agent) | state | record)
        if is_rank_zero():
            self.writer.flush()
        self.add_part("save")


def meets_targets(result: dict) -> tuple[bool, bool]:
    """Whether an evaluation meets the guide's targets: for the return, for the length."""
    return result["episodic_return"] > TARGET_RETURN, result["episodic_length"] > TARGET_LENGTH


def format_evaluation(result: dict) -> str:
    """An evaluation in words."""
    return ("return {episodic_return:.1f} ± {episodic_return_std:.1f}, length {episodic_length:.0f} ± "
            "{episodic_length_std:.0f}, falls {falls:.0%} ({episodes} episodes)").format(**result)  # fmt: skip


def read_record(content: dict) -> Record:
    """The record in a checkpoint; raises ValueError on wrong types."""
    record = {f.name: content[f.name] for f in fields(Record) if f.name in content}
    return validator(Record).validate_python(record, strict=False)


def read_metrics(run_dir: Path) -> list[dict]:
    """The evaluations in a run's metrics.jsonl; an incomplete last line is left out."""
    path, evaluations = run_dir / "metrics.jsonl", []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError):
            evaluations += [json.loads(line)] if line.endswith(b"\n") else []
    return evaluations


def resume_hint(run_dir: Path) -> str:
    """What to do after a run was interrupted."""
    program = f"python {shlex.quote(sys.argv[0])}" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    if (run_dir / "last.pt").is_file():
        return f"to resume: {program} --resume {shlex.quote(str(run_dir))}"
    return "there is no checkpoint yet: start again with another --run-name"


def prepare_run(args: Any, started: float, in_rank: bool) -> Run:
    """Validate all flags, then create the run's folder, or read the checkpoint to resume from.

    Completes `args`. A process that starts ranks calls it, and then each of them, `in_rank`, which creates and prints
    nothing. Exits with one line on invalid flags or files.
    """
    module, cls = sys.modules[type(args).__module__], type(args)
    pin_files(args)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after it lost a rank
    if restarted and not args.resume:
        folder = Path("runs") / args.run_name
        check_argument(is_same_run(args, folder), f"{folder} has other flags: give another --run-name, or move it away")
        args.resume = str(folder) if (folder / "last.pt").is_file() else ""
    checkpoint, weights, size = None, {}, args.num_processes
    if args.resume:
        path = Path(args.resume) if args.resume.endswith(".pt") else Path(args.resume) / "last.pt"
        run_dir, checkpoint = path.parent, read_run(path, module)
        given, before = args.total_timesteps, checkpoint["args"]["total_timesteps"]
        extended = getattr(args, "total_timesteps_given", given != cls.total_timesteps)
        vars(args).update(checkpoint["args"] | {"resume": args.resume})
        if extended and given != before:
            check_argument(given > before, f"{path} is of a run of {before} steps: give more --total-timesteps")
            args.total_timesteps, checkpoint["final"] = given, None
            if not in_rank:
                print_rank0(f"{before:,} steps become {given:,}: schedules are stretched over all of them")
        size = args.num_processes
    if args.cuda:
        size = min(size, max(1, torch.cuda.device_count()))
    size = int(os.environ.get("WORLD_SIZE", size))
    check_argument(not checkpoint or size == args.num_processes, f"{args.resume} is of a run on {args.num_processes} "
                   f"processes, here are {size}: use the same number")  # fmt: skip
    validate_args(args, size)
    if checkpoint:
        return Run(args, run_dir, checkpoint, weights, started)
    if args.capture_video and is_rank_zero() and not in_rank:
        check_video()
    if args.init_from:
        policy, content = load_policy(Path(args.init_from), module=module)
        names = [name for name in NETWORK_FLAGS if name not in ineffective_flags(args)]
        different = [n for n in names if getattr(args, n, None) != getattr(policy.args, n, None)]
        ours, theirs = ({"camera_size": 64, "height_scan": False} | env_kwargs(a) for a in (args, policy.args))
        different = ", ".join(different + [n for n in ("camera_size", "height_scan") if ours[n] != theirs[n]])
        check_argument(not different, f"--init-from {args.init_from}: use the same {different} as in its training")
        if content.get("script", "") not in ("", describe_script(cls)["script"]) and not in_rank:
            print_rank0(f"warning: {content['script']} trained {args.init_from}: its networks must be the same as here")
        weights = policy.agent.state_dict()
    elif args.cameras and args.freeze_encoder:
        weights = load_encoder(args.encoder_path, module.Agent(args))
    run_dir = new_folder(args, create=is_rank_zero() and not in_rank and not restarted)
    args.num_processes = size
    return Run(args, run_dir, None, weights, started)


def check_video() -> None:
    """Exit with one line if no video can be recorded."""
    try:
        import moviepy  # noqa: F401

        with contextlib.closing(gym.make("Ballbot-v0", terrain="flat", cameras=False, render_mode="rgb_array")) as env:
            env.reset()
            env.render()
    except (ImportError, RuntimeError) as error:
        exit_with_error(f"--capture-video: {error}")


def read_run(path: Path, module: ModuleType) -> dict:
    """The content of a checkpoint to resume from, or exit with one line."""
    try:
        content = read_checkpoint(path)
        script = describe_script(module.Args)["script"]
        if content.get("script", script) != script:
            raise ValueError(f"was trained by {content['script']!r:.80}, not by {script}: use that to --resume it")
        find_module(content, path, None, module)  # warns if the script has changed
        read_record(content)
        for policy in (content, content.get("best")):
            policy and build_agent(policy, module)
        for result in (content.get("final"), (content.get("best") or {"eval": None})["eval"]):
            result and format_evaluation(result)
        if "optimizer" not in content:
            raise ValueError("is only a policy: --resume its run's folder, or use --init-from")
        flags = set(vars(module.Args())) ^ set(content["args"])
        if flags:
            raise ValueError(f"is of another program or version: its flags differ in {', '.join(sorted(flags))}")
        return content
    except (pydantic.ValidationError, KeyError, TypeError, AttributeError, IndexError):
        problem = "is no checkpoint to resume from"
    except (ValueError, OSError) as error:
        problem = getattr(error, "strerror", None) or error
    exit_with_error(f"{path} {problem}")


def is_same_run(args: Any, folder: Path) -> bool:
    """Whether a folder is of a run with these flags, empty or missing."""
    ignored = {"num_processes": 0, "script": "", "script_sha256": ""}  # the number of ranks is torchrun's
    try:
        before, now = (folder / "config.json").read_text(), config_json(asdict(args))
        return json.loads(before) | ignored == json.loads(now) | ignored
    except (OSError, ValueError, TypeError):
        return not folder.exists() or not any(folder.iterdir())


def new_folder(args: Any, create: bool) -> Path:
    """The folder of a new run, which gets a name if it has none; exits with one line if it exists."""
    if not args.run_name and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        exit_with_error("torchrun --max-restarts resumes a run by its --run-name: give one")
    args.run_name = args.run_name or f"Ballbot-v0__{args.exp_name}__{args.seed}__{int(time.time())}_{os.getpid()}"
    folder, parts = Path("runs") / args.run_name, args.run_name.split("/")  # a study's runs are in its folder
    if {"", ".", ".."} & set(parts) or parts[-1].endswith(".pt") or max(map(len, parts)) > 200:
        exit_with_error("--run-name or --exp-name is no name of a folder under runs/: give letters, digits, _ and -")
    try:
        if create:
            folder.mkdir(parents=True)
    except FileExistsError:
        exit_with_error(f"{folder} exists: give another --run-name, move it away, or --resume {folder}")
    except OSError as error:
        exit_with_error(f"{folder} cannot be created: {error.strerror}", MACHINE_FAULT)
    return folder


@one_line_errors()
def run_training(parse_args: Callable[[], Any], train: Callable) -> None:
    """The main function of a script: `train(parse_args())`. Ctrl-C and SIGTERM end it with a hint how to resume."""

    def interrupt(number, _):
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once
        raise KeyboardInterrupt

    args = parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # nohup and & ignore it
        signal.signal(signal.SIGINT, interrupt)
    train(args)
