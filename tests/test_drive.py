"""Driving by commands: from a file, by keyboard in a window, and errors on invalid input."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_ballbot as ppo
from ballbot_utils import drive

REPOSITORY = Path(ppo.__file__).resolve().parent


def save_policy(path, goal="command"):
    torch.manual_seed(0)
    args = ppo.Args(num_threads=1, hidden_size=16, pi_layers=1, vf_layers=1, cameras=False, frame_skip=4, goal=goal)
    torch.save({"model": ppo.Agent(args).state_dict(), "args": asdict(args), "global_step": 0}, path)
    return path


@pytest.fixture
def args(tmp_path):
    (tmp_path / "commands.txt").write_text("# a script\n0.1 0 0.4\n\n0.06 -0.2 0\n")
    return drive.Args(
        checkpoint=save_policy(tmp_path / "policy.pt"), commands=tmp_path / "commands.txt", terrain="flat"
    )


def error_of(args):
    with pytest.raises(SystemExit) as raised:
        drive.main(args)
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("change, message", [
    ({"commands": None, "plot": Path("a.png")}, "--plot needs --commands"),
    ({"plot": Path("a.gif")}, "give a name ending in .png"),
    ({"commands": Path("nowhere.txt")}, "--commands is nowhere.txt: there is no such file"),
    ({"checkpoint": Path("nowhere.pt")}, "nowhere.pt is missing"),
])  # fmt: skip
def test_bad_flags(args, change, message):
    assert message in error_of(replace(args, **change))


@pytest.mark.parametrize("line", ["1 0", "1 0 north", "0 0 0.4", "1 0 2.1", "1 nan 0", "-1 0 0"])
def test_invalid_commands(args, line):
    args.commands.write_text("1 0 0.4\n" + line)
    assert f"commands.txt, line 2: {line!r}: give seconds vx vy" in error_of(args)
    args.commands.write_text("# nothing")
    assert "has no commands" in error_of(args)


def test_comments_and_a_byte_order_mark(args):
    args.commands.write_bytes(b"\xef\xbb\xbf2 0 0.4  # ahead\r\n# \xff\n1.5 -0.1 0# left\n  #\n")
    assert drive.read_commands(args.commands).tolist() == [[2, 0, 0.4], [1.5, -0.1, 0]]


def test_a_policy_trained_without_commands(args, tmp_path):
    policy = save_policy(tmp_path / "forward.pt", goal="forward")
    assert "was trained without commands: train one with --goal command" in error_of(replace(args, checkpoint=policy))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a display")
def test_without_display(args, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "the window needs a display" in error_of(replace(args, commands=None))


def test_commands_are_followed(args, capsys):
    pytest.importorskip("matplotlib")
    seen = []

    def policy(envs, generator):
        return lambda obs: seen.append(obs["command"][0].tolist()) or np.zeros((1, 3))

    commands = drive.read_commands(args.commands)
    task = drive.eval_task(replace(args, horizon=80), ppo.Args(goal="command", cameras=False, frame_skip=4), "policy")
    times, targets, velocities, end = drive.follow_commands(policy, args, task, commands)
    # Of 20 actions of 8 ms, the first 13 begin within 0.1 s; the others are for the next 0.06 s
    assert end == "" and times[-1] == pytest.approx(0.16)
    assert np.array(seen) == pytest.approx(np.array([[0, 0.4]] * 13 + [[-0.2, 0]] * 7)) and targets.shape == (20, 2)
    assert np.array(seen) == pytest.approx(targets)
    assert velocities.shape == (20, 2) and np.abs(velocities).max() > 0
    errors = np.linalg.norm(velocities - targets, axis=1)
    plot = args.commands.with_name("plot.png")
    drive.main(replace(args, plot=plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["0.10", "0.00", "0.40"] and lines[3].split()[:2] == ["0.16", "all"]
    report = drive.format_report(commands, times, errors, "fell")
    assert report.splitlines()[1].split()[3] == f"{errors[:12].mean():.3f}" and report.endswith("fell at 0.16 s")


@pytest.fixture
def screen():
    """A display without a screen, :N, or a skip."""
    if not (shutil.which("Xvfb") and shutil.which("xdotool")):
        pytest.skip("needs Xvfb and xdotool")
    read, write = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "640x480x24"], pass_fds=[write],
                              stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(write)
    with os.fdopen(read) as pipe:
        number = pipe.readline().strip()  # empty if it ends
    if not number:
        pytest.skip("Xvfb does not start")
    yield f":{number}"
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_the_keyboard_drives_in_a_window(args, screen):
    environment = os.environ | {"DISPLAY": screen, "LIBGL_ALWAYS_SOFTWARE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("MUJOCO_GL", None)
    command = [sys.executable, "-W", "ignore", "-m", "ballbot_utils.drive", args.checkpoint, "--terrain", "flat"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip

    def xdotool(*words):
        return subprocess.run(["xdotool", *words], env=environment, text=True, capture_output=True).stdout.split()

    try:
        deadline, window = time.monotonic() + 120, []
        while not window and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
            window = xdotool("search", "--name", "MuJoCo")
        if not window:
            process.kill()
            error = process.communicate()[1]
            if any(word in error for word in ("OpenGL", "GLX", "GLFW", "GLAD")):
                pytest.skip("no OpenGL in a window here")
            raise AssertionError(f"no window: {error}")
        for line in process.stdout:
            if "episode" in line or "start" in line:
                break
        printed = []
        for key, expected in (("Up", "+0.0 +0.1"), ("Up", "+0.0 +0.2"), ("Right", "+0.1 +0.2"), ("space", "+0.0 +0.0")):
            xdotool("key", "--window", window[0], key)
            for line in process.stdout:  # ends when the process does
                if line.startswith("command: "):
                    printed.append(line.split("command: ")[1].split(" m/s")[0])
                    break
            assert printed[-1:] == [expected], printed
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
