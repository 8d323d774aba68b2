"""Evaluation against plain loops over one environment, and its errors on invalid input."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import ballbot_env
import ppo_ballbot as ppo
from ballbot_utils import common, evaluate, watch
from ballbot_utils.model import ASSETS

ARGS = evaluate.Args(checkpoints=(), num_threads=1, episodes=3, horizon=600, seed=7)
FLAT = {"terrain": "flat", "cameras": False, "wheel_damping": 0.4, "frame_skip": 1, "max_episode_steps": 600}
PERLIN = {"terrain": "perlin", "terrain_seed": 1_000_000, "terrain_amplitude": 0.1, "cameras": True,
          "wheel_damping": 0.4, "frame_skip": 1, "max_episode_steps": 600}  # fmt: skip


def make_agent(**train_args):
    torch.manual_seed(0)
    args = ppo.Args(num_threads=1, hidden_size=16, pi_layers=1, vf_layers=1, **train_args)
    agent = ppo.Agent(args)
    list(agent.actor.parameters())[-2].data *= 30  # larger actions
    return agent, args


@pytest.fixture
def checkpoint(tmp_path):
    """A policy with random weights, of a run without cameras."""
    agent, args = make_agent(cameras=False)
    (tmp_path / "run").mkdir()
    torch.save({"model": agent.state_dict(), "args": asdict(args), "global_step": 1234}, tmp_path / "run" / "best.pt")
    return tmp_path / "run" / "best.pt"


def error_of(args):
    with pytest.raises(SystemExit) as raised:
        evaluate.main(args)
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def equal(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_results_equal_a_plain_loop():
    agent, _ = make_agent()
    found = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), ARGS, PERLIN)
    rows = []
    for seed in ballbot_env.spawn_seeds(7, 3):
        env = gym.make("Ballbot-v0", **PERLIN)
        obs, info = env.reset(seed=seed)
        start, total, effort, length, done = info["position"][1], 0.0, 0.0, 0, False
        while not done:
            if obs["relative_image_timestamp"][0] == 0:
                frames = torch.from_numpy(np.stack([obs["depth_0"], obs["depth_1"]]))
                with torch.no_grad():
                    depth = agent.encoder(frames).flatten()
            keys = ("orientation", "angular_vel", "vel", "motor_state", "actions", "relative_image_timestamp")
            proprio = torch.from_numpy(np.concatenate([obs[key] for key in keys]))
            with torch.no_grad():
                action = agent.actor(torch.cat([proprio, depth])[None])[0].numpy()
            obs, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            total, effort, length = total + reward, effort + (action.clip(-1, 1) ** 2).sum(), length + 1
        distance = info["position"][1] - start
        rows.append((total, length, distance / (length * 0.002), distance, effort / length, terminated))
        env.close()
    assert all(row[-1] for row in rows) and len({row[1] for row in rows}) > 1  # all fall, at different times
    expected = dict(zip(("return", "length", "speed", "distance", "effort", "falls"), np.array(rows).T))
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-3, atol=1e-4, err_msg=key)
    assert not found["left_terrain"].any()


def test_tracking_error_equals_a_plain_loop():
    agent, train_args = make_agent(cameras=False, goal="command", frame_skip=4)
    task = common.eval_task(ARGS, train_args, "run")
    found = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), ARGS, task)
    assert "speed" not in found
    for i, seed in enumerate(ballbot_env.spawn_seeds(7, 3)):
        env = gym.make("Ballbot-v0", **task)
        obs, _ = env.reset(seed=seed)
        errors, done = [], False
        while not done:
            command = obs["command"]
            with torch.no_grad():
                batch = {key: value[None] for key, value in obs.items()}
                action = agent.actor(ppo.proprioception(batch, agent))[0].numpy()
            obs, _, terminated, truncated, _ = env.step(action)
            errors.append(np.linalg.norm(obs["vel"][:2] - command))
            done = terminated or truncated
        assert found["tracking_error"][i] == pytest.approx(np.mean(errors), rel=1e-3)
    forward = dict.fromkeys(("return", "length", "speed", "distance", "effort", "falls", "left_terrain"), np.ones(3))
    both = {"commanded": found, "forward": forward}
    columns = [evaluate.make_column(name, ARGS, FLAT, episodes) for name, episodes in both.items()]
    lines = {line.split("   ")[0]: line for line in evaluate.format_table(columns, 200).splitlines()}
    assert f"{found['tracking_error'].mean():.3f} [" in lines["tracking error (m/s)"]
    assert lines["tracking error (m/s)"].endswith(" -")
    assert lines["speed along goal (m/s)"].split()[4] == "-"


def test_results_equal_those_of_the_training_script():
    """Both evaluate on the task: hills of 0.1 m and whole episodes without pushes, whatever the training has."""
    agent, train_args = make_agent(cameras=False, terrain_amplitude=0.3, terrain_seed=3, eval_terrain_seed=1_000_000,
                                   randomization={"push": 5.0}, curriculum=True, max_episode_steps=100)  # fmt: skip
    expected = ppo.evaluate(agent, train_args, 3)
    args = replace(ARGS, seed=1_000_000, horizon=4000)
    found = evaluate.evaluate_policy(
        common.policy_factory(ppo.Policy(agent, None)), args, common.eval_task(args, train_args, "run")
    )
    assert found["return"].mean() == pytest.approx(expected["episodic_return"], rel=1e-12)
    assert found["length"].mean() == expected["episodic_length"]
    assert found["falls"].mean() == expected["falls"]


def test_more_episodes_than_environments(monkeypatch):
    agent, _ = make_agent(cameras=False)
    task = PERLIN | {"cameras": False}
    at_once = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), replace(ARGS, episodes=5), task)
    monkeypatch.setattr(evaluate, "MAX_ENVS", 2)
    in_rounds = evaluate.evaluate_policy(
        common.policy_factory(ppo.Policy(agent, None)), replace(ARGS, episodes=5), task
    )
    for key in at_once:
        np.testing.assert_allclose(in_rounds[key], at_once[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cameras, goal", [(False, "forward"), (True, "command")])
def test_an_episode_does_not_depend_on_the_others_and_watch_shows_it(cameras, goal):
    agent, train_args = make_agent(cameras=cameras, goal=goal, frame_skip=4, body_frame=True, init_log_std=-2.0)
    policy = common.policy_factory(ppo.Policy(agent, train_args), stochastic=True)
    args = replace(ARGS, push=0.3, push_interval=0.1, obs_noise=0.01, episodes=5)
    task = common.eval_task(args, train_args, "run")
    found = evaluate.evaluate_policy(policy, args, task)
    fewer = evaluate.evaluate_policy(policy, replace(args, episodes=3), task)
    others = evaluate.evaluate_policy(policy, replace(args, seed=args.seed + 1), task)
    assert len({*found["return"], *others["return"]}) == 10  # adjacent seeds share no episode
    for key, values in found.items():
        assert np.array_equal(fewer[key], values[:3])
    envs = gym.make_vec("Ballbot-v0", num_envs=1, num_threads=1, **task)
    for i in (4, 0):
        *_, (steps, total, _) = watch.run_episode(envs, policy, args, i)
        assert (steps, total) == (found["length"][i], found["return"][i])


def test_bootstrap_by_known_numbers():
    assert evaluate.bootstrap_interval(np.full(10, 3.5)) == (3.5, 3.5)
    # The mean of 100 throws of a coin: binomial, 2.5 % and 97.5 % quantiles 40 and 60.
    coin = np.repeat([0, 1], 50)
    low, high = evaluate.bootstrap_interval(coin)
    assert abs(low - 0.4) <= 0.01 and abs(high - 0.6) <= 0.01
    # Two of them: standard deviation 0.05 * sqrt(2), times 1.96.
    low, high = evaluate.bootstrap_interval(coin + 1, minus=coin)
    assert abs(low - (1 - 0.139)) <= 0.011 and abs(high - (1 + 0.139)) <= 0.011


def test_pushes():
    agent, _ = make_agent(cameras=False)
    plain = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), ARGS, FLAT)
    none = evaluate.evaluate_policy(
        common.policy_factory(ppo.Policy(agent, None)), replace(ARGS, push=0.0, push_interval=0.1), FLAT
    )
    assert equal(plain, none)
    args = replace(ARGS, push=0.2, push_interval=0.1)
    pushed = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), args, FLAT)
    assert (pushed["return"] != plain["return"]).all()
    assert len(set(pushed["return"])) == 3  # different directions
    assert equal(pushed, evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), args, FLAT))

    # The force times its duration is the impulse. Then the force is 0.
    envs = gym.make_vec("Ballbot-v0", num_envs=2, **FLAT)
    envs.reset(seed=0)
    rngs, impulse, forced = [np.random.default_rng(seed) for seed in (0, 1)], 0, []
    pushes = common.Pushes(envs.forces, 1)
    for step in range(100):
        common.update_pushes(pushes, args, step, rngs)
        force = envs.batch.bind("xfrc_applied")[:, envs.model.body("base").id].copy()
        forced += [step] if force.any() else []
        impulse = impulse + 0.002 * force
        envs.step(np.zeros((2, 3)))
    assert forced == list(range(50, 60))
    np.testing.assert_allclose(np.linalg.norm(impulse[:, :2], axis=1), 0.2)
    assert not impulse[:, 2:].any()


@pytest.mark.parametrize("frame_skip, lasts", [(1, 10), (4, 12), (25, 25)])
def test_a_push_keeps_its_impulse_with_frame_skip(frame_skip, lasts):
    envs = gym.make_vec("Ballbot-v0", num_envs=2, **FLAT | {"frame_skip": frame_skip})
    envs.reset(seed=0)
    args, impulse, forced = replace(ARGS, push=0.2, push_interval=0.2), 0, 0
    rngs = [np.random.default_rng(seed) for seed in (0, 1)]
    pushes = common.Pushes(envs.forces, frame_skip)
    for step in range(0, 200, frame_skip):  # one push, at 0.2 s
        common.update_pushes(pushes, args, step // frame_skip, rngs)
        force = envs.batch.bind("xfrc_applied")[:, envs.model.body("base").id].copy()
        forced += frame_skip * force.any()
        impulse = impulse + 0.002 * frame_skip * force
        envs.step(np.zeros((2, 3)))
    assert forced == lasts
    np.testing.assert_allclose(np.linalg.norm(impulse[:, :2], axis=1), 0.2)


def test_lengths_are_in_physics_steps():
    agent, train_args = make_agent(cameras=False, frame_skip=4)
    args = replace(ARGS, horizon=402)
    task = common.eval_task(args, train_args, "run") | {"terrain": "flat"}
    found = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), args, task)
    assert task["frame_skip"] == 4 and (found["length"] == 404).all()  # whole actions
    assert not found["falls"].any()
    env = ballbot_env.BallbotEnv(**task)
    obs, _ = env.reset(seed=ballbot_env.spawn_seeds(args.seed, 1)[0])
    total, effort, done = 0.0, [], False
    while not done:
        with torch.no_grad():
            batch = {key: value[None] for key, value in obs.items()}
            action = agent.actor(ppo.proprioception(batch, agent)).numpy()[0]
        obs, reward, terminated, truncated, _ = env.step(action)
        total, done = total + reward, terminated or truncated
        effort.append((action.clip(-1, 1) ** 2).sum())
    assert found["return"][0] == pytest.approx(total, rel=1e-4)
    assert found["effort"][0] == pytest.approx(np.mean(effort), rel=1e-3)


def test_observation_noise():
    agent, _ = make_agent()
    task = PERLIN | {"max_episode_steps": 60}
    args = replace(ARGS, horizon=60)
    plain = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), args, task)
    assert equal(
        plain,
        evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), replace(args, obs_noise=0.0), task),
    )
    noisy = evaluate.evaluate_policy(
        common.policy_factory(ppo.Policy(agent, None)), replace(args, obs_noise=0.05), task
    )
    assert (noisy["effort"] != plain["effort"]).all()

    envs = gym.make_vec("Ballbot-v0", num_envs=200, **task)
    obs, _ = envs.reset(seed=0)
    frames, generators = envs.frames.clone(), [torch.Generator().manual_seed(seed) for seed in range(200)]
    noisy = common.add_obs_noise(obs, envs, 0.05, generators)
    noise = (ppo.proprioception(noisy, agent) - ppo.proprioception(obs, agent)).numpy()
    assert np.abs(noise[:, :12].std(0) - 0.05).max() < 0.01 and not noise[:, 12:].any()
    assert 0.04 < (envs.frames - frames).std() < 0.06 and 0 <= envs.frames.min()
    # Only new frames get noise
    frames = envs.frames.clone()
    obs, *_ = envs.step(np.zeros((200, 3)))
    common.add_obs_noise(obs, envs, 0.05, generators)
    assert torch.equal(envs.frames, frames)
    assert common.add_obs_noise(obs, envs, 0.0, generators) is obs


def test_noise_reaches_observations_that_are_copies():
    for copy in (False, True):
        envs = gym.make_vec("Ballbot-v0", num_envs=2, copy=copy, **PERLIN)
        noisy = common.add_obs_noise(
            envs.reset(seed=0)[0], envs, 0.05, [torch.Generator().manual_seed(i) for i in (0, 1)]
        )
        for i in (0, 1):
            assert np.array_equal(noisy[f"depth_{i}"][:, 0], envs.frames[:, i])


def test_sampled_actions():
    agent, _ = make_agent(cameras=False)
    sampled = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None), stochastic=True), ARGS, FLAT)
    assert equal(
        sampled, evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None), stochastic=True), ARGS, FLAT)
    )
    assert (
        sampled["effort"].mean()
        > evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), ARGS, FLAT)["effort"].mean() + 0.5
    )


def test_long_episodes_start_further_back():
    envs = gym.make_vec("Ballbot-v0", num_envs=50, **PERLIN)
    _, info = envs.reset(seed=0)
    usual, frames = info["position"], envs.frames.clone()
    _, info = common.reset_for_horizon(envs, list(range(50)), 4000)
    assert np.array_equal(info["position"], usual)
    _, info = common.reset_for_horizon(envs, list(range(50)), 10_000)
    (x, y, _), usual_y = info["position"].T, usual[:, 1]
    assert np.array_equal(x, usual[:, 0]) and y.min() >= -18 and -4 < y.max() <= -2
    np.testing.assert_allclose(y, np.interp(usual_y, [-10, 10], [-18, -2]))
    assert not torch.equal(envs.frames, frames) and envs.new_frames.all()
    anywhere = gym.make_vec("Ballbot-v0", num_envs=50, goal="command", **PERLIN)  # commands lead in any direction
    assert np.array_equal(common.reset_for_horizon(anywhere, list(range(50)), 10_000)[1]["position"], usual)


def test_episodes_that_leave_the_terrain_are_counted():
    agent, _ = make_agent(cameras=False)
    envs = gym.make_vec("Ballbot-v0", num_envs=3, **FLAT)
    original = envs.reset

    def reset(seed):
        _, info = original(seed=seed)
        position, velocity = info["position"][:, :2], np.zeros((3, 2))
        position[0, 1], velocity[0, 1] = 19, 0.5
        return original(options={"position": position, "velocity": velocity})

    envs.reset = reset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.gym, "make_vec", lambda *args, **kwargs: envs)
        episodes = evaluate.evaluate_policy(common.policy_factory(ppo.Policy(agent, None)), ARGS, FLAT)
    assert episodes["left_terrain"].tolist() == [1, 0, 0] and episodes["falls"].tolist() == [0, 1, 1]
    assert episodes["length"][0] == 1


def test_table_and_json(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    other = tmp_path / "other.pt"
    content = torch.load(checkpoint, weights_only=True)
    content["args"] |= {"a_flag_of_the_future": 3}
    torch.save(content, other)
    output = tmp_path / "figures.json"
    args = replace(ARGS, checkpoints=(checkpoint.parent, other), horizon=40, stochastic=True, json=str(output))
    evaluate.main(args)
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == 2 * ["run"] + 2 * [f"{tmp_path.name}/other.pt"]
    for line in ("target: return > 100", "target: length > 3000", "gap: training - unseen", "1,234"):
        assert line in text
    results = json.loads(output.read_text())
    assert [r["stochastic"] for r in results] == [False, True, False, True]
    for r in results:
        returns, summary = r["per_episode"]["return"], r["summary"]
        assert r["per_episode"]["seed"] == ballbot_env.spawn_seeds(7, 3)
        assert len(returns) == summary["episodes"] == 3 and r["task"]["terrain_seed"] == 1_000_000
        assert summary["return"]["mean"] == pytest.approx(np.mean(returns))
        assert summary["return"]["low"] <= summary["return"]["mean"] <= summary["return"]["high"]
        assert summary["targets"] == {"return": False, "length": False}
        assert r["gap"]["mean"] == pytest.approx(r["gap"]["training"] - np.mean(returns))
    assert results[0]["summary"] == results[2]["summary"]

    assert "figures.json exists: give --overwrite" in error_of(args)
    flat = replace(ARGS, checkpoints=(checkpoint,), terrain="flat", horizon=20, json="-")
    evaluate.main(flat)
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["gap"] is None
    assert "no gap, it was trained on another kind of terrain, perlin" in captured.err


def test_table_fits_the_width():
    episodes = {
        key: np.full(4, 120.0) for key in ("return", "length", "speed", "distance", "effort", "falls", "left_terrain")
    }
    episodes["length"] = np.array([4000, 4000, 4000, 0])
    episodes["left_terrain"] = np.zeros(4)
    result = {"label": "a", "global_step": 1, "stochastic": False, "task": FLAT, "gap": None,
              "summary": evaluate.summarize(episodes)}  # fmt: skip
    wide, narrow = evaluate.format_table([result] * 4, 500), evaluate.format_table([result] * 4, 80)
    assert "target: return > 100" in wide and wide.count("steps trained") == 1
    assert narrow.count("steps trained") > 1 and max(map(len, narrow.splitlines())) <= 80
    assert "reached" in wide and "missed, within error" in wide  # the mean length is 3000, which is not more than 3000


def test_training_terrain_is_rejected(checkpoint, capsys):
    args = replace(ARGS, checkpoints=(checkpoint,), horizon=10, terrain_seed=0)
    assert f"{checkpoint} was trained on terrain seed 0" in error_of(args)
    evaluate.main(replace(args, allow_training_terrain=True))
    assert "this is its training terrain" in capsys.readouterr().out


class Code:
    """An object that a malicious checkpoint may contain: unpickling it runs a command."""

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_checkpoints(checkpoint, tmp_path):
    good = torch.load(checkpoint, weights_only=True)

    def says(path):
        message = error_of(replace(ARGS, checkpoints=(path,)))
        assert str(path.parent if path.name == "best.pt" else path) in message
        return message

    def saved(**content):
        torch.save(content, tmp_path / "bad.pt")
        return says(tmp_path / "bad.pt")

    assert "is missing" in says(tmp_path / "nowhere.pt")
    (tmp_path / "empty").mkdir()
    assert "has no best.pt" in says(tmp_path / "empty")
    (tmp_path / "bad.pt").write_bytes(b"")
    assert "damaged" in says(tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_bytes(checkpoint.read_bytes()[:5000])
    assert "damaged" in says(tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_text("# A text\n")
    assert "damaged, or not a checkpoint" in says(tmp_path / "bad.pt")
    code = Code()
    code.path = str(tmp_path / "ran")
    assert "code, which is never run" in saved(**good | {"optimizer": code})
    assert not (tmp_path / "ran").exists()
    assert "has no policy of this program" in saved(weights=torch.zeros(3))
    assert "has no cameras, hidden_size" in says(ASSETS / "depth_encoder.pt")
    args = {key: value for key, value in good["args"].items() if key not in ("cameras", "frame_skip")}
    assert "has no cameras, frame_skip in its args" in saved(**good | {"args": args})
    assert "--hidden-size is 16: give a valid integer" in saved(**good | {"args": good["args"] | {"hidden_size": "16"}})
    assert "trained on terrain that is not here: terrain is 'moon': give flat" in saved(
        **good | {"args": good["args"] | {"terrain": "moon"}}
    )
    assert "does not fit its flags" in saved(**good | {"args": good["args"] | {"hidden_size": 32}})
    assert "does not fit its flags" in saved(**good | {"args": good["args"] | {"cameras": True}})
    assert "does not fit its flags" in saved(**good | {"model": {}})


@pytest.mark.parametrize("change, message", [
    ({"checkpoints": ()}, "no checkpoints given"),
    ({"episodes": 0}, "--episodes is 0: give 1 or more"),
    ({"horizon": -1}, "--horizon is -1"),
    ({"push": -1.0}, "--push is -1.0: give 0.0 or more"),
    ({"push_interval": 0.01}, "--push-interval is 0.01"),
    ({"obs_noise": float("nan")}, "--obs-noise is nan"),
    ({"terrain": "moon"}, "terrain is 'moon': give flat, perlin, ramp"),
    ({"terrain": "ramp", "terrain_seed": 3}, "--terrain-seed has no effect on --terrain ramp: leave it out"),
    ({"terrain": "flat", "terrain_seed": 3}, "--terrain-seed has no effect on --terrain flat"),
    ({"terrain_amplitude": 0.0}, "--terrain-amplitude is 0.0: give more than 0"),
    ({"seed": 2**64}, "--seed is 18446744073709551616: give 1,000,000,000,000,000,000 or less"),
    ({"terrain_amplitude": 200.0}, "--terrain-amplitude is 200.0: give 100"),
    ({"wheel_damping": -0.4}, "--wheel-damping is -0.4"),
    ({"json": "nowhere/figures.json"}, "there is no folder nowhere"),
])  # fmt: skip
def test_bad_flags(change, message):
    assert message in error_of(replace(ARGS, **{"checkpoints": (Path("unseen.pt"),)} | change))


def test_a_failed_write_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "figures.json"
    common.write(path, lambda part: part.write_text("first"))

    def fail(part):
        part.write_text("half of the sec")
        raise OSError("disk full")

    with pytest.raises(SystemExit, match="cannot be written: disk full"):
        common.write(path, fail)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    mine = tmp_path / "try_figures.json"
    mine.write_text("mine")
    common.require_writable("--json", path, True, ".json")
    assert mine.read_text() == "mine" and path.read_text() == "first" and len(list(tmp_path.iterdir())) == 2
