"""Tuning: the space and what is said to a bad one, studies of a program that only pretends to train, and real runs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ballbot_runs
import numpy as np
import optuna
import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_ballbot
import ppo_ballbot_schedules
from ballbot_utils import tune

ROOT = Path(__file__).resolve().parents[1]
# Returns rise with --clip-coef, by 0.1 with the seed; at 0.5 it crashes, at 0.6 its return is not a number. A file
# named fault ends it by that signal or exit status, once.
PRETENDER = """
import argparse, json, os, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

@dataclass
class Args:
    run_name: str = ""
    config: str = ""
    resume: str = ""
    seed: int = 1
    num_processes: int = 1
    total_timesteps: int = 1000
    eval_interval: int = 250
    learning_rate: float = 1e-4
    clip_coef: float = 0.015
    ent_coef: float = 0.001
    init_log_std: float = 0.0
    num_envs: int = 10
    num_steps: int = 2048
    minibatch_size: int = 256
    hidden_size: int = 128
    pi_layers: int = 4
    vf_layers: int = 4
    norm_adv: bool = False
    seconds: float = 0.0

def check(args, size):
    if not 0 < args.learning_rate < 1:
        sys.exit(f"error: --learning-rate is {args.learning_rate}: give one from 0 to 1")
    if args.num_envs * args.num_steps % args.minibatch_size:
        sys.exit(f"error: --minibatch-size is {args.minibatch_size}, which does not divide")

def parse():
    parser = argparse.ArgumentParser()
    for name, value in asdict(Args()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    config = json.loads(Path(given["config"]).read_text()) if "config" in given else {}
    return Args(**{**config, **given})

if __name__ == "__main__":
    args = parse()
    run = Path("runs") / args.run_name
    run.mkdir(parents=True)
    with open("started", "a") as file:
        file.write(f"{args.run_name} {args.clip_coef}\\n")
    if args.clip_coef == 0.5:
        print("a line before")
        sys.exit("error: the losses are not finite")
    quality = 80 + 100 * args.clip_coef + args.seed / 10 if args.clip_coef != 0.6 else float("nan")
    if os.path.exists("fault"):
        fault = int(open("fault").read())
        os.remove("fault")
        print("error: cannot write last.pt (No space left on device): make room, then to go on: ...", flush=True)
        sys.exit(fault) if fault > 0 else os.kill(os.getpid(), -fault)

    def log(kind, steps, value):
        what = "final policy" if kind == "final" else f"{kind} at {steps:,} steps"
        print(f"{what}: return {value:.1f} ± 1.0, length {40 * value:.0f} ± 2, falls 0%", flush=True)
        with open(run / "metrics.jsonl", "a") as file:
            entry = dict(kind=kind, global_step=steps, episodic_return=value, episodic_length=40 * value)
            file.write(json.dumps(entry) + "\\n")

    for i in range(1, 5):
        time.sleep(args.seconds / 4)
        value = quality * i / 4
        log("evaluation", 250 * i, value)
        time.sleep(0.2 * (value > 100))
        (run / "best.pt").touch()
        (run / "last.pt").touch()
    log("final", 1000, value)
    log("best", 750, 1e6)
    (run / "finished").touch()
"""


@pytest.fixture(autouse=True)
def pretender(tmp_path, monkeypatch):
    """A folder with the program, and signals as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "pretender.py").write_text(PRETENDER)
    kept = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for name, handler in kept.items():
        signal.signal(name, handler)


def command(*words, workers=1):
    return [sys.executable, "-m", "ballbot_utils.tune", "--script", "pretender.py", "--workers", str(workers), *words]


def begin(*words, environment=(), **kwargs):
    """The command as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment)
    return subprocess.Popen(command(*words, **kwargs), env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def run(*words, flags=()):
    """The command in this process."""
    args = tyro.cli(tune.Args, args=["--script", "pretender.py", "--seeds", "1", *words])
    return tune.main(args, list(flags))


def load(name, storage=None):
    """A study's trials."""
    if storage is None:
        file = optuna.storages.journal.JournalFileBackend(f"runs/{name.partition('/')[0]}/study.log")
        storage = optuna.storages.JournalStorage(file)
    return optuna.load_study(study_name=name, storage=storage)


def started():
    """The runs that were started, and the clip coefficient of each."""
    lines = Path("started").read_text().splitlines() if Path("started").exists() else []
    return [(line.split()[0], float(line.split()[1])) for line in lines]


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def states(study):
    return [trial.state.name for trial in study.trials]


# The space


def test_space_by_hand():
    space = tune.parse_space(
        ["learning-rate=1e-5:1e-3:log", "vf-coef=0.5:2", "update-epochs=3:10", "clip-coef=0.1,0.2,0.1", "gamma=0.99",
         "norm-adv=true,false", "num-steps=512:4096", "pi-layers+vf-layers=2,3"], ppo_ballbot,
    )  # fmt: skip
    assert space == {
        "learning_rate": (1e-5, 1e-3, True), "vf_coef": (0.5, 2.0, False), "update_epochs": (3, 10, False),
        "clip_coef": [0.1, 0.2], "gamma": [0.99], "norm_adv": [True, False], "num_steps": [512, 1024, 2048, 4096],
        "pi_layers+vf_layers": [2, 3],
    }  # fmt: skip
    assert isinstance(space["update_epochs"][0], int) and isinstance(space["vf_coef"][1], float)
    grid = tune.on_grid({"a": (1e-5, 1e-3, True), "b": (0.5, 2.0, False), "c": (3, 4, False), "d": [1, 2]}, 3)
    assert grid == {"a": [1e-5, 1e-4, 1e-3], "b": [0.5, 1.25, 2.0], "c": [3, 4], "d": [1, 2]}


def test_default_space_is_possible():
    module, base = tune.base_settings(ROOT / "ppo_ballbot.py", [])
    base, space, options = tune.check_space(tune.parse_space(tune.SPACE, module), module, base)
    sizes = "num-steps", "num-envs", "minibatch-size"
    names = {text.partition("=")[0] for text in tune.SPACE} - {*sizes}
    assert set(space) == names | {", ".join(sizes)} and len(options[", ".join(sizes)]) == 79  # of 80, those that divide
    assert base == json.loads(json.dumps(base)) and base["clip_coef"] == 0.015
    _, tuned = tune.base_settings(ROOT / "ppo_ballbot_schedules.py", ["--preset", "tuned", "--num-envs", "32"])
    assert (tuned["num_envs"], tuned["lr_schedule"]) == (32, "linear")


def test_sizes_only_where_they_divide():
    module, base = tune.base_settings(ROOT / "ppo_ballbot.py", ["--num-processes", "2"])
    texts = ["num-steps=100,128", "num-envs=3,4,6", "minibatch-size=64,200", "gamma=0.9"]
    base, space, options = tune.check_space(tune.parse_space(texts, module), module, base)
    (key,) = space
    search = tune.Search(tune.Args(), "x", base, space, options, (1,), 1, False, 0.0)
    chosen = [search.settings({key: label}) for label in space[key]]
    found = {(c["num_steps"], c["num_envs"], c["minibatch_size"]) for c in chosen}
    wanted = {(s, e, m) for s in (100, 128) for e in (4, 6) for m in (64, 200) if s * e % m == 0}  # 3 is odd
    assert found == wanted and len(wanted) < 8
    assert all(c["gamma"] == 0.9 for c in chosen)


@pytest.mark.parametrize(
    ("words", "flags", "said"),
    [
        (["--space", "lerning-rate=1,2"], [], "has no flag --lerning-rate"),
        (["--space", "seed=1,2"], [], "not for tuning"),
        (["--space", "clip-coef=0.2:0.1"], [], "the range is empty"),
        (["--space", "clip-coef=0:0.1:log"], [], "starts above 0"),
        (["--space", "clip-coef=0.1:0.2:lin"], [], "a range is low:high"),
        (["--space", "clip-coef="], [], "give name=low:high"),
        (["--space", "clip-coef=a,b"], [], "'a' is no number"),
        (["--space", "clip-coef=nan:1"], [], "nan is not finite"),
        (["--space", "num-envs=1.5,2"], [], "'1.5' is no whole number"),
        (["--space", "norm-adv=1,0"], [], "neither true nor false"),
        (["--space", "clip-coef=0.1,0.2", "clip-coef=0.3,0.4"], [], "given twice"),
        (["--space", "clip-coef=0.1"], [], "nothing that varies"),
        (["--space", "learning-rate=0.1:2"], [], "--learning-rate is 2.0: give one from 0 to 1"),
        (["--space", "minibatch-size=3,7"], [], "no possible trial: --minibatch-size is 7, which does not divide"),
        (["--space", "clip-coef=0.1,0.2"], ["--lerning-rate", "1"], "refuses the flags after --:"),
        (["--space", "clip-coef=0.1,0.2"], ["--learning-rate", "2"], "--learning-rate is 2.0"),
        (["--trials", "0"], [], "--trials is 0: give 1 or more"),
        (["--study", "a/b"], [], "--study is a/b"),
        (["--study", ".."], [], "--study is .."),
        (["--strategy", "six-steps", "--trials", "3"], [], "--trials means nothing"),
        (["--strategy", "grid", "--points", "30", "--space", "clip-coef=0:1", "ent-coef=0:1", "init-log-std=0:1"], [],
         "the grid has 27,000 combinations"),
        (["--storage", "nonsense://a:secret@x", "--space", "clip-coef=0:1"], [], "the nonsense --storage cannot"),
    ],
)  # fmt: skip
def test_errors_are_one_line_before_any_trial(words, flags, said):
    with pytest.raises(SystemExit) as error:
        run(*words, flags=flags)
    message = str(error.value.code)
    assert message.startswith("error: ") and said in message and "\n" not in message
    assert "secret" not in message and not started()


# The objective


def test_score_by_hand():
    evaluations = [(100, 50.0, 3000.0), (200, 101.0, 1500.0), (300, 101.0, 3001.0), (400, 90.0, 4000.0)]
    assert tune.score("return", evaluations, 1000) == 90
    assert tune.score("length", evaluations, 1000) == 4000
    assert tune.score("steps-to-target", evaluations, 1000) == 300
    assert tune.score("steps-to-target", evaluations[:2], 1000) == 1500  # the length is half of what it must be
    assert tune.score("steps-to-target", evaluations[:1], 1000) == 1500  # so is the return
    assert tune.score("steps-to-target", [(100, -5.0, 10.0)], 1000) == 2000
    evaluations[3:] = [(400, 99.0, 4000.0), (500, 102.0, 3500.0), (600, 101.0, 4000.0)]
    assert tune.score("steps-to-target", evaluations, 1000, hold=2) == 500  # 300 did not hold
    assert tune.score("steps-to-target", evaluations[:5], 1000, hold=2) == 1000


def test_median_over_seeds_and_best_json():
    run("--strategy", "grid", "--space", "clip-coef=0.01,0.1", "--seeds", "9", "1", "2", "--pruner", "none",
        flags=["--learning-rate", "0.001"])  # fmt: skip
    study = load("tune-grid")
    assert {t.params["clip-coef"]: t.value for t in study.trials} == pytest.approx({0.01: 81.2, 0.1: 90.2})  # of seed 2
    assert study.best_trial.user_attrs["results"] == pytest.approx({"9": 90.9, "1": 90.1, "2": 90.2})
    best = json.loads(Path("runs/tune-grid/best.json").read_text())
    assert (best["clip_coef"], best["learning_rate"]) == (0.1, 0.001)
    assert not {"run_name", "config", "resume"} & set(best)
    assert "evaluation at 250" in Path("runs/tune-grid/trial-0-seed-9.log").read_text()
    made = {file.name for file in Path("runs/tune-grid").glob("*.png")}
    assert made == {"history.png", "slices.png"}  # one parameter: nothing to compare
    logs = [EventAccumulator(str(file)).Reload() for file in Path("runs/tune-grid/hparams").glob("trial-*/events*")]
    logged = [log for log in logs if "tune/return" in log.Tags()["scalars"]]
    assert sorted(log.Scalars("tune/return")[0].value for log in logged) == pytest.approx([81.2, 90.2])
    assert all("_hparams_/session_start_info" in log.PluginTagToContent("hparams") for log in logged)


def test_steps_to_target_ends_runs_that_met_it():
    run("--strategy", "grid", "--objective", "steps-to-target", "--space", "clip-coef=0.1,4.0", "--pruner", "none",
        flags=["--seconds", "2"])  # fmt: skip
    study = load("tune-grid")
    by_clip = {trial.params["clip-coef"]: trial for trial in study.trials}
    assert by_clip[4.0].value == 250  # there, 480.1 / 4 > 100
    assert by_clip[0.1].value == pytest.approx(1000 * (2 - 0.901))
    assert study.best_trial == by_clip[4.0]
    runs = {clip: Path("runs") / name for name, clip in started()}
    assert (runs[0.1] / "finished").exists() and not (runs[4.0] / "finished").exists()
    assert (runs[4.0] / "best.pt").exists()
    assert by_clip[4.0].intermediate_values == dict.fromkeys((250, 500, 750, 1000), 250)  # others are judged by it


def test_targets_that_are_to_be_held():
    words = ["--strategy", "grid", "--objective", "steps-to-target", "--hold", "3", "--space", "clip-coef=2.5,4.0"]
    run(*words, flags=["--seconds", "2"])
    by_clip = {trial.params["clip-coef"]: trial for trial in load("tune-grid").trials}
    assert by_clip[4.0].value == 250 and by_clip[4.0].intermediate_values == {250: 1000, 500: 1000, 750: 250, 1000: 250}
    assert by_clip[2.5].value == 500  # there, 330.1 / 2 > 100; at 250 it was not


def test_studies_of_a_grid_differ_in_their_order():
    orders = []
    for study in ("one", "two"):
        run("--strategy", "grid", "--study", study, "--space", "clip-coef=0.01,0.02,0.03,0.04", "--pruner", "none")
        orders.append([trial.params["clip-coef"] for trial in load(study).trials])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_equal_steps_are_those_of_equal_intervals():
    flags = ["--eval-interval", "240"]  # as where iterations are longer: evaluations come at 250, 500, ...
    run("--strategy", "grid", "--space", "clip-coef=0.1", "ent-coef=0.1,0.2", "--pruner", "none", flags=flags)
    assert set(load("tune-grid").trials[0].intermediate_values) == {240, 480, 720, 960}


def test_one_seed_has_no_spread():
    said = tune.verdict(tune.Args(), [80.0], [81.0])
    assert said.endswith("better by 1.0. With one seed, nobody knows whether that is more than seeds differ by.")
    assert "more than the seeds' spread, 1.0 from worst" in tune.verdict(tune.Args(), [80.0, 81.0], [90.0, 90.5])


def test_flags_as_words():
    settings = dict(norm_adv=True, clip_vloss=False, learning_rate=1e-4, num_steps=128)
    assert tune.as_flags(settings) == "--norm-adv --no-clip-vloss --learning-rate 0.0001 --num-steps 128"


def test_failures_are_told_and_the_study_goes_on(capfd):
    run("--strategy", "grid", "--space", "clip-coef=0.5,0.6,0.1")
    by_clip = {trial.params["clip-coef"]: trial for trial in load("tune-grid").trials}
    assert {clip: trial.state.name for clip, trial in by_clip.items()} == {0.5: "FAIL", 0.6: "FAIL", 0.1: "COMPLETE"}
    assert by_clip[0.5].user_attrs["reason"] == "seed 1: error: the losses are not finite"
    assert "not finite: evaluation at 250 steps: return nan" in by_clip[0.6].user_attrs["reason"]
    out = capfd.readouterr().out
    assert "3 of 3 trials, 0 pruned, 2 failed" in out and "seed 1: error: the losses are not finite" in out


def test_a_bad_trial_is_pruned_and_its_run_ended():
    words = ["--strategy", "grid", "--space", "clip-coef=0.01,0.02,0.3,0.31,0.32,0.33", "--startup-trials", "2"]
    run(*words, flags=["--seconds", "0.4"])
    trials = load("tune-grid").trials
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert pruned and all(len(trial.intermediate_values) < 4 for trial in pruned)
    for trial in pruned:
        before = [t.intermediate_values[250] for t in trials[: trial.number] if t.state.name == "COMPLETE"]
        assert trial.intermediate_values[250] < np.median(before)
        assert not Path(f"runs/tune-grid/trial-{trial.number}-seed-1/finished").exists()


@pytest.mark.parametrize("strategy", ["random", "tpe"])
def test_searches_go_on_where_they_were(strategy, capfd):
    words = ["--strategy", strategy, "--space", "clip-coef=0.01:0.3", "ent-coef=0.001:0.1:log", "norm-adv=true,false",
             "--startup-trials", "2", "--pruner", "hyperband"]  # fmt: skip
    run(*words, "--trials", "3")
    run(*words, "--trials", "5")
    study = load(f"tune-{strategy}")
    assert len(study.trials) == len(started()) == 5 and len({clip for _, clip in started()}) == 5
    assert "goes on after 3 trials of 5" in capfd.readouterr().out
    made = {file.name for file in Path(f"runs/tune-{strategy}").glob("*.png")}
    assert made == {"history.png", "importances.png", "slices.png", "interactions.png"}
    with pytest.raises(SystemExit, match="was begun with other flags \\(space\\)"):
        run(*words[:2], "--space", "clip-coef=0.1:0.2", "--trials", "6")
    shutil.move(f"runs/tune-{strategy}/study.log", "elsewhere")
    with pytest.raises(SystemExit, match="has trials of another study"):
        run(*words, "--trials", "6")


@pytest.mark.parametrize("strategy, workers", [("random", "2"), ("tpe", "1")])
def test_a_study_of_the_same_name_draws_the_same(strategy, workers, tmp_path, monkeypatch):
    words = ["--strategy", strategy, "--space", "clip-coef=0.01:0.3", "norm-adv=true,false", "--startup-trials", "2",
             "--pruner", "none"]  # fmt: skip
    run(*words, "--study", "one", "--trials", "5")
    run(*words, "--study", "two", "--trials", "5")
    one, two = ({trial.number: trial.params for trial in load(study).trials} for study in ("one", "two"))
    assert one != two
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("pretender.py", "elsewhere")
    monkeypatch.chdir("elsewhere")
    run(*words, "--study", "one", "--trials", "3", "--workers", workers)  # in two parts
    run(*words, "--study", "one", "--trials", "5", "--workers", workers)
    assert {trial.number: trial.params for trial in load("one").trials} == one


def test_tpe_begins_with_the_flags_given_where_they_lie_in_the_space(monkeypatch):
    drawn = []
    monkeypatch.setattr(tune, "draw_curves", lambda trials, *_: drawn.append([label for label, _ in trials]))
    sizes = ["num-envs=8,10", "num-steps=2048,4000", "minibatch-size=100,256"]  # 2048 takes 256 alone
    flags = ["--clip-coef", "0.02", "--num-steps", "4000", "--minibatch-size", "100"]
    for number, (space, begins) in enumerate([
        (["clip-coef=0.01:0.3", "norm-adv=true,false", *sizes], True), (["clip-coef=0.02,0.3", "ent-coef=0.001"], True),
        (["clip-coef=0.1:0.3"], False), (["clip-coef=0.01:0.3", "ent-coef=0.002"], False),
    ]):  # fmt: skip
        run("--study", f"begins-{number}", "--space", *space, "--trials", "1", flags=flags)
        assert len(load(f"begins-{number}").trials) == 1
        settings = json.loads(Path(f"runs/begins-{number}/trial-0.json").read_text())
        as_given = settings | dict(clip_coef=0.02, num_steps=4000, minibatch_size=100, ent_coef=0.001, num_envs=10)
        assert (settings == as_given and not settings["norm_adv"]) is begins
        assert drawn.pop() == ["trial 0" + ", the flags given" * begins]


def test_results_are_exact_in_any_encoding():
    """Rounded to 0.1 these are ties, and 100.04 is not above 100."""
    words = ["--strategy", "grid", "--seeds", "0", "--pruner", "none", "--space"]
    out = begin(*words, "clip-coef=0.01,0.0101,0.0102", environment={"PYTHONIOENCODING": "latin-1"}).communicate()[0]
    assert (
        "3 of 3 trials, 0 pruned, 0 failed" in out and b"\xb1" in Path("runs/tune-grid/trial-0-seed-0.log").read_bytes()
    )
    assert load("tune-grid").best_value == 80 + 100 * 0.0102
    assert json.loads(Path("runs/tune-grid/best.json").read_text())["clip_coef"] == 0.0102
    out = begin(*words, "clip-coef=0.2004,0.1", "--objective", "steps-to-target", "--study", "steps",
                environment={"PYTHONIOENCODING": "ascii:backslashreplace"}).communicate()[0]  # fmt: skip
    assert load("steps").best_trial.params["clip-coef"] == 0.2004 and load("steps").best_value == 1000


def test_labels_of_a_step_are_exact():
    assert tune.as_flags(dict(learning_rate=1.2345678e-4)) == "--learning-rate 0.00012345678"
    assert tune.on_grid({"a": (0.1230, 0.1231, False)}, 3) == {"a": [0.123]}  # none twice


@pytest.mark.parametrize("script", [ppo_ballbot, ppo_ballbot_schedules])
def test_a_run_logs_each_evaluation_once_also_when_it_goes_on(script, monkeypatch):
    args = dict(frame_skip=1, num_threads=1, terrain="flat", cameras=False, num_envs=2, num_steps=32,
                minibatch_size=32, hidden_size=8, eval_interval=128, run_name="run")  # fmt: skip
    figures = {key + end: 1.0 for key in ("episodic_return", "episodic_length", "falls") for end in ("", "_std")}
    returns = iter([1 / 3, 2.0, 3.0, 2.0, 3.0, 1.0, 4.0, 5.0])  # the last evaluation is not the best
    evaluate = lambda agent, args, episodes: figures | dict(episodes=episodes, episodic_return=next(returns))  # noqa: E731
    monkeypatch.setattr(script, "evaluate", evaluate)

    def train(**flags):
        run = script.train(script.Args(**flags))
        entries = ballbot_runs.read_metrics(run)
        assert all(figures.keys() <= entry.keys() for entry in entries)
        log = EventAccumulator(str(run)).Reload().Scalars("eval/episodic_return")
        seconds = [entry["seconds"] for entry in entries]
        assert seconds == sorted(seconds) and 0 < seconds[0] < 1e4
        found = [(entry["kind"], entry["global_step"], entry["episodic_return"]) for entry in entries]
        return found, [event.step for event in log]

    first = [("evaluation", 128, 1 / 3)]
    assert train(**args, total_timesteps=192) == ([*first, ("final", 192, 2.0), ("best", 128, 3.0)], [128, 192])
    with open("runs/run/metrics.jsonl", "a") as file:  # of an iteration that was lost, and a torn line
        file.write(json.dumps(dict(kind="evaluation", global_step=256, seconds=9.0)) + '\n{"kind": "eval')
    Path("runs/run/best.pt").unlink()  # as if it had ended in its final evaluation
    assert train(resume="runs/run") == ([*first, ("final", 192, 2.0), ("best", 128, 3.0)], [128, 192])
    first.append(("evaluation", 256, 1.0))
    assert train(resume="runs/run", total_timesteps=256)[0] == [*first, ("final", 256, 4.0), ("best", 128, 5.0)]


# Random search


def test_random_search_tries_no_combination_twice_and_ends(capfd):
    words = ["--strategy", "random", "--pruner", "none", "--space", "clip-coef=0.01,0.1", "num-envs=8,10"]
    run(*words, "--trials", "3")
    assert "combinations" not in capfd.readouterr().out
    run(*words, "--trials", "9")
    assert "4 of 4 trials" in (out := capfd.readouterr().out) and "all 4 combinations of --space are tried" in out
    assert len({tuple(trial.params.values()) for trial in load("tune-random").trials}) == 4 == len(started())
    assert {clip for _, clip in started()} == {0.01, 0.1}


def test_combinations_by_hand():
    """They follow from the trials before: retried ones, ones whose worker says nothing yet, and ones long done."""
    space = {"a": [1, 2], "b": (1, 3, False), "c": (7, 8, True)}
    search = tune.Search(tune.Args("random"), "x", {}, space, {}, (1,), 1, False, 0.0)
    assert tune.num_combinations(search) == 12
    created = []

    def trial(history=None):
        system = {"retry_history": history} if history else {}
        created.append(optuna.trial.create_trial(value=0.0, system_attrs=system))
        created[-1].number = len(created) - 1
        return tune.untried(search, created)

    drawn = [trial() for _ in range(5)]
    assert trial([2]) == drawn[2] and trial([2, 5]) == drawn[2]
    drawn += [trial() for _ in range(7)]
    assert {tuple(one.values()) for one in drawn} == {(a, b, c) for a in (1, 2) for b in (1, 2, 3) for c in (7, 8)}
    assert trial() is None
    for i, one in enumerate(drawn):  # as an earlier version may have drawn
        created[i].params, created[i].system_attrs = drawn[0 if i == 2 else i], {}
    assert tune.untried(search, created[:13]) == drawn[2]
    assert tune.num_combinations(replace(search, space={"a": (0.0, 1.0, False)})) == float("inf")


# Ends of all kinds


HOLDER = """
import optuna, os, time
from ballbot_utils import tune
def hold(*_):
    print("holds it", flush=True)
    time.sleep(100)
os.fsync = hold
search = tune.Search(tune.Args(), "tune-grid", {}, {}, {}, (), 0, True, 0.0)
optuna.create_study(study_name="other", storage=tune.open_storage(search))
"""


def hold_lock():
    """A process in the midst of writing to the study's file."""
    Path("runs/tune-grid").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "holds it\n"
    return holder


def test_a_process_killed_as_it_writes_to_the_study_leaves_no_lock():
    holder = hold_lock()
    holder.kill()
    holder.communicate()
    process = begin("--strategy", "grid", "--space", "clip-coef=0.01,0.1", "--seeds", "1")
    assert "2 of 2 trials, 0 pruned, 0 failed" in process.communicate(timeout=200)[0]


def test_ctrl_c_ends_a_command_that_waits_for_the_study():
    process = begin("--strategy", "grid", "--space", "clip-coef=0.01,0.1", "--seeds", "1", "--", "--seconds", "60")
    wait_for(started, 120)
    holder = hold_lock()
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=200)
    assert time.monotonic() - before < 2 * tune.GRACE
    holder.kill()
    holder.communicate()


@pytest.mark.parametrize(
    "fault, said",
    [
        (-9, "killed by SIGKILL"),
        (130, "killed by SIGINT"),
        (os.EX_TEMPFAIL, "cannot write last.pt (No space left on device)"),
    ],
)
def test_a_fault_of_the_machine_is_not_one_of_the_parameters(fault, said, capfd):
    Path("fault").write_text(str(fault))
    words = ["--strategy", "grid", "--space", "clip-coef=0.01,0.1"]
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert error.value.code == (
        f"error: trial 0, seed 1: {said}: mend that (make room, or give fewer --workers); then the same command goes on"
    )
    run(*words)
    assert "2 of 2 trials, 0 pruned, 0 failed" in capfd.readouterr().out
    assert len(started()) == 3 and load("tune-grid").trials[-1].state.name == "COMPLETE"


def test_a_worker_meets_a_fault_of_the_machine_and_another_goes_on():
    Path("fault").write_text("-9")
    out = begin("--strategy", "grid", "--space", "clip-coef=0.01,0.1", "--seeds", "1", workers=2).communicate()[0]
    assert "2 of 2 trials, 0 pruned, 0 failed" in out and out.count("killed by SIGKILL") == 1
    assert "Traceback" not in out and len(started()) == 3


def test_a_full_disk_ruins_no_study(monkeypatch, capfd):
    words = ["--strategy", "grid", "--space", "clip-coef=0.01,0.1"]
    fsync, count = os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count > 12:  # some of a line is written
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 5)
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=r"^error: \[Errno 28\] No space left on device: mend that \(make room"):
        run(*words)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(tune, "process_mark", lambda pid: f"{pid} another")  # it is in a new process
    assert not Path("runs/tune-grid/study.log").read_bytes().endswith(b"\n")
    run(*words)
    assert "2 of 2 trials, 0 pruned, 0 failed" in capfd.readouterr().out
    run(*words)  # its file is readable


def test_a_real_run_says_by_its_exit_status_that_the_machine_is_at_fault():
    flags = (
        "--no-cameras --terrain flat --num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 256 --run-name "
    )
    statuses = {}
    for name, more, output in (("full", "", "/dev/full"), ("refused", "--gamma 2", os.devnull)):
        words = [sys.executable, ROOT / "ppo_ballbot.py", *flags.split(), name, *more.split()]
        with open(output, "w") as stdout:
            done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True)
        statuses[name] = done.returncode
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert statuses == {"full": os.EX_TEMPFAIL, "refused": 1}

    def train(args):
        raise MemoryError

    with pytest.raises(SystemExit) as error:
        ballbot_runs.main(lambda: ppo_ballbot.Args(run_name="none"), train)
    assert error.value.code == os.EX_TEMPFAIL


def test_a_script_that_logs_no_evaluation_ends_the_command():
    Path("pretender.py").write_text(PRETENDER.replace("metrics.jsonl", "other.jsonl"))
    with pytest.raises(SystemExit, match="ended without an evaluation in runs/tune-grid/trial-0-seed-1"):
        run("--strategy", "grid", "--space", "clip-coef=0.01,0.1")


def test_budget_ends_in_time_and_loses_nothing():
    words = ["--strategy", "grid", "--space", "clip-coef=0.01,0.1", "--pruner", "none", "--budget-minutes", "0.03"]
    before = time.monotonic()
    run(*words, flags=["--seconds", "60"])
    run(*words, flags=["--seconds", "60"])
    assert time.monotonic() - before < 20
    first, second = load("tune-grid").trials
    assert first.user_attrs["lost"] == second.user_attrs["lost"] == "the budget was spent"
    assert first.params == second.params and len(started()) == 2


def test_interrupt_then_the_same_command(capfd):
    words = ["--strategy", "grid", "--space", "clip-coef=0.01,0.1,0.2", "--seeds", "1"]
    process = begin(*words, "--", "--seconds", "1")
    wait_for(lambda: len(started()) == 2)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=20)[0]
    assert process.returncode == 1 and out.endswith("stopped; the same command goes on\n") and "Traceback" not in out
    assert "0 of 3 trials, 0 pruned, 0 failed, best return none yet, ? left" in out  # the live line
    assert not (Path("runs") / started()[1][0] / "finished").exists()
    assert Path("runs/tune-grid/best.json").exists()  # of the first
    run(*words, flags=["--seconds", "1"])
    out = capfd.readouterr().out
    assert "goes on after 1 trials of 3" in out and "3 of 3 trials, 0 pruned, 0 failed" in out
    complete = [t.params["clip-coef"] for t in load("tune-grid").trials if t.state.name == "COMPLETE"]
    assert sorted(complete) == [0.01, 0.1, 0.2]
    assert len(started()) == 4  # the interrupted one twice


def test_finished_seeds_of_a_trial_cut_short_are_kept():
    words = ["--strategy", "grid", "--space", "clip-coef=0.1", "norm-adv=false,true", "--trials", "1"]
    words += ["--seeds", "1", "2", "3"]
    process = begin(*words, "--", "--seconds", "1")
    wait_for(lambda: len(started()) == 2)
    process.kill()
    process.communicate()
    run(*words, flags=["--seconds", "1"])
    run(*words, "--study", "whole", flags=["--seconds", "0"])
    ours, whole = (load(name).trials[-1] for name in ("tune-grid", "whole"))
    names = [name for name, _ in started()]
    assert names[:4] == [f"tune-grid/trial-{run}" for run in ("0-seed-1", "0-seed-2", "1-seed-2", "1-seed-3")]
    assert ours.user_attrs["results"] == whole.user_attrs["results"] == {"1": 90.1, "2": 90.2, "3": 90.3}
    assert ours.value == whole.value == 90.2 and ours.intermediate_values == whole.intermediate_values


def test_two_workers_one_killed():
    words = ["--strategy", "grid", "--space", "clip-coef=0.01:0.04", "--points", "4", "--seeds", "1"]
    words += ["--pruner", "none", "--", "--seconds", "1.5"]
    process = begin(*words, workers=2)
    wait_for(lambda: len(started()) >= 2, 60)
    victim = next(t for t in load("tune-grid").trials if t.state.name == "RUNNING" and "process" in t.user_attrs)
    os.kill(int(victim.user_attrs["process"].split()[0]), signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert "4 of 4 trials, 0 pruned, 0 failed" in out
    trials = load("tune-grid").trials
    complete = sorted(t.params["clip-coef"] for t in trials if t.state.name == "COMPLETE")
    assert complete == [0.01, 0.02, 0.03, 0.04]
    assert len(trials) == 5 and trials[victim.number].state.name == "FAIL"
    assert not Path(f"runs/tune-grid/trial-{victim.number}-seed-1/finished").exists()  # its run ended with it


@pytest.mark.parametrize("storage", [None, "sqlite:///shared.db"])
def test_kill_all_then_the_same_command(storage, capfd):
    """Found by its pid in the study's file, and by its heartbeat in the database that machines share."""
    words = ["--strategy", "grid", "--space", "clip-coef=0.01,0.1", "--seeds", "1"]
    words += ["--storage", storage, "--heartbeat", "1"] if storage else []
    process = begin(*words, "--", "--seconds", "1")
    wait_for(lambda: len(started()) == 1)
    process.kill()
    process.communicate()
    assert states(load("tune-grid", storage)) == ["RUNNING"]
    run(*words, flags=["--seconds", "1"])
    assert "2 of 2 trials, 0 pruned, 0 failed" in capfd.readouterr().out
    first, *others = load("tune-grid", storage).trials
    assert first.state.name == "FAIL" and [trial.state.name for trial in others] == ["COMPLETE", "COMPLETE"]
    assert sorted(trial.params["clip-coef"] for trial in others) == [0.01, 0.1]
    assert not Path("runs/tune-grid/trial-0-seed-1/finished").exists()  # its run ended with it


def test_what_counts_by_hand():
    """Trial 1 was interrupted and queued again by two commands at once; trial 3 found that others were enough."""

    def trial(number, history=None, **user_attrs):
        system = {"retry_history": history} if history else {}
        return optuna.trial.create_trial(value=0.0, user_attrs=user_attrs, system_attrs=system), number

    made = [
        trial(0),
        trial(1, lost="interrupted"),
        trial(2),
        trial(3, lost="one too many"),
        trial(4, [1]),
        trial(5, [1]),
    ]
    for frozen, number in made:
        frozen.number = number
    assert tune.lost_numbers([frozen for frozen, _ in made]) == {1, 3, 5}


def test_a_trial_given_up_by_others_is_not_told_twice(monkeypatch):
    """Its machine slept, say: another found it dead while it went on."""
    report = optuna.trial.Trial.report

    def late(trial, value, step):
        if trial.number == 0:
            trial.study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
            tune.again(trial.study, trial.study._storage.get_trial(trial._trial_id))
        report(trial, value, step)

    monkeypatch.setattr(optuna.trial.Trial, "report", late)
    run("--strategy", "grid", "--space", "clip-coef=0.01,0.1", "--pruner", "none")
    assert states(load("tune-grid")) == ["FAIL", "COMPLETE", "COMPLETE"]


# Step by step


def test_one_at_a_time_keeps_the_best_and_goes_on(capfd):
    words = ["--strategy", "one-at-a-time", "--seeds", "1", "2", "--pruner", "none", "--space"]
    words += ["clip-coef=0.01,0.015,0.1,0.5", "ent-coef=0.1", "learning-rate=0.01,0.02"]
    run(*words)
    out = capfd.readouterr().out
    report = Path("runs/tune-one-at-a-time/report.md").read_text()
    assert report in out
    assert "Changes kept: `--clip-coef 0.1`" in report  # the learning rate changes nothing here
    rows = [line for line in report.splitlines() if line.startswith(("| `", "| as"))]
    assert rows == [
        "| `baseline` | 81.7 | 81.6 to 81.7 |  |",
        "| as before | 81.7 | 81.6 to 81.7 |  |",
        "| `--clip-coef 0.01` | 81.2 | 81.1 to 81.2 |  |",
        "| `--clip-coef 0.1` | 90.2 | 90.1 to 90.2 | **kept** |",
        "| `--clip-coef 0.5` |  |  | failed: seed 1: error: the losses are not finite |",
        "| as before | 90.2 | 90.1 to 90.2 |  |",
        "| `--learning-rate 0.01` | 90.2 | 90.1 to 90.2 |  |",
        "| `--learning-rate 0.02` | 90.2 | 90.1 to 90.2 |  |",
    ]
    assert "better by 8.5. That is more than the seeds' spread, 0.1 from worst to best" in report
    assert Path("runs/tune-one-at-a-time/report.png").stat().st_size > 10_000
    count = len(started())
    run(*words)
    assert len(started()) == count and Path("runs/tune-one-at-a-time/report.md").read_text() == report
    assert {clip for name, clip in started() if "learning-rate" in name} == {0.1}  # on top of what was kept
    assert json.loads(Path("runs/tune-one-at-a-time/best.json").read_text())["ent_coef"] == 0.1  # in all trials


def test_six_steps_with_a_budget_and_without():
    words = ["--strategy", "six-steps", "--pruner", "none"]
    run(*words, "--budget-minutes", "0.02")
    report = Path("runs/tune-six-steps/report.md").read_text()
    assert "It ended in step" in report and "| not run |" in report
    run(*words)
    report = Path("runs/tune-six-steps/report.md").read_text()
    titles = [line.split(". ")[1] for line in report.splitlines() if line.startswith("## ") and "." in line]
    assert titles == ["Baseline", "Learning rate", "Clip range", "Exploration, entropy", "Exploration, initial noise",
                      "Architecture, width", "Architecture, layers", "Validation"]  # fmt: skip
    assert "Changes kept: `--clip-coef 0.03`" in report and "It ended" not in report
    assert "| `--pi-layers 2 --vf-layers 2` |" in report and "| `--init-log-std -0.5` |" in report
    assert "| `baseline` | 91.5 | 82.5 to 111.5 |  |" in report and "| `winner` | 93.0 | 84.0 to 113.0 |  |" in report
    assert "better by 1.5. That is not more than the seeds' spread, 29.0" in report
    assert json.loads(Path("runs/tune-six-steps/best.json").read_text())["clip_coef"] == 0.03


# Databases


@pytest.fixture
def postgresql():
    """The address of a PostgreSQL server of our own, from the Debian package postgresql."""
    found = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    programs = next((Path(path).resolve().parent for path in found if path), None)
    if programs is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    user = {}
    if os.getuid() == 0:  # as which it refuses to run
        shutil.chown(folder, "postgres")
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program, *words):
        done = subprocess.run([programs / program, "-D", folder / "data", *words], cwd=folder, **user, timeout=60,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr

    try:
        call("initdb", "-A", "trust", "-U", "tune", "--no-sync")
        call("pg_ctl", "-w", "-l", folder / "log", "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
        yield f"postgresql+psycopg://tune@127.0.0.1:{port}/postgres"
        call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_four_workers_on_postgresql_one_killed(postgresql):
    words = ["--strategy", "grid", "--space", "clip-coef=0.01:0.08", "--points", "8", "--seeds", "1"]
    words += ["--pruner", "none", "--storage", postgresql, "--heartbeat", "1", "--", "--seconds", "1.5"]
    machines = [begin(*words, workers=2) for _ in range(2)]
    wait_for(lambda: len(started()) >= 4, 120)
    killed = None
    while killed is None:
        trials = load("tune-grid", postgresql).trials
        running = [trial for trial in trials if trial.state.name == "RUNNING" and "process" in trial.user_attrs]
        assert len({trial.user_attrs["process"] for trial in running}) > 1
        worker = int(running[-1].user_attrs["process"].split()[0])
        os.kill(worker, signal.SIGSTOP)  # its trial may just have ended
        if load("tune-grid", postgresql).trials[running[-1].number].state.name == "RUNNING":
            killed = running[-1].number
        os.kill(worker, signal.SIGCONT if killed is None else signal.SIGKILL)
    for machine in machines:
        assert "8 of 8 trials, 0 pruned, 0 failed" in machine.communicate(timeout=120)[0]
    trials = load("tune-grid", postgresql).trials
    complete = sorted(trial.params["clip-coef"] for trial in trials if trial.state.name == "COMPLETE")
    assert complete == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    assert trials[killed].state.name == "FAIL"


# Real runs


def test_a_copy_of_a_script_is_the_one_that_is_asked():
    text = (ROOT / "ppo_ballbot.py").read_text()
    Path("ppo_ballbot.py").write_text(text.replace("    seed: int = 1 ", "    mine: float = 2.0\n    seed: int = 1 "))
    module, base = tune.base_settings(Path("ppo_ballbot.py"), ["--mine", "3"])
    assert base["mine"] == 3 and "mine" in tune.parse_space(["mine=1,2"], module)


def test_real_trials(capfd):
    for name in ("assets", "ballbot_utils"):
        Path(name).symlink_to(ROOT / name)
    for name in ("ppo_ballbot.py", "ballbot_env.py", "ballbot_runs.py"):
        shutil.copy(ROOT / name, name)
    flags = "--frame-skip 1 --no-cameras --num-steps 32 --minibatch-size 32 --total-timesteps 128 --eval-interval 64 "
    flags += "--eval-episodes 1 --final-eval-episodes 1"
    args = tune.Args(strategy="random", trials=1, seeds=(1,), space=("clip-coef=0.01:0.3:log", "num-envs=2"),
                     script=Path("ppo_ballbot.py"))  # fmt: skip
    tune.main(args, flags.split())
    study = load("tune-random")
    for trial in study.trials:
        assert trial.state.name == "COMPLETE" and list(trial.intermediate_values) == [64, 128]
        run = Path(f"runs/tune-random/trial-{trial.number}-seed-1")
        assert {"best.pt", "last.pt", "config.json"} <= {file.name for file in run.iterdir()}
        settings = json.loads((run / "config.json").read_text())
        assert (settings["clip_coef"], settings["num_envs"]) == (trial.params["clip-coef"], 2)
        assert f"final policy: return {trial.value:.1f}" in Path(f"{run}.log").read_text()
    assert "too short for a diagnosis" in capfd.readouterr().out
    best = ["--config", "runs/tune-random/best.json", "--run-name", "again"]
    out = subprocess.run([sys.executable, "ppo_ballbot.py", *best], capture_output=True, text=True)
    assert f"final policy: return {study.best_value:.1f}" in out.stdout
