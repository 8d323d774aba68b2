"""Hostile input and failing disks: `python tests/hostile.py` makes some 1,500 attempts and counts how they end.

Each must do its work, or end with one line that says what is wrong. It fails by a traceback, a signal, a minute without
a word, a second line, a lost or additional file, or by accepting what it should reject. Words select attempts by name.
"""

import contextlib
import copy
import fcntl
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import conftest  # noqa: F401  it adds the scripts to the path
import gymnasium as gym
import numpy as np
import torch

import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils import evaluate, runs
from ballbot_utils.checkpoints import read_checkpoint, save_checkpoint

SMALL = """--frame-skip 1 --save-interval 0 --terrain flat --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32
--hidden-size 8 --total-timesteps 128 --eval-interval 96 --eval-episodes 1 --final-eval-episodes 1""".split()
NEW, RESUME = [*SMALL, "--run-name=run", "--total-timesteps=1024"], ["--resume=runs/run", "--total-timesteps=384"]
LAST, ROOT = "runs/run/last.pt", Path(__file__).resolve().parents[1]
ENDS, SCRIPT = ("refused", "done", "ended", "failed"), ROOT / "ppo_ballbot.py"


def run(module, *flags):
    sys.argv = [f"{module.__name__}.py", *flags]
    (module.cli if hasattr(module, "cli") else module.main)()


def run_attempt(name, act, expect="", prepare=lambda: None, check=lambda: True):
    """How an attempt ends: it is "refused", "done", "ended" after a minute, or "failed", which is printed."""

    def act_in_child():
        os.setsid(), signal.alarm(60)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"../words/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
        act()

    with tempfile.TemporaryDirectory(prefix="hostile") as box:
        os.makedirs(f"{box}/words"), os.makedirs(f"{box}/here"), os.chdir(f"{box}/here"), Path("../best.pt").touch()
        prepare()
        snapshot = lambda: {path: path.stat().st_mtime_ns for path in Path().rglob("*.*")}  # noqa: E731
        before, child, valid = snapshot(), multiprocessing.get_context("fork").Process(target=act_in_child), False
        child.start(), child.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(SystemExit):
            valid = check()
        code, end = child.exitcode, "refused" if child.exitcode else "done"
        lines = Path("../words/err").read_text(errors="replace").strip().splitlines()
        error = "\n".join(line for line in lines if line[:1] != "[")  # without progress
        if code == -signal.SIGALRM and Path("../words/out").stat().st_size:
            return "ended"
        failed = [failure for failure, holds in {
            f"signal {-code}": code < 0 and "kill" not in name,
            "traceback": "Traceback" in error or "Exception ignored" in error,
            "not one line": code in (1, os.EX_TEMPFAIL) and error[:1] != "\u256d" and (not error or "\n" in error),
            f"{end}, not {expect}": expect not in ("", end),
            "files left or changed": expect == "refused" and snapshot() != before,
            "wrote elsewhere": {*os.listdir("..")} != {"best.pt", "here", "words"} or os.stat("../best.pt").st_size,
            "the run cannot be resumed": not valid,
        }.items() if holds]  # fmt: skip
        print(f"{name}: {failed}\n{error[-600:]}\n" if failed else "", end="", flush=True)
        return "failed" if failed else end


VALUES = [None, True, -1, 0, 2.5, np.nan, np.inf, 1e300, 1e-300, 10**20, "", "x", "..", "/etc", "a/../../b", "a" * 300,
          "\n", "\x1b[31m", "\udcff", [], ["1"], {"a": "x"}, "/dev/zero", "none", "here"]  # fmt: skip
HOPELESS = """--num-envs 100000000; --num-envs 1000003 --minibatch-size 999983; --num-steps 1000000000; --config fifo;
--norm-adv --minibatch-size 1; --hidden-size 12000; --pi-layers 1000000; --frame-skip 100000000; --config /dev/zero;
--init-log-std 1000; --total-timesteps 1e30; --num-processes 100000; --num-threads 1000000000; --run-name a/../../b;
--preset bold; --resume runs/none; --resume /dev/zero; --resume fifo; --resume .; --config .; --run-name ..;
--encoder-path /dev/zero --terrain perlin --cameras; --run-name /tmp/x; --run-name x.pt; --exp-name /../../x"""
TEXTS = ("", "[]", "null", "{", "[" * 10**5, '{"seed": ' + "9" * 5000 + "}", "\xff\0", '{"none": 1}', '{"gamma": NaN}')
FLAGS = """pretrain_encoder --picture p.xyz --output e.pt; pretrain_encoder --picture no/p.png --output e.pt;
pretrain_encoder --output e.pt --num-frames 1; evaluate none; evaluate run run/none.pt; evaluate file; evaluate .;
evaluate /dev/zero; evaluate run --episodes 0; evaluate run --horizon nan; evaluate run --push inf;
pretrain_encoder --output run/best.pt; evaluate run --obs-noise nan; evaluate run --terrain moon"""
OUTPUT_FLAGS = ("evaluate run --episodes 1 --no-gap --json", "diagnose run --json", "watch run --video",
                "plot run --output", "benchmark --output")  # fmt: skip
LINES = ("NEW >&-", "NEW > /dev/full", "NEW | head -1", "--help | head -1", "--help > /dev/full",
         "NEW", "NEW <&- >&- 2>&-", "NEW --num-processes 2 | head -1", "NEW --num-processes 2", "--help")  # fmt: skip


def command_lines_and_config_files(base):
    rng, write = random.Random(1), lambda text: partial(Path("c.json").write_text, text)
    for module, name in ((script, name) for script in (ppo, schedules) for name in vars(script.Args())):
        for value in rng.sample(VALUES, 5):
            yield f"--{name}={value}"[:60], partial(run, module, *SMALL, f"--{name}={value}")
            text = json.dumps({name: value})
            yield "config " + text[:60], partial(run, module, "--config=c.json", *SMALL), "", write(text)
    for text in TEXTS:
        yield f"config {text[:60]!r}", partial(run, ppo, "--config=c.json"), "refused", write(text)
    for flags in HOPELESS.split(";"):
        more = [] if "--resume" in flags else SMALL
        yield flags, partial(run, ppo, *more, *flags.split()), "refused", partial(os.mkfifo, "fifo")


def spoil(content, rng):
    """A copy of a checkpoint with something else in a random place, and the place."""
    path, content = [], (value := copy.deepcopy(content))
    while not path or (isinstance(value, (dict, list)) and value and rng.random() < 0.9):
        parent, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        path, value = [*path, key], parent[key]
    others = [None, -1, 10**400, np.nan, "1", b"x", [], {}, [1], {"a": 1}, torch.zeros(2), True]
    if isinstance(value, torch.Tensor):
        x, zero = value.detach().float(), torch.zeros(())
        others += [x * torch.nan, x[None], x.double(), x.int(), zero.expand(10**6, 10**6), x.flatten()[:-1], x.tolist()]
        others += [zero.expand(x.shape), torch.zeros(3).to_sparse(), torch.nn.Parameter(x)]
    elif isinstance(value, dict):
        others += [value | {"more": 1}, dict(list(value.items())[1:])]
    parent[key] = rng.choice(others)
    return content, f"{path}: {parent[key]!r:.40}"


def checkpoints_and_encoders(base, number=450):
    """Manipulated checkpoints, and damaged ones: flipped bits, cuts, additions."""
    rng, evaluation = random.Random(0), [evaluate, LAST, "--episodes=1", "--horizon=20", "--no-gap"]
    encode = lambda: run(ppo, *SMALL, "--cameras", "--terrain=perlin", f"--encoder-path={Path(LAST).resolve()}")  # noqa: E731
    acts = [(base / "last.pt", partial(run, ppo, *RESUME)), (base / "best.pt", partial(run, *evaluation)),
            (ROOT / "assets/depth_encoder_small.pt", encode)]  # fmt: skip

    def write(data):
        os.makedirs("runs/run")
        Path(LAST).write_bytes(data) if isinstance(data, bytearray) else save_checkpoint(Path(LAST), data)

    for i in range(number):
        file, act = acts[i % 3]
        (data, name), damaged = spoil(read_checkpoint(file), rng), bytearray(file.read_bytes())
        if i // 3 % 2:
            at = rng.choice([rng.randrange(len(damaged)), len(damaged) - rng.randrange(1, 4000)])  # or the directory
            damaged[at : at + rng.choice([1, 1, 64, 10**9])] = rng.randbytes(rng.choice([1, 1, 0, 64]))
            data, name = damaged, f"damaged at {at}"
        yield f"{file.name}, {name}", act, "", partial(write, data)


def full_disks_kills_and_disturbances(base, number=20):
    def disturbed(module, name, number, act, *flags):
        """Train, and act before a call of a function."""
        calls, function = iter(range(10**9)), getattr(module, name)
        setattr(module, name, lambda *args: (next(calls) == number and act()) or function(*args))
        run(ppo, *flags)

    copy_run, loads = partial(shutil.copytree, base, "runs/run"), partial(runs.read_run, Path(LAST), ppo)
    limit, kill = partial(resource.setrlimit, resource.RLIMIT_FSIZE), partial(signal.raise_signal, signal.SIGKILL)
    locked = lambda: fcntl.flock(os.open("runs/run", os.O_RDONLY), fcntl.LOCK_EX) or run(ppo, *RESUME)  # noqa: E731
    yield "folder in use", locked, "refused", copy_run, loads
    for i in range(number):
        size, name = int(1.1 * (base / "last.pt").stat().st_size * (i + 1) / number), ("replace", "fsync")[i % 2]
        yield f"files of {size} bytes", lambda size=size: limit((size, -1)) or run(ppo, *RESUME), "", copy_run, loads
        yield f"a new run's files of {size} bytes", lambda size=size: limit((size, -1)) or run(ppo, *NEW)
        act = partial(disturbed, os, name, i // 2, kill, *RESUME)
        yield f"kill -9 before {name}, call {i // 2}", act, "", copy_run, loads
    disturbances = {
        "folder removed": lambda: shutil.rmtree("runs/run"),
        "folder moved": lambda: os.rename("runs/run", "moved"),
        "last.pt a folder": lambda: Path(LAST).unlink(missing_ok=True) or os.mkdir(LAST),
        "SIGINT twice": lambda: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT),
        "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    }
    for name, act in disturbances.items():
        for iteration in (0, 2):
            disturb = partial(disturbed, ppo, "learning_rate_at", iteration, act)
            yield f"{name} at iteration {iteration}", partial(disturb, *RESUME), "", copy_run
            yield f"{name} at iteration {iteration} of a new run", partial(disturb, *NEW)
    yield "runs is a file", partial(run, ppo, *NEW), "refused", lambda: Path("runs").touch()
    yield "runs leads nowhere", partial(run, ppo, *NEW), "refused", partial(os.symlink, "nowhere/at/all", "runs")
    yield "the run exists", partial(run, ppo, *NEW), "refused", partial(os.makedirs, "runs/run")


def environment(base, number=40):
    def step_wildly(seed):
        task = dict(terrain=("flat", "perlin")[seed % 2], cameras=seed % 3 == 0, num_threads=1)
        envs, rng, spoiling = gym.make_vec("Ballbot-v0", 3, **task), np.random.default_rng(seed), random.Random(seed)
        _, state = envs.reset(seed=seed), envs.get_state()
        for _ in range(100):
            with contextlib.suppress(ValueError):
                envs.set_state(spoil(state, spoiling)[0])
            envs.apply_force(rng.normal(0, 10.0 ** rng.integers(0, 8), (3, 3)) * (rng.random() < 0.05))
            actions = rng.normal(0, 10.0 ** rng.integers(-2, 4), (3, 3)).astype(np.float32)
            actions[rng.random((3, 3)) < 0.01] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-40])
            obs, reward, *_ = envs.step(actions)
            assert all(space.contains(obs[key]) for key, space in envs.observation_space.items())
            assert np.isfinite(reward).all() and all(np.isfinite(value).all() for value in obs.values())

    yield from ((f"seed {seed}", partial(step_wildly, seed), "done") for seed in range(number))


def programs(base):
    prepare = lambda: (shutil.copytree(base, "run"), Path("file").touch())  # noqa: E731
    outputs = ("no/f.json", "run", "file/f.json", "f.txt", "run/best.pt", "/proc/f.json", "/dev/full", "a" * 300)
    made = [f"{flags} {output} {more}" for flags in OUTPUT_FLAGS for output in outputs for more in ("", "--overwrite")]
    for line in [*FLAGS.split(";"), *made]:
        name, *flags = line.split()
        yield line[:90], partial(run, importlib.import_module(f"ballbot_utils.{name}"), *flags), "refused", prepare


def shell(base, number=12):
    def run_line(line, *pauses):
        """A command as a user gives it to an ASCII terminal, with Ctrl-C after each pause, s."""
        command = f"PYTHONIOENCODING=ascii exec {sys.executable} {SCRIPT} {line}".replace("NEW", " ".join(NEW))
        process = subprocess.Popen(["bash", "-c", command], start_new_session=True)
        print("started", flush=True)
        for pause in pauses:
            subprocess.run(f"sleep {pause}; kill -INT -{process.pid} 2>&-", shell=True)
        code = process.wait()
        sys.exit(0 if code == -signal.SIGINT else min(code, 1))  # a second Ctrl-C may end it without a word

    long = "NEW --total-timesteps 1000000 --num-processes"
    lines = [[line] for line in LINES] + [[f"{long} {1 + i % 2}", 0.1 + i, 0.02] for i in range(number)]
    yield from ((str(line), partial(run_line, *line)) for line in lines)


def main(small, only):
    """Make all attempts, or a dozen of most kinds, and print how they end."""
    kinds = (command_lines_and_config_files, checkpoints_and_encoders, full_disks_kills_and_disturbances, environment,
             programs, shell)  # fmt: skip
    torch.set_num_threads(1)
    failed = 0
    print("| kind | attempts |", " | ".join(ENDS), "|\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory(prefix="hostile") as folder:
        make = [sys.executable, SCRIPT, *SMALL, "--run-name=base"]  # a finished run to attack
        subprocess.run(make, check=True, capture_output=True, cwd=folder)
        for kind in kinds[: 5 if small else 6]:
            todo = [attempt for attempt in kind(Path(folder, "runs/base")) if only in f"{kind.__name__}: {attempt[0]}"]
            ends = [run_attempt(*attempt) for attempt in (random.Random(5).sample(todo, 12) if small else todo)]
            print("|", " | ".join(map(str, [kind.__name__, len(ends), *map(ends.count, ENDS)])), "|", flush=True)
            failed += ends.count("failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main("--small" in sys.argv, " ".join(word for word in sys.argv[1:] if word != "--small"))
