# ruff: noqa: E402
"""Hostile input and failing disks: `python tests/hostile.py` makes some 1,700 attempts and counts how they end.

Each attempt runs in its own process, in an empty folder beside files that it must not touch. It must do its work, or
end with one line that says what is wrong. It fails by a traceback, a signal, a minute without a word, a second line, a
lost file, a file left behind, or by accepting what it should reject.
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
from dataclasses import asdict
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

SMALL = (
    "--frame-skip 1 --save-interval 0 --terrain flat --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32 "
    "--hidden-size 8 --total-timesteps 128 --eval-interval 64 --eval-episodes 1 --final-eval-episodes 1 "
    "--update-epochs 1 --num-threads 1"
).split()
NEW, RESUME, LAST = (*SMALL, "--run-name", "run", "--total-timesteps=1024"), ("--resume=runs/run",), "runs/run/last.pt"


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
    os.setsid()
    signal.alarm(60)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"../words/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr, code = open(1, "w", closefd=False), open(2, "w", closefd=False), 0
    try:
        act()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def snapshot():
    files = (path for path in Path("..").rglob("*") if path.is_file() and path.parent.name != "words")
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def run_attempt(name, act, expect="", prepare=lambda: None, after=lambda: None):
    """How an attempt ends: "refused", "done", "ended" (after a minute), or "FAILED: ..." with its last words."""
    with tempfile.TemporaryDirectory(prefix="hostile") as box:
        for folder in ("here", "words"):
            Path(box, folder).mkdir()
        os.chdir(Path(box, "here"))
        Path("../best.pt").write_text("keep")
        prepare()
        before, pid = snapshot(), os.fork()
        if pid == 0:
            run_child(act)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if code == -signal.SIGALRM and Path("../words/out").stat().st_size:
            return "ended"
        error, end, now = Path("../words/err").read_text(errors="replace"), "refused" if code else "done", snapshot()
        if expect != "refused":  # it may write here
            before, now = ({path: value[path] for path in value if path[:7] != "../here"} for value in (before, now))
        for failure, holds in {
            f"signal {-code}": code < 0 and "kill" not in name,
            "traceback": "Traceback" in error or "Exception ignored" in error,
            "not one line": code in (1, os.EX_TEMPFAIL) and error[:1] != "\u256d" and error.count("\n") != 1,
            f"{end}, not {expect}": expect not in ("", end),
            "files lost, changed or left": now != before,
        }.items():
            if holds:
                return f"FAILED: {failure}\n{error[-600:]}"
        after()
        return end


VALUES = [None, True, -1, 0, 2.5, float("nan"), float("inf"), 1e300, 1e-300, 10**20, -(10**20), "", "x", "..", "/etc",
          "a/../../b", "a" * 300, "\n", "\x1b[31m", "\udcff", [], ["1"], {"a": "x"}, "/dev/zero", "none", "here"]  # fmt: skip
HOPELESS = """--num-envs 100000000; --num-envs 1000003 --minibatch-size 999983; --num-steps 1000000000; --config fifo;
--norm-adv --minibatch-size 1; --hidden-size 12000; --pi-layers 1000000; --frame-skip 100000000; --config /dev/zero;
--init-log-std 1000; --total-timesteps 1e30; --num-processes 100000; --num-threads 1000000000; --run-name a/../../b;
--preset bold; --resume runs/none; --resume /dev/zero; --resume fifo; --resume .; --config .; --run-name ..;
--encoder-path /dev/zero --terrain perlin --cameras; --run-name /tmp/x; --run-name x.pt; --exp-name /../../x"""
TEXTS = ("", "[]", "null", "{", "[" * 10**5, '{"seed": ' + "9" * 5000 + "}", "\xff\0", '{"none": 1}', '{"gamma": NaN}')


def command_lines_and_configs(base):
    rng, write = random.Random(1), lambda text: partial(Path("c.json").write_text, text)
    for module in (ppo, schedules):
        for name in asdict(module.Args()):
            for value in rng.sample(VALUES, 6):
                flag, text = f"--{name.replace('_', '-')}={value}", json.dumps({name: value})
                yield flag[:60], partial(train, *SMALL, flag, module=module)
                yield "config " + text[:60], partial(train, "--config=c.json", *SMALL, module=module), "", write(text)
    for text in TEXTS:
        yield f"config {text[:60]!r}", partial(train, "--config=c.json"), "refused", write(text)
    for flags in HOPELESS.split(";"):
        given = () if "--resume" in flags else SMALL
        yield flags, partial(train, *given, *flags.split()), "refused", partial(os.mkfifo, "fifo")


def spoil(content, rng):
    """A copy of a checkpoint with something else in a random place, and the place."""
    content = value = copy.deepcopy(content)
    path = []
    while not path or (isinstance(value, (dict, list)) and value and rng.random() < 0.9):
        parent, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        path, value = [*path, key], parent[key]
    others = [None, -1, 10**400, float("nan"), "1", b"x", [], {}, [1], {"a": 1}, torch.zeros(2), True]
    if isinstance(value, torch.Tensor):
        x, zero = value.detach().float(), torch.zeros(())
        others += [x * torch.nan, x[None], x.double(), x.int(), zero.expand(10**6, 10**6), x.flatten()[:-1], x.tolist()]
        others += [zero.expand(x.shape), torch.zeros(3).to_sparse(), torch.nn.Parameter(x)]
    elif isinstance(value, dict):
        others += [value | {"more": 1}, dict(list(value.items())[1:])]
    number = rng.randrange(len(others))
    parent[key] = others[number]
    return content, f"{path} {number}"


def checkpoints(base, most=600):
    """Manipulated and damaged checkpoints, resumed and evaluated, and depth encoders."""
    rng, evaluation = random.Random(0), (evaluate, LAST, "--episodes=1", "--horizon=20", "--no-gap")
    encode = partial(train, *SMALL, "--cameras", "--terrain=perlin", "--run-name=other", f"--encoder-path=../../{LAST}")
    files = {base / "first.pt": partial(train, *RESUME), base / "best.pt": partial(program, *evaluation),
             ROOT / ppo.Args().encoder_path: encode}  # fmt: skip
    for i in range(most):
        file = list(files)[i % 3]
        content, place = spoil(read_checkpoint(file), rng)
        data = bytearray(file.read_bytes())
        at = (
            rng.randrange(len(data)) if rng.random() < 0.5 else len(data) - rng.randrange(1, 4000)
        )  # the ZIP's directory
        data[at : at + rng.choice([1, 1, 64, 10**9])] = rng.randbytes(rng.choice([1, 1, 0, 64]))

        def prepare(content=content, data=data, damage=i // 3 % 2):
            os.makedirs("runs/run")
            Path(LAST).write_bytes(data) if damage else save_checkpoint(Path(LAST), content)

        yield f"{file.name}, {at if i // 3 % 2 else place}", files[file], "", prepare


def disturbed(module, name, number, act, late, *flags):
    """Train, and act at a call of a function: before it, or after."""
    calls, function = iter(range(10**9)), getattr(module, name)

    def call(*args, **kwargs):
        now = next(calls) == number
        result = (now and not late and act()) or function(*args, **kwargs)
        return (now and late and act()) or result

    setattr(module, name, call)
    train(*flags)


DISTURBANCES = {
    "folder removed": lambda: shutil.rmtree("runs/run"),
    "all folders removed": lambda: shutil.rmtree("runs"),
    "folder moved": lambda: os.rename("runs/run", "moved"),
    "last.pt a folder": lambda: Path(LAST).unlink(missing_ok=True) or os.mkdir(LAST),
    "logs removed": lambda: [path.unlink() for path in Path("runs/run").glob("*e*s*")] and None,
    "a folder in the way": lambda: os.mkdir(LAST + ".part"),
    "SIGINT twice": lambda: os.kill(os.getpid(), signal.SIGINT) or os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def faults(base, most=80):
    def copy_run(disk=0):
        if disk and os.makedirs("runs") is None:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk}k", "tmpfs", "runs"], check=True)
        shutil.copytree(base, "runs/run")
        shutil.copy(base / "first.pt", LAST)  # it has steps left

    def loads(disk=0):
        try:
            runs.read_run(Path(LAST), ppo)
        finally:
            disk and subprocess.run(["umount", "-l", "runs"], check=True)

    def limited(size, *flags):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        train(*flags)

    def locked():
        fcntl.flock(os.open("runs/run", os.O_RDONLY), fcntl.LOCK_EX)
        train(*RESUME)

    rng, size = random.Random(3), (base / "last.pt").stat().st_size
    yield "folder in use", locked, "refused", copy_run, loads
    for i in range(most // 4):
        at, disk = rng.randrange(int(1.1 * size)), size // 1024 * 5 + 40 + rng.randrange(size // 1024)
        yield f"files of {at} bytes", partial(limited, at, *RESUME), "", copy_run, loads
        yield f"a new run's files of {at} bytes", partial(limited, at, *NEW)
        name, kill = ("replace", "fsync")[i % 2], partial(signal.raise_signal, signal.SIGKILL)
        act = partial(disturbed, os, name, i // 4, kill, i // 2 % 2, *RESUME)
        yield f"kill -9 at {name}, call {i // 4}", act, "", copy_run, loads
        if os.geteuid() == 0:
            yield f"disk of {disk} KB", partial(train, *RESUME), "", partial(copy_run, disk), partial(loads, disk)
    for name, act in DISTURBANCES.items():
        for number in (0, 2):
            disturb = partial(disturbed, ppo, "learning_rate_at", number, act, True)
            yield f"{name} at iteration {number}", partial(disturb, *RESUME), "", copy_run
            yield f"{name} at iteration {number} of a new run", partial(disturb, *NEW)
    yield "runs is a file", partial(train, *NEW), "refused", Path("runs").touch
    yield "runs leads nowhere", partial(train, *NEW), "refused", partial(os.symlink, "nowhere/at/all", "runs")
    yield "the run exists", partial(train, *NEW), "refused", partial(os.makedirs, "runs/run")


def environment(base, most=60):
    def step_wildly(seed):
        rng, terrain = np.random.default_rng(seed), ("flat", "perlin")[seed % 2]
        envs = gym.make_vec("Ballbot-v0", num_envs=3, terrain=terrain, cameras=seed % 3 == 0, num_threads=1)
        envs.reset(seed=seed)
        state, spoiling = envs.get_state(), random.Random(seed)
        for _ in range(150):
            with contextlib.suppress(ValueError):
                envs.set_state(spoil(state, spoiling)[0])
            envs.push(rng.normal(0, 10.0 ** rng.integers(0, 8), (3, 3)) * (rng.random() < 0.05))
            actions = rng.normal(0, 10.0 ** rng.integers(-2, 4), (3, 3)).astype(np.float32)
            actions[rng.random((3, 3)) < 0.01] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-40])
            obs, reward, *_ = envs.step(actions)
            assert all(space.contains(obs[key]) for key, space in envs.observation_space.items())
            assert np.isfinite(reward).all() and all(np.isfinite(value).all() for value in obs.values())

    for seed in range(most):
        yield f"seed {seed}", partial(step_wildly, seed), "done"


ENCODER_FLAGS = """--picture p.xyz --output e.pt; --picture no/p.png --output e.pt; --output e.bin; --output no/e.pt;
--output run/best.pt; --output e.pt --num-frames 1; --output e.pt --learning-rate inf; --output run"""
EVALUATE_FLAGS = """none; run run/none.pt; file; .; /dev/zero; run --episodes 0; run --horizon nan; run --push inf;
run --seed -1; run --obs-noise nan; run --terrain moon; run --wheel-damping inf; run --push-interval 0"""
OUTPUT_FLAGS = {evaluate: "run --episodes 1 --no-gap --json", diagnose: "run --json", watch: "run --video",
                plot: "run --output", benchmark: "--output"}  # fmt: skip


def programs(base):
    attempts = [(pretrain_encoder, flags) for flags in ENCODER_FLAGS.split(";")]
    attempts += [(evaluate, flags) for flags in EVALUATE_FLAGS.split(";")]
    for output in ("no/f.json", "run", "file/f.json", "f.txt", "run/best.pt", "/proc/f.json", "/dev/full", "a" * 300):
        for more in ("", "--overwrite"):
            attempts += [(module, f"{flags} {output} {more}") for module, flags in OUTPUT_FLAGS.items()]
    prepare = lambda: (shutil.copytree(base, "run"), Path("file").touch())  # noqa: E731
    for module, flags in attempts:
        yield f"{module.__name__} {flags}"[:90], partial(program, module, *flags.split()), "refused", prepare


REDIRECTED = ("NEW >&-", "NEW > /dev/full", "NEW | head -1", "--help | head -1", "--help > /dev/full", "--help >&- 2>&-",
              "NEW <&- >&- 2>&-", "NEW --num-processes 2 | head -1", "NEW --num-processes 2")  # fmt: skip


def shell(base, most=12):
    def shell(line, encoding="utf-8", interrupt_after=0):
        """A command as a user gives it to a shell, interrupted twice if it takes so many seconds."""
        command = f"exec {sys.executable} {ROOT / 'ppo_ballbot.py'} {line.replace('NEW', ' '.join(NEW))}"
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        process = subprocess.Popen(["bash", "-c", command], env=environment, start_new_session=True)
        print("started", flush=True)
        for pause in (interrupt_after, 0.02) if interrupt_after else ():
            time.sleep(pause)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        code = process.wait()
        sys.exit(0 if code == -signal.SIGINT else min(code, 1))  # a second Ctrl-C may end it without a word

    for line in REDIRECTED:
        yield line, partial(shell, line)
    for line in ("NEW", "--help"):
        yield f"{line}, ASCII only", partial(shell, line, "ascii")
    for i in range(most):
        line = f"NEW --total-timesteps 1000000 --num-processes {1 + i % 2}"
        yield f"Ctrl-C twice, {i}", partial(shell, line, interrupt_after=0.1 + i / most * 12)


def make_base():
    """A finished run to attack; first.pt is its checkpoint at an evaluation on the way."""
    evaluate, copy_last = ppo.evaluate, partial(shutil.copy, "runs/base/last.pt", "first.pt")
    ppo.evaluate = lambda *args: (Path("first.pt").exists() or copy_last()) and evaluate(*args)
    sys.argv = ["ppo_ballbot.py", *SMALL, "--run-name", "base", "--eval-interval=96"]
    ppo.main()
    os.rename("first.pt", "runs/base/first.pt")


def main(small, only):
    """Make all attempts, or a dozen of each kind, whose names contain `only`, in two processes; print how they end."""
    folder, failed = tempfile.mkdtemp(prefix="hostile"), False
    os.chdir(folder)
    subprocess.run([sys.executable, "-c", "import hostile; hostile.make_base()"], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})  # fmt: skip
    torch.set_num_threads(1)
    print("| kind | attempts | refused | done | ended | failed |\n" + "| --- " * 6 + "|")
    for kind in (command_lines_and_configs, checkpoints, faults, environment, programs, shell)[: 5 if small else 6]:
        todo = [attempt for attempt in kind(Path(folder, "runs/base")) if only in f"{kind.__name__}: {attempt[0]}"]
        todo, counts = random.Random(5).sample(todo, min(12, len(todo))) if small else todo, Counter()
        for attempt in todo:
            try:
                end = run_attempt(*attempt)
            except Exception:
                end = f"FAILED: afterwards\n{traceback.format_exc()}"
            if end.startswith("FAILED"):
                print(f"{kind.__name__}: {attempt[0]}: {end}\n", flush=True)
            counts[end.split(":")[0].lower()] += 1
            os.chdir("/")
        row = [kind.__name__, len(todo), *(counts[end] for end in ("refused", "done", "ended", "failed"))]
        print("|", " | ".join(map(str, row)), "|", flush=True)
        failed = failed or counts["failed"] > 0
    shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    words = sys.argv[1:]
    main("--small" in words, " ".join(word for word in words if word != "--small"))
