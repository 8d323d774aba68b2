"""The changes that docs/customizing.md describes: each is made in a copy of the script, in its place, and trains."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).resolve().parents[1]
FLAGS = (
    "--frame-skip 1 --no-cameras --num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 128 "
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
    # As CleanRL's ppo_atari_lstm.py: minibatches are of whole environments, their steps in order
    "a recurrent policy": {
        r"        self.actor = .*\n": (
            "        self.lstm, self.memory, num_features = nn.LSTM(num_features, 64), None, 64\n"
            r"\g<0>"
        ),
        r"    def value\(self": (
            "    def remember(self, features, forgets, memory):\n"
            "        hidden = []\n"
            "        for x, forget in zip(features, forgets):  # (steps, envs, ...)\n"
            "            out, memory = self.lstm(x[None], tuple((1 - forget[:, None]) * part for part in memory))\n"
            "            hidden.append(out)\n"
            "        return torch.cat(hidden), memory\n\n"
            r"\g<0>"
        ),
        r"    episodes, ends, started.*\n": (
            r"\g<0>    memory, forget = agent.memory or 2 * (torch.zeros(1, shape[1], 64),), torch.zeros(shape[1])" "\n"
            "    batch |= {key: part.repeat(shape[0], 1, 1) for key, part in zip('hc', memory)}\n"
            "    batch['forgets'], hidden = torch.empty(shape), torch.empty(*shape, 64)\n"
        ),
        r"        action = agent.actor\(agent.features\(proprio, depth\)\)(.*)\n": (
            "        batch['forgets'][step] = forget\n"
            "        features = agent.features(proprio, depth)\n"
            "        hidden[step], memory = agent.remember(features[None], forget[None], memory)\n"
            r"        action = agent.actor(hidden[step])\1" "\n"
        ),
        r"        dones\[step\] = .*\n": r"\g<0>        forget = torch.from_numpy(dones[step])" "\n",
        r"                value = agent.value\((agent.features\(.*\)), (slopes.*)\)\n": (
            "                memory_i = tuple(part[:, i : i + 1] for part in memory)\n"
            r"                final, _ = agent.remember(\1[None], torch.zeros(1, 1), memory_i)" "\n"
            r"                value = agent.value(final[0], \2)" "\n"
        ),
        r"    values = agent.value\(.*\).view\(shape\)\n": (
            "    values = agent.value(hidden.flatten(0, 1), batch['slopes'].flatten(0, 1)).view(shape)\n"
            "    last, _ = agent.remember(agent.features(proprio, depth)[None], forget[None], memory)\n"
            "    agent.memory = memory\n"
        ),
        r"agent.value\(agent.features\(proprio, depth\), ": "agent.value(last[0], ",
        r"        minibatches = torch.randperm.*\n": (
            "        minibatches = torch.arange(len(batch['actions'])).view(args.num_steps, -1).T\n"
            "        minibatches = minibatches[torch.randperm(len(minibatches))].flatten()\n"
        ),
        r"            features = agent.features\(mb.*\n": (
            r"\g<0>            features, forgets, h, c = (" "\n"
            "                x.view(-1, args.num_steps, *x.shape[1:]).transpose(0, 1)\n"
            "                for x in (features, mb['forgets'], mb['h'], mb['c'])\n"
            "            )\n"
            "            features, _ = agent.remember(features, forgets, (h[:1], c[:1]))\n"
            "            features = features.transpose(0, 1).flatten(0, 1)\n"
        ),
        r"        self.agent, self.args = agent, args\n": r"\g<0>        self.memory = None" "\n",
        r"        action = .*(agent.features\(.*self.depth\)).*\n": (
            r"        features = \1" "\n"
            "        memory = self.memory or 2 * (torch.zeros(1, len(features), 64),)\n"
            "        hidden, self.memory = agent.remember(features[None], torch.zeros(1, len(features)), memory)\n"
            "        action = agent.actor(hidden[0])\n"
        ),
    },
}  # fmt: skip


def train_copy(folder, source, *flags):
    """The weights after a short run of the script."""
    folder.mkdir()
    (folder / "ppo_ballbot.py").write_text(source)
    for name in ("ballbot_env.py", "ballbot_utils", "assets"):
        (folder / name).symlink_to(REPOSITORY / name)
    output = subprocess.run(
        [sys.executable, "ppo_ballbot.py", *FLAGS, *flags], cwd=folder, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    return torch.load(folder / "runs" / "run" / "last.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return train_copy(tmp_path_factory.mktemp("unchanged") / "run", (REPOSITORY / "ppo_ballbot.py").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_change(change, unchanged, tmp_path):
    source = (REPOSITORY / "ppo_ballbot.py").read_text()
    for line, replacement in CHANGES[change].items():
        source, count = re.subn(line, replacement, source)
        assert count == 1, line
    model = train_copy(tmp_path / "changed", source)
    assert any((model[key] != value).any() for key, value in unchanged.items() if key in model)
    if "predictor.weight_0" in model:
        assert still_orthogonal(model["target.weight_0"]) and not still_orthogonal(model["predictor.weight_0"])

    if "lstm.weight_ih_l0" in model:
        # In the only minibatch the policy has not changed since it acted, nor has its memory, over ends of episodes
        flags = "--minibatch-size 400 --num-steps 200 --update-epochs 1 --frame-skip 4 --total-timesteps 1600"
        train_copy(tmp_path / "one", source, *flags.split())
        log = EventAccumulator(str(tmp_path / "one" / "runs" / "run")).Reload()
        assert log.Scalars("charts/episodic_length")
        assert abs(log.Scalars("losses/approx_kl")[0].value) < 1e-6


def still_orthogonal(weight):
    """Whether weights still have their initial values."""
    return torch.allclose(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-4)
