"""A baseline without learning: `python -m ballbot_utils.lqr --speed 0.6`.

A linear-quadratic regulator drives the robot along the goal. A linear model is fitted to random motion, the
discrete-time Riccati equation gives the feedback, and the table of `python -m ballbot_utils.evaluate` shows the results
on unseen terrain. Its settings and disturbances are flags here too, with the defaults of ppo_ballbot.py's training. The
regulator observes proprioception only. With --steer it also observes the true heights of the ground ahead, and goes
around what is too high or too deep: the most that sight can give to a simple controller.

The state (n, 8) consists of the lean (x, y of the upward direction in the robot's frame), the heading (rad), the
angular velocity (rad/s), and x and y of the velocity in the robot's frame (m/s). The wheels do not slip: their speeds
follow from these.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike

from ballbot_utils import evaluate
from ballbot_utils.common import PolicyFactory, eval_task, require_packages, run_program
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.geometry import in_body_frame
from ballbot_utils.model import TIMESTEP
from ballbot_utils.observations import SCAN
from ppo_ballbot import Args as TrainArgs

FRAME_SKIP = 2  # steps per action
PERIOD = FRAME_SKIP * TIMESTEP  # s
# Costs of the squares of the state and of the integrals of the two velocities' errors, and of the squared actions
STATE_COST = np.diag([100, 100, 1, 0.1, 0.1, 0.1, 30, 30, 5, 5.0])
ACTION_COST = 0.05 * np.eye(3)
RAMP = 0.8  # s to reach the speed
ACCELERATION = 0.75  # m/s², of the target velocity after a command changes
# With --steer
OBSTACLE = 0.02  # m, a point so much higher or lower than the ground under the ball is one
CLEARANCE = 0.15  # m, to either side of the way


@dataclass
class Args(evaluate.EvalArgs):
    speed: float = 0.6
    """speed along the goal, m/s"""
    heading: float = 0.0
    """heading to keep while driving, rad; 0 faces the goal"""
    goal: Literal["forward", "command"] = "forward"
    """drive along the goal, or follow the commands that policies of --goal command follow"""
    steer: bool = False
    """go around obstacles, by the true heights ahead"""


def read_state(obs: dict[str, np.ndarray]) -> np.ndarray:
    """The state (n, 8) of a batch of observations."""
    lean, heading, velocity = in_body_frame(obs["orientation"], obs["vel"])
    return np.concatenate([lean, heading, obs["angular_vel"], velocity[:, :2]], 1)


def rotate(vectors: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """`vectors` (n, 2), rotated about z by `angle` (n,), rad."""
    x, y, cos, sin = *vectors.T, np.cos(angle), np.sin(angle)
    return np.stack([cos * x - sin * y, sin * x + cos * y], 1)


def multiply(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Products (n, rows) of a matrix and `vectors` (n, columns). Unlike NumPy's `@`, rounding does not depend on n."""
    return (matrix * vectors[:, None]).sum(2)


def fit(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The matrix (outputs, inputs) from rows of `inputs` to rows of `outputs`, by least squares."""
    return np.linalg.lstsq(inputs, outputs, rcond=None)[0].T


def identify_model(wheel_damping: float, num_envs: int = 256, actions: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """A (8, 8) and B (8, 3) of the state after an action, fitted to random actions from rest on level ground."""
    envs = gym.make_vec("Ballbot-v0", num_envs=num_envs, terrain="flat", cameras=False, wheel_damping=wheel_damping,
                        frame_skip=FRAME_SKIP, max_tilt=60.0)  # fmt: skip
    rng, action = np.random.default_rng(0), np.zeros((num_envs, 3))
    obs, _ = envs.reset(seed=0)
    for _ in range(50):  # the robot settles on its ball
        obs, *_ = envs.step(action)
    samples = []
    for _ in range(actions):
        changed = rng.random(num_envs) < 0.2
        action[changed] = rng.uniform(-0.3, 0.3, (changed.sum(), 3))
        before, (obs, *_) = read_state(obs), envs.step(action)
        samples.append(np.concatenate([before, action, read_state(obs)], 1))
    samples = np.concatenate(samples)
    samples = samples[np.linalg.norm(samples[:, :2], axis=1) < 0.1]  # nearly linear
    samples[:, [2, 13]] -= samples[:, [2]]  # on level ground only the next heading depends on it
    a, b = np.split(fit(samples[:, :11], samples[:, 11:]), [8], axis=1)
    a[:, 2] = np.eye(8)[2]
    return a, b


def solve_feedback(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The gain (3, 10) of `identify_model`'s A and B: action = -gain @ (state, integrals)."""
    from scipy.linalg import solve_discrete_are

    with_integrals = np.eye(10)
    with_integrals[:8, :8], with_integrals[8:, 6:8] = a, PERIOD * np.eye(2)
    a, b = with_integrals, np.concatenate([b, np.zeros((2, 3))])
    cost = solve_discrete_are(a, b, STATE_COST, ACTION_COST)
    return np.linalg.solve(ACTION_COST + b.T @ cost @ b, b.T @ cost @ a)


def steer_around(obs: dict[str, np.ndarray], speed: float) -> np.ndarray:
    """Velocities (n, 2), m/s, towards the clearest way by the heights ahead."""
    right, ahead = SCAN.T
    obstacles = (np.abs(obs["heights"]) > OBSTACLE) * (0.7 - ahead)  # near ones count more
    ways = np.unique(right)
    # With as many obstacles on several ways, the one nearest to the middle
    cost = np.stack([obstacles[:, np.abs(right - way) < CLEARANCE].sum(1) + 0.3 * abs(way) for way in ways], 1)
    way = np.stack([2 * ways[cost.argmin(1)], np.full(len(cost), speed)], 1)
    return rotate(way, read_state(obs)[:, 2])


def regulator_factory(
    gain: np.ndarray,
    feedforward: np.ndarray,
    goals: ArrayLike | Callable[[dict[str, np.ndarray]], np.ndarray],
    heading: float = 0.0,
) -> PolicyFactory:
    """A policy for `common.step_policy`: drives at velocities `goals`, m/s, (2,) or (n, 2), or a function of the
    observations that returns them.

    `feedforward` (3, 2) maps the velocity in the robot's frame to the action of a steady drive.
    """

    def make_act(envs, generators=None):
        integrals, target, actions = np.zeros((envs.num_envs, 2)), np.zeros((envs.num_envs, 2)), 0

        def act(obs):
            nonlocal integrals, target, actions
            ramp = min(1, actions * PERIOD / RAMP)
            actions += 1
            if callable(goals):
                change = goals(obs) - target
                distance = np.linalg.norm(change, axis=1, keepdims=True)
                target = target + change * np.minimum(1, ACCELERATION * PERIOD / np.maximum(distance, 1e-9))
            else:
                target = np.broadcast_to(goals, integrals.shape) * ramp
            error = read_state(obs)
            velocity = rotate(target, -error[:, 2])
            error[:, 2] -= heading * ramp
            error[:, 6:8] -= velocity
            integrals += error[:, 6:8] * PERIOD
            return multiply(feedforward, velocity) - multiply(gain, np.concatenate([error, integrals], 1))

        return act

    return make_act


def steady_actions(gain: np.ndarray, wheel_damping: float, num_envs: int = 64) -> np.ndarray:
    """Actions (3, 2) of a steady drive per velocity in the robot's frame, measured on level ground."""
    envs = gym.make_vec("Ballbot-v0", num_envs=num_envs, terrain="flat", cameras=False, wheel_damping=wheel_damping,
                        frame_skip=FRAME_SKIP)  # fmt: skip
    top = 0.2 / wheel_damping if wheel_damping > 0.3 else 0.6  # m/s, well below the motors' limit
    goals = np.random.default_rng(1).uniform(-top, top, (num_envs, 2))
    act = regulator_factory(gain, np.zeros((3, 2)), goals)(envs)
    obs, _ = envs.reset(seed=0)
    samples, upright = [], np.ones(num_envs, bool)
    for step in range(1800):
        action = act(obs)
        if step >= 1500:
            samples.append(np.concatenate([read_state(obs)[:, 6:8], action], 1))
        obs, _, terminations, *_ = envs.step(action)
        upright &= ~terminations
    if upright.sum() < num_envs / 2:
        exit_with_error("the regulator does not keep this robot upright: give another --wheel-damping")
    means = np.mean(samples, 0)[upright]
    return fit(means[:, :2], means[:, 2:])


def design_regulator(wheel_damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Feedback gain (3, 10) and feedforward (3, 2) for a robot of the given wheel damping, N·m·s/rad."""
    gain = solve_feedback(*identify_model(wheel_damping))
    return gain, steady_actions(gain, wheel_damping)


def main(args: Args) -> None:
    require_packages("the regulator", "scipy", requirements="requirements-dev.txt")
    commanded = args.goal == "command"
    check_argument(not commanded or args.speed == Args.speed, "--speed has no effect with --goal command: leave it out")
    evaluate.check_args(args)
    check_argument(not args.steer or not commanded, "--steer has no effect with --goal command: leave it out")
    check_argument(not args.steer or not args.heading, "--steer needs --heading 0: it sees the ground ahead only")
    env_kwargs = ("height_scan=True",) * args.steer
    settings = replace(TrainArgs(), cameras=False, frame_skip=FRAME_SKIP, goal=args.goal, env_kwargs=env_kwargs)
    task = eval_task(args, settings, "LQR")
    gain, feedforward = design_regulator(task["wheel_damping"])
    goals = (0.0, args.speed)
    if commanded:
        goals = lambda obs: obs["command"]  # noqa: E731
    elif args.steer:
        goals = lambda obs: steer_around(obs, args.speed)  # noqa: E731
    policy = regulator_factory(gain, feedforward, goals, args.heading)
    label = "LQR, " + ("commands" if commanded else f"{args.speed:g} m/s") + ", steers" * args.steer
    label += f", heading {args.heading:g}" if args.heading else ""
    episodes = evaluate.evaluate_policy(policy, args, task, label)
    evaluate.print_results(args, [evaluate.make_column(label, args, task, episodes)])


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
