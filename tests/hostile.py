# ruff: noqa: E402
"""Hostile input and failing disks: `python tests/hostile.py` makes some 1,500 attempts and counts how they end.

Each attempt runs in its own process, in an empty folder beside a file that it must not touch. It must do its work, or
end with one line that says what is wrong. It fails by a traceback, a signal, a minute without a word, a second line, a
lost or additional file, or by accepting what it should reject. Words after the command select attempts by their names.
"""

import contextlib
import copy
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gymnasium as gym
import numpy as np
import torch
import tyro

import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils import benchmark, diagnose, evaluate, plot, pretrain_encoder, runs, watch
from ballbot_utils.checkpoints import read_checkpoint, save_checkpoint

SMALL = """--frame-skip 1 --save-interval 0 --terrain flat --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32
--hidden-size 8 --total-timesteps 128 --eval-interval 96 --eval-episodes 1 --final-eval-episodes 1 --update-epochs 1
--num-threads 1""".split()
NEW, RESUME, LAST = [*SMALL, "--run-name=run", "--total-timesteps=1024"], ["--resume=runs/run"], "runs/run/last.pt"


def train(*flags, module=ppo):
    """Train, without the time that evaluations take."""
    values = {key + end: 1.0 for key in ("episodic_return", "episodic_length", "falls") for end in ("", "_std")}
    module.evaluate = lambda agent, args, episodes: {"episodes": episodes} | values
    sys.argv = [f"{module.__name__}.py", *flags]
    module.main()


def program(module, *flags):
    sys.argv = [module.__name__, *flags]
    (module.pretrain if module is pretrain_encoder else module.main)(tyro.cli(module.Args))


def run_child(act):
    """Act in a forked process that ends as the interpreter would."""
    os.setsid(), signal.alarm(60)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"../words/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr, code = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False), 0
    try:
        act()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def run_attempt(name, act, expect="", prepare=lambda: None, after=lambda: None):
    """How an attempt ends: "refused", "done", "ended" (after a minute), or "failed: ..." with its last words."""
    with tempfile.TemporaryDirectory(prefix="hostile") as box:
        os.mkdir(f"{box}/here"), os.mkdir(f"{box}/words"), Path(box, "best.pt").touch()
        os.chdir(f"{box}/here")
        prepare()
        snapshot = lambda: {path: path.stat().st_mtime_ns for path in Path().rglob("*.*")}  # noqa: E731
        before, pid = snapshot(), os.fork()
        if pid == 0:
            run_child(act)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        lines = Path("../words/err").read_text(errors="replace").strip().splitlines()
        error, end = "\n".join(line for line in lines if line[:1] != "["), "refused" if code else "done"  # no progress
        if code == -signal.SIGALRM and Path("../words/out").stat().st_size:
            return "ended"
        for failure, holds in {
            f"signal {-code}": code < 0 and "kill" not in name,
            "traceback": "Traceback" in error or "Exception ignored" in error,
            "not one line": code in (1, os.EX_TEMPFAIL) and error[:1] != "\u256d" and (not error or "\n" in error),
            f"{end}, not {expect}": expect not in ("", end),
            "files left or changed": expect == "refused" and snapshot() != before,
            "wrote elsewhere": {*os.listdir("..")} != {"best.pt", "here", "words"} or os.stat("../best.pt").st_size,
        }.items():
            if holds:
                return f"failed: {failure}\n{error[-600:]}"
        after()
        return end


VALUES = [None, True, -1, 0, 2.5, np.nan, np.inf, 1e300, 1e-300, 10**20, "", "x", "..", "/etc", "a/../../b", "a" * 300,
          "\n", "\x1b[31m", "\udcff", [], ["1"], {"a": "x"}, "/dev/zero", "none", "here"]  # fmt: skip
HOPELESS = """--num-envs 100000000; --num-envs 1000003 --minibatch-size 999983; --num-steps 1000000000; --config fifo;
--norm-adv --minibatch-size 1; --hidden-size 12000; --pi-layers 1000000; --frame-skip 100000000; --config /dev/zero;
--init-log-std 1000; --total-timesteps 1e30; --num-processes 100000; --num-threads 1000000000; --run-name a/../../b;
--preset bold; --resume runs/none; --resume /dev/zero; --resume fifo; --resume .; --config .; --run-name ..;
--encoder-path /dev/zero --terrain perlin --cameras; --run-name /tmp/x; --run-name x.pt; --exp-name /../../x"""
TEXTS = ("", "[]", "null", "{", "[" * 10**5, '{"seed": ' + "9" * 5000 + "}", "\xff\0", '{"none": 1}', '{"gamma": NaN}')


def command_lines_and_config_files(base):
    rng, write = random.Random(1), lambda text: partial(Path("c.json").write_text, text)
    names = [(script, name) for script in (ppo, schedules) for name in vars(script.Args())]
    for module, name in names:
        for value in rng.sample(VALUES, 5):
            flag, text = f"--{name.replace('_', '-')}={value}", json.dumps({name: value})
            yield flag[:60], partial(train, *SMALL, flag, module=module)
            yield "config " + text[:60], partial(train, "--config=c.json", *SMALL, module=module), "", write(text)
    for text in TEXTS:
        yield f"config {text[:60]!r}", partial(train, "--config=c.json"), "refused", write(text)
    for flags in HOPELESS.split(";"):
        words = flags.split() if "--resume" in flags else [*SMALL, *flags.split()]
        yield flags, partial(train, *words), "refused", partial(os.mkfifo, "fifo")


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
    encode = lambda: train(*SMALL, "--cameras", "--terrain=perlin", f"--encoder-path={Path(LAST).resolve()}")  # noqa: E731
    acts = [(base / "first.pt", partial(train, *RESUME)), (base / "best.pt", partial(program, *evaluation)),
            (ROOT / ppo.Args().encoder_path, encode)]  # fmt: skip

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


def disturbed(module, name, number, act, late, *flags):
    """Train, and act at a call of a function: before it, or after."""
    calls, function = iter(range(10**9)), getattr(module, name)

    def call(*args, **kwargs):
        now = next(calls) == number
        result = (now and not late and act()) or function(*args, **kwargs)
        return (now and late and act()) or result

    setattr(module, name, call)
    train(*flags)


def full_disks_kills_and_disturbances(base, number=20):
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    # A run with steps left; it must be possible to resume it afterwards
    copy_run = lambda: (shutil.copytree(base, "runs/run"), shutil.copy(base / "first.pt", LAST))  # noqa: E731
    kill, loads = partial(signal.raise_signal, signal.SIGKILL), lambda: runs.read_run(Path(LAST), ppo)
    locked = lambda: fcntl.flock(os.open("runs/run", os.O_RDONLY), fcntl.LOCK_EX) or train(*RESUME)  # noqa: E731
    yield "folder in use", locked, "refused", copy_run, loads
    for i in range(number):
        size, name = int(1.1 * (base / "last.pt").stat().st_size * i / number), ("replace", "fsync")[i % 2]
        yield f"files of {size} bytes", lambda size=size: limit((size, -1)) or train(*RESUME), "", copy_run, loads
        yield f"a new run's files of {size} bytes", lambda size=size: limit((size, -1)) or train(*NEW)
        act = partial(disturbed, os, name, i // 4, kill, i // 2 % 2, *RESUME)
        yield f"kill -9 at {name}, call {i // 4}", act, "", copy_run, loads
    disturbances = {
        "folder removed": lambda: shutil.rmtree("runs/run"),
        "folder moved": lambda: os.rename("runs/run", "moved"),
        "last.pt a folder": lambda: Path(LAST).unlink(missing_ok=True) or os.mkdir(LAST),
        "SIGINT twice": lambda: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT),
        "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    }
    for name, act in disturbances.items():
        for iteration in (0, 2):
            disturb = partial(disturbed, ppo, "learning_rate_at", iteration, act, True)
            yield f"{name} at iteration {iteration}", partial(disturb, *RESUME), "", copy_run
            yield f"{name} at iteration {iteration} of a new run", partial(disturb, *NEW)
    yield "runs is a file", partial(train, *NEW), "refused", lambda: Path("runs").touch()
    yield "runs leads nowhere", partial(train, *NEW), "refused", partial(os.symlink, "nowhere/at/all", "runs")
    yield "the run exists", partial(train, *NEW), "refused", partial(os.makedirs, "runs/run")


def environment(base, number=40):
    def step_wildly(seed):
        rng, terrain = np.random.default_rng(seed), ("flat", "perlin")[seed % 2]
        envs = gym.make_vec("Ballbot-v0", num_envs=3, terrain=terrain, cameras=seed % 3 == 0, num_threads=1)
        envs.reset(seed=seed)
        state, spoiling = envs.get_state(), random.Random(seed)
        for _ in range(100):
            with contextlib.suppress(ValueError):
                envs.set_state(spoil(state, spoiling)[0])
            envs.apply_force(rng.normal(0, 10.0 ** rng.integers(0, 8), (3, 3)) * (rng.random() < 0.05))
            actions = rng.normal(0, 10.0 ** rng.integers(-2, 4), (3, 3)).astype(np.float32)
            actions[rng.random((3, 3)) < 0.01] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-40])
            obs, reward, *_ = envs.step(actions)
            assert all(space.contains(obs[key]) for key, space in envs.observation_space.items())
            assert np.isfinite(reward).all() and all(np.isfinite(value).all() for value in obs.values())

    for seed in range(number):
        yield f"seed {seed}", partial(step_wildly, seed), "done"


FLAGS = """pretrain_encoder --picture p.xyz --output e.pt; pretrain_encoder --picture no/p.png --output e.pt;
pretrain_encoder --output e.pt --num-frames 1; evaluate none; evaluate run run/none.pt; evaluate file; evaluate .;
evaluate /dev/zero; evaluate run --episodes 0; evaluate run --horizon nan; evaluate run --push inf;
pretrain_encoder --output run/best.pt; evaluate run --obs-noise nan; evaluate run --terrain moon"""
OUTPUT_FLAGS = ("evaluate run --episodes 1 --no-gap --json", "diagnose run --json", "watch run --video",
                "plot run --output", "benchmark --output")  # fmt: skip


def programs(base):
    modules = {m.__name__.split(".")[-1]: m for m in (benchmark, diagnose, evaluate, plot, pretrain_encoder, watch)}
    outputs = ("no/f.json", "run", "file/f.json", "f.txt", "run/best.pt", "/proc/f.json", "/dev/full", "a" * 300)
    made = [f"{flags} {output} {more}" for flags in OUTPUT_FLAGS for output in outputs for more in ("", "--overwrite")]
    for line in [*FLAGS.split(";"), *made]:
        name, *flags = line.split()
        prepare = lambda: (shutil.copytree(base, "run"), Path("file").touch())  # noqa: E731
        yield line[:90], partial(program, modules[name], *flags), "refused", prepare


LINES = ("NEW >&-", "NEW > /dev/full", "NEW | head -1", "--help | head -1", "--help > /dev/full",
         "NEW", "NEW <&- >&- 2>&-", "NEW --num-processes 2 | head -1", "NEW --num-processes 2", "--help")  # fmt: skip


def shell(base, number=12):
    def run_line(line, interrupt_after=0):
        """A command as a user gives it to an ASCII terminal, interrupted twice if it takes so many seconds."""
        command = f"exec {sys.executable} {ROOT / 'ppo_ballbot.py'} {line.replace('NEW', ' '.join(NEW))}"
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        process = subprocess.Popen(["bash", "-c", command], env=environment, start_new_session=True)
        print("started", flush=True)
        for pause in (interrupt_after, 0.02) if interrupt_after else ():
            time.sleep(pause)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        code = process.wait()
        sys.exit(0 if code == -signal.SIGINT else min(code, 1))  # a second Ctrl-C may end it without a word

    yield from ((line, partial(run_line, line)) for line in LINES)
    for i in range(number):
        line = f"NEW --total-timesteps 1000000 --num-processes {1 + i % 2}"
        yield f"Ctrl-C twice, {i}", partial(run_line, line, 0.1 + i / number * 12)


def make_base():
    """A finished run to attack; first.pt is its checkpoint at the evaluation on the way."""
    evaluate, first = ppo.evaluate, Path("first.pt")
    ppo.evaluate = lambda *args: (first.exists() or shutil.copy("runs/base/last.pt", first)) and evaluate(*args)
    sys.argv = ["ppo_ballbot.py", *SMALL, "--run-name", "base"]
    ppo.main()
    first.rename("runs/base/first.pt")


def main(small, only):
    """Make all attempts, or a dozen of most kinds, and print how they end."""
    folder, failed = Path(tempfile.mkdtemp(prefix="hostile")), 0
    make = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import hostile; hostile.make_base()"
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True, cwd=folder)  # it starts threads
    torch.set_num_threads(1)
    print("| kind | attempts | refused | done | ended | failed |\n" + "| --- " * 6 + "|")
    kinds = (command_lines_and_config_files, checkpoints_and_encoders, full_disks_kills_and_disturbances, environment,
             programs, shell)  # fmt: skip
    for kind in kinds[: 5 if small else 6]:
        todo = [attempt for attempt in kind(folder / "runs/base") if only in f"{kind.__name__}: {attempt[0]}"]
        todo, counts = random.Random(5).sample(todo, 12) if small else todo, Counter()
        for attempt in todo:
            try:
                end = run_attempt(*attempt)
            except Exception:
                end = f"failed: afterwards\n{traceback.format_exc()}"
            if end.startswith("failed"):
                print(f"{kind.__name__}: {attempt[0]}: {end}\n", flush=True)
            counts[end.split(":")[0]] += 1
            os.chdir("/")
        failed += counts["failed"]
        row = [kind.__name__, len(todo), *(counts[end] for end in ("refused", "done", "ended", "failed"))]
        print("|", " | ".join(map(str, row)), "|", flush=True)
    shutil.rmtree(folder)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main("--small" in sys.argv, " ".join(word for word in sys.argv[1:] if word != "--small"))
