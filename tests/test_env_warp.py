"""BallbotWarp-v0 on Warp's CPU device, which runs the same kernels as a GPU."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import ballbot_env  # noqa: F401, registers the environments
from ballbot_utils.model import BALL_START
from ballbot_utils.terrain import CELL, START_SLOPE, cell_slopes

pytestmark = pytest.mark.slow  # Warp compiles its kernels for half a minute
STARTS = dict(position=(1.0, -2.0), heading=0.3, tilt=(0.05, -0.02), velocity=(0.1, 0.2))


def make(num_envs, **kwargs):
    return gym.make_vec("BallbotWarp-v0", num_envs=num_envs, device="cpu", **dict(cameras=False) | kwargs)


def make_both(num_envs, **kwargs):
    return make(num_envs, **kwargs), gym.make_vec("Ballbot-v0", num_envs=num_envs, **dict(cameras=False) | kwargs)


def differences(obs, expected):
    return {key: np.abs(obs[key].numpy() - expected[key]).max() for key in expected}


def settle(warp, cpu, actions):
    """Both environments with robots that stand: Warp's get the states of MuJoCo's."""
    cpu.reset(seed=0)
    warp.reset(seed=0)
    for _ in range(actions):
        cpu.step(np.zeros((cpu.num_envs, 3)))
    state = warp.get_state()
    for name in ("qpos", "qvel"):
        state[name] = torch.tensor(getattr(cpu.batch, name), dtype=torch.float32)
    warp.set_state(state)


def drive_both(warp, cpu, actions, scale):
    """The largest differences of velocities after each action."""
    rng, worst = np.random.default_rng(1), []
    for _ in range(actions):
        action = rng.uniform(-scale, scale, (cpu.num_envs, 3)).astype(np.float32)
        (obs, *_), (expected, *_) = warp.step(torch.tensor(action)), cpu.step(action)
        difference = differences(obs, expected)
        worst.append(max(difference["vel"], difference["angular_vel"], difference["motor_state"]))
    return worst


def test_physics_agree_with_mujoco_on_flat_ground():
    warp, cpu = make_both(8, terrain="flat")
    settle(warp, cpu, 75)
    worst = drive_both(warp, cpu, 20, scale=0.3)
    assert 0 < max(worst[:10]) < 1e-4 and max(worst) < 1e-3


def test_physics_agree_with_mujoco_in_the_drop_onto_hills_and_nearly_on_them():
    warp, cpu = make_both(8)
    (obs, _), (expected, _) = (envs.reset(seed=0, options=STARTS) for envs in (warp, cpu))
    assert max(differences(obs, expected).values()) < 1e-6
    assert max(drive_both(warp, cpu, 20, scale=0.3)) < 1e-4  # it still falls
    settle(warp, cpu, 75)
    assert max(drive_both(warp, cpu, 20, scale=0.3)) < 0.15  # Warp keeps four contacts with a height field at most


@pytest.mark.parametrize("kwargs", [
    {}, dict(goal=(1.0, 1.0), forward_reward_weight=0.5, ctrl_cost_weight=0.1, healthy_reward=1.0),
], ids=["defaults", "weights"])  # fmt: skip
def test_rewards_terms_slopes_and_truncation_agree_with_the_cpu_version(kwargs):
    warp, cpu = make_both(3, frame_skip=2, max_episode_steps=8, **kwargs)
    for envs in (warp, cpu):
        envs.reset(seed=0, options=STARTS)
    rng = np.random.default_rng(0)
    for step in range(1, 9):
        action = rng.uniform(-1.5, 1.5, (3, 3)).astype(np.float32)
        obs, rewards, terminations, truncations, infos = warp.step(torch.tensor(action))
        _, expected, _, expected_truncations, expected_infos = cpu.step(action)
        np.testing.assert_allclose(rewards, expected, atol=1e-5)
        assert not terminations.any() and truncations.tolist() == expected_truncations.tolist() == [step == 8] * 3
        if step < 8:
            np.testing.assert_allclose(warp.slopes(), cpu.slopes(), atol=2e-2)  # they jump between nodes
            for name in ("reward_forward", "reward_ctrl", "reward_healthy"):
                np.testing.assert_allclose(infos[name], expected_infos[name], atol=1e-5)
    episode = expected_infos["episode"]
    assert infos["episode"]["l"].tolist() == episode["l"].tolist() == [16] * 3
    np.testing.assert_allclose(infos["episode"]["r"], episode["r"], atol=1e-4)
    for key, value in expected_infos["final_obs"][0].items():
        np.testing.assert_allclose(infos["final_obs"][key][0], value, atol=1e-4)
    assert (obs["actions"] == 0).all() and (
        warp.robots.position[:, :2] - torch.tensor(STARTS["position"])
    ).abs().min() > 1e-3


def test_an_episode_ends_in_the_physics_step_in_which_the_robot_falls():
    warp, cpu = make_both(2, frame_skip=4, terrain="flat")
    for envs in (warp, cpu):
        envs.reset(seed=0, options=dict(tilt=(math.radians(19), 0)))
    for _ in range(200):
        _, rewards, terminations, _, infos = warp.step(torch.zeros(2, 3))
        _, expected, expected_terminations, _, expected_infos = cpu.step(np.zeros((2, 3)))
        assert terminations.tolist() == expected_terminations.tolist()
        np.testing.assert_allclose(rewards, expected, atol=1e-4)
        if terminations.any():
            break
    assert infos["episode"]["l"].tolist() == expected_infos["episode"]["l"].tolist() and infos["episode"]["l"][0] % 4


def test_failed_physics_end_the_episode_as_on_the_cpu():
    warp, cpu = make_both(4, terrain="flat")
    actions = np.zeros((4, 3), np.float32)
    actions[1], actions[2] = np.inf, np.nan  # the first is clipped
    for envs in (warp, cpu):
        envs.reset(seed=0, options=dict(position=(1.0, -2.0)))
        (warp.robots._qpos if envs is warp else cpu.batch.qpos)[3] = math.nan
        _, _, terminations, _, infos = envs.step(torch.tensor(actions) if envs is warp else actions)
        assert terminations.tolist() == [False, False, True, True]
        assert infos["physics_errors"].tolist() == [0, 0, 1, 1]
        start = [(0, 0, 0.24)] * 2  # the initial pose
        np.testing.assert_allclose(infos["final_info"]["position"][2:], start, atol=1e-6)


def test_robots_near_the_edge_are_truncated():
    warp = make(2, terrain="flat")
    warp.reset(seed=0, options=dict(position=[(0, 0), (18.999, 0)], velocity=(1.0, 0)))
    _, _, terminations, truncations, _ = warp.step(torch.zeros(2, 3))
    assert truncations.tolist() == [False, True] and not terminations.any()


def test_frames_agree_with_the_cpu_renderer():
    kwargs = dict(cameras=True, camera_size=32, terrain_amplitude=0.2)
    warp, cpu = make_both(16, **kwargs)
    rng = np.random.default_rng(0)
    options = dict(
        position=rng.uniform(-9, 9, (16, 2)), tilt=rng.uniform(-0.2, 0.2, (16, 2)), heading=rng.uniform(-3, 3, 16)
    )
    (obs, _), (expected, _) = (envs.reset(seed=0, options=options) for envs in (warp, cpu))
    for step in range(7):
        for key in ("depth_0", "depth_1"):
            difference = np.abs(obs[key].numpy() - expected[key])
            assert np.median(difference) < 1e-4 and (difference > 0.01).mean() < 0.005
        np.testing.assert_allclose(obs["relative_image_timestamp"], expected["relative_image_timestamp"], atol=1e-6)
        (obs, *_), (expected, *_) = warp.step(torch.zeros(16, 3)), cpu.step(np.zeros((16, 3)))


def test_each_robot_has_its_own_seed():
    warp, pair = make(4), make(2)
    warp.reset(seed=[5, 6, 7, 8])
    pair.reset(seed=[8, 6])
    assert (
        torch.equal(warp.robots.position[[3, 1]], pair.robots.position) and len(warp.robots.position.unique(dim=0)) == 4
    )
    before = warp.robots.position.clone()
    warp.reset(seed=5, options={"reset_mask": np.array([True, False, False, False])})
    assert torch.equal(warp.robots.position, before)
    warp.reset(options={"reset_mask": np.array([True, False, False, False])})
    assert (warp.robots.position == before).all(1).tolist() == [False, True, True, True]


def test_starts_are_uniform_and_just_above_the_ground():
    warp = make(2000)
    warp.reset(seed=0)
    place = warp.robots.ball_position
    assert abs(place[:, :2].mean()) < 0.4 and 9.9 < place[:, :2].abs().max() <= 10
    for i in range(20):
        ground = warp.terrain.max_height(*place[i, :2].double().tolist(), 0.09)
        assert place[i, 2].item() == pytest.approx(ground + BALL_START, abs=1e-6)


def test_a_copy_of_the_state_continues_bit_for_bit():
    strengths = dict(push=1.0, latency=3, obs_noise=0.01, mass=0.1, terrain_amplitude=0.5, push_interval=0.1)
    task = dict(
        frame_skip=4, cameras=True, camera_size=16, goal="command", randomization=strengths, max_episode_steps=6
    )
    first, second, generator = make(3, **task), make(3, **task), torch.Generator().manual_seed(0)
    first.reset(seed=3)
    actions = torch.rand(14, 3, 3, generator=generator) - 0.5
    for action in actions[:4]:
        first.step(action)
    second.set_state(first.get_state())
    for action in actions[4:]:
        (a, reward, *_), (b, same_reward, *_) = first.step(action), second.step(action)
        assert torch.equal(reward, same_reward) and all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="is not as these environments have it"):
        make(2, **task).set_state(first.get_state())


def test_randomization_changes_the_models_and_the_ground():
    strengths = dict(terrain_amplitude=0.5, mass=0.2, friction=0.3, wheel_damping=0.4, tilt=5, velocity=0.3)
    warp, plain = make(500, randomization=strengths), make(1)
    _, infos = warp.reset(seed=0)
    plain.reset(seed=0)
    sampled = infos["randomization"]
    for name in ("mass", "friction", "wheel_damping"):
        low, high = 1 - strengths[name], 1 + strengths[name]
        assert low <= sampled[name].min() < low + 0.05 and high - 0.05 < sampled[name].max() <= high
    base, wheel = warp.model.body("base").id, warp.model.joint("wheel_1").dofadr[0]
    mass = torch.tensor(warp.robots._model.body_mass.numpy())[:, base]  # no public name for Warp's model
    torch.testing.assert_close(mass, sampled["mass"] * float(warp.model.body_mass[base]))
    damping = torch.tensor(warp.robots._model.dof_damping.numpy())[:, wheel]
    torch.testing.assert_close(damping, sampled["wheel_damping"] * 0.4)
    scales = sampled["terrain_amplitude"]
    torch.testing.assert_close(scales.unique(), torch.tensor([0.6, 0.8, 1.0, 1.2, 1.4]))
    assert 0.05 < sampled["tilt"].norm(dim=1).max() <= math.radians(5)
    torch.testing.assert_close(warp.robots.velocities[:, :2], sampled["velocity"])
    for i in range(10):
        ground = warp.terrain.max_height(*warp.robots.ball_position[i, :2].double().tolist(), 0.09) * scales[i].item()
        assert warp.robots.ball_position[i, 2].item() == pytest.approx(ground + BALL_START, abs=1e-5)
    for _ in range(60):  # it lands on the ground that it was given
        warp.step(torch.zeros(500, 3))
    place = warp.robots.ball_position[:20].numpy()
    ground = warp.terrain.heights_at(place[:, :2]) * scales[:20].numpy()
    np.testing.assert_allclose(place[:, 2], ground + 0.09, atol=0.015)


def test_latency_delays_actions_and_pushes_act_on_the_base():
    late = make(20, terrain="flat", randomization=dict(latency=4))
    _, infos = late.reset(seed=0)
    delay = infos["randomization"]["latency"]
    assert set(delay.tolist()) == {0, 1, 2, 3, 4}
    for step in range(6):
        late.step(torch.ones(20, 3))
        assert (late.robots.motors[0, :, 0] != 0).tolist() == (delay <= step).tolist()
    pushed = make(50, terrain="flat", randomization=dict(push=1.0, push_interval=0.1))
    pushed.reset(seed=0)
    begins, impulse = torch.full((50,), -1), torch.zeros(50, 2)
    for step in range(100):
        *_, infos = pushed.step(torch.zeros(50, 3))
        acting = infos["randomization"]["push"].any(1)
        begins = torch.where((begins < 0) & acting, step, begins)
        impulse += pushed.robots.forces[:, :2] * 0.002 * (step < begins + 10)[:, None] * acting[:, None]
    assert 20 <= begins.min() and begins.max() < 80
    assert 0.5 < impulse.norm(dim=1).max() <= 1.001


def test_noise_has_its_deviation_and_spares_what_is_exact():
    warp = make(400, terrain="flat", cameras=True, camera_size=8, randomization=dict(obs_noise=0.05))
    obs, _ = warp.reset(seed=0)
    assert obs["vel"].std().item() == pytest.approx(0.05, rel=0.1) and (obs["actions"] == 0).all()
    frames = obs["depth_0"][:, 0, 4, 4]
    assert frames.std().item() == pytest.approx(0.05, rel=0.15) and obs["depth_0"].max() <= 1


def test_commands_are_sampled_and_set():
    warp, cpu = make_both(200, goal="command", frame_skip=4)
    obs, _ = warp.reset(seed=0)
    speeds = obs["command"].norm(dim=1)
    assert 0.1 < (speeds == 0).float().mean() < 0.3 and 0.55 < speeds.max() <= 0.6
    command = torch.tensor([[0.3, -0.1]]).expand(200, 2)
    for envs in (warp, cpu):
        envs.reset(seed=0, options=STARTS)
        envs.set_command(command)
    (obs, rewards, *_), (_, expected, *_) = warp.step(torch.zeros(200, 3)), cpu.step(np.zeros((200, 3)))
    assert torch.equal(obs["command"], command)
    np.testing.assert_allclose(rewards, expected, atol=1e-5)


def test_too_many_contacts_are_an_error():
    warp = make(4, terrain="flat", contacts=1)
    warp.reset(seed=0)
    with pytest.raises(RuntimeError, match="contacts="):
        for _ in range(60):
            warp.step(torch.zeros(4, 3))


@pytest.mark.parametrize("kwargs, message", [
    (dict(frame_skip=0), "frame_skip is 0"), (dict(terrain="moon"), "terrain is 'moon'"),
    (dict(randomization={"wind": 1}), "randomization has no 'wind'"), (dict(curriculum=True), "curriculum is True"),
])  # fmt: skip
def test_invalid_arguments_are_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(1, **kwargs)
    warp = make(1, terrain="flat")
    with pytest.raises(gym.error.ResetNeeded):
        warp.step(torch.zeros(1, 3))


def test_starts_frames_and_reward_terms_on_terrain_with_edges():
    def term(envs, actions):
        return abs(actions * envs.robots.wheel_speeds).sum(1)

    warp, cpu = make_both(16, terrain="stairs:height=0.02", cameras=True, camera_size=32, reward=term)
    warp.reset(seed=0)
    starts = warp.robots.position[:, :2].numpy()
    slopes = cell_slopes(cpu.terrain.heights)
    for x, y in starts:
        row, col = (round((c + 20) / CELL) for c in (y, x))
        assert slopes[row - 4 : row + 4, col - 4 : col + 4].max() <= START_SLOPE + 1e-6
    assert len({*starts[:, 1]}) > 8
    for envs in (warp, cpu):
        envs.reset(options=dict(position=starts))
    for _ in range(20):
        action = np.full((16, 3), 0.1, np.float32)
        (obs, *_, infos), (expected, *_, expected_infos) = warp.step(torch.tensor(action)), cpu.step(action)
        np.testing.assert_allclose(infos["reward_term"], expected_infos["reward_term"], rtol=1e-3, atol=1e-4)
    error = abs(obs["depth_0"].numpy() - expected["depth_0"])
    assert np.median(error) < 1e-3 and np.mean(error < 0.01) > 0.98
