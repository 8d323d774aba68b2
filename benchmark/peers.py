"""Compare with the PPO of other libraries: `python -m benchmark.peers --seeds 1 2 3 --steps 8000000`.

Trains Stable-Baselines3's PPO, CleanRL's (`--cleanrl ppo_continuous_action.py`, a downloaded copy) and ours, without
cameras, with equal hyperparameters, networks, initialization, optimizer and learning rates. All are evaluated by
`ppo_ballbot.evaluate`. Each run appends one line to --output; the same command skips runs that the file has. `--draw`
plots the curves and prints a table instead. Each run takes one core.

Differences that remain. Stable-Baselines3:
- VecNormalize normalizes an observation once, by the moments so far. Ours normalizes it again in each gradient step, by
  moments that change after an iteration. Only in "defaults"; "paper" does not normalize.
- The target KL is compared with each minibatch instead of the mean of an epoch. It is 0.3; our runs stay below 0.001.
- --norm-adv divides by the standard deviation with n - 1 instead of n, and --clip-vloss has no maximum with the
  unclipped loss. Both are off here.
CleanRL:
- A truncated episode is a terminated one: its last value is 0.
- The target KL is compared with the last minibatch of an epoch.
"""

import ast
import hashlib
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from scipy import stats
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import ballbot_env
import ppo_ballbot
from ballbot_utils import plot, runs
from ballbot_utils.benchmark import describe_machine
from ballbot_utils.checkpoints import read_checkpoint
from ballbot_utils.common import check_flags, run_program, write
from ballbot_utils.console import check_argument
from ballbot_utils.flags import Count, Seed, format_flags
from ballbot_utils.observations import PROPRIOCEPTION

FOLDER, PEERS = Path(__file__).with_name("peers"), ("ppo_ballbot", "sb3", "cleanrl")
NAMES = dict(zip(PEERS, ("ppo_ballbot.py", "Stable-Baselines3", "CleanRL")))
SETTINGS = {  # flags of ppo_ballbot.py
    "paper": dict(preset="paper", cameras=False),
    "defaults": dict(cameras=False, privileged_critic=False),
}
SPACE = gym.spaces.Box(-np.inf, np.inf, (15,), np.float32)  # of proprioception


@dataclass
class Args:
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1, 2, 3)
    """seeds of the runs"""
    steps: Count = ppo_ballbot.Args.total_timesteps
    """physics steps of a run"""
    settings: tuple[Literal["paper", "defaults"], ...] = tuple(SETTINGS)
    """--preset paper, or the defaults with every option that the others have: no privileged critic"""
    peers: tuple[Literal["ppo_ballbot", "sb3", "cleanrl"], ...] = ()
    """which PPO to train; default: ours, Stable-Baselines3's and, with --cleanrl, CleanRL's"""
    cleanrl: Path | None = None
    """a copy of cleanrl/ppo_continuous_action.py of CleanRL's main branch (tested: fe8d8a03)"""
    eval_interval: Count = ppo_ballbot.Args.eval_interval
    """steps between evaluations"""
    output: Path = FOLDER / "runs.jsonl"
    """file with a line for each run"""
    draw: bool = False
    """draw the curves in --output to curves.png beside it, and print a table"""


def flat(obs: dict[str, np.ndarray]) -> np.ndarray:
    """Proprioception (n, 15) or (15,) of observations."""
    return np.concatenate([obs[key] for key in PROPRIOCEPTION], -1)


def iteration_steps(args: ppo_ballbot.Args) -> int:
    return args.num_envs * args.num_steps * args.frame_skip


class Evaluations:
    """The evaluations of a run, at the steps at which ppo_ballbot.py evaluates; its clock excludes them."""

    def __init__(self, args: ppo_ballbot.Args) -> None:
        self.args, self.entries, self.step = args, [], 0
        self.started, self.evaluating = time.perf_counter(), 0.0

    def after_iteration(self, make_agent: Callable[[], ppo_ballbot.Agent]) -> None:
        args, self.step = self.args, self.step + iteration_steps(self.args)
        is_last = self.step + iteration_steps(args) > args.total_timesteps
        if is_last or self.step // args.eval_interval > (self.step - iteration_steps(args)) // args.eval_interval:
            started = time.perf_counter()
            episodes = args.final_eval_episodes if is_last else args.eval_episodes
            result = ppo_ballbot.evaluate(make_agent(), args, episodes)
            self.evaluating += time.perf_counter() - started
            self.entries.append({"global_step": self.step, "seconds": self.seconds()} | result)
            print(f"{self.step:,} steps, {self.steps_per_second():,.0f} steps/s: {runs.format_evaluation(result)}")

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def steps_per_second(self) -> float:
        return self.step / (self.seconds() - self.evaluating)


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


def train_sb3(args: ppo_ballbot.Args, evaluations: Evaluations) -> None:
    class EvaluatedPPO(PPO):
        def train(self) -> None:
            super().train()
            evaluations.after_iteration(lambda: copy_agent(self, args))

    model = make_sb3(args, EvaluatedPPO)
    num_iterations = args.total_timesteps // iteration_steps(args)
    model.learn(num_iterations * args.num_envs * args.num_steps)
    model.env.close()


# CleanRL


def train_cleanrl(args: ppo_ballbot.Args, evaluations: Evaluations, path: Path) -> None:
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

    class AdamW(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            share = group["lr"]  # of the training that remains: --learning-rate is 1 and annealed
            group["lr"] = ppo_ballbot.learning_rate_at(args, share)
            super().step()
            group["lr"] = share

    class Writer(SimpleNamespace):
        def add_scalar(self, tag, value, step):
            if tag == "charts/SPS":  # the last line of an iteration
                ours["agent"].update_obs_moments(module.b_obs)
                evaluations.after_iteration(lambda: ours["agent"])

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


# Ours


def train_ours(flags: list[str]) -> tuple[list[dict], float]:
    """Evaluations of a run of ppo_ballbot.py, and its steps per second without them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ppo_ballbot.__file__, *flags, "--run-name", "run"]
        subprocess.run(command, cwd=folder, check=True)
        folder = Path(folder) / "runs" / "run"
        content = read_checkpoint(folder / "last.pt")
        entries = {entry["global_step"]: entry for entry in runs.read_metrics(folder) if entry["kind"] != "best"}
    excluded = "start-up", "evaluate", "final evaluation"
    seconds = sum(value for name, value in content["parts"].items() if name not in excluded)
    return list(entries.values()), content["global_step"] / seconds


# Runs, curves and table


def train(peer: str, setting: str, seed: int, args: Args) -> dict[str, Any]:
    """Train; returns the line for --output."""
    flags = SETTINGS[setting] | dict(
        seed=seed, total_timesteps=args.steps, eval_interval=args.eval_interval, num_threads=1
    )
    train_args = replace(ppo_ballbot.Args(), **ppo_ballbot.PRESETS.get(flags.get("preset"), {}) | flags)
    command, started, evaluations = "python ppo_ballbot.py", time.perf_counter(), Evaluations(train_args)
    versions = {name: version(name) for name in ("gymnasium", "numpy")}
    if peer == "ppo_ballbot":
        evaluations.entries, speed = train_ours(shlex.split(format_flags(flags)))
    else:
        command = "python -m benchmark.peers"
        flags = dict(peers=peer, settings=setting, seeds=seed, steps=args.steps, eval_interval=args.eval_interval)
        if peer == "sb3":
            versions["stable_baselines3"] = version("stable_baselines3")
            train_sb3(train_args, evaluations)
        else:
            flags["cleanrl"] = args.cleanrl.name
            versions["cleanrl"] = "SHA-256 " + hashlib.sha256(args.cleanrl.read_bytes()).hexdigest()
            train_cleanrl(train_args, evaluations, args.cleanrl)
        speed = evaluations.steps_per_second()
    return dict(
        peer=peer, setting=setting, seed=seed, steps=args.steps, command=f"{command} {format_flags(flags)}",
        commit=describe_commit(), versions=versions, machine=describe_machine(),
        seconds=time.perf_counter() - started, steps_per_second=speed, evaluations=evaluations.entries,
    )  # fmt: skip


def describe_commit() -> str:
    """The commit, and whether the code differs from it."""
    git = partial(subprocess.check_output, cwd=FOLDER.parent.parent, text=True)
    changed = git(["git", "status", "--porcelain", "--", "*.py"])
    return git(["git", "rev-parse", "--short", "HEAD"]).strip() + " with changes" * bool(changed)


def read_rows(args: Args) -> list[dict[str, Any]]:
    """The runs of --steps in --output."""
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    return [row for row in map(json.loads, lines) if row["steps"] == args.steps]


def select(rows: list[dict[str, Any]], setting: str, peer: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["setting"], row["peer"]) == (setting, peer)]


def draw_figure(rows: list[dict[str, Any]]) -> Figure:
    """Returns of evaluations over steps: the median and the range over seeds."""
    settings = [setting for setting in SETTINGS if any(row["setting"] == setting for row in rows)]
    fig = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    for ax, setting in zip(fig.subplots(1, len(settings), squeeze=False)[0], settings):
        for peer, color, marker in zip(PEERS, plot.COLORS, plot.MARKERS):
            curves = [
                np.array([(e["global_step"], e["seconds"] / 60, e["episodic_return"]) for e in row["evaluations"]]).T
                for row in select(rows, setting, peer)
            ]
            if curves:
                steps, _, values = plot.common_evaluations(curves)
                median, low, high = plot.median_and_band(values)
                label = f"{NAMES[peer]} ({len(curves)} seeds)"
                ax.plot(steps / 1e6, median, color=color, marker=marker, ms=4, label=label)
                ax.fill_between(steps / 1e6, low, high, color=color, alpha=0.18, lw=0)
        ax.set(title=setting, xlabel="million steps", ylabel="return of evaluations")
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    return fig


def format_table(rows: list[dict[str, Any]]) -> str:
    """Final evaluations, means over seeds with 95 % intervals (Student's t; Welch's for the difference)."""
    lines = []
    for setting, peer in product(SETTINGS, PEERS):
        group, ours = select(rows, setting, peer), select(rows, setting, "ppo_ballbot")
        if not group:
            continue
        returns, lengths, falls = (
            [row["evaluations"][-1][key] for row in group] for key in ("episodic_return", "episodic_length", "falls")
        )
        final, difference = f"{np.mean(returns):.1f}", ""
        if len(returns) > 1:
            interval = stats.t.interval(0.95, len(returns) - 1, np.mean(returns), stats.sem(returns))
            final += " [{:.1f}, {:.1f}]".format(*interval)
        if peer != "ppo_ballbot" and min(len(ours), len(returns)) > 1:
            our_returns = [row["evaluations"][-1]["episodic_return"] for row in ours]
            interval = stats.ttest_ind(returns, our_returns, equal_var=False).confidence_interval()
            difference = "{:+.1f} [{:.1f}, {:.1f}]".format(np.mean(returns) - np.mean(our_returns), *interval)
        speed = np.median([row["steps_per_second"] for row in group])
        seeds = ", ".join(str(row["seed"]) for row in group)
        lines.append([setting, NAMES[peer], seeds, final, difference, f"{np.mean(lengths):,.0f}",
                      f"{100 * np.mean(falls):.0f} %", f"{speed:,.0f}"])  # fmt: skip
    head = ["setting", "PPO", "seeds", "final return", "difference from ours", "length", "falls", "steps/s"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))


def main(args: Args) -> None:
    check_flags(args)
    if args.draw:
        rows = read_rows(args)
        check_argument(rows, f"{args.output} has no run of {args.steps:,} steps")
        print(format_table(rows))
        write(args.output.with_name("curves.png"), lambda part: draw_figure(rows).savefig(part, dpi=150))
        return
    torch.set_num_threads(1)
    peers = args.peers or ("ppo_ballbot", "sb3", *["cleanrl"] * bool(args.cleanrl))
    check_argument("cleanrl" not in peers or args.cleanrl, "--peers cleanrl needs --cleanrl: give its file")
    args.output.parent.mkdir(exist_ok=True)
    for seed, setting, peer in product(args.seeds, args.settings, peers):
        if any(row["seed"] == seed for row in select(read_rows(args), setting, peer)):
            print(f"{peer}, {setting}, seed {seed}: done before")
            continue
        print(f"{peer}, {setting}, seed {seed}", flush=True)
        line = json.dumps(train(peer, setting, seed, args)) + "\n"
        with open(args.output, "a") as file:
            file.write(line)


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
