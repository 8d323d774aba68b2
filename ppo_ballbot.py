"""PPO for the ballbot in one file: `python ppo_ballbot.py --clip-coef 0.015`.

Proximal Policy Optimization (Schulman et al., arXiv 1707.06347) with generalized advantage estimation
(Schulman et al., arXiv 1506.02438) on Ballbot-v0: proprioception and two depth cameras over uneven
terrain. It needs ballbot_env.py, ballbot_runs.py, ballbot_utils/ and assets/. The defaults are the "balanced"
configuration of the hyperparameter guide of openballbot-rl; `--help` lists every flag.

It runs on --num-processes ranks of this machine, or on those that torchrun starts, on many:
`torchrun --nnodes 2 --nproc-per-node 4 ... ppo_ballbot.py --num-envs 64`. Each rank has its share of the
environments and of every minibatch; all have the same networks, as gradients are averaged.
"""

import signal
import time

STARTED = time.perf_counter()  # the time to the targets counts from here: the imports are part of it
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it without a traceback

import copy
import os
from collections import deque
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import ballbot_env
import ballbot_runs
from ballbot_runs import CLEAR_LINE, save, say, stop, summary
from ballbot_utils.geometry import in_body_frame
from ballbot_utils.model import OPTIMAL_HEADING
from ballbot_utils.observations import PROPRIOCEPTION
from ballbot_utils.state import copy_array
from ballbot_utils.terrain import TERRAINS

TARGET_RETURN, TARGET_LENGTH = 100, 3000  # the guide's targets: means over 100 episodes


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # the name of this experiment, part of the default run name
    run_name: str = ""  # folder under runs/ for logs and checkpoints; empty: one of a name of its own
    # start from one of the guide's configurations, from tuned, the best we know, from robust, tuned randomized, or from
    # paper, the task and the choices of arXiv 2505.18417
    preset: Literal["", "aggressive", "conservative", "balanced", "tuned", "robust", "paper"] = ""
    config: str = ""  # start from a run's config.json; flags given beside it win, as they do over --preset
    # go on with a run, bit for bit: runs/<run name>, or its last.pt or previous.pt. No flags but more --total-timesteps
    resume: str = ""
    init_from: str = ""  # start from the policy of runs/<run name>, or of a checkpoint, with networks of the same flags
    seed: int = 1  # seed of networks, action noise, minibatches and start poses
    torch_deterministic: bool = True  # use cuDNN's deterministic algorithms on the GPU (the CPU's are)
    cuda: bool = False  # render and run networks on GPUs, one for each process; the physics stays on the CPU
    num_processes: int = 1  # ranks on this machine; they pay with minibatches of 512 and more. torchrun has its own
    num_threads: int = 0  # CPU threads of physics and renderer in each process; 0: its share of the cores
    torch_threads: int = 1  # CPU threads of networks; more pay only with --no-freeze-encoder, on an idle machine

    # The task
    terrain: Literal[tuple(TERRAINS)] = "perlin"  # ground: perlin or flat
    terrain_seed: int = 0  # the training terrain
    terrain_amplitude: float = 0.1  # height of the training terrain's hills, m; evaluations have the task's 0.1
    randomization: MutableMapping[str, float] = field(default_factory=dict)  # of training, as push 1.0 mass 0.1
    eval_terrain_seed: int = 1_000_000  # the terrain of evaluations, never trained on
    cameras: bool = True  # observe through the two depth cameras
    wheel_damping: float = 0.4  # damping of the wheels' axles, N·m·s/rad; the paper's 0.8 bounds the return at 98.5
    goal: Literal["forward", "command"] = "forward"  # drive to +y, or at a velocity that is observed and changes
    # physics steps of 2 ms that an action is held; at 1 the noise of actions averages out, and the robot does not learn
    # to drive. All step counts are physics steps, but for --num-steps
    frame_skip: int = 4
    total_timesteps: int = 8_000_000  # steps to train for, all environments together
    # length of training episodes, rounded up to whole actions; in shorter ones more starts. Evaluations have 4000
    max_episode_steps: int = 4000
    num_envs: int = 10  # environments stepped together, over all processes

    # PPO
    learning_rate: float = -1.0  # -1: the guide's schedule, a third of the steps each at 1e-4, 5e-5 and 1e-5
    anneal_lr: bool = False  # let a constant learning rate fall linearly to 0
    num_steps: int = 512  # actions per environment and iteration: the guide's n_steps of 2048, in physics steps
    gamma: float = 0.99  # discount factor per action; 0.99 and --frame-skip 4 see 0.8 s ahead
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    update_epochs: int = 5  # passes over the data of an iteration
    minibatch_size: int = 256  # samples per gradient step, over all processes; must divide num_envs * num_steps
    norm_adv: bool = False  # normalise advantages in each minibatch
    clip_coef: float = 0.015  # clipping range of the probability ratio
    clip_vloss: bool = False  # clip the value loss with clip_coef too
    ent_coef: float = 0.001  # weight of the entropy bonus
    vf_coef: float = 2.0  # weight of the value loss, which is without CleanRL's factor 0.5 (as Stable-Baselines3's)
    bound_coef: float = 0.0  # weight of a loss on means beyond [-1, 1], where actions are clipped and noise is in vain
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float = 0.3  # end an iteration's updates once an epoch's approximate KL divergence exceeds this
    weight_decay: float = 0.01  # decoupled weight decay (AdamW)
    spin_cost: float = 0.0  # learn from rewards less this times the squared yaw rate (rad²/s²); not in returns shown
    drift_cost: float = 0.0  # the same for the squared velocity across the goal (m²/s²); commands have none
    heading_cost: float = 0.0  # the same for the squared heading (rad²) off that at which two wheels share the drive
    norm_obs: bool = True  # normalise proprioception by running mean and variance; without it the robot drives slowly
    norm_value: bool = False  # let the critic predict returns in units of their moving mean and deviation (PopArt)

    # Networks
    body_frame: bool = False  # see lean, velocity and +y in the robot's frame: control is alike at any heading
    hidden_size: int = 128  # units per hidden layer
    pi_layers: int = 4  # hidden layers of the actor
    vf_layers: int = 4  # hidden layers of the critic
    # let the critic, which only training needs, see the ground's slopes: values are exact enough to drive by
    privileged_critic: bool = True
    depth_scale: float = 1.0  # factor on the depth features; below 1, proprioception is learnt from first
    init_log_std: float = 0.0  # initial logarithm of the actions' standard deviation
    log_std_lr_scale: float = 1.0  # factor on that logarithm's learning rate; above 1, noise falls when less of it pays
    freeze_encoder: bool = True  # keep the pretrained depth encoder as it is, else train one end to end
    encoder_path: str = "assets/depth_encoder.pt"  # the pretrained depth encoder, relative to this file

    # Evaluation
    eval_interval: int = 500_000  # steps between deterministic evaluations
    eval_episodes: int = 16  # episodes of each
    final_eval_episodes: int = 100  # episodes of the one at the end
    save_interval: float = 10.0  # seconds between checkpoints to resume from; the last iteration saves one too
    capture_video: bool = False  # film an episode at each, to runs/<run name>/videos; needs OpenGL

    # Weights & Biases
    track: bool = False  # log there too; needs pip install wandb
    wandb_project_name: str = "ballbot"  # the project
    wandb_entity: str = ""  # the team; empty: your default one


# The guide's three configurations, which differ by what it states, the best that we know, and the paper's: what the
# guide does not state has Stable-Baselines3's values there.
PRESETS = {
    "aggressive": dict(
        learning_rate=1e-3, clip_coef=0.2, ent_coef=0.01, num_steps=256, update_epochs=3, hidden_size=64, num_envs=16,
    ),
    "conservative": dict(
        learning_rate=-1.0, clip_coef=0.015, ent_coef=0.001, vf_coef=2.0, num_steps=1024, update_epochs=10,
        hidden_size=256, num_envs=8,
    ),
    "balanced": dict(clip_coef=0.015, ent_coef=0.001),
    "paper": dict(
        clip_coef=0.015, ent_coef=0.001, frame_skip=1, num_steps=2048, norm_obs=False, privileged_critic=False,
        wheel_damping=0.8,
    ),
    "tuned": dict(
        num_processes=2, body_frame=True, learning_rate=9e-4, anneal_lr=True, clip_coef=0.15, vf_coef=1.0,
        ent_coef=0.0, bound_coef=0.1, num_envs=64, num_steps=16, minibatch_size=256, update_epochs=4, gamma=0.994,
        gae_lambda=0.96, norm_adv=True, norm_value=True, target_kl=0.04, weight_decay=0.0, pi_layers=3,
        vf_layers=3, init_log_std=-0.5, depth_scale=0.1, spin_cost=0.005, drift_cost=0.07, heading_cost=0.04,
        log_std_lr_scale=2.0, terrain_amplitude=0.15, randomization=dict(push=0.5),
        max_episode_steps=1000, total_timesteps=3_000_000, eval_interval=250_000,
    ),
}  # fmt: skip
PRESETS["robust"] = PRESETS["tuned"] | dict(log_std_lr_scale=5.0, max_episode_steps=4000, terrain_amplitude=0.2)
PRESETS["robust"]["randomization"] = dict(terrain_amplitude=0.75, mass=0.1, friction=0.2, wheel_damping=0.2, latency=2,
                                          tilt=3, velocity=0.2, push=1.5, obs_noise=0.01)  # fmt: skip


def parse():
    """Args from the command line: flags win over --config, which wins over --preset."""
    return ballbot_runs.parse(Args, PRESETS)


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

    An observation is split in `proprio` (n, 15), one more with the frames' age, one with --body-frame and two with
    commands, and `depth` (n, 40), the encoder's features of both cameras' frames. Without cameras `depth` is (n, 0).
    With --privileged-critic the critic sees `slopes` (n, 6) of the ground as well, which are (n, 0) without.
    """

    def __init__(self, args):
        super().__init__()
        self.commanded, self.num_slopes = args.goal == "command", 6 * args.privileged_critic
        self.num_proprio = 15 + args.body_frame + args.cameras + 2 * self.commanded
        self.num_depth = 2 * DepthEncoder.num_features if args.cameras else 0
        self.body_frame, self.depth_scale, self.norm_obs = args.body_frame, args.depth_scale, args.norm_obs
        self.encoder = DepthEncoder().to(memory_format=torch.channels_last) if args.cameras else None  # faster
        num_features = self.num_proprio + self.num_depth
        self.actor = MLP(num_features, args.hidden_size, args.pi_layers, 3, last_gain=0.01)
        self.critic = MLP(num_features + self.num_slopes, args.hidden_size, args.vf_layers, 1, last_gain=1.0)
        self.log_std = nn.Parameter(torch.full((3,), args.init_log_std))
        self.register_buffer("obs_mean", torch.zeros(self.num_proprio))
        self.register_buffer("obs_var", torch.ones(self.num_proprio))
        self.register_buffer("obs_count", torch.zeros(()))
        # The frames' age, the last, counts for no more than what they show
        scale = [1.0] * (self.num_proprio - 1) + [args.depth_scale if args.cameras else 1.0]
        self.register_buffer("obs_scale", torch.tensor(scale), persistent=False)
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
            proprio = (proprio - self.obs_mean) * torch.rsqrt(self.obs_var + 1e-8) * self.obs_scale
        return torch.cat([proprio, depth], -1)

    def normalised_value(self, features, slopes):
        """Values (n,) of features (n, 56) and slopes (n, 6 or 0), in the critic's own units."""
        return self.critic(torch.cat([features, 10 * slopes], -1)).squeeze(-1)

    def value(self, features, slopes):
        """The same in the units of rewards."""
        return self.normalised_value(features, slopes) * self.value_std + self.value_mean

    @torch.no_grad()
    def rescale_values(self, moments):
        """New units for the critic, its values staying as they are, by `moments` (2,): means of returns and squares.

        PopArt (van Hasselt et al., arXiv 1602.07714, equation 9); the moments move by a tenth, at first by more.
        """
        self.value_count += 1
        self.value_moments.lerp_(moments, max(0.1, 1 / self.value_count.item()))
        mean = self.value_moments[0]
        std = (self.value_moments[1] - mean**2).clamp(min=1e-8).sqrt()
        *_, weight, bias = self.critic.parameters()
        weight *= self.value_std / std
        bias.mul_(self.value_std).add_(self.value_mean - mean).div_(std)
        self.value_mean.copy_(mean)
        self.value_std.copy_(std)

    @torch.no_grad()
    def update_obs_moments(self, proprio):
        """Merge proprioception (n, 15), all ranks', into its running moments (Chan, Golub & LeVeque, 1979)."""
        mean = average(proprio.mean(0))
        var = average((proprio - mean).square().mean(0))
        count, delta = len(proprio) * world_size(), mean - self.obs_mean
        total = self.obs_count + count
        self.obs_var.mul_(self.obs_count).add_(var * count).add_(delta**2 * self.obs_count * count / total).div_(total)
        self.obs_mean += delta * count / total
        self.obs_count.copy_(total)


def log_prob(actions, mean, log_std):
    """Log density (n,) of actions (n, 3) under independent Gaussians."""
    normalised = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * normalised.square() + log_std + 0.5 * np.log(2 * np.pi)).sum(-1)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def average(tensor):
    """The mean of a tensor over all ranks, in place."""
    if dist.is_initialized():
        work = dist.all_reduce(tensor, async_op=True)
        while not (tensor.is_cuda or work.is_completed()):  # a CPU asleep takes longer to wake up than this
            os.sched_yield()
        work.wait()  # raises what went wrong
        tensor /= world_size()
    return tensor


def gather(thing, to_all=False):
    """A list of what each rank has, in their order; on ranks other than 0 it holds None, unless it goes `to_all`."""
    things = [thing] * world_size()
    if dist.is_initialized() and to_all:
        dist.all_gather_object(things, thing)
    elif dist.is_initialized():
        dist.gather_object(thing, things if rank() == 0 else None)
    return things


def make_envs(args, num_envs, evaluation=False):
    """`num_envs` environments of the training task, or of the evaluation's."""
    max_steps = 4000 if evaluation else args.max_episode_steps
    return gym.make_vec(
        "Ballbot-v0", num_envs=num_envs, terrain=args.terrain, cameras=args.cameras, wheel_damping=args.wheel_damping,
        terrain_seed=args.eval_terrain_seed if evaluation else args.terrain_seed,
        terrain_amplitude=0.1 if evaluation else args.terrain_amplitude, frame_skip=args.frame_skip,
        randomization=None if evaluation else args.randomization,
        max_episode_steps=-(-max_steps // args.frame_skip), copy=False,  # in actions; no frame is kept
        num_threads=args.num_threads or ballbot_runs.own_cores(),
        device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.cuda else "cpu",
        goal="command" if args.goal == "command" else (0, 1),
    )  # fmt: skip


def proprioception(obs, agent):
    """Proprioception (n, 15 to 19), in the parts that `Agent` names, of a batch of observations."""
    if agent.body_frame:
        if agent.commanded:
            *_, command = in_body_frame(obs["orientation"], np.pad(obs["command"], ((0, 0), (0, 1))))
            obs = obs | {"command": command[:, :2].astype(np.float32)}
        lean, heading, vel = in_body_frame(obs["orientation"], obs["vel"])
        orientation = np.concatenate([lean, np.sin(heading), np.cos(heading)], 1)
        obs = obs | {"orientation": orientation.astype(np.float32), "vel": vel.astype(np.float32)}
    keys = PROPRIOCEPTION + ("command",) * agent.commanded
    keys += ("relative_image_timestamp",) if agent.encoder is not None else ()
    return torch.from_numpy(np.concatenate([obs[key] for key in keys], 1)).to(agent.log_std.device)


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


def shaping_costs(obs, args):
    """Costs (n,) of a physics step, which training subtracts from its reward, of a batch of observations."""
    costs = args.spin_cost * obs["angular_vel"][:, 2] ** 2
    if args.goal == "command":
        return costs
    costs += args.drift_cost * obs["vel"][:, 0] ** 2
    if args.heading_cost:
        heading = in_body_frame(obs["orientation"], obs["vel"])[1][:, 0] - OPTIMAL_HEADING
        costs += args.heading_cost * (heading - 2 * np.pi * np.rint(heading / (2 * np.pi))) ** 2
    return costs


@torch.no_grad()
def rollout(envs, agent, args, proprio, depth, progress=lambda step: None):
    """Act `num_steps` times in every environment, from the observation `proprio` (envs, 15), `depth` (envs, 40).

    Returns a dict of tensors (steps, envs, ...), with the frames if an encoder is trained on them; the observation to
    go on from, as it was given; a list of (return, length, step) of the episodes that ended; and the seconds spent in
    the environments.
    """
    shape, device = (args.num_steps, envs.num_envs), agent.log_std.device
    names = {"proprio": agent.num_proprio, "depth": agent.num_depth, "slopes": agent.num_slopes, "actions": 3}
    batch = {name: torch.empty(*shape, width, device=device) for name, width in names.items()}
    if agent.encoder is not None and not args.freeze_encoder:
        batch["frames"] = torch.empty(*shape, *envs.frames.shape[1:], device=device)
    noise = agent.log_std.exp() * torch.randn(*shape, 3, device=device)
    rewards, dones = np.empty(shape, np.float32), np.empty(shape, np.float32)
    episodes, ends, seconds = [], [], 0.0
    for step in range(args.num_steps):
        progress(step)
        batch["proprio"][step], batch["depth"][step] = proprio, depth
        batch["slopes"][step] = ground_slopes(envs, agent)
        if "frames" in batch:
            batch["frames"][step] = envs.frames
        action = agent.actor(agent.features(proprio, depth)) + noise[step]
        batch["actions"][step] = action
        now = time.perf_counter()
        obs, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())  # clips them to [-1, 1]
        seconds += time.perf_counter() - now
        costs = shaping_costs(obs, args)
        dones[step] = terminations | truncations
        for i in np.flatnonzero(dones[step]):
            episodes.append((float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i]), step))
            final = {key: value[None] for key, value in infos["final_obs"][i].items()}  # obs is the next episode's
            costs[i] = shaping_costs(final, args)[0]
            value = torch.zeros(1, device=device)
            if not terminations[i]:  # a truncated episode's final observation has a value
                final_depth = depth[:1]
                if agent.encoder is not None:
                    frames = torch.cat([torch.as_tensor(final[f"depth_{k}"]) for k in (0, 1)], 1)
                    final_depth = agent.encode(frames.to(device))
                slopes = torch.from_numpy(envs.final_slopes[[i], : agent.num_slopes]).to(device)
                value = agent.value(agent.features(proprioception(final, agent), final_depth), slopes)
            ends.append((step, i, value))
        rewards[step] = reward - args.frame_skip * costs
        proprio, depth = proprioception(obs, agent), depth_features(envs, agent, depth)

    # One pass over the whole batch is cheaper than one a step
    features = agent.features(batch["proprio"], batch["depth"])
    values = agent.value(features.flatten(0, 1), batch["slopes"].flatten(0, 1)).view(shape)
    next_values = torch.cat([values[1:], agent.value(agent.features(proprio, depth), ground_slopes(envs, agent))[None]])
    for step, i, value in ends:
        next_values[step, i] = value[0]
    rewards, dones = (torch.from_numpy(x).to(device) for x in (rewards, dones))
    batch |= {"logprobs": log_prob(noise, 0, agent.log_std), "values": values, "next_values": next_values,
              "rewards": rewards, "dones": dones}  # fmt: skip
    return batch, (proprio, depth), episodes, seconds


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


def update(agent, optimizer, args, batch):
    """`update_epochs` passes of minibatch gradient steps over this rank's samples, a dict of (samples, ...) tensors.

    Its frames are encoded anew in each step, if the encoder is trained.
    Returns the means of losses and diagnostics over the last epoch's minibatches and all ranks, a dict of floats.
    """
    parameters = [p for p in agent.parameters() if p.requires_grad]
    for epoch in range(1, args.update_epochs + 1):
        minibatches = torch.randperm(len(batch["actions"]), device=batch["actions"].device)
        minibatches = minibatches.view(-1, args.minibatch_size // world_size())
        advantages = batch["advantages"][minibatches]
        if args.norm_adv:  # in each minibatch, over all ranks
            mean, square = average(torch.stack([advantages, advantages.square()]).mean(2, keepdim=True))
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

            newvalue = agent.normalised_value(features, mb["slopes"])
            v_loss = (newvalue - mb["returns"]).square()
            if args.clip_vloss:
                v_clipped = mb["values"] + (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
                v_loss = torch.max(v_loss, (v_clipped - mb["returns"]).square())
            v_loss = v_loss.mean()

            entropy = (agent.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
            bound_loss = (mean.abs() - 1).clamp(min=0).square().sum(-1).mean()
            loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss + args.bound_coef * bound_loss

            optimizer.zero_grad()
            loss.backward()
            if dist.is_initialized():  # one all-reduce of all gradients
                flat = average(torch.cat([p.grad.flatten() for p in parameters]))
                for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
                    p.grad = grad.view_as(p)
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()

            with torch.no_grad():  # KL divergence: http://joschu.net/blog/kl-approx.html
                old_approx_kl, approx_kl = -logratio.mean(), (ratio - 1 - logratio).mean()
                clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                stats.append(torch.stack([pg_loss, v_loss, entropy, old_approx_kl, approx_kl, clipfrac, grad_norm]))
        names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")
        stats = dict(zip(names, average(torch.stack(stats).mean(0)).tolist()))  # the same on all ranks
        if stats["approx_kl"] > args.target_kl:
            break
    return stats | {"epochs": epoch}


@torch.no_grad()
def evaluate(agent: Agent, args: Args, episodes: int) -> dict:
    """Deterministic episodes on the evaluation terrain, shared by the ranks: a dict of means and deviations over them.

    Every environment's first episode counts, and no other, so that short ones are not favoured.
    """
    if CLEAR_LINE:
        say(f"evaluating {episodes} episodes ...", end="")
    mine = range(episodes * rank() // world_size(), episodes * (rank() + 1) // world_size())
    results = []  # (return, length, whether it fell)
    for start in range(mine.start, mine.stop, 100):
        envs = make_envs(args, min(mine.stop - start, 100), evaluation=True)
        obs, _ = envs.reset(seed=ballbot_env.spawn_seeds(1_000_000, episodes)[start : start + envs.num_envs])
        policy, running = Policy(agent, args), np.ones(envs.num_envs, bool)
        while running.any():
            obs, _, terminations, truncations, infos = envs.step(policy(obs))
            ended = (terminations | truncations) & running
            if ended.any():
                columns = infos["episode"]["r"], infos["episode"]["l"], terminations
                results += zip(*(column[ended].tolist() for column in columns))
                running &= ~ended
        envs.close()
    columns = zip(*chain(*gather(results, to_all=True)))
    result = {"episodes": episodes}
    for name, values in zip(("episodic_return", "episodic_length", "falls"), columns):
        result |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values))}
    return result


def in_blocks(network, x, size):
    """`network(x)`, on a CPU on `size` rows at a time: to the last bit, what a row gives depends on no other row."""
    if x.is_cuda:
        return network(x)
    filled = torch.cat([x, x.new_zeros(-len(x) % size, *x.shape[1:])])
    return torch.cat([network(block) for block in filled.split(size)])[: len(x)]


def as_float32(value):
    """A float32 array of an array, a list or a tensor; frames on a GPU stay there."""
    if torch.is_tensor(value):
        value = value.detach().float()
        return value if value.is_cuda and value.ndim > 2 else value.cpu().numpy()
    return np.asarray(value, np.float32)


class Policy:
    """A trained policy as a function: `action = policy(obs)`.

    Observations are those of `gym.make`, or of `gym.make_vec` with their leading axis, as arrays, tensors or lists of
    any type of number. Actions, float32 (3,) or (n, 3), are clipped to [-1, 1], and drawn unless `deterministic` (by a
    torch `generator`, if given, or by a list with one for each environment). Frames are encoded when they differ from
    those of the call before, so that it need not know of resets. `args` are those of the training: the environment must
    have their `frame_skip` and `cameras`. On a CPU an environment's actions do not depend on how many there are.
    """

    def __init__(self, agent, args):
        self.agent, self.args = agent, args
        self.frames, self.depth = None, agent.log_std.new_empty(0, agent.num_depth)  # of the call before, its features

    @torch.no_grad()
    def __call__(self, obs: dict, deterministic: bool = True, generator=None) -> np.ndarray:
        obs = {key: as_float32(value) for key, value in obs.items()}
        agent, single = self.agent, obs["vel"].ndim == 1
        obs = {key: value[None] for key, value in obs.items()} if single else obs
        if len(self.depth) != len(obs["vel"]):
            self.frames, self.depth = None, agent.log_std.new_empty(len(obs["vel"]), agent.num_depth)
        if agent.encoder is not None:
            frames = obs["depth_0"], obs["depth_1"]
            right, left = (frame != old for frame, old in zip(frames, self.frames or (np.nan, np.nan)))
            new = right.any((1, 2, 3)) | left.any((1, 2, 3))
            if new.any():
                images = torch.cat([torch.as_tensor(frame[new]) for frame in frames], 1).to(self.depth.device)
                self.depth[torch.as_tensor(new)] = in_blocks(agent.encode, images, 2)
                self.frames = list(map(copy_array, frames))
        action = in_blocks(agent.actor, agent.features(proprioception(obs, agent), self.depth), 16)
        if not deterministic:
            each = [(generator, len(action))] if not isinstance(generator, list) else [(one, 1) for one in generator]
            noise = [torch.randn(rows, 3, generator=one, dtype=torch.float32) for one, rows in each]
            action += agent.log_std.exp() * torch.cat(noise).to(action.device)
        action = action.clamp(-1, 1).cpu().numpy()
        return action[0] if single else action


def load_policy(path: str | Path) -> Policy:
    """The `Policy` in a checkpoint, or in the best.pt of a run's folder; exits with one line if there is none.

    Its class is that of the script that trained it. If that is not this one, it is imported from the working directory.
    """
    return ballbot_runs.policy_in(Path(path), Args)


def reached(result):
    """Whether an evaluation meets the targets: that of the return, that of the length."""
    return result["episodic_return"] > TARGET_RETURN, result["episodic_length"] > TARGET_LENGTH


def learning_rate_now(args, progress_remaining):
    """The learning rate at a share of the training left, from 1 to 0."""
    if args.learning_rate > 0:
        return args.learning_rate * (progress_remaining if args.anneal_lr else 1)
    return 1e-4 if progress_remaining > 0.66 else 5e-5 if progress_remaining > 0.33 else 1e-5


def train(args: Args, started: float | None = None) -> Path:
    """Train by `args`; logs and checkpoints go to runs/<run name>. Returns the run's folder.

    Call it below `if __name__ == "__main__":`: its processes import the script, and call it with when it `started`.
    """
    run_dir, run, weights = ballbot_runs.begin(args, started, Args, Agent)
    if args.num_processes > 1 and "RANK" not in os.environ:
        ballbot_runs.start_ranks(train, args, STARTED)
        return run_dir
    ballbot_runs.join_ranks(args)
    with ballbot_runs.held(run_dir):
        learn(args, run_dir, run, weights, started or STARTED)
    if dist.is_initialized():
        dist.destroy_process_group()
    return run_dir


def learn(args, run_dir, run, weights, started):
    """What each rank does for `train`, from the `weights` to start with, a part of them, or from a checkpoint `run`."""
    iteration_steps = args.num_envs * args.num_steps * args.frame_skip
    num_iterations, num_envs = args.total_timesteps // iteration_steps, args.num_envs // world_size()
    script = ballbot_runs.script_of(Args)  # for checkpoints
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    if args.cuda:
        torch.cuda.set_device(device)

    agent = Agent(args).to(device)
    if agent.encoder is not None and args.freeze_encoder:
        agent.encoder.requires_grad_(False)
    networks = [p for p in agent.parameters() if p.requires_grad and p is not agent.log_std]
    groups = [dict(params=networks, lr_scale=1.0), dict(params=[agent.log_std], lr_scale=args.log_std_lr_scale)]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=args.weight_decay, fused=True)
    envs = make_envs(args, num_envs)

    best = targets_met = None  # the policy best evaluated so far; when both targets were met first
    final_result = None  # the evaluation at the end of a run that has finished
    global_step = iteration = 0
    elapsed = startup = training = 0.0  # s since the launch; of these, before the first step, and in iterations
    finished = deque(maxlen=100)  # (return, length) of the last episodes
    if run is None:
        agent.load_state_dict(weights, strict=False)
        torch.manual_seed(args.seed + 1_000_000 * rank())  # each rank has its own noise and minibatches
        obs, _ = envs.reset(seed=ballbot_env.spawn_seeds(args.seed, args.num_envs)[num_envs * rank() :][:num_envs])
        depth = depth_features(envs, agent, torch.zeros(num_envs, agent.num_depth, device=device))
        observation = proprioception(obs, agent), depth
    else:
        if wrong := ballbot_runs.misfit(run, args, agent, optimizer):
            stop(f"{args.resume} is damaged or of another version: {wrong} is not as its flags imply")
        agent.load_state_dict(dict(run["model"]))
        optimizer.load_state_dict(run["optimizer"])
        iteration, global_step, elapsed, startup, training = (
            run[name] for name in ("iteration", "global_step", "elapsed", "startup", "training")
        )
        best, targets_met = ballbot_runs.best_of(run, run_dir, agent), run["targets_met"]
        if best is not None and best.pop("ended_at", 0) == global_step and iteration == num_iterations:
            final_result = best["eval"]
        finished.extend(run["finished"])
        state = run["ranks"][rank()]
        observation = state["proprio"].to(device), state["depth"].to(device)
        try:
            envs.set_state(state["envs"])
            torch.set_rng_state(state["rng"])
            if args.cuda:
                torch.cuda.set_rng_state(state["cuda_rng"])
        except (ValueError, RuntimeError) as error:
            stop(f"{args.resume} is damaged: {error}")
        started = time.perf_counter()
    evaluated, good = 0, not args.resume.endswith(".pt") or Path(args.resume).name == "last.pt"  # last.pt loads
    final_result = gather(final_result, to_all=True)[0]  # all ranks have read the checkpoint; now rank 0 may write
    if final_result:
        say(f"{run_dir} has finished, with {summary(final_result)}: to continue, give more --total-timesteps")
        return
    if rank() == 0:
        writer = ballbot_runs.open_log(args, run_dir, run)
        evaluated = ballbot_runs.trim_metrics(run_dir, global_step)  # steps of the last evaluation
        if best is not None:
            save(run_dir / "best.pt", best)  # it may have got lost
        say(f"{run_dir}: {num_iterations} iterations of {iteration_steps} steps; tensorboard --logdir runs")
    bar, saved = ballbot_runs.Progress(args.total_timesteps), time.perf_counter()
    startup = startup or saved - started

    while iteration < num_iterations:
        iteration += 1
        learning_rate = learning_rate_now(args, 1 - (iteration - 1) / num_iterations)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]

        start, rendering = time.perf_counter(), -envs.render_seconds
        batch, observation, episodes, simulating = rollout(
            envs, agent, args, *observation,
            lambda step: bar.show(global_step + step * args.num_envs * args.frame_skip,  # noqa: B023
                                  elapsed - startup + time.perf_counter() - started, finished),
        )  # fmt: skip
        rendering += envs.render_seconds
        inferring = time.perf_counter() - start - simulating

        values, next_values = batch["values"], batch["next_values"]
        advantages = gae(batch["rewards"], values, next_values, batch["dones"], args.gamma, args.gae_lambda)
        returns = advantages + values
        moments = torch.stack([power.mean() for x in (returns, advantages) for power in (x, x.square())])
        mean, square, error, square_error = average(moments)
        if args.norm_value:
            agent.rescale_values(moments[:2])
        units = {key: (x - agent.value_mean) / agent.value_std for key, x in (("values", values), ("returns", returns))}
        batch = {key: x.flatten(0, 1) for key, x in (batch | units | {"advantages": advantages}).items()}
        losses = update(agent, optimizer, args, batch)
        if not all(map(np.isfinite, losses.values())):
            stop(f"the losses after step {global_step} are not finite: lower --learning-rate or --max-grad-norm; "
                 + f"{run_dir}/last.pt is the policy before " * (iteration > 1) + f"({losses})")  # fmt: skip
        if args.norm_obs:
            agent.update_obs_moments(batch["proprio"])
        spent = time.perf_counter() - start
        training += spent

        global_step += iteration_steps
        # All ranks save a checkpoint when the first one's clock says so
        due = iteration == num_iterations or time.perf_counter() > saved + args.save_interval
        episodes, errors, due = zip(*gather((episodes, int(envs.physics_errors.sum()), due), to_all=True))
        if due[0]:
            state = dict(envs=envs.get_state(), proprio=observation[0], depth=observation[1], rng=torch.get_rng_state(),
                         cuda_rng=torch.cuda.get_rng_state() if args.cuda else None)  # fmt: skip
            states, saved = gather(state), time.perf_counter()
        policy = dict(model=agent.state_dict(), args=asdict(args), global_step=global_step, **script)
        result, is_best = None, False
        if global_step // args.eval_interval > (global_step - iteration_steps) // args.eval_interval:
            result = evaluate(agent, args, args.eval_episodes)
            is_best = best is None or result["episodic_return"] > best["eval"]["episodic_return"]
            best = copy.deepcopy(policy | {"eval": result}) if is_best else best
        if rank() > 0:
            continue

        clock = elapsed + time.perf_counter() - started
        for episodic_return, length, step in sorted(chain(*episodes), key=lambda episode: episode[2]):
            at = global_step - iteration_steps + (step + 1) * args.num_envs * args.frame_skip
            writer.add_scalar("charts/episodic_return", episodic_return, at)
            writer.add_scalar("charts/episodic_length", length, at)
            finished.append((episodic_return, length))
        parts = {"simulate": simulating - rendering, "render": rendering, "infer": inferring}
        parts["learn"] = spent - sum(parts.values())
        scalars = {f"losses/{key}": value for key, value in losses.items()} | {
            "losses/explained_variance": 1 - ((square_error - error**2) / (square - mean**2)).item(),
            "charts/learning_rate": learning_rate,
            "charts/action_std": agent.log_std.exp().mean().item(),
            "charts/SPS": global_step / (clock - startup),
            "SPS/train": global_step / training,
            "charts/physics_errors": sum(errors),
        }
        scalars |= {f"SPS/{key}": iteration_steps / part for key, part in parts.items() if part}
        for key, values in zip(("return", "length"), zip(*finished)):
            scalars[f"charts/episodic_{key}_mean100"] = np.mean(values)
        scalars |= {f"eval/{key}": result[key] for key in ("episodic_return", "episodic_length", "falls") if result}
        for key, value in scalars.items():
            writer.add_scalar(key, value, global_step)
        shares = "/".join(f"{100 * part / spent:.0f}" for part in parts.values())
        bar.show(global_step, clock - startup, finished, f", {'/'.join(parts)} {shares} %")
        if result:
            evaluated = global_step
            say(f"evaluation at {global_step:,} steps: {summary(result)}")
            ballbot_runs.log_evaluation(run_dir, "evaluation", global_step, clock, result)
            if targets_met is None and all(reached(result)):
                targets_met = f"{global_step:,} steps, {int(clock) // 60} min {int(clock) % 60:02} s"
                say(f"targets met after {targets_met}")
            if args.capture_video:
                ballbot_runs.film(Policy(agent, args), run_dir, global_step)
        if is_best:
            save(run_dir / "best.pt", best)
        if due[0]:
            save(run_dir / "last.pt", policy | dict(
                optimizer=optimizer.state_dict(), iteration=iteration, best=best, targets_met=targets_met,
                elapsed=clock, startup=startup, training=training, finished=list(finished), ranks=states,
            ), run_dir / "previous.pt" if good else None)  # fmt: skip
            good = True

    envs.close()
    policy = dict(model=agent.state_dict(), args=asdict(args), global_step=global_step, **script)
    final = copy.deepcopy(policy) | {"eval": evaluate(agent, args, args.final_eval_episodes)}
    say(f"final policy: {summary(final['eval'])}")
    clock = elapsed + time.perf_counter() - started
    ballbot_runs.log_evaluation(run_dir, "final", global_step, clock, final["eval"])
    if rank() == 0 and evaluated < global_step:
        for key in ("episodic_return", "episodic_length", "falls"):
            writer.add_scalar(f"eval/{key}", final["eval"][key], global_step)
        if args.capture_video:
            ballbot_runs.film(Policy(agent, args), run_dir, global_step)
    if best is not None and best["global_step"] < global_step:
        agent.load_state_dict(best["model"])
        best["eval"] = evaluate(agent, args, args.final_eval_episodes)
        say(f"policy of {best['global_step']:,} steps, the best evaluated on the way: {summary(best['eval'])}")
        clock = elapsed + time.perf_counter() - started
        ballbot_runs.log_evaluation(run_dir, "best", best["global_step"], clock, best["eval"])
        if best["eval"]["episodic_return"] > final["eval"]["episodic_return"]:
            final = best
    if rank() == 0:
        save(run_dir / "best.pt", final | {"ended_at": global_step})
        ballbot_runs.close_log(args, writer)
    on_return, on_length = ("reached" if yes else "missed" for yes in reached(final["eval"]))
    say(f"targets, mean over {args.final_eval_episodes} episodes on unseen terrain: return > {TARGET_RETURN} "
        f"{on_return}, length > {TARGET_LENGTH} {on_length} ({run_dir}/best.pt)"
        + (f"; first met after {targets_met}" if targets_met else ""))  # fmt: skip


def main():
    """Train by the command line."""
    ballbot_runs.main(parse, train)


if __name__ == "__main__":
    main()
