"""ppo_ballbot_gpu.py on the CPU: the algorithm is that of ppo_ballbot.py, and the programs accept its policies."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ballbot_env
import ppo_ballbot
import ppo_ballbot_gpu as gpu

pytestmark = pytest.mark.slow  # Warp compiles its kernels for half a minute
ROOT = Path(__file__).resolve().parents[1]


def make_args(**kwargs):
    small = dict(cuda=False, cameras=False, num_envs=6, num_steps=8, minibatch_size=12, update_epochs=2, hidden_size=16)
    return gpu.Args(**gpu.PRESETS["tuned"] | small | kwargs)


def begin(args, checkpoint=None):
    torch.manual_seed(args.seed)
    agent = gpu.Agent(args)
    learner, envs = gpu.Learner(agent, args), gpu.make_envs(args, args.num_envs)
    observation = gpu.start(args, SimpleNamespace(checkpoint=checkpoint, weights={}), agent, learner, envs)
    return agent, learner, envs, observation


def iterate(args, agent, learner, envs, observation):
    batch, transitions, observation, _ = gpu.rollout(envs, agent, args, observation)
    advantages = gpu.gae(*transitions, args.gamma, args.gae_lambda)
    losses = learner.update(batch | {"advantages": advantages, "returns": advantages + batch["values"]}, 1e-3)
    return batch, transitions, observation, losses


@pytest.mark.parametrize("kwargs", [{}, dict(norm_adv=False, clip_vloss=True, clip_coef=0.01)], ids=["tuned", "others"])
def test_an_update_is_that_of_ppo_ballbot(kwargs):
    args = make_args(**kwargs)
    agent, learner, envs, observation = begin(args)
    batch, transitions, _, _ = gpu.rollout(envs, agent, args, observation)
    advantages = gpu.gae(*transitions, args.gamma, args.gae_lambda)
    batch |= {"advantages": 100 * advantages, "returns": advantages + batch["values"]}
    other = deepcopy(agent)
    optimizer = torch.optim.AdamW(other.parameters(), 1e-3, eps=1e-5, weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(3)
    expected = ppo_ballbot.update(other, optimizer, args, batch)
    torch.manual_seed(3)
    losses = learner.update(batch, 1e-3)
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6) and expected["grad_norm"] > 0
    for p, q in zip(agent.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_values_of_the_next_states_know_truncation_and_termination():
    args = make_args(max_episode_steps=160, num_steps=41, minibatch_size=82)  # 40 actions
    agent, _, envs, observation = begin(args)
    envs.reset(seed=0, options=dict(tilt=[(0, 0)] * 5 + [(np.radians(19.9), 0)]))
    _, (_, values, next_values, dones), _, (_, lengths, _) = gpu.rollout(envs, agent, args, observation)
    assert dones[39, :5].all() and (lengths[39, :5] == 160).all()
    goes_on = dones[:-1] == 0
    torch.testing.assert_close(next_values[:-1][goes_on], values[1:][goes_on])
    assert (next_values[39, :5] != 0).all() and (next_values[39, :5] != values[40, :5]).all()  # truncated
    fell = dones[:, 5].bool() & (lengths[:, 5] < 160)
    assert fell.any() and (next_values[:, 5][fell] == 0).all()


def test_a_resumed_training_continues_bit_for_bit():
    args = make_args(cameras=True, randomization=dict(push=0.5, obs_noise=0.01), num_envs=3, minibatch_size=8)
    parts = begin(args)
    _, _, observation, _ = iterate(args, *parts)
    agent, learner, envs, _ = parts
    checkpoint = deepcopy(dict(model=agent.state_dict(), **gpu.capture_state(agent, learner, envs, observation)))
    *_, expected = iterate(args, agent, learner, envs, observation)
    resumed = begin(args, checkpoint)
    *_, losses = iterate(args, *resumed)
    assert losses == expected
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), resumed[0].parameters()))


def test_it_trains_from_the_command_line_and_the_programs_accept_its_policy(tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")

    def run(*command):
        return subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=400,
                              env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})  # fmt: skip

    small = ("--num-envs 8 --num-steps 8 --minibatch-size 32 --total-timesteps 512 --eval-interval 512 "
             "--eval-episodes 1 --final-eval-episodes 1 --no-cameras --no-cuda --run-name a")  # fmt: skip
    done = run(str(ROOT / "ppo_ballbot_gpu.py"), "--preset", "tuned", *small.split())
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert kinds == ["evaluation", "final"]
    done = run("-m", "ballbot_utils.evaluate", "runs/a/best.pt", "--episodes", "2", "--script",
               str(ROOT / "ppo_ballbot_gpu.py"))  # fmt: skip
    assert done.returncode == 0 and "return" in done.stdout, done.stderr
    done = run(str(ROOT / "ppo_ballbot_gpu.py"), "--resume", "runs/a", "--total-timesteps", "768")
    assert done.returncode == 0 and "final policy" in done.stdout, done.stderr


def test_a_trained_policy_drives_on_warp_as_it_does_on_mujoco():
    policy = ppo_ballbot.load_policy(ROOT / "benchmark/tuned__1.pt")
    results = []
    for make in (gpu.make_envs, ppo_ballbot.make_envs):
        envs = make(policy.args, 4, evaluation=True)
        obs, _ = envs.reset(seed=ballbot_env.spawn_seeds(1_000_000, 4), options=dict(position=(0, 0)))
        total = 0
        for _ in range(250):
            action = policy({key: np.asarray(value) for key, value in obs.items()})
            obs, rewards, terminations, _, _ = envs.step(torch.as_tensor(action) if make is gpu.make_envs else action)
            assert not terminations.any()
            total += float(np.mean(np.asarray(rewards)))
        results.append(total)
    assert results[0] == pytest.approx(results[1], abs=0.3) and results[1] > 20
