"""The benchmark of the guide: raw data of runs, and the tables and figures made from them."""

import json
import re
import time
from pathlib import Path

import pytest

from benchmark import guide, presets, records, terrain
from benchmark.records import Experiment

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--no-cameras --no-privileged-critic --num-envs 2 --num-steps 64 --minibatch-size 64 --total-timesteps 2048 "
         "--eval-interval 1024 --eval-episodes 2 --final-eval-episodes 2 --hidden-size 8")  # fmt: skip


def make_line(name, value, seed, returns):
    evaluations = [[500_000 * k, 60.0 * k, x, 4000.0, 0.0] for k, x in enumerate(returns, 1)]
    curves = {
        "losses/approx_kl": [0.01, None, 0.03],
        "losses/clipfrac": [0.1, 0.2, 0.3],
        "SPS/train": [1000, 1234, 2000],
        "losses/value_loss": [0.2, None, 0.1],
        "losses/policy_loss": [0.1, -0.1, 0.1, -0.1, 0.1, 0.09],
        "charts/action_std": [1, 0.9],
        "charts/episodic_return_mean100": [1, returns[-1] - returns[0]],
    }
    return {"experiment": name, "value": value, "seed": seed, "evaluations": evaluations, "curves": curves,
            "final": dict(zip(records.EVALUATION, [4e6, 300.0, returns[-1], 4000.0, 0.01 * seed])), "findings": [],
            "error": "", "gap": {"mean": 0.5 * seed}}  # fmt: skip


def test_table_and_figure_are_made_from_the_lines(tmp_path):
    lines = [make_line("defaults", "", seed, [50, 90 + seed, 100 + seed]) for seed in (1, 2, 3)]
    lines += [make_line("clip range", "0.2", seed, [110 + seed, 20, 30]) for seed in (1, 2, 3)]
    lines += [make_line("epochs", "3", 1, [1, 2, 3])]
    diverged = make_line("clip range", "0.3", 1, [30]) | {"error": "infinite", "findings": ["KL too large"]}
    lines += [diverged | {"final": None, "gap": None, "evaluations": []}]
    groups = guide.group_values("clip range", lines)
    assert list(groups) == ["0.015", "0.2", "0.3"]
    records.draw(tmp_path / "figures" / "clip_range.png", "clip range", groups, "0.015")
    page = "before\n<!-- results: clip range -->\nold\n<!-- end -->\nafter\n"
    text = guide.update_page(page, lines, [], [])
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| **0.015** | 102.0 [101.0, 103.0] | 2 % | +1.0 | 1.5e6 steps, 3 of 3 | 0.02 | 20 % |  |" in text
    assert "| 0.2 | 30.0 [30.0, 30.0] | 2 % | +1.0 | 0.5e6 steps, 3 of 3 | 0.02 | 20 % |  |" in text
    assert "| 0.3 |  |  |  | 0 of 1 | 0.02 | 20 % | KL too large (1), infinite losses (1) |" in text
    guide.draw_all(tmp_path / "figures" / "all.png", {"clip range": groups})
    assert all((tmp_path / "figures" / name).stat().st_size > 10_000 for name in ("clip_range.png", "all.png"))


def test_tables_of_metrics_and_of_when_to_stop_are_made_from_the_lines():
    lines = [make_line("epochs", "3", 1, [50, 60, 70]), make_line("epochs", "3", 2, [50, 20, 10, 58]),
             make_line("epochs", "3", 3, [50, 40, 40])]  # fmt: skip
    page = "<!-- results: metrics --><!-- end --><!-- results: when to stop --><!-- end -->"
    page = guide.update_page(page, lines, [], [])
    assert "| return in training rises | 1 of 1 | 0 of 1 |" in page and "| entropy falls | 1 of 1 | 1 of 1 |" in page
    assert "| 500,000 steps | 2 of 3 | 1 | 8.0 |" in page and "| 2,000,000 steps | 0 of 3 | 0 |  |" in page


def test_table_of_speeds_is_made_from_the_measurements():
    def run(flags, steps, seconds):
        seconds = dict(zip(("start-up", "simulate", "infer", "learn"), (9, *seconds)))
        return {"flags": f"{flags} {guide.SPEED}", "steps": steps, "seconds": seconds}

    measured = [run("", 1000, (0.04, 0.02, 0.04)), run("--num-envs 32", 500, (0.02, 0.01, 0.01))]
    measured += [run("", 1000, (0.06, 0.02, 0.06))]
    assert guide.make_speed_table(measured).splitlines()[2:] == [
        "| **defaults** | 8,333 | 50 | 20 | 50 |", "| `--num-envs 32` | 12,500 | 40 | 20 | 20 |",
    ]  # fmt: skip


def test_page_has_the_tables_of_the_raw_lines():
    text = (ROOT / guide.PAGE).read_text()
    lines, runs = (records.read_lines(ROOT / file) for file in (guide.FILE, presets.FILE))
    measured = json.loads((ROOT / guide.SPEED_FILE).read_text())["records"]
    assert guide.update_page(text, lines, runs, measured) == text
    complete = {"learning rate", "clip range", "clip range, judged", "epochs", "entropy coefficient",
                "batch size", "value coefficient", "advantage normalization", "not learning", "unstable"}  # fmt: skip
    assert {"metrics", "when to stop", "speed"} | complete == {*re.findall("<!-- results: (.*?) -->", text)}


def test_a_row_can_be_a_run_of_another_hyperparameter():
    lines = [make_line("defaults", "", 1, [90]), make_line("learning rate", "1e-5", 1, [40])]
    groups = guide.group_values("not learning", lines)
    assert groups == {"learning rate 1e-5": lines[1:], "defaults": lines[:1]}
    assert "learning rate 1e-5" not in [run.value for run in guide.list_runs((1,), ())]  # it is not trained twice


def test_table_of_terrain_is_made_from_the_lines():
    def line(label, seed, value, falls):
        summary = {"return": {"mean": value}, "speed": {"mean": 0.1 * seed}, "falls": falls, "episodes": 100}
        worse = summary | {"return": {"mean": value - 10}}
        there = {flags: {"best": summary, "last": worse} for flags in terrain.CONDITIONS["potholes"]}
        return {"experiment": "potholes", "value": label, "seed": seed, "there": there}

    lines = [line("blind", 2, 50.0, 30), line("blind", 1, 40.0, 20), line("cameras", 1, 90.0, 0)]
    rows = terrain.make_table("potholes", lines).splitlines()
    assert rows[2:] == [
        "| cameras | `--terrain potholes:depth=0.1` | best | 90.0 | 50.0 | 0 of 100 | 0.10 | 90.0 |",
        "| cameras | `--terrain potholes:depth=0.1` | last | 80.0 | 50.0 | 0 of 100 | 0.10 | 80.0 |",
        "| blind | `--terrain potholes:depth=0.1` | best | 45.0 [40.0, 50.0] |  | 50 of 200 | 0.15 | 40.0, 50.0 |",
        "| blind | `--terrain potholes:depth=0.1` | last | 35.0 [30.0, 40.0] |  | 50 of 200 | 0.15 | 30.0, 40.0 |",
    ]


def test_the_page_of_terrain_has_the_tables_of_the_raw_lines():
    text, lines = (ROOT / terrain.PAGE).read_text(), records.read_lines(ROOT / terrain.FILE)
    assert records.fill_marks(text, terrain.make_tables(lines)) == text
    assert {*re.findall("<!-- results: (.*?) -->", text)} == {x["experiment"] for x in lines} > {"potholes"}


def test_interquartile_mean_ignores_outliers():
    mean, low, high = records.interquartile_mean([1, 10, 11, 12, 13, 14, 15, 100])
    assert mean == pytest.approx(12.5) and low < 12.5 < high < 60


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ppo_ballbot.py", "-m benchmark.other_ppo sb3"])
def test_runs_leave_a_line_each_and_are_not_repeated(tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    Path("ppo_ballbot.py").symlink_to(ROOT / "ppo_ballbot.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file = Path("benchmark/runs.jsonl")
    experiments = [Experiment("clip range", "0.1", f"{FLAGS} --clip-coef 0.1", 1, script)]
    records.train_all(file, experiments, 1, lambda run: {"folder": str(run)})
    (line,) = map(json.loads, file.read_text().splitlines())
    flags = f"{experiments[0].flags} --num-processes 1 --num-threads 1 --seed 1 --run-name {Path(line['folder']).name}"
    assert line["command"] == f"python {script} {flags}"
    assert line["final"]["episodes"] == 2 and len(line["evaluations"]) == 2 and not line["error"]
    assert len(line["curves"]["losses/approx_kl"]) == records.PARTS
    assert 0 < max(x or 0 for x in line["curves"]["SPS/train"])
    records.train_all(file, experiments, 1)
    assert len(file.read_text().splitlines()) == 1 and "0 of them are left" in capsys.readouterr().out


def test_after_a_failed_run_no_other_starts(tmp_path, monkeypatch):
    started = []

    def train(benchmark, experiment, extra):
        started.append(experiment.seed)
        time.sleep(0.1)
        raise RuntimeError("failed")

    monkeypatch.setattr(records, "train", train)
    with pytest.raises(RuntimeError, match="failed"):
        records.train_all(tmp_path / "runs.jsonl", [Experiment("a", "", "", seed) for seed in range(9)], 1)
    assert len(started) <= 2


@pytest.mark.slow
def test_a_run_with_bad_flags_leaves_no_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ppo_ballbot.py").symlink_to(ROOT / "ppo_ballbot.py")
    file = Path("benchmark/runs.jsonl")
    with pytest.raises(RuntimeError, match="--gamma is 2"):
        records.train_all(file, [Experiment("gamma", "2", f"{FLAGS} --gamma 2", 1)], 1)
    assert not file.exists()
