"""Does the critic bias the policy gradient? `python -m benchmark.critic_bias runs/NAME/last.pt`.

Runs the policy, with action noise, in 64 training environments for 1,500 actions. Prints the derivative of the
advantage with respect to a constant added to all actions (in standard deviations of the noise) that drives forward
(wheels 1 and 2 in opposite directions): with the advantages of `tuned`, with longer ones, and with discounted returns
(Monte Carlo), without bias from the critic. Means over the first 900 actions ± standard errors over environments.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import ppo_ballbot
from ballbot_utils.common import run_program

ACTIONS, USED_ACTIONS = 1500, 900


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]
    """a checkpoint (.pt file), or the folder of a run, for its best.pt"""


def main(flags: Args) -> None:
    policy = ppo_ballbot.load_policy(flags.checkpoint)
    agent, args = policy.agent, policy.args
    torch.manual_seed(0)
    envs = ppo_ballbot.make_envs(args, 64)
    observation = ppo_ballbot.proprioception(envs.reset(seed=11)[0], agent)
    observation = observation, ppo_ballbot.depth_features(envs, agent, torch.zeros(64, agent.num_depth))
    for args.num_steps in (300, ACTIONS):  # the first ones accelerate the robot
        batch, transitions, observation, episodes, _ = ppo_ballbot.rollout(envs, agent, args, observation)
    with torch.no_grad():
        features = agent.features(batch["proprio"], batch["depth"]).flatten(0, 1)
        noise = (batch["actions"] - agent.actor(features).view(ACTIONS, 64, 3)) / agent.log_std.exp()
    drive = (noise[:USED_ACTIONS, :, 2] - noise[:USED_ACTIONS, :, 1]) / 2**0.5
    returns = ppo_ballbot.gae(*transitions, args.gamma, 1.0) + batch["values"]
    length = sum(episode[1] for episode in episodes) / max(1, len(episodes))
    print(f"{flags.checkpoint}: {len(episodes)} episodes ended, of {length:.0f} "
          f"steps; values {(batch['values'] - returns)[:USED_ACTIONS].mean():+.2f} off returns")  # fmt: skip
    for name, steps, gae_lambda in (("32 actions, lambda 0.96", 32, 0.96), ("64 actions, lambda 0.98", 64, 0.98),
                                    ("lambda 0.99", ACTIONS, 0.99), ("Monte Carlo", ACTIONS, 1.0)):  # fmt: skip
        parts = zip(*(x.split(steps) for x in transitions))
        advantages = torch.cat([ppo_ballbot.gae(*part, args.gamma, gae_lambda) for part in parts])[:USED_ACTIONS]
        gradients = ((advantages - advantages.mean()) * drive).mean(0)
        print(f"{name:<24} {gradients.mean():+.4f} ± {gradients.std() / 8:.4f}")


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
