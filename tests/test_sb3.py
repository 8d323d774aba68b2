"""Stable-Baselines3's PPO and ours agree: on the advantages of a rollout, and on losses and gradients of a minibatch.

Its own code runs in each test. `benchmark.other_ppo.make_sb3` gives it our flags.
"""

from dataclasses import replace
from functools import partialmethod

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure

import ballbot_env
import ppo_ballbot
from benchmark import other_ppo

ARGS = ppo_ballbot.Args(  # one gradient step on one minibatch; robots fall and episodes are truncated
    cameras=False, privileged_critic=False, norm_obs=False, terrain="flat", env_kwargs=("max_tilt=1.5",),
    randomization={}, max_episode_steps=80, num_threads=1, num_envs=4, num_steps=64, minibatch_size=256,
    update_epochs=1, total_timesteps=1024, hidden_size=32, init_log_std=-0.5, ent_coef=0.01, max_grad_norm=1e6,
)  # fmt: skip
LOGGED = {"policy_loss": "policy_gradient_loss", "value_loss": "value_loss", "entropy": "entropy_loss",
          "approx_kl": "approx_kl", "clipfrac": "clip_fraction"}  # fmt: skip


def collect(args):
    """Stable-Baselines3's PPO after one rollout, and our agent with the same weights."""
    model = other_ppo.make_sb3(args)
    model.train = lambda: None
    model.learn(args.num_envs * args.num_steps)
    del model.train
    return model, other_ppo.copy_agent(model, args)


class Replay(torch.nn.Module):
    """An actor that repeats actions (steps, envs, 3)."""

    def __init__(self, actions):
        super().__init__()
        self.actions = iter(torch.from_numpy(actions))

    def forward(self, features):
        return next(self.actions)


@pytest.mark.slow
def test_advantages_and_returns_of_a_rollout():
    """Ours takes the same actions. Truncated episodes have a next value; Stable-Baselines3 adds it to the reward."""
    model, agent = collect(ARGS)
    buffer = model.rollout_buffer
    agent.actor, agent.log_std.data[:] = Replay(buffer.actions), -torch.inf  # no noise
    envs = ppo_ballbot.make_envs(ARGS, ARGS.num_envs)
    obs, _ = envs.reset(seed=ballbot_env.spawn_seeds(ARGS.seed, ARGS.num_envs))
    observation = ppo_ballbot.proprioception(obs, agent), torch.zeros(ARGS.num_envs, 0)
    batch, transitions, *_ = ppo_ballbot.rollout(envs, agent, ARGS, observation)
    rewards, values, next_values, dones = transitions
    advantages = ppo_ballbot.gae(*transitions, ARGS.gamma, ARGS.gae_lambda)

    truncated = dones.bool() & (next_values != 0)
    assert truncated.sum() > 1 and (dones.bool() & ~truncated).sum() > 1
    assert (batch["proprio"].numpy() == buffer.observations).all()
    added = torch.where(truncated, ARGS.gamma * next_values, 0)
    for ours, theirs in ((rewards + added, buffer.rewards), (values, buffer.values), (advantages, buffer.advantages),
                         (advantages + values, buffer.returns)):  # fmt: skip
        np.testing.assert_allclose(ours.detach(), theirs, rtol=1e-5, atol=1e-5)


def step_of_both(change, seed=0, prepare=lambda model: None):
    """A gradient step with learning rate 0 by both, on the same minibatch, after the weights have changed a little.

    Returns our losses, Stable-Baselines3's, and a list of gradients of both.
    """
    args = replace(ARGS, **change)
    model, _ = collect(args)
    torch.manual_seed(seed)
    for p in model.policy.parameters():
        p.data += 0.03 * torch.randn_like(p)
    prepare(model)
    agent, buffer = other_ppo.copy_agent(model, args), model.rollout_buffer
    buffer.advantages -= buffer.advantages.mean()  # both signs: both bounds of the ratio count
    names = dict(proprio="observations", actions="actions", logprobs="log_probs", values="values",
                 advantages="advantages", returns="returns")  # fmt: skip
    batch = {ours: torch.from_numpy(getattr(buffer, theirs).copy()) for ours, theirs in names.items()}
    batch |= {name: torch.zeros(args.num_steps, args.num_envs, 0) for name in ("depth", "slopes")}

    losses = ppo_ballbot.update(agent, torch.optim.AdamW(agent.parameters(), lr=0.0), args, batch)
    model.lr_schedule = lambda remaining: 0.0
    model.set_logger(configure(None, []))
    model.train()
    logged = {name: model.logger.name_to_value[f"train/{theirs}"] for name, theirs in LOGGED.items()}
    logged["entropy"] *= -1
    gradients = [(ours.grad, theirs.grad.movedim(0, -1)) for theirs, ours in other_ppo.parameter_pairs(model, agent)]
    return losses, logged, gradients


def assert_equal(losses, logged, gradients):
    assert {name: losses[name] for name in LOGGED} == pytest.approx(logged, rel=1e-5, abs=1e-7)
    for ours, theirs in gradients:
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() and theirs.norm() > 0
    assert 0.2 < losses["clipfrac"] < 0.99  # both branches of the clipped objective count


@pytest.mark.parametrize("change", [
    {}, dict(ent_coef=0.3), dict(vf_coef=0.3), dict(clip_coef=0.1), dict(max_grad_norm=0.01),
], ids=str)  # fmt: skip
def test_losses_and_gradients_of_a_minibatch(change):
    assert_equal(*step_of_both(change))


def test_norm_adv_is_equal_up_to_the_kind_of_standard_deviation(monkeypatch):
    """Ours divides by n, theirs by n - 1."""
    losses, logged, _ = step_of_both(dict(norm_adv=True))
    assert losses["policy_loss"] == pytest.approx(logged["policy_loss"] * (256 / 255) ** 0.5, rel=1e-5)
    monkeypatch.setattr(torch.Tensor, "std", partialmethod(torch.Tensor.std, correction=0))
    assert_equal(*step_of_both(dict(norm_adv=True)))


def test_clip_vloss_is_equal_where_clipping_increases_the_loss():
    """Elsewhere ours is larger: it has the maximum of both losses, as in CleanRL."""
    losses, logged, _ = step_of_both(dict(clip_vloss=True))
    assert losses["value_loss"] > logged["value_loss"] * 1.001

    def returns_beyond_the_values(model):
        buffer = model.rollout_buffer
        with torch.no_grad():
            values = model.policy.predict_values(torch.from_numpy(buffer.observations).flatten(0, 1))
        moved = values.numpy().reshape(buffer.values.shape) - buffer.values
        buffer.returns = buffer.values + np.sign(moved) + moved

    assert_equal(*step_of_both(dict(clip_vloss=True), prepare=returns_beyond_the_values))


def test_the_agent_that_is_evaluated_normalizes_as_vec_normalize():
    model, agent = collect(replace(ARGS, norm_obs=True))
    obs = torch.from_numpy(model.env.get_original_obs())
    mean = model.policy.get_distribution(torch.from_numpy(model.env.normalize_obs(obs.numpy()))).distribution.mean
    torch.testing.assert_close(agent.actor(agent.features(obs, obs[:, :0])), mean)
    assert agent.obs_var.max() / agent.obs_var.min() > 10
