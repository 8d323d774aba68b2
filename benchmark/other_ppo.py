"""Train with the PPO of another library: `python -m benchmark.other_ppo LIBRARY FLAGS`.

LIBRARY is sb3, for Stable-Baselines3's, or a copy of CleanRL's cleanrl/ppo_continuous_action.py (tested: fe8d8a03).
FLAGS are those of ppo_ballbot.py, with --no-cameras --no-privileged-critic. Environments, networks, initialization,
optimizer, learning rates and evaluations are ours, and so is the run's folder. A run cannot be resumed.

Differences that remain. Stable-Baselines3:
- VecNormalize normalizes an observation once, by the moments so far. Ours normalizes it again in each gradient step, by
  moments that change after an iteration. `--preset paper` does not normalize.
- The target KL is compared with each minibatch instead of the mean of an epoch.
- --norm-adv divides by the standard deviation with n - 1 instead of n, and --clip-vloss has no maximum with the
  unclipped loss.
CleanRL:
- A truncated episode is a terminated one: its last value is 0.
- The target KL is compared with the last minibatch of an epoch.
"""

import ast
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import ballbot_env
import ppo_ballbot
from ballbot_utils.console import check_argument
from ballbot_utils.observations import PROPRIOCEPTION
from ballbot_utils.runs import Run, prepare_run, run_training

SPACE = gym.spaces.Box(-np.inf, np.inf, (15,), np.float32)  # of proprioception


def flat(obs: dict[str, np.ndarray]) -> np.ndarray:
    """Proprioception (n, 15) or (15,) of observations."""
    return np.concatenate([obs[key] for key in PROPRIOCEPTION], -1)


def iteration_steps(args: ppo_ballbot.Args) -> int:
    return args.num_envs * args.num_steps * args.frame_skip


class Log:
    """Logs and evaluates a run after each iteration, as ppo_ballbot.py does."""

    def __init__(self, args: ppo_ballbot.Args, run: Run) -> None:
        self.args, self.run, self.started = args, run, time.perf_counter()
        run.show(0)  # the start-up ends

    def after_iteration(self, make_agent: Callable[[], ppo_ballbot.Agent], losses: dict[str, float]) -> None:
        args, run, steps = self.args, self.run, iteration_steps(self.args)
        run.log_iteration(steps, {"train": time.perf_counter() - self.started}, [], losses)
        if run.global_step // args.eval_interval > (run.global_step - steps) // args.eval_interval:
            run.log_evaluation(agent := make_agent(), ppo_ballbot.evaluate(agent, args, args.eval_episodes))
        if run.global_step + steps > args.total_timesteps:
            run.save_last(agent := make_agent(), {})
            run.finish(agent, lambda: ppo_ballbot.evaluate(agent, args, args.final_eval_episodes))
        self.started = time.perf_counter()


# Stable-Baselines3


class Sb3Envs(VecEnv):
    """A BallbotVectorEnv as Stable-Baselines3's VecEnv, which observes proprioception."""

    def __init__(self, envs: ballbot_env.BallbotVectorEnv) -> None:
        self.envs = envs
        super().__init__(envs.num_envs, SPACE, envs.single_action_space)

    def seed(self, seed: int | None = None) -> list[int]:
        self._seeds = ballbot_env.spawn_seeds(seed, self.num_envs)  # as ppo_ballbot.py does
        return self._seeds

    def reset(self) -> np.ndarray:
        return flat(self.envs.reset(seed=self._seeds)[0])

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        obs, rewards, terminations, truncations, infos = self.envs.step(self.actions)
        ended, results = terminations | truncations, [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(ended):
            results[i]["terminal_observation"] = flat(infos["final_obs"][i])
            results[i]["TimeLimit.truncated"] = not terminations[i]
        return flat(obs), rewards, ended, results

    def get_attr(self, name: str, indices: Any = None) -> list:
        return [getattr(self.envs, name)] * self.num_envs

    def close(self) -> None:
        self.envs.close()

    def set_attr(self, *args: Any) -> None:
        raise NotImplementedError

    env_method = env_is_wrapped = set_attr


def make_sb3(args: ppo_ballbot.Args, cls: type[PPO] = PPO) -> PPO:
    """Stable-Baselines3's PPO on the environments of `args`, with our hyperparameters."""
    envs = Sb3Envs(ppo_ballbot.make_envs(args, args.num_envs))
    if args.norm_obs:
        envs = VecNormalize(envs, norm_reward=False, clip_obs=np.inf)
    one_iteration = 1 / (args.total_timesteps // iteration_steps(args))  # its progress counts the present iteration
    return cls(
        "MlpPolicy", envs, seed=args.seed, device="cpu",
        learning_rate=lambda remaining: ppo_ballbot.learning_rate_at(args, remaining + one_iteration),
        n_steps=args.num_steps, batch_size=args.minibatch_size, n_epochs=args.update_epochs, gamma=args.gamma,
        gae_lambda=args.gae_lambda, clip_range=args.clip_coef, normalize_advantage=args.norm_adv,
        clip_range_vf=args.clip_coef if args.clip_vloss else None, ent_coef=args.ent_coef, vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm, target_kl=args.target_kl / 1.5,  # it stops at 1.5 times its target
        policy_kwargs=dict(
            net_arch=dict(pi=[args.hidden_size] * args.pi_layers, vf=[args.hidden_size] * args.vf_layers),
            activation_fn=torch.nn.LeakyReLU, log_std_init=args.init_log_std,  # it initializes weights as ours
            optimizer_class=torch.optim.AdamW, optimizer_kwargs=dict(eps=1e-5, weight_decay=args.weight_decay),
        ),
    )  # fmt: skip


def parameter_pairs(model: PPO, agent: ppo_ballbot.Agent) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Parameters of Stable-Baselines3's policy and of ours; our weights are transposed."""
    extractor = model.policy.mlp_extractor
    layers = extractor.policy_net, model.policy.action_net, extractor.value_net, model.policy.value_net
    theirs = [model.policy.log_std, *(p for layer in layers for p in layer.parameters())]
    return list(zip(theirs, [agent.log_std, *agent.actor.parameters(), *agent.critic.parameters()], strict=True))


@torch.no_grad()
def copy_agent(model: PPO, args: ppo_ballbot.Args) -> ppo_ballbot.Agent:
    """Our agent with the weights and the normalization of Stable-Baselines3's."""
    agent, normalize = ppo_ballbot.Agent(args), model.get_vec_normalize_env()
    for theirs, ours in parameter_pairs(model, agent):
        ours.copy_(theirs.movedim(0, -1))
    if normalize is not None:
        agent.obs_mean.copy_(torch.from_numpy(normalize.obs_rms.mean))
        agent.obs_var.copy_(torch.from_numpy(normalize.obs_rms.var))
    return agent


def train_sb3(args: ppo_ballbot.Args, run: Run) -> None:
    class LoggedPPO(PPO):
        def train(self) -> None:
            super().train()
            logged = self.logger.name_to_value
            losses = {"losses/approx_kl": logged["train/approx_kl"], "losses/clipfrac": logged["train/clip_fraction"]}
            log.after_iteration(lambda: copy_agent(self, args), losses)

    model, log = make_sb3(args, LoggedPPO), Log(args, run)
    model.learn(args.total_timesteps // iteration_steps(args) * args.num_envs * args.num_steps)
    model.env.close()


# CleanRL


def train_cleanrl(path: Path, args: ppo_ballbot.Args, run: Run) -> None:
    """Run CleanRL's script: its rollouts, advantages and updates, with our networks, optimizer and environments."""
    spec = importlib.util.spec_from_file_location("cleanrl_ppo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # its definitions
    ours = {}

    class Features(torch.nn.Module):
        def forward(self, x):
            return ours["agent"].features(x, x[:, :0])

    class Agent(module.Agent):
        def __init__(self, envs):
            super().__init__(envs)
            agent = ours["agent"] = ppo_ballbot.Agent(args)
            self.actor_mean = torch.nn.Sequential(Features(), agent.actor)
            self.critic = torch.nn.Sequential(Features(), agent.critic)
            agent.log_std = self.actor_logstd = torch.nn.Parameter(agent.log_std.detach()[None])
            ours["log"] = Log(args, run)

    class AdamW(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            share = group["lr"]  # of the training that remains: --learning-rate is 1 and annealed
            group["lr"] = ppo_ballbot.learning_rate_at(args, share)
            super().step()
            group["lr"] = share

    class Writer(SimpleNamespace):
        losses = {}

        def add_scalar(self, tag, value, step):
            if tag in ("losses/approx_kl", "losses/clipfrac"):
                self.losses[tag] = value
            if tag == "charts/SPS":  # the last line of an iteration
                ours["agent"].update_obs_moments(module.b_obs)
                ours["log"].after_iteration(lambda: ours["agent"], self.losses)

    envs, names = ppo_ballbot.make_envs(args, args.num_envs), dict(single_observation_space=SPACE)
    names |= dict(single_action_space=envs.single_action_space, close=envs.close)
    names["reset"] = lambda seed: (flat(envs.reset(seed=ballbot_env.spawn_seeds(seed, args.num_envs))[0]), {})
    names["step"] = lambda actions: (flat((result := envs.step(actions))[0]), *result[1:4], {})
    vector = SimpleNamespace(
        SyncVectorEnv=lambda *_, **__: SimpleNamespace(**names), AutoresetMode=gym.vector.AutoresetMode
    )
    same = "seed", "num_envs", "num_steps", "gamma", "gae_lambda", "update_epochs", "norm_adv", "clip_coef"
    same += "clip_vloss", "ent_coef", "max_grad_norm", "target_kl"
    flags = {name: getattr(args, name) for name in same} | dict(
        cuda=False, total_timesteps=args.total_timesteps // args.frame_skip, learning_rate=1.0, anneal_lr=True,
        num_minibatches=args.num_envs * args.num_steps // args.minibatch_size, vf_coef=2 * args.vf_coef,
    )  # fmt: skip
    vars(module).update(
        Agent=Agent, optim=SimpleNamespace(Adam=partial(AdamW, weight_decay=args.weight_decay)), print=lambda *_: None,
        gym=SimpleNamespace(vector=vector, spaces=gym.spaces), tyro=SimpleNamespace(cli=lambda cls: cls(**flags)),
        SummaryWriter=lambda folder: Writer(add_text=lambda *_: None, close=lambda: None),
    )  # fmt: skip
    main = ast.parse(path.read_text()).body[-1]  # if __name__ == "__main__":
    exec(compile(ast.Module(main.body, []), path, "exec"), vars(module))


def train(library: str, args: ppo_ballbot.Args) -> None:
    """Train with a library's PPO; `args` is completed as by ppo_ballbot.py."""
    check_argument(not (args.cameras or args.privileged_critic), "give --no-cameras and --no-privileged-critic")
    run = prepare_run(args, time.perf_counter(), in_rank=False)
    torch.set_num_threads(args.torch_threads)
    with run.open():
        train_sb3(args, run) if library == "sb3" else train_cleanrl(Path(library), args, run)


if __name__ == "__main__":
    check_argument(len(sys.argv) > 1, "give sb3, or a copy of CleanRL's ppo_continuous_action.py, and flags")
    run_training(ppo_ballbot.parse_args, partial(train, sys.argv.pop(1)))
