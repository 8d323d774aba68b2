"""How well do observations predict the ground's slope? `python -m benchmark.what_cameras_show runs/NAME/last.pt`.

Runs a policy that was trained with cameras on two unseen terrains with hills of the given height. On the first terrain,
ridge regression fits the slope along the goal and across it, under the ball and 0.3 m and 0.6 m ahead: from
proprioception, with the encoder's depth features, and with the frames in 8 x 8 blocks. Prints the explained share of
the slope's variance (R²) on the second terrain.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import ppo_ballbot
from ballbot_utils.common import run_program
from ballbot_utils.console import check_argument


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]
    """a policy that was trained with cameras"""
    terrain_amplitude: float = 0.1
    """height of the hills, m"""


def collect(policy, args: Args, terrain_seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Inputs (samples, width) of each kind, and slopes (samples, 6): every 20th of 1000 actions of 64 robots."""
    agent = policy.agent
    task = dict(terrain_seed=terrain_seed, terrain_amplitude=args.terrain_amplitude, max_episode_steps=4000)
    envs = ppo_ballbot.make_envs(replace(policy.args, randomization={}, **task), 64)
    obs, _ = envs.reset(seed=5)
    proprio, depth, blocks, slopes = [], [], [], []
    for step in range(1000):
        action = policy(obs)
        if step % 20 == 10:
            proprio.append(ppo_ballbot.proprioception(obs, agent).numpy())
            depth.append(policy.depth.numpy() / agent.depth_scale)
            frames = torch.cat([torch.tensor(obs[f"depth_{k}"]) for k in (0, 1)], 1)
            blocks.append(F.avg_pool2d(frames, 8).flatten(1).numpy())
            slopes.append(envs.slopes())
        obs, *_ = envs.step(action)
    proprio, depth, blocks, slopes = map(np.concatenate, (proprio, depth, blocks, slopes))
    return [proprio, np.hstack([proprio, depth]), np.hstack([proprio, blocks])], slopes


def explained_variance(
    inputs: np.ndarray, slopes: np.ndarray, new_inputs: np.ndarray, new_slopes: np.ndarray
) -> np.ndarray:
    """R² (6,) on new data of a ridge regression with squares of the inputs."""
    mean, std = inputs.mean(0), inputs.std(0) + 1e-6
    x, new = (np.clip((x - mean) / std, -5, 5) for x in (inputs, new_inputs))
    x, new = (np.hstack([x, x**2, np.ones((len(x), 1))]) for x in (x, new))
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ slopes)
    return 1 - np.square(new_slopes - new @ weights).mean(0) / new_slopes.var(0)


def main(args: Args) -> None:
    policy = ppo_ballbot.load_policy(args.checkpoint)
    check_argument(
        policy.agent.encoder, f"{args.checkpoint} was trained without cameras: give a policy trained with them"
    )
    (first, slopes), (second, new_slopes) = collect(policy, args, 3_000_000), collect(policy, args, 3_000_001)
    print("R² of the slope along +x and +y:  under the ball   0.3 m ahead    0.6 m ahead")
    for name, x, new in zip(("proprioception", "and depth features", "and frames, 8 x 8"), first, second):
        r2 = explained_variance(x, slopes, new, new_slopes)
        print(f"{name:32}  " + "   ".join(f"{r2[k]:5.2f}, {r2[k + 1]:5.2f}" for k in (0, 2, 4)))
    print(f"standard deviation of the slope: {new_slopes.std():.3f}")


if __name__ == "__main__":
    run_program(main, Args, description=__doc__)
