"""The viewer and the video: what they show, and their errors on invalid input or without a display."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

import ppo_ballbot as ppo
from ballbot_env import BallbotEnv, spawn_seeds
from ballbot_utils import watch

REPOSITORY = Path(ppo.__file__).resolve().parent


def save_policy(path, **train_args):
    torch.manual_seed(0)
    small = dict(frame_skip=1, num_threads=1, hidden_size=16, pi_layers=1, vf_layers=1)
    args = ppo.Args(**small | train_args)
    torch.save({"model": ppo.Agent(args).state_dict(), "args": asdict(args), "global_step": 0}, path)
    return path


@pytest.fixture
def args(tmp_path):
    """Short episodes of a policy with random weights, without cameras."""
    return watch.Args(checkpoint=save_policy(tmp_path / "policy.pt", cameras=False), terrain="flat", horizon=50)


def error_of(args):
    with pytest.raises(SystemExit) as raised:
        watch.main(args)
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("change, message", [
    ({}, "give one of --render and --video"),
    ({"video": Path("film.gif"), "render": True}, "give one of --render and --video"),
    ({"video": Path("film.avi")}, "give a name ending in .mp4 or .gif"),
    ({"video": Path("nowhere/film.gif")}, "there is no folder nowhere"),
    ({"video": Path("film.gif"), "horizon": 0}, "--horizon is 0: give 1 or more"),
    ({"video": Path("film.gif"), "horizon": 1}, "--horizon is 1: give more than the policy's --frame-skip, 1"),
    ({"video": Path("film.gif"), "width": 100}, "--width is 100: give a multiple of 64"),
    ({"render": True, "push": -1.0}, "--push is -1.0: give 0.0 or more"),
])  # fmt: skip
def test_bad_flags(args, change, message):
    assert message in error_of(replace(args, **change))


def test_a_video_that_exists_is_kept(args, tmp_path):
    film = tmp_path / "film.gif"
    film.touch()
    assert "film.gif exists: give --overwrite" in error_of(replace(args, video=film))


@pytest.mark.slow
def test_unknown_opengl():
    for module, start in (("ballbot_env", "ImportError: "), ("ballbot_utils.watch", "error: ")):
        done = subprocess.run([sys.executable, "-c", f"import {module}"], env=os.environ | {"MUJOCO_GL": "foo"},
                              capture_output=True, text=True)  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"{start}MuJoCo cannot use MUJOCO_GL=foo (invalid value") and "unset it" in last


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a display")
def test_without_display_or_opengl(args, tmp_path, monkeypatch):
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(variable, raising=False)
    assert "--render needs a display" in error_of(replace(args, render=True))
    pytest.importorskip("PIL")
    film = replace(args, video=tmp_path / "film.gif")
    monkeypatch.setattr(watch, "find_library", lambda name: name if name == "OSMesa" else None)
    assert "put MUJOCO_GL=osmesa before the command" in error_of(film)
    monkeypatch.setattr(watch, "find_library", lambda name: None)
    assert "install libosmesa6" in error_of(film)


class Window:
    """A viewer's window that its user closes after `steps` steps."""

    synced, closed = 0, False

    def __init__(self, steps):
        self.steps = steps
        self.user_scn, self.cam = mujoco.MjvScene(), mujoco.MjvCamera()

    def sync(self):
        self.synced += 1

    def is_running(self):
        self.steps -= 1
        return self.steps > 0

    def close(self):
        self.closed = True


def test_render_follows_the_clock_until_its_window_is_closed(args, monkeypatch, capsys):
    viewer = pytest.importorskip("mujoco.viewer")
    window, now = Window(steps=80), [0.0]  # s
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda s: now.append(now.pop() + s))
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(viewer, "launch_passive", lambda model, data, **options: window)
    watch.main(replace(args, render=True))
    assert now[0] == pytest.approx(80 * 0.002)
    assert window.synced and window.closed and window.steps == 0
    assert capsys.readouterr().out.count("50 steps, did not fall") == 1  # the second episode does not end


def test_an_environment_shows_itself_in_a_window(monkeypatch):
    viewer = pytest.importorskip("mujoco.viewer")
    window, env = Window(steps=99), BallbotEnv("flat", cameras=False, render_mode="human")
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(RuntimeError, match='needs a display: use "rgb_array"'):
        env.reset(seed=0)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(viewer, "launch_passive", lambda model, data: window)
    env.reset(seed=0)
    for _ in range(16):
        env.step(np.zeros(3))
    assert window.synced == 3 and copy.deepcopy(env)._viewer is None  # at the reset and every 8 steps
    env.close()
    assert window.closed


@pytest.mark.slow
def test_arrows_are_seen_in_all_directions(opengl):
    """Arrows of a goal, of the velocity and of a push; none of them is a dot. From the side, lengths are right."""
    command = ("import json, numpy as np, ballbot_env as b\n"
               "from ballbot_utils.scene import SceneRenderer, make_arrows\n"
               "envs = b.BallbotVectorEnv(terrain='flat', cameras=False)\n"
               "envs.reset(seed=0)\n"
               "qpos, place, still, seen = envs.batch.qpos[0], envs.robots.position[0], np.zeros(3), []\n"
               "renderer = SceneRenderer(240, 320, [place[:2]], envs.terrain, 0)\n"
               "bare = renderer.render(qpos, []).astype(int)\n"
               "for angle in np.radians(21.3) + np.arange(8) * np.pi / 4:\n"  # the first is towards the camera
               "    way = np.array([np.cos(angle), np.sin(angle), 0])\n"
               "    for arrows in ((way[:2], still, still), ([0, 0], way, still), ([0, 0], still, 60 * way)):\n"
               "        picture = renderer.render(qpos, make_arrows(place, *arrows))\n"
               "        pixels = np.argwhere(np.abs(picture - bare).sum(2) > 60)\n"
               "        seen.append((len(pixels), *np.ptp(pixels, 0).tolist()))\n"
               "renderer.close()\n"
               "print(json.dumps(seen))")  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command], cwd=REPOSITORY, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, height, width = np.array(json.loads(done.stdout)).reshape(8, 3, 3).transpose(2, 0, 1)
    assert count.min() > 60 and np.hypot(height, width).min() > 25
    # 0.5 m at 1.1 m, 45 degrees high
    np.testing.assert_allclose(width[[2, 6]], 0.5 / 1.1 * 120 / np.tan(np.pi / 8), rtol=0.1)


def test_a_video_shows_the_command(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    captions = []

    class Renderer:
        def __init__(self, *args):
            self.render, self.close = (lambda pose, arrows: None), (lambda: None)

    monkeypatch.setattr(watch, "SceneRenderer", Renderer)
    monkeypatch.setattr(watch, "compose_image", lambda pixels, frames, caption: captions.append(caption))
    monkeypatch.setattr(watch, "encode_video", lambda images, path, fps: path.write_text(str(list(images))))
    for goal in ("command", "forward"):
        policy = save_policy(tmp_path / "policy.pt", cameras=False, goal=goal)
        args = watch.Args(checkpoint=policy, horizon=30, video=tmp_path / f"{goal}.gif", terrain="flat", seed=3)
        (policy, _), task = watch.load(args.checkpoint), dict(terrain="flat", cameras=False, max_episode_steps=30)
        watch.write_video(watch.policy_factory(policy), args, task | ({"goal": goal} if goal == "command" else {}))
    env, (seed,) = gym.make("Ballbot-v0", goal="command", cameras=False), spawn_seeds(3, 1)
    x, y = env.reset(seed=seed)[0]["command"]
    assert np.hypot(x, y) > 0.01 and f"m/s    command ({x:+.2f}, {y:+.2f}) m/s    return" in captions[0]
    assert "command" not in captions[-1]


@pytest.mark.slow
def test_record_video(tmp_path, opengl):
    """Gymnasium's RecordVideo writes a video in real time, with 25 rendered images per second."""
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("moviepy")
    command = ("import sys, gymnasium as gym, numpy as np, ballbot_env\n"
               "from ballbot_utils.scene import SceneRenderer\n"
               "render, calls = SceneRenderer.render, []\n"
               "SceneRenderer.render = lambda *args: calls.append(1) or render(*args)\n"
               "env = gym.make('Ballbot-v0', terrain='flat', render_mode='rgb_array')\n"
               "env = gym.wrappers.RecordVideo(env, sys.argv[1])\n"
               "env.reset(seed=0)\n"
               "for _ in range(100):\n"
               "    env.step(np.zeros(3))\n"
               "env.close()\n"
               "print('rendered:', len(calls))")  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command, tmp_path], cwd=REPOSITORY, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rendered: 6" in done.stdout
    meta = imageio.get_reader(tmp_path / "rl-video-episode-0.mp4").get_meta_data()
    assert meta["size"] == (640, 480) and meta["duration"] == pytest.approx(0.2, abs=0.03)


@pytest.mark.slow
def test_video(tmp_path, opengl):
    image = pytest.importorskip("PIL.Image")
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    policy = save_policy(tmp_path / "policy.pt")
    command = ("import sys; from dataclasses import replace; from pathlib import Path\n"
               "import ballbot_utils.watch as w\n"
               "args = w.Args(checkpoint=Path(sys.argv[1]), horizon=100, video=Path(sys.argv[2]))\n"
               "w.main(args)\n"
               "w.main(replace(args, terrain='flat', width=128, video=args.video.with_suffix('.mp4')))")  # fmt: skip
    gif = tmp_path / "film.gif"
    done = subprocess.run([sys.executable, "-c", command, policy, gif], cwd=REPOSITORY, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    film = image.open(gif)
    assert film.size == (480, 360)
    seconds = 0
    for i in range(film.n_frames):
        film.seek(i)
        seconds += film.info["duration"] / 1000
    assert seconds == pytest.approx(0.2 + 1, abs=0.06)  # real time, and the last picture stays for a second
    film.seek(0)
    picture = np.asarray(film.convert("RGB")).astype(int)
    assert picture[150:250, 180:300].std() > 30  # the robot
    red, green, blue = picture[10:100, 10:100].reshape(-1, 3).T
    assert ((red > 200) & (green > 180) & (blue < 120)).mean() > 0.05  # the ball, near, in the left depth image
    reader = imageio.get_reader(gif.with_suffix(".mp4"))
    assert reader.get_meta_data()["size"] == (128, 96) and reader.get_meta_data()["fps"] == 30
    assert reader.count_frames() == 7 + 29
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif", "film.mp4", "policy.pt"]
