"""The benchmark program: a small real run, its tables from known numbers, and errors on invalid input."""

import json
from dataclasses import replace

import pytest

from ballbot_utils import benchmark

SMALL = benchmark.Args(run=("--no-cameras",), steps=128, repeats=1)


@pytest.mark.slow
def test_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.05)
    flags = (
        "--num-envs 2 --num-steps 8 --minibatch-size 16 --eval-interval 64 --eval-episodes 1 --final-eval-episodes 1"
    )
    args = replace(SMALL, output=tmp_path / "speed.png", run=(flags, flags + " --no-cameras"))
    benchmark.main(args)
    said = capsys.readouterr().out
    cameras, blind = json.loads((tmp_path / "speed.json").read_text())["records"]
    parts = {"start-up", "simulate", "render", "infer", "learn", "evaluate", "save", "final evaluation"}
    for record in (cameras, blind):
        assert record["steps"] == 128 and parts <= record["seconds"].keys()
        assert all(seconds > 0 for seconds in record["bounds"].values())
    assert cameras["bounds"].keys() - blind["bounds"].keys() == {"render"}
    assert (tmp_path / "speed.md").read_text() in said
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"speed\.png exists: give --overwrite"):
        benchmark.main(args)


def test_tables_of_known_numbers():
    records = [{"flags": "--preset tuned", "steps": 10_000, "seconds": {"simulate": 8 * factor, "log": 2 * factor},
                "bounds": {"simulate": 4.0}} for factor in (1, 2, 0.5)]  # fmt: skip
    lines = benchmark.format_tables(records).splitlines()
    assert (
        lines[0] == "`python ppo_ballbot.py --preset tuned`, 10,000 steps: 1,000 (500 to 2,000) steps/s by the clock."
    )
    assert "| simulate | 8.0 (4.0 to 16.0) | 80 (80 to 80) | 4.0 (4.0 to 4.0) |" in lines
    assert "| log | 2.0 (1.0 to 4.0) | 20 (20 to 20) |  |" in lines


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(repeats=0), "--repeats is 0"),
        (dict(steps=0), "--steps is 0"),
        (dict(output="speed.pdf"), "ending in .png"),
        (dict(output="none/speed.png"), "there is no folder"),
        pytest.param(dict(run=("--clip-coef -1",)), "--clip-coef is -1", marks=pytest.mark.slow),
    ],
)
def test_bad_input(tmp_path, change, message):
    change = {key: tmp_path / value if key == "output" else value for key, value in change.items()}
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(replace(SMALL, **{"output": tmp_path / "speed.png"} | change))
    assert str(exit_.value).startswith("error: ") and message in str(exit_.value) and "\n" not in str(exit_.value)
    assert not list(tmp_path.iterdir())
