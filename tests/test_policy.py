"""A loaded policy acts as in training and evaluation."""

from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
import torch

import ballbot_env
import ppo_ballbot as ppo


def make_run(folder, **flags):
    """A run's folder with a policy of random weights and plausible statistics."""
    torch.manual_seed(0)
    args = ppo.Args(hidden_size=16, pi_layers=1, vf_layers=1, **flags)
    agent = ppo.Agent(args)
    list(agent.actor.parameters())[-2].data *= 30  # larger actions
    agent.obs_mean.normal_(std=0.1)
    agent.obs_var.uniform_(0.5, 2)
    folder.mkdir()
    torch.save({"model": agent.state_dict(), "args": asdict(args), "global_step": 1234}, folder / "best.pt")
    return agent


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run", make_run(tmp_path / "run", body_frame=True, norm_obs=True, depth_scale=5.0)


@pytest.mark.parametrize("frame_skip", [1, 4])
def test_actions_equal_those_of_the_training_loop(run, frame_skip):
    policy = ppo.load_policy(run[0])
    envs = gym.make_vec("Ballbot-v0", num_envs=3, num_threads=1, frame_skip=frame_skip, max_episode_steps=50)
    obs, _ = envs.reset(seed=0)
    depth, ends = torch.zeros(3, 40), 0
    for step in range(120):
        depth = ppo.depth_features(envs, run[1], depth)
        with torch.no_grad():
            expected = run[1].actor(run[1].features(ppo.proprioception(obs, run[1]), depth)).clamp(-1, 1)
        actions = policy(obs)
        assert actions.shape == (3, 3) and actions.dtype == np.float32
        np.testing.assert_allclose(actions, expected, atol=1e-6)
        obs, _, terminations, truncations, _ = envs.step(actions)
        ends += (terminations | truncations).sum()
        if step == 70:
            obs, _ = envs.reset()
    assert ends >= 3


def test_one_environment_and_the_same_in_a_batch(run):
    env, one, many = gym.make("Ballbot-v0"), ppo.load_policy(run[0]), ppo.load_policy(run[0] / "best.pt")
    for seed, steps in ((0, 20), (None, 20), (5, 20)):  # resets keep or restart the cameras' clock
        obs, _ = env.reset(seed=seed)
        for _ in range(steps):
            action = one(obs)
            assert action.shape == (3,) and np.abs(action).max() <= 1
            np.testing.assert_allclose(many({key: value[None] for key, value in obs.items()})[0], action, atol=1e-6)
            obs, *_ = env.step(action)


def test_frames_are_encoded_once_and_never_missed(run, monkeypatch):
    policy = ppo.load_policy(run[0])
    encoded, encode = [], policy.agent.encode
    count = lambda frames: encoded.append(int(frames.flatten(1).any(1).sum()))  # noqa: E731 (blocks are filled by 0)
    monkeypatch.setattr(policy.agent, "encode", lambda frames: count(frames) or encode(frames))
    env = ballbot_env.BallbotEnv()
    obs, _ = env.reset(seed=0)
    for _ in range(12):
        obs, *_ = env.step(policy(obs))
    assert encoded == [1, 1]  # at the reset and after 6 steps; those after 12 are not used yet
    # In one of two environments, a different frame with an older time
    other = {key: np.stack([value, value]) for key, value in obs.items()}
    policy(other)
    other["depth_1"] = other["depth_1"].copy()
    other["depth_1"][1] *= 0.5
    other["relative_image_timestamp"] = other["relative_image_timestamp"] + np.float32(0.002)
    actions = policy(other)
    assert encoded == [1, 1, 2, 1]
    np.testing.assert_allclose(actions, ppo.load_policy(run[0])(other), atol=1e-6)
    assert np.abs(actions[0] - actions[1]).max() > 1e-4


def test_observations_are_cast(run):
    policy, env = ppo.load_policy(run[0]), ballbot_env.BallbotEnv()
    obs, _ = env.reset(seed=0)
    action = policy(obs)
    for cast in (lambda x: x.astype(float), np.ndarray.tolist, torch.tensor, lambda x: torch.tensor(x).double()):
        again = policy({key: cast(value) for key, value in obs.items()})
        assert np.array_equal(again, action) and again.dtype == np.float32
        many = policy({key: cast(np.stack([value, value])) for key, value in obs.items()})
        assert np.array_equal(many, [action, action])


def test_a_default_of_float64(run):
    generator, obs = torch.Generator(), ballbot_env.BallbotEnv().reset(seed=0)[0]
    expected = ppo.load_policy(run[0])(obs, False, generator.manual_seed(0))
    torch.set_default_dtype(torch.float64)
    try:
        action = ppo.load_policy(run[0])(obs, False, generator.manual_seed(0))
        again = ballbot_env.BallbotEnv().reset(seed=0)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert action.dtype == np.float32 and np.array_equal(action, expected)
    assert all(np.array_equal(again[key], value) and again[key].dtype == value.dtype for key, value in obs.items())


def test_sampled_actions(tmp_path):
    agent = make_run(tmp_path / "run", cameras=False, init_log_std=-2.0)
    policy = ppo.load_policy(str(tmp_path / "run"))
    obs, _ = gym.make_vec("Ballbot-v0", num_envs=1, terrain="flat", cameras=False).reset(seed=0)
    obs = {key: np.repeat(value, 5000, 0) for key, value in obs.items()}
    sampled = [policy(obs, deterministic=False, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(sampled[0], sampled[1]) and not np.array_equal(sampled[0], sampled[2])
    np.testing.assert_allclose((sampled[0] - policy(obs)).std(0), np.exp(-2), rtol=0.05)
    agent.log_std.data += 3
    actions = ppo.Policy(agent, None)(obs, deterministic=False)
    assert np.abs(actions).max() == 1 and (np.abs(actions) == 1).mean() < 0.9
