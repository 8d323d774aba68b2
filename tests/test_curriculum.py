"""The curriculum: levels rise with success, fall with failure, and set the height of the ground and of pushes."""

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_env import assert_same, random_actions

import ppo_ballbot as ppo
import ppo_ballbot_gpu as gpu
import ppo_ballbot_schedules as schedules
from ballbot_env import BallbotEnv, BallbotVectorEnv
from ballbot_utils.checkpoints import read_checkpoint
from ballbot_utils.randomization import MAX_LEVEL

STEPS = 5  # actions of an episode
PUSHES = {"push": 1.0, "push_interval": 0.1}
SHORT = ppo.Args(
    curriculum=True, frame_skip=1, num_threads=1, terrain="flat", cameras=False, num_envs=4, num_steps=32,
    minibatch_size=64, total_timesteps=512, final_eval_episodes=1, max_episode_steps=20, learning_rate=1e-3,
    randomization=PUSHES, run_name="run",
)  # fmt: skip


def make(num_envs=4, terrain="flat", **kwargs):
    kwargs = dict(randomization=PUSHES, cameras=False, max_episode_steps=STEPS) | kwargs
    return BallbotVectorEnv(num_envs, terrain, curriculum=True, num_threads=1, **kwargs)


def run_episode(envs, succeeds):
    """An episode at 0.31 m/s along y for robots that are to succeed, bool (n,), else 0.29. Returns the last infos."""
    for step in range(STEPS):
        if step == STEPS - 1:
            for position in (envs.robots.position, envs.robots.ball_position):
                position[:, 1] += STEPS * 0.002 * np.where(succeeds, 0.31, 0.29)
        infos = envs.step(np.zeros((envs.num_envs, 3)))[4]
    return infos


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_levels_rise_fall_and_stay_in_their_bounds(mode):
    envs, expected = make(autoreset_mode=mode), np.zeros(4, int)
    _, infos = envs.reset(seed=0)
    wins = [[True, False, k < 3, k < MAX_LEVEL + 1] for k in range(MAX_LEVEL + 3)]
    for succeeds in wins:
        assert infos["randomization"]["level"].tolist() == envs.levels.tolist() == expected.tolist()
        infos = run_episode(envs, succeeds)
        last = infos["final_info"] if mode == "SameStep" else infos
        assert last["randomization"]["level"].tolist() == expected.tolist()  # of the episode that ended
        expected = np.clip(expected + np.where(succeeds, 1, -1), 0, MAX_LEVEL)
        if mode == "NextStep":
            infos = envs.step(np.zeros((4, 3)))[4]
        elif mode == "Disabled":
            _, infos = envs.reset(options={"reset_mask": np.ones(4, bool)})
    assert expected.tolist() == [MAX_LEVEL, 0, 0, MAX_LEVEL - 2]
    envs.step(np.zeros((4, 3)))
    envs.reset()  # in the middle of an episode
    assert envs.levels.tolist() == expected.tolist()
    envs.reset(seed=0)
    assert not envs.levels.any()


def test_an_episode_that_a_wrapper_ends_is_a_success_too():
    env = gym.make("Ballbot-v0", terrain="flat", cameras=False, goal="command", randomization=PUSHES, curriculum=True,
                   max_episode_steps=2)  # fmt: skip
    levels = [env.reset(seed=0)[1]["randomization"]["level"]]
    for _ in range(3):
        assert [env.step(np.zeros(3))[3] for _ in range(2)] == [False, True]  # by TimeLimit
        levels.append(env.reset()[1]["randomization"]["level"])
    assert levels == [0, 1, 2, 3] and env.reset(seed=0)[1]["randomization"]["level"] == 0


def test_an_episode_that_has_ended_is_not_counted_again_in_a_copy():
    env = BallbotEnv("flat", cameras=False, goal="command", randomization=PUSHES, curriculum=True)
    env.reset(seed=0, options=dict(tilt=(np.radians(19.9), 0)))
    while not env.step(np.zeros(3))[2]:
        pass
    env.set_state(env.get_state())
    assert env.reset()[1]["randomization"]["level"] == 0


def test_a_fall_is_a_failure_at_any_speed():
    envs = make(max_tilt=10.0)
    envs.reset(seed=0)
    envs.levels[:] = 5
    envs.robots.position[:, 1] += 1.0
    envs.robots.quaternion[:2, 1] = 0.2  # rad, twice that
    assert envs.step(np.zeros((4, 3)))[2].tolist() == [True, True, False, False]
    assert envs.levels.tolist() == [4, 4, 5, 5]


def test_with_commands_a_success_is_not_to_fall():
    envs = make(goal="command")
    envs.reset(seed=0)
    run_episode(envs, [False] * 4)
    assert envs.levels.tolist() == [1] * 4


@pytest.mark.parametrize("terrain", ["perlin", "ramp"])
def test_level_0_is_level_ground_without_pushes(terrain):
    """A level is a share of the full heights, in physics, slopes and frames, and of the pushes."""
    envs = make(terrain=terrain, cameras=True, camera_size=16, max_episode_steps=-1)
    envs.reset(seed=0)
    ground, (sizes, full) = envs.model.geom("ground").id, (envs.model.hfield_size[:, 2], envs.terrain.relief)
    assert sizes[envs.model.geom_dataid[ground]] == pytest.approx(full)
    position, impulses = envs.robots.position[:, :2].copy(), {}
    for level in (0, 4, MAX_LEVEL):
        envs.levels[:] = level
        _, infos = envs.reset(options={"position": position})
        heights = sizes[envs.batch.expand("geom_dataid")[:, ground]]
        assert heights == pytest.approx(full * max(level / MAX_LEVEL, 1e-5))
        assert infos["randomization"]["terrain_amplitude"] == pytest.approx(max(level / MAX_LEVEL, 1e-5))
        slopes = envs.terrain.slopes(envs.robots.ball_position[:, None, :2], 0.09)[:, 0]
        assert envs.slopes()[:, :2] == pytest.approx(slopes * max(level / MAX_LEVEL, 1e-5), abs=1e-6)
        pushes = [envs.step(np.zeros((4, 3)))[4]["randomization"]["push"] for _ in range(100)]
        impulses[level] = np.linalg.norm(pushes, axis=2).max()
    assert impulses[0] == 0 < impulses[4] <= 0.4 < impulses[MAX_LEVEL] <= 1


def test_level_0_is_the_plane_for_cameras_and_physics():
    envs = make(terrain="perlin", cameras=True, max_episode_steps=-1)
    plane = BallbotVectorEnv(4, "flat", num_threads=1)
    (obs, _), (expected, _) = (e.reset(options={"position": (1.0, 2.0)}, seed=0) for e in (envs, plane))
    assert obs["depth_0"] == pytest.approx(expected["depth_0"], abs=0.005)
    for _ in range(150):  # the robots are dropped and settle
        position, expected = (e.step(np.zeros((4, 3)))[4]["position"] for e in (envs, plane))
    assert position == pytest.approx(expected, abs=0.005)


def test_randomized_hills_are_multiplied_by_the_level():
    envs = make(60, "perlin", randomization={"terrain_amplitude": 0.75})
    envs.reset(seed=0)
    envs.levels[:] = 5
    heights = envs.reset()[1]["randomization"]["terrain_amplitude"]
    assert (heights.min(), heights.max(), len(set(heights))) == (0.2, 0.8, 5)  # half of 0.4 to 1.6


def test_a_state_holds_the_levels_bit_for_bit():
    kwargs = dict(terrain="perlin", max_episode_steps=8, frame_skip=2)
    envs, again, single = make(**kwargs), make(**kwargs), BallbotEnv("perlin", curriculum=True, cameras=False)
    envs.reset(seed=3)
    envs.levels[:] = 3, 5, 9, MAX_LEVEL
    envs.reset()
    actions = random_actions(40, 4, 0.5)
    for action in actions[:13]:
        envs.step(action)
    state = envs.get_state()
    again.set_state(state)
    for action in actions[13:]:
        for a, b in zip(envs.step(action), again.step(action)):
            if isinstance(a, dict):
                a.get("episode", {}).pop("t", None), b.get("episode", {}).pop("t", None)
            assert_same(a, b)
    assert torch.equal(envs.get_state()["physics"], again.get_state()["physics"]) and len(set(envs.levels)) > 1
    assert single.reset(seed=0)[1]["randomization"]["level"] == 0
    damaged = state["randomization"] | {"level": state["randomization"]["level"] + MAX_LEVEL}
    with pytest.raises(ValueError, match="level is not as these environments have it"):
        again.set_state(state | {"randomization": damaged})


@pytest.mark.parametrize("script", [ppo, schedules])
def test_a_resumed_run_has_the_same_levels_which_are_logged(script, tmp_path, monkeypatch):
    args = SHORT if script is ppo else schedules.Args(
        **{k: v for k, v in vars(SHORT).items() if k not in ("anneal_lr", "exp_name")}, lr_schedule="constant"
    )  # fmt: skip
    ends = []
    for total in ((512,), (256, 512)):
        folder = tmp_path / str(len(total))
        folder.mkdir()
        monkeypatch.chdir(folder)
        script.train(replace(args, total_timesteps=total[0], clip_coef=0.1))
        for more in total[1:]:
            script.train(script.Args(resume="runs/run", total_timesteps=more))
        ends.append(read_checkpoint(Path("runs/run/last.pt")))
        log = EventAccumulator("runs/run").Reload()
        levels, spread = (log.Scalars(tag) for tag in ("charts/level", "charts/level_std"))
        assert len(levels) == len(spread) == 4
        assert levels[-1].value == ends[-1]["ranks"][0]["envs"]["randomization"]["level"].double().mean()
    for a, b in zip(*(end["ranks"][0]["envs"]["randomization"].items() for end in ends)):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    if script is ppo:  # schedules depend on the total
        assert all(torch.equal(value, ends[1]["model"][name]) for name, value in ends[0]["model"].items())
    assert "curriculum" in script.task(args, evaluation=False) and not script.task(args, evaluation=True)["curriculum"]


def test_it_needs_something_to_scale():
    with pytest.raises(ValueError, match='curriculum has no effect on terrain "flat" without a push: leave it out'):
        make(randomization={"mass": 0.1})
    with pytest.raises(ValueError, match="curriculum is 1: give True or False"):
        BallbotEnv("flat", curriculum=1)


@pytest.mark.parametrize("flags, message", [
    (dict(curriculum=True), "--curriculum needs"), (dict(capture_video=True), "--capture-video needs"),
    (dict(freeze_encoder=False), "--no-freeze-encoder needs"),
    (dict(env_kwargs=("height_scan=True",)), "height_scan needs"),
])  # fmt: skip
def test_the_gpu_script_rejects_what_it_does_not_have(flags, message):
    with pytest.raises(SystemExit, match=message):
        gpu.train(gpu.Args(**flags))
