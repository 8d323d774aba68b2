"""The LQR baseline: the regulator drives the robot, and the program prints the results."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ballbot_utils import evaluate, lqr
from ballbot_utils.observations import SCAN

UNSEEN = dict(terrain="perlin", terrain_seed=1_000_000, cameras=False, wheel_damping=0.4, frame_skip=lqr.FRAME_SKIP,
              max_episode_steps=2000)  # fmt: skip


@pytest.mark.slow
def test_it_reaches_both_targets_on_unseen_terrain():
    args = evaluate.Args(checkpoints=(Path("LQR"),), episodes=32, num_threads=1)
    policy = lqr.regulator_factory(*lqr.design_regulator(wheel_damping=0.4), (0.0, 0.6))
    episodes = evaluate.evaluate_policy(policy, args, UNSEEN)
    assert episodes["return"].mean() > 100 and episodes["falls"].sum() == 0
    assert (episodes["length"] == 4000).all()


@pytest.mark.slow
def test_it_follows_a_goal_at_any_heading():
    """At a heading of 0.5 rad (less, by the ball's friction) it drives as far along +y."""
    args = evaluate.Args(checkpoints=(Path("LQR"),), episodes=2, num_threads=1, horizon=2000)
    task = dict(terrain="flat", cameras=False, wheel_damping=0.4, frame_skip=lqr.FRAME_SKIP, max_episode_steps=1000)
    gain, feedforward = lqr.design_regulator(wheel_damping=0.4)
    headings, distances = [], []
    for heading in (0.0, 0.5):
        start = lqr.regulator_factory(gain, feedforward, (0.0, 0.4), heading)

        def recorded_factory(envs, generator, start=start):
            act = start(envs, generator)

            def recorded_act(obs):
                headings.append(lqr.read_state(obs)[0, 2])
                return act(obs)

            return recorded_act

        distances.append(evaluate.evaluate_policy(recorded_factory, args, task)["distance"][0])
    assert headings[999] == pytest.approx(0, abs=0.05) and 0.2 < headings[-1] < 0.5
    assert distances[0] == pytest.approx(distances[1], rel=0.1) and distances[0] > 1.2


@pytest.mark.slow
def test_it_follows_commands():
    args = evaluate.Args(checkpoints=(Path("LQR"),), episodes=16, num_threads=1)
    policy = lqr.regulator_factory(*lqr.design_regulator(wheel_damping=0.4), lambda obs: obs["command"])
    episodes = evaluate.evaluate_policy(policy, args, UNSEEN | {"goal": "command"})
    assert episodes["tracking_error"].mean() < 0.13 and episodes["falls"].sum() == 0  # about 0.24 for standing still


@pytest.mark.slow
def test_it_steers_around_holes():
    """Blind it falls in most episodes: the holes are deeper than its ball's radius."""
    args = evaluate.Args(checkpoints=(Path("LQR"),), episodes=16, num_threads=1)
    regulator, task = lqr.design_regulator(wheel_damping=0.4), UNSEEN | {"terrain": "potholes:depth=0.1"}
    blind = evaluate.evaluate_policy(lqr.regulator_factory(*regulator, (0.0, 0.6)), args, task)
    policy = lqr.regulator_factory(*regulator, lambda obs: lqr.steer_around(obs, 0.6))
    steered = evaluate.evaluate_policy(policy, args, task | {"height_scan": True})
    assert blind["falls"].sum() >= 6 and steered["falls"].sum() <= blind["falls"].sum() / 2


def test_it_steers_to_the_clearer_side():
    hole = np.where(SCAN[:, 0] > 0.05, -0.1, 0.0)  # to the right
    obs = {name: np.zeros((4, 3)) for name in ("orientation", "vel", "angular_vel")}
    obs["heights"] = np.stack([0 * hole, hole, hole[::-1], 0 * hole])
    obs["orientation"][3, 2] = np.pi / 2  # faces -x
    ahead, left, right, turned = lqr.steer_around(obs, 0.5)
    assert ahead.tolist() == [0, 0.5] and left[0] < 0 < right[0] and left[1] == right[1] == 0.5
    np.testing.assert_allclose(turned, [-0.5, 0], atol=1e-12)


def test_an_episode_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    gain, feedforward = 0.1 * rng.normal(size=(3, 10)), rng.normal(size=(3, 2))
    policy = lqr.regulator_factory(gain, feedforward, lambda obs: obs["command"])
    args = evaluate.Args(num_threads=1, horizon=400, seed=7, push=0.5, push_interval=0.1, obs_noise=0.01, episodes=5)
    task = UNSEEN | {"goal": "command"}
    five = evaluate.evaluate_policy(policy, args, task)
    three = evaluate.evaluate_policy(policy, dataclasses.replace(args, episodes=3), task)
    assert len({*five["return"]}) == 5 and all((three[key] == values[:3]).all() for key, values in five.items())


@pytest.mark.slow
def test_unstable_robots_are_rejected():
    with pytest.raises(SystemExit, match="error: the regulator does not keep this robot upright"):
        lqr.steady_actions(np.zeros((3, 10)), wheel_damping=0.4)


def run(*flags, cwd):
    command = [sys.executable, "-m", "ballbot_utils.lqr", *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_program_prints_the_table(tmp_path):
    result = run("--episodes", "2", "--horizon", "300", "--push", "0.2", "--json", "out.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "LQR, 0.6 m/s" in result.stdout and "target: return > 100" in result.stdout
    assert json.loads((tmp_path / "out.json").read_text())[0]["summary"]["episodes"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [(["--speed", "nan"], "--speed is nan"), (["--goal", "command", "--speed", "0.4"], "--speed has no effect"),
     (["--episodes", "0"], "--episodes is 0"), (["--goal", "command", "--steer"], "--steer has no effect"),
     (["--terrain", "moon"], "terrain is 'moon'"), (["--push", "-1"], "--push is -1"),
     (["--terrain", "flat", "--terrain-seed", "3"], "--terrain-seed has no effect on --terrain flat")],
)  # fmt: skip
def test_bad_flags_end_in_one_line(flags, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lqr", *flags])
    monkeypatch.setattr(lqr, "design_regulator", None)  # errors come before any work
    with pytest.raises(SystemExit) as raised:
        lqr.cli()
    assert message in str(raised.value) and len(str(raised.value).splitlines()) == 1
