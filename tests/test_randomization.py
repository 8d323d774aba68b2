"""Domain randomization: its samples, its effects, and that it is off by default."""

import inspect
import json
import math
import re

import mujoco
import numpy as np
import pytest
from test_env import assert_same, copy_obs, random_actions

from ballbot_env import BallbotEnv, BallbotVectorEnv
from ballbot_utils import randomization as library
from ballbot_utils.depth import DepthRenderer
from ballbot_utils.model import TIMESTEP, make_model
from ballbot_utils.randomization import RANDOMIZATION
from ballbot_utils.terrain import Terrain

ALL = dict(terrain_amplitude=0.8, mass=0.2, friction=0.3, wheel_damping=0.25, latency=3, tilt=2, velocity=0.3, push=1.0,
           push_interval=0.1, obs_noise=0.02)  # fmt: skip


def make(num_envs=3, terrain="flat", cameras=False, **randomization):
    return BallbotVectorEnv(num_envs, terrain, cameras=cameras, camera_size=16, num_threads=1, max_tilt=60,
                            max_episode_steps=60, randomization=randomization)  # fmt: skip


def test_environment_i_is_the_single_one_and_a_state_is_all_of_it(monkeypatch):
    monkeypatch.setattr(library, "NUM_HEIGHT_SCALES", 2)  # they take time to compile
    kwargs = dict(camera_size=16, num_threads=1, max_episode_steps=50, frame_skip=3, randomization=ALL)
    many, again, single = BallbotVectorEnv(3, **kwargs), BallbotVectorEnv(3, **kwargs), BallbotEnv(**kwargs)
    obs, info = many.reset(seed=5)
    obs_i, info_i = single.reset(seed=7)
    for step, action in enumerate(random_actions(60, 3, 0.5)):
        assert_same({key: value[2] for key, value in obs.items()}, obs_i, f"{step}")
        reported = {key: value[2] for key, value in info["randomization"].items() if key[0] != "_"}
        assert_same(reported, info_i["randomization"], f"{step}")
        if step == 40:
            state = many.get_state()
            again.set_state(state)
            assert again.new_frames.all()
            sampled = state["randomization"]
            damaged = sampled | {"latency": sampled["latency"] + 10**6}
            with pytest.raises(ValueError, match="latency is not as these environments have it"):
                again.set_state(state | {"randomization": damaged})
            again.set_state(state)
        result = obs, *_, info = many.step(action)
        if step >= 40:
            for a, b in zip(result, again.step(action)):
                if isinstance(a, dict):
                    a.get("episode", {}).pop("t", None), b.get("episode", {}).pop("t", None)
                assert_same(a, b)
        obs_i, reward, terminated, truncated, info_i = single.step(action[2])
        assert reward == result[1][2]
        if terminated or truncated:
            assert_same(info["final_info"]["randomization"]["mass"][2], info_i["randomization"]["mass"])
            obs_i, info_i = single.reset()
    assert json.loads(single.get_state()["rngs"])[0] == json.loads(many.get_state()["rngs"])[2]


def test_off_is_as_if_there_were_none():
    results = []
    for randomization in (None, {}, dict.fromkeys(set(ALL) - {"push_interval"}, 0) | {"push_interval": 0.5}):
        envs = BallbotVectorEnv(2, "flat", camera_size=16, num_threads=1, randomization=randomization)
        rows = [envs.reset(seed=0), *(envs.step(action) for action in random_actions(10, 2, 0.5))]
        results.append({i: dict(enumerate((copy_obs(row[0]), *row[1:]))) for i, row in enumerate(rows)})
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert "randomization" not in results[0][0][1]


def test_what_is_drawn():
    envs = make(200, "perlin", **ALL)
    sampled = [envs.reset(seed=0)[1]["randomization"] for _ in range(2)]
    assert_same(*sampled)
    sampled = sampled[0]
    assert {key for key in sampled if key[0] != "_"} == set(ALL) - {"push_interval", "obs_noise"}
    for name in ("mass", "friction", "wheel_damping", "terrain_amplitude"):
        assert np.abs(sampled[name] - 1).max() <= ALL[name] and sampled[name].std() > 0.5 * ALL[name], name
    factors = 1 + ALL["terrain_amplitude"] * np.array([-0.8, -0.4, 0, 0.4, 0.8])
    np.testing.assert_allclose(np.unique(sampled["terrain_amplitude"]), factors)
    ground = envs.model.geom_dataid[envs.model.geom("ground").id]
    assert envs.model.hfield_size[ground][2] == pytest.approx(0.1)  # what they vary around
    assert set(sampled["latency"]) == {0, 1, 2, 3}
    for name, longest in (("tilt", math.radians(ALL["tilt"])), ("velocity", ALL["velocity"])):
        length, angle = np.linalg.norm(sampled[name], axis=1), np.arctan2(*sampled[name].T)
        assert 0.9 * longest < length.max() <= longest and np.abs(length.mean() - longest / 2) < 0.1 * longest
        assert angle.std() == pytest.approx(2 * math.pi / 12**0.5, rel=0.1)
    assert not np.array_equal(envs.reset()[1]["randomization"]["mass"], sampled["mass"])  # each episode's own


def test_an_action_that_is_no_number_ends_the_episode_even_if_it_is_to_come_late():
    envs = make(3, latency=2)
    envs.reset(seed=0)
    obs, rewards, terminations, *_ = envs.step(np.array([[0, 0, 0], [np.nan, 0, 0], [0, 0, 0]], np.float32))
    assert terminations.tolist() == [False, True, False] and np.isfinite(rewards).all()
    assert all(np.isfinite(value).all() for value in obs.values())
    assert all(np.isfinite(envs.step(np.zeros((3, 3), np.float32))[1]).all() for _ in range(5))


def test_a_start_is_the_one_that_is_reported():
    envs = make(20, tilt=10, velocity=0.5)
    obs, info = envs.reset(seed=0)
    assert obs["orientation"][:, :2] == pytest.approx(info["randomization"]["tilt"], abs=1e-6)
    assert obs["vel"][:, :2] == pytest.approx(info["randomization"]["velocity"], abs=1e-6)
    obs, info = envs.reset(options={"tilt": (0.1, 0.0)})  # an option wins
    assert np.all(info["randomization"]["tilt"] == (0.1, 0.0))
    assert obs["orientation"][:, 0] == pytest.approx(0.1) and obs["vel"][:, 0].std() > 0.1


def test_models_are_as_if_compiled_so():
    """One step of mj_step on a model compiled with the sampled values leads to the same state, bit for bit."""
    envs = make(3, "perlin", mass=0.3, friction=0.5, wheel_damping=0.5, terrain_amplitude=0.9)
    _, info = envs.reset(seed=1)
    for i in range(3):
        sampled = {key: value[i] for key, value in info["randomization"].items()}
        model = make_model(Terrain(amplitude=0.1 * sampled["terrain_amplitude"]), 0.4 * sampled["wheel_damping"])
        base = model.body("base").id
        model.body_mass[base] *= sampled["mass"]
        model.body_inertia[base] *= sampled["mass"]
        for geom in ("ball", "ground"):
            model.geom_friction[model.geom(geom).id, 0] *= sampled["friction"]
        model.pair_friction[:, :2] *= sampled["friction"]
        data = mujoco.MjData(model)
        mujoco.mj_setConst(model, data)
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(model, data, envs.batch.state[i], spec)
        state = envs.get_state()
        actions = random_actions(60, 3, 0.5)[:59]
        for action in actions:
            envs.step(action)
            data.ctrl[:3] = np.float32(-10) * action[i]
            mujoco.mj_step(model, data)
        assert data.ncon > 3
        assert np.array_equal(envs.batch.qpos[i], data.qpos) and np.array_equal(envs.batch.qvel[i], data.qvel)
        envs.set_state(state)


def test_cameras_see_the_hills_that_are_drawn():
    envs = make(6, "perlin", cameras=True, terrain_amplitude=0.9)
    obs, info = envs.reset(seed=0)
    for i, factor in enumerate(info["randomization"]["terrain_amplitude"]):
        heights, robots = Terrain(amplitude=0.1 * factor).heights, envs.robots
        frames = DepthRenderer(envs.model, 16, heights).render(robots.position[[i]], robots.quaternion[[i]])
        assert frames[0, :1].numpy() == pytest.approx(obs["depth_0"][i], abs=1e-5)
        x, y, z = info["position"][i]
        around = np.abs(np.linspace(-20, 20, len(heights))[:, None] - (x, y)) < 0.08
        assert 0.2 < z - heights[np.ix_(around[:, 1], around[:, 0])].max() < 0.25


@pytest.mark.parametrize("frame_skip", [1, 4])
def test_latency_delays_what_the_motors_do_and_nothing_else(frame_skip):
    """The motors' torques are the commands of `latency` physics steps before, zeros at first."""
    envs = BallbotVectorEnv(
        8, "flat", cameras=False, num_threads=1, frame_skip=frame_skip, randomization={"latency": 5}
    )
    _, info = envs.reset(seed=0)
    latency = info["randomization"]["latency"]
    assert len(set(latency)) > 3
    plain = BallbotVectorEnv(8, "flat", cameras=False, num_threads=1)
    plain.reset(seed=0, options={"position": info["position"][:, :2]})
    commands = np.zeros((5 + 20 * frame_skip, 8, 3), np.float32)
    for step, action in enumerate(random_actions(500, 8, 0.5)[::25]):
        obs, *_ = envs.step(action)
        assert_same(obs["actions"], action)
        start = 5 + step * frame_skip
        commands[start : start + frame_skip] = action
        for k in range(start, start + frame_skip):
            seen, *_ = plain.step(commands[k - latency, np.arange(8)])
        for key in ("orientation", "vel", "motor_state"):
            assert_same(obs[key], seen[key], f"step {step}")


def test_a_push_replaces_the_force_of_apply_force():
    envs = BallbotVectorEnv(1, "flat", cameras=False, max_tilt=80, num_threads=1, randomization={"push": 0.5})
    envs.reset(seed=0)
    envs.apply_force([(5.0, 0.0, 2.0)])
    pushed = []
    while len(pushed) < 12:
        push = envs.step(np.zeros((1, 3)))[4]["randomization"]["push"][0]
        envs.robots.position[0], envs.robots.quaternion[0], envs.robots.velocities[0] = (0, 0, 1), (1, 0, 0, 0), 0
        pushed += [(push, envs.forces[0].copy())] * bool(push.any() or pushed)
    for k, (push, force) in enumerate(pushed):
        np.testing.assert_allclose(force, np.append(push, 0) / 0.02 if k < 10 else 0)


@pytest.mark.parametrize("frame_skip, lasts", [(1, 10), (4, 3), (25, 1)])
def test_pushes_have_their_impulse_and_their_times(frame_skip, lasts):
    envs = BallbotVectorEnv(4, "flat", cameras=False, frame_skip=frame_skip, max_tilt=80, max_episode_steps=-1,
                            num_threads=1, randomization={"push": 0.5, "push_interval": 0.2})  # fmt: skip
    envs.reset(seed=0)
    base, forces, reported, start = envs.model.body("base").id, [], [], envs.batch.qpos.copy()
    for _ in range(2000 // frame_skip):
        infos = envs.step(np.zeros((4, 3)))[4]
        envs.batch.qpos[:], envs.batch.qvel[:] = start, 0  # so that none falls
        forces.append(envs.batch.xfrc_applied[:, base].copy())
        reported.append(infos["randomization"]["push"])
    forces, reported = np.array(forces), np.array(reported)
    assert not forces[:, :, 2:].any()
    acts, seconds = forces.any(2), frame_skip * TIMESTEP
    begin = acts & ~np.roll(acts, 1, 0)
    assert np.array_equal(acts, reported.any(2))
    assert forces[acts][:, :2] * lasts * seconds == pytest.approx(reported[acts])
    for i in range(4):
        steps = np.flatnonzero(begin[:, i])
        assert np.all(acts[:, i][steps[:-1] + lasts - 1]) and not np.any(acts[:, i][steps[:-1] + lasts])
        assert 0.1 - seconds <= steps[0] * seconds <= 0.3 + seconds
        gaps = np.diff(steps) * seconds
        assert gaps.min() >= 0.1 - seconds and gaps.max() <= 0.3 + seconds and gaps.std() > 0.02
    impulses = np.linalg.norm(reported[begin], axis=1)
    assert 0.4 < impulses.max() <= 0.5 and impulses.mean() == pytest.approx(0.25, abs=0.06)


def test_a_push_changes_the_speed_as_said():
    """1 N·s changes the speed of the robot by some 0.26 m/s."""
    envs = make(30, push=2.0, push_interval=0.1)
    envs.reset(seed=0)
    impulses = np.zeros((30, 2))
    for _ in range(59):
        obs, *_, infos = envs.step(np.zeros((30, 3)))
        impulses += infos["randomization"]["push"] / 10  # reported in 10 steps each
    slope = (impulses * obs["vel"][:, :2]).sum() / (impulses**2).sum()
    assert 0.2 < slope < 0.4, slope


def test_noise_is_on_the_sensors_and_not_in_the_physics():
    noisy, clean = make(50, cameras=True, obs_noise=0.01), make(50, cameras=True)
    errors = {}
    position = noisy.reset(seed=0)[1]["position"][:, :2]
    clean.reset(seed=0, options={"position": position})
    for action in random_actions(30, 50, 0.1):
        (a, reward, *_), (b, expected, *_) = noisy.step(action), clean.step(action)
        assert_same(reward, expected)
        for key in b:
            errors.setdefault(key, []).append(np.array(a[key]) - b[key])
            assert noisy.single_observation_space[key].contains(a[key][0])
    for key, error in errors.items():
        error = np.array(error)
        if key in ("actions", "relative_image_timestamp"):
            assert not error.any()
            continue
        inside = error if "depth" not in key else error[:, :, :, 8:]
        assert inside.std() == pytest.approx(0.01, rel=0.1), key
        if "depth" not in key:  # frames are held
            pairs = error[1:].ravel() * error[:-1].ravel()
            assert abs(pairs.mean()) < 0.1 * error.var(), key
    depth = np.array(errors["depth_0"])
    assert np.array_equal(depth[6], depth[7]) or np.array_equal(depth[7], depth[8])
    other = np.corrcoef(depth[0].reshape(50, -1))
    assert np.median(np.abs(other - np.eye(50))) < 0.1


def test_the_docstring_has_every_name():
    doc = inspect.cleandoc(BallbotEnv.__doc__)
    table = re.findall(r"^\| `(\w+)` ", doc[doc.index("### Domain randomization") : doc.index("## Episode End")], re.M)
    assert set(table) == {"randomization", *RANDOMIZATION}


@pytest.mark.parametrize(
    "randomization, message",
    [
        ({"mas": 0.1}, "randomization has no 'mas': there are terrain_amplitude, mass, "),
        ({"mass": 1}, "randomization mass is 1: give a share from 0 to 0.9"),
        ({"mass": "much"}, "randomization mass is 'much'"),
        ({"latency": 1.5}, "randomization latency is 1.5: give a whole number of steps"),
        ({"tilt": 20}, "randomization tilt is 20: give degrees from 0 to below max_tilt"),
        ({"push": -1}, "randomization push is -1"),
        ({"push": math.nan}, "randomization push is nan"),
        ({"push_interval": 1.0}, "push_interval and no push: give both"),
        ({"push": 1, "push_interval": 0}, "randomization push_interval is 0: give 0.1 to 100 s"),
        ({"obs_noise": True}, "randomization obs_noise is True"),
        ("push", "randomization is 'push': give a dict"),
    ],
)
def test_bad_names_and_values(randomization, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        BallbotEnv(randomization=randomization)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match='means nothing on terrain "flat"'):
        BallbotEnv("flat", randomization={"terrain_amplitude": 0.5})
