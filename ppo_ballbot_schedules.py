"""PPO for the ballbot with scheduled hyperparameters: `python ppo_ballbot_schedules.py --lr-schedule cosine`.

This is ppo_ballbot.py in which learning rate, entropy coefficient and clip coefficient change as training
goes on; `diff ppo_ballbot.py ppo_ballbot_schedules.py` shows all of it.

Proximal Policy Optimization (Schulman et al., arXiv 1707.06347) with generalized advantage estimation
(Schulman et al., arXiv 1506.02438) on Ballbot-v0: proprioception and two depth cameras over uneven
terrain. It needs ballbot_env.py and assets/ beside it. The defaults are the "balanced" configuration of
the hyperparameter guide of openballbot-rl; `--help` lists every flag.
"""

import time

STARTED = time.perf_counter()  # the time to the targets counts from here: the imports are part of it

import argparse
import gc
import io
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter

import ballbot_env

CLEAR_LINE = "\r\x1b[K" if sys.stdout.isatty() else ""
MIN_PART = 256  # samples: smaller parts of a minibatch are not worth another process
TARGET_RETURN, TARGET_LENGTH = 100, 3000  # the guide's targets: means over 100 episodes


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment, part of the default run name"""
    run_name: str = ""
    """folder under runs/ for logs and checkpoints; empty: Ballbot-v0__{exp_name}__{seed}__{time}"""
    preset: str = ""
    """start from the guide's aggressive, conservative or balanced configuration, or from tuned, the best we know"""
    config: str = ""
    """start from a run's config.json; flags given beside it win, as they do over --preset"""
    resume: str = ""
    """go on with a stopped run, bit for bit: runs/<run name>, or a checkpoint in it. Takes no other flags"""
    seed: int = 1
    """seed of networks, action noise, minibatches and start poses"""
    torch_deterministic: bool = True
    """use only deterministic algorithms on the GPU (the CPU's are)"""
    cuda: bool = False
    """render and run networks on the GPU; the physics stays on the CPU"""
    num_processes: int = 2
    """processes that share environments, learning and evaluations, up to one per core; results depend on it by no
    more than rounding. With --cuda or --no-freeze-encoder there is one"""
    num_threads: int = 0
    """CPU threads of physics and renderer in each process, 0: its share of the cores; results do not depend on it"""
    torch_threads: int = 1
    """CPU threads of networks; more pay only with --no-freeze-encoder, on an idle machine"""

    # The task
    terrain: str = "perlin"
    """ground: perlin or flat"""
    terrain_seed: int = 0
    """the training terrain"""
    terrain_amplitude: float = 0.1
    """height of the training terrain's hills, m; evaluations have the task's 0.1"""
    eval_terrain_seed: int = 1_000_000
    """the terrain of evaluations, never trained on"""
    cameras: bool = True
    """observe through the two depth cameras"""
    wheel_damping: float = 0.4
    """damping of the wheels' axles, N·m·s/rad; the paper has 0.8, which bounds the return at 98.5"""
    frame_skip: int = 1
    """physics steps of 2 ms that an action is held. Steps are physics steps everywhere, but for --num-steps"""
    total_timesteps: int = 10_000_000
    """steps to train for, all environments together"""
    num_envs: int = 10
    """environments stepped together"""

    # PPO
    learning_rate: float = -1.0
    """where the learning rate starts; -1: the guide's steps, 1e-4, then 5e-5 and 1e-5 in the second and last third"""
    lr_schedule: str = "guide"
    """guide (with --learning-rate -1), constant, linear, cosine, or kl: times or by 1.5 where KL leaves its band"""
    lr_end: float = 0.0
    """where a linear or cosine learning rate ends"""
    num_steps: int = 2048
    """actions per environment and iteration"""
    gamma: float = 0.99
    """discount factor per action; at --frame-skip 1, 0.99 sees 0.2 s ahead and 0.998 a second"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    update_epochs: int = 5
    """passes over the data of an iteration"""
    minibatch_size: int = 256
    """samples per gradient step; must divide num_envs * num_steps"""
    norm_adv: bool = False
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.04
    """clipping range of the probability ratio, where it starts"""
    clip_schedule: str = "linear"
    """constant, linear or cosine; the guide's is 0.03 * progress remaining + 0.01, the default"""
    clip_end: float = 0.01
    """where a linear or cosine clip coefficient ends"""
    clip_vloss: bool = False
    """clip the value loss with clip_coef too"""
    ent_coef: float = 0.01
    """weight of the entropy bonus, where it starts"""
    ent_schedule: str = "linear"
    """constant, linear or cosine; the guide's is 0.01 * progress remaining, the default"""
    ent_end: float = 0.0
    """where a linear or cosine entropy coefficient ends"""
    vf_coef: float = 2.0
    """weight of the value loss, a mean squared error without CleanRL's factor 0.5 (as in Stable-Baselines3)"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float = 0.3
    """end an iteration's updates once the approximate KL divergence of an epoch exceeds this; with --lr-schedule kl
    the learning rate keeps it between half and twice this instead"""
    weight_decay: float = 0.01
    """decoupled weight decay (AdamW)"""
    spin_cost: float = 0.0
    """learn from rewards less this times the squared yaw rate (rad²/s²); returns shown are the task's all the same"""
    norm_obs: bool = False
    """normalise proprioception by running mean and variance"""
    norm_value: bool = False
    """let the critic predict returns in units of their moving mean and standard deviation (PopArt)"""

    # Networks
    body_frame: bool = False
    """see lean, velocity and the world's +y in the robot's frame: control is then alike at any heading"""
    hidden_size: int = 128
    """units per hidden layer"""
    pi_layers: int = 4
    """hidden layers of the actor"""
    vf_layers: int = 4
    """hidden layers of the critic"""
    depth_scale: float = 1.0
    """factor on the depth features; below 1, proprioception is learnt from first"""
    init_log_std: float = 0.0
    """initial logarithm of the actions' standard deviation"""
    freeze_encoder: bool = True
    """keep the pretrained depth encoder as it is, else train one end to end"""
    encoder_path: str = "assets/depth_encoder.pt"
    """the pretrained depth encoder, relative to this file"""

    # Evaluation
    eval_interval: int = 500_000
    """steps between deterministic evaluations"""
    eval_episodes: int = 16
    """episodes of each"""
    final_eval_episodes: int = 100
    """episodes of the one at the end"""


# The guide's three configurations, and the best that we know.
PRESETS = {
    "aggressive": dict(
        learning_rate=1e-3, clip_coef=0.2, ent_coef=0.01, num_steps=1024, update_epochs=3, hidden_size=64, num_envs=16,
        lr_schedule="constant", clip_schedule="constant", ent_schedule="constant",
    ),
    "conservative": dict(
        learning_rate=-1.0, clip_coef=0.015, ent_coef=0.001, vf_coef=2.0, num_steps=4096, update_epochs=10,
        hidden_size=256, num_envs=8, clip_schedule="constant", ent_schedule="constant",
    ),
    "balanced": dict(clip_coef=0.015, clip_schedule="constant", ent_coef=0.001, ent_schedule="constant"),
    "tuned": dict(
        frame_skip=4, body_frame=True, learning_rate=5e-4, lr_schedule="linear", clip_coef=0.2, ent_coef=0.0,
        vf_coef=1.0, num_envs=64, num_steps=32, minibatch_size=512, update_epochs=4, gamma=0.996, gae_lambda=0.9733,
        norm_adv=True,
        norm_obs=True, norm_value=True, target_kl=0.02, weight_decay=0.0, init_log_std=-0.5, depth_scale=0.1,
        spin_cost=0.005, total_timesteps=2_000_000, eval_interval=250_000,
        clip_schedule="constant", ent_schedule="constant",
    ),
}  # fmt: skip


def parse():
    """Args from the command line: flags win over --config, which wins over --preset."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="")
    early.add_argument("--config", default="")
    start, _ = early.parse_known_args()
    if start.preset and start.preset not in PRESETS:
        sys.exit(f"error: --preset is {start.preset}: give {', '.join(PRESETS)}")
    default = replace(Args(), **PRESETS.get(start.preset, {}))
    if start.config:
        try:
            settings = json.loads(Path(start.config).read_text())
            default = replace(default, **{key: type(getattr(default, key))(value) for key, value in settings.items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            sys.exit(f"error: --config {start.config} is not a run's config.json: {error}")
    args = tyro.cli(Args, default=default)
    if args.resume and args != Args(resume=args.resume):
        sys.exit("error: --resume takes its flags from the run: give no others")
    return args


class DepthEncoder(nn.Module):
    """Depth frames (n, 1, size, size) in m to features (n, 20) in [-1, 1] (arXiv 2505.18417, table I)."""

    num_features = 20

    def __init__(self, size=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, self.num_features),
            nn.Tanh(),
        )

    def forward(self, depth):
        return self.layers(depth)


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

    An observation is split in `proprio` (n, 15), one more with the frames' age and one more with --body-frame, and
    `depth` (n, 40), the encoder's features of both cameras' frames. Without cameras `depth` is (n, 0).
    """

    def __init__(self, args):
        super().__init__()
        self.num_proprio = 15 + args.body_frame + args.cameras
        self.body_frame, self.depth_scale, self.norm_obs = args.body_frame, args.depth_scale, args.norm_obs
        # channels_last: a quarter faster on a CPU
        self.encoder = DepthEncoder().to(memory_format=torch.channels_last) if args.cameras else None
        self.num_depth = 2 * DepthEncoder.num_features if args.cameras else 0
        num_features = self.num_proprio + self.num_depth
        self.actor = MLP(num_features, args.hidden_size, args.pi_layers, 3, last_gain=0.01)
        self.critic = MLP(num_features, args.hidden_size, args.vf_layers, 1, last_gain=1.0)
        self.log_std = nn.Parameter(torch.full((3,), args.init_log_std))
        self.register_buffer("obs_mean", torch.zeros(self.num_proprio))
        self.register_buffer("obs_var", torch.ones(self.num_proprio))
        self.register_buffer("obs_count", torch.zeros(()))
        # Moving averages of returns and their squares, and the critic's units that follow from them
        self.register_buffer("value_moments", torch.zeros(2))
        self.register_buffer("value_count", torch.zeros(()))
        self.register_buffer("value_mean", torch.zeros(()))
        self.register_buffer("value_std", torch.ones(()))

    def encode(self, frames):
        """Frames (n, 2, size, size) to depth features (n, 40)."""
        # On a CPU so many images at a time that the layers stay in a core's cache
        chunk = 32 if frames.device.type == "cpu" else 2 * len(frames)
        features = torch.cat([self.encoder(images) for images in frames.flatten(0, 1)[:, None].split(chunk)])
        return features.view(len(frames), -1) * self.depth_scale

    def features(self, proprio, depth):
        """What actor and critic see: (n, 56), proprioception normalised with --norm-obs."""
        if self.norm_obs:
            proprio = (proprio - self.obs_mean) * torch.rsqrt(self.obs_var + 1e-8)
        return torch.cat([proprio, depth], -1)

    def value(self, features):
        """Values (n,) of features (n, 56), in the units of rewards."""
        return self.critic(features).squeeze(-1) * self.value_std + self.value_mean

    @torch.no_grad()
    def rescale_values(self, returns):
        """New units for the critic by an iteration's returns, any shape, such that its values stay as they are.

        PopArt (van Hasselt et al., arXiv 1602.07714, equation 9); the moments move by a tenth, at first by more.
        """
        self.value_count += 1
        moments = torch.stack([returns.mean(), returns.square().mean()])
        self.value_moments.lerp_(moments, max(0.1, 1 / self.value_count.item()))
        mean = self.value_moments[0]
        std = (self.value_moments[1] - mean**2).clamp(min=1e-8).sqrt()
        *_, weight, bias = self.critic.parameters()
        weight *= self.value_std / std
        bias.mul_(self.value_std).add_(self.value_mean - mean).div_(std)
        self.value_mean.copy_(mean)
        self.value_std.copy_(std)

    @torch.no_grad()
    def update_moments(self, name, samples):
        """Merge samples (n, ...) into the running mean and variance (Chan, Golub & LeVeque, 1979)."""
        mean, var, count = (getattr(self, f"{name}_{moment}") for moment in ("mean", "var", "count"))
        new = len(samples)
        delta = samples.mean(0) - mean
        total = count + new
        var.mul_(count).add_(samples.var(0, correction=0) * new).add_(delta**2 * count * new / total).div_(total)
        mean.add_(delta * new / total)
        count.copy_(total)


def log_prob(actions, mean, log_std):
    """Log density (n,) of actions (n, 3) under independent Gaussians."""
    normalised = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * normalised.square() + log_std + 0.5 * np.log(2 * np.pi)).sum(-1)


def make_envs(args, num_envs, terrain_seed, num_processes=1):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return gym.make_vec(
        "Ballbot-v0",
        num_envs=num_envs,
        terrain=args.terrain,
        terrain_seed=terrain_seed,
        terrain_amplitude=args.terrain_amplitude if terrain_seed == args.terrain_seed else 0.1,
        cameras=args.cameras,
        wheel_damping=args.wheel_damping,
        frame_skip=args.frame_skip,
        num_threads=args.num_threads or max(1, cores // num_processes),
        device="cuda" if args.cuda else "cpu",
    )


def proprioception(obs, agent):
    """Proprioception (n, 15 to 17), in the parts that `Agent` names, of a batch of observations."""
    if agent.body_frame:
        lean, heading, vel = in_body_frame(obs["orientation"], obs["vel"])
        orientation = np.concatenate([lean, np.sin(heading), np.cos(heading)], 1)
        obs = obs | {"orientation": orientation.astype(np.float32), "vel": vel.astype(np.float32)}
    keys = ballbot_env.PROPRIOCEPTION + (("relative_image_timestamp",) if agent.encoder is not None else ())
    return torch.from_numpy(np.concatenate([obs[key] for key in keys], 1)).to(agent.log_std.device)


def in_body_frame(orientation, vel):
    """Rotation vectors (n, 3) in rad and velocities (n, 3) in the world, as the robot sees them.

    Returns lean (n, 2), x and y of the upward direction in its frame, heading (n, 1) in rad, 0 facing +y, from -π to π,
    and the velocity in its frame (n, 3).
    """
    angle = np.linalg.norm(orientation, axis=1, keepdims=True)
    quaternion = np.concatenate([np.cos(angle / 2), orientation * np.sinc(angle / (2 * np.pi)) / 2], 1)
    rotation = ballbot_env.rotation_matrix(quaternion)  # columns: the robot's axes in the world
    heading = np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
    return rotation[:, 2, :2], heading[:, None], (rotation * vel[:, :, None]).sum(1)


@torch.no_grad()
def depth_features(envs, agent, depth):
    """Depth features (n, 40 or 0): `depth`, renewed where frames are new; each is encoded once, when it arrives."""
    if agent.encoder is None or not envs.new_frames.any():
        return depth
    if envs.new_frames.all():
        return agent.encode(envs.frames)
    new = torch.from_numpy(envs.new_frames)
    return depth.index_put((new.to(depth.device),), agent.encode(envs.frames[new]))


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """Advantages (steps, envs) by generalized advantage estimation, equation 16 of arXiv 1506.02438.

    All arguments are (steps, envs). `next_values[t]` is the value of the state that step t led to: 0 where the
    episode terminated, the value of its final observation where it was truncated. `dones` (either) end the sum.
    """
    deltas = rewards + gamma * next_values - values
    carry = gamma * gae_lambda * (1 - dones)
    advantages = torch.empty_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        last = deltas[t] + carry[t] * last
        advantages[t] = last
    return advantages


def make_storage(args, agent):
    """Tensors (steps, envs, ...) for what an iteration learns from; those of `rollout` and its noise, and of `gae`."""
    widths = {"x": agent.num_proprio + agent.num_depth, "raw": agent.num_proprio, "actions": 3, "noise": 3}
    names = ("logprobs", "values", "next_values", "rewards", "dones", "advantages", "returns")
    shape, device = (args.num_steps, args.num_envs), agent.log_std.device
    storage = {name: torch.zeros(*shape, width, device=device) for name, width in widths.items()}
    storage |= {name: torch.zeros(shape, device=device) for name in names}
    if agent.encoder is not None and not args.freeze_encoder:
        storage["frame_index"] = torch.zeros(shape, dtype=torch.long, device=device)
    return storage


def as_batch(storage):
    """What `update` learns from: a dict of (steps * envs, ...) views of the storage."""
    names = ("x", "actions", "logprobs", "values", "advantages", "returns", "frame_index")
    return {name: storage[name].flatten(0, 1) for name in names if name in storage}


@torch.no_grad()
def rollout(envs, agent, args, proprio, depth, storage, finished):
    """Act for `num_steps` steps in every environment, with action noise storage["noise"].

    Fills `storage`, a dict of (steps, envs, ...) tensors, but for advantages and returns, and appends (return,
    length, step) of ended episodes to `finished`. Returns the observation to go on from (`proprio`, `depth`), the
    frames to train an encoder on (None if it is frozen), and the seconds spent in the environments and in all.
    """
    started, simulating = time.perf_counter(), 0.0
    device, shape = agent.log_std.device, storage["values"].shape
    x, raw, actions, noise = (storage[name] for name in ("x", "raw", "actions", "noise"))
    std = torch.exp(agent.log_std)
    rewards, dones = np.empty(shape, np.float32), np.empty(shape, np.float32)
    final_steps, final_features = [], []  # of truncated episodes: their final observation is worth something
    terminated = []
    # Training the encoder needs the frames too: each is kept once, and every step knows which it saw.
    store_frames = agent.encoder is not None and not args.freeze_encoder
    if store_frames:
        frames, held, num_frames = [envs.frames.clone()], torch.arange(shape[1]), shape[1]

    for step in range(args.num_steps):
        raw[step] = proprio
        x[step] = features = agent.features(proprio, depth)
        actions[step] = action = torch.addcmul(agent.actor(features), std, noise[step])
        if store_frames:
            storage["frame_index"][step] = held

        now = time.perf_counter()
        obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())  # clips them to [-1, 1]
        simulating += time.perf_counter() - now
        rewards[step] = reward - args.frame_skip * args.spin_cost * np.square(obs["angular_vel"][:, 2], dtype=float)
        dones[step] = terminations | truncations
        if store_frames and envs.new_frames.any():
            new = torch.from_numpy(envs.new_frames.copy())
            frames.append(envs.frames[new])
            held = held.clone()
            held[new] = torch.arange(num_frames, num_frames + len(frames[-1]))
            num_frames += len(frames[-1])
        if "episode" in infos:
            for i in np.flatnonzero(infos["_episode"]):
                finished.append((float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i]), step))
                if terminations[i]:
                    terminated.append((step, i))
                else:
                    final = {key: value[None] for key, value in infos["final_obs"][i].items()}
                    seen = depth[:1, :0]
                    if agent.encoder is not None:
                        seen = torch.cat([torch.as_tensor(final[f"depth_{k}"]) for k in (0, 1)], 1)
                        seen = agent.encode(seen.to(device))
                    final_steps.append((step, i))
                    final_features.append(agent.features(proprioception(final, agent), seen))
        proprio, depth = proprioception(obs, agent), depth_features(envs, agent, depth)

    # One pass over the whole batch is cheaper than one a step.
    x_last = agent.features(proprio, depth)
    values = agent.value(x.flatten(0, 1)).view(shape)
    next_values = torch.cat([values[1:], agent.value(x_last)[None]])
    for step, i in terminated:
        next_values[step, i] = 0
    if final_steps:
        steps, ids = torch.tensor(final_steps, device=device).T
        next_values[steps, ids] = agent.value(torch.cat(final_features))
    storage["logprobs"][:] = log_prob(noise * std, 0, agent.log_std)
    storage["values"][:] = values
    storage["next_values"][:] = next_values
    storage["rewards"][:] = torch.from_numpy(rewards)
    storage["dones"][:] = torch.from_numpy(dones)
    return proprio, depth, torch.cat(frames) if store_frames else None, simulating, time.perf_counter() - started


def flatten(parameters):
    """One tensor that holds all `parameters`; they become views of it, and their gradients of its gradient.

    The optimizer then takes one tensor's time, not that of two dozen.
    """
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    offset = flat.numel()
    for p in sorted(parameters, key=torch.numel):  # the small ones last, so that the large ones are aligned
        offset -= p.numel()
        place = p.size(), p.stride(), offset
        p.data = flat.data.as_strided(*place).copy_(p.data)
        p.grad = flat.grad.as_strided(*place)
    return flat


def policy_loss(agent, args, mb):
    """By sample, (n,): the clipped objective (arXiv 1707.06347, equation 7), negated, and the log ratios."""
    logratio = log_prob(mb["actions"], agent.actor(mb["x"]), agent.log_std) - mb["logprobs"]
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    return -torch.min(mb["advantages"] * ratio, mb["advantages"] * clipped), logratio


def value_loss(agent, args, mb):
    """The squared error of the value, by sample: (n,)."""
    newvalue = agent.critic(mb["x"]).squeeze(-1)
    v_loss = (newvalue - mb["returns"]).square()
    if args.clip_vloss:
        change = (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (mb["values"] + change - mb["returns"]).square())
    return v_loss


def learn(agent, args, batch, order, task, step, frames=None):
    """One epoch: `step` is called after the gradients of each minibatch, or of this process's `task` in it.

    `batch` is a dict of (samples, ...) tensors; the rows of `order` (minibatches, minibatch_size) are the minibatches'
    samples. A task is whether the policy's loss is its own, whether the value's is, and a slice of the columns of
    `order`. Gradients of all tasks add up to those of the minibatch, and so do the statistics returned, (6,): policy
    loss, value loss, entropy, two estimates of the KL divergence, and the clipped fraction.
    """
    policy, value, columns = task
    mine, size = order[:, columns], order.shape[1]
    advantages = batch["advantages"][order]
    if args.norm_adv:
        std, mean = torch.std_mean(advantages, 1, keepdim=True)
        advantages = (advantages - mean) / (std + 1e-8)
    shuffled = {key: samples[mine] for key, samples in batch.items()} | {"advantages": advantages[:, columns]}
    pg_loss, v_loss, entropy = nothing = torch.zeros(3, device=order.device)
    losses, logratios = [], [nothing[:0]]
    for i in range(len(order)):
        mb = {key: samples[i] for key, samples in shuffled.items()}
        if frames is not None:
            depth = agent.encode(frames[mb["frame_index"]])
            mb["x"] = torch.cat([mb["x"][:, : agent.num_proprio], depth], 1)
        if policy:
            pg_losses, logratio = policy_loss(agent, args, mb)
            logratios.append(logratio.detach())
            pg_loss = pg_losses.sum() / size
            entropy = (agent.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum() * (len(logratio) / size)
        if value:
            v_loss = value_loss(agent, args, mb).sum() / size
        loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
        loss.backward()
        step()
        losses.append(torch.stack([pg_loss, v_loss, entropy]).detach())
    logratio = torch.cat(logratios)
    ratio = logratio.exp()
    clipped = ((ratio - 1).abs() > args.clip_coef).float()
    kl = torch.stack([-logratio, ratio - 1 - logratio, clipped])  # http://joschu.net/blog/kl-approx.html
    return torch.cat([torch.stack(losses).mean(0), kl.sum(1) / order.numel()])


def tasks(size, processes):
    """Who learns what of a minibatch of `size` samples: tasks of `learn`, for at most so many processes."""
    if processes == 1:
        return [(True, True, slice(size))]
    parts = max(1, min(processes // 2, size // MIN_PART))
    return [(policy, not policy, share(size, k, parts)) for k in range(parts) for policy in (True, False)]


def update(agent, optimizer, args, batch, frames=None, workers=()):
    """`update_epochs` passes of minibatch gradient steps over a flat batch, a dict of (samples, ...) tensors.

    `frames` (n, 2, size, size) are encoded anew in each step if the encoder is trained end to end. `workers` take
    their tasks; the batch is then that of the storage they share.

    Returns the means of losses and diagnostics over the last epoch's minibatches, as a dict of floats.
    """
    parameters = optimizer.param_groups[0]["params"]
    task, *other_tasks = tasks(args.minibatch_size, 1 + len(workers))
    workers = workers[: len(other_tasks)]
    grad_norms = []

    def step():
        for worker in workers:
            worker.wait()
            parameters[0].grad.add_(worker.grad)
        grad_norms.append(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        for worker in workers:
            worker.go_on()

    optimizer.zero_grad(set_to_none=False)
    for epoch in range(1, args.update_epochs + 1):
        grad_norms.clear()
        order = torch.randperm(len(batch["x"]), device=batch["x"].device).view(-1, args.minibatch_size)
        for worker, its_task in zip(workers, other_tasks):
            worker.tell("learn", args, order, its_task)
        stats = learn(agent, args, batch, order, task, step, frames)
        stats = sum([worker.answer() for worker in workers], stats)
        stats = torch.cat([stats, torch.stack(grad_norms).mean(0, keepdim=True)]).tolist()  # waits for the device
        if stats[4] > args.target_kl and args.lr_schedule != "kl":
            break
    names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")
    return dict(zip(names, stats)) | {"epochs": epoch}


def share(number, rank, size):
    """The slice of `number` things that process `rank` of `size` has."""
    return slice(number * rank // size, number * (rank + 1) // size)


class Runner:
    """A process's share of the environments, and the observations to go on from."""

    def __init__(self, args, agent, storage, rank, state=None):
        """`state`: what `run` returned, to go on from there."""
        size = num_processes(args)
        part = share(args.num_envs, rank, size)
        self.args, self.agent = args, agent
        self.storage = {name: value[:, part] for name, value in storage.items()}
        self.envs = make_envs(args, part.stop - part.start, args.terrain_seed, size)
        if state is None:
            obs, _ = self.envs.reset(seed=args.seed + part.start)
            nothing = torch.zeros(self.envs.num_envs, agent.num_depth, device=agent.log_std.device)
            self.proprio, self.depth = proprioception(obs, agent), depth_features(self.envs, agent, nothing)
        else:
            self.envs.set_state(state["envs"])
            self.proprio, self.depth = (state[key].to(agent.log_std.device) for key in ("proprio", "depth"))

    def run(self):
        """One rollout into the storage. Returns ended episodes (return, length, step), state, frames and seconds."""
        episodes, rendered = [], self.envs.render_seconds
        self.proprio, self.depth, frames, simulating, rolling = rollout(
            self.envs, self.agent, self.args, self.proprio, self.depth, self.storage, episodes
        )
        rendering = self.envs.render_seconds - rendered
        state = {"envs": self.envs.get_state(), "proprio": self.proprio, "depth": self.depth}
        return episodes, state, frames, (simulating - rendering, rendering, rolling - simulating)


def num_processes(args):
    """Processes of a run: a GPU has one, and so has an encoder that is trained."""
    alone = args.cuda or (args.cameras and not args.freeze_encoder)
    return 1 if alone else min(args.num_processes, args.num_envs)


class Worker:
    """One of the further processes. Networks, storage and gradients are in shared memory, orders go through a pipe."""

    def __init__(self, args, agent, storage, grad, rank, state):
        context = mp.get_context("spawn")
        self.grad = torch.zeros_like(grad).share_memory_()
        self.pipe, pipe = context.Pipe()
        # The state, and what goes through the pipe, as bytes: tensors as such would be shared too, a file each
        given = rank, args, agent, storage, self.grad, pickle.dumps(state), pipe
        self.process = context.Process(target=work, args=given, daemon=True)
        self.process.start()
        pipe.close()

    def tell(self, *order):
        self.pipe.send_bytes(pickle.dumps(order))

    def wait(self):
        return self.pipe.recv_bytes()

    def answer(self):
        return pickle.loads(self.wait())

    def go_on(self):
        self.pipe.send_bytes(b"")

    def close(self):
        self.pipe.close()  # at which it ends
        self.process.join()


def work(rank, args, agent, storage, grad, state, pipe):
    """What a further process does: rollouts in its environments, its tasks of minibatches, its part of evaluations."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but the first process ends it
    torch.set_num_threads(args.torch_threads)
    for p in agent.parameters():
        if p.requires_grad:  # a view of the flat tensor; its gradient is the same view of ours
            p.grad = grad.as_strided(p.size(), p.stride(), p.storage_offset())
    runner = Runner(args, agent, storage, rank, pickle.loads(state))
    batch = as_batch(storage)

    def step():
        pipe.send_bytes(b"")
        pipe.recv_bytes()
        grad.zero_()

    try:
        pipe.send_bytes(b"")  # ready
        gc.freeze()
        while True:
            order, *given = pickle.loads(pipe.recv_bytes())
            if order == "run":
                answer = runner.run()
            elif order == "learn":
                answer = learn(agent, given[0], batch, *given[1:], step)
            else:
                answer = play(agent, args, *given)
            pipe.send_bytes(pickle.dumps(answer))
    except (EOFError, ConnectionError):  # the first process is gone
        pass


@torch.no_grad()
def play(agent, args, episodes, num_processes):
    """Deterministic episodes, a range of numbers, on the evaluation terrain, up to 100 at a time.

    Returns a list of (return, length, whether it fell). Every environment's first episode counts, and no other, so
    that short ones are not favoured.
    """
    envs = make_envs(args, min(len(episodes), 100), args.eval_terrain_seed, num_processes)
    depth = torch.zeros(envs.num_envs, agent.num_depth, device=agent.log_std.device)
    results = []
    for start in range(episodes.start, episodes.stop, envs.num_envs):
        obs, _ = envs.reset(seed=1_000_000 + start)
        running = np.arange(start, start + envs.num_envs) < episodes.stop
        while running.any():
            depth = depth_features(envs, agent, depth)
            features = agent.features(proprioception(obs, agent), depth)
            obs, _, terminations, truncations, infos = envs.step(agent.actor(features).cpu().numpy())
            ended = (terminations | truncations) & running
            if ended.any():
                columns = infos["episode"]["r"], infos["episode"]["l"], terminations
                results += zip(*(column[ended].tolist() for column in columns))
                running &= ~ended
    envs.close()
    return results


def evaluate(agent, args, episodes, workers=()):
    """Deterministic episodes on the evaluation terrain: a dict of means and standard deviations over them."""
    size = min(1 + len(workers), episodes)
    parts = [range(episodes)[share(episodes, rank, size)] for rank in range(size)]
    workers = workers[: size - 1]
    for worker, part in zip(workers, parts[1:]):
        worker.tell("play", part, size)
    results = play(agent, args, parts[0], size)
    for worker in workers:
        results += worker.answer()
    returns, lengths, falls = np.array(results).T
    return {
        "episodic_return": float(returns.mean()),
        "episodic_return_std": float(returns.std()),
        "episodic_length": float(lengths.mean()),
        "episodic_length_std": float(lengths.std()),
        "falls": float(falls.mean()),
        "episodes": len(results),
    }


def scheduled(kind, start, end, progress_remaining):
    """The value in force at a share of the training left, from 1 to 0."""
    if kind == "constant":
        return start
    if kind == "linear":
        return end + (start - end) * progress_remaining
    if kind == "cosine":  # Loshchilov & Hutter, arXiv 1608.03983, equation 5, without restarts
        return end + (start - end) * (1 - np.cos(np.pi * progress_remaining)) / 2
    return 1e-4 if progress_remaining > 0.66 else 5e-5 if progress_remaining > 0.33 else 1e-5  # the guide's


def kl_adapted(learning_rate, approx_kl, target_kl):
    """The learning rate after an update of this KL divergence (as in rsl_rl, arXiv 2109.11978)."""
    if approx_kl > 2 * target_kl:
        return max(learning_rate / 1.5, 1e-5)
    return min(learning_rate * 1.5, 1e-2) if approx_kl < target_kl / 2 else learning_rate


def save(path, content):
    """Write a checkpoint in one piece: a crash or a full disk leaves what was there."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        sys.exit(f"error: cannot write {path} ({error.strerror}): make room, then --resume {path.parent}")
    os.replace(part, path)


def load(path):
    """The content of a checkpoint, or exit with one line. No pickled code is run."""
    other = path.with_name("previous.pt" if path.name == "last.pt" else "last.pt")
    offer = f"; {other} is there too: --resume {other}" if other.is_file() else ""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"error: {path} is missing{offer}")
    except Exception:  # torch.load raises many kinds on damaged files
        sys.exit(f"error: {path} is damaged or not a checkpoint{offer}")
    missing = [key for key in ("model", "optimizer", "args") if not isinstance(content, dict) or key not in content]
    if missing:
        sys.exit(f"error: {path} is not a checkpoint to resume from, it has no {missing[0]!r}{offer}")
    fields, given = set(vars(Args())), set(content["args"])
    if "frame_skip" not in given:
        sys.exit(f"error: {path} was trained on the robot before its rollers were mended, which spun up at speed: "
                 "train anew")  # fmt: skip
    if fields != given:
        sys.exit(
            f"error: {path} was written by another program or version: its flags differ in {sorted(fields ^ given)}"
        )
    return content


def check(args):
    """Exit with one line on the first flag that cannot be, before any work starts."""

    def need(good, message):
        if not good:
            sys.exit(f"error: {message}")

    for name in ("frame_skip", "total_timesteps", "num_processes", "torch_threads", "num_envs", "num_steps",
                 "update_epochs", "minibatch_size", "hidden_size", "pi_layers", "vf_layers", "eval_interval",
                 "eval_episodes", "final_eval_episodes"):  # fmt: skip
        value = getattr(args, name)
        need(value >= 1, f"--{name.replace('_', '-')} is {value}: give 1 or more")
    for name in ("num_threads", "seed", "terrain_seed", "eval_terrain_seed", "ent_coef", "vf_coef", "target_kl",
                 "weight_decay", "spin_cost", "wheel_damping"):  # fmt: skip
        value = getattr(args, name)
        need(value >= 0, f"--{name.replace('_', '-')} is {value}: give 0 or more")
    for name in ("terrain_amplitude", "clip_coef", "max_grad_norm"):
        value = getattr(args, name)
        need(value > 0, f"--{name.replace('_', '-')} is {value}: give more than 0")
    for name in ("gamma", "gae_lambda"):
        value = getattr(args, name)
        need(0 <= value <= 1, f"--{name.replace('_', '-')} is {value}: give a number from 0 to 1")
    for name in ("init_log_std", "depth_scale"):
        value = getattr(args, name)
        need(np.isfinite(value), f"--{name.replace('_', '-')} is {value}: give a finite number")
    kinds = {"lr": ("guide", "constant", "linear", "cosine", "kl")}
    for name in ("lr", "clip", "ent"):
        kind, end = getattr(args, f"{name}_schedule"), getattr(args, f"{name}_end")
        choice = kinds.get(name, ("constant", "linear", "cosine"))
        need(kind in choice, f"--{name}-schedule is {kind}: give {', '.join(choice)}")
        need(0 <= end < np.inf, f"--{name}-end is {end}: give 0 or more")
    need(args.clip_schedule == "constant" or args.clip_end > 0, f"--clip-end is {args.clip_end}: give more than 0")
    lr = args.learning_rate
    need(lr == -1 or 0 < lr < np.inf, f"--learning-rate is {lr}: give -1 for the guide's steps, or a positive start")
    need((lr == -1) == (args.lr_schedule == "guide"), "--learning-rate -1 and --lr-schedule guide go together: "
         "give both, or a positive rate with constant, linear, cosine or kl")  # fmt: skip
    need(args.terrain in ("perlin", "flat"), f"--terrain is {args.terrain}: give perlin or flat")
    need(args.terrain == "flat" or args.terrain_seed != args.eval_terrain_seed,
         "--terrain-seed and --eval-terrain-seed are the same: evaluate on terrain not trained on")  # fmt: skip
    batch_size, size = args.num_envs * args.num_steps, args.minibatch_size
    divisors = [d for d in range(1, batch_size + 1) if batch_size % d == 0]
    below, above = (
        max((d for d in divisors if d < size), default=1),
        min((d for d in divisors if d > size), default=size),
    )
    need(batch_size % size == 0, f"--minibatch-size is {size}, which does not divide --num-envs * --num-steps = "
         f"{batch_size}: the nearest that do are {below}" + (f" and {above}" if above > size else ""))  # fmt: skip
    steps = batch_size * args.frame_skip
    need(args.total_timesteps >= steps, f"--total-timesteps is {args.total_timesteps}: give at least "
         f"--num-envs * --num-steps * --frame-skip = {steps}, one iteration")  # fmt: skip
    need(not args.cuda or torch.cuda.is_available(), "--cuda: PyTorch finds no GPU here; leave the flag out")


def load_encoder(path):
    """The state of the pretrained depth encoder, or exit with one line."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["encoder"]
        DepthEncoder().load_state_dict(state)
        return state
    except FileNotFoundError:
        problem = "is missing"
    except Exception:  # torch.load and load_state_dict raise many kinds on damaged or foreign files
        problem = "is damaged or not a depth encoder"
    sys.exit(f"error: {path} {problem}: restore it, make it by python -m ballbot_utils.pretrain_encoder, "
             "or train one with --no-freeze-encoder")  # fmt: skip


def train(args):
    """Train by `args`; logs and checkpoints go to runs/<run name>. Returns the run's folder.

    A script that calls this needs `if __name__ == "__main__":` around the call, as its processes import the script.
    """
    run = None
    if args.resume:
        run_dir = Path(args.resume)
        path = run_dir if run_dir.suffix == ".pt" else run_dir / "last.pt"
        run, run_dir = load(path), path.parent
        vars(args).update(run["args"])
        check(args)
    else:
        check(args)
        args.run_name = args.run_name or f"Ballbot-v0__{args.exp_name}__{args.seed}__{int(time.time())}"
        run_dir = Path("runs") / args.run_name
        if run_dir.exists():
            sys.exit(f"error: {run_dir} exists: give another --run-name, move it away, or --resume {run_dir}")
    iteration_steps = args.num_envs * args.num_steps * args.frame_skip
    num_iterations = args.total_timesteps // iteration_steps

    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda" if args.cuda else "cpu")

    agent = Agent(args)
    if agent.encoder is not None and args.freeze_encoder:
        if run is None:
            agent.encoder.load_state_dict(load_encoder(Path(__file__).resolve().parent / args.encoder_path))
        agent.encoder.requires_grad_(False)
    agent.to(device)
    parameters = flatten([p for p in agent.parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW([parameters], lr=1.0, eps=1e-5, weight_decay=args.weight_decay, fused=True)

    storage, size = make_storage(args, agent), num_processes(args)
    states = run["runners"] if run else [None] * size
    try:
        if size > 1:
            agent.share_memory()
            for value in storage.values():
                value.share_memory_()
        workers = [Worker(args, agent, storage, parameters.grad, rank, states[rank]) for rank in range(1, size)]
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {size} processes cannot share memory ({error}): give --num-processes 1")
    batch = as_batch(storage)

    finished = deque(maxlen=100)  # (return, length) of the last episodes
    if run is None:
        run_dir.mkdir(parents=True)
        settings = {key: value for key, value in asdict(args).items() if key not in ("run_name", "config", "resume")}
        (run_dir / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        learning_rate = args.learning_rate
        first_iteration, global_step, best_return, next_eval, seconds = 1, 0, -np.inf, args.eval_interval, 0.0
        targets_met, before = None, 0.0
    else:
        try:
            agent.load_state_dict(run["model"])
            optimizer.load_state_dict(run["optimizer"])
        except (RuntimeError, ValueError, KeyError):
            sys.exit(f"error: {path} was written by another version: its networks or optimizer are stored otherwise")
        first_iteration, global_step, seconds = run["iteration"] + 1, run["global_step"], run["seconds"]
        best_return, next_eval = run["best_return"], run["next_eval"]
        targets_met, before = run["targets_met"], run["elapsed"]
        finished.extend(run["finished"])
        learning_rate = run["learning_rate"]
        torch.set_rng_state(run["rng"])
        if args.cuda:
            torch.cuda.set_rng_state(run["cuda_rng"])
    runner = Runner(args, agent, storage, 0, states[0])
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if run else None)
    if run is None:
        rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + rows)
        print(" ".join(f"--{key.replace('_', '-')} {value}" for key, value in settings.items() if value != ""))
    print(f"{run_dir}: {num_iterations} iterations of {iteration_steps} steps; tensorboard --logdir runs")
    for worker in workers:
        worker.wait()  # until it is ready
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not look at it
    start_time, evaluating = time.perf_counter() - seconds, 0.0

    for iteration in range(first_iteration, num_iterations + 1):
        progress_remaining = 1 - (iteration - 1) / num_iterations
        now = replace(
            args,
            clip_coef=scheduled(args.clip_schedule, args.clip_coef, args.clip_end, progress_remaining),
            ent_coef=scheduled(args.ent_schedule, args.ent_coef, args.ent_end, progress_remaining),
        )
        if args.lr_schedule != "kl":
            learning_rate = scheduled(args.lr_schedule, args.learning_rate, args.lr_end, progress_remaining)
        optimizer.param_groups[0]["lr"] = learning_rate

        storage["noise"].normal_()
        for worker in workers:
            worker.tell("run")
        episodes, state, frames, (simulating, rendering, inferring) = runner.run()
        states = [state]
        for worker in workers:
            its_episodes, state, *_ = worker.answer()
            episodes += its_episodes
            states.append(state)
        learn_start = time.perf_counter()
        rewards = storage["rewards"]
        values = storage["values"]
        advantages = gae(rewards, values, storage["next_values"], storage["dones"], args.gamma, args.gae_lambda)
        storage["advantages"].copy_(advantages)
        returns = advantages + values
        explained = 1 - (returns - values).var() / returns.var()
        if args.norm_value:
            agent.rescale_values(returns)
        storage["returns"].copy_((returns - agent.value_mean) / agent.value_std)
        storage["values"].copy_((values - agent.value_mean) / agent.value_std)
        losses = update(agent, optimizer, now, batch, frames, workers)
        if not all(map(np.isfinite, losses.values())):
            sys.exit(f"error: the losses after step {global_step} are not finite: lower --learning-rate or "
                     f"--max-grad-norm; {run_dir}/last.pt is the policy before ({losses})")  # fmt: skip
        if args.norm_obs:
            agent.update_moments("obs", storage["raw"].flatten(0, 1))
        learning = time.perf_counter() - learn_start

        for episodic_return, length, step in sorted(episodes, key=lambda episode: episode[2]):
            at = global_step + (step + 1) * args.num_envs * args.frame_skip
            writer.add_scalar("charts/episodic_return", episodic_return, at)
            writer.add_scalar("charts/episodic_length", length, at)
            finished.append((episodic_return, length))
        global_step += iteration_steps
        mean_return, mean_length = np.mean(finished, 0) if finished else (np.nan, np.nan)
        seconds = time.perf_counter() - start_time - evaluating
        scalars = {f"losses/{key}": value for key, value in losses.items()} | {
            "losses/explained_variance": explained.item(),
            "charts/learning_rate": learning_rate,
            "charts/clip_coef": now.clip_coef,
            "charts/ent_coef": now.ent_coef,
            "charts/action_std": agent.log_std.exp().mean().item(),
            "charts/SPS": global_step / seconds,
            "SPS/simulate": iteration_steps / simulating,
            "SPS/infer": iteration_steps / inferring,
            "SPS/learn": iteration_steps / learning,
            "charts/physics_errors": sum(state["envs"]["physics_errors"].sum() for state in states),
        }
        if args.cameras:
            scalars["SPS/render"] = iteration_steps / rendering
        if finished:
            scalars["charts/episodic_return_mean100"] = mean_return
            scalars["charts/episodic_length_mean100"] = mean_length
        for key, value in scalars.items():
            writer.add_scalar(key, value, global_step)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds / iteration * (num_iterations - iteration)))
        parts = [simulating, rendering, inferring, learning]
        shares = "/".join(f"{100 * part / sum(parts):.0f}" for part in parts)
        bar = "#" * (20 * iteration // num_iterations)
        line = (f"[{bar:<20}] {global_step:,} steps, {global_step / seconds:,.0f} SPS, {left} left, return "
                f"{mean_return:.1f}, length {mean_length:.0f}, simulate/render/infer/learn {shares} %")  # fmt: skip
        if sys.stdout.isatty():
            print(CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            print(line, flush=True)

        eval_start = time.perf_counter()
        if args.lr_schedule == "kl":
            learning_rate = kl_adapted(learning_rate, losses["approx_kl"], args.target_kl)
        policy = dict(model=agent.state_dict(), args=asdict(args), global_step=global_step)
        if global_step >= next_eval:
            next_eval += args.eval_interval
            result = evaluate(agent, args, args.eval_episodes, workers)
            report(f"evaluation at {global_step:,} steps", result, writer, global_step)
            if targets_met is None and all(reached(result)):
                targets_met = f"{global_step:,} steps, {minutes(before + time.perf_counter() - STARTED)}"
                print(f"targets met after {targets_met}", flush=True)
            if result["episodic_return"] > best_return:
                best_return = result["episodic_return"]
                save(run_dir / "best.pt", policy | {"eval": result})
        checkpoint = policy | dict(
            optimizer=optimizer.state_dict(), iteration=iteration, best_return=best_return, next_eval=next_eval,
            targets_met=targets_met, elapsed=before + time.perf_counter() - STARTED, seconds=seconds,
            finished=list(finished), runners=states, rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state() if args.cuda else None,
            learning_rate=learning_rate,
        )  # fmt: skip
        if (run_dir / "last.pt").exists():
            shutil.copyfile(run_dir / "last.pt", run_dir / "previous.pt")
        save(run_dir / "last.pt", checkpoint)
        evaluating += time.perf_counter() - eval_start

    runner.envs.close()
    result = evaluate(agent, args, args.final_eval_episodes, workers)
    report("final policy", result, writer, global_step)
    best_result = {"episodic_return": -np.inf}
    if best_return > -np.inf:
        best = torch.load(run_dir / "best.pt", map_location=device, weights_only=True)
        agent.load_state_dict(best["model"])
        best_result = evaluate(agent, args, args.final_eval_episodes, workers)
        report(f"policy of {best['global_step']:,} steps, the best evaluated on the way", best_result)
    if result["episodic_return"] > best_result["episodic_return"]:
        best_result = result
        last = torch.load(run_dir / "last.pt", map_location=device, weights_only=True)
        save(run_dir / "best.pt", {key: last[key] for key in ("model", "args", "global_step")} | {"eval": result})
    on_return, on_length = ("reached" if yes else "missed" for yes in reached(best_result))
    print(f"targets, mean over {best_result['episodes']} episodes on unseen terrain: return > {TARGET_RETURN} "
          f"{on_return}, length > {TARGET_LENGTH} {on_length} ({run_dir}/best.pt)"
          + (f"; first met after {targets_met}" if targets_met else ""))  # fmt: skip
    for worker in workers:
        worker.close()
    writer.close()
    gc.unfreeze()
    return run_dir


def reached(result):
    """Whether an evaluation meets the targets: that of the return, that of the length."""
    return result["episodic_return"] > TARGET_RETURN, result["episodic_length"] > TARGET_LENGTH


def minutes(seconds):
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"


def report(title, result, writer=None, global_step=None):
    """Print an evaluation and log it."""
    print(f"{CLEAR_LINE}{title}: return {result['episodic_return']:.1f} ± {result['episodic_return_std']:.1f}, length "
          f"{result['episodic_length']:.0f} ± {result['episodic_length_std']:.0f}, falls {100 * result['falls']:.0f} % "
          f"({result['episodes']} episodes)", flush=True)  # fmt: skip
    if writer is not None:
        for key in ("episodic_return", "episodic_length", "falls"):
            writer.add_scalar(f"eval/{key}", result[key], global_step)


if __name__ == "__main__":
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C
    try:
        train(arguments)
    except (EOFError, ConnectionError):  # said by a pipe
        sys.exit(f"{CLEAR_LINE}error: a process of this run was killed, or has ended for what it says above; to go on: "
                 f"python {sys.argv[0]} --resume runs/{arguments.run_name}")  # fmt: skip
    except KeyboardInterrupt:
        sys.exit(f"{CLEAR_LINE}stopped; to go on: python {sys.argv[0]} --resume runs/{arguments.run_name}")
