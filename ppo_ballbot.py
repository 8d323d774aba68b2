"""PPO for the ballbot: `python ppo_ballbot.py --clip-coef 0.015`.

Proximal Policy Optimization (Schulman et al., arXiv 1707.06347) with generalized advantage estimation
(Schulman et al., arXiv 1506.02438) on Ballbot-v0: proprioception and two depth cameras on uneven terrain.
It needs ballbot_env.py, ballbot_utils/ and assets/ beside it. The defaults are the "balanced" configuration
of the hyperparameter guide of openballbot-rl. `--help` lists all flags.

It runs on --num-processes ranks of one machine, or on ranks that torchrun starts on many machines:
`torchrun --nnodes 2 --nproc-per-node 4 ... ppo_ballbot.py --num-envs 64`. Each rank has its share of the
environments and of every minibatch. All ranks have the same networks: gradients are averaged.
"""

import signal
import time

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it without a traceback
STARTED = time.perf_counter()  # run times count from here, imports included

import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

import ballbot_env
from ballbot_utils import checkpoints, flags, runs
from ballbot_utils.console import exit_with_error, print_rank0
from ballbot_utils.distributed import (
    all_reduce_mean,
    gather_objects,
    init_distributed,
    must_spawn,
    pin_to_core_share,
    rank,
    spawn_ranks,
    world_size,
)
from ballbot_utils.episodes import apply_in_blocks, as_float32, run_episodes
from ballbot_utils.flags import Count, Few, LogScale, NonNegative, Positive, Seed, Share
from ballbot_utils.model import CAMERAS
from ballbot_utils.observations import PROPRIOCEPTION, make_observations, to_body_frame
from ballbot_utils.state import copy_array

# The guide's three configurations differ only by what it states. "paper" has Stable-Baselines3's values for the rest.
PRESETS = {
    "aggressive": dict(learning_rate=1e-3, clip_coef=0.2, ent_coef=0.01, num_steps=256, update_epochs=3, hidden_size=64,
                       num_envs=16),
    "conservative": dict(learning_rate=-1.0, clip_coef=0.015, ent_coef=0.001, vf_coef=2.0, num_steps=1024,
                         update_epochs=10, hidden_size=256, num_envs=8),
    "balanced": dict(clip_coef=0.015, ent_coef=0.001),
    "paper": dict(clip_coef=0.015, ent_coef=0.001, frame_skip=1, num_steps=2048, norm_obs=False,
                  privileged_critic=False, wheel_damping=0.8, small_encoder=False, randomization={}),
    "tuned": dict(num_processes=2, body_frame=True, learning_rate=9e-4, anneal_lr=True, clip_coef=0.1, vf_coef=1.0,
                  ent_coef=0.0, num_envs=64, num_steps=32, minibatch_size=512, update_epochs=4, gamma=0.994,
                  gae_lambda=0.96, norm_adv=True, target_kl=0.04, weight_decay=0.0, pi_layers=3, vf_layers=3,
                  init_log_std=-0.5, depth_scale=0.1, terrain_amplitude=0.15, randomization=dict(push=0.5),
                  max_episode_steps=1000, total_timesteps=4_000_000),
}  # fmt: skip
PRESETS["robust"] = PRESETS["tuned"] | dict(max_episode_steps=4000, terrain_amplitude=0.2)
PRESETS["robust"]["randomization"] = dict(terrain_amplitude=0.75, mass=0.1, friction=0.2, wheel_damping=0.2, latency=2,
                                          tilt=3, velocity=0.2, push=1.5, obs_noise=0.01)  # fmt: skip


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment; a part of the default run name
    run_name: str = ""  # folder under runs/ for logs and checkpoints; empty: a new name
    # configuration to start from; the first three are the guide's, tuned is the fastest reliable one, robust is tuned
    # with randomization, paper has the choices of arXiv 2505.18417
    preset: Literal["", *PRESETS] = ""
    config: str = ""  # start from a run's config.json; other flags take precedence
    resume: str = ""  # continue a run exactly: runs/<run name>, or its last.pt. Add only a larger --total-timesteps
    init_from: str = ""  # start from the policy of runs/<run name> or of a checkpoint; with the same network flags
    seed: Seed = 1  # seed of networks, action noise, minibatches and start poses
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms; the CPU's always are deterministic
    cuda: bool = False  # render and run networks on GPUs, one per process; physics stays on the CPU
    num_processes: Few = 1  # ranks on this machine, each on its own cores; another number acts as another seed
    num_threads: Annotated[int, Field(ge=0, le=1000)] = 0  # threads of physics and renderer per process; 0: its cores
    torch_threads: Few = 1  # CPU threads of networks; more are useful only with --no-freeze-encoder

    # The task
    terrain: str = "perlin"  # ground: a kind, such as ramp or ramp:angle=15, or a file; docs/terrain.md lists them
    terrain_seed: Seed = 0  # the training terrain
    terrain_amplitude: Positive = 0.1  # height of the training terrain's Perlin hills, m; evaluations use 0.1
    # domain randomization in training; names and strengths, such as push 1.0 mass 0.1. Starts at up to 0.6 m/s teach
    # the robot not to drive faster than it can
    randomization: MutableMapping[str, float] = field(default_factory=lambda: {"velocity": 0.6})
    curriculum: bool = False  # hills and pushes grow with each robot's success; docs/randomization.md says how
    eval_terrain_seed: Seed = 1_000_000  # the terrain of evaluations, never used in training
    cameras: bool = True  # observe through the two depth cameras
    wheel_damping: NonNegative = 0.4  # damping of the wheels' axles, N·m·s/rad; the paper's 0.8 limits returns to 98.5
    goal: Literal["forward", "command"] = "forward"  # drive to +y, or at a changing velocity that is observed
    env_kwargs: tuple[str, ...] = ()  # other arguments of the environment, such as max_tilt=25 camera_size=32
    reward: str = ""  # a term added to the reward, my_terms.py:energy; the docstring of BallbotEnv says how
    # physics steps of 2 ms per action; at 1 the action noise averages out and the robot does not learn to drive. All
    # step counts are physics steps, except --num-steps (actions)
    frame_skip: Few = 4
    total_timesteps: Count = 8_000_000  # training steps, all environments together
    max_episode_steps: Count = 4000  # length of training episodes, rounded up to whole actions; evaluations use 4000
    num_envs: Count = 10  # parallel environments, over all processes

    # PPO
    learning_rate: float = -1.0  # -1: the guide's schedule; 1e-4, 5e-5 and 1e-5 for a third of the steps each
    anneal_lr: bool = False  # anneal a constant learning rate linearly to 0
    num_steps: Count = 512  # actions per environment and iteration; 512 are the guide's 2048 physics steps
    gamma: Share = 0.99  # discount factor per action; with --frame-skip 4 it looks 0.8 s ahead
    gae_lambda: Share = 0.95  # lambda of generalized advantage estimation
    update_epochs: Count = 5  # passes over the data of an iteration
    minibatch_size: Count = 256  # samples per gradient step, over all processes; must divide num_envs * num_steps
    norm_adv: bool = False  # normalize advantages in each minibatch
    clip_coef: Positive = 0.015  # clipping range of the probability ratio
    clip_vloss: bool = False  # clip the value loss with clip_coef as well
    ent_coef: NonNegative = 0.001  # weight of the entropy bonus
    vf_coef: NonNegative = 2.0  # weight of the value loss; without CleanRL's factor 0.5 (as in Stable-Baselines3)
    max_grad_norm: Positive = 0.5  # maximum norm of the gradient
    target_kl: Positive = 0.3  # KL divergence of an epoch that stops an iteration's updates
    weight_decay: NonNegative = 0.01  # decoupled weight decay (AdamW)
    norm_obs: bool = True  # normalize proprioception by running mean and variance; without it the robot drives slowly

    # Networks
    body_frame: bool = False  # observe in the robot's frame; the policy is independent of heading
    hidden_size: Annotated[int, Field(ge=1, le=8192)] = 128  # units per hidden layer
    pi_layers: Annotated[int, Field(ge=1, le=64)] = 4  # hidden layers of the actor
    vf_layers: Annotated[int, Field(ge=1, le=64)] = 4  # hidden layers of the critic
    privileged_critic: bool = True  # the critic sees the ground's slopes; only training uses the critic
    depth_scale: LogScale = 1.0  # factor on depth features; below 1 the policy uses proprioception first
    init_log_std: LogScale = 0.0  # initial logarithm of the actions' standard deviation
    freeze_encoder: bool = True  # keep the pretrained depth encoder; otherwise train one from scratch
    small_encoder: bool = True  # features of the paper's encoder from a small network; 16 times faster
    encoder_path: str = ""  # pretrained depth encoder; relative to the folder of assets/; empty: the one in assets/

    # Evaluation
    eval_interval: Count = 500_000  # steps between deterministic evaluations
    eval_episodes: Count = 16  # episodes per evaluation
    final_eval_episodes: Count = 100  # episodes of the final evaluation

    # Checkpoints and logs
    save_interval: NonNegative = 10.0  # seconds between checkpoints to resume from; the last iteration saves one too
    capture_video: bool = False  # record an episode at each evaluation; in runs/<run name>/videos, needs OpenGL
    track: bool = False  # log to Weights & Biases as well; needs pip install wandb
    wandb_project_name: str = "ballbot"  # project of Weights & Biases
    wandb_entity: str = ""  # team of Weights & Biases; empty: your default


class DepthEncoder(nn.Module):
    """Depth frames (n, 1, size, size) in m to features (n, 20) in [-1, 1] (arXiv 2505.18417, table I)."""

    num_features = 20
    pretrained = "depth_encoder.pt"  # its weights, in assets/

    def __init__(self, size=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32 * ((size + 3) // 4) ** 2, self.num_features),
            nn.Tanh(),
        )

    def forward(self, depth):
        return self.layers(depth)


class SmallDepthEncoder(DepthEncoder):
    """What DepthEncoder computes, learned from it (Hinton et al., arXiv 1503.02531), from means of 4 x 4 pixels."""

    pretrained = "depth_encoder_small.pt"

    def __init__(self, size=64):
        nn.Module.__init__(self)
        self.layers = nn.Sequential(
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear((size // 4) ** 2, 128),
            nn.LeakyReLU(inplace=True),
            nn.Linear(128, 128),
            nn.LeakyReLU(inplace=True),
            nn.Linear(128, self.num_features),
            nn.Tanh(),
        )


class MLP(nn.Module):
    """Linear layers with LeakyReLU between them, (n, inputs) to (n, outputs); orthogonal weights and zero biases.

    On few samples, weights (inputs, outputs) and no module per layer take half the time of nn.Sequential.
    """

    def __init__(self, inputs, hidden, layers, outputs, last_gain):
        super().__init__()
        for k, (i, o) in enumerate(pairwise([inputs] + [hidden] * layers + [outputs])):
            weight = nn.init.orthogonal_(torch.empty(i, o), 2**0.5 if k < layers else last_gain)
            self.register_parameter(f"weight_{k}", nn.Parameter(weight))
            self.register_parameter(f"bias_{k}", nn.Parameter(torch.zeros(o)))

    def forward(self, x):
        parameters = iter(self._parameters.values())  # a weight, its bias, the next weight, ...
        *hidden, (last_weight, last_bias) = zip(parameters, parameters)
        for weight, bias in hidden:
            x = F.leaky_relu_(torch.addmm(bias, x, weight))
        return torch.addmm(last_bias, x, last_weight)


class Agent(nn.Module):
    """Gaussian actor and critic on the same features.

    An observation is split in `proprio` (n, 15), one more with the frames' age, one with --body-frame, two with
    commands and 30 with height_scan, and `depth` (n, 40), the encoder's features of both cameras' frames. Without
    cameras `depth` is (n, 0). With --privileged-critic the critic sees `slopes` (n, 6) of the ground as well, which are
    (n, 0) without.
    """

    def __init__(self, args):
        super().__init__()
        self.num_slopes = 6 * args.privileged_critic
        commands, frame_ages = ("command",) * (args.goal == "command"), ("relative_image_timestamp",) * args.cameras
        kwargs = flags.env_kwargs(args)
        heights = ("heights",) * kwargs.get("height_scan", False)
        self.keys = PROPRIOCEPTION + commands + heights + frame_ages
        observations = make_observations()
        widths = {key: observations[key].shape[0] + (args.body_frame and key == "orientation") for key in self.keys}
        self.num_proprio = sum(widths.values())
        self.num_depth = len(CAMERAS) * DepthEncoder.num_features if args.cameras else 0
        self.body_frame, self.depth_scale, self.norm_obs = args.body_frame, args.depth_scale, args.norm_obs
        self.encoder = None
        if args.cameras:  # convolutions are faster in this format
            encoder = SmallDepthEncoder if args.small_encoder else DepthEncoder
            self.encoder = encoder(kwargs.get("camera_size", 64)).to(memory_format=torch.channels_last)
        num_features = self.num_proprio + self.num_depth
        self.actor = MLP(num_features, args.hidden_size, args.pi_layers, 3, last_gain=0.01)
        self.critic = MLP(num_features + self.num_slopes, args.hidden_size, args.vf_layers, 1, last_gain=1.0)
        self.log_std = nn.Parameter(torch.full((3,), args.init_log_std))
        self.register_buffer("obs_mean", torch.zeros(self.num_proprio))
        self.register_buffer("obs_var", torch.ones(self.num_proprio))
        self.register_buffer("obs_count", torch.zeros(()))
        # The frames' age counts for no more than what they show. Most heights are near 0 and a few far from it
        scales = {"heights": 0.25, "relative_image_timestamp": args.depth_scale}
        scale = [scales.get(key, 1.0) for key, width in widths.items() for _ in range(width)]
        self.register_buffer("obs_scale", torch.tensor(scale), persistent=False)

    def encode(self, frames):
        """Frames (n, 2, size, size) to depth features (n, 40)."""
        # On a CPU so many images at a time that the layers stay in a core's cache
        chunk = 32 if frames.device.type == "cpu" else 2 * len(frames)
        features = torch.cat([self.encoder(images) for images in frames.flatten(0, 1)[:, None].split(chunk)])
        return features.view(len(frames), -1) * self.depth_scale

    def features(self, proprio, depth):
        """What actor and critic see: (n, 56), proprioception normalized with --norm-obs."""
        if self.norm_obs:
            proprio = (proprio - self.obs_mean) * torch.rsqrt(self.obs_var + 1e-8) * self.obs_scale
        return torch.cat([proprio, depth], -1)

    def value(self, features, slopes):
        """Values (n,) of features (n, 56) and slopes (n, 6 or 0)."""
        return self.critic(torch.cat([features, 10 * slopes], -1)).squeeze(-1)

    @torch.no_grad()
    def update_obs_moments(self, proprio):
        """Merge all ranks' proprioception (n, 15) into its running moments (Chan, Golub & LeVeque, 1979)."""
        if not self.norm_obs:
            return
        mean = all_reduce_mean(proprio.mean(0))
        var = all_reduce_mean((proprio - mean).square().mean(0))
        count, delta = len(proprio) * world_size(), mean - self.obs_mean
        total = self.obs_count + count
        self.obs_var.mul_(self.obs_count).add_(var * count).add_(delta**2 * self.obs_count * count / total).div_(total)
        self.obs_mean += delta * count / total
        self.obs_count.copy_(total)


def log_prob(actions, mean, log_std):
    """Log density (n,) of actions (n, 3) under independent Gaussians."""
    normalized = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * normalized.square() + log_std + 0.5 * np.log(2 * np.pi)).sum(-1)


def task(args, evaluation):
    """The arguments of the training environment, or of the evaluation's."""
    return dict(
        terrain=args.terrain, terrain_seed=args.eval_terrain_seed if evaluation else args.terrain_seed,
        terrain_amplitude=0.1 if evaluation else args.terrain_amplitude, cameras=args.cameras,
        wheel_damping=args.wheel_damping, frame_skip=args.frame_skip,
        max_episode_steps=-(-(4000 if evaluation else args.max_episode_steps) // args.frame_skip),
        randomization=None if evaluation else args.randomization, curriculum=args.curriculum and not evaluation,
        goal="command" if args.goal == "command" else (0, 1),
    ) | flags.env_kwargs(args)  # fmt: skip


def make_envs(args, num_envs, evaluation=False):
    """`num_envs` environments of the training task, or of the evaluation's."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.cuda else "cpu"
    num_threads = args.num_threads or pin_to_core_share()
    return gym.make_vec("Ballbot-v0", num_envs=num_envs, num_threads=num_threads, device=device, copy=False,
                        **task(args, evaluation))  # fmt: skip


def proprioception(obs, agent):
    """Proprioception (n, num_proprio), in the parts that `Agent` names, of a batch of observations."""
    obs = obs | to_body_frame(obs) if agent.body_frame else obs
    parts = [obs[key] for key in agent.keys]
    return torch.from_numpy(np.concatenate(parts, 1, dtype=np.float32)).to(agent.log_std.device)


@torch.no_grad()
def depth_features(envs, agent, depth):
    """Depth features (n, 40 or 0): `depth`, renewed where frames are new; each is encoded once, when it arrives."""
    if agent.encoder is None or not envs.new_frames.any():
        return depth
    if envs.new_frames.all():
        return agent.encode(envs.frames)
    new = torch.from_numpy(envs.new_frames)
    return depth.index_put((new.to(depth.device),), agent.encode(envs.frames[new]))


def ground_slopes(envs, agent):
    """What a privileged critic sees of the ground, (n, 6 or 0)."""
    slopes = envs.slopes() if agent.num_slopes else np.empty((envs.num_envs, 0), np.float32)
    return torch.from_numpy(slopes).to(agent.log_std.device)


@torch.no_grad()
def rollout(envs, agent, args, observation, show=lambda steps: None):
    """Act `num_steps` times in every environment, from an `observation`: proprio (envs, 15) and depth (envs, 40).

    Returns what `update` learns from, a dict of tensors (steps, envs, ...), with frames if it trains an encoder; what
    `gae` needs; the next observation; a list of (return, length, step) of the episodes that ended; seconds by part.
    """
    (proprio, depth), shape, device = observation, (args.num_steps, envs.num_envs), agent.log_std.device
    names = {"proprio": agent.num_proprio, "depth": agent.num_depth, "slopes": agent.num_slopes, "actions": 3}
    batch = {name: torch.empty(*shape, width, device=device) for name, width in names.items()}
    if agent.encoder is not None and not args.freeze_encoder:
        batch["frames"] = torch.empty(*shape, *envs.frames.shape[1:], device=device)
    noise = agent.log_std.exp() * torch.randn(*shape, 3, device=device)
    rewards, dones = np.empty(shape, np.float32), np.empty(shape, np.float32)
    episodes, ends, started, simulating, rendering = [], [], time.perf_counter(), 0.0, -envs.render_seconds
    for step in range(args.num_steps):
        show(step * args.num_envs * args.frame_skip)
        batch["proprio"][step], batch["depth"][step] = proprio, depth
        batch["slopes"][step] = ground_slopes(envs, agent)
        if "frames" in batch:
            batch["frames"][step] = envs.frames
        action = agent.actor(agent.features(proprio, depth)) + noise[step]
        batch["actions"][step] = action
        now = time.perf_counter()
        obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())  # clips them to [-1, 1]
        simulating += time.perf_counter() - now
        dones[step] = terminations | truncations
        for i in np.flatnonzero(dones[step]):
            episodes.append((float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i]), step))
            final = {key: value[None] for key, value in infos["final_obs"][i].items()}  # obs is the next episode's
            value = torch.zeros(1, device=device)
            if not terminations[i]:  # a truncated episode's final observation has a value
                final_depth = depth[:1]
                if agent.encoder is not None:
                    frames = torch.cat([torch.as_tensor(final[name]) for name in CAMERAS], 1)
                    final_depth = agent.encode(frames.to(device))
                slopes = torch.from_numpy(envs.final_slopes[[i], : agent.num_slopes]).to(device)
                value = agent.value(agent.features(proprioception(final, agent), final_depth), slopes)
            ends.append((step, i, value))
        rewards[step] = reward
        proprio, depth = proprioception(obs, agent), depth_features(envs, agent, depth)

    # One pass over the whole batch is cheaper than one per step
    features = agent.features(batch["proprio"], batch["depth"])
    values = agent.value(features.flatten(0, 1), batch["slopes"].flatten(0, 1)).view(shape)
    next_values = torch.cat([values[1:], agent.value(agent.features(proprio, depth), ground_slopes(envs, agent))[None]])
    for step, i, value in ends:
        next_values[step, i] = value[0]
    rewards, dones = (torch.from_numpy(x).to(device) for x in (rewards, dones))
    batch |= {"logprobs": log_prob(noise, 0, agent.log_std), "values": values}
    rendering += envs.render_seconds
    seconds = {"simulate": simulating - rendering, "render": rendering}
    seconds["infer"] = time.perf_counter() - started - simulating
    return batch, (rewards, values, next_values, dones), (proprio, depth), episodes, seconds


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """Advantages (steps, envs) by generalized advantage estimation, equation 16 of arXiv 1506.02438.

    All arguments are (steps, envs). `next_values[t]` is the value of the state that step t led to: 0 where the
    episode terminated, the value of its final observation where it was truncated. `dones` (either) end the sum.
    """
    deltas = rewards + gamma * next_values - values
    advantages = torch.empty_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        last = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * last
        advantages[t] = last
    return advantages


def level_stats(envs):
    """The mean and deviation of the curriculum's levels over all ranks, to be logged; {} without --curriculum."""
    if envs.levels is None:
        return {}
    levels = np.concatenate(gather_objects(envs.levels))
    return {"charts/level": levels.mean(), "charts/level_std": levels.std()}


def explained_variance(returns, advantages):
    """The share of the variance of returns that the values explain, over all ranks."""
    moments = torch.stack([power.mean() for x in (returns, advantages) for power in (x, x.square())])
    mean, square, error, square_error = all_reduce_mean(moments)
    return 1 - ((square_error - error**2) / (square - mean**2)).item()


def update(agent, optimizer, args, batch):
    """`update_epochs` passes of minibatch gradient steps over this rank's samples, tensors (steps, envs, ...) by name.

    Frames are encoded again in each step if the encoder is trained. Returns a dict of losses and diagnostics: floats,
    means over the last epoch's minibatches and all ranks.
    """
    batch = {key: x.flatten(0, 1) for key, x in batch.items()}
    parameters = [p for p in agent.parameters() if p.requires_grad]
    for epoch in range(1, args.update_epochs + 1):
        minibatches = torch.randperm(len(batch["actions"]), device=batch["actions"].device)
        minibatches = minibatches.view(-1, args.minibatch_size // world_size())
        advantages = batch["advantages"][minibatches]
        if args.norm_adv:  # in each minibatch, over all ranks
            mean, square = all_reduce_mean(torch.stack([advantages, advantages.square()]).mean(2, keepdim=True))
            advantages = (advantages - mean) / ((square - mean.square()).clamp(min=0).sqrt() + 1e-8)
        stats = []
        for samples, mb_advantages in zip(minibatches, advantages):
            mb = {key: value[samples] for key, value in batch.items()}
            depth = agent.encode(mb["frames"]) if "frames" in mb else mb["depth"]
            features = agent.features(mb["proprio"], depth)

            # Clipped objective: arXiv 1707.06347, equation 7
            mean = agent.actor(features)
            logratio = log_prob(mb["actions"], mean, agent.log_std) - mb["logprobs"]
            ratio = logratio.exp()
            clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped_ratio).mean()

            newvalue = agent.value(features, mb["slopes"])
            v_loss = (newvalue - mb["returns"]).square()
            if args.clip_vloss:
                v_clipped = mb["values"] + (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
                v_loss = torch.max(v_loss, (v_clipped - mb["returns"]).square())
            v_loss = v_loss.mean()

            entropy = (agent.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
            loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss

            optimizer.zero_grad()
            loss.backward()
            if dist.is_initialized():  # one all-reduce of all gradients
                flat = all_reduce_mean(torch.cat([p.grad.flatten() for p in parameters]))
                for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
                    p.grad = grad.view_as(p)
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()

            with torch.no_grad():  # KL divergence: http://joschu.net/blog/kl-approx.html
                old_approx_kl, approx_kl = -logratio.mean(), (ratio - 1 - logratio).mean()
                clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                stats.append(torch.stack([pg_loss, v_loss, entropy, old_approx_kl, approx_kl, clipfrac, grad_norm]))
        names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")
        stats = dict(zip(names, all_reduce_mean(torch.stack(stats).mean(0)).tolist()))  # the same on all ranks
        if stats["approx_kl"] > args.target_kl:
            break
    return stats | {"epochs": epoch}


@torch.no_grad()
def evaluate(agent, args: Args, episodes: int) -> dict:
    """Deterministic episodes on the evaluation terrain, shared by the ranks: a dict of their means and deviations."""
    first, last = (episodes * (rank() + k) // world_size() for k in (0, 1))
    results = []
    for start in range(first, last, 100):
        seeds = ballbot_env.spawn_seeds(1_000_000, episodes)[start : min(start + 100, last)]
        envs = make_envs(args, len(seeds), evaluation=True)
        results += run_episodes(envs, Policy(agent, args), seeds)
        envs.close()
    columns = zip(*chain(*gather_objects(results)))
    result = {"episodes": episodes}
    for name, values in zip(("episodic_return", "episodic_length", "falls"), columns):
        result |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values))}
    return result


class Policy:
    """A trained policy as a function: `action = policy(obs)`.

    Observations are those of `gym.make`, or of `gym.make_vec` with their leading axis, as arrays, tensors or lists of
    numbers. Actions are float32, (3,) or (n, 3), in [-1, 1]. Unless `deterministic` they are sampled, by a torch
    `generator` or a list with one per environment. Frames are encoded when they differ from those of the previous call.
    `args` are the training's: the environment must have the same `frame_skip` and `cameras`. On a CPU an environment's
    actions do not depend on the number of environments.
    """

    def __init__(self, agent, args):
        self.agent, self.args = agent, args
        self.frames, self.depth = None, agent.log_std.new_empty(0, agent.num_depth)  # of the previous call

    @torch.no_grad()
    def __call__(self, obs: dict, deterministic: bool = True, generator=None) -> np.ndarray:
        obs = {key: as_float32(value) for key, value in obs.items()}
        agent, single = self.agent, obs["vel"].ndim == 1
        obs = {key: value[None] for key, value in obs.items()} if single else obs
        if len(self.depth) != len(obs["vel"]):
            self.frames, self.depth = None, agent.log_std.new_empty(len(obs["vel"]), agent.num_depth)
        if agent.encoder is not None:
            frames = [obs[name] for name in CAMERAS]
            previous = self.frames or [np.nan] * len(frames)
            new = sum((frame != old).any((1, 2, 3)) for frame, old in zip(frames, previous)) > 0
            if new.any():
                images = torch.cat([torch.as_tensor(frame[new]) for frame in frames], 1).to(self.depth.device)
                self.depth[torch.as_tensor(new)] = apply_in_blocks(agent.encode, images, 2)
                self.frames = list(map(copy_array, frames))
        action = apply_in_blocks(agent.actor, agent.features(proprioception(obs, agent), self.depth), 16)
        if not deterministic:
            each = [(generator, len(action))] if not isinstance(generator, list) else [(one, 1) for one in generator]
            noise = [torch.randn(rows, 3, generator=one, dtype=torch.float32) for one, rows in each]
            action += agent.log_std.exp() * torch.cat(noise).to(action.device)
        action = action.clamp(-1, 1).cpu().numpy()
        return action[0] if single else action


def load_policy(path: str | Path) -> Policy:
    """The `Policy` in a checkpoint, or in the best.pt of a run's folder; exits with one line if it is missing.

    Its class is defined by the script that trained it, which is imported from the working directory if it is another.
    """
    return checkpoints.load_policy(Path(path), module=sys.modules[__name__])[0]


def learning_rate_at(args, progress_remaining):
    """The learning rate at a remaining share of the training, from 1 to 0."""
    if args.learning_rate > 0:
        return args.learning_rate * (progress_remaining if args.anneal_lr else 1)
    return 1e-4 if progress_remaining > 0.66 else 5e-5 if progress_remaining > 0.33 else 1e-5


def train(args: Args, started: float | None = None) -> Path:
    """Train by `args`; logs and checkpoints go to runs/<run name>. Returns the run's folder.

    Call it below `if __name__ == "__main__":`, as its processes import the script. They give the time `started`.
    """
    run = runs.prepare_run(args, started or STARTED, in_rank=started is not None)
    if run.final:
        print_rank0(f"{run.dir} has finished, with {runs.format_evaluation(run.final)}: to continue, give more "
                    "--total-timesteps")  # fmt: skip
        return run.dir
    with run.open():
        if must_spawn(args):
            spawn_ranks(train, args, STARTED)
        else:
            init_distributed(args.num_processes, args.cuda)
            train_rank(args, run)
    if dist.is_initialized():
        dist.destroy_process_group()
    return run.dir


def train_rank(args, run):
    """Train in this rank; `run` is the record of the run."""
    agent, optimizer, envs = build(args)
    observation = start(args, run, agent, optimizer, envs)
    iteration_steps = args.num_envs * args.num_steps * args.frame_skip
    iteration, num_iterations = run.global_step // iteration_steps, args.total_timesteps // iteration_steps
    print_rank0(f"{run.dir}: {num_iterations} iterations of {iteration_steps} steps; tensorboard --logdir runs")

    while iteration < num_iterations:
        iteration += 1
        learning_rate = learning_rate_at(args, 1 - (iteration - 1) / num_iterations)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        started = time.perf_counter()
        batch, transitions, observation, episodes, seconds = rollout(envs, agent, args, observation, run.show)
        advantages = gae(*transitions, args.gamma, args.gae_lambda)
        returns = advantages + batch["values"]
        losses = update(agent, optimizer, args, batch | {"advantages": advantages, "returns": returns})
        agent.update_obs_moments(batch["proprio"].flatten(0, 1))
        seconds["learn"] = time.perf_counter() - started - sum(seconds.values())

        run.log_iteration(iteration_steps, seconds, episodes, {f"losses/{key}": x for key, x in losses.items()} | {
            "losses/explained_variance": explained_variance(returns, advantages),
            "charts/learning_rate": learning_rate,
            "charts/action_std": agent.log_std.exp().mean().item(),
            "charts/physics_errors": sum(gather_objects(int(envs.physics_errors.sum()))),
        } | level_stats(envs))  # fmt: skip
        if run.global_step // args.eval_interval > (run.global_step - iteration_steps) // args.eval_interval:
            run.log_evaluation(agent, evaluate(agent, args, args.eval_episodes))
            record_video(args, run, agent)
        if run.save_is_due() or iteration == num_iterations:
            run.save_last(agent, capture_state(agent, optimizer, envs, observation))

    envs.close()
    run.finish(agent, lambda: evaluate(agent, args, args.final_eval_episodes))


def build(args):
    """This rank's agent, optimizer and environments."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    if args.cuda:
        torch.cuda.set_device(device)
    agent = Agent(args).to(device)
    if agent.encoder is not None and args.freeze_encoder:
        agent.encoder.requires_grad_(False)
    parameters = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, eps=1e-5, weight_decay=args.weight_decay, fused=True)
    return agent, optimizer, make_envs(args, args.num_envs // world_size())


def start(args, run, agent, optimizer, envs):
    """Load initial weights or the checkpoint. Returns the observation."""
    if run.checkpoint is None:
        agent.load_state_dict(run.weights, strict=False)
        torch.manual_seed(args.seed + 1_000_000 * rank())  # each rank has its own noise and minibatches
        seeds = ballbot_env.spawn_seeds(args.seed, args.num_envs)
        obs, _ = envs.reset(seed=seeds[envs.num_envs * rank() :][: envs.num_envs])
        depth = agent.log_std.new_zeros(envs.num_envs, agent.num_depth)
        return proprioception(obs, agent), depth_features(envs, agent, depth)
    try:
        agent.load_state_dict(run.checkpoint["model"])
        checkpoints.load_optimizer(optimizer, run.checkpoint["optimizer"])
        state = run.checkpoint["ranks"][rank()]
        envs.set_state(state["envs"])
        torch.set_rng_state(state["rng"])
        if args.cuda:
            torch.cuda.set_rng_state(state["cuda_rng"])
        widths = {"proprio": agent.num_proprio, "depth": agent.num_depth}
        return tuple(agent.log_std.new_zeros(envs.num_envs, n).copy_(state[name]) for name, n in widths.items())
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        exit_with_error(f"{args.resume} does not fit its flags: {str(error).splitlines()[0]}")


def capture_state(agent, optimizer, envs, observation):
    """What `start` needs, with the state of every rank."""
    state = dict(envs=envs.get_state(), proprio=observation[0], depth=observation[1], rng=torch.get_rng_state(),
                 cuda_rng=torch.cuda.get_rng_state() if agent.log_std.is_cuda else None)  # fmt: skip
    return dict(optimizer=optimizer.state_dict(), ranks=gather_objects(state))


def record_video(args, run, agent):
    """Record an episode on the evaluation terrain, as runs/<run name>/videos/<steps>-episode-0.mp4."""
    if args.capture_video and rank() == 0:
        env = gym.make("Ballbot-v0", render_mode="rgb_array", **task(args, evaluation=True))
        env = gym.wrappers.RecordVideo(env, run.dir / "videos", name_prefix=str(run.global_step), disable_logger=True)
        policy, (obs, _), done = Policy(agent, args), env.reset(seed=1_000_000), False
        while not done:
            obs, _, terminated, truncated, _ = env.step(policy(obs))
            done = terminated or truncated
        env.close()


def parse_args():
    """Args from the command line: flags win over --config, which wins over --preset."""
    return flags.parse_args(Args, PRESETS)


def main():
    """Train by the command line."""
    runs.run_training(parse_args, train)


if __name__ == "__main__":
    main()
