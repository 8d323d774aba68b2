"""--env-kwargs and --reward reach training, resuming, evaluation and export; errors take one line."""

import json
import re
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import ballbot_env
import ppo_ballbot as ppo
from ballbot_utils import evaluate, export, flags
from ballbot_utils.common import EvalSettings, eval_task

SMALL = dict(
    num_threads=1, num_envs=2, num_steps=32, minibatch_size=32, total_timesteps=512, eval_interval=256, eval_episodes=1,
    final_eval_episodes=1, hidden_size=8, run_name="run",
)  # fmt: skip
TERMS = """
def energy(envs, actions):
    return -1e-4 * abs(actions * envs.robots.wheel_speeds).sum(1)

def bonus(envs, actions):
    return 5.0 + 0 * actions[:, 0]

def scalar(envs, actions):
    return 1.0

def fails(envs, actions):
    return envs.nothing

def ctrl(envs, actions):
    return actions[:, 0]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_terms.py").write_text(TERMS)
    return tmp_path


def test_a_reward_term_is_added_for_each_physics_step():
    envs = gym.make_vec("Ballbot-v0", num_envs=3, cameras=False, frame_skip=4, reward="my_terms.py:energy")
    plain = gym.make_vec("Ballbot-v0", num_envs=3, cameras=False, frame_skip=4)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 3, 3)).astype(np.float32)
    for e in (envs, plain):
        e.reset(seed=0)
    for action in actions:
        (_, rewards, _, _, infos), (_, expected, *_) = envs.step(action), plain.step(action)
        term = -1e-4 * abs(action * envs.robots.wheel_speeds).sum(1) * 4
        np.testing.assert_allclose(infos["reward_energy"], term)
        np.testing.assert_allclose(rewards, expected + term)
    assert infos["reward_energy"].max() < 0

    def my_term(envs, actions):
        return np.ones(1)

    env = gym.make("Ballbot-v0", cameras=False, reward=my_term)
    env.reset(seed=0)
    assert env.step(np.zeros(3))[4]["reward_my_term"] == 1


@pytest.mark.slow
def test_training_resuming_evaluation_and_export_use_them(capsys, folder):
    kwargs = ("max_tilt=25", "ctrl_cost_weight=1e-3", "camera_size=32")
    args = ppo.Args(**SMALL, env_kwargs=kwargs, reward="my_terms.py:bonus", terrain="ramp", freeze_encoder=False)
    run = ppo.train(args)
    config = json.loads((run / "config.json").read_text())
    assert config["env_kwargs"] == list(kwargs) and re.fullmatch(r"my_terms\.py@\w{12}:bonus", config["reward"])
    ppo.train(ppo.Args(resume=str(run), total_timesteps=768))
    content = torch.load(run / "last.pt", weights_only=True)
    assert content["global_step"] == 768 and content["model"]["encoder.layers.2.weight"].shape == (128, 8 * 8)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(m["episodic_return"] > 4 * m["episodic_length"] for m in metrics)  # the bonus of 5 a step

    policy = ppo.load_policy(run)
    task = eval_task(EvalSettings(), policy.args, run)
    assert task["camera_size"] == 32 and task["max_tilt"] == 25 and task["reward"] == config["reward"]
    capsys.readouterr()
    evaluate.main(evaluate.Args(checkpoints=(run,), episodes=2, num_threads=1, horizon=100, json="-"))
    captured = capsys.readouterr()
    result = json.loads(captured.out)[0]
    assert result["summary"]["return"]["mean"] > 400 and result["task"]["terrain"] == "ramp"
    assert "max_tilt=25 ctrl_cost_weight=0.001 camera_size=32" in captured.err
    pytest.importorskip("onnxscript")
    export.main(export.Args(run, folder / "policy.onnx"))
    (folder / "my_terms.py").write_text(TERMS + "# changed")
    flags.pin.__globals__["_seen"].clear()  # as another process
    with pytest.raises(SystemExit, match=r"my_terms\.py has changed"):
        evaluate.main(evaluate.Args(checkpoints=(run,), episodes=2))
    with pytest.raises(SystemExit, match=r"my_terms\.py has changed"):
        ppo.train(ppo.Args(resume=str(run), total_timesteps=1024))


@pytest.mark.parametrize("changes, message", [
    (dict(env_kwargs=("max_tilt=200",)), "--env-kwargs: max_tilt is 200: give an angle between 0 and 90 degrees"),
    (dict(env_kwargs=("max_tilt",)), "give each argument once, as NAME=VALUE"),
    (dict(env_kwargs=("max_tilt=2", "max_tilt=3")), "give each argument once"),
    (dict(env_kwargs=("tilt=2",)), "'tilt', which the environment lacks: it has camera_size, camera_pitch, "
     "camera_rate, height_scan, max_tilt"),
    (dict(env_kwargs=("frame_skip=2",)), "--env-kwargs cannot set frame_skip: use --frame-skip"),
    (dict(env_kwargs=("goal=command",)), "--env-kwargs cannot set goal: use --goal"),
    (dict(goal="command", env_kwargs=("goal=(1, 0)",)), "--env-kwargs cannot set goal: use --goal"),
    (dict(env_kwargs=("num_threads=2",)), "--env-kwargs cannot set num_threads"),
    (dict(env_kwargs=("device='cuda'",)), "--env-kwargs cannot set device: the script sets it"),
    (dict(env_kwargs=("healthy_reward=much",)), "healthy_reward is 'much'"),
    (dict(env_kwargs=("max_tilt=5",), randomization={"tilt": 10.0}), "randomization tilt is 10.0"),
    (dict(env_kwargs=("camera_size=32",), cameras=True), "is not a depth encoder for images of this size"),
    (dict(reward="my_terms.py:nothing"), "my_terms.py has no function 'nothing'"),
    (dict(reward="my_terms.py:scalar"), "the result of reward scalar is 1.0: give an array of shape (2,)"),
    (dict(reward="my_terms.py:fails"), "reward fails raises AttributeError"),
    (dict(reward="my_terms.py:ctrl"), "the name of the reward term is 'ctrl': give another name"),
    (dict(reward="energy"), "reward is 'energy': give FILE.py:FUNCTION"),
    (dict(reward="missing.py:energy"), "missing.py: there is no such file"),
    (dict(terrain="ramp:angle=99"), "angle is 99.0"),
    (dict(terrain="missing.py:canyon"), "missing.py: there is no such file"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_bad_values_end_in_one_line(changes, message, folder):
    args = replace(ppo.Args(**SMALL, cameras=False, frame_skip=1), **changes)
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        ppo.train(args)
    assert len(str(caught.value).splitlines()) == 1 and not (folder / "runs").exists()


def test_a_goal_direction_and_flags_without_effect(monkeypatch):
    assert flags.env_kwargs(ppo.Args(env_kwargs=("goal=(1, 0)",))) == {"goal": (1, 0)}
    assert ppo.task(ppo.Args(env_kwargs=("goal=(1, 0)",)), evaluation=True)["goal"] == (1, 0)

    def parse(text):
        monkeypatch.setattr("sys.argv", ["ppo_ballbot.py", *text.split()])
        return ppo.parse_args()

    assert parse("--env-kwargs max_tilt=25 camera_size=32").env_kwargs == ("max_tilt=25", "camera_size=32")
    for given in ("--terrain ramp --terrain-seed 3", "--terrain hills --terrain-amplitude 0.3"):
        with pytest.raises(SystemExit, match="has no effect on --terrain"):
            parse(given)
    assert parse("--terrain hills --terrain-seed 3 --preset tuned").terrain_seed == 3
    ballbot_env.BallbotVectorEnv(2, "ramp", cameras=False, randomization=parse("--preset robust").randomization).close()
