"""Draws the pictures of the book: `MUJOCO_GL=osmesa python docs/make_pictures.py`. It needs requirements-dev.txt."""

import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "img"
sys.path.insert(0, str(ROOT))

import ppo_ballbot

POLICY = ROOT / "benchmark" / "tuned__1.pt"
BLUE, RED, GREY = "#2a6fbb", "#c0392b", "#e8ecf1"


def save(figure, name):
    figure.savefig(IMAGES / name, dpi=100, facecolor="white")


def cameras():
    """The robot on a slope, and its two depth frames."""
    policy = ppo_ballbot.load_policy(POLICY)
    env = gym.make("Ballbot-v0", frame_skip=policy.args.frame_skip, render_mode="rgb_array", terrain_seed=1_000_000)
    obs, _ = env.reset(seed=3)
    for _ in range(500):
        obs, *_ = env.step(policy(obs))
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    scene, left, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    scene.imshow(env.render())
    scene.set(title="the robot", xticks=[], yticks=[])
    for axis, key, name in ((left, "depth_1", "left camera: depth_1"), (right, "depth_0", "right camera: depth_0")):
        image = axis.imshow(obs[key][0], vmin=0.05, vmax=0.5, cmap="viridis_r")
        axis.set(title=name, xlabel="column", ylabel="row" if axis is left else "")
    figure.colorbar(image, ax=[left, right], label="depth (m)")
    save(figure, "cameras.png")


def frame_skip():
    """Action noise with one action per physics step, and per four."""
    steps, rng = 60, np.random.default_rng(4)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    time = 2 * np.arange(steps + 1)  # ms
    for (upper, lower), skip, color in zip(axes.T, (1, 4), (RED, BLUE)):
        samples = rng.normal(0, 0.6, (400, -(-steps // skip))).repeat(skip, 1)[:, :steps]
        upper.stairs(samples[0], time, color=color, baseline=None)
        upper.set(title=f"--frame-skip {skip}: a new action every {2 * skip} ms", ylim=(-2, 2))
        angular_momentum = np.cumsum(np.pad(-10 * samples.clip(-1, 1), ((0, 0), (1, 0))), 1) * 0.002  # N·m·s
        lower.plot(time, angular_momentum[:12].T, color=color, alpha=0.2, lw=0.7)
        for sign in (-1, 1):
            lower.plot(time, sign * angular_momentum.std(0), color="black", lw=1.5)
        lower.set(xlabel="time (ms)")
    axes[0, 0].set_ylabel("action of a motor")
    axes[1, 0].set_ylabel("its torque's effect\n(N·m·s; black: std)")
    save(figure, "frame_skip.png")


def network():
    """The networks of the preset "tuned", with the sizes of its layers."""
    args = ppo_ballbot.Args(**ppo_ballbot.PRESETS["tuned"])
    agent = ppo_ballbot.Agent(args)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 10), ylim=(0, 3.6))
    axis.axis("off")

    def box(x, y, width, text, color=GREY):
        axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=9, zorder=2)
        axis.add_patch(
            matplotlib.patches.FancyBboxPatch((x, y - 0.27), width, 0.54, "round,pad=0.03", fc=color, ec="0.4")
        )

    def arrow(x, y, x2, y2):
        axis.annotate("", (x2, y2), (x, y), arrowprops=dict(arrowstyle="->", color="0.3"))

    layers = f"{args.pi_layers} layers of {args.hidden_size}, LeakyReLU"
    box(0.1, 3.0, 1.9, "2 depth frames\n1 × 64 × 64")
    box(2.6, 3.0, 1.9, "encoder (frozen)\n2 conv, 1 linear, tanh", "#d5e8d4")
    box(0.1, 1.8, 1.9, f"proprioception\n{agent.num_proprio} values")
    box(2.6, 1.8, 1.9, "normalize by running\nmean and variance", "#d5e8d4")
    box(0.1, 0.6, 1.9, f"slopes of the ground\n{agent.num_slopes} values (training only)")
    box(5.4, 2.4, 2.3, f"actor\n{layers}", "#dae8fc")
    box(5.4, 0.9, 2.3, f"critic (training only)\n{layers}", "#f8cecc")
    box(8.3, 2.4, 1.6, "mean of 3 actions\n+ learned std")
    box(8.3, 0.9, 1.6, "value")
    for start in ((2.05, 3.0, 2.55, 3.0), (2.05, 1.8, 2.55, 1.8), (7.75, 2.4, 8.25, 2.4), (7.75, 0.9, 8.25, 0.9),
                  (4.55, 3.0, 5.35, 2.5), (4.55, 1.8, 5.35, 2.3), (4.55, 2.8, 5.35, 1.1), (4.55, 1.65, 5.35, 0.95),
                  (2.05, 0.6, 5.35, 0.8)):  # fmt: skip
        arrow(*start)
    axis.text(4.62, 3.08, f"{agent.num_depth} features", fontsize=8)
    save(figure, "network.png")


def rollout():
    """Values of two robots: the first episode of one is truncated; the other, which is pushed, terminates."""
    policy, model = ppo_ballbot.load_policy(POLICY), torch.load(POLICY, weights_only=True)["model"]
    args = replace(policy.args, num_envs=2, num_steps=110, max_episode_steps=240, randomization={}, num_threads=1)
    agent = policy.agent
    torch.manual_seed(1)
    envs = ppo_ballbot.make_envs(args, 2)
    obs, _ = envs.reset(seed=[1, 2])
    envs.apply_force([[0, 0, 0], [0, 14, 0]])
    depth = ppo_ballbot.depth_features(envs, agent, torch.zeros(2, agent.num_depth))
    observation = ppo_ballbot.proprioception(obs, agent), depth
    _, (_, values, next_values, dones), *_ = ppo_ballbot.rollout(envs, agent, args, observation)
    values = values * model["value_std"] + model["value_mean"]  # its version normalized them
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for i, axis in enumerate(figure.subplots(1, 2, sharey=True)):
        end, *more = dones[:, i].nonzero()[:, 0].tolist()
        truncated = bool(next_values[end, i])
        final = next_values[end, i] * model["value_std"] + model["value_mean"] if truncated else 0
        second = range(end + 1, (more[0] + 1) if more else args.num_steps)
        axis.plot(range(end + 1), values[: end + 1, i], color=BLUE, label="value of the observation")
        axis.plot(second, values[list(second), i], color=BLUE, alpha=0.4, label="next episode, after the reset")
        axis.plot(end + 1, final, "o", color=RED, label="next value of the last action")
        axis.axvline(end + 0.5, color="0.6", ls=":")
        title = "truncated: the value of the final observation" if truncated else "terminated: the next value is 0"
        axis.set(title=title, xlabel="action of the rollout")
        axis.grid(alpha=0.3)
        if i == 0:
            axis.legend(fontsize=8, loc="center right")
    figure.axes[0].set_ylabel("value (discounted return)")
    save(figure, "rollout.png")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for draw in (cameras, frame_skip, network, rollout):
        draw()
