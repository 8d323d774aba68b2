"""Runs that are killed and resumed end with the weights of those that were not; damage is refused in one line."""

import json
import os
import random
import re
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

import ballbot_runs
import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_runs import check, load_run, save
from ballbot_utils import plot

SCRIPT = Path(ppo.__file__).resolve()
KILLS = int(os.environ.get("KILLS", 3))  # the project's claim is made with 20
ITERATIONS = max(20, 6 * KILLS)
FLAGS = (
    "--run-name run --frame-skip 1 --num-processes 2 --num-envs 4 --num-steps 64 --minibatch-size 64 "
    "--eval-interval 2560 --eval-episodes 2 --final-eval-episodes 2 --norm-obs --norm-value --norm-adv "
    "--learning-rate 3e-4 --anneal-lr --save-interval 0 "
    f"--total-timesteps {256 * ITERATIONS}"
).split()


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


def assert_same_end(run, other):
    """Bit for bit the same policies, optimizer, environments and generators, and the same curves."""
    for file in ("last.pt", "best.pt"):
        a, b = (torch.load(folder / file, weights_only=True) for folder in (run, other))
        for name in ("elapsed", "startup", "training"):  # wall time
            a.pop(name, None), b.pop(name, None)
        assert_equal(a, b)
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


def until_next_checkpoint(process, run):
    def written():
        return (run / "last.pt").stat().st_mtime_ns if (run / "last.pt").exists() else 0

    before = written()
    while process.poll() is None and written() == before:
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_any_process_killed_at_random_points_and_resumed(uninterrupted, tmp_path):
    """In turn the first process and its ranks: none outlives another, and the run goes on bit for bit."""
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
        assert torch.load(run / "last.pt", weights_only=True)["iteration"] < ITERATIONS  # not to the end alone
        if victim == process.pid:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == os.EX_TEMPFAIL
            line = error.strip()
            assert "\n" not in line, error
            assert line.startswith("error: a process of this run is gone") and line.endswith("--resume runs/run")
        flags = ["--resume", "runs/run"]
    assert kills == KILLS, f"the run was over after {kills} kills: make it longer"
    assert_same_end(run, uninterrupted)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_torchrun_starts_lost_ranks_again_and_goes_on_bit_for_bit(uninterrupted, tmp_path):
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


def test_a_run_goes_on_with_as_many_processes_or_not_at_all(uninterrupted, tmp_path):
    environment = dict(os.environ, RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    output = subprocess.run(command("--resume", str(uninterrupted)), env=environment, capture_output=True, text=True)
    assert output.returncode == 1
    assert "is of a run on 2 processes, here are 4: give it as many" in output.stderr


@pytest.mark.parametrize("number, handler", [(signal.SIGINT, signal.SIG_DFL), (signal.SIGINT, signal.SIG_IGN),
                                             (signal.SIGTERM, signal.SIG_IGN)])  # fmt: skip
def test_interrupted_run_says_how_to_go_on(number, handler, tmp_path):
    def disposition():  # with nohup and &, SIGINT is ignored: SIGTERM has to work all the same
        signal.signal(signal.SIGINT, handler)

    process = subprocess.Popen(command(*FLAGS), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=disposition, start_new_session=True)  # fmt: skip
    until_next_checkpoint(process, tmp_path / "runs" / "run")
    os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches all of the run's processes
    error = process.communicate()[1].decode()
    assert process.returncode == os.EX_TEMPFAIL
    assert error.strip().splitlines()[-1].endswith("--resume runs/run")
    assert "Traceback" not in error


def test_a_run_goes_on_with_more_steps(tmp_path, monkeypatch, capsys):
    """At a constant rate, as one that was to have as many from the start: bit for bit."""
    monkeypatch.chdir(tmp_path)
    args = replace(SHORT, run_name="short")
    ppo.train(args)
    with pytest.raises(SystemExit, match="is of a run of 256 steps: give more --total-timesteps, or none"):
        ppo.train(ppo.Args(resume="runs/short", total_timesteps=128))
    short = ppo.train(ppo.Args(resume="runs/short", total_timesteps=512))
    assert "256 steps become 512: what is scheduled is stretched over all of them" in capsys.readouterr().out
    assert json.loads((short / "config.json").read_text())["total_timesteps"] == 512
    assert plot.read_run(short)[0]["total_timesteps"] == 512
    long = ppo.train(replace(args, total_timesteps=512, run_name="long"))
    assert_equal(*(torch.load(run / "last.pt", weights_only=True)["model"] for run in (short, long)))
    for argv, total in ((" --total-timesteps 10000000", 10_000_000), ("", 512)):
        monkeypatch.setattr(sys, "argv", ("ppo_ballbot.py --resume runs/short" + argv).split())
        args = ppo.parse()
        _, run, _ = ballbot_runs.begin(args, 0.0, ppo.Args, ppo.Agent)
        assert args.total_timesteps == total
        ballbot_runs.open_log(args, short, run).close()
        monkeypatch.setattr(sys, "argv", "ppo_ballbot.py --config runs/short/config.json".split())
        assert ppo.parse().total_timesteps == 10_000_000  # which the second does not write again


def evaluations(run):
    """The steps of all evaluations in a run's log, those logged again too."""
    logs = [EventAccumulator(str(file)).Reload() for file in run.glob("events*")]
    tag = "eval/episodic_return"
    return sorted(event.step for log in logs if tag in log.Tags()["scalars"] for event in log.Scalars(tag))


@pytest.mark.parametrize("script, eval_interval", [(ppo, 256), (schedules, 10**9)])
def test_a_run_that_has_finished_is_not_evaluated_again(script, eval_interval, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = {name: value for name, value in vars(SHORT).items() if name != "exp_name" and name in vars(script.Args())}
    run = script.train(script.Args(**args | dict(eval_interval=eval_interval, eval_episodes=1, run_name="run")))
    kept = {file: file.read_bytes() for file in run.iterdir()}
    assert evaluations(run) == [256]
    capsys.readouterr()
    script.train(script.Args(resume="runs/run"))
    assert "runs/run has finished, with return " in capsys.readouterr().out
    assert {file: file.read_bytes() for file in run.iterdir()} == kept
    # One that was lost in its last evaluation has not finished: it is evaluated, and logged once
    best = torch.load(run / "best.pt", weights_only=True)
    (run / "best.pt").unlink()
    script.train(script.Args(resume="runs/run"))
    assert_equal(torch.load(run / "best.pt", weights_only=True), best)
    assert evaluations(run) == [256]
    script.train(script.Args(resume="runs/run", total_timesteps=384))  # with more steps it goes on
    assert evaluations(run)[-1] == 384


def test_going_on_keeps_the_best_policy_though_the_end_chose_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    returns = {256: 50.0, 512: 10.0}  # of the final policies; the checkpoint knows of no evaluation on the way

    def evaluate(agent, args, episodes):
        step = 256 if torch.equal(agent.log_std, first["model"]["log_std"]) else 512
        return ballbot_runs.judged(agent)["eval"] | {"episodic_return": returns[step]}

    run = ppo.train(replace(SHORT, run_name="run"))
    first = torch.load(run / "last.pt", weights_only=True)
    assert first["best"] is None and torch.load(run / "best.pt", weights_only=True)["global_step"] == 256
    monkeypatch.setattr(ppo, "evaluate", evaluate)
    ppo.train(ppo.Args(resume="runs/run", total_timesteps=512))
    best = torch.load(run / "best.pt", weights_only=True)
    assert (best["global_step"], best["eval"]["episodic_return"]) == (256, 50)
    assert_equal(best["model"], first["model"])
    # A best.pt that is damaged, or of later than the checkpoint, is not taken
    for damage in (b"", (run / "best.pt").read_bytes()):
        (run / "best.pt").write_bytes(damage)
        known = first | {"global_step": 0 if damage else 256, "best": "the checkpoint's"}
        assert ballbot_runs.best_of(known, run, ppo.Agent(SHORT)) == "the checkpoint's"


def test_a_restart_by_torchrun_goes_on_with_its_own_run_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = replace(SHORT, run_name="run")
    run = ppo.train(replace(args))
    kept = {file: file.read_bytes() for file in run.iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    def begin(**flags):
        flags = replace(args, **flags)
        return flags, ballbot_runs.begin(flags, None, ppo.Args, ppo.Agent)

    for flags in (dict(seed=2), dict(preset="tuned"), dict(total_timesteps=512)):
        with pytest.raises(SystemExit, match="runs/run exists, and is of other flags: give another --run-name"):
            begin(**flags)
    assert {file: file.read_bytes() for file in run.iterdir()} == kept
    flags, (_, checkpoint, _) = begin()
    assert flags.resume == "runs/run" and checkpoint["global_step"] == 256
    (run / "config.json").unlink()
    with pytest.raises(SystemExit, match="is of other flags"):
        begin()
    assert begin(run_name="new")[1][1] is None  # lost before its folder was made


def test_a_run_starts_from_the_policy_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = replace(
        ppo.Args(), frame_skip=1, num_threads=1, terrain="flat", num_envs=2, num_steps=64, minibatch_size=64,
        total_timesteps=128, final_eval_episodes=1, hidden_size=8, run_name="first",
    )  # fmt: skip
    first = torch.load(ppo.train(args) / "best.pt", weights_only=True)["model"]
    still = replace(
        args, init_from="runs/first", run_name="still", terrain="perlin", learning_rate=1e-30, weight_decay=0.0
    )
    second = torch.load(ppo.train(still) / "best.pt", weights_only=True)["model"]
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    assert moved == {"obs_mean", "obs_var", "obs_count"}  # which go on
    with pytest.raises(SystemExit, match="--init-from runs/first: give cameras, hidden_size as it was trained with"):
        ppo.train(replace(args, init_from="runs/first", run_name="third", cameras=False, hidden_size=16))
    with pytest.raises(SystemExit, match="give privileged_critic, depth_scale as it was trained with"):
        ppo.train(replace(args, init_from="runs/first", run_name="third", privileged_critic=False, depth_scale=0.1))
    assert not Path("runs/third").exists()


def test_a_randomized_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    randomization = dict(push=1.0, push_interval=0.1, obs_noise=0.01, mass=0.1, latency=2)
    args = replace(SHORT, total_timesteps=384, randomization=randomization, save_interval=0.0, run_name="one")
    first = ppo.train(args)
    assert json.loads((first / "config.json").read_text())["randomization"] == randomization
    shutil.copytree(first, "runs/two")
    shutil.copy("runs/two/previous.pt", "runs/two/last.pt")
    again = ppo.train(ppo.Args(resume="runs/two"))
    assert_same_end(again, first)
    evaluated = ppo.make_envs(args, 1, evaluation=True)
    assert not evaluated.randomization and ppo.make_envs(args, 1).randomization == randomization


@pytest.mark.parametrize("goal", ["forward", "command"])
def test_environment_state_is_all_of_it(goal):
    args = replace(ppo.Args(), num_threads=1, goal=goal)
    envs, again = (ppo.make_envs(args, 3) for _ in range(2))
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (700, 3, 3))
    for action in actions[:200]:
        envs.step(action)
    if goal == "command":  # one is told, and two draw soon
        envs.set_command(np.full((3, 2), 0.3))
        state = envs.get_state()
        state["commands_due"][1:] = state["_steps"][1:] + 50
        envs.set_state(state)
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


def refuse(message, *flags, cwd):
    output = subprocess.run(command(*flags), cwd=cwd, capture_output=True, text=True)
    assert output.returncode == 1
    assert re.search(message, output.stderr), output.stderr
    assert len(output.stderr.strip().splitlines()) == 1


def test_damaged_or_foreign_checkpoints_are_refused_and_the_good_one_offered(uninterrupted, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    good = (uninterrupted / "last.pt").read_bytes()
    (run / "previous.pt").write_bytes(good)
    offer = "previous.pt is there too: --resume .*previous.pt"
    refuse(f"last.pt is missing; .*{offer}", "--resume", str(run), cwd=tmp_path)
    (run / "last.pt").write_bytes(good[: len(good) // 2])
    refuse(f"last.pt is damaged, or not a checkpoint.*; .*{offer}", "--resume", str(run), cwd=tmp_path)
    save(run / "last.pt", {"weights": torch.zeros(3)})
    refuse(f"last.pt is no checkpoint to go on from; .*{offer}", "--resume", str(run), cwd=tmp_path)
    content = torch.load(uninterrupted / "last.pt", weights_only=True)
    content["model"]["actor.0.weight"] = content["model"].pop("actor.weight_0")
    save(run / "last.pt", content)
    refuse(f"of another version: model is not as its flags imply; .*{offer}", "--resume", str(run), cwd=tmp_path)
    refuse("no others", "--resume", str(run), "--seed", "3", cwd=tmp_path)
    shutil.copy(uninterrupted / "best.pt", run)
    refuse("best.pt is a policy alone: --resume its run's folder", "--resume", str(run / "best.pt"), cwd=tmp_path)
    content = torch.load(uninterrupted / "last.pt", weights_only=True)
    save(run / "last.pt", content | {"args": content["args"] | {"lr_schedule": "linear"}})
    refuse("of another program or version: its flags differ in lr_schedule$", "--resume", str(run), cwd=tmp_path)
    refuse("runs/none/last.pt is missing$", "--resume", "runs/none", cwd=tmp_path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, "last.pt")
    with pytest.raises(SystemExit, match="damaged, or not a checkpoint"):
        load_run(Path("last.pt"), ppo.Args, ppo.Agent)
    assert not Path("harm").exists()


def test_checkpoints_of_the_robot_before_it_was_mended_are_refused(tmp_path):
    args = {key: value for key, value in vars(ppo.Args()).items() if key != "frame_skip"}
    torch.save({"model": {}, "optimizer": {}, "args": args}, tmp_path / "last.pt")
    with pytest.raises(SystemExit, match="before its rollers were mended, which spun up at speed: train anew"):
        load_run(tmp_path / "last.pt", ppo.Args, ppo.Agent)


def test_a_checkpoint_of_before_has_no_checksum_and_one_cut_off_is_damage(tmp_path, capsys):
    path = tmp_path / "last.pt"
    torch.save({"a": 1}, path)
    assert ballbot_runs.unsealed(path) == {"a": 1} and "has no checksum" in capsys.readouterr().err
    save(path, {"a": 1})
    assert ballbot_runs.unsealed(path) == {"a": 1} and not capsys.readouterr().err
    for end in (-1, -64, -65):  # at -64, what is left is all of the content
        path.with_name("cut.pt").write_bytes(path.read_bytes()[:end])
        with pytest.raises(ValueError, match="its checksum is not that of its content"):
            ballbot_runs.unsealed(path.with_name("cut.pt"))


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=r"No space left on device.*make room, then to go on: .*--resume"):
        save(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_flags_win_over_config_which_wins_over_preset(uninterrupted, monkeypatch, tmp_path):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo_ballbot.py", *flags])
        return ppo.parse()

    assert parse() == parse("--preset", "balanced", "--preset=") == ppo.Args()
    aggressive = parse("--preset", "aggressive", "--num-envs", "12")
    assert (aggressive.num_envs, aggressive.num_steps, aggressive.clip_coef) == (12, 256, 0.2)
    config = str(uninterrupted / "config.json")
    given = parse("--config", config, "--gamma", "0.97")
    assert (given.gamma, given.num_envs, given.norm_obs) == (0.97, 4, True)
    with pytest.raises(SystemExit, match="so that --preset tuned would do nothing: give one of them"):
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
        check(parse("--preset", preset), world_size=2)


def test_config_reproduces_the_run(uninterrupted, tmp_path):
    flags = ["--config", str(uninterrupted / "config.json"), "--run-name", "run"]
    subprocess.run(command(*flags), cwd=tmp_path, check=True, capture_output=True)
    again, first = (torch.load(run / "last.pt", weights_only=True)["model"]
                    for run in (tmp_path / "runs" / "run", uninterrupted))  # fmt: skip
    assert_equal(again, first)


def test_steps_per_second_are_by_the_clock_and_checkpoints_by_the_interval(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saves = []
    monkeypatch.setattr(ppo, "save", lambda path, *_: saves.append(path.name))
    monkeypatch.setattr(ppo, "evaluate", lambda agent, args, episodes, evaluate=ppo.evaluate: (
        time.sleep(1), evaluate(agent, args, episodes))[1])  # fmt: skip
    started = time.perf_counter()
    run = ppo.train(replace(SHORT, run_name="run", total_timesteps=512, eval_interval=256))
    log = EventAccumulator(str(run)).Reload()
    by_the_clock, iterations = (log.Scalars(tag)[-1] for tag in ("charts/SPS", "SPS/train"))
    assert by_the_clock.step == iterations.step == 512
    assert 512 / (time.perf_counter() - started) < by_the_clock.value < 512 / 2 < iterations.value  # 2 s of evaluations
    assert saves.count("last.pt") == 1  # the end comes before 10 s are over
    saves.clear()
    ppo.train(replace(SHORT, run_name="often", total_timesteps=512, save_interval=0))
    assert saves.count("last.pt") == 4
