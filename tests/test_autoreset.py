"""Autoreset modes of the vector environment, and Gymnasium's wrappers around it."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers
from test_env import assert_same, copy_obs, random_actions

from ballbot_env import BallbotEnv, BallbotVectorEnv

# Episodes that end at different steps, also while an action is held
SHORT = dict(terrain="flat", max_tilt=3.0, max_episode_steps=35, camera_size=16, num_threads=1, frame_skip=2)
NOISY = dict(push=2.0, push_interval=0.1, obs_noise=0.01, mass=0.2, latency=3, tilt=1)


def make(mode, **kwargs):
    return gym.make_vec("Ballbot-v0", num_envs=3, autoreset_mode=mode, **SHORT | kwargs)


@pytest.mark.parametrize("randomization", [None, NOISY], ids=["", "randomization"])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_it_is_gymnasiums_sync_vector_env_in_each_mode(mode, randomization):
    """Bit for bit, `info` and its layout included: so environment i is the single one in each mode, too."""
    kwargs = SHORT | dict(randomization=randomization)
    ours = make(mode.value, randomization=randomization)
    sync = gym.vector.SyncVectorEnv([lambda: BallbotEnv(**kwargs)] * 3, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"] is mode
    for a, b in zip(ours.reset(seed=3), sync.reset(seed=3)):
        assert_same(a, b)
    ends, resets = 0, 0
    for step, action in enumerate(random_actions(120, 3, 0.6, seed=1)):
        result, expected = ours.step(action), sync.step(action)
        ended = result[2] | result[3]
        ends += ended.sum()
        assert ("episode" in result[4]) == (mode is AutoresetMode.SAME_STEP and ended.any())
        result[4].pop("episode", None), result[4].pop("_episode", None)
        assert_same(dict(enumerate(result)), dict(enumerate(expected)), f"step {step}")
        if (mode is AutoresetMode.DISABLED and ended.any()) or step == 100:
            mask = ended if ended.any() else np.array([True, False, True])
            seed = [5, None, 6] if step == 100 else None
            resets += not mask.all()
            results = (envs.reset(seed=seed, options={"reset_mask": mask.copy()}) for envs in (ours, sync))
            for a, b in zip(*results):
                assert_same(a, b, f"reset at step {step}")
    assert ends > 5 and resets, (ends, resets)


def test_next_step_ignores_the_action_that_starts_an_episode():
    envs, others = make("NextStep"), make("NextStep")
    envs.reset(seed=0), others.reset(seed=0)
    ended = np.zeros(3, bool)
    for action in random_actions(80, 3, 0.6):
        a, b = envs.step(action), others.step(np.where(ended[:, None], np.nan, action))
        for x, y in zip(a, b):
            assert_same(x, y)
        assert not a[1][ended].any() and not a[4]["physics_errors"].any()
        ended = a[2] | a[3]


def test_disabled_wants_its_resets():
    envs = make(AutoresetMode.DISABLED)
    with pytest.raises(gym.error.ResetNeeded, match="without a reset_mask first"):
        envs.reset(options={"reset_mask": np.array([True, False, False])})
    envs.reset(seed=0)
    while not (ended := np.logical_or(*envs.step(np.full((3, 3), 0.5))[2:4])).any():
        pass
    with pytest.raises(gym.error.ResetNeeded, match=rf"environments {np.flatnonzero(ended)[0]}.* have ended"):
        envs.step(np.zeros((3, 3)))
    envs.reset(options={"reset_mask": ended})
    envs.step(np.zeros((3, 3)))
    for mask in ([True, False], np.zeros(3, bool), np.ones(3)):
        with pytest.raises(ValueError, match=r"reset_mask is .* give a bool array"):
            envs.reset(options={"reset_mask": mask})


def test_bad_modes():
    for mode in ("same_step", None, 1):
        with pytest.raises(ValueError, match=r'autoreset_mode is .*: give "SameStep", "NextStep" or "Disabled"'):
            BallbotVectorEnv(2, autoreset_mode=mode)
    with pytest.raises(TypeError, match="autoreset_mode"):  # one alone has none
        BallbotEnv(autoreset_mode="NextStep")


def test_gymnasiums_vector_wrappers():
    """Statistics, flattening and normalisation, stacked; what they say agrees with the plain environments."""
    plain, envs = make("NextStep"), wrappers.RecordEpisodeStatistics(make("NextStep"))
    envs = wrappers.NormalizeReward(wrappers.NormalizeObservation(wrappers.FlattenObservation(envs)))
    obs, _ = envs.reset(seed=0)
    plain.reset(seed=0)
    assert obs.shape == (3, 15 + 1 + 2 * 16**2) and obs in envs.observation_space
    returns, lengths, seen = np.zeros(3), np.zeros(3, int), []
    for action in random_actions(120, 3, 0.6):
        obs, _, terminations, truncations, infos = envs.step(action)
        _, rewards, expected_terminations, *_ = plain.step(action)
        assert np.array_equal(terminations, expected_terminations)
        returns += rewards
        lengths += 1
        if "episode" in infos:
            ended = terminations | truncations
            assert infos["episode"]["r"][ended] == pytest.approx(returns[ended])
            assert np.array_equal(infos["episode"]["l"][ended], lengths[ended])
            seen += list(lengths[ended])
            returns[ended], lengths[ended] = 0, -1  # the step that starts the next one does not count
    assert len(seen) > 5 and np.isfinite(obs).all()


@pytest.mark.parametrize("mode", AutoresetMode)
def test_wrappers_that_take_any_mode(mode):
    envs = wrappers.RescaleAction(make(mode), -2, 2)
    envs = wrappers.DictInfoToList(wrappers.RecordEpisodeStatistics(envs, stats_key="statistics"))
    envs.reset(seed=0)
    for action in random_actions(60, 3, 1.2):
        _, _, terminations, truncations, infos = envs.step(action)
        ended = terminations | truncations
        assert [("statistics" in info) for info in infos] == list(ended)
        if ended.any():
            if mode is AutoresetMode.SAME_STEP:
                final = infos[np.flatnonzero(ended)[0]]["final_obs"]
                assert final in envs.single_observation_space
            return
    raise AssertionError("no episode ended")


def test_state_goes_on_between_the_end_and_the_reset():
    envs, again = make("NextStep"), make("NextStep")
    envs.reset(seed=0)
    actions = iter(random_actions(200, 3, 0.6))
    while not np.logical_or(*envs.step(next(actions))[2:4]).any():
        pass
    again.set_state(envs.get_state())
    for action in actions:
        a, b = envs.step(action), again.step(action)
        assert_same(copy_obs(a[0]), copy_obs(b[0]))
        assert_same(dict(enumerate(a[1:4])), dict(enumerate(b[1:4])))
