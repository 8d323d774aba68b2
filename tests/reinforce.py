"""REINFORCE with a baseline for the ballbot: `python reinforce.py`. A small script on the library, for the tests.

Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992. The
policy sees proprioception alone. An iteration is one episode in each environment and one gradient step.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from ballbot_env import spawn_seeds
from ballbot_utils import flags, runs
from ballbot_utils.episodes import apply_in_blocks, run_episodes
from ballbot_utils.flags import Count, Few, NonNegative, Positive, Seed, Share
from ballbot_utils.observations import PROPRIOCEPTION, make_observations

NUM_INPUTS = sum(make_observations()[key].shape[0] for key in PROPRIOCEPTION)


@dataclass
class Args(flags.BaseArgs):
    exp_name: str = Path(__file__).stem  # name of the experiment, a part of the default run name
    run_name: str = ""  # folder under runs/; empty: a new name
    resume: str = ""  # continue a run: runs/<run name>
    seed: Seed = 1  # seed of networks, action noise and start poses
    total_timesteps: Count = 2_000_000  # physics steps of all environments together
    num_envs: Few = 8  # parallel environments
    frame_skip: Few = 4  # physics steps per action
    learning_rate: Positive = 5e-3  # of Adam
    gamma: Share = 0.98  # discount factor per action
    units: Count = 64  # units in the hidden layer of each network
    eval_interval: Count = 500_000  # steps between evaluations
    eval_episodes: Count = 16  # episodes of each evaluation
    save_interval: NonNegative = 10.0  # seconds between checkpoints
    cameras = False  # not a flag: the programs make an environment without cameras


class Agent(nn.Module):
    """A Gaussian policy, and the baseline, which predicts the return."""

    def __init__(self, args):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(NUM_INPUTS, args.units), nn.Tanh(), nn.Linear(args.units, 3))
        self.baseline = nn.Sequential(nn.Linear(NUM_INPUTS, args.units), nn.Tanh(), nn.Linear(args.units, 1))
        self.log_std = nn.Parameter(torch.full((3,), -1.0))

    def mean_action(self, obs):
        """The policy's mean, (n, 3) in [-1, 1], of a dict of tensors. The export to ONNX calls it."""
        return self.actor(network_inputs(obs)).clamp(-1, 1)


class Policy:
    """A trained policy as a function of a batch of observations. The programs call it."""

    def __init__(self, agent, args):
        self.agent, self.args = agent, args

    @torch.no_grad()
    def __call__(self, obs, deterministic=True, generators=()):
        mean = apply_in_blocks(self.agent.actor, network_inputs(obs), 16)
        if not deterministic:
            mean += self.agent.log_std.exp() * torch.stack([torch.randn(3, generator=one) for one in generators])
        return mean.clamp(-1, 1).numpy()


def network_inputs(obs):
    """Proprioception (n, NUM_INPUTS) of a batch of observations, float32 arrays or tensors."""
    return torch.cat([torch.as_tensor(obs[key]) for key in PROPRIOCEPTION], 1)


@torch.no_grad()
def rollout(envs, agent, seeds):
    """One episode in each environment: inputs, actions, rewards and whether they count, each (steps, envs, ...).

    The second result lists (return, length, last action) of the episodes.
    """
    obs, _ = envs.reset(seed=seeds)
    active, rows, episodes = np.ones(envs.num_envs, bool), [], []
    while active.any():
        inputs = network_inputs(obs)
        action = agent.actor(inputs) + agent.log_std.exp() * torch.randn(envs.num_envs, 3)
        obs, rewards, terminations, truncations, infos = envs.step(action.numpy())
        rows.append((inputs, action, torch.tensor(rewards * active, dtype=torch.float32), torch.tensor(active)))
        ended = (terminations | truncations) & active
        for i in np.flatnonzero(ended):
            episodes.append((float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i]), len(rows) - 1))
        active &= ~ended
    return [torch.stack(column) for column in zip(*rows)], episodes


def update(agent, optimizer, args, inputs, actions, rewards, active):
    """One gradient step; returns the losses."""
    returns = rewards.clone()  # discounted, from each step to the end of its episode
    for t in reversed(range(len(returns) - 1)):
        returns[t] += args.gamma * returns[t + 1]
    values = agent.baseline(inputs).squeeze(-1)
    advantages = (returns - values.detach())[active]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy = torch.distributions.Normal(agent.actor(inputs), agent.log_std.exp())
    policy_loss = -(policy.log_prob(actions).sum(-1)[active] * advantages).mean()
    value_loss = (returns - values)[active].square().mean()
    optimizer.zero_grad()
    (policy_loss + value_loss).backward()
    optimizer.step()
    return {"losses/policy_loss": policy_loss.item(), "losses/value_loss": value_loss.item()}


def evaluate(agent, args):
    """Deterministic episodes on unseen terrain: a dict of means and standard deviations."""
    task, n = dict(terrain_seed=args.eval_terrain_seed, cameras=False, frame_skip=args.frame_skip), args.eval_episodes
    results = run_episodes(gym.make_vec("Ballbot-v0", n, **task), Policy(agent, args), spawn_seeds(1_000_000, n))
    columns = dict(zip(("episodic_return", "episodic_length", "falls"), np.array(results).T))
    stds = {f"{name}_std": float(values.std()) for name, values in columns.items()}
    return {"episodes": n} | {name: float(values.mean()) for name, values in columns.items()} | stds


def train(args):
    """Train by `args`; logs and checkpoints go to runs/<run name>."""
    torch.set_num_threads(1)
    run = runs.prepare_run(args, time.perf_counter(), in_rank=False)
    if run.final:
        return print(f"{run.dir} has finished: to continue, give more --total-timesteps")
    torch.manual_seed(args.seed)
    agent = Agent(args)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate)
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["model"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        torch.set_rng_state(run.checkpoint["rng"])
    task = dict(cameras=False, frame_skip=args.frame_skip, max_episode_steps=1000)
    envs = gym.make_vec("Ballbot-v0", args.num_envs, **task)
    with run:
        run.show(0)
        while run.global_step < args.total_timesteps:
            started = time.perf_counter()
            batch, episodes = rollout(envs, agent, spawn_seeds(args.seed + run.global_step, args.num_envs))
            seconds = {"simulate": time.perf_counter() - started}
            losses = update(agent, optimizer, args, *batch)
            seconds["learn"] = time.perf_counter() - started - seconds["simulate"]
            steps = len(batch[0]) * args.num_envs * args.frame_skip
            run.log_iteration(steps, seconds, episodes, losses)
            if run.global_step // args.eval_interval > (run.global_step - steps) // args.eval_interval:
                run.log_evaluation(agent, evaluate(agent, args))
            if run.save_is_due() or run.global_step >= args.total_timesteps:
                run.save_last(agent, {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()})
        run.finish(agent, lambda: evaluate(agent, args))


if __name__ == "__main__":
    runs.run_training(lambda: flags.parse_args(Args, {}), train)
