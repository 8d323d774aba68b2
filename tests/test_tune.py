"""Tuning: the space and its errors, studies of a program that only pretends to train, and a study of real runs."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_ballbot
from ballbot_utils import tune
from ballbot_utils.flags import format_flags
from ballbot_utils.tune import __main__ as program
from ballbot_utils.tune import space, trial

ROOT = Path(__file__).resolve().parents[1]
# Returns rise with --clip-coef, and by 0.1 with the seed; at 0.5 it crashes, at 0.6 its return is not a number. A file
# named fault ends it by that signal or exit status, once.
PRETENDER = """
import argparse, json, os, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

Agent = Policy = None

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

def parse_args():
    parser = argparse.ArgumentParser()
    for name, value in asdict(Args()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    config = json.loads(Path(given["config"]).read_text()) if "config" in given else {}
    return Args(**{**config, **given})

if __name__ == "__main__":
    args = parse_args()
    run = Path("runs") / args.run_name
    run.mkdir(parents=True)
    with open("started", "a") as file:
        file.write(f"{args.run_name} {args.clip_coef}\\n")
    if args.clip_coef == 0.5:
        sys.exit("error: the losses are not finite")
    quality = 80 + 100 * args.clip_coef + args.seed / 10 if args.clip_coef != 0.6 else float("nan")
    if os.path.exists("fault"):
        fault = int(open("fault").read())
        os.remove("fault")
        print("error: cannot write last.pt (No space left on device): make room, then to resume: ...", flush=True)
        sys.exit(fault) if fault > 0 else os.kill(os.getpid(), -fault)

    def log(kind, steps, value):
        print(kind, steps, "±", flush=True)
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
    """A working directory with the program; signal handlers are restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "pretender.py").write_text(PRETENDER)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for name, handler in handlers.items():
        signal.signal(name, handler)


def start(*words, environment=(), **kwargs):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "ballbot_utils.tune", "--script", "pretender.py", "--seeds", "1", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            **kwargs)  # fmt: skip


def run(*words, flags=()):
    """The command in this process."""
    program.main(tyro.cli(tune.Args, args=["--script", "pretender.py", "--seeds", "1", *words]), list(flags))


def load(name, storage=None):
    url = storage or f"sqlite:///runs/{name.partition('/')[0]}/study.db"
    return optuna.load_study(study_name=name, storage=url)


def started():
    """The runs that were started, and the clip coefficient of each."""
    lines = Path("started").read_text().splitlines() if Path("started").exists() else []
    return [(line.split()[0], float(line.split()[1])) for line in lines]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def by_clip(name, state=None):
    return {t.params["clip-coef"]: t for t in load(name).trials if state in (None, t.state.name)}


GRID = ["--strategy", "grid", "--pruner", "none", "--space"]


# The space


def test_space_by_hand():
    specs = space.parse_space(
        ["learning-rate=1e-5:1e-3:log", "vf-coef=0.5:2", "update-epochs=3:10", "clip-coef=0.1,0.2,0.1", "gamma=0.99",
         "norm-adv=true,false", "num-steps=512:4096", "pi-layers+vf-layers=2,3"], ppo_ballbot,
    )  # fmt: skip
    assert specs == {
        "learning_rate": (1e-5, 1e-3, True), "vf_coef": (0.5, 2.0, False), "update_epochs": (3, 10, False),
        "clip_coef": [0.1, 0.2], "gamma": [0.99], "norm_adv": [True, False], "num_steps": [512, 1024, 2048, 4096],
        "pi_layers+vf_layers": [2, 3],
    }  # fmt: skip
    assert isinstance(specs["update_epochs"][0], int) and isinstance(specs["vf_coef"][1], float)
    grid = space.on_grid({"a": (1e-5, 1e-3, True), "b": (0.5, 2.0, False), "c": (3, 4, False), "d": [1, 2]}, 3)
    assert grid == {"a": [1e-5, 1e-4, 1e-3], "b": [0.5, 1.25, 2.0], "c": [3, 4], "d": [1, 2]}
    assert space.on_grid({"a": (0.1230, 0.1231, False)}, 3) == {"a": [0.123]}  # no value twice
    finite = space.Space({}, {"a": [1, 2], "b": (1, 3, False)})
    found = [tuple(params.values()) for params in finite.combinations()]
    assert found == [(a, b) for a in (1, 2) for b in (1, 2, 3)]
    for spec in ((0.0, 1.0, False), (1, 3, True), (1, 10_000, False)):
        assert space.Space({}, {"a": [1, 2], "b": spec}).combinations() is None


def test_the_default_space_is_possible():
    module, base = space.load_script(ROOT / "ppo_ballbot.py", [])
    built = space.build_space(space.parse_space(space.SPACE, module), module, base)
    sizes = "num-steps, num-envs, minibatch-size"
    assert set(built.specs) == {text.partition("=")[0] for text in space.SPACE} - set(sizes.split(", ")) | {sizes}
    assert len(built.options[sizes]) == 79  # of 80, if they divide
    assert built.base["clip_coef"] == 0.015
    _, tuned = space.load_script(ROOT / "ppo_ballbot_schedules.py", ["--preset", "tuned", "--num-envs", "32"])
    assert (tuned["num_envs"], tuned["lr_schedule"]) == (32, "linear")


def test_sizes_only_where_they_divide():
    module, base = space.load_script(ROOT / "ppo_ballbot.py", ["--num-processes", "2"])
    texts = ["num-steps=100,128", "num-envs=3,4,6", "minibatch-size=64,200", "gamma=0.9"]
    built = space.build_space(space.parse_space(texts, module), module, base)
    ((key, labels),) = built.specs.items()
    chosen = [built.settings({key: label}) for label in labels]
    found = {(c["num_steps"], c["num_envs"], c["minibatch_size"]) for c in chosen}
    assert found == {(s, e, m) for s in (100, 128) for e in (4, 6) for m in (64, 200) if s * e % m == 0}  # 3 is odd
    assert all(c["gamma"] == 0.9 for c in chosen)


@pytest.mark.parametrize(
    ("words", "flags", "message"),
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
        (["--space", "clip-coef=0.1,0.2"], ["--lerning-rate", "1"], "rejects the flags after --:"),
        (["--space", "clip-coef=0.1,0.2"], ["--learning-rate", "2"], "--learning-rate is 2.0"),
        (["--trials", "0"], [], "--trials is 0: give 1 or more"),
        (["--study", "a/b"], [], "--study is a/b"),
        (["--study", ".."], [], "--study is .."),
        (["--strategy", "six-steps", "--trials", "3"], [], "--trials has no effect"),
        (["--strategy", "grid", "--points", "30", "--space", "clip-coef=0:1", "ent-coef=0:1", "init-log-std=0:1"], [],
         "the grid has 27,000 combinations"),
        (["--storage", "nonsense://a:secret@x", "--space", "clip-coef=0:1"], [], "the nonsense --storage cannot"),
        (["--script", "none.py"], [], "--script none.py does not exist"),
        (["--study", "old"], [], "runs/old is of an earlier version"),
    ],
)  # fmt: skip
def test_errors_are_one_line_before_any_trial(words, flags, message):
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/study.log").touch()  # a journal
    with pytest.raises(SystemExit) as error:
        run("--space", "clip-coef=0.1,0.2", *words, flags=flags)
    text = str(error.value.code)
    assert text.startswith("error: ") and message in text and "\n" not in text
    assert "secret" not in text and not started()


def test_a_copy_of_a_script_is_the_one_that_is_loaded():
    text = (ROOT / "ppo_ballbot.py").read_text()
    Path("ppo_ballbot.py").write_text(text.replace("    seed: Seed = 1 ", "    mine: float = 2.0\n    seed: Seed = 1 "))
    module, base = space.load_script(Path("ppo_ballbot.py"), ["--mine", "3"])
    assert base["mine"] == 3 and "mine" in space.parse_space(["mine=1,2"], module)


# The objective


def test_score_by_hand():
    evaluations = [(100, 50.0, 3000.0), (200, 101.0, 1500.0), (300, 101.0, 3001.0), (400, 90.0, 4000.0)]
    assert trial.score("return", evaluations, 1000) == 90
    assert trial.score("length", evaluations, 1000) == 4000
    assert trial.score("steps-to-target", evaluations, 1000) == 300
    assert trial.score("steps-to-target", evaluations[:2], 1000) == 1500  # the length is half of its target
    assert trial.score("steps-to-target", evaluations[:1], 1000) == 1500  # so is the return
    assert trial.score("steps-to-target", [(100, -5.0, 10.0)], 1000) == 2000
    evaluations[3:] = [(400, 99.0, 4000.0), (500, 102.0, 3500.0), (600, 101.0, 4000.0)]
    assert trial.score("steps-to-target", evaluations, 1000, hold=2) == 500  # 300 did not hold
    assert trial.score("steps-to-target", evaluations[:5], 1000, hold=2) == 1000


@pytest.mark.slow
def test_median_over_seeds_and_best_json():
    run(*GRID, "clip-coef=0.01,0.1002,0.1001", "--seeds", "9", "1", "2", flags=["--learning-rate", "0.001"])
    trials = by_clip("tune-grid")
    assert {clip: t.value for clip, t in trials.items()} == pytest.approx({0.01: 81.2, 0.1001: 90.21, 0.1002: 90.22})
    assert trials[0.1002].user_attrs["results"] == pytest.approx({"9": 90.92, "1": 90.12, "2": 90.22})
    best = json.loads(Path("runs/tune-grid/best.json").read_text())
    assert (best["clip_coef"], best["learning_rate"]) == (0.1002, 0.001)  # exact: rounded, 0.1001 would be as good
    assert not {"run_name", "config", "resume"} & set(best)
    assert "evaluation 250" in Path("runs/tune-grid/trial-0-seed-9.log").read_text()
    assert {file.name for file in Path("runs/tune-grid").glob("*.png")} == {"history.png", "slices.png"}
    logs = [EventAccumulator(str(file)).Reload() for file in Path("runs/tune-grid/hparams").glob("trial-*/events*")]
    logged = [log for log in logs if "tune/return" in log.Tags()["scalars"]]
    values = [log.Scalars("tune/return")[0].value for log in logged]
    assert sorted(values) == pytest.approx([81.2, 90.21, 90.22])
    assert all("_hparams_/session_start_info" in log.PluginTagToContent("hparams") for log in logged)


@pytest.mark.slow
def test_steps_to_target_ends_runs_that_met_it():
    words = ["--objective", "steps-to-target", *GRID, "clip-coef=0.1,2.5,4.0"]
    run(*words, flags=["--seconds", "2"])
    trials = by_clip("tune-grid")
    assert trials[4.0].value == 250  # there, 480.1 / 4 > 100
    assert trials[0.1].value == pytest.approx(1000 * (2 - 0.901))
    runs = {clip: Path("runs") / name for name, clip in started()}
    assert (runs[0.1] / "finished").exists() and not (runs[4.0] / "finished").exists()
    assert (runs[4.0] / "best.pt").exists()
    assert trials[4.0].intermediate_values == dict.fromkeys((250, 500, 750, 1000), 250)  # compared at later steps too
    run(*words, "--hold", "3", "--study", "hold", flags=["--seconds", "2"])
    trials = by_clip("hold")
    assert trials[4.0].value == 250 and trials[4.0].intermediate_values == {250: 1000, 500: 1000, 750: 250, 1000: 250}
    assert trials[2.5].value == 500  # there, 330.1 / 2 > 100, and not at 250


def test_values_are_reported_at_whole_intervals():
    run(*GRID, "ent-coef=0.1,0.2", flags=["--eval-interval", "240"])  # iterations are longer: at 250, 500, ...
    assert set(load("tune-grid").trials[0].intermediate_values) == {240, 480, 720, 960, 1000}


def test_failures_have_a_reason_and_the_study_continues(capfd):
    run(*GRID, "clip-coef=0.5,0.6,0.1")
    trials = by_clip("tune-grid")
    assert {clip: t.state.name for clip, t in trials.items()} == {0.5: "FAIL", 0.6: "FAIL", 0.1: "COMPLETE"}
    assert trials[0.5].user_attrs["reason"] == "seed 1: error: the losses are not finite"
    assert "not finite: evaluation at 250 steps: return nan" in trials[0.6].user_attrs["reason"]
    out = capfd.readouterr().out
    assert "3 of 3 trials, 0 pruned, 2 failed" in out and "seed 1: error: the losses are not finite" in out


@pytest.mark.slow
def test_a_bad_trial_is_pruned_and_its_run_ended():
    words = ["--strategy", "grid", "--space", "clip-coef=0.01,0.02,0.3,0.31,0.32,0.33", "--startup-trials", "2"]
    run(*words, flags=["--seconds", "0.4"])
    trials = load("tune-grid").trials
    pruned = [t for t in trials if t.state.name == "PRUNED"]
    assert pruned and all(len(t.intermediate_values) < 4 for t in pruned)
    for t in pruned:
        before = [other.intermediate_values[250] for other in trials[: t.number] if other.state.name == "COMPLETE"]
        assert t.intermediate_values[250] < np.median(before)
        assert not Path(f"runs/tune-grid/trial-{t.number}-seed-1/finished").exists()


# Strategies


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "workers"), [("random", "2"), ("tpe", "1")])
def test_a_study_resumes_and_its_name_decides_what_it_tries(strategy, workers, tmp_path, monkeypatch, capfd):
    words = ["--strategy", strategy, "--space", "clip-coef=0.01:0.3", "ent-coef=0.001:0.1:log", "norm-adv=true,false",
             "--startup-trials", "2", "--pruner", "hyperband"]  # fmt: skip
    params = {}
    for name in ("one", "two"):
        run(*words, "--study", name, "--trials", "5")
        params[name] = [t.params for t in load(name).trials]
    assert params["one"] != params["two"] and len({clip for _, clip in started()}) >= 9  # tpe's first may be equal
    made = {file.name for file in Path("runs/one").glob("*.png")}
    assert made == {"history.png", "importances.png", "slices.png", "interactions.png"}
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("pretender.py", "elsewhere")
    monkeypatch.chdir("elsewhere")
    for trials in ("3", "5"):
        run(*words, "--study", "one", "--trials", trials, "--workers", workers)
    assert [t.params for t in load("one").trials] == params["one"] and len(started()) == 5
    assert "resumes after 3 of 5 trials" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="has other flags \\(space\\)"):
        run(*words[:2], "--study", "one", "--space", "clip-coef=0.1:0.2", "--trials", "6")
    Path("runs/one/study.db").unlink()
    with pytest.raises(SystemExit, match="has trials of another study"):
        run(*words, "--study", "one", "--trials", "6")


@pytest.mark.slow
def test_tpe_begins_with_the_flags_given_that_lie_in_the_space():
    sizes = ["num-envs=8,10", "num-steps=2048,4000", "minibatch-size=100,256"]  # 2048 takes 256 alone
    flags = ["--clip-coef", "0.02", "--num-steps", "4000", "--minibatch-size", "100"]
    run("--study", "one", "--space", "clip-coef=0.01:0.3", "norm-adv=true,false", *sizes, "--trials", "1", flags=flags)
    settings = json.loads(Path("runs/one/trial-0.json").read_text())
    assert [settings[key] for key in ("clip_coef", "norm_adv", "num_envs", "num_steps", "minibatch_size")] == [
        0.02, False, 10, 4000, 100]  # fmt: skip
    run(
        "--study",
        "two",
        "--space",
        "clip-coef=0.1:0.3",
        "ent-coef=0.002",
        "num-envs=10,50",
        "--trials",
        "1",
        flags=flags,
    )
    settings = json.loads(Path("runs/two/trial-0.json").read_text())
    assert settings["clip_coef"] > 0.1 and (settings["ent_coef"], settings["num_envs"]) == (0.002, 10)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "grid"])
def test_no_combination_is_tried_twice(strategy, capfd):
    words = ["--strategy", strategy, "--pruner", "none", "--space", "clip-coef=0.01,0.1", "num-envs=8,10"]
    run(*words, "--trials", "3")
    assert "combinations" not in capfd.readouterr().out
    run(*words, "--trials", "9")
    assert "4 of 4 trials" in (out := capfd.readouterr().out) and "all 4 combinations of --space are tried" in out
    assert len({tuple(t.params.values()) for t in load(f"tune-{strategy}").trials}) == 4 == len(started())


# Interruptions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [(-9, "killed by SIGKILL"), (130, "killed by SIGINT"),
     (os.EX_TEMPFAIL, "cannot write last.pt (No space left on device)")],
)  # fmt: skip
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_fault_of_the_machine_does_not_count(fault, message, workers, capfd):
    Path("fault").write_text(str(fault))
    words = [*GRID, "clip-coef=0.01,0.1", "--workers", workers]
    with pytest.raises(SystemExit, match=r"^error: trial [01], seed 1: ") as error:
        run(*words)
    assert f"{message}: fix that (make room" in error.value.code
    run(*words)
    assert "2 of 2 trials, 0 pruned, 0 failed" in capfd.readouterr().out
    assert len(started()) == 3 and set(by_clip("tune-grid", "COMPLETE")) == {0.01, 0.1}


@pytest.mark.slow
def test_a_full_disk_ruins_no_study():
    """The kernel lets no file grow beyond the size of the study."""
    words = [*GRID, "clip-coef=0.01:0.02", "--points", "30"]
    run(*words, "--trials", "1")
    limit = Path("runs/tune-grid/study.db").stat().st_size
    full = start(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out = full.communicate(timeout=100)[0]
    assert full.returncode == 1 and "Traceback" not in out and "\nerror: " in "\n" + out
    out = start(*words, "--heartbeat", "1").communicate(timeout=100)[0]
    assert "30 of 30 trials, 0 pruned, 0 failed" in out


def test_a_script_that_logs_no_evaluation_ends_the_command():
    Path("pretender.py").write_text(PRETENDER.replace("metrics.jsonl", "other.jsonl"))
    with pytest.raises(SystemExit, match="logged no evaluation in runs/tune-grid/trial-0-seed-1"):
        run(*GRID, "clip-coef=0.01,0.1")


@pytest.mark.slow
def test_a_budget_ends_in_time_and_loses_nothing():
    words = [*GRID, "clip-coef=0.01,0.1", "--trials", "1", "--budget-minutes", "0.1"]
    before = time.monotonic()
    run(*words, flags=["--seconds", "60"])
    run(*words, flags=["--seconds", "60"])
    assert time.monotonic() - before < 40
    trials = [t for t in load("tune-grid").trials if t.params]
    assert trials[0].params == trials[1].params and len(started()) == 2 == len(trials)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_interrupt_then_the_same_command(workers, capfd):
    words = [*GRID, "clip-coef=0.01,0.1,0.2", "--workers", workers]
    process = start(*words, "--", "--seconds", "1.5", environment={"PYTHONIOENCODING": "latin-1"})
    wait_for(lambda: "COMPLETE" in [t.state.name for t in load("tune-grid").trials] if started() else False)
    wait_for(lambda: len(started()) == 1 + int(workers))
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=20)[0]
    assert process.returncode == 1 and out.endswith("stopped; the same command resumes\n") and "Traceback" not in out
    assert "0 of 3 trials, best return none yet, ? left" in out  # the live line
    done = len(by_clip("tune-grid", "COMPLETE"))
    assert Path("runs/tune-grid/best.json").exists() and 1 <= done <= int(workers)
    run(*words, flags=["--seconds", "1.5"])
    out = capfd.readouterr().out
    assert f"resumes after {done} of 3 trials" in out and "3 of 3 trials, 0 pruned, 0 failed" in out
    assert set(by_clip("tune-grid", "COMPLETE")) == {0.01, 0.1, 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("storage", [None, "sqlite:///shared.db"])
def test_kill_then_the_same_command_keeps_finished_seeds(storage):
    words = [*GRID, "clip-coef=0.1", "norm-adv=false,true", "--trials", "1", "--seeds", "1", "2", "3", "--heartbeat",
             "1", *(["--storage", storage] if storage else [])]  # fmt: skip
    process = start(*words, "--", "--seconds", "1")
    wait_for(lambda: len(started()) == 2)
    process.kill()
    process.communicate()
    assert [t.state.name for t in load("tune-grid", storage).trials] == ["RUNNING"]
    run(*words, flags=["--seconds", "1"])
    run(*words, "--study", "whole", flags=["--seconds", "0"])
    ours, whole = (load(name, storage).trials[-1] for name in ("tune-grid", "whole"))
    names = [name for name, _ in started()]
    assert names[:4] == [f"tune-grid/trial-{run}" for run in ("0-seed-1", "0-seed-2", "1-seed-2", "1-seed-3")]
    assert ours.user_attrs["results"] == whole.user_attrs["results"] == {"1": 90.1, "2": 90.2, "3": 90.3}
    assert ours.value == whole.value == 90.2 and ours.intermediate_values == whole.intermediate_values
    assert not Path("runs/tune-grid/trial-0-seed-2/finished").exists()  # the run ended with its command


def test_a_trial_that_others_took_over_is_not_counted_twice(monkeypatch):
    """Its machine was suspended, say, and another one requeued it."""
    report_value, taken = optuna.trial.Trial.report, []

    def report_late(self, value, step):
        if self.number == 0 and not taken:
            taken.append(load("tune-grid").tell(0, state=optuna.trial.TrialState.FAIL))
        report_value(self, value, step)

    monkeypatch.setattr(optuna.trial.Trial, "report", report_late)
    run(*GRID, "clip-coef=0.01,0.1")
    states = [t.state.name for t in load("tune-grid").trials]
    assert taken and states == ["FAIL", "COMPLETE", "COMPLETE"]
    assert set(by_clip("tune-grid", "COMPLETE")) == {0.01, 0.1}


# Step by step


@pytest.mark.slow
def test_one_at_a_time_keeps_the_best_and_resumes(capfd):
    words = ["--strategy", "one-at-a-time", "--seeds", "1", "2", "--pruner", "none", "--space"]
    words += ["clip-coef=0.01,0.015,0.1,0.5", "ent-coef=0.1", "learning-rate=0.01,0.02"]
    run(*words)
    text = Path("runs/tune-one-at-a-time/report.md").read_text()
    assert text in capfd.readouterr().out
    assert "Changes kept: `--clip-coef 0.1`" in text  # the learning rate changes nothing here
    lines = [line.split(": return ")[-1] for line in text.splitlines() if line.startswith("- ")]
    assert sorted(lines) == sorted([
        "81.7 (81.6 to 81.7) (change baseline)",
        "81.2 (81.1 to 81.2) (change --clip-coef 0.01)",
        "90.2 (90.1 to 90.2) (change --clip-coef 0.1)",
        "90.2 (90.1 to 90.2) (change --learning-rate 0.01)",
        "90.2 (90.1 to 90.2) (change --learning-rate 0.02)",
        lines[next(i for i, line in enumerate(lines) if "failed" in line)],
    ])  # fmt: skip
    assert " failed (change --clip-coef 0.5): seed 1: error: the losses are not finite" in text
    assert next(line for line in text.splitlines() if "**kept**" in line and "90.2" in line).endswith("-coef 0.1)")
    assert "better by 8.5. That is more than the spread over seeds, 0.1" in text
    assert Path("runs/tune-one-at-a-time/report.png").stat().st_size > 10_000
    count = len(started())
    run(*words)
    assert len(started()) == count and Path("runs/tune-one-at-a-time/report.md").read_text() == text
    assert {clip for name, clip in started() if "learning-rate" in name} == {0.1}  # on top of the change kept
    assert json.loads(Path("runs/tune-one-at-a-time/best.json").read_text())["ent_coef"] == 0.1  # in all trials


@pytest.mark.slow
def test_six_steps_with_a_budget_and_without():
    words = ["--strategy", "six-steps", "--pruner", "none"]
    run(*words, "--budget-minutes", "0.02")
    text = Path("runs/tune-six-steps/report.md").read_text()
    assert "It ended in step" in text
    run(*words)
    text = Path("runs/tune-six-steps/report.md").read_text()
    titles = [line.split(". ")[1] for line in text.splitlines() if line.startswith("## ") and "." in line]
    assert titles == ["Baseline", "Learning rate", "Clip range", "Exploration, entropy", "Exploration, initial noise",
                      "Architecture, width", "Architecture, layers", "Validation"]  # fmt: skip
    assert "Changes kept: `--clip-coef 0.03`" in text and "It ended" not in text
    assert "(change --pi-layers 2 --vf-layers 2)" in text and "(change --init-log-std -0.5)" in text
    assert "91.5 (82.5 to 111.5) (change baseline)" in text and "93.0 (84.0 to 113.0) (change winner)" in text
    assert "better by 1.5. That is not more than the spread over seeds, 29.0" in text
    assert json.loads(Path("runs/tune-six-steps/best.json").read_text())["clip_coef"] == 0.03


def test_flags_as_text():
    settings = dict(norm_adv=True, clip_vloss=False, learning_rate=1.2345678e-4, num_steps=128)
    assert format_flags(settings) == "--norm-adv --no-clip-vloss --learning-rate 0.00012345678 --num-steps 128"


# Several machines


@pytest.fixture
def postgresql():
    """The address of a PostgreSQL server of our own, from the Debian package postgresql."""
    found = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    programs = next((Path(path).resolve().parent for path in found if path), None)
    if programs is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    user = {}
    if os.getuid() == 0:  # it does not run as root
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


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_machines_with_two_workers_each_one_killed(database, request):
    storage = request.getfixturevalue("postgresql") if database == "postgresql" else "sqlite:///shared.db"
    words = [*GRID, "clip-coef=0.01:0.08", "--points", "8", "--workers", "2", "--storage", storage, "--heartbeat", "2",
             "--", "--seconds", "2"]  # fmt: skip
    machines = [start(*words) for _ in range(2)]
    wait_for(lambda: len(started()) >= 4, 120)
    machines[0].kill()
    machines[0].communicate()
    assert "8 of 8 trials, 0 pruned, 0 failed" in machines[1].communicate(timeout=120)[0]
    trials = load("tune-grid", storage).trials
    complete = sorted(t.params["clip-coef"] for t in trials if t.state.name == "COMPLETE")
    assert complete == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    assert any(t.state.name == "FAIL" for t in trials)  # the trials of the machine that was killed


# Real runs


@pytest.mark.slow
def test_real_trials(capfd):
    for name in ("assets", "ballbot_utils"):
        Path(name).symlink_to(ROOT / name)
    for name in ("ppo_ballbot.py", "ballbot_env.py"):
        shutil.copy(ROOT / name, name)
    flags = "--frame-skip 1 --no-cameras --num-steps 32 --minibatch-size 32 --total-timesteps 128 --eval-interval 64 "
    flags += "--eval-episodes 1 --final-eval-episodes 1"
    args = tune.Args(strategy="random", trials=1, seeds=(1,), space=("clip-coef=0.01:0.3:log", "num-envs=2"),
                     script=Path("ppo_ballbot.py"))  # fmt: skip
    program.main(args, flags.split())
    (t,) = load("tune-random").trials
    assert t.state.name == "COMPLETE" and list(t.intermediate_values) == [64, 128]
    folder = Path("runs/tune-random/trial-0-seed-1")
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["clip_coef"], settings["num_envs"]) == (t.params["clip-coef"], 2)
    assert f"final policy: return {t.value:.1f}" in Path(f"{folder}.log").read_text()
    assert "too short for a diagnosis" in capfd.readouterr().out
    best = ["--config", "runs/tune-random/best.json", "--run-name", "again"]
    out = subprocess.run([sys.executable, "ppo_ballbot.py", *best], capture_output=True, text=True)
    assert f"final policy: return {t.value:.1f}" in out.stdout


@pytest.mark.slow
def test_help_of_the_program():
    words = [sys.executable, "-m", "ballbot_utils.tune", "--help"]
    out = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True).stdout
    assert out.startswith("usage: python -m ballbot_utils.tune ") and "--startup-trials" in out
