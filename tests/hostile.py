# ruff: noqa: E402
"""What hostile input and failing disks do: `python tests/hostile.py` makes some 2,500 attempts and counts how they end.

Each attempt runs in a process of its own, in an empty folder beside a file that it has no business with. It must do its
work, or end with one line that says what is wrong. It fails by a traceback, a signal, ten seconds without a word, a
second line, a file lost, left behind or changed elsewhere, or by taking what it should have refused.
"""

import contextlib
import copy
import fcntl
import inspect
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
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import gymnasium as gym
import numpy as np
import torch
import tyro

import ballbot_env
import ballbot_runs
import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils import benchmark, common, diagnose, evaluate, plot, pretrain_encoder, watch
from ballbot_utils.model import ASSETS
from ballbot_utils.terrain import perlin_terrain

SMALL = (
    "--frame-skip 1 --save-interval 0 --terrain flat --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32 "
    "--hidden-size 8 --total-timesteps 128 --eval-interval 64 --eval-episodes 1 --final-eval-episodes 1 "
    "--update-epochs 1 --num-threads 1"
).split()
WORDLESS, LONGEST = 10, 60  # s: of computing before the first word, and until an attempt is cut short


@dataclass
class Attempt:
    kind: str
    name: str
    act: Callable  # what the process does, in the folder "here"
    expect: str = ""  # "refused", "done", or either
    prepare: Callable = None  # before, in the same folder
    lines: int = 1  # on stderr, at most
    after: Callable = field(default=lambda: None)  # raises AssertionError on what is not as it should be


# How an attempt is made


def script(module, *flags):
    """Train, but for the evaluations, which only take time."""
    figures = [(key + end, 1.0) for key in ("episodic_return", "episodic_length", "falls") for end in ("", "_std")]
    module.evaluate = lambda agent, args, episodes: {"episodes": episodes} | dict(figures)
    sys.argv = [f"{module.__name__}.py", *flags]
    return module.main()


def tool(module, *flags):
    sys.argv = [module.__name__, *flags]
    main = module.pretrain if module is pretrain_encoder else module.main
    main(tyro.cli(module.Args))


def child(attempt, out):
    """Do it, in a forked process, as the interpreter would."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    code = 0
    try:
        attempt.act()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout and sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def seconds(pid):
    """What a process has computed; others may keep it waiting."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def snapshot(folder):
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def outcome(attempt):
    """How an attempt ends: "refused", "done", "cut short", or "FAILED: ..." with what it said."""
    with tempfile.TemporaryDirectory(prefix="hostile") as box:
        box = Path(box)
        here, canary = box / "here", box / "best.pt"
        here.mkdir()
        canary.write_text("not to be touched")
        os.chdir(here)
        if attempt.prepare:
            attempt.prepare()
        before, started = snapshot(here), time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            child(attempt, box)
        out, err, late = box / "out", box / "err", ""
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(0.005)
            spoke = out.exists() and out.stat().st_size > 0
            if time.monotonic() - started > LONGEST or (not spoke and seconds(pid) > WORDLESS):
                late = "cut short" if spoke else "no word"
                os.killpg(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
                break
        code, said = os.waitstatus_to_exitcode(ended[1]), err.read_text(errors="replace")
        failure = ""
        errors = [line for line in said.strip().splitlines() if line]
        ends = "done" if code == 0 else "refused"
        if late == "cut short":
            ends = late
        elif late:
            failure = late
        elif code < 0 and not attempt.name.startswith("killed"):
            failure = f"signal {-code}"
        elif "Traceback" in said or "Exception ignored" in said:
            failure = "traceback"
        elif code in (1, os.EX_TEMPFAIL) and len(errors) > attempt.lines and not said.startswith("\u256d"):
            failure = "several lines"
        elif code in (1, os.EX_TEMPFAIL) and not errors:
            failure = "no reason"
        elif attempt.expect and ends != attempt.expect:
            failure = f"{ends}, not {attempt.expect}"
        elif ends == "refused" and attempt.expect == "refused" and snapshot(here) != before:
            failure = "files left or changed"
        elif canary.read_text() != "not to be touched" or {p.name for p in box.iterdir()} - {
            "here", "out", "err", "best.pt", "moved"
        }:  # fmt: skip
            failure = "wrote elsewhere"
        else:
            try:
                attempt.after()
            except Exception as error:
                failure = f"afterwards: {error}"
        os.chdir("/")
        return f"FAILED: {failure}\n{said.strip()[-600:]}" if failure else ends


# Command lines and config files

NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e300", "-1e300", "1e-300", "99999999999999999999", "2.5", "x", "")
WORDS = ("..", "/etc", "a/../../b", "a" * 300, "", "\n", "a\x1b[31m", "-x", "\udcff", "a" * 100 + "/" + "b" * 300)

HOPELESS = f"""
--num-envs 100000000
--num-envs 1000003 --minibatch-size 999983
--num-envs 100000000 --num-steps 1 --minibatch-size 99999999
--num-steps 1000000000
--minibatch-size 99999999999
--norm-adv --minibatch-size 1
--hidden-size 12000
--hidden-size 1000000000
--pi-layers 1000000
--frame-skip 100000000
--total-timesteps 1e30
--seed 18446744073709551616
--terrain-amplitude 1e300
--wheel-damping inf
--init-log-std 1000
--init-log-std -1000
--learning-rate 1e300
--num-processes 100000
--num-threads 1000000000
--torch-threads 1000000000
--preset bold
--resume runs/none
--resume /dev/zero
--resume fifo
--resume .
--resume {"a" * 300}
--config fifo
--config /dev/zero
--config .
--encoder-path /dev/zero --terrain perlin --cameras
--run-name ..
--run-name a/../../b
--run-name /tmp/x
--run-name x.pt
--exp-name /../../x
"""


def command_lines(base):
    for module in (ppo, schedules):
        for f in fields(module.Args):
            flag = "--" + f.name.replace("_", "-")
            if module is schedules and f.name in {g.name for g in fields(ppo.Args)}:
                continue
            if f.type is bool:
                values = ("", "=maybe", "=") if f.name != "cuda" else ("",)
            else:
                values = NUMBERS if f.type in (int, float) else WORDS
            for value in values:
                flags = [flag + value] if f.type is bool else [flag, value]
                yield Attempt(
                    "command line", f"{module.__name__} {flag} {value!r:.30}", partial(script, module, *SMALL, *flags)
                )
    for flags in HOPELESS.strip().splitlines():
        words = flags.split()
        given = [] if words[0] == "--resume" else SMALL
        yield Attempt(
            "command line", flags[:60], partial(script, ppo, *given, *words), "refused", lambda: os.mkfifo("fifo")
        )


def config_files(base):
    settings = json.loads((base / "config.json").read_text())

    def trial(name, text, expect="refused"):
        data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        return Attempt(
            "config file",
            name,
            partial(script, ppo, "--config", "c.json"),
            expect,
            lambda: Path("c.json").write_bytes(data),
        )

    for name, value in settings.items():
        others = [None, [value], {"a": value}, "false", "1", []]
        others += [2.9, True] if type(value) is int else [1, 0] if isinstance(value, bool) else [True]
        others += [1] if isinstance(value, str) else []
        for other in others:
            if type(other) is not type(value):
                yield trial(f"{name}: {other!r}", json.dumps(settings | {name: other}))
    nines = "9" * 5000
    texts = ("", "[]", "null", "1", "{", '{"seed": 1', "[" * 100_000, f'{{"seed": {nines}}}', b"\xff\xfe", b"\0")
    texts += ('{"none": 1}', '{"seed": NaN}', '{"gamma": Infinity}', '{"preset": "bold"}', '{"terrain": "moon"}')
    texts += ('{"run_name": ".."}', '{"resume": "runs/x"}', f'{{"learning_rate": {nines[:400]}}}', '"' * 9)
    for text in texts:
        yield trial(f"{text!r:.30}", text)
    yield trial("as it was", json.dumps(settings), "done")


# Checkpoints that were tampered with, and damaged ones


def places(tree, path=()):
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    tree = copy.copy(tree)
    if isinstance(tree, tuple):
        return tuple(replaced(v, path[1:], value) if i == path[0] else v for i, v in enumerate(tree))
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def spoilt(value):
    """By name, what cannot stand in a value's place."""
    if isinstance(value, torch.Tensor):
        yield "longer", torch.zeros(value.numel() + 1)
        yield "another shape", value.reshape(1, *value.shape).clone()
        yield (
            "expanded",
            torch.zeros((), dtype=value.dtype).expand((*value.shape[:-1], value.shape[-1] + 1) if value.ndim else (3,)),
        )
        if value.numel() > 1:
            yield "one number expanded", torch.zeros((), dtype=value.dtype).expand(value.shape)
        yield "another dtype", value.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
        if value.is_floating_point():
            yield "nan", torch.full_like(value, torch.nan)
            yield "inf", torch.full_like(value, torch.inf)
            yield "parameter", torch.nn.Parameter(value.clone())
        if value.ndim > 1 and min(value.shape) > 1:
            yield (
                "other strides",
                value.T.contiguous().T
                if value.ndim == 2
                else value.flip(0).transpose(0, 1).contiguous().transpose(0, 1),
            )
        yield "sparse", value.to_sparse() if value.ndim else torch.zeros(3).to_sparse()
        yield "huge", torch.zeros((), dtype=value.dtype).expand(10**6, 10**6)
        yield "list", value.flatten().tolist()[:5]
    elif isinstance(value, dict):
        yield "a list", list(value)
        yield "one more", value | {"more": 1}
        if value:
            yield "one less", dict(list(value.items())[1:])
    elif isinstance(value, (list, tuple)):
        yield "a dict", {}
        yield "a number", 1
    elif isinstance(value, bool):
        yield "a number", 1
    elif isinstance(value, int):
        yield "below all", -(10**30)
        yield "above all", 10**400
        yield "a word", "1"
    elif isinstance(value, float):
        yield "nan", float("nan")
        yield "a word", "1"
    elif isinstance(value, str):
        yield "bytes", b"x"
        yield "a number", 1
    yield "a tensor", torch.zeros(2, dtype=torch.uint8)
    if value is not None:
        yield "none", None


def tampered(base, most, seed):
    content = torch.load(base / "last.pt", weights_only=True)
    trials = []
    for path, value in places(content):
        if path == ("finished",) or path[-1:] == ("lr",):  # may be longer, and may be any number
            continue
        for name, other in spoilt(value):
            legal = path[:2] == ("best", "args") or (path in (("best",), ("targets_met",)) and other is None)
            if not legal:
                trials.append((path, name, other))
    random.Random(seed).shuffle(trials)
    for path, name, other in trials[:most]:
        spoiled = replaced(content, path, other)

        def prepare(spoiled=spoiled):
            shutil.copytree(base, "runs/run")
            Path("runs/run/last.pt").write_bytes(ballbot_runs.sealed(spoiled))

        yield Attempt(
            "checkpoint, resumed", f"{path} {name}", partial(script, ppo, "--resume", "runs/run"), "refused", prepare
        )


def tampered_policies(base, most, seed):
    content = torch.load(base / "best.pt", weights_only=True)
    trials = []
    for path, value in places(content):
        if path[:1] == ("model",) or path == ("args",) or (path[:1] == ("args",) and path[1] in ballbot_runs.NEEDED):
            trials += [(path, name, other) for name, other in spoilt(value) if path != ("args",) or name != "one more"]
    random.Random(seed).shuffle(trials)
    for path, name, other in trials[:most]:

        def prepare(path=path, other=other):
            Path("p.pt").write_bytes(ballbot_runs.sealed(replaced(content, path, other)))

        yield Attempt(
            "checkpoint, evaluated",
            f"{path} {name}",
            partial(tool, evaluate, "p.pt", "--episodes", "1", "--horizon", "20"),
            "refused",
            prepare,
        )


def damaged(base, most, seed):
    rng = random.Random(seed)
    loaders = {
        "last.pt": lambda path: ballbot_runs.load_run(path, ppo.Args, ppo.Agent),
        "best.pt": common.load,
        "depth_encoder.pt": lambda path: ballbot_runs.load_encoder(path, ppo.DepthEncoder()),
    }
    for i in range(most):
        name, load = list(loaders.items())[i % 3]
        good = ((ASSETS if "depth" in name else base) / name).read_bytes()
        ends = rng.random() < 0.2  # where the archive's directory and the checksum are
        at = rng.randrange(len(good) - 200, len(good)) if ends else rng.randrange(len(good))
        bad = bytearray(good)
        how = ("bit", "bit", "bit", "cut", "more", "zeros")[i // 3 % 6]
        if how == "bit":
            bad[at] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del bad[at:]
        elif how == "more":
            bad += rng.randbytes(rng.choice([1, 22, 64, 1000]))
        else:
            bad[at : at + 64] = bytes(64)
        if bad == good:
            bad[at] ^= 255
        yield Attempt(
            "bit flips and cuts",
            f"{name} {how} at {at}",
            partial(lambda load, name: load(Path(name)), load, name),
            "refused",
            partial(lambda name, bad: Path(name).write_bytes(bad), name, bytes(bad)),
        )


# Faults


def loads(run="runs/run"):
    """One of a run's checkpoints loads, the one that going on takes first."""
    for name in ("last.pt", "previous.pt"):
        with contextlib.suppress(ValueError, OSError):
            return ballbot_runs.unsealed(Path(run) / name)["iteration"]
    raise AssertionError("no checkpoint is left")


def with_run(base, damage=None):
    shutil.copytree(base, "runs/run")
    content = torch.load("runs/run/last.pt", weights_only=True)  # let it go on for longer
    for name in ("last.pt", "previous.pt"):
        content["args"]["total_timesteps"] = 2048
        Path("runs/run", name).write_bytes(ballbot_runs.sealed(content))
    if damage:
        Path("runs/run/last.pt").write_bytes(b"damaged")


def limited(size, *flags):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    script(ppo, *flags)


def at_iteration(number, act, *flags):
    """Run, and do something at the beginning of an iteration."""
    calls, rate = iter(range(10**6)), ppo.learning_rate_now

    def learning_rate_now(*args):
        if next(calls) == number:
            act()
        return rate(*args)

    ppo.learning_rate_now = learning_rate_now
    script(ppo, *flags)


def killed_at_call(name, number, *flags):
    """Run, and die like by kill -9 at the n-th call of a function of `os`, before or after it."""
    calls, function = iter(range(10**6)), getattr(os, name)

    def dies(*args, **kwargs):
        n = next(calls)
        if n == number // 2 and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if n == number // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, dies)
    script(ppo, *flags)


def tmpfs(size, base):
    """A run on a disk of so many KB."""
    Path("runs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", "runs"], check=True)
    with contextlib.suppress(OSError):
        with_run(base)


def locked(*flags):
    folder = os.open("runs/run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    script(ppo, *flags)


def faults(base, most, seed):
    rng = random.Random(seed)
    size = (base / "last.pt").stat().st_size
    resume, new = ("--resume", "runs/run"), (*SMALL, "--run-name", "run", "--total-timesteps", "1024")
    run = partial(with_run, base)
    yield Attempt("faults", "folder in use", partial(locked, *resume), "refused", run, after=loads)
    for i in range(most // 4):
        at = rng.randrange(int(1.1 * size))
        yield Attempt("faults", f"files of at most {at} bytes", partial(limited, at, *resume), prepare=run, after=loads)
        yield Attempt("faults", f"a new run's, {at} bytes", partial(limited, at, *new))
        damage = partial(with_run, base, True)
        yield Attempt(
            "faults",
            f"last.pt damaged, {at} bytes",
            partial(limited, at, "--resume", "runs/run/previous.pt"),
            prepare=damage,
            after=loads,
        )
    for i in range(most // 4):
        name = ("replace", "link", "fsync", "unlink")[i % 4]
        path = "runs/run/previous.pt" if i % 3 == 0 else "runs/run"
        yield Attempt(
            "faults",
            f"killed at os.{name}, call {i // 4 / 2}",
            partial(killed_at_call, name, i // 4, "--resume", path),
            prepare=partial(with_run, base, i % 3 == 0),
            after=loads,
        )

    def twice(number):
        for _ in range(3):
            os.kill(os.getpid(), number)

    acts = {
        "folder removed": lambda: shutil.rmtree("runs/run"),
        "all folders removed": lambda: shutil.rmtree("runs"),
        "folder moved": lambda: os.rename("runs/run", "moved"),
        "last.pt removed": lambda: Path("runs/run/last.pt").unlink(missing_ok=True),
        "last.pt a folder": lambda: (
            Path("runs/run/last.pt").unlink(missing_ok=True),
            Path("runs/run/last.pt").mkdir(),
        ),
        "log removed": lambda: [p.unlink() for p in Path("runs/run").glob("events*")],
        "a folder in the way": lambda: Path("runs/run/last.pt.part").mkdir(),
        "SIGINT": partial(twice, signal.SIGINT),
        "SIGTERM": partial(twice, signal.SIGTERM),
    }
    for name, act in acts.items():
        for number in (0, 2):
            for flags, prepare in ((resume, run), (new, None)):
                yield Attempt(
                    "faults",
                    f"{name} at iteration {number}",
                    partial(at_iteration, number, act, *flags),
                    prepare=prepare,
                )
    for name, prepare in {
        "runs is a file": lambda: Path("runs").write_text(""),
        "runs leads nowhere": lambda: os.symlink("nowhere/at/all", "runs"),
        "the run exists": lambda: os.makedirs("runs/run"),
    }.items():
        yield Attempt("faults", name, partial(script, ppo, *new), "refused", prepare)
    if os.geteuid() == 0:
        for i in range(most // 8):

            def after():
                try:
                    loads()
                finally:
                    subprocess.run(["umount", "-l", "runs"], check=True)

            full = size // 1024 * 3 + 40 + rng.randrange(size // 1024)
            yield Attempt(
                "faults",
                f"disk of {full} KB",
                partial(script, ppo, *resume),
                prepare=partial(tmpfs, full, base),
                after=after,
            )


# The environment


def environments(base, most, seed):
    def make(name, act):
        return Attempt("environment", name, act)

    def steps(seed):
        rng = np.random.default_rng(seed)
        envs = gym.make_vec(
            "Ballbot-v0",
            num_envs=3,
            terrain=("flat", "perlin")[seed % 2],
            cameras=seed % 3 == 0,
            num_threads=1,
            frame_skip=int(rng.integers(1, 5)),
        )
        envs.reset(seed=seed)
        special = [np.nan, np.inf, -np.inf, 3e38, -3e38, 0, 1e-40]
        for _ in range(150):
            actions = rng.normal(0, 10.0 ** rng.integers(-2, 4), (3, 3)).astype(np.float32)
            if rng.random() < 0.1:
                actions[rng.integers(3), rng.integers(3)] = rng.choice(special)
            if rng.random() < 0.02:
                with contextlib.suppress(ValueError):
                    envs.reset(options={"position": rng.uniform(-19, 19, 2), "tilt": rng.normal(0, 0.2, 2)})
            if rng.random() < 0.05:
                envs.apply_force(rng.normal(0, 10.0 ** rng.integers(0, 8), (3, 3)))
            obs, reward, *_ = envs.step(actions)
            assert all(np.isfinite(value).all() for value in obs.values()) and np.isfinite(reward).all()
            assert all(space.contains(obs[key]) for key, space in envs.observation_space.items())

    def states(seed):
        rng = random.Random(seed)
        envs = gym.make_vec("Ballbot-v0", num_envs=2, terrain="flat", num_threads=1)
        envs.reset(seed=0)
        good = envs.get_state()
        trials = [(p, o) for p, v in places(good) for _, o in spoilt(v)]
        for path, other in rng.sample(trials, min(20, len(trials))):
            try:
                envs.set_state(replaced(good, path, other))
            except ValueError:
                continue
            raise AssertionError(f"{path} was taken")
        for _ in range(5):  # of the right shape, and any content
            wild = dict(good)
            for key in ("physics", "_returns"):
                wild[key] = torch.randn_like(good[key]) * 10.0 ** rng.randrange(300)
            with contextlib.suppress(ValueError):
                envs.set_state(wild)
                for _ in range(20):
                    obs, reward, *_ = envs.step(np.zeros((2, 3)))
                    assert all(np.isfinite(value).all() for value in obs.values()) and np.isfinite(reward).all()

    def arguments(seed):
        rng = random.Random(seed)
        values = [None, -1, 0, 1e300, float("nan"), float("inf"), "x", [], (0, 0), True, 10**30, {}]
        names = list(inspect.signature(ballbot_env.BallbotVectorEnv).parameters)
        for _ in range(5):
            given = {"num_envs": 1, "terrain": "flat", rng.choice(names): rng.choice(values)}
            with contextlib.suppress(ValueError):
                ballbot_env.BallbotVectorEnv(**given)
            envs = ballbot_env.BallbotEnv("flat", cameras=False)
            with contextlib.suppress(ValueError, gym.error.ResetNeeded):
                envs.reset(
                    seed=0, options={rng.choice(["position", "tilt", "heading", "velocity", "x"]): rng.choice(values)}
                )
                envs.step(rng.choice([[0, 0, 0], [0, 0], 1.0, [[0, 0, 0]], [float("nan")] * 3]))

    for i in range(most):
        act = (steps, states, arguments)[i % 3]
        yield make(f"{act.__name__} {i}", partial(act, i))


# The programs beside it


NO_ENCODER = """
--picture p.xyz --output e.pt
--picture no/p.png --output e.pt
--output e.bin
--output no/e.pt
--output run/best.pt --overwrite
--output run/best.pt
--output e.pt --num-frames 1
--output e.pt --learning-rate inf
--output run
--output e.pt --picture run/best.pt --overwrite
"""
NO_EVALUATION = """
none
run run/none.pt
file
.
/dev/zero
run --episodes 0
run --horizon nan
run --push inf
run --seed -1
run --obs-noise nan
run --terrain moon
run --wheel-damping inf
run --terrain-amplitude inf --terrain perlin
run --push-interval 0"""


def tools(base):
    def copy_run():
        shutil.copytree(base, "run")
        Path("file").write_text("")

    def refuse(name, module, words):
        return Attempt("tools", f"{module.__name__} {name}", partial(tool, module, *words), "refused", copy_run)

    for output in (
        "no/f.json",
        "run",
        "file/f.json",
        "f.txt",
        "run/best.pt",
        "/proc/f.json",
        "a" * 300 + ".json",
        "/dev/full",
    ):
        for extra in ((), ("--overwrite",)):
            for module, words in (
                (evaluate, ("run", "--episodes", "1", "--horizon", "20", "--no-gap", "--json")),
                (diagnose, ("run", "--json")),
                (watch, ("run", "--video")),
                (plot, ("run", "--output")),
                (benchmark, ("--output",)),
            ):
                yield refuse(f"{output[:30]} {extra}", module, (*words, output, *extra))
    for flags in NO_ENCODER.strip().splitlines():
        yield refuse(flags, pretrain_encoder, flags.split())
    for flags in NO_EVALUATION.splitlines():
        yield refuse(flags, evaluate, flags.split())


# True command lines


def process(*flags, redirect="", environment=(), interrupt_after=None):
    """A command as a user gives it, through a shell; its stderr is the attempt's."""
    command = f"{sys.executable} {REPOSITORY / 'ppo_ballbot.py'} {' '.join(flags)} {redirect}"
    shell = subprocess.Popen(
        ["bash", "-c", f"set -m; {command}"], env=os.environ | dict(environment), start_new_session=True
    )
    print("started", flush=True)
    if interrupt_after is not None:
        time.sleep(interrupt_after)
        for _ in range(2):
            for pid in descendants(shell.pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGINT)
            time.sleep(0.02)
    code = shell.wait()
    sys.exit(0 if interrupt_after is not None and code == 128 + signal.SIGINT else min(code, 1))  # dies before it says


def descendants(pid):
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found += [int(path.name), *descendants(int(path.name))]
    return found


def processes(base, number):
    run = (*SMALL, "--run-name", "run")
    two = " & ".join([f"{sys.executable} {REPOSITORY / 'ppo_ballbot.py'} {' '.join(SMALL)}"] * 2) + " & wait"
    trials = [
        ("output closed", partial(process, *run, redirect=">&-")),
        ("output full", partial(process, *run, redirect="> /dev/full")),
        ("| head -1", partial(process, *run, redirect="| head -1")),
        ("--help | head -1", partial(process, "--help", redirect="| head -1")),
        ("--help > /dev/full", partial(process, "--help", redirect="> /dev/full")),
        ("ASCII only", partial(process, *run, environment={"PYTHONIOENCODING": "ascii"})),
        ("--help, ASCII only", partial(process, "--help", environment={"PYTHONIOENCODING": "ascii"})),
        ("all closed", partial(process, *run, redirect="<&- >&- 2>&-")),
        ("two processes, | head -1", partial(process, *run, "--num-processes 2", redirect="| head -1")),
        ("two processes", partial(process, *run, "--num-processes 2")),
        ("three at once", partial(process, *SMALL, redirect="& " + two)),
    ]
    for name, act in trials[:number]:
        yield Attempt("true command lines", name, act)
    for i in range(number):
        more = ("--num-processes", "2") if i % 2 else ()
        yield Attempt(
            "true command lines",
            f"Ctrl-C twice after {i / number * 6:.1f} s, {1 + i % 2} processes",
            partial(process, *run, "--total-timesteps 100000", *more, interrupt_after=0.1 + i / number * 6),
        )


KINDS = {
    "config file": config_files,
    "bit flips and cuts": partial(damaged, most=600, seed=2),
    "checkpoint, evaluated": partial(tampered_policies, most=150, seed=1),
    "tools": tools,
    "checkpoint, resumed": partial(tampered, most=300, seed=0),
    "command line": command_lines,
    "environment": partial(environments, most=60, seed=4),
    "faults": partial(faults, most=80, seed=3),
    "true command lines": partial(processes, number=12),
}
SMALL_PART = 12  # of each kind


def make_base():
    """A finished run to tamper with."""
    torch.set_num_threads(1)
    sys.argv = ["ppo_ballbot.py", *SMALL, "--run-name", "base"]
    with contextlib.redirect_stdout(None):
        ppo.train(ppo.parse())


def make(todo, file):
    """Make attempts, and write how each ends to a file."""
    for attempt in todo:
        try:
            end = outcome(attempt)
        except Exception:
            end = f"FAILED: this script\n{traceback.format_exc()}"
        print(json.dumps([attempt.kind, attempt.name, end]), file=file, flush=True)
        if end.startswith("FAILED"):
            print(f"{attempt.kind}: {attempt.name}: {end}\n", flush=True)


def forked(act):
    """The id of a process that does it; what is in memory here need not be made again there."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def main(small=False, shards=2, only=""):
    """Make the attempts whose kind and name have `only` in them: a dict of kinds to Counters of how they ended."""
    with tempfile.TemporaryDirectory(prefix="hostile") as folder:
        folder = Path(folder)
        os.chdir(folder)
        assert os.waitpid(forked(make_base), 0)[1] == 0  # it starts threads, which a fork would not copy
        torch.set_num_threads(1)
        perlin_terrain(0), perlin_terrain(1_000_000)
        todo = []
        for kind, list_attempts in KINDS.items():
            part = list(list_attempts(folder / "runs" / "base"))
            if small:
                part = random.Random(5).sample(part, 0 if kind == "true command lines" else SMALL_PART)
            todo += [attempt for attempt in part if only in f"{kind}: {attempt.name}"]
        before = snapshot(REPOSITORY / "assets")
        files = [open(folder / f"{shard}.jsonl", "w+") for shard in range(shards)]
        for pid in [forked(partial(make, todo[shard::shards], file)) for shard, file in enumerate(files)]:
            os.waitpid(pid, 0)
        counts = {}
        for file in files:
            file.seek(0)
            for kind, _, end in map(json.loads, file):
                counts.setdefault(kind, Counter())["failed" if end.startswith("FAILED") else end] += 1
        assert sum(sum(counter.values()) for counter in counts.values()) == len(todo)
        assert snapshot(REPOSITORY / "assets") == before
        os.chdir("/")
    return counts


def table(counts):
    ends = ("refused", "done", "cut short", "failed")
    rows = ["| kind | attempts | " + " | ".join(ends) + " |", "|" + " --- |" * (2 + len(ends))]
    for kind, counter in (counts | {"all": sum(counts.values(), Counter())}).items():
        rows.append(f"| {kind} | {sum(counter.values())} | " + " | ".join(str(counter[end]) for end in ends) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    words = sys.argv[1:]
    counts = main(small="--small" in words, only=" ".join(word for word in words if word != "--small"))
    print(table(counts))
    sys.exit(any(counter["failed"] for counter in counts.values()))
