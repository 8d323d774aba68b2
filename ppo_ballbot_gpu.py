"""PPO for thousands of ballbots on one GPU: `python ppo_ballbot_gpu.py`. It needs requirements-gpu.txt.

Physics, cameras, networks and updates stay on the GPU. The algorithm, networks and flags are those of ppo_ballbot.py,
which evaluates, watches and exports these policies as well. What differs is how: a rollout is made of tensors and never
waits for the GPU, and a gradient step is one CUDA graph (as in LeanRL). With --no-cuda it runs on the CPU, for tests.
"""

import signal
import time

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it without a traceback
STARTED = time.perf_counter()  # run times count from here, imports included

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import torch.distributed as dist
import torch.nn as nn

import ballbot_env
import ppo_ballbot
from ballbot_utils import checkpoints, flags, runs
from ballbot_utils.console import check_argument, exit_with_error, print_rank0
from ballbot_utils.distributed import (
    all_reduce_mean,
    gather_objects,
    init_distributed,
    must_spawn,
    rank,
    spawn_ranks,
    world_size,
)
from ballbot_utils.flags import Count
from ballbot_utils.observations import to_body_frame
from ppo_ballbot import (
    Agent,
    DepthEncoder,
    Policy,
    capture_state,
    explained_variance,
    gae,
    learning_rate_at,
    log_prob,
    task,
)

__all__ = ["Agent", "Args", "DepthEncoder", "Policy"]  # the programs use them

# What suits thousands of robots: few, large batches. The rest is the preset "tuned" of ppo_ballbot.py
LARGE_BATCH = dict(
    num_processes=1, cuda=True, num_envs=2048, num_steps=16, minibatch_size=2048, clip_coef=0.2, learning_rate=2e-3,
    total_timesteps=10_000_000, eval_interval=2_000_000,
)  # fmt: skip
PRESETS = {name: preset | LARGE_BATCH for name, preset in ppo_ballbot.PRESETS.items() if name in ("tuned", "robust")}


@dataclass
class Args(ppo_ballbot.Args):
    exp_name: str = Path(__file__).stem  # name of the experiment; a part of the default run name
    # configuration to start from: tuned is the fastest reliable one, robust is tuned with randomization
    preset: Literal["", *PRESETS] = ""
    cuda: bool = True  # simulate, render and learn on GPUs, one per process; else on the CPU, slowly
    num_envs: Count = 2048  # parallel environments, over all processes
    minibatch_size: Count = 2048  # samples per gradient step, over all processes; must divide num_envs * num_steps


def make_envs(args, num_envs, evaluation=False):
    """`num_envs` environments of the training task, or of the evaluation's, on this rank's device."""
    return gym.make_vec("BallbotWarp-v0", num_envs=num_envs, device=device_of(args), **task(args, evaluation))


def device_of(args):
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.cuda else "cpu"


def proprioception(obs, agent):
    """Proprioception (n, 15 to 19), in the parts that `Agent` names, of a batch of observations."""
    obs = obs | to_body_frame(obs) if agent.body_frame else obs
    return torch.cat([obs[key] for key in agent.keys], 1)


def encode(agent, obs):
    """Depth features (n, 40 or 0) of a batch of observations."""
    if agent.encoder is None:
        return obs["vel"][:, :0]
    return agent.encode(torch.cat([obs["depth_0"], obs["depth_1"]], 1))


@torch.no_grad()
def rollout(envs, agent, args, observation):
    """Act `num_steps` times in every environment, from an `observation`: proprio (envs, 15) and depth (envs, 40).

    Returns what `Learner.update` learns from, a dict of tensors (steps, envs, ...); what `gae` needs; the next
    observation; and of each step the episodes' returns and lengths and where they ended, (steps, envs).
    """
    (proprio, depth), shape, device = observation, (args.num_steps, envs.num_envs), agent.log_std.device
    names = {"proprio": agent.num_proprio, "depth": agent.num_depth, "slopes": agent.num_slopes}
    batch, final = ({name: torch.empty(*shape, width, device=device) for name, width in names.items()} for _ in (0, 1))
    noise = agent.log_std.exp() * torch.randn(*shape, 3, device=device)
    batch["actions"] = torch.empty_like(noise)
    rewards, terminated, dones, returns, lengths = (torch.empty(shape, device=device) for _ in range(5))
    for step in range(args.num_steps):
        batch["proprio"][step], batch["depth"][step] = proprio, depth
        batch["slopes"][step] = envs.slopes()[:, : agent.num_slopes]
        batch["actions"][step] = agent.actor(agent.features(proprio, depth)) + noise[step]
        obs, rewards[step], terminated[step], _, infos = envs.step(batch["actions"][step])
        dones[step], last_obs = infos["_episode"], infos["final_obs"]
        returns[step], lengths[step] = infos["episode"]["r"], infos["episode"]["l"]
        final["proprio"][step], final["depth"][step] = proprioception(last_obs, agent), encode(agent, last_obs)
        final["slopes"][step] = envs.final_slopes[:, : agent.num_slopes]
        proprio, depth = proprioception(obs, agent), encode(agent, obs)

    def values(samples):
        features = agent.features(samples["proprio"], samples["depth"])
        return agent.value(features.flatten(0, 1), samples["slopes"].flatten(0, 1)).view(shape)

    batch |= {"logprobs": log_prob(noise, 0, agent.log_std), "values": values(batch)}
    # Of a truncated episode the last observation has a value, of a terminated one it has not
    transitions = rewards, batch["values"], values(final) * (1 - terminated), dones
    return batch, transitions, (proprio, depth), (returns, lengths, dones)


class Learner:
    """The gradient steps of `ppo_ballbot.update`, each one CUDA graph on a GPU."""

    names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")

    def __init__(self, agent, args):
        self.agent, self.args, self.graph = agent, args, None
        self.parameters = [p for p in agent.parameters() if p.requires_grad]
        lr = torch.tensor(0.0, device=agent.log_std.device)  # a tensor, so that it can change after the capture
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr, eps=1e-5, weight_decay=args.weight_decay, fused=True, capturable=args.cuda
        )

    def state_dict(self):
        """The optimizer's state, with the learning rate as a number."""
        state = self.optimizer.state_dict()
        return state | {"param_groups": [group | {"lr": float(group["lr"])} for group in state["param_groups"]]}

    def load_state_dict(self, state):
        rates = [group["lr"] for group in self.optimizer.param_groups]
        checkpoints.load_optimizer(self.optimizer, state)
        for group, rate in zip(self.optimizer.param_groups, rates):  # a graph reads the tensor
            group["lr"] = rate.fill_(group["lr"])

    def loss(self, mb):
        """The loss of a minibatch, a dict of tensors (samples, ...), and statistics; see `ppo_ballbot.update`."""
        agent, args, advantages = self.agent, self.args, mb["advantages"]
        features = agent.features(mb["proprio"], mb["depth"])
        if args.norm_adv:
            mean, square = all_reduce_mean(torch.stack([advantages.mean(), advantages.square().mean()]))
            advantages = (advantages - mean) / ((square - mean.square()).clamp(min=0).sqrt() + 1e-8)
        logratio = log_prob(mb["actions"], agent.actor(features), agent.log_std) - mb["logprobs"]
        ratio = logratio.exp()
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        pg_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()
        newvalue = agent.value(features, mb["slopes"])
        v_loss = (newvalue - mb["returns"]).square()
        if args.clip_vloss:
            v_clipped = mb["values"] + (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
            v_loss = torch.max(v_loss, (v_clipped - mb["returns"]).square())
        v_loss, entropy = v_loss.mean(), (agent.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        with torch.no_grad():
            clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
            stats = [pg_loss, v_loss, entropy, -logratio.mean(), (ratio - 1 - logratio).mean(), clipfrac]
        return pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss, stats

    def step(self, batch, samples):
        """A gradient step on the samples, indices (samples,), of a batch. Returns statistics (7,)."""
        loss, stats = self.loss({key: value[samples] for key, value in batch.items()})
        self.optimizer.zero_grad()
        loss.backward()
        if dist.is_initialized():
            for p in self.parameters:
                all_reduce_mean(p.grad)
        stats.append(nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm))
        self.optimizer.step()
        return torch.stack([x.detach() for x in stats])

    def capture(self, batch):
        """Capture a gradient step as a CUDA graph; weights and optimizer do not change."""
        saved = [p.detach().clone() for p in self.parameters]
        state = {
            key: [x.clone() if torch.is_tensor(x) else x for x in s.values()] for key, s in self.optimizer.state.items()
        }
        self.batch = {key: value.clone() for key, value in batch.items()}
        self.samples = torch.arange(self.args.minibatch_size // world_size(), device=self.agent.log_std.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(self.batch, self.samples)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):
            self.stats = self.step(self.batch, self.samples)
        with torch.no_grad():
            for p, value in zip(self.parameters, saved):
                p.copy_(value)
            for p, s in self.optimizer.state.items():
                for x, value in zip(s.values(), state.get(p, [0] * len(s))):
                    x.copy_(value) if torch.is_tensor(value) else x.fill_(value)

    def update(self, batch, learning_rate):
        """`update_epochs` passes over this rank's samples, tensors (steps, envs, ...) by name. Returns what it logs."""
        args = self.args
        batch = {key: x.flatten(0, 1) for key, x in batch.items()}
        for group in self.optimizer.param_groups:
            group["lr"].fill_(learning_rate)
        if args.cuda and not dist.is_initialized():
            if self.graph is None:
                self.capture(batch)
            for key, value in batch.items():
                self.batch[key].copy_(value)
        for epoch in range(1, args.update_epochs + 1):
            minibatches = torch.randperm(len(batch["actions"]), device=batch["actions"].device)
            total = torch.zeros(len(self.names), device=batch["actions"].device)
            minibatches = minibatches.view(-1, args.minibatch_size // world_size())
            for samples in minibatches:
                if self.graph is None:
                    total += self.step(batch, samples)
                else:
                    self.samples.copy_(samples)
                    self.graph.replay()
                    total += self.stats
            stats = dict(zip(self.names, all_reduce_mean(total / len(minibatches)).tolist()))
            if stats["approx_kl"] > args.target_kl:
                break
        return stats | {"epochs": epoch}


@torch.no_grad()
def evaluate(envs, agent, args, episodes):
    """Deterministic episodes on the evaluation terrain, shared by the ranks: a dict of their means and deviations."""
    obs, _ = envs.reset(seed=ballbot_env.spawn_seeds(1_000_000, episodes)[rank() * envs.num_envs :][: envs.num_envs])
    results, active = None, torch.ones(envs.num_envs, dtype=torch.bool, device=agent.log_std.device)
    for _ in range(-(-4000 // args.frame_skip)):
        action = agent.actor(agent.features(proprioception(obs, agent), encode(agent, obs)))
        obs, _, terminations, _, infos = envs.step(action)
        now = torch.stack([infos["episode"]["r"], infos["episode"]["l"].float(), terminations.float()])
        results = now.clone() if results is None else torch.where(active, now, results)
        active &= ~infos["_episode"]
        if not (args.cuda or active.any()):  # on a GPU the question takes longer than the steps
            break
    columns = torch.cat([results.cpu() for results in gather_objects(results.cpu())], 1)
    result = {"episodes": columns.shape[1]}
    for name, values in zip(("episodic_return", "episodic_length", "falls"), columns.double()):
        result |= {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}
    return result


def train(args: Args, started: float | None = None) -> Path:
    """Train by `args`; logs and checkpoints go to runs/<run name>. Returns the run's folder."""
    missing = [("--curriculum", args.curriculum), ("--capture-video", args.capture_video),
               ("--no-freeze-encoder", args.cameras and not args.freeze_encoder)]  # fmt: skip
    for flag, given in missing:
        check_argument(not given, f"{flag} needs ppo_ballbot.py: ppo_ballbot_gpu.py does not have it")
    scans = any(pair.startswith("height_scan=") for pair in args.env_kwargs)
    check_argument(not scans, "height_scan needs ppo_ballbot.py: BallbotWarp-v0 has none")
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
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    if args.cuda:
        torch.cuda.set_device(device_of(args))
        torch.set_float32_matmul_precision("high")
    agent = Agent(args).to(device_of(args))
    if agent.encoder is not None:
        agent.encoder.requires_grad_(False)
    learner, envs = Learner(agent, args), make_envs(args, args.num_envs // world_size())
    eval_envs = make_envs(args, -(-args.eval_episodes // world_size()), evaluation=True)
    observation = start(args, run, agent, learner, envs)
    iteration_steps = args.num_envs * args.num_steps * args.frame_skip
    iteration, num_iterations = run.global_step // iteration_steps, args.total_timesteps // iteration_steps
    print_rank0(f"{run.dir}: {num_iterations} iterations of {iteration_steps} steps; tensorboard --logdir runs")

    run.show(0)
    while iteration < num_iterations:
        iteration += 1
        learning_rate = learning_rate_at(args, 1 - (iteration - 1) / num_iterations)
        started = time.perf_counter()
        batch, transitions, observation, episodes = rollout(envs, agent, args, observation)
        advantages = gae(*transitions, args.gamma, args.gae_lambda)
        returns = advantages + batch["values"]
        if args.cuda:
            torch.cuda.synchronize()
        seconds = {"rollout": time.perf_counter() - started}
        losses = learner.update(batch | {"advantages": advantages, "returns": returns}, learning_rate)
        agent.update_obs_moments(batch["proprio"].flatten(0, 1))
        seconds["learn"] = time.perf_counter() - started - seconds["rollout"]

        losses = {f"losses/{key}": value for key, value in losses.items()}
        run.log_iteration(iteration_steps, seconds, last_episodes(*episodes), losses | {
            "losses/explained_variance": explained_variance(returns, advantages),
            "charts/learning_rate": learning_rate,
            "charts/action_std": agent.log_std.exp().mean().item(),
            "charts/physics_errors": sum(gather_objects(int(envs.physics_errors.sum()))),
        })  # fmt: skip
        if run.global_step // args.eval_interval > (run.global_step - iteration_steps) // args.eval_interval:
            run.log_evaluation(agent, evaluate(eval_envs, agent, args, args.eval_episodes))
        if run.save_is_due() or iteration == num_iterations:
            run.save_last(agent, capture_state(agent, learner, envs, observation))

    final_envs = make_envs(args, -(-args.final_eval_episodes // world_size()), evaluation=True)
    run.finish(agent, lambda: evaluate(final_envs, agent, args, args.final_eval_episodes))


def last_episodes(returns, lengths, dones, most=100):
    """The (return, length, step) of the last episodes that ended; arguments are (steps, envs)."""
    steps, ids = (index[-most:] for index in dones.nonzero(as_tuple=True))
    return list(zip(returns[steps, ids].tolist(), lengths[steps, ids].long().tolist(), steps.tolist()))


def start(args, run, agent, learner, envs):
    """Load initial weights or the checkpoint, which `ppo_ballbot.capture_state` makes. Returns the observation."""
    if run.checkpoint is None:
        agent.load_state_dict(run.weights, strict=False)
        torch.manual_seed(args.seed + 1_000_000 * rank())  # each rank has its own noise and minibatches
        seeds = ballbot_env.spawn_seeds(args.seed, args.num_envs)
        obs, _ = envs.reset(seed=seeds[envs.num_envs * rank() :][: envs.num_envs])
        with torch.no_grad():
            return proprioception(obs, agent), encode(agent, obs)
    try:
        agent.load_state_dict(run.checkpoint["model"])
        learner.load_state_dict(run.checkpoint["optimizer"])
        state = run.checkpoint["ranks"][rank()]
        envs.set_state(state["envs"])
        torch.set_rng_state(state["rng"])
        if args.cuda:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return tuple(state[name].to(agent.log_std.device) for name in ("proprio", "depth"))
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        exit_with_error(f"{args.resume} does not fit its flags: {str(error).splitlines()[0]}")


def parse_args():
    """Args from the command line: flags win over --config, which wins over --preset."""
    return flags.parse_args(Args, PRESETS)


def main():
    """Train by the command line."""
    runs.run_training(parse_args, train)


if __name__ == "__main__":
    main()
