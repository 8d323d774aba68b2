"""The changes that README's "Change it" describes: each is made in a copy of the script, in its place, and trains."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
FLAGS = (
    "--num-processes 1 --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 128 "
    "--final-eval-episodes 1 --learning-rate 1e-3 --run-name run"
).split()

# By change: lines of the script, and what stands in their place. `\\g<0>` is the line itself.
CHANGES = {
    "a loss term": {
        r"            loss = pg_loss .*\n": (
            r"\g<0>            loss = loss + 0.01 * agent.actor(features).square().mean()" "\n"
        ),
    },
    "another advantage estimator": {
        r"        last = deltas\[t\] .*\n": "        last = deltas[t].clamp(-1, 1)\n",
    },
    "a bounded policy": {
        r"        self.actor = (MLP\(.*\))\n": r"        self.actor = nn.Sequential(\1, nn.Tanh())\n",
    },
    # Burda et al., arXiv 1810.12894, without its normalisations
    "random network distillation": {
        r"        self.log_std = .*\n": (
            r"\g<0>        self.target = MLP(num_features, 64, 1, 16, last_gain=1.0).requires_grad_(False)\n"
            r"        self.predictor = MLP(num_features, 64, 1, 16, last_gain=1.0)\n"
        ),
        r"def log_prob\(": (
            "def novelty(agent, features):\n"
            "    return (agent.predictor(features) - agent.target(features)).square().mean(-1)\n\n\n"
            r"\g<0>"
        ),
        r"    batch \|= \{\"logprobs\".*\n": (
            "    seen = agent.features(batch['proprio'], batch['depth']).flatten(0, 1)\n"
            "    rewards += 0.01 * novelty(agent, seen).view(shape)\n"
            r"\g<0>"
        ),
        r"            loss = pg_loss .*\n": r"\g<0>            loss = loss + novelty(agent, features).mean()\n",
    },
}  # fmt: skip


def trained(folder, source):
    """The weights and the log of a short run of the script."""
    folder.mkdir()
    (folder / "ppo_ballbot.py").write_text(source)
    for name in ("ballbot_env.py", "assets"):
        (folder / name).symlink_to(REPOSITORY / name)
    output = subprocess.run([sys.executable, "ppo_ballbot.py", *FLAGS], cwd=folder, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return torch.load(folder / "runs" / "run" / "last.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("unchanged") / "run", (REPOSITORY / "ppo_ballbot.py").read_text())


@pytest.mark.parametrize("change", CHANGES)
def test_change(change, unchanged, tmp_path):
    source = (REPOSITORY / "ppo_ballbot.py").read_text()
    for line, replacement in CHANGES[change].items():
        source, count = re.subn(line, replacement, source)
        assert count == 1, line
    model = trained(tmp_path / "run", source)
    assert any((model[key] != value).any() for key, value in unchanged.items() if key in model)
    if "predictor.weight_0" in model:
        assert still_orthogonal(model["target.weight_0"]) and not still_orthogonal(model["predictor.weight_0"])


def still_orthogonal(weight):
    """Whether weights are as they were initialised."""
    return torch.allclose(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-4)
