"""The benchmark program: a small real run, its tables from known numbers, and errors on invalid input."""

import json
import sys
from dataclasses import replace

import pytest

from ballbot_utils import benchmark

SMALL = benchmark.Args(num_envs=(2,), threads=(1,), repeats=1, seconds=0.05, train_steps=512, sb3_envs=0, clock="")


@pytest.mark.slow
def test_small_run(tmp_path, capsys):
    clock = ("--num-envs 2 --num-steps 8 --minibatch-size 16 --total-timesteps 128 --eval-interval 64 "
             "--eval-episodes 1 --final-eval-episodes 1 --no-cameras")  # fmt: skip
    args = replace(SMALL, output=tmp_path / "speed.png", clock=clock)
    benchmark.main(args)
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [r["stage"] for r in content["records"]] == [*benchmark.STAGES, *benchmark.REQUIRED, "clock"]
    speeds = {r["stage"]: r["steps_per_second"] for r in content["records"]}
    # Each stage contains the previous one, and training contains all required operations
    assert 0 < speeds["training"] and speeds["rollout"] < speeds["env"] < speeds["physics"]
    assert all(speeds["training"] < 1.25 * speeds[part] for part in benchmark.REQUIRED)  # short, so noisy
    *others, by_clock = content["records"]
    assert all(100 < r["memory"] < 4000 for r in others)
    parts = by_clock["memory"]
    assert {"start-up", "simulate", "infer", "learn", "evaluate", "save", "final evaluation"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(128 / by_clock["steps_per_second"], rel=0.02)
    assert 0 < by_clock["steps_per_second"] < speeds["training"] and "By the clock" in said
    assert (tmp_path / "speed.md").read_text() in said
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"speed\.png exists: give --overwrite"):
        benchmark.main(args)


@pytest.mark.slow
def test_stable_baselines3_learns_the_same_task():
    result, memory = benchmark.measure("SB3 DummyVecEnv", 2, 1, replace(SMALL, sb3_steps=32))
    assert list(result) == ["SB3 DummyVecEnv"] and result["SB3 DummyVecEnv"] > 0 and memory > 100


def test_iteration_sizes():
    assert benchmark.iteration_sizes(10, 20_480) == (1024, 256)
    assert benchmark.iteration_sizes(1, 20_480) == (10_240, 256)
    assert benchmark.iteration_sizes(1024, 20_480) == (10, 256)
    assert benchmark.iteration_sizes(3, 100) == (16, 48)
    assert benchmark.iteration_sizes(64, 1) == (1, 64)


def test_number_of_processes():
    assert benchmark.num_processes(10, 2, 20_480) == 2
    assert benchmark.num_processes(1, 2, 20_480) == 1
    assert benchmark.num_processes(4, 4, 8) == 4
    assert benchmark.num_processes(6, 4, 20_480) == 1


def record(stage, speed, num_envs=10, threads=2, round_=1):
    return dict(stage=stage, num_envs=num_envs, threads=threads, round=round_, steps_per_second=speed, memory=500.4)


REQUIRED_SPEEDS = (50_000, 100_000, 20_000, 50_000)


def test_tables_of_known_numbers():
    args = replace(SMALL, num_envs=(10,), threads=(2,), repeats=3, sb3_envs=10)
    speeds = {"physics": 40_000, "training": 10_000, "training, no cameras": 15_000}
    records = [
        record(stage, factor * speeds.get(stage, 20_000), round_=i)
        for i, factor in enumerate((1, 1.1, 0.9))
        for stage in benchmark.STAGES
    ]
    records += [
        record(part, speed, threads=1, round_=i)
        for i in range(3)
        for part, speed in zip(benchmark.REQUIRED, REQUIRED_SPEEDS)
    ]
    records += [record("SB3 DummyVecEnv", 100, threads=1, round_=i) for i in range(3)]
    records += [record("SB3 SubprocVecEnv", 200 * factor, threads=1) for factor in (1, 1.1, 0.9)]
    lines = benchmark.format_tables(records, args).splitlines()
    assert "| 10 | 2 | 40,000 (36,000 to 44,000) | 20,000 (18,000 to 22,000) |" in lines[4]
    assert lines[4].endswith("| 0.25 (0.25 to 0.25) | 500 |")
    assert "| SB3 DummyVecEnv | 10 | 100 (100 to 100) | 100.0 (90.0 to 110.0) | 500 |" in lines
    assert "| SB3 SubprocVecEnv | 10 | 200 (180 to 220) | 50.0 (50.0 to 50.0) | 500 |" in lines
    # 20 + 10 + 50 + 20 = 100 µs on one core; MuJoCo and matrix products alone 40
    costs = " | ".join(f"{cost:.1f} ({cost:.1f} to {cost:.1f})" for cost in (20, 10, 50, 20, 100))
    assert f"| 10 | {costs} | 20,000 (20,000 to 20,000) | 50,000 (50,000 to 50,000) |" in lines
    assert "training, 10 envs: 10,000 steps/s reached" in lines
    assert "training, no cameras, 10 envs: 20,000 steps/s missed" in lines


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_envs=()), "--num-envs is []"),
        (dict(threads=(0,)), "--threads-0 is 0"),
        (dict(repeats=0), "--repeats is 0"),
        (dict(seconds=0), "--seconds is 0"),
        (dict(sb3_envs=-1), "--sb3-envs is -1"),
        (dict(output="speed.pdf"), "ending in .png"),
        (dict(output="none/speed.png"), "there is no folder"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, change, message):
    change = {key: tmp_path / value if key == "output" else value for key, value in change.items()}
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(replace(SMALL, **{"output": tmp_path / "speed.png"} | change))
    assert str(exit_.value).startswith("error: ") and message in str(exit_.value) and "\n" not in str(exit_.value)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-dev\.txt"):
        benchmark.main(replace(SMALL, sb3_envs=2, output=tmp_path / "speed.png"))
    assert not list(tmp_path.iterdir())
