"""PPO by hand-computed examples, by short real runs, and by what it says to bad input."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ballbot_env
import ppo_ballbot as ppo
import ppo_ballbot_schedules as schedules
from ballbot_utils import runs
from ballbot_utils.distributed import pin_to_core_share
from ballbot_utils.geometry import in_body_frame
from ballbot_utils.observations import PROPRIOCEPTION

REPOSITORY = Path(ppo.__file__).resolve().parent

SMALL = ppo.Args(
    frame_skip=1, norm_obs=False, privileged_critic=False,
    num_processes=1, num_threads=1, num_envs=4, num_steps=64, minibatch_size=64, total_timesteps=512, eval_interval=256,
    eval_episodes=2, final_eval_episodes=3, run_name="run",
)  # fmt: skip


def test_gae_by_hand():
    # Two environments, three steps, gamma 0.5, lambda 0.5. In the second, step 1 terminates.
    rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    values = torch.tensor([[4.0, 4.0], [6.0, 6.0], [8.0, 8.0]])
    next_values = torch.tensor([[6.0, 6.0], [8.0, 0.0], [10.0, 10.0]])
    dones = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    # deltas of the first: 1+3-4 = 0, 2+4-6 = 0, 3+5-8 = 0; of the second: 0, 2+0-6 = -4, 0
    advantages = ppo.gae(rewards, values, next_values, dones, 0.5, 0.5)
    assert advantages.tolist() == [[0, -1], [0, -4], [0, 0]]
    # With lambda 1 and no episode's end, advantage + value is the discounted return:
    # 3 + 10/2 = 8, 2 + 8/2 = 6, 1 + 6/2 = 4.
    values = torch.tensor([[1.0], [1.0], [1.0]])
    next_values = torch.tensor([[1.0], [1.0], [10.0]])
    returns = ppo.gae(rewards[:, :1], values, next_values, torch.zeros(3, 1), 0.5, 1.0) + values
    assert returns.flatten().tolist() == [4, 6, 8]


class ScriptedEnvs:
    """Two environments whose `vel` counts steps; at step 1 the first terminates and the second is truncated."""

    render_seconds, num_envs, new_frames, final_slopes = 0.0, 2, np.zeros(2, bool), np.zeros((2, 6), np.float32)

    def __init__(self):
        self.clock = 0

    def observation(self, vel):
        obs = {key: np.zeros((2, 3), np.float32) for key in PROPRIOCEPTION}
        obs["vel"][:, 0] = vel
        return obs

    def step(self, actions):
        self.clock += 1
        ends = self.clock == 2
        terminations, truncations = np.array([ends, False]), np.array([False, ends])
        infos = {}
        if ends:
            final = self.observation(100)
            final_obs = [{key: value[i] for key, value in final.items()} for i in range(2)]
            infos = {"episode": {"r": np.ones(2), "l": np.full(2, 2)}, "_episode": np.ones(2, bool)}
            infos["final_obs"] = np.array(final_obs, object)
        vel = 0 if ends else self.clock
        return self.observation(vel), np.full(2, 0.5), terminations, truncations, infos


def test_truncation_bootstraps_and_termination_does_not():
    args = replace(SMALL, cameras=False, num_envs=2, num_steps=3)
    agent = ppo.Agent(args)
    agent.critic = torch.nn.Linear(15, 1)  # the value is the observed vel: the seventh of the features
    torch.nn.init.zeros_(agent.critic.bias)
    agent.critic.weight.data = torch.eye(15)[6:7]
    envs = ScriptedEnvs()
    observation = ppo.proprioception(envs.observation(0), agent), torch.zeros(2, 0)
    batch, transitions, (proprio, depth), episodes, _ = ppo.rollout(envs, agent, args, observation)
    _, _, next_values, dones = transitions
    assert proprio[:, 6].tolist() == [3, 3] and depth.shape == (2, 0)
    assert batch["values"].tolist() == [[0, 0], [1, 1], [0, 0]]
    # Step 1 leads to vel 100 before the reset: worth nothing where terminated, 100 where truncated.
    assert next_values.tolist() == pytest.approx(np.array([[1, 1], [0, 100], [3, 3]]), rel=1e-5)
    assert dones.tolist() == [[0, 0], [1, 1], [0, 0]]
    advantages = ppo.gae(*transitions, 0.9, 0.8)
    # deltas: 0.5+0.9*1-0 = 1.4; 0.5-1 = -0.5 and 0.5+90-1 = 89.5; 0.5+0.9*3-0 = 3.2, which must not leak back
    expected = [[1.4 + 0.72 * -0.5, 1.4 + 0.72 * 89.5], [-0.5, 89.5], [3.2, 3.2]]
    assert advantages.numpy() == pytest.approx(np.array(expected), rel=1e-4)
    assert [(r, length) for r, length, _ in episodes] == [(1, 2), (1, 2)]


def test_a_command_is_seen_in_the_robots_frame():
    args = replace(SMALL, cameras=False, goal="command")
    envs = ppo.make_envs(args, 2)
    obs, _ = envs.reset(seed=0)
    obs["orientation"][:] = [0, 0, np.pi / 2]  # it faces -x, so that +y is to its right
    obs["command"][:] = [0, 0.4]
    for body_frame, command in ((False, [0, 0.4]), (True, [0.4, 0])):
        agent = ppo.Agent(replace(args, body_frame=body_frame))
        proprio = ppo.proprioception(obs, agent)
        assert proprio.shape == (2, agent.num_proprio) == (2, 17 + body_frame)
        np.testing.assert_allclose(proprio[:, -2:], [command] * 2, atol=1e-6)


def test_a_truncated_episodes_value_is_of_its_final_slopes():
    args = replace(SMALL, cameras=False, privileged_critic=True, num_steps=3, max_episode_steps=3)
    agent, envs = ppo.Agent(args), ppo.make_envs(args, 4)
    agent.critic = torch.nn.Linear(21, 1, bias=False)  # the value is 10 times the first slope
    agent.critic.weight.data = torch.eye(21)[15:16]
    obs, _ = envs.reset(seed=0)
    observation = ppo.proprioception(obs, agent), torch.zeros(4, 0)
    batch, (_, _, next_values, dones), *_ = ppo.rollout(envs, agent, args, observation)
    others = ppo.make_envs(replace(args, max_episode_steps=4), 4)  # which do not end there
    others.reset(seed=0)
    for actions in batch["actions"]:
        others.step(actions.numpy())
    assert dones[2].all() and len(np.unique(others.slopes()[:, 0])) == 4
    assert next_values[2].numpy() == pytest.approx(10 * others.slopes()[:, 0], rel=1e-5)


@pytest.mark.slow
def test_adjacent_seeds_share_no_environment(monkeypatch):
    """Neither in training nor in evaluations, and ranks together have the environments of one process."""
    seeds = []
    monkeypatch.setattr(ballbot_env.BallbotVectorEnv, "reset", lambda self, seed: seeds.append(seed) or 1 / 0)
    for seed, rank, size in ((1, 0, 1), (2, 0, 1), (1, 0, 2), (1, 1, 2)):
        monkeypatch.setattr(ppo, "rank", lambda: rank)  # noqa: B023
        monkeypatch.setattr(ppo, "world_size", lambda: size)  # noqa: B023
        with pytest.raises(ZeroDivisionError):
            args = replace(SMALL, seed=seed)
            ppo.start(args, SimpleNamespace(checkpoint=None, weights={}), *ppo.build(args))
    assert len({*seeds[0], *seeds[1]}) == 8 and seeds[2] + seeds[3] == seeds[0]
    agent, first = ppo.Agent(SMALL), ballbot_env.spawn_seeds(1_000_000, 3)
    with pytest.raises(ZeroDivisionError):
        ppo.evaluate(agent, SMALL, 3)  # by the second of two ranks
    assert seeds[4] == first[1:] and not {*first} & {*seeds[0], *seeds[1]}


def test_log_prob_is_the_normal_density():
    actions, mean, log_std = torch.randn(5, 3), torch.randn(5, 3), torch.randn(3)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    assert torch.allclose(ppo.log_prob(actions, mean, log_std), expected, atol=1e-5)


def make_agent(**changes):
    """Flags without cameras for one gradient step on four samples, and an agent of them."""
    one_step = dict(minibatch_size=4, update_epochs=1, clip_coef=0.2, ent_coef=0.0)
    args = replace(SMALL, cameras=False, **one_step | changes)
    torch.manual_seed(0)
    return ppo.Agent(args), args


@torch.no_grad()
def make_batch(agent, samples=4, ratio=1.0, **values):
    """A batch for `update` with this `ratio` of action probabilities, now to acting; other values are 0 or given."""
    proprio, actions = torch.randn(samples, 15), torch.randn(samples, 3)
    logprobs = ppo.log_prob(actions, agent.actor(proprio), agent.log_std) - torch.tensor(ratio).log()
    batch = dict(proprio=proprio, depth=torch.zeros(samples, 0), slopes=torch.zeros(samples, 0), actions=actions,
                 logprobs=logprobs)  # fmt: skip
    zeros = torch.zeros(samples)
    return batch | {key: torch.as_tensor(values.get(key, zeros)) for key in ("advantages", "values", "returns")}


def update(agent, args, batch, learning_rate=0.1):
    """The losses of an `update` with plain gradient steps."""
    batch = {key: value[None] for key, value in batch.items()}  # (steps, samples, ...)
    return ppo.update(agent, torch.optim.SGD(agent.parameters(), lr=learning_rate), args, batch)


def flat(agent):
    return torch.cat([p.detach().flatten() for p in agent.parameters()])


def one_update(advantage, ratio=1.0):
    """How one update on equal advantages changes log probabilities, and its losses."""
    agent, args = make_agent()
    batch = make_batch(agent, ratio=ratio, advantages=torch.full((4,), advantage))

    def logprobs():
        return ppo.log_prob(batch["actions"], agent.actor(batch["proprio"]), agent.log_std).detach()

    before, losses = logprobs(), update(agent, args, batch, 1e-2)
    return logprobs() - before, losses


def test_update_follows_advantages_within_the_clip_range():
    change, losses = one_update(1.0)
    assert change.mean() > 0
    assert losses["policy_loss"] == pytest.approx(-1) and losses["approx_kl"] == pytest.approx(0, abs=1e-6)
    change, _ = one_update(-1.0)
    assert change.mean() < 0
    # A ratio of 1.5 is beyond 1.2: a positive advantage has no gradient there, a negative one has.
    change, losses = one_update(1.0, ratio=1.5)
    assert change.abs().max() == 0
    assert losses["policy_loss"] == pytest.approx(-1.2) and losses["clipfrac"] == 1
    change, losses = one_update(-1.0, ratio=1.5)
    assert change.mean() < 0
    assert losses["policy_loss"] == pytest.approx(1.5)


def test_clip_vloss_by_hand():
    """The critic says 1 everywhere. Its values when acting, clipped to 0.2 from them, and the returns:

    0, 0.2, 0: max(1, 0.04) = 1;  0, 0.2, 3: max(4, 7.84) = 7.84;  2, 1.8, 1: max(0, 0.64) = 0.64;  1, 1, 1: 0.
    """
    for clip_vloss, value_loss in ((True, (1 + 7.84 + 0.64) / 4), (False, (1 + 4) / 4)):
        agent, args = make_agent(clip_vloss=clip_vloss, vf_layers=0)
        torch.nn.init.zeros_(agent.critic.weight_0)
        torch.nn.init.ones_(agent.critic.bias_0)
        batch = make_batch(agent, values=[0.0, 0.0, 2.0, 1.0], returns=[0.0, 3.0, 1.0, 1.0])
        assert update(agent, args, batch)["value_loss"] == pytest.approx(value_loss)


def test_norm_adv_by_hand():
    """Advantages 0, 0, 0, 4 have mean 1 and standard deviation 3^0.5; the ratios are 1, 1, 1, 2 and not clipped."""
    for norm_adv, minibatch_size, policy_loss in ((False, 4, -2.0), (True, 4, -(3**0.5) / 4), (True, 1, 0.0)):
        agent, args = make_agent(norm_adv=norm_adv, minibatch_size=minibatch_size, clip_coef=10.0)
        batch = make_batch(agent, ratio=[1.0, 1.0, 1.0, 2.0], advantages=[0.0, 0.0, 0.0, 4.0])
        assert update(agent, args, batch, 1e-9)["policy_loss"] == pytest.approx(policy_loss, abs=1e-5)


@pytest.mark.parametrize("target_kl, epochs", [(0.2, 1), (0.201, 5)])
def test_target_kl_ends_the_epochs(target_kl, epochs):
    """Ratios of 2 have a divergence of 2 - 1 - log 2 = 0.307, ratios of 1.5 of 0.095: 0.2007 in the mean."""
    agent, args = make_agent(target_kl=target_kl, update_epochs=5, minibatch_size=2)
    losses = update(agent, args, make_batch(agent, ratio=[2.0, 2.0, 1.5, 1.5], advantages=torch.ones(4)), 0.0)
    assert losses["approx_kl"] == pytest.approx(0.2007, abs=1e-4) and losses["epochs"] == epochs


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e6])
def test_max_grad_norm_bounds_the_gradient(max_grad_norm):
    agent, args = make_agent(max_grad_norm=max_grad_norm)
    before = flat(agent)
    losses = update(agent, args, make_batch(agent, advantages=torch.ones(4), returns=torch.ones(4)), 1e-2)
    assert losses["grad_norm"] > 1  # before clipping
    step = (flat(agent) - before).norm().item() / 1e-2
    assert step == pytest.approx(min(max_grad_norm, losses["grad_norm"]), rel=1e-3)


def test_explained_variance_by_hand():
    """Returns 1 and 3 have variance 1; errors of -0.5 and 0.5 have 0.25."""
    assert ppo.explained_variance(torch.tensor([1.0, 3.0]), torch.tensor([-0.5, 0.5])) == pytest.approx(0.75)


def test_moments_of_parts_are_those_of_the_whole():
    agent = ppo.Agent(replace(SMALL, cameras=False, norm_obs=True))
    samples = torch.randn(1000, 15) * torch.arange(1, 16) + 3
    for part in samples.split([10, 490, 500]):
        agent.update_obs_moments(part)
    assert torch.allclose(agent.obs_mean, samples.mean(0), atol=1e-4)
    assert torch.allclose(agent.obs_var, samples.var(0, correction=0), rtol=1e-4)


def test_learning_rates():
    schedule = [ppo.learning_rate_at(SMALL, p) for p in (1, 0.67, 0.66, 0.34, 0.33, 0)]
    assert schedule == [1e-4, 1e-4, 5e-5, 5e-5, 1e-5, 1e-5]
    assert ppo.learning_rate_at(replace(SMALL, learning_rate=3e-4), 0.5) == 3e-4
    assert ppo.learning_rate_at(replace(SMALL, learning_rate=3e-4, anneal_lr=True), 0.5) == 1.5e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the default task, cameras and all, of two small iterations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        return ppo.train(SMALL).resolve()


@pytest.mark.slow
def test_run_leaves_log_and_checkpoints(run):
    log = EventAccumulator(str(run)).Reload()
    tags = set(log.Tags()["scalars"])
    expected = {
        "charts/learning_rate", "charts/SPS", "charts/action_std", "losses/policy_loss", "losses/value_loss",
        "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac", "losses/explained_variance",
        "SPS/simulate", "SPS/render", "SPS/infer", "SPS/learn", "eval/episodic_return", "eval/episodic_length",
    }  # fmt: skip
    assert expected <= tags
    assert [event.step for event in log.Scalars("losses/value_loss")] == [256, 512]
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert checkpoint["global_step"] == 512 and checkpoint["args"]["minibatch_size"] == 64
    assert torch.load(run / "best.pt", weights_only=True)["eval"]["episodes"] in (2, 3)
    assert not list(run.glob("*.part"))


def test_checkpoint_is_the_policy(run):
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    args = ppo.Args(**checkpoint["args"])
    agent = ppo.Agent(args)
    agent.load_state_dict(checkpoint["model"])
    result = ppo.evaluate(agent, args, checkpoint["eval"]["episodes"])
    assert result == pytest.approx(checkpoint["eval"])


@pytest.mark.slow
def test_frozen_encoder_stays_and_free_encoder_learns(run, tmp_path, monkeypatch):
    shipped = torch.load(REPOSITORY / "assets" / "depth_encoder_small.pt", weights_only=True)["encoder"]
    frozen = torch.load(run / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(frozen[f"encoder.{key}"], value) for key, value in shipped.items())
    monkeypatch.chdir(tmp_path)
    free = ppo.train(replace(SMALL, freeze_encoder=False, num_envs=2, num_steps=32, minibatch_size=32,
                             total_timesteps=64))  # fmt: skip
    torch.manual_seed(SMALL.seed)
    start = ppo.Agent(SMALL).state_dict()
    end = torch.load(free / "last.pt", weights_only=True)["model"]
    assert not any(torch.equal(end[f"encoder.{key}"], start[f"encoder.{key}"]) for key in shipped)
    near = [torch.allclose(end[f"encoder.{key}"], start[f"encoder.{key}"], atol=0.01) for key in shipped]
    assert all(near)  # it started there, not from the file


def test_end_to_end_update_starts_from_the_features_of_the_rollout():
    """Encoding the stored frames again gives what the policy saw: the first step's probability ratios are 1."""
    args = replace(SMALL, freeze_encoder=False, depth_scale=0.3, num_steps=16, update_epochs=1)
    envs, agent = ppo.make_envs(args, 4), ppo.Agent(args)
    obs, _ = envs.reset(seed=0)
    depth = ppo.depth_features(envs, agent, torch.zeros(4, 40))
    batch, *_ = ppo.rollout(envs, agent, args, (ppo.proprioception(obs, agent), depth))
    batch |= {"advantages": torch.randn(16, 4), "returns": torch.randn(16, 4)}
    losses = ppo.update(agent, torch.optim.AdamW(agent.parameters(), lr=1e-4), args, batch)
    assert losses["approx_kl"] == pytest.approx(0, abs=1e-6)


def test_held_frames_keep_their_features():
    envs = ppo.make_envs(SMALL, 3)
    agent = ppo.Agent(SMALL)
    obs, _ = envs.reset(seed=0)
    depth = ppo.depth_features(envs, agent, torch.zeros(3, 40))
    for step in range(1, 8):
        obs, *_ = envs.step(np.zeros((3, 3)))
        renewed = ppo.depth_features(envs, agent, depth)
        assert (renewed is depth) == (step != 6)
        depth = renewed
        seen = torch.from_numpy(np.concatenate([obs["depth_0"], obs["depth_1"]], 1))
        with torch.no_grad():
            assert torch.allclose(depth, agent.encode(seen), atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="where a process cannot say where it runs")
@pytest.mark.parametrize(
    "size, number, kept", [(1, 5, [1, 3, 5, 7, 9]), (2, 2, [1, 3]), (5, 1, [1]), (8, 1, None)]
)  # fmt: skip
def test_ranks_keep_to_their_own_cores(size, number, kept, monkeypatch):
    """Of five; `number`: as the first of `size` ranks then says how many threads to start."""
    cores, chosen = [9, 1, 3, 5, 7], []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cores))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, share: chosen.append(list(share)))
    shares = []
    for rank in range(size):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
        shares.append(pin_to_core_share.__wrapped__())
    assert shares[0] == number
    if kept is None:
        assert not chosen and shares == [1] * size
    else:
        assert chosen[0] == kept and sorted(chain(*chosen)) == sorted(cores) and sum(shares) == len(cores)


def update_of_rank(rank, size, store, folder):
    """One minibatch in equal shares of `size` ranks, and the moments of its proprioception."""
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    agent, args = make_agent(minibatch_size=240, norm_adv=True, norm_obs=True)
    values = {key: torch.randn(240) for key in ("advantages", "values", "returns")}
    batch = make_batch(agent, 240, (0.3 * torch.randn(240)).exp().tolist(), **values)
    batch = {key: value[rank * 240 // size : (rank + 1) * 240 // size] for key, value in batch.items()}
    losses = update(agent, args, batch)
    agent.update_obs_moments(batch["proprio"])
    torch.save((agent.state_dict(), losses), f"{folder}/{size}_{rank}.pt")
    if size > 1:
        torch.distributed.destroy_process_group()
        os._exit(0)  # as `rank_main` ends


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_learn_together_what_one_would_alone(size, tmp_path):
    """Gradients, normalized advantages, statistics and moments equal the whole minibatch's, on all ranks."""
    update_of_rank(0, 1, None, tmp_path)
    torch.multiprocessing.spawn(update_of_rank, (size, tmp_path / "store", tmp_path), size)
    alone, losses = torch.load(tmp_path / "1_0.pt", weights_only=True)
    assert losses["clipfrac"] > 0.1  # some ratios are clipped
    for rank in range(size):
        model, its_losses = torch.load(tmp_path / f"{size}_{rank}.pt", weights_only=True)
        first, _ = torch.load(tmp_path / f"{size}_0.pt", weights_only=True)
        assert its_losses == pytest.approx(losses, abs=1e-4)
        for key, value in alone.items():
            assert torch.equal(model[key], first[key]), key
            assert torch.allclose(model[key], value, atol=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_all_but_the_actions_stays_on_the_device(monkeypatch, freeze_encoder):
    """PyTorch's meta device stands in for a GPU: operations that mix devices raise, and what leaves it is counted."""
    left = []

    def cpu(tensor):
        left.append(tuple(tensor.shape))
        return torch.zeros(tensor.shape)

    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: to_list(cpu(t) if t.device.type == "meta" else t))
    args = replace(SMALL, norm_obs=True, num_steps=8, minibatch_size=16, freeze_encoder=freeze_encoder)
    envs = gym.make_vec("Ballbot-v0", num_envs=4, device="meta", max_episode_steps=5)
    agent = ppo.Agent(args).to("meta")
    agent.encoder.requires_grad_(not freeze_encoder)
    optimizer = torch.optim.AdamW([p for p in agent.parameters() if p.requires_grad])
    obs, _ = envs.reset(seed=0)
    assert obs["depth_0"].device.type == "meta"
    depth = ppo.depth_features(envs, agent, torch.zeros(4, 40, device="meta"))
    batch, transitions, *_ = ppo.rollout(envs, agent, args, (ppo.proprioception(obs, agent), depth))
    assert left == [(4, 3)] * 8  # actions
    batch["advantages"] = ppo.gae(*transitions, 0.9, 0.9)
    batch["returns"] = batch["advantages"] + batch["values"]
    agent.update_obs_moments(batch["proprio"].flatten(0, 1))
    left.clear()
    ppo.update(agent, optimizer, args, batch)
    assert left == [(7,)] * args.update_epochs  # statistics of an epoch


@pytest.mark.slow
def test_same_seed_same_weights_at_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = []
    for name, seed, num_threads in (("a", 1, 1), ("b", 1, 1), ("c", 1, 2), ("d", 2, 1)):
        run = ppo.train(replace(SMALL, run_name=name, seed=seed, num_threads=num_threads, norm_obs=True))
        model = torch.load(run / "last.pt", weights_only=True)["model"]
        weights.append(torch.cat([value.flatten().double() for value in model.values()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert not torch.allclose(weights[0], weights[3], atol=1e-4)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    """They share one run. tests/test_resume.py holds two, the script's own and torchrun's, to the same weights."""
    command = [sys.executable, str(REPOSITORY / "ppo_ballbot.py"), "--run-name", "four", "--num-processes", "4"]
    command += "--frame-skip 1 --num-envs 4 --num-steps 64 --minibatch-size 64 --total-timesteps 512".split()
    command += "--eval-interval 256 --eval-episodes 3 --final-eval-episodes 3 --norm-obs --norm-adv".split()
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert output.stdout.count("final policy") == 1
    run = torch.load(tmp_path / "runs" / "four" / "last.pt", weights_only=True)
    assert len(run["ranks"]) == run["args"]["num_processes"] == 4


@pytest.mark.slow
def test_it_learns(tmp_path, monkeypatch):
    """Some 160,000 steps without cameras: clearly longer balance than at the start."""
    monkeypatch.chdir(tmp_path)
    changes = dict(num_processes=1, num_threads=1, cameras=False, total_timesteps=163_840, max_episode_steps=4000)
    args = ppo.Args(**ppo.PRESETS["tuned"] | changes, final_eval_episodes=4, run_name="run")
    log = EventAccumulator(str(ppo.train(args))).Reload()
    lengths = [event.value for event in log.Scalars("charts/episodic_length_mean100")]
    assert lengths[-1] > 1.25 * lengths[2], lengths


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"minibatch_size": 100}, "which does not divide --num-envs * --num-steps = 256: 64 does"),
        ({"num_envs": -1}, "--num-envs is -1: give 1 or more"),
        ({"num_processes": 0}, "--num-processes is 0: give 1 or more"),
        ({"total_timesteps": 100}, "give at least --num-envs * --num-steps * --frame-skip = 256"),
        ({"num_processes": 3}, "3 processes cannot share --num-envs 4 and --minibatch-size 64"),
        ({"learning_rate": -2.0}, "give -1 for the schedule"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan: give a finite number"),
        ({"anneal_lr": True}, "--anneal-lr needs a positive --learning-rate"),
        ({"gamma": 1.5}, "--gamma is 1.5"),
        ({"clip_coef": 0.0}, "--clip-coef is 0.0"),
        ({"ent_coef": float("nan")}, "--ent-coef is nan"),
        ({"eval_terrain_seed": 0}, "terrain not trained on"),
        ({"randomization": {"mas": 0.1}}, "randomization has no 'mas': there are terrain_amplitude, mass, friction"),
        ({"randomization": {"mass": 2}}, "randomization mass is 2: give a share from 0 to 0.9"),
        ({"terrain": "flat", "curriculum": True}, 'curriculum has no effect on terrain "flat" without a push'),
        ({"encoder_path": "assets/none.pt"}, "none.pt is missing"),
        ({"encoder_path": "ballbot_env.py"}, "ballbot_env.py is damaged, or not a checkpoint"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_before_any_work(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        ppo.train(replace(SMALL, **changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_existing_run_is_not_overwritten(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    before = (run / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="runs/run exists"):
        ppo.train(SMALL)
    assert (run / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_file_copied_alone_runs(tmp_path):
    """ppo_ballbot.py beside ballbot_env.py, ballbot_utils/ and assets/ is enough."""
    for name in ("ppo_ballbot.py", "ballbot_env.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("ballbot_utils", "assets"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    flags = (
        "--frame-skip 1 --num-envs 2 --num-steps 32 --minibatch-size 32 --total-timesteps 64 --final-eval-episodes 2"
    )
    command = [sys.executable, "ppo_ballbot.py", *flags.split()]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert "targets, mean over 2 episodes on unseen terrain: return > 100 missed, length > 3000 missed" in output.stdout


def documentation():
    """The text of README.md and docs/."""
    return "\n".join(page.read_text() for page in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")))


@pytest.mark.parametrize("script", [ppo, schedules])
def test_every_flag_is_documented_with_its_default(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit):
        script.parse_args()
    help_text = capsys.readouterr().out
    assert help_text.count(":\n  --") == 6 and max(map(len, help_text.splitlines())) <= 100
    rows = re.findall(r"^\| `--([a-z-]+)`.*?\|(.*?)\|", documentation(), re.MULTILINE)
    for name, default in vars(script.Args()).items():
        flag = name.replace("_", "-")
        assert re.search(rf"  --(\[no-\])?{flag}\b", help_text), flag
        shown = [text.strip() for row, text in rows if row == flag]
        if isinstance(default, bool):
            assert ("on" if default else "off") in shown, flag
        elif isinstance(default, (int, float)):
            assert default in map(float, shown), flag
        elif isinstance(default, dict):
            assert " ".join(f"{key} {value}" for key, value in default.items()) in shown, flag
        elif name != "exp_name":
            assert str(default or "") in shown, flag


def test_documented_presets_are_those_of_the_script(monkeypatch):
    """Each row of the table has the flags of a preset; `robust`'s row has what differs from `tuned`."""
    rows = {name: text for name, text in re.findall(r"^\| `(\w+)` \|(.*)", documentation(), re.MULTILINE)}
    for preset, values in ppo.PRESETS.items():
        flags = " ".join(re.findall(r"`(--[^`]*)`", rows[preset]))
        base = ["--preset", "tuned"] if preset == "robust" else []
        monkeypatch.setattr(sys, "argv", ["ppo_ballbot.py", *base, *flags.split()])
        assert vars(ppo.parse_args()) | {"preset": ""} == vars(ppo.Args(**values)), preset


def test_the_guides_values_are_the_defaults():
    """Its recommended starting point with its net_arch, and what its three configurations state.

    `n_steps` is 2 ms steps: an action is held for four of them.
    """
    named = {"learning_rate": "learning_rate", "clip_range": "clip_coef", "ent_coef": "ent_coef", "vf_coef": "vf_coef",
             "n_epochs": "update_epochs", "batch_sz": "minibatch_size", "weight_decay": "weight_decay",
             "normalize_advantage": "norm_adv", "hidden_sz": "hidden_size", "num_envs": "num_envs"}  # fmt: skip
    start = dict(learning_rate=-1, clip_range=0.015, ent_coef=0.001, vf_coef=2.0, n_steps=2048, n_epochs=5,
                 batch_sz=256, weight_decay=0.01, normalize_advantage=False, hidden_sz=128, num_envs=10)  # fmt: skip
    guide = {
        "": start,
        "balanced": start,
        "aggressive": start | dict(learning_rate=1e-3, clip_range=0.2, ent_coef=0.01, n_steps=1024, n_epochs=3,
                                   hidden_sz=64, num_envs=16),
        "conservative": start | dict(n_steps=4096, n_epochs=10, hidden_sz=256, num_envs=8),
    }  # fmt: skip
    base = ppo.Args()
    for preset, values in guide.items():
        args = ppo.Args(**ppo.PRESETS.get(preset, {}))
        assert args.frame_skip * args.num_steps == values["n_steps"]
        assert {name: getattr(args, field) for name, field in named.items()} == {k: values[k] for k in named}
        assert args.pi_layers == args.vf_layers == 4
        # All else is the same in all of them
        stated = {*named.values(), "num_steps"}
        assert {k: v for k, v in vars(args).items() if k not in stated} == {
            k: v for k, v in vars(base).items() if k not in stated
        }
    schedule = [ppo.learning_rate_at(base, left) for left in (1.0, 0.67, 0.66, 0.34, 0.33, 0.0)]
    assert schedule == [1e-4, 1e-4, 5e-5, 5e-5, 1e-5, 1e-5]


def test_body_frame_by_hand():
    # Facing +x (a quarter turn to the right about z) and driving along +x: forward is +y in the robot's frame.
    quarter = np.float32([[0, 0, -np.pi / 2]])
    lean, heading, vel = in_body_frame(quarter, np.float32([[0.5, 0, 0.1]]))
    assert lean == pytest.approx(np.zeros((1, 2)), abs=1e-6) and heading == pytest.approx(-np.pi / 2)
    assert vel == pytest.approx(np.array([[0, 0.5, 0.1]]), abs=1e-6)
    # Leaning by 0.1 rad about the robot's x axis looks the same at any heading.
    for turned in (0.0, 1.0, -2.5):
        turn, tilt = ([np.cos(a / 2), *(np.sin(a / 2) * np.array(axis))] for a, axis in
                      ((turned, (0, 0, 1)), (0.1, (1, 0, 0))))  # fmt: skip
        rotation = np.zeros(4)
        mujoco.mju_mulQuat(rotation, np.array(turn), np.array(tilt))
        vector = np.zeros(3)
        mujoco.mju_quat2Vel(vector, rotation, 1.0)
        lean, heading, _ = in_body_frame(vector[None], np.zeros((1, 3)))
        assert lean == pytest.approx(np.array([[0, np.sin(0.1)]]), abs=1e-6) and heading == pytest.approx(turned)


def test_the_age_of_frames_and_the_heights_count_less():
    agent = ppo.Agent(replace(SMALL, norm_obs=True, depth_scale=0.1, body_frame=True, env_kwargs=("height_scan=True",)))
    proprio = torch.randn(1000, 16 + 30 + 1) * 0.003
    agent.update_obs_moments(proprio)
    stds = agent.features(proprio, torch.zeros(1000, 40)).std(0)
    for part, expected in ((stds[:16], 1), (stds[16:46], 0.25), (stds[46:47], 0.1)):
        assert torch.allclose(part, torch.full_like(part, expected), rtol=0.01)


@pytest.mark.slow
def test_a_privileged_critic_sees_slopes_and_the_policy_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = replace(SMALL, cameras=False, privileged_critic=True)
    agent = ppo.Agent(args)
    proprio, envs = torch.randn(50, 15), ppo.make_envs(args, 50)
    envs.reset(seed=0)
    features, slopes = agent.features(proprio, torch.empty(50, 0)), ppo.ground_slopes(envs, agent)
    assert agent.actor.weight_0.shape[0] == 15 and features.shape == (50, 15) and slopes.std() > 0.01
    assert (agent.value(features, slopes) != agent.value(features, 0 * slopes)).all()
    batch, *_ = ppo.rollout(envs, agent, args, (proprio, torch.empty(50, 0)))
    values = agent.value(agent.features(batch["proprio"], batch["depth"]).flatten(0, 1), batch["slopes"].flatten(0, 1))
    assert batch["slopes"][0].equal(slopes) and torch.allclose(values.view(-1, 50), batch["values"], atol=1e-5)
    policy = ppo.load_policy(ppo.train(args))  # plays where nothing tells the slopes
    assert policy(gym.make("Ballbot-v0", cameras=False).reset(seed=0)[0]).shape == (3,)


@pytest.mark.parametrize("frame_skip, actions, evaluated", [(1, 1000, 4000), (4, 250, 1000), (3, 334, 1334)])
def test_lengths_of_episodes_are_rounded_up_to_whole_actions(frame_skip, actions, evaluated):
    args = replace(SMALL, cameras=False, frame_skip=frame_skip, max_episode_steps=1000)
    assert ppo.make_envs(args, 1).max_episode_steps == actions
    assert ppo.make_envs(args, 1, evaluation=True).max_episode_steps == evaluated


def test_steps_are_physics_steps_at_any_frame_skip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = replace(SMALL, cameras=False, frame_skip=4, num_steps=50, minibatch_size=50, total_timesteps=1700,
                   eval_interval=800, body_frame=True, randomization={})  # fmt: skip
    run = ppo.train(args)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert checkpoint["global_step"] == 1600
    log = EventAccumulator(str(run)).Reload()
    assert log.Scalars("eval/episodic_return")[0].step == 800
    lengths = log.Scalars("charts/episodic_length")
    assert all(100 < event.value <= 400 and event.step <= 1600 for event in lengths) and lengths
    assert "2 iterations of 800 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_the_time_to_the_targets_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "TARGET_RETURN", 1)
    monkeypatch.setattr(runs, "TARGET_LENGTH", 10)
    run = ppo.train(replace(SMALL, cameras=False))
    output = capsys.readouterr().out
    assert re.search(r"^targets met after 256 steps, \d+ min \d\d s$", output, re.M)
    assert output.count("targets met after") == 1 and "first met after 256 steps" in output
    assert torch.load(run / "last.pt", weights_only=True)["targets_met"].startswith("256 steps, ")
