"""A yardstick that learns nothing: `python -m ballbot_utils.lqr --speed 0.6`.

A linear-quadratic regulator drives the robot along the goal, as a textbook would: a linear model is fitted to random
motion, the discrete-time Riccati equation gives the feedback, and a table shows what it reaches on unseen terrain, in
the manner of `python -m ballbot_utils.evaluate`, whose conditions and disturbances it takes too; those of training are
then the defaults of ppo_ballbot.py. It sees proprioception alone.

State, (n, 8): lean (x, y of the upward direction in the robot's frame), heading (rad), angular velocity (rad/s), and
x and y of the velocity in the robot's frame (m/s). The wheels' speeds follow from these, as the wheels do not slip.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike

from ballbot_utils import evaluate
from ballbot_utils.common import Act, conditions, run_program
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.geometry import in_body_frame
from ballbot_utils.model import TIMESTEP
from ppo_ballbot import Args as TrainArgs

HOLD = 2  # steps that an action is held
# Costs of the state's squares, of those of the integrals of the two velocities' errors, and of the actions'
STATE_COST = np.diag([100, 100, 1, 0.1, 0.1, 0.1, 30, 30, 5, 5.0])
ACTION_COST = 0.05 * np.eye(3)
RAMP = 0.8  # s to reach the speed
ACCELERATION = 0.75  # m/s², at which what is wanted goes to a new command


@dataclass
class Args(evaluate.Figures):
    speed: float = 0.6
    """speed along the goal, m/s"""
    heading: float = 0.0
    """heading to keep while driving, rad, 0 facing the goal"""
    goal: Literal["forward", "command"] = "forward"
    """drive along the goal, or follow the commands that policies of --goal command follow"""


def state_of(obs: dict[str, np.ndarray]) -> np.ndarray:
    """The state (n, 8) of a batch of observations."""
    lean, heading, velocity = in_body_frame(obs["orientation"], obs["vel"])
    return np.concatenate([lean, heading, obs["angular_vel"], velocity[:, :2]], 1)


def turned(vectors: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """`vectors` (n, 2), turned about z by `angle` (n,) in rad."""
    x, y, cos, sin = *vectors.T, np.cos(angle), np.sin(angle)
    return np.stack([cos * x - sin * y, sin * x + cos * y], 1)


def product(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The products (n, rows) of a matrix and `vectors` (n, columns), rounded the same for any n, as NumPy's are not."""
    return (matrix * vectors[:, None]).sum(2)


def fit(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The matrix (outputs, inputs) that maps rows of `inputs` to rows of `outputs` with the least squares of errors."""
    return np.linalg.lstsq(inputs, outputs, rcond=None)[0].T


def identify(wheel_damping: float, num_envs: int = 256, actions: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """A (8, 8) and B (8, 3) of the state after an action is held, by random actions from rest on level ground."""
    envs = gym.make_vec("Ballbot-v0", num_envs=num_envs, terrain="flat", cameras=False, wheel_damping=wheel_damping,
                        frame_skip=HOLD, max_tilt=60.0)  # fmt: skip
    rng, action = np.random.default_rng(0), np.zeros((num_envs, 3))
    obs, _ = envs.reset(seed=0)
    for _ in range(50):  # until it has settled on its ball
        obs, *_ = envs.step(action)
    samples = []
    for _ in range(actions):
        changed = rng.random(num_envs) < 0.2
        action[changed] = rng.uniform(-0.3, 0.3, (changed.sum(), 3))
        before, (obs, *_) = state_of(obs), envs.step(action)
        samples.append(np.concatenate([before, action, state_of(obs)], 1))
    samples = np.concatenate(samples)
    samples = samples[np.linalg.norm(samples[:, :2], axis=1) < 0.1]  # where it is about linear
    samples[:, [2, 13]] -= samples[:, [2]]  # on level ground nothing depends on the heading but the next one
    a, b = np.split(fit(samples[:, :11], samples[:, 11:]), [8], axis=1)
    a[:, 2] = np.eye(8)[2]
    return a, b


def feedback(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The gain (3, 10): action = -gain @ (state, integrals), by iterating the Riccati equation."""
    with_integrals = np.eye(10)
    with_integrals[:8, :8], with_integrals[8:, 6:8] = a, HOLD * TIMESTEP * np.eye(2)
    a, b = with_integrals, np.concatenate([b, np.zeros((2, 3))])
    cost = STATE_COST
    for _ in range(20_000):
        gain = np.linalg.solve(ACTION_COST + b.T @ cost @ b, b.T @ cost @ a)
        before, cost = cost, STATE_COST + a.T @ cost @ (a - b @ gain)
        if np.abs(cost - before).max() < 1e-9 * cost.max():
            return gain
    exit_with_error("the iteration of the Riccati equation did not converge: give another --wheel-damping")


def regulator(
    gain: np.ndarray, feedforward: np.ndarray, goals: ArrayLike | None, heading: float = 0.0
) -> Callable[..., Act]:
    """A policy for `common.play`: drives at velocities `goals`, m/s, (2,) or (n, 2), or by what it is commanded.

    `feedforward` (3, 2) is the action that a steady drive takes, by velocity in the robot's frame.
    """

    def start(envs, generators=None):
        integrals, target, actions = np.zeros((envs.num_envs, 2)), np.zeros((envs.num_envs, 2)), 0

        def act(obs):
            nonlocal integrals, target, actions
            share = min(1, actions * HOLD * TIMESTEP / RAMP)
            actions += 1
            if goals is None:
                change = obs["command"] - target
                distance = np.linalg.norm(change, axis=1, keepdims=True)
                target = target + change * np.minimum(1, ACCELERATION * HOLD * TIMESTEP / np.maximum(distance, 1e-9))
            else:
                target = np.broadcast_to(goals, integrals.shape) * share
            error = state_of(obs)
            wanted = turned(target, -error[:, 2])
            error[:, 2] -= heading * share
            error[:, 6:8] -= wanted
            integrals += error[:, 6:8] * HOLD * TIMESTEP
            return product(feedforward, wanted) - product(gain, np.concatenate([error, integrals], 1))

        return act

    return start


def steady_actions(gain: np.ndarray, wheel_damping: float, num_envs: int = 64) -> np.ndarray:
    """Actions (3, 2) of a steady drive by velocity in the robot's frame, measured on level ground."""
    envs = gym.make_vec("Ballbot-v0", num_envs=num_envs, terrain="flat", cameras=False, wheel_damping=wheel_damping,
                        frame_skip=HOLD)  # fmt: skip
    top = 0.2 / wheel_damping if wheel_damping > 0.3 else 0.6  # m/s, well below what the motors can
    goals = np.random.default_rng(1).uniform(-top, top, (num_envs, 2))
    act = regulator(gain, np.zeros((3, 2)), goals)(envs)
    obs, _ = envs.reset(seed=0)
    samples, upright = [], np.ones(num_envs, bool)
    for step in range(1800):
        action = act(obs)
        if step >= 1500:
            samples.append(np.concatenate([state_of(obs)[:, 6:8], action], 1))
        obs, _, terminations, *_ = envs.step(action)
        upright &= ~terminations
    if upright.sum() < num_envs / 2:  # a fit to the rest, or to none, would mean nothing
        exit_with_error("the regulator does not keep this robot upright: give another --wheel-damping")
    means = np.mean(samples, 0)[upright]
    return fit(means[:, :2], means[:, 2:])


def design(wheel_damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Feedback gain (3, 10) and feedforward (3, 2) for a robot of the given wheel damping, N·m·s/rad."""
    gain = feedback(*identify(wheel_damping))
    return gain, steady_actions(gain, wheel_damping)


def main(args: Args) -> None:
    for name in ("speed", "heading"):
        check_argument(np.isfinite(getattr(args, name)), f"--{name} is {getattr(args, name)}: give a finite number")
    check_argument(
        args.goal == "forward" or args.speed == Args.speed, "--speed means nothing with --goal command: leave it out"
    )
    evaluate.check(args)
    task = conditions(args, replace(TrainArgs(), cameras=False, frame_skip=HOLD, goal=args.goal), "LQR")
    gain, feedforward = design(task["wheel_damping"])
    commanded = args.goal == "command"
    policy = regulator(gain, feedforward, None if commanded else (0.0, args.speed), args.heading)
    label = "LQR, " + ("commanded" if commanded else f"{args.speed:g} m/s")
    label += f", heading {args.heading:g}" if args.heading else ""
    episodes = evaluate.run_episodes(policy, args, task, label)
    evaluate.show(args, [evaluate.column(label, args, task, episodes)])


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
