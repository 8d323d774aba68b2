"""A script with another algorithm works with the library and the programs, unchanged, from its own folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from ballbot_utils import common
from ballbot_utils.runs import read_metrics

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--total-timesteps 60000 --eval-interval 30000".split()
pytestmark = pytest.mark.slow


def start(folder, *command):
    """Start `python <command>` in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(folder, *command):
    """The output of `python <command>` in a folder."""
    process = start(folder, *command)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the script and runs/whole, a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("reinforce")
    shutil.copy(ROOT / "tests" / "reinforce.py", folder)
    run(folder, "reinforce.py", *FLAGS, "--run-name", "whole")
    return folder


def test_it_is_short_and_learns(folder):
    assert len((folder / "reinforce.py").read_text().splitlines()) <= 150
    evaluations = read_metrics(folder / "runs" / "whole")
    assert [entry["kind"] for entry in evaluations][:3] == ["evaluation", "evaluation", "final"]
    assert evaluations[2]["episodic_return"] > 6.5  # 5.4 before training


def test_a_resumed_run_ends_with_the_same_weights(folder):
    process = start(folder, "reinforce.py", *FLAGS, "--run-name", "parts", "--save-interval", "0")
    run_dir = folder / "runs" / "parts"
    while not (run_dir / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # SIGINT may be ignored, as in a background job
    _, errors = process.communicate()
    assert process.returncode == os.EX_TEMPFAIL and "python reinforce.py --resume runs/parts" in errors
    assert torch.load(run_dir / "last.pt", weights_only=True)["global_step"] < 60_000
    run(folder, "reinforce.py", "--resume", "runs/parts")
    whole = weights(folder / "runs" / "whole" / "last.pt")
    for name, value in weights(run_dir / "last.pt").items():
        assert torch.equal(value, whole[name]), name
    assert "has finished" in run(folder, "reinforce.py", "--resume", "runs/parts")


def test_evaluate(folder):
    run(folder, "-m", "ballbot_utils.evaluate", "runs/whole", "--episodes", "16", "--stochastic", "--json", "all.json")
    mean, stochastic = json.loads((folder / "all.json").read_text())
    best = torch.load(folder / "runs" / "whole" / "best.pt", weights_only=True)
    assert mean["summary"]["return"]["mean"] == pytest.approx(best["eval"]["episodic_return"], rel=1e-9)
    assert mean["gap"] and mean["summary"]["return"]["mean"] != stochastic["summary"]["return"]["mean"]


def test_diagnose_rejects_it(folder):
    process = start(folder, "-m", "ballbot_utils.diagnose", "runs/whole")
    output, errors = process.communicate()
    assert process.returncode == 1 and not output
    assert errors == ("error: runs/whole cannot be diagnosed: it has no --clip-coef, losses/approx_kl, "
                      "losses/explained_variance, charts/action_std, which every run of PPO has\n")  # fmt: skip


def test_watch(folder, opengl):
    output = run(folder, "-m", "ballbot_utils.watch", "runs/whole", "--video", "robot.gif", "--horizon", "40")
    assert "robot.gif: return" in output and (folder / "robot.gif").stat().st_size > 10_000


def test_export(folder, monkeypatch):
    run(folder, "-m", "ballbot_utils.export", "runs/whole", "policy.onnx")
    session = onnxruntime.InferenceSession(folder / "policy.onnx")
    rng = np.random.default_rng(0)
    obs = {i.name: rng.uniform(-1, 1, (5, *i.shape[1:])).astype(np.float32) for i in session.get_inputs()}
    monkeypatch.chdir(folder)
    policy, _ = common.load(Path("runs/whole"))
    np.testing.assert_allclose(session.run(None, obs)[0], policy(obs), atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["actions_per_second"] == "125"
