"""A killed and resumed run ends with the same weights as an uninterrupted one; damage gives one line."""

import fcntl
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils import checkpoints, plot, runs
from ballbot_utils.checkpoints import read_checkpoint, save_checkpoint
from ballbot_utils.flags import validate_args

SCRIPT = Path(ppo.__file__).resolve()
KILLS = int(os.environ.get("KILLS", 3))  # the project's claim is made with 20
ITERATIONS = max(20, 6 * KILLS)
FLAGS = (
    "--run-name run --frame-skip 1 --num-processes 2 --num-envs 4 --num-steps 64 --minibatch-size 64 "
    "--eval-interval 2560 --eval-episodes 2 --final-eval-episodes 2 --norm-obs --norm-adv "
    "--learning-rate 3e-4 --anneal-lr --save-interval 0 "
    f"--total-timesteps {256 * ITERATIONS}"
).split()


RESUME = f"python {SCRIPT} --resume runs/run"
SHORT = replace(
    ppo.Args(), frame_skip=1, num_threads=1, terrain="flat", cameras=False, num_envs=2, num_steps=64, minibatch_size=64,
    total_timesteps=256, final_eval_episodes=1, learning_rate=1e-3,
)  # fmt: skip


def command(*flags):
    return [sys.executable, str(SCRIPT), *flags]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(command(*FLAGS), cwd=folder, check=True, capture_output=True)
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("short"))
        return ppo.train(replace(SHORT, run_name="short")).resolve()


def assert_same_end(run, other):
    """Bit for bit the same policies, optimizer, environments and generators, and the same curves."""
    for file in ("last.pt", "best.pt"):
        a, b = (read_checkpoint(folder / file) for folder in (run, other))
        for name in ("elapsed", "startup", "training", "parts"):  # seconds by the clock
            a.pop(name, None), b.pop(name, None)
        assert_equal(a, b)
    a, b = ([entry | {"seconds": 0} for entry in runs.read_metrics(folder)] for folder in (run, other))
    assert a == b
    curves = [EventAccumulator(str(folder)).Reload().Scalars("losses/value_loss") for folder in (run, other)]
    assert [(e.step, e.value) for e in curves[0]] == [(e.step, e.value) for e in curves[1]]


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "resume":
                assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


def state_and_parent(pid):
    """A process's state, a letter (Z: ended, waited for by nobody yet; X: gone), and its parent, from /proc."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
        return state, int(parent)
    except OSError:
        return "X", 0


def ranks_of(pid, mark=b"spawn_main"):
    """Processes that `pid` started, but for helpers, in order: the ranks 0, 1, ..."""
    pids = sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    children = [child for child in pids if state_and_parent(child)[1] == pid]
    return [child for child in children if mark in Path(f"/proc/{child}/cmdline").read_bytes()]


def without_progress(error):
    return "".join(line for line in error.splitlines(keepends=True) if not line.startswith("["))


def until_next_checkpoint(process, run):
    def written():
        return (run / "last.pt").stat().st_mtime_ns if (run / "last.pt").exists() else 0

    before = written()
    while process.poll() is None and written() == before:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_any_process_killed_at_random_points_and_resumed(uninterrupted, tmp_path):
    """In turn the first process and its ranks: none outlives another, and the run resumes bit for bit."""
    rng = random.Random(0)
    run, flags, kills = tmp_path / "runs" / "run", FLAGS, 0
    while True:
        process = subprocess.Popen(command(*flags), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if kills < KILLS:
            # Wait for an iteration, so that every life gets somewhere, then a random time into the next ones
            until_next_checkpoint(process, run)
            time.sleep(rng.uniform(0, 0.5))
        ranks, killed = ranks_of(process.pid), None
        if kills < KILLS and process.poll() is None:
            assert len(ranks) == 2
            victim, killed = [process.pid, *ranks][kills % 3], time.time()
            os.kill(victim, signal.SIGKILL)
            kills += 1
        error = process.communicate(timeout=30 if killed else None)[1].decode()  # the ranks have these pipes too
        while any(state_and_parent(rank)[0] not in "XZ" for rank in ranks):
            time.sleep(0.01)
        if process.returncode == 0:
            break
        assert killed and time.time() - killed < 30, error
        assert read_checkpoint(run / "last.pt")["global_step"] < 256 * ITERATIONS  # not to the end alone
        if victim == process.pid:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == os.EX_TEMPFAIL
            assert without_progress(error) == f"error: a process of this run has died; to resume: {RESUME}\n"
        flags = ["--resume", "runs/run"]
    assert kills == KILLS, f"the run was over after {kills} kills: make it longer"
    assert_same_end(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_torchrun_restarts_lost_ranks_and_the_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    torchrun = (
        "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 --monitor-interval 0.1".split()
    )
    process = subprocess.Popen([sys.executable, *torchrun, str(SCRIPT), *FLAGS], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    until_next_checkpoint(process, tmp_path / "runs" / "run")
    os.kill(ranks_of(process.pid, b"ppo_ballbot")[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, output
    assert output.count("tensorboard --logdir") == 2  # it was started twice
    assert_same_end(tmp_path / "runs" / "run", uninterrupted)


@pytest.mark.slow
def test_a_run_resumes_with_the_same_number_of_processes_only(short, tmp_path):
    environment = dict(os.environ, RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    output = subprocess.run(command("--resume", str(short)), env=environment, capture_output=True, text=True)
    assert output.returncode == 1
    assert "is of a run on 1 processes, here are 4: use the same number" in output.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number, handler", [(signal.SIGINT, signal.SIG_DFL), (signal.SIGINT, signal.SIG_IGN),
                                             (signal.SIGTERM, signal.SIG_IGN)])  # fmt: skip
def test_an_interrupted_run_says_how_to_resume(number, handler, tmp_path):
    def disposition():  # a script's & ignores SIGINT: SIGTERM has to work all the same
        signal.signal(signal.SIGINT, handler)

    process = subprocess.Popen(command(*FLAGS), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=disposition, start_new_session=True)  # fmt: skip
    until_next_checkpoint(process, tmp_path / "runs" / "run")
    os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches all of the run's processes
    error = process.communicate()[1].decode()
    assert process.returncode == os.EX_TEMPFAIL
    assert without_progress(error) == f"stopped; to resume: {RESUME}\n"


@pytest.mark.slow
def test_a_run_resumes_with_more_steps(tmp_path, monkeypatch, capsys):
    """At a constant rate, as one that was to have as many from the start: bit for bit."""
    monkeypatch.chdir(tmp_path)
    args = replace(SHORT, run_name="short")
    ppo.train(args)
    with pytest.raises(SystemExit, match="is of a run of 256 steps: give more --total-timesteps"):
        ppo.train(ppo.Args(resume="runs/short", total_timesteps=128))
    short = ppo.train(ppo.Args(resume="runs/short", total_timesteps=512))
    assert "256 steps become 512: schedules are stretched over all of them" in capsys.readouterr().out
    assert json.loads((short / "config.json").read_text())["total_timesteps"] == 512
    assert plot.read_run(short)[0]["total_timesteps"] == 512
    long = ppo.train(replace(args, total_timesteps=512, run_name="long"))
    assert_equal(*(read_checkpoint(run / "last.pt")["model"] for run in (short, long)))
    for argv, total in (("--total-timesteps 8000000", 8_000_000), ("--total-timesteps 9000000", 9_000_000), ("", 512)):
        monkeypatch.setattr(sys, "argv", f"ppo_ballbot.py --resume runs/short {argv}".split())
        args = ppo.parse_args()
        with runs.prepare_run(args, 0.0, in_rank=False).open():
            assert args.total_timesteps == total
    assert json.loads((short / "config.json").read_text())["total_timesteps"] == 9_000_000


def logged_steps(run):
    """The steps of all evaluations in TensorBoard's logs, repeated ones too."""
    logs = [EventAccumulator(str(file)).Reload() for file in run.glob("events*")]
    tag = "eval/episodic_return"
    return sorted(event.step for log in logs if tag in log.Tags()["scalars"] for event in log.Scalars(tag))


@pytest.mark.slow
@pytest.mark.parametrize("script, eval_interval", [(ppo, 256), (schedules, 10**9)])
def test_a_finished_run_is_not_evaluated_again(script, eval_interval, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = {name: value for name, value in vars(SHORT).items() if name != "exp_name" and name in vars(script.Args())}
    args = script.Args(**args | dict(eval_interval=eval_interval, eval_episodes=1, run_name="run"))
    with monkeypatch.context() as patch:  # the final evaluation is interrupted
        patch.setattr(runs.Run, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.train(args)
    script.train(script.Args(resume="runs/run"))
    run = Path("runs/run")
    before = {file: file.read_bytes() for file in run.iterdir()}
    assert logged_steps(run) == [256]
    final = [entry for entry in runs.read_metrics(run) if entry["kind"] == "final"]
    assert [entry["global_step"] for entry in final] == [256]
    capsys.readouterr()
    script.train(script.Args(resume="runs/run"))
    assert "runs/run has finished, with return " in capsys.readouterr().out
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    script.train(script.Args(resume="runs/run", total_timesteps=384))
    assert logged_steps(run)[-1] == 384


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_resumed_run_keeps_the_best_policy_of_the_final_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    returns = iter([50.0, 10.0, 50.0])  # of the first end, of the second, of the first end's policy again
    monkeypatch.setattr(ppo, "evaluate", lambda *_: RESULT | {"episodic_return": next(returns)})
    run = ppo.train(replace(SHORT, run_name="run"))
    first = read_checkpoint(run / "best.pt")
    ppo.train(ppo.Args(resume="runs/run", total_timesteps=512))
    best = read_checkpoint(run / "best.pt")
    assert (best["global_step"], best["eval"]["episodic_return"]) == (256, 50)
    assert_equal(best["model"], first["model"])


RESULT = {"episodes": 1} | {key + end: 1.0 for key in ("episodic_return", "episodic_length", "falls")
                            for end in ("", "_std")}  # fmt: skip


def test_a_restart_by_torchrun_resumes_its_own_run_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = replace(SHORT, run_name="run")
    run = ppo.train(replace(args))
    kept = {file: file.read_bytes() for file in run.iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    def begin(**flags):
        flags = replace(args, **flags)
        return flags, runs.prepare_run(flags, 0.0, in_rank=False)

    for flags in (dict(seed=2), dict(preset="tuned"), dict(total_timesteps=512)):
        with pytest.raises(SystemExit, match="runs/run has other flags: give another --run-name"):
            begin(**flags)
    assert {file: file.read_bytes() for file in run.iterdir()} == kept
    flags, resumed = begin()
    assert flags.resume == "runs/run" and resumed.global_step == 256
    (run / "config.json").unlink()
    with pytest.raises(SystemExit, match="has other flags"):
        begin()
    assert begin(run_name="new")[1].checkpoint is None  # killed before its folder was created


@pytest.mark.slow
def test_a_run_starts_from_the_policy_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = replace(
        ppo.Args(), frame_skip=1, num_threads=1, terrain="flat", num_envs=2, num_steps=64, minibatch_size=64,
        total_timesteps=128, final_eval_episodes=1, hidden_size=8, run_name="first",
    )  # fmt: skip
    first = read_checkpoint(ppo.train(args) / "best.pt")["model"]
    still = replace(
        args, init_from="runs/first", run_name="still", terrain="perlin", learning_rate=1e-30, weight_decay=0.0
    )
    second = read_checkpoint(ppo.train(still) / "best.pt")["model"]
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    assert moved == {"obs_mean", "obs_var", "obs_count"}  # they are updated
    with pytest.raises(SystemExit, match="runs/first: use the same cameras, hidden_size as in its training"):
        ppo.train(replace(args, init_from="runs/first", run_name="third", cameras=False, hidden_size=16))
    with pytest.raises(SystemExit, match="use the same privileged_critic, depth_scale as"):
        ppo.train(replace(args, init_from="runs/first", run_name="third", privileged_critic=False, depth_scale=0.1))
    with pytest.raises(SystemExit, match="use the same small_encoder, height_scan as"):
        ppo.train(replace(args, init_from="runs/first", run_name="third", small_encoder=False,
                          env_kwargs=("height_scan=True", "camera_size=64")))  # fmt: skip
    assert not Path("runs/third").exists()


def test_a_run_whose_losses_are_not_finite_ends_with_its_last_good_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = replace(SHORT, total_timesteps=512, save_interval=0.0, run_name="run")
    update, calls = ppo.update, []

    def diverge(*arguments):
        calls.append(update(*arguments))
        return calls[-1] | ({"value_loss": float("nan")} if len(calls) == 2 else {})

    monkeypatch.setattr(ppo, "update", diverge)
    step = args.num_envs * args.num_steps * args.frame_skip
    message = rf"^error: losses are not finite after step {step}: lower .*; runs/run/last\.pt is an earlier policy"
    with pytest.raises(SystemExit, match=message):
        ppo.train(args)
    assert read_checkpoint(Path("runs/run/last.pt"))["global_step"] == step


@pytest.mark.slow
def test_a_randomized_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    randomization = dict(push=1.0, push_interval=0.1, obs_noise=0.01, mass=0.1, latency=2)
    args = replace(SHORT, total_timesteps=384, randomization=randomization, save_interval=0.0, run_name="one")
    first = ppo.train(args).rename("first")
    assert json.loads((first / "config.json").read_text())["randomization"] == randomization
    updates = iter([ppo.update, ppo.update, interrupt])
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", lambda *args: next(updates)(*args))
        with pytest.raises(KeyboardInterrupt):
            ppo.train(args)
    again = ppo.train(ppo.Args(resume="runs/one"))
    assert_same_end(again, first)


@pytest.mark.slow
@pytest.mark.parametrize("goal", ["forward", "command"])
def test_environment_state_is_all_of_it(goal):
    args = replace(ppo.Args(), num_threads=1, goal=goal)
    envs, again = (ppo.make_envs(args, 3) for _ in range(2))
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (700, 3, 3))
    for action in actions[:200]:
        envs.step(action)
    if goal == "command":  # two change soon
        envs.set_state(envs.get_state() | {"commands_due": torch.tensor([10**9, 250, 300])})
    again.set_state(envs.get_state())
    ends = 0
    for action in actions[200:]:
        a, b = envs.step(action), again.step(action)
        for key in a[0]:
            assert np.array_equal(a[0][key], b[0][key])
        for x, y in zip(a[1:4], b[1:4]):
            assert np.array_equal(x, y)
        if "episode" in a[4]:
            ends += 1
            assert np.array_equal(a[4]["episode"]["r"], b[4]["episode"]["r"])
            assert np.array_equal(a[4]["episode"]["l"], b[4]["episode"]["l"])
    assert ends


def test_damaged_or_foreign_checkpoints_are_refused(short, tmp_path, monkeypatch):
    run, content = tmp_path / "run", read_checkpoint(short / "last.pt") | {"final": None}
    run.mkdir()

    def assert_refused(message, path=run):
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
            ppo.train(ppo.Args(resume=str(path)))
        assert "\n" not in str(error.value)

    assert_refused("last.pt is missing$")
    (run / "last.pt").write_bytes((short / "last.pt").read_bytes()[:-9999])
    assert_refused("last.pt is damaged, or not a checkpoint")
    shutil.copy(short / "best.pt", run)
    assert_refused("best.pt is only a policy: --resume its run's folder", run / "best.pt")
    renamed = {key.replace("weight_0", "0.weight"): value for key, value in content["model"].items()}
    optimizer = content["optimizer"] | {"state": content["optimizer"]["state"] | {0: {"exp_avg": torch.zeros(7)}}}
    no_dict = content["optimizer"] | {"state": content["optimizer"]["state"] | {0: torch.zeros(2)}}
    for changed, message in (
        ({"weights": torch.zeros(3)}, "is no checkpoint to resume from$"),
        (content | {"model": renamed}, "does not fit its flags: .*actor.0.weight"),
        (content | {"args": content["args"] | {"lr_schedule": "linear"}}, "its flags differ in lr_schedule$"),
        (content | {"elapsed": "long"}, "is no checkpoint to resume from$"),
        (content | {"optimizer": optimizer}, "does not fit its flags: "),
        (content | {"optimizer": no_dict}, "does not fit its flags: its optimizer's state is incomplete$"),
    ):
        save_checkpoint(run / "last.pt", changed)
        assert_refused(message)
    monkeypatch.setattr(sys, "argv", f"ppo_ballbot.py --resume {run} --seed 3".split())
    with pytest.raises(SystemExit, match="add only --total-timesteps"):
        ppo.parse_args()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, "last.pt")
    for load in (checkpoints.load_policy, lambda path: runs.read_run(path, ppo)):
        with pytest.raises(SystemExit, match="is damaged, or not a checkpoint, or contains code"):
            load(Path("last.pt"))
    assert not Path("harm").exists()


def test_checkpoints_of_incompatible_versions_are_refused(tmp_path):
    args = {key: value for key, value in vars(ppo.Args()).items() if key != "frame_skip"}
    torch.save({"model": {}, "optimizer": {}, "args": args}, tmp_path / "last.pt")
    with pytest.raises(SystemExit, match="has no frame_skip in its args: it was trained by an incompatible version"):
        runs.read_run(tmp_path / "last.pt", ppo)


def test_checkpoints_of_version_0_1_0_load(tmp_path):
    """They end in the SHA-256 of the content, as the comment of the ZIP archive."""
    path, content = tmp_path / "last.pt", {"a": torch.arange(3), "b": [1.5, None]}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()[:-2] + b"\x40\0"  # the length of the comment
    path.write_bytes(data + hashlib.sha256(data).hexdigest().encode())
    assert_equal(read_checkpoint(path), content)


def test_a_changed_byte_is_detected_or_has_no_effect(short, tmp_path):
    content = read_checkpoint(short / "best.pt")
    good, path, rng = (short / "best.pt").read_bytes(), tmp_path / "best.pt", random.Random(0)
    refused = 0
    for i in range(400):
        bad = bytearray(good)
        at = rng.randrange(len(good)) if i % 2 else len(good) - 1 - rng.randrange(4000)  # or in the ZIP's directory
        bad[at] ^= rng.randrange(1, 256)
        path.write_bytes(bad)
        try:
            read = read_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            assert_equal(read, content)
    assert refused > 200
    for end in (-1, -64, 10, 0):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(path)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"a": 2})
    assert read_checkpoint(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_two_processes_never_write_to_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ppo.train(replace(SHORT, run_name="run"))
    before = {file: file.read_bytes() for file in Path("runs/run").iterdir()}
    folder = os.open("runs/run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(SystemExit) as error:
        ppo.train(ppo.Args(resume="runs/run", total_timesteps=512))
    assert error.value.code == os.EX_TEMPFAIL
    assert "error: runs/run is in use by another process" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="runs/run exists: give another --run-name"):
        ppo.train(replace(SHORT, run_name="run"))
    assert {file: file.read_bytes() for file in Path("runs/run").iterdir()} == before
    os.close(folder)


def test_flags_win_over_config_which_wins_over_preset(short, monkeypatch, tmp_path):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo_ballbot.py", *flags])
        return ppo.parse_args()

    assert parse() == parse("--preset", "balanced", "--preset=") == ppo.Args()
    aggressive = parse("--preset", "aggressive", "--num-envs", "12")
    assert (aggressive.num_envs, aggressive.num_steps, aggressive.clip_coef) == (12, 256, 0.2)
    config = str(short / "config.json")
    given = parse("--config", config, "--gamma", "0.97")
    assert (given.gamma, given.num_envs, given.norm_obs) == (0.97, 2, True)
    with pytest.raises(SystemExit, match="sets all flags: leave out --preset tuned"):
        parse("--preset", "tuned", "--config", config)
    (tmp_path / "part.json").write_text('{"gamma": 0.9}')
    part = parse("--preset", "aggressive", "--config", str(tmp_path / "part.json"))
    assert (part.gamma, part.num_envs) == (0.9, 16)
    robust = parse("--preset", "robust").randomization
    assert robust == ppo.PRESETS["robust"]["randomization"] and robust["push"] > 0
    pushed = parse("--preset", "robust", "--randomization", "push", "1.0", "latency", "2").randomization
    assert pushed == {"push": 1.0, "latency": 2} and parse("--preset", "robust", "--randomization").randomization == {}
    with pytest.raises(SystemExit, match=r"is not a run's config\.json"):
        parse("--config", str(SCRIPT))
    with pytest.raises(SystemExit):
        parse("--preset", "bold")
    for preset in ppo.PRESETS:
        validate_args(parse("--preset", preset), world_size=2)


@pytest.mark.slow
def test_config_reproduces_the_run(uninterrupted, tmp_path):
    flags = ["--config", str(uninterrupted / "config.json"), "--run-name", "run"]
    subprocess.run(command(*flags), cwd=tmp_path, check=True, capture_output=True)
    again, first = (read_checkpoint(run / "last.pt")["model"]
                    for run in (tmp_path / "runs" / "run", uninterrupted))  # fmt: skip
    assert_equal(again, first)


@pytest.mark.slow
def test_steps_per_second_are_by_the_clock_and_checkpoints_by_the_interval(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saves, save = [], runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda path, content: (saves.append(path.name), save(path, content)))
    waits = iter([3])  # s
    monkeypatch.setattr(ppo, "evaluate", lambda *_: (time.sleep(next(waits, 0)), RESULT)[1])
    started = time.perf_counter()
    run = ppo.train(replace(SHORT, run_name="run", total_timesteps=512, eval_interval=256))
    log = EventAccumulator(str(run)).Reload()
    by_the_clock, iterations = (log.Scalars(tag)[-1] for tag in ("charts/SPS", "SPS/train"))
    assert by_the_clock.step == iterations.step == 512
    assert 512 / (time.perf_counter() - started) < by_the_clock.value < 512 / 3 < iterations.value  # an evaluation
    assert saves.count("last.pt") == 2  # of the last iteration, and of the end
    saves.clear()
    ppo.train(replace(SHORT, run_name="often", total_timesteps=512, save_interval=0))
    assert saves.count("last.pt") == 5
