"""What ballbot_env.py promises, tested from outside.

States are written through the vector environment's `batch` and `robots`, which are live views of the physics, and
through `get_state` and `set_state`.
"""

import copy
import inspect
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import mujoco.batch
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import ballbot_env
from ballbot_env import BallbotEnv, BallbotVectorEnv
from ballbot_utils import geometry, model
from ballbot_utils.depth import DepthRenderer
from ballbot_utils.model import make_model
from ballbot_utils.observations import make_observations
from ballbot_utils.terrain import CELL, TERRAIN_NODES, TERRAINS, Terrain, perlin_terrain

VISIBLE = [1, 1, 1, 0, 0, 0]  # geom groups a camera sees
# Episodes of up to 100 steps, of which some end by a fall
SHORT = dict(max_tilt=3.0, max_episode_steps=100)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder for the MUJOCO_LOG.TXT that MuJoCo may write when physics fails."""
    monkeypatch.chdir(tmp_path)


def make(num_envs=3, terrain="flat", cameras=False, num_threads=1, **kwargs):
    return BallbotVectorEnv(num_envs, terrain, cameras=cameras, num_threads=num_threads, **kwargs)


def random_actions(steps, num_envs, scale, seed=0):
    """Actions held for 20 steps each, so that they tip the robot: (steps, num_envs, 3)."""
    rng = np.random.default_rng(seed)
    held = rng.uniform(-scale, scale, (steps // 20 + 1, num_envs, 3))
    return np.repeat(held, 20, axis=0)[:steps].astype(np.float32)


def assert_same(a, b, path=""):
    """Equal bit for bit, down to keys, types and shapes."""
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), f"{path}: {sorted(a)} and {sorted(b)}"
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
        return
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{path}: {a.dtype}{a.shape} and {b.dtype}{b.shape}"
    if a.dtype == object:
        for i in np.ndindex(a.shape):
            if a[i] is None or b[i] is None:
                assert a[i] is b[i], f"{path}{i}"
            else:
                assert_same(a[i], b[i], f"{path}{i}")
    else:
        assert a.tobytes() == b.tobytes(), f"{path} differs"


def copy_obs(obs):
    return {key: np.array(value) for key, value in obs.items()}


def change_state(env, **values):
    """Overwrite entries of the state of an environment, of one of `gym.make` too."""
    state = env.unwrapped.get_state()
    for name, value in values.items():
        state[name][:] = torch.as_tensor(value)
    env.unwrapped.set_state(state)


def skip_to(env, actions, frame_skip=1):
    """Let an environment count as if its episode had lasted so many actions."""
    change_state(env, _steps=actions * frame_skip)
    if env is not env.unwrapped:
        env._elapsed_steps = actions  # of Gymnasium's TimeLimit, which has no public count


def quaternion(axis, angle):
    return np.array([math.cos(angle / 2), *(math.sin(angle / 2) * np.asarray(axis, float))])


def tilt_of(obs):
    """Tilt in degrees from the rotation vectors (n, 3), by Rodrigues' formula."""
    vector = np.atleast_2d(obs["orientation"]).astype(float)
    angle = np.linalg.norm(vector, axis=1)
    axis_z = vector[:, 2] / np.maximum(angle, 1e-12)
    return np.degrees(np.arccos(np.clip(np.cos(angle) + (1 - np.cos(angle)) * axis_z**2, -1, 1)))


# Gymnasium's interface


@pytest.mark.parametrize("cameras", [False, True])
def test_gymnasium_checker_has_nothing_to_say(cameras):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("Ballbot-v0", cameras=cameras)
        check_env(env.unwrapped, skip_render_check=True)  # for rendering see below: it needs OpenGL
        env.close()


@pytest.mark.parametrize("cameras", [False, True])
def test_stable_baselines3_checker(cameras):
    from stable_baselines3.common.env_checker import check_env as check_env_sb3

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env_sb3(gym.make("Ballbot-v0", cameras=cameras).unwrapped)
    messages = [str(w.message) for w in caught]
    # Depth in metres is float by definition. SB3 advises uint8 from 0 to 255 for whatever has an image's shape.
    advice = [m for m in messages if re.match(r"It seems that your observation (space )?depth_[01] is an image but", m)]
    assert messages == advice
    assert len(messages) == (4 if cameras else 0)


def test_spaces_of_both_environments_agree():
    single = gym.make("Ballbot-v0", terrain="flat")
    vector = gym.make_vec("Ballbot-v0", num_envs=2, terrain="flat", num_threads=1)
    assert isinstance(vector, BallbotVectorEnv)
    assert vector.single_observation_space == single.observation_space
    assert vector.single_action_space == single.action_space == gym.spaces.Box(-1, 1, (3,), np.float32)
    keys = {"orientation", "angular_vel", "vel", "motor_state", "actions"}
    assert set(make().single_observation_space) == keys
    assert set(single.observation_space) == keys | {"depth_0", "depth_1", "relative_image_timestamp"}
    obs, _ = vector.reset(seed=0)
    assert vector.observation_space.contains(copy_obs(obs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of GLFW, without a display
def test_rgb_array_render():
    env = gym.make("Ballbot-v0", terrain="flat", cameras=False, render_mode="rgb_array")
    env.reset(seed=0)
    try:
        picture = env.render()
    except RuntimeError as error:
        assert "OpenGL" in str(error)
        pytest.skip("no OpenGL here")
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8 and picture.std() > 10
    env.unwrapped.apply_force((30, 0, 0))
    later = []
    for _ in range(20):
        env.step(np.zeros(3))
        later.append(env.render())
    assert all(same is picture for same in later[:19]) and later[19] is not picture  # 25 pictures a second
    assert not picture.flags.writeable
    red, green, blue = later[19].astype(int).reshape(-1, 3).T
    assert ((green > 120) & (red < 60) & (blue < 80)).sum() > 50  # the arrow of the goal
    env.reset()
    assert env.render() is not later[19]
    pictures = make(2, render_mode="rgb_array")
    pictures.reset(seed=0)
    assert [p.shape for p in pictures.render()] == [(480, 640, 3)] * 2


def test_step_needs_reset():
    with pytest.raises(gym.error.ResetNeeded):
        make().step(np.zeros((3, 3)))
    with pytest.raises(gym.error.ResetNeeded):
        make().get_state()
    with pytest.raises(gym.error.ResetNeeded):
        BallbotEnv("flat", cameras=False).step(np.zeros(3))


def test_docstring_matches_the_code():
    doc = inspect.cleandoc(BallbotEnv.__doc__)
    rows = [[cell.strip().strip("`") for cell in line[1:-1].split("|")] for line in doc.splitlines() if line[:1] == "|"]
    table = {row[0]: row for row in rows}
    for name, parameter in inspect.signature(BallbotVectorEnv).parameters.items():
        if name in ("num_envs", "autoreset_mode", "copy"):
            continue
        stated = table[name][2]
        if stated != "see below":
            assert stated == (f'"{parameter.default}"' if isinstance(parameter.default, str) else stated)
            assert eval(stated) == parameter.default, name
    units = {key: row.unit for key, row in make_observations().items()}
    assert {key: table[key][5] for key in units} == units
    for kind, function in TERRAINS.items():
        defaults = inspect.signature(function).parameters.items() if function else ()
        arguments = [f"{name}={p.default:g}" for name, p in defaults if p.default is not p.empty]
        assert table[kind][1].replace("`", "") == ", ".join(arguments), kind
    bounds = {"π": np.float32(np.pi), "-π": np.float32(-np.pi)}
    for key, space in make(1, cameras=True).single_observation_space.items():
        low, high = (bounds.get(cell, cell) for cell in table[key][3:5])
        assert np.all(space.low == np.float32(low)) and np.all(space.high == np.float32(high)), key


# One environment and many


def test_many_do_not_depend_on_how_many():
    """Vectorised arithmetic may round differently at the end of an array: here it must not."""
    n, steps = 40, 150  # more than DepthRenderer.chunk
    actions = random_actions(steps, n, 0.3)
    many = make(n, "perlin", cameras=True, **SHORT)
    others = {i: make(k, "perlin", cameras=True, **SHORT) for i, k in ((0, 1), (7, 3), (39, 1))}
    assert_same(many.reset(seed=0)[0]["vel"][39:], others[39].reset(seed=39)[0]["vel"])
    for i, few in others.items():
        few.reset(seed=i)
    for action in actions:
        obs = many.step(action)[0]
        for i, few in others.items():
            obs_i = few.step(action[i : i + few.num_envs])[0]
            assert_same({k: v[i : i + few.num_envs] for k, v in obs.items()}, obs_i, f"{i}")


@pytest.mark.slow
def test_many_look_like_gymnasiums_sync_vector_env():
    n, kwargs = 3, dict(SHORT, max_episode_steps=60, terrain="perlin", camera_size=16, num_threads=1)
    ours = gym.make_vec("Ballbot-v0", num_envs=n, **kwargs)
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    sync = gym.make_vec("Ballbot-v0", num_envs=n, vectorization_mode="sync", vector_kwargs=mode, **kwargs)
    assert ours.metadata["autoreset_mode"] == sync.metadata["autoreset_mode"]
    assert ours.observation_space == sync.observation_space and ours.action_space == sync.action_space
    sync = RecordEpisodeStatistics(sync)
    for a, b in zip(ours.reset(seed=3), sync.reset(seed=3)):
        assert_same(a, b)
    ends = {"terminated": 0, "truncated": 0, "together": 0}
    for action in random_actions(400, n, 0.6, seed=1):
        step, expected = ours.step(action), sync.step(action)
        expected[3][expected[2]] = False  # the one difference: TimeLimit truncates at its limit what falls there, too
        ended = step[2] | step[3]
        if ended.any():
            times, expected_times = step[4]["episode"].pop("t"), expected[4]["episode"].pop("t")
            assert times.dtype == expected_times.dtype and times.shape == expected_times.shape
            assert np.all(times[ended] > 0) and np.all(times[~ended] == 0)
            ends["terminated"] += step[2].sum()
            ends["truncated"] += step[3].sum()
            ends["together"] += ended.sum() > 1
        assert_same(dict(enumerate(step)), dict(enumerate(expected)))
    assert min(ends.values()) > 0, ends
    ours.reset()  # statistics restart with the episode
    action = np.zeros((n, 3))
    while True:
        _, _, _, truncations, infos = ours.step(action)
        if truncations.any():
            break
    assert np.all(infos["episode"]["l"][truncations] == 60)


# Seeds


def trajectory(num_threads, torch_threads=1):
    envs = make(40, "perlin", cameras=True, num_threads=num_threads, **SHORT)  # more than DepthRenderer.chunk
    torch.set_num_threads(torch_threads)
    rows = [copy_obs(envs.reset(seed=0)[0])]
    for action in random_actions(60, 40, 0.5):
        obs, rewards, terminations, truncations, _ = envs.step(action)
        rows.append(copy_obs(obs) | {"r": rewards, "terminated": terminations, "truncated": truncations})
    torch.set_num_threads(1)
    return dict(enumerate(rows))


def test_same_trajectory_at_any_number_of_threads():
    expected = trajectory(1)
    assert any(row["terminated"].any() for row in list(expected.values())[1:])
    for threads in ((2, 1), (3, 1), (1, 2)):
        assert_same(expected, trajectory(*threads), f"threads {threads}")


def run_script(script):
    """Its output, in a process of its own, which may take half a minute."""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(ballbot_env.__file__).parent, timeout=30, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("num_envs, num_threads", [(1, 1), (16, 1), (70, 2)])
def test_rendering_uses_its_own_threads_and_leaves_those_of_torch(num_envs, num_threads):
    out = run_script(f"""
import os, threading, numpy as np, torch, ballbot_env
def threads():
    counts = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start(), thread.join()
    return counts
torch.set_num_threads(3)
print(*threads())
envs = ballbot_env.BallbotVectorEnv({num_envs}, num_threads={num_threads})
before = len(os.listdir("/proc/self/task"))
envs.reset(seed=0)
for _ in range(12):
    envs.step(np.zeros(({num_envs}, 3)))
print(len(os.listdir("/proc/self/task")) - before, *threads())
""")
    before, after = out.splitlines()
    started, *left = after.split()
    assert int(started) <= (num_threads if num_threads > 1 else 0) and left == before.split() == ["3", "3"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_forked_environments_render_too():
    """In the parent OpenMP's threads have started, by the environment or by its caller: children have none of them."""
    out = run_script("""
import multiprocessing, warnings, gymnasium as gym, numpy as np, torch, ballbot_env
warnings.simplefilter("ignore")
multiprocessing.set_start_method("fork")
ballbot_env.BallbotVectorEnv(16).reset(seed=0)
torch.rand(1_000_000).exp()
envs = gym.make_vec("Ballbot-v0", num_envs=2, vectorization_mode="async")
obs, _ = envs.reset(seed=0)
for _ in range(7):
    obs = envs.step(np.zeros((2, 3), np.float32))[0]
print(obs["depth_0"].std() > 0)
envs.close()
""")
    assert out == "True\n"


def test_seeds_fix_the_starts():
    envs = make(4)
    first, second, third = (envs.reset(seed=seed)[1]["position"] for seed in (0, 0, 100))
    assert_same(first, second)
    assert len(np.unique(np.concatenate([first, third])[:, 0])) == 8
    assert_same(envs.reset(seed=[3, 0, 2, 1])[1]["position"], first[[3, 0, 2, 1]])
    assert not np.any(envs.reset()[1]["position"][:, 0] == first[:, 0])  # keeps sampling
    assert make(1).reset()[1]["position"][0, 0] != make(1).reset()[1]["position"][0, 0]
    starts = np.concatenate([envs.reset()[1]["position"] for _ in range(200)])
    assert np.abs(starts[:, :2]).max() <= 10 and np.all(np.abs(starts[:, :2].mean(0)) < 1)
    assert np.all(np.abs(starts[:, :2].std(0) - 20 / 12**0.5) < 0.5)  # a uniform distribution's


def test_terrain_seeds():
    heights = {seed: make(1, "perlin", terrain_seed=seed).model.hfield_data for seed in (0, 1)}
    assert np.abs(heights[0] - heights[1]).mean() > 0.1
    assert_same(perlin_terrain.__wrapped__(1).ravel(), heights[1])  # computed again, past the cache
    a, b = (make(2, "perlin", terrain_seed=seed).reset(seed=0)[1]["position"] for seed in (0, 1))
    assert_same(a[:, :2], b[:, :2])  # the same starts, on other ground
    assert np.all(a[:, 2] != b[:, 2])


@pytest.mark.parametrize("seed", [0, 1])
def test_terrain_slopes_are_those_of_the_reference(seed):
    ground = make_model(Terrain("perlin", seed))
    half_x, half_y, amplitude, _ = ground.hfield_size[0]
    heights = ground.hfield_data.reshape(ground.hfield_nrow[0], ground.hfield_ncol[0]) * amplitude
    assert (half_x, half_y, amplitude) == (20, 20, 0.1)
    assert heights.min() == 0 and heights.max() == pytest.approx(0.1)
    slope_y, slope_x = np.gradient(heights, 2 * half_x / (len(heights) - 1))
    slopes = np.percentile(np.hypot(slope_x, slope_y), [50, 90, 99])
    np.testing.assert_allclose(slopes, [0.05, 0.13, 0.20], rtol=0.15)


def test_robots_start_upright_just_above_the_ground():
    envs = make(50, "perlin")
    ball_ground = {envs.model.geom("ball").id, envs.model.geom("ground").id}

    def touching(i):
        return any({*contact.geom} == ball_ground for contact in envs.get_data(i).contact)

    obs, _ = envs.reset(seed=0)
    assert np.all(obs["orientation"] == 0) and np.all(envs.batch.qvel == 0)
    assert not any(touching(i) for i in range(50))
    for _ in range(60):  # the fall takes 40
        envs.step(np.zeros((50, 3)))
    assert sum(touching(i) for i in range(50)) >= 40  # some bounce


def test_options_say_how_a_robot_starts():
    positions, tilt = np.array([[3.0, -4.0], [-19.0, 19.0], [0.0, 0.0]]), (0.2, -0.1)
    options = {"position": positions, "heading": np.array([0.0, 1.0, -3.0]), "tilt": tilt, "velocity": (0.3, 0.1)}
    envs = make(3, "perlin", cameras=True, camera_size=16)
    plain, _ = envs.reset(seed=0, options={"position": positions})
    plain, upright = copy_obs(plain), envs.batch.qpos.copy()
    obs, info = envs.reset(seed=0, options=options)
    base, ball = (envs.model.joint(name).qposadr[0] for name in ("base", "ball"))
    assert_same(envs.batch.qpos[:, ball : ball + 3], upright[:, ball : ball + 3])
    assert_same(upright[:, ball : ball + 2], positions)
    for i, heading in enumerate(options["heading"]):
        turn, matrix = np.empty(4), np.empty(9)
        lean = quaternion(np.array([*tilt, 0]) / np.linalg.norm(tilt), np.linalg.norm(tilt))
        mujoco.mju_mulQuat(turn, lean, quaternion([0, 0, 1], heading))
        np.testing.assert_allclose(envs.batch.qpos[i, base + 3 : base + 7], turn, atol=1e-12)
        mujoco.mju_quat2Mat(matrix, turn)
        up = 0.12 * matrix[[2, 5, 8]]  # from the ball's centre to the base's origin
        np.testing.assert_allclose(info["position"][i], upright[i, ball : ball + 3] + up, atol=1e-12)
    np.testing.assert_allclose(obs["vel"], [[0.3, 0.1, 0]] * 3, rtol=1e-6)
    np.testing.assert_allclose(envs.batch.qvel[:, envs.model.joint("ball").dofadr[0] :][:, :2], [[0.3, 0.1]] * 3)
    assert not obs["angular_vel"].any() and not obs["motor_state"].any()
    assert np.abs(obs["depth_0"] - plain["depth_0"]).max() > 0.01  # the frames are of this start
    single = BallbotEnv("perlin", camera_size=16)
    alone, _ = single.reset(options=options | {"position": positions[1], "heading": 1.0})
    assert_same(alone, {key: value[1] for key, value in obs.items()})
    # They hold for one start, and change no other.
    again, expected = envs.reset()[0], make(3, "perlin", cameras=True, camera_size=16)
    expected.reset(seed=0)
    assert_same(again, expected.reset()[0])
    with pytest.raises(ValueError, match="tilt is"):
        make(2, max_tilt=10.0).reset(options={"tilt": np.radians((0, 10.1))})


def test_a_force_acts_until_it_ends():
    forces = np.array([[2.0, 0, 0], [0, -3.0, 0], [0, 0, 0]])
    envs, single = make(max_episode_steps=150), BallbotEnv("flat", cameras=False)
    start = {"position": (0, 0)}
    envs.reset(options=start), single.reset(options=start)
    for step in range(150):
        if step in (60, 80):  # standing on the ground
            envs.apply_force(forces * (step == 60)), single.apply_force(forces[1] * (step == 60))
        obs = envs.step(np.zeros((3, 3)))[0]
        alone = single.step(np.zeros(3))[0]
        if step < 149:
            assert_same(obs["vel"][1], alone["vel"])
        if step == 79:
            vel = obs["vel"].copy()
    np.testing.assert_allclose(vel[:2] - vel[2], forces[:2] * 20 * 0.002 / 3.85, atol=0.01)
    envs.apply_force(forces)
    envs.reset(options=start)
    obs = envs.step(np.zeros((3, 3)))[0]
    assert_same(obs["vel"][0], obs["vel"][2])  # a reset ends it
    with pytest.raises(ValueError, match=r"forces have shape \(3,\), expected \(3, 3\)"):
        envs.apply_force(np.zeros(3))
    with pytest.raises(ValueError, match=r"force has shape \(2,\), expected \(3,\)"):
        single.apply_force((1.0, 0.0))


# Depth


@pytest.mark.parametrize("randomization", [None, {"terrain_amplitude": 0.5}])
def test_slopes_are_those_of_the_ground_on_the_way(randomization):
    envs = make(20, "perlin", terrain_amplitude=0.15, goal=(1, 0), randomization=randomization)
    _, infos = envs.reset(seed=0)
    heights, nodes = 0.15 * perlin_terrain(0), np.linspace(-20, 20, TERRAIN_NODES)
    factors = infos["randomization"]["terrain_amplitude"] if randomization else np.ones(20)

    def height(x, y):  # between the four nodes around
        row = [np.interp(x, nodes, heights[k]) for k in (np.searchsorted(nodes, y) - 1, np.searchsorted(nodes, y))]
        return np.interp(y, nodes[np.searchsorted(nodes, y) - 1 :][:2], row)

    expected = np.array([[
        [(height(x + on + 0.09, y) - height(x + on - 0.09, y)) / 0.18,
         (height(x + on, y + 0.09) - height(x + on, y - 0.09)) / 0.18] for on in (0, 0.3, 0.6)
    ] for x, y, _ in infos["position"]]).reshape(20, 6) * factors[:, None]  # fmt: skip
    assert expected.std() > 0.05
    np.testing.assert_allclose(envs.slopes(), expected, atol=0.045)  # by the nearest nodes
    assert not make().slopes().any()


def random_poses(mj_model, heights, n, rng):
    """Robots on the terrain, tilted by up to 20°: qpos (n, nq) and the bases' rotation matrices (n, 3, 3)."""
    qpos = np.tile(mj_model.qpos0, (n, 1))
    rotations = np.empty((n, 3, 3))
    base, ball = mj_model.joint("base").qposadr[0], mj_model.joint("ball").qposadr[0]
    for i in range(n):
        x, y = rng.uniform(-18, 18, 2)
        direction, tilt, yaw = rng.uniform(-np.pi, np.pi), np.radians(rng.uniform(0, 20)), rng.uniform(-np.pi, np.pi)
        quat, matrix = np.empty(4), np.empty(9)
        lean = quaternion([math.cos(direction), math.sin(direction), 0], tilt)
        mujoco.mju_mulQuat(quat, lean, quaternion([0, 0, 1], yaw))
        mujoco.mju_quat2Mat(matrix, quat)
        rotations[i] = matrix.reshape(3, 3)
        ground = 0.0
        if heights is not None:
            column, row = (round((c + 20) / 40 * (len(heights) - 1)) for c in (x, y))
            ground = heights[row - 3 : row + 4, column - 3 : column + 4].max()
        qpos[i, ball : ball + 3] = x, y, ground + model.BALL_RADIUS
        qpos[i, base : base + 3] = qpos[i, ball : ball + 3] + model.BASE_OVER_BALL * rotations[i, :, 2]
        qpos[i, base + 3 : base + 7] = quat
    return qpos, rotations


def ray_depth(model, qpos, rotations, size):
    """Planar depth by `Batch.ray`, clipped to [0, 1] m, and what each ray hit: (n, 2, size, size) each."""
    n = len(qpos)
    batch = mujoco.batch.Batch(model, n, 1)
    batch.bind("qpos")[:] = qpos
    base = model.joint("base").qposadr[0]
    grid = (np.arange(size) + 0.5) / size * 2 - 1
    pixels = np.stack(np.broadcast_arrays(grid, -grid[:, None], -1.0), -1).reshape(-1, 3)  # row 0 on top
    length = np.linalg.norm(pixels, axis=1)  # 1 / cosine to the optical axis
    depth, geoms = np.empty((n, 2, size, size)), np.empty((n, 2, size, size), int)
    for c in (0, 1):
        camera, matrix = model.camera(f"depth_{c}"), np.empty(9)
        assert camera.fovy[0] == 90
        mujoco.mju_quat2Mat(matrix, camera.quat)
        origin = qpos[:, base : base + 3] + rotations @ camera.pos
        rays = (pixels / length[:, None]) @ (rotations @ matrix.reshape(3, 3)).transpose(0, 2, 1)
        distance, geom = batch.ray(origin[:, None], rays, VISIBLE)
        depth[:, c] = np.where(geom >= 0, distance / length, 1).clip(0, 1).reshape(n, size, size)
        geoms[:, c] = geom.reshape(n, size, size)
    return depth, geoms


def depth_errors(depth, expected, geoms, limit=0.001):
    """Median error in m, and the share under `limit` m of the pixels that are not on a silhouette's edge."""

    def neighbours(image):
        padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), "edge")
        return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))

    near, hits = neighbours(expected), neighbours(geoms)
    edge = np.ptp(near, axis=(-1, -2)) > 0.03
    edge |= np.any(hits != geoms[..., None, None], axis=(-1, -2))
    assert edge.mean() < 0.2  # most pixels are compared
    error = np.abs(depth - expected)
    return np.median(error), np.mean(error[~edge] < limit)


@pytest.mark.parametrize("size", [64, 40, 41])
@pytest.mark.parametrize("terrain", ["perlin", "flat"])
def test_depth_is_what_rays_measure(terrain, size):
    terrain = Terrain(terrain, 1)
    model, heights = make_model(terrain), terrain.heights
    qpos, rotations = random_poses(model, heights, 16, np.random.default_rng(size))
    expected, geoms = ray_depth(model, qpos, rotations, size)
    assert {model.geom("ball").id, model.geom("ground").id} <= {*geoms.ravel()}
    base = model.joint("base").qposadr[0]
    position, orientation = qpos[:, base : base + 3], qpos[:, base + 3 : base + 7]
    renderer = DepthRenderer(model, size, heights)
    depth = renderer.render(position, orientation).numpy()
    median, good = depth_errors(depth, expected, geoms)
    assert median < 0.0001 and good >= 0.99  # the issue asks for ten times as much

    # The measure is able to fail at that: 3° more tilt, or an image the wrong way round, shows.
    wrong = np.empty_like(orientation)
    for i in range(len(wrong)):
        mujoco.mju_mulQuat(wrong[i], orientation[i], quaternion([1, 0, 0], math.radians(3)))
    tilted = renderer.render(position, wrong).numpy()
    for bad in (tilted, expected[..., ::-1, :], expected[..., ::-1], expected[:, ::-1]):
        median, good = depth_errors(bad, expected, geoms, limit=0.01)
        assert median > 0.001 and good < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("amplitude", [0.1, 0.2, 0.3, 0.5])
def test_depth_is_of_the_first_crossing_on_high_hills(amplitude):
    terrain = Terrain("perlin", 2, amplitude)
    model, heights = make_model(terrain), terrain.heights
    qpos, rotations = random_poses(model, heights, 24, np.random.default_rng(3))
    expected, geoms = ray_depth(model, qpos, rotations, 64)
    base = model.joint("base").qposadr[0]
    depth = DepthRenderer(model, 64, heights).render(qpos[:, base : base + 3], qpos[:, base + 3 : base + 7]).numpy()
    _, good = depth_errors(depth, expected, geoms, limit=0.01)
    assert good > 0.999


@pytest.mark.parametrize("pitch", [-20, 40])
def test_depth_with_turned_cameras(pitch):
    envs = BallbotVectorEnv(1, terrain_seed=1, camera_pitch=pitch, num_threads=1)
    np.testing.assert_allclose(
        envs.renderer.axes[:, 1, 2], math.sin(math.radians(pitch)), atol=1e-6
    )  # forward, along y
    qpos, rotations = random_poses(envs.model, envs.terrain.heights, 16, np.random.default_rng(0))
    expected, _ = ray_depth(envs.model, qpos, rotations, 64)
    base = envs.model.joint("base").qposadr[0]
    depth = envs.renderer.render(qpos[:, base : base + 3], qpos[:, base + 3 : base + 7]).numpy()
    error = np.abs(depth - expected)
    assert np.median(error) < 0.0001 and np.mean(error < 0.01) > 0.999


@pytest.mark.parametrize(
    "heading, ahead, right", [(0, 1, 0), (math.pi, -1, 0), (-math.pi / 2, 0, -1), (-math.pi / 4, 0.71, -0.71)]
)
@pytest.mark.parametrize("tilt", [(0, 0), (0.15, 0), (0, -0.15)])
def test_height_scan_on_a_ramp(heading, ahead, right, tilt):
    """A ramp of 10° that rises along +y; `ahead` and `right` are the rise per metre in these directions."""
    envs = BallbotVectorEnv(2, "ramp", cameras=False, num_threads=1, height_scan=True)
    obs, _ = envs.reset(seed=0, options=dict(position=[(0.5, 1.0), (-2.0, 1.0)], heading=heading, tilt=tilt))
    slope = math.tan(math.radians(10))
    points = np.array([(x, y) for y in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) for x in (-0.2, -0.1, 0, 0.1, 0.2)])
    expected = slope * (points @ (right, ahead))
    np.testing.assert_allclose(obs["heights"], [expected] * 2, atol=slope * CELL)
    assert np.ptp(obs["heights"]) > 0.03


def test_height_scan_and_slopes_follow_heading_commands_and_the_height_of_the_ground():
    envs = BallbotVectorEnv(20, "ramp", cameras=False, num_threads=1, height_scan=True, goal="command",
                            randomization={"terrain_amplitude": 0.5})  # fmt: skip
    heading = [0.0] * 10 + [-math.pi / 2] * 10
    _, infos = envs.reset(seed=0, options=dict(position=(0.5, 1.0), heading=heading))
    envs.set_command([(0, 0.3)] * 10 + [(0.3, 0)] * 10)
    rise = math.tan(math.radians(10)) * infos["randomization"]["terrain_amplitude"][:, None]
    points = np.array([(x, y) for y in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) for x in (-0.2, -0.1, 0, 0.1, 0.2)])
    expected = rise * np.concatenate([[points[:, 1]] * 10, [-points[:, 0]] * 10])  # along x, +y is to the left
    np.testing.assert_allclose(envs.scan_heights(), expected, atol=rise.max() * CELL)
    np.testing.assert_allclose(envs.slopes()[:, 1::2], np.repeat(rise, 3, 1), atol=0.045)  # by the nearest nodes
    assert rise.max() > 1.5 * rise.min()


def test_depth_of_a_robot_before_a_slope():
    """The fixed-point iteration of an earlier version gave 0.000 m here."""
    envs = BallbotVectorEnv(1, terrain_amplitude=0.3)
    obs, _ = envs.reset(seed=0, options=dict(position=(-3.874, 5.613), tilt=(-0.0837, 0.1532)))
    assert obs["depth_0"][0, 0, 63, 3] == pytest.approx(0.786, abs=0.001)


def test_depth_of_a_moving_robot():
    """Frames of the environment itself: the ball, whose place under the base is assumed, is where rays find it."""
    envs = make(8, "perlin", cameras=True)
    envs.reset(seed=0)
    actions = random_actions(180, 8, 0.2)
    for action in actions:
        obs, *_ = envs.step(action)
    assert envs.new_frames.all() and np.all(obs["relative_image_timestamp"] == 0)
    rotations = geometry.rotation_matrix(envs.robots.quaternion)
    expected, geoms = ray_depth(envs.model, envs.batch.qpos.copy(), rotations, 64)
    depth = np.concatenate([obs["depth_0"], obs["depth_1"]], 1)
    median, good = depth_errors(depth, expected, geoms)
    assert median < 0.0001 and good >= 0.99


def test_observations_stay_in_their_space_when_lying_on_the_ground():
    for terrain in ("flat", "perlin"):
        envs = make(2, terrain, cameras=True, max_tilt=85.0, camera_size=16)
        envs.reset(seed=0)
        falls = 0
        for _ in range(800):
            infos = envs.step(np.full((2, 3), [0.3, 0, 0]))[4]
            for final in infos.get("final_obs", ()):
                if final is not None:
                    falls += 1
                    assert envs.single_observation_space.contains(final)
        assert falls >= 2


@pytest.mark.parametrize("rate, interval", [(90, 6), (500, 1), (250, 2), (30, 17), (1000, 1)])
def test_new_frames_come_at_the_cameras_rate(rate, interval):
    envs = make(2, cameras=True, camera_rate=rate, camera_size=16, copy=False)
    obs, _ = envs.reset(seed=0)
    assert np.all(obs["relative_image_timestamp"] == 0) and envs.new_frames.all()
    before, held = copy_obs(obs), obs
    for step in range(1, 3 * interval + 8):
        obs, *_ = envs.step(np.zeros((2, 3)))
        age = np.full((2, 1), step % interval * 0.002, np.float32)
        np.testing.assert_array_almost_equal_nulp(obs["relative_image_timestamp"], age, 1)
        assert envs.new_frames.tolist() == [step % interval == 0] * 2
        assert obs["relative_image_timestamp"] in envs.observation_space["relative_image_timestamp"]
        for key in ("depth_0", "depth_1"):
            assert np.shares_memory(obs[key], held[key])  # a held frame is not copied
            assert not obs[key].flags.writeable
            changed = [not np.array_equal(a, b) for a, b in zip(obs[key], before[key])]
            assert changed == [step % interval == 0] * 2
        before, held = copy_obs(obs), obs


def test_the_cameras_clock_runs_on_through_resets():
    envs = make(1, cameras=True, max_episode_steps=8, camera_size=16)
    envs.reset(seed=0)

    def ages(steps):
        return [round(envs.step(np.zeros((1, 3)))[0]["relative_image_timestamp"].item() * 500) for _ in range(steps)]

    # Frames are due at 6, 12, 18, ...; the resets at 8, 16, 24 take one each.
    assert ages(26) == [1, 2, 3, 4, 5, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    obs, _ = envs.reset()  # at 26
    assert obs["relative_image_timestamp"] == 0 and ages(5) == [1, 2, 3, 0, 1]
    envs.reset(seed=1)
    assert ages(7) == [1, 2, 3, 4, 5, 0, 1]


# Dynamics, reward, ends of episodes


def test_a_step_is_one_step_of_mujoco():
    envs = make(2)
    envs.reset(seed=0)
    model = envs.model
    base, wheels = model.joint("base"), [model.joint(f"wheel_{i}").dofadr[0] for i in range(3)]
    data = mujoco.MjData(model)
    data.qpos[:] = envs.batch.qpos[1]
    actions = random_actions(200, 2, 1.5)
    assert np.abs(actions).max() > 1
    for action in actions:
        obs, _, terminations, _, infos = envs.step(action)
        for i in range(3):
            data.actuator(f"motor_{i}").ctrl = -10 * np.clip(action[1, i], -1, 1)
        mujoco.mj_step(model, data)
        if terminations[1]:
            obs = {key: infos["final_obs"][1][key][None].repeat(2, 0) for key in obs}
        address, dof = base.qposadr[0], base.dofadr[0]
        rotation = np.empty(3)
        mujoco.mju_quat2Vel(rotation, data.qpos[address + 3 : address + 7], 1)
        expected = {
            "orientation": rotation,
            "vel": np.clip(data.qvel[dof : dof + 3], -2, 2),
            "angular_vel": np.clip(data.qvel[dof + 3 : dof + 6], -2, 2),
            "motor_state": np.clip(data.qvel[wheels] / 10, -5, 5),
            "actions": np.clip(action[1], -1, 1),
        }
        for key, value in expected.items():
            np.testing.assert_allclose(obs[key][1], value, rtol=1e-5, atol=1e-6, err_msg=key)
        if terminations[1]:
            break
    assert np.abs(data.qvel[wheels]).max() > 1


def test_orientation_is_the_shortest_rotation():
    envs = make(4)
    envs.reset(seed=0)
    for i, angle in enumerate((3.0, 3.2, -3.0, 7.0)):  # beyond π the quaternion's w is negative
        envs.robots.quaternion[i] = quaternion([0, 0, 1], angle)
    orientation = envs.step(np.zeros((4, 3)))[0]["orientation"]
    expected = np.zeros((4, 3))
    expected[:, 2] = 3.0, 3.2 - 2 * np.pi, -3.0, 7.0 - 2 * np.pi
    np.testing.assert_allclose(orientation, expected, atol=1e-3)


@pytest.mark.parametrize("copied", [True, False])
def test_observations_can_be_kept(copied):
    """All outlives the next step, but for the frames with `copy=False`, which are views."""
    kwargs = dict(cameras=True, camera_size=16, max_episode_steps=10)
    envs = make(2, **kwargs) if copied else make(2, copy=False, **kwargs)
    kept = [envs.reset(seed=0)]
    kept += [envs.step(action) for action in random_actions(12, 2, 1.0)]
    kept = [(*returned[:-1], dict(returned[-1])) for returned in kept]
    for returned in kept if not copied else ():
        for key in ("depth_0", "depth_1"):
            returned[0].pop(key)
    then = [copy.deepcopy(returned) for returned in kept]
    for action in random_actions(12, 2, 1.0, seed=1):
        envs.step(action)
    assert_same(*(dict(enumerate(dict(enumerate(r)) for r in returned)) for returned in (kept, then)))


REWARDS = [{}, {"goal": (1, 0)}, {"goal": (-3, 4), "forward_reward_weight": 0.5, "ctrl_cost_weight": 0.1},
           {"healthy_reward": 1.0, "forward_reward_weight": 0.0}]  # fmt: skip


@pytest.mark.parametrize("kwargs", REWARDS)
def test_reward(kwargs):
    envs = make(3, max_tilt=5.0, **kwargs)
    envs.reset(seed=0)
    goal = np.array(kwargs.get("goal", (0, 1)), float)
    goal /= np.linalg.norm(goal)
    forward, healthy = kwargs.get("forward_reward_weight", 0.01), kwargs.get("healthy_reward", 0.02)
    ctrl = kwargs.get("ctrl_cost_weight", 0.0001)
    falls, fast = 0, 0
    for step, action in enumerate(random_actions(300, 3, 1.2)):
        if step == 100:
            envs.robots.velocities[0] = 3, 4, 0  # beyond what is observed
        obs, rewards, terminations, truncations, infos = envs.step(action)
        obs = copy_obs(obs)
        for i in np.flatnonzero(terminations):
            for key in obs:
                obs[key][i] = infos["final_obs"][i][key]
        falls += terminations.sum()
        fast += np.all(obs["vel"][0, :2] == 2)
        effort = np.sum(np.clip(action, -1, 1).astype(float) ** 2, 1)
        terms = forward * obs["vel"][:, :2] @ goal, -ctrl * effort, healthy * ~terminations
        np.testing.assert_allclose(rewards, sum(terms), rtol=0, atol=1e-6 * max(forward, ctrl, 0.01))
        ended = terminations | truncations
        for key, expected in zip(("reward_forward", "reward_ctrl", "reward_healthy"), terms):
            final = infos["final_info"][key] if ended.any() else 0
            np.testing.assert_allclose(
                np.where(ended, final, infos.get(key, 0)), expected, atol=1e-6 * max(forward, 0.01)
            )
    assert falls > 0 and fast > 0


@pytest.mark.slow
@pytest.mark.parametrize("frame_skip", [2, 4, 7])
def test_frame_skip_is_the_action_repeated(frame_skip):
    """Bit for bit, frames and the reward's terms included, to the physics step at which the episode ends."""
    kwargs, limit = dict(max_tilt=8.0, camera_size=16), 340 // frame_skip  # actions
    holding = BallbotEnv(frame_skip=frame_skip, max_episode_steps=limit, **kwargs)
    single = BallbotEnv(max_episode_steps=limit * frame_skip, **kwargs)
    rng, ends = np.random.default_rng(0), []
    for episode in range(4):
        obs, _ = holding.reset(seed=episode)
        assert_same(obs, single.reset(seed=episode)[0])
        terminated = truncated = False
        while not (terminated or truncated):
            action = rng.uniform(-1, 1, 3) * (0.3 if episode else 0)
            obs, reward, *end, info = holding.step(action)
            total = dict.fromkeys(("reward", "reward_forward", "reward_ctrl", "reward_healthy"), 0.0)
            for _ in range(frame_skip):
                expected, step_reward, terminated, truncated, step_info = single.step(action)
                for key, value in (step_info | {"reward": step_reward}).items():
                    if key in total:
                        total[key] += value
                if terminated or truncated:
                    break
            assert_same(obs, expected)
            assert end == [terminated, truncated]
            for key, value in (info | {"reward": reward}).items():
                if key in total:
                    assert value == pytest.approx(total[key], abs=1e-12), key
        length = int(single.get_state()["_steps"])
        ends.append((terminated, length))
        assert holding.get_state()["_steps"] == length  # in physics steps
    assert (False, limit * frame_skip) in ends and any(terminated for terminated, _ in ends), ends


def test_many_with_frame_skip_are_the_single_ones():
    n, kwargs = 3, dict(SHORT, frame_skip=4, max_episode_steps=25, camera_size=16)
    many, singles = BallbotVectorEnv(n, num_threads=1, **kwargs), [BallbotEnv(**kwargs) for _ in range(n)]
    obs, _ = many.reset(seed=0)
    starts = [single.reset(seed=i)[0] for i, single in enumerate(singles)]
    assert_same(obs, {key: np.stack([start[key] for start in starts]) for key in obs})
    lengths = []
    for actions in random_actions(150, n, 0.3):
        obs, rewards, terminations, truncations, infos = many.step(actions)
        for i, single in enumerate(singles):
            obs_i, reward, terminated, truncated, _ = single.step(actions[i])
            assert (reward, terminated, truncated) == (rewards[i], terminations[i], truncations[i])
            if terminated or truncated:
                lengths.append(int(infos["episode"]["l"][i]))
                assert lengths[-1] == single.get_state()["_steps"]
                assert_same(infos["final_obs"][i], obs_i)
                obs_i, _ = single.reset()
            assert_same({key: value[i] for key, value in obs.items()}, obs_i)
    assert any(length % 4 for length in lengths) and 100 in lengths, lengths


@pytest.mark.parametrize("limit", [3, 1000, 5000, -1, None])
def test_max_episode_steps_counts_actions_everywhere(limit):
    kwargs = dict(terrain="flat", cameras=False, frame_skip=4, max_episode_steps=limit)
    single = gym.make("Ballbot-v0", **kwargs)
    modes = ("vector_entry_point", "sync") + ("async",) * (limit == 3)
    ours, sync, *others = (gym.make_vec("Ballbot-v0", vectorization_mode=mode, **kwargs) for mode in modes)
    last = 4000 if limit is None else limit
    assert single.spec.max_episode_steps == ours.spec.max_episode_steps == (None if limit == -1 else last)
    environments = [single, ours, sync, *others]
    for env in environments:
        env.reset(seed=0)
    begin = 10**6 if limit == -1 else last - 3
    for env in (single, sync.envs[0], ours):
        skip_to(env, begin, frame_skip=4)
    for step in (1, 2, 3):
        truncated = [bool(env.step(np.zeros(env.action_space.shape, np.float32))[3]) for env in environments]
        assert truncated == [step == 3 and limit != -1] * len(environments)
    for env in environments:
        env.close()


@pytest.mark.parametrize("frame_skip, fps", [(1, 500), (4, 125), (300, 5 / 3), (1000, 0.5), (2500, 0.2)])
def test_render_fps_is_the_rate_of_actions(frame_skip, fps):
    for environment in (BallbotEnv, BallbotVectorEnv):
        rate = environment(terrain="flat", cameras=False, frame_skip=frame_skip).metadata["render_fps"]
        assert rate == pytest.approx(fps) and type(rate) is type(fps)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda env: pickle.loads(pickle.dumps(env))}


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make_env", [gym.make, gym.make_vec])
def test_a_copy_continues_bit_for_bit(make_env, copy_of):
    randomization = {"push": 2.0, "push_interval": 0.1, "obs_noise": 0.01, "mass": 0.2, "latency": 3}
    env = make_env("Ballbot-v0", max_tilt=4.0, max_episode_steps=40, frame_skip=2, camera_size=16, num_threads=1,
                   randomization=randomization, **{"num_envs": 2} if make_env is gym.make_vec else {})  # fmt: skip
    ends = 0

    def play(env, steps):
        nonlocal ends
        rng, results = np.random.default_rng(steps), []
        for _ in range(steps):
            obs, rewards, terminations, truncations, _ = env.step(rng.uniform(-0.5, 0.5, env.action_space.shape))
            ends += np.sum(terminations | truncations)
            if env is not env.unwrapped and (terminations or truncations):
                obs, _ = env.reset()
            results.append(obs | {"reward": rewards, "terminated": terminations, "truncated": truncations})
        return dict(enumerate(results))

    again = copy_of(env)  # before the first reset
    assert again.spec == env.spec
    assert_same(env.reset(seed=3)[0], again.reset(seed=3)[0])
    for steps in (25, 150):
        assert_same(play(env, steps), play(again, steps))
        again = copy_of(env)
        assert_same(env.action_space.sample(), again.action_space.sample())
    state, actions = env.unwrapped.get_state(), env.action_space.sample()
    other = BallbotEnv(**env.spec.kwargs) if make_env is gym.make else copy_of(env)
    other.reset(seed=9)
    other.set_state(state)
    for _ in range(2):
        assert_same(env.unwrapped.step(actions)[0], other.step(actions)[0])
        assert_same(env.unwrapped.reset()[0], other.reset()[0])
    assert ends > 4, ends


def test_a_copy_of_a_subclass():
    class Heavy(BallbotVectorEnv):
        def __init__(self, name):
            super().__init__(2, "flat", cameras=False)
            self.name = name

    again = copy.deepcopy(Heavy("x"))
    assert (type(again), again.name, again.num_envs) == (Heavy, "x", 2)


def test_goal_changes_the_reward_alone():
    a, b = make(2, max_tilt=5.0), make(2, max_tilt=5.0, goal=np.array([1.0, 0.0]))
    a.reset(seed=0), b.reset(seed=0)
    for action in random_actions(50, 2, 0.5):
        obs, rewards, *_ = a.step(action)
        obs_b, rewards_b, *_ = b.step(action)
        assert_same(obs, obs_b)
    assert np.all(np.abs(rewards - rewards_b) > 1e-5)


def test_commands_are_sampled_and_set():
    envs = make(2000, goal="command", frame_skip=4)
    obs, _ = envs.reset(seed=0)
    first = obs["command"]
    np.testing.assert_allclose(np.quantile(envs.get_state()["commands_due"], [0, 0.5, 1]), [1, 1000, 2000], atol=70)
    speed = np.linalg.norm(first, axis=1)
    assert (speed == 0).mean() == pytest.approx(0.2, abs=0.03) and 0.59 < speed.max() <= 0.6 + 1e-6
    assert speed[speed > 0].mean() == pytest.approx(0.3, abs=0.02) and np.abs(first.mean(0)).max() < 0.03
    envs = make(3, goal="command", frame_skip=4)
    singles = [BallbotEnv("flat", cameras=False, goal="command", frame_skip=4) for _ in range(3)]
    obs, _ = envs.reset(seed=7)
    starts = [single.reset(seed=7 + i)[0] for i, single in enumerate(singles)]
    for env in (envs, *singles):
        change_state(env, commands_due=13)  # the next are sampled after the 4th action
    wanted = np.stack([start["command"] for start in starts])
    for step in range(10):
        if step == 2:  # one of them is set
            envs.set_command(np.stack([envs.commands[0], [0.1, -0.7], envs.commands[2]]))
            change_state(envs, commands_due=[13, np.iinfo(int).max, 13])
            singles[1].set_command((0.1, -0.7))
            wanted[1] = 0.1, -0.7
        obs, rewards, *_, infos = envs.step(np.full((3, 3), 0.1))
        for i, single in enumerate(singles):
            obs_i, reward, *_ = single.step(np.full(3, 0.1))
            assert_same({key: value[i] for key, value in obs.items()}, obs_i)
            assert reward == rewards[i]
        gained = np.square(wanted).sum(1) - np.square(obs["vel"][:, :2] - wanted).sum(1)
        np.testing.assert_allclose(infos["reward_forward"], 4 * 0.08 * gained, atol=2e-3)  # 4 steps, of which 1 is seen
        changed = (obs["command"] != wanted.astype(np.float32)).any(1)
        assert changed.tolist() == ([True, False, True] if step == 3 else [False] * 3), step
        wanted = obs["command"]
    assert envs.get_state()["commands_due"].tolist() == [2013, np.iinfo(int).max, 2013]
    envs.reset()
    assert envs.get_state()["commands_due"].max() <= 2000
    for env, good in ((envs, np.zeros((3, 2))), (singles[0], np.zeros(2))):
        for bad in (np.zeros(3), good + 3, good + np.nan):
            with pytest.raises(ValueError, match=r"expected|give x and y from -2 to 2 m/s"):
                env.set_command(bad)
    with pytest.raises(ValueError, match=r'needs the goal "command"'):
        make().set_command(np.zeros((3, 2)))


@pytest.mark.parametrize("kwargs", [{}, {"max_tilt": 5.0}])
def test_episodes_terminate_at_max_tilt_and_not_before(kwargs):
    limit = kwargs.get("max_tilt", 20.0)
    envs = make(3, "perlin", **kwargs)
    obs, _ = envs.reset(seed=0)
    seen = 0
    for action in random_actions(700, 3, 0.2):
        obs, _, terminations, truncations, infos = envs.step(action)
        assert np.all(tilt_of(obs) <= limit + 1e-3) and not truncations.any()
        for i in np.flatnonzero(terminations):
            seen += 1
            assert limit - 1e-3 < tilt_of(infos["final_obs"][i])[0] < limit + 1
    assert seen >= 2

    # The tilt counts, whatever its direction, and the heading does not
    envs = make(8, **kwargs)
    for excess, expected in ((-0.2, False), (0.2, True)):
        envs.reset(seed=0)
        for i in range(8):
            angle = i * np.pi / 4
            lean = quaternion([math.cos(angle), math.sin(angle), 0], math.radians(limit + excess))
            mujoco.mju_mulQuat(envs.robots.quaternion[i], lean, quaternion([0, 0, 1], i))
        assert np.all(envs.step(np.zeros((8, 3)))[2] == expected)


def test_episodes_are_truncated_near_the_edge():
    for beyond in (False, True):
        envs = make(4)
        envs.reset(seed=0)
        sides = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * (19.001 if beyond else 18.999)
        envs.robots.position[:, :2] = envs.robots.ball_position[:, :2] = sides
        _, rewards, terminations, truncations, infos = envs.step(np.zeros((4, 3)))
        assert not terminations.any() and np.all(truncations == beyond)
        assert np.all(rewards > 0.01)  # alive
        if beyond:
            np.testing.assert_allclose(infos["final_info"]["position"][:, :2], sides, atol=1e-3)
            assert np.all(np.abs(infos["position"][:, :2]) <= 10)
    envs.robots.position[0, 0] = envs.robots.ball_position[0, 0] = 19.5
    envs.robots.quaternion[0] = quaternion([1, 0, 0], 0.5)
    _, _, terminations, truncations, _ = envs.step(np.zeros((4, 3)))
    assert terminations[0] and not truncations[0]  # a fall is a fall, there too


@pytest.mark.parametrize("limit", [100, None, 10000])
def test_episodes_are_truncated_at_max_episode_steps(limit):
    kwargs = dict(terrain="flat", cameras=False) | ({} if limit is None else {"max_episode_steps": limit})
    single, many = gym.make("Ballbot-v0", **kwargs), gym.make_vec("Ballbot-v0", num_envs=2, num_threads=1, **kwargs)
    single.reset(seed=0), many.reset(seed=0)
    last = limit or 4000
    for begin in (0, 3990):  # the 4000 of the registration must not act beside another limit
        if begin > last:
            break
        if begin:
            skip_to(single, begin), skip_to(many, begin)
        for step in range(begin + 1, begin + 101):
            _, _, terminated, truncated, _ = single.step(np.zeros(3))
            _, _, terminations, truncations, _ = many.step(np.zeros((2, 3)))
            assert not terminated and not terminations.any()
            assert truncated == (step == last) and np.all(truncations == (step == last))
            if step == last:
                break


def test_the_class_alone_has_no_limit():
    env = BallbotEnv("flat", cameras=False)
    env.reset(seed=0)
    skip_to(env, 3999)
    for _ in range(3):
        assert not env.step(np.zeros(3))[3]


@pytest.mark.parametrize("damping, speed", [(0.4, 25.0), (0.8, 12.5)])
def test_wheel_damping_sets_the_top_speed(damping, speed):
    envs = make(1, wheel_damping=damping)
    envs.reset(seed=0)
    envs.robots.position[0, 2] = 50.0  # in the air nothing else brakes the wheels
    for _ in range(300):
        assert not envs.step(np.full((1, 3), -1.0))[2].any()
    np.testing.assert_allclose(envs.robots.wheel_speeds[0], speed, rtol=0.02)


def test_arguments_change_the_model():
    assert make(1, "perlin", terrain_amplitude=0.02).model.hfield_size[0, 2] == 0.02
    assert make(1, cameras=True, camera_size=20).observation_space["depth_1"].shape == (1, 1, 20, 20)


# Physics that fails


def fail_in_simulation(envs, monkeypatch):
    """As MuJoCo does when it raises in simulation 1: that one is not stepped, the others are."""
    rollout = envs.batch.rollout

    def failing(nstep, record, out, control=None):
        monkeypatch.setattr(envs.batch, "rollout", rollout)
        others = np.array([0, 2])
        for key, value in rollout(nstep, record=record, ids=others).items():
            out[key][others] = value
        raise mujoco.batch.SimulationError(np.array([1]), "made to fail", 3)

    monkeypatch.setattr(envs.batch, "rollout", failing)


@pytest.mark.parametrize("failure", ["nan qpos", "nan qvel", "inf qvel", "huge qvel", "nan action", "error"])
def test_failing_physics_ends_one_episode_and_no_other(failure, monkeypatch):
    undisturbed, envs = (make(3, "perlin", cameras=True, camera_size=16) for _ in range(2))
    undisturbed.reset(seed=0), envs.reset(seed=0)
    others = [0, 2]
    for step, action in enumerate(random_actions(80, 3, 0.2)):
        expected = undisturbed.step(action)
        if step == 29:  # a new frame is due
            match failure.split():
                case ["nan", "qpos"]:
                    envs.batch.qpos[1, 3] = np.nan
                case ["nan", "qvel"]:
                    envs.batch.qvel[1] = np.nan
                case ["inf", "qvel"]:
                    envs.batch.qvel[1, 7] = np.inf
                case ["huge", "qvel"]:
                    envs.batch.qvel[1, 0] = 1e12
                case ["nan", "action"]:
                    action = action.copy()
                    action[1, 2] = np.nan
                case ["error"]:
                    fail_in_simulation(envs, monkeypatch)
        obs, rewards, terminations, truncations, infos = envs.step(action)
        assert terminations.tolist() == [False, step == 29, False] and not truncations.any()
        assert infos["physics_errors"].tolist() == [0, int(step >= 29), 0]
        assert np.all(np.isfinite(rewards)) and all(np.all(np.isfinite(value)) for value in obs.values())
        assert envs.observation_space.contains(copy_obs(obs))
        if step == 29:
            assert envs.single_observation_space.contains(infos["final_obs"][1])
            assert infos["final_info"]["physics_errors"].tolist() == [0, 1, 0]
            assert infos["final_info"]["position"][1].tolist() == [0, 0, 0.24]  # the initial pose stands in
            assert infos["episode"]["l"].tolist() == [0, 30, 0] and np.isfinite(infos["episode"]["r"]).all()
        for key, value in expected[0].items():
            assert_same(value[others], obs[key][others], key)
        assert_same(expected[1][others], rewards[others])
        assert_same(expected[4]["position"][others], infos["position"][others])


@pytest.mark.slow
def test_physics_does_not_fail_by_itself():
    envs = make(32, "perlin", max_tilt=80.0)
    envs.reset(seed=0)
    actions = random_actions(600, 32, 1.5)
    actions[:, :8] = np.sign(actions[:, :8])
    falls = sum(envs.step(action)[2].sum() for action in actions)
    assert falls > 16 and not envs.physics_errors.any()


def test_failing_physics_of_a_single_environment():
    env = gym.make("Ballbot-v0", terrain="flat", cameras=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0)
        obs, reward, terminated, truncated, info = env.step(np.array([0, np.nan, 0], np.float32))
        assert terminated and not truncated and info["physics_errors"] == 1
        assert env.observation_space.contains(obs) and np.isfinite(reward)
        obs, info = env.reset()
        assert not env.step(np.zeros(3, np.float32))[2]


# What is wrong is said in one line

BAD = [
    (dict(terrain="perlim"), r"terrain is 'perlim': give flat, perlin"),
    (dict(terrain="moon"), r"terrain is 'moon': give flat, perlin"),
    (dict(terrain_seed=-1), "terrain_seed is -1"),
    (dict(terrain_seed=0.5), "terrain_seed is 0.5"),
    (dict(terrain_amplitude=0), "terrain_amplitude is 0"),
    (dict(camera_size=7), "camera_size is 7"),
    (dict(camera_rate=-1), "camera_rate is -1"),
    (dict(camera_rate=0), "camera_rate is 0"),
    (dict(wheel_damping=-1), "wheel_damping is -1"),
    (dict(wheel_damping=math.nan), "wheel_damping is nan"),
    (dict(max_episode_steps=-2), "max_episode_steps is -2: give a whole number from 1 on, or -1 for no limit"),
    (dict(frame_skip=0), "frame_skip is 0: give a whole number from 1 on"),
    (dict(frame_skip=2.5), r"frame_skip is 2\.5"),
    (dict(max_tilt=100), "max_tilt is 100: give an angle between 0 and 90 degrees"),
    (dict(max_tilt=0), "max_tilt is 0"),
    (dict(goal=(0, 0)), r"goal is \(0, 0\)"),
    (dict(goal=(1, 2, 3)), r"goal is \(1, 2, 3\)"),
    (dict(goal=None), "goal is None"),
    (dict(goal="forward"), "goal is 'forward': give a direction .* or \"command\""),
    (dict(healthy_reward="much"), "healthy_reward is 'much'"),
    (dict(num_threads=-1), "num_threads is -1"),
    (dict(device="gpu"), "device is 'gpu': give a device that PyTorch finds here"),
    (dict(render_mode="ascii"), "render_mode is 'ascii'"),
]


@pytest.mark.parametrize("kwargs, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments(kwargs, message):
    for environment in (BallbotEnv, BallbotVectorEnv):
        with pytest.raises(ValueError, match=message) as caught:
            environment(**kwargs)
        assert len(str(caught.value).splitlines()) == 1


BAD_FOR_MANY = [
    (dict(num_envs=0), "num_envs is 0"),
    (dict(num_envs=2.0), r"num_envs is 2\.0"),
    (dict(max_episode_steps=0), "max_episode_steps is 0"),
]


@pytest.mark.parametrize("kwargs, message", BAD_FOR_MANY)
def test_bad_arguments_of_many(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BallbotVectorEnv(**kwargs)


def test_unknown_argument():
    for environment in (BallbotEnv, BallbotVectorEnv):
        with pytest.raises(TypeError, match="'wheel_dampin'"):
            environment(wheel_dampin=0.8)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2), (3, 3, 1), ()])
def test_wrong_shape_of_actions(shape):
    envs = make(3)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected \(3, 3\)"):
        envs.step(np.zeros(shape))
    if shape != (3,):
        env = BallbotEnv("flat", cameras=False)
        env.reset(seed=0)
        with pytest.raises(ValueError, match=r"expected \(3,\)"):
            env.step(np.zeros(shape))


def test_bad_resets():
    bad = {"x": 1, "position": (0, 19.1), "heading": "north", "tilt": (0.3, 0.3), "velocity": (1, np.inf)}
    for env in (make(), BallbotEnv("flat", cameras=False)):
        for name, value in bad.items():
            with pytest.raises(ValueError, match="has no option 'x'" if name == "x" else f"^{name} is") as caught:
                env.reset(seed=0, options={name: value})
            assert len(str(caught.value).splitlines()) == 1
        env.reset(seed=0, options={})
    with pytest.raises(ValueError, match=r"of shape \(2,\) or \(3, 2\)") as caught:
        make().reset(options={"position": np.zeros((2, 2))})
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="2 seeds for 3 environments"):
        make().reset(seed=[1, 2])


def test_missing_assets(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "ASSETS", tmp_path / "assets")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "assets" / "ballbot.xml"))):
        make()
