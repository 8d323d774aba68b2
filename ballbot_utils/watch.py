"""Watch a trained policy: `python -m ballbot_utils.watch runs/a --render`, or `--video robot.mp4`.

`--render` shows it in MuJoCo's viewer, episode after episode in real time, until the window is closed; it needs a
display. `--video` writes one episode to a file, .mp4 or .gif, the depth images in its corners and the command in its
caption; it needs OpenGL and the packages of requirements-dev.txt. Arrows show the goal or the velocity commanded
(green), the robot's velocity (white, to the same scale) and pushes (red). Conditions and disturbances are those of
`python -m ballbot_utils.evaluate`; with the same flags, `--episode I` is its episode I, counted from 0.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
import tyro

try:
    from ballbot_env import BallbotVectorEnv, spawn_seeds
except ImportError as error:  # MUJOCO_GL names what is not there
    sys.exit(f"error: {error}")

import mujoco

from ballbot_utils.common import (
    Conditions,
    EpisodePolicy,
    begin,
    check_conditions,
    conditions,
    load,
    play,
    progress,
    require_min,
    require_writable,
    run_program,
    trained,
    write,
)
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.model import TIMESTEP
from ballbot_utils.scene import SceneRenderer, draw_arrows

if TYPE_CHECKING:
    from PIL import Image

PICTURE, FPS = {".mp4": (960, 720), ".gif": (480, 360)}, {".mp4": 30, ".gif": 20}
SHOWN_EVERY = 8  # steps, in the window
PUSH_SHOWN = 150  # steps that a push's arrow stays in a video


@dataclass
class Args(Conditions):
    checkpoint: tyro.conf.Positional[Path] = tyro.MISSING
    """a checkpoint, a .pt file, or the folder of a run, whose best.pt is meant"""
    render: bool = False
    """show it in MuJoCo's viewer"""
    video: Path | None = None
    """file to write one episode to, .mp4 or .gif"""
    episode: int = 0
    """the episode to show, from 0 as in evaluate; --render continues with the next ones"""
    stochastic: bool = False
    """draw actions from the policy instead of taking its mean"""
    script: Path | None = None
    """the script that trained it; default: the one that it names, in the working directory"""


def check(args: Args) -> None:
    """Exit with one line on the first flag that cannot be, before any work starts."""
    check_conditions(args)
    require_min(args, 0, "episode")
    check_argument(args.render != (args.video is not None), "give one of --render and --video")
    if args.video:
        require_writable("--video", args.video, args.overwrite, *FPS)


def episode(
    envs: BallbotVectorEnv, policy: EpisodePolicy, args: Conditions, number: int = 0
) -> Iterator[tuple[int, float, str]]:
    """Play episode `number` in the one environment of `envs`.

    After each step yields its length and return so far, and how it ended: "fell", "did not fall", or "" while it runs.
    `envs` then already has the next one's start.
    """
    seeds = spawn_seeds(args.seed, number + 1)[number:]
    obs, _ = begin(envs, seeds, args.horizon)
    total = 0.0
    for steps, _, (_, rewards, terminations, truncations, infos) in play(envs, obs, policy, args, seeds):
        total += rewards[0]
        if terminations[0] or truncations[0]:
            yield infos["episode"]["l"][0], total, "fell" if terminations[0] else "did not fall"
            return
        yield steps, total, ""


def check_display(what: str = "--render", instead: str = "write a --video instead") -> None:
    """Exit with one line where no window can be opened: MuJoCo's viewer would end the process with its own."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        exit_with_error(f"{what} needs a display, and there is none (DISPLAY is not set): {instead}")


def render(
    policy: EpisodePolicy,
    args: Conditions,
    task: dict[str, Any],
    on_key: Callable[[int], None] | None = None,
    steer: Callable[[BallbotVectorEnv, "mujoco.viewer.Handle"], None] | None = None,
    first: int = 0,
) -> None:
    """Show episodes from number `first` on in MuJoCo's viewer, in real time, until its window is closed.

    `on_key(code)` is told of keys (GLFW's codes), and `steer(envs, viewer)` is called before each picture.
    """
    import mujoco.viewer

    envs = gym.make_vec("Ballbot-v0", num_envs=1, num_threads=1, copy=False, **task)
    data = envs.batch.get_data(0)
    print("episodes follow one another until you close the window or press Ctrl-C")
    viewer = None
    try:
        panels = steer is None
        viewer = mujoco.viewer.launch_passive(envs.model, data, key_callback=on_key, show_left_ui=panels,
                                              show_right_ui=panels)  # fmt: skip
        viewer.cam.type, viewer.cam.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, envs.model.body("base").id
        viewer.cam.azimuth, viewer.cam.elevation, viewer.cam.distance = 90, -25, 2.5  # +y is away from you
        for number in itertools.count(first):
            started = time.perf_counter()
            for steps, total, end in episode(envs, policy, args, number):
                if steps % SHOWN_EVERY < envs.frame_skip and not end:
                    envs.get_data(0, data)
                    viewer.user_scn.ngeom = 0
                    draw_arrows(viewer.user_scn, envs.arrows(0))
                    if steer:
                        steer(envs, viewer)
                    viewer.sync()
                time.sleep(max(0, started + steps * TIMESTEP - time.perf_counter()))
                if not viewer.is_running():
                    return
            print(f"episode {number}: return {total:.1f}, {steps} steps, {end}")
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:  # no window after all
        exit_with_error(f"the window: {error}")
    finally:
        if viewer is not None:
            viewer.close()


def check_video(path: Path, flag: str = "--video") -> None:
    """Exit with one line, which names the `flag`, if a library or OpenGL is missing for a video."""
    try:
        import PIL  # noqa: F401

        if path.suffix == ".mp4":
            import imageio_ffmpeg  # noqa: F401
            from imageio.v2 import get_writer  # noqa: F401
    except ImportError as error:
        exit_with_error(f"{flag} needs {error.name}: pip install -r requirements-dev.txt")
    advice = ("install libosmesa6 and put MUJOCO_GL=osmesa before the command, or libegl1 and libgl1-mesa-dri and "
              "MUJOCO_GL=egl (Debian: apt-get install ...)")  # fmt: skip
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not (display or os.environ.get("MUJOCO_GL")):
        present = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if find_library(library)]
        advice = f"put MUJOCO_GL={' or MUJOCO_GL='.join(present)} before the command" if present else advice
        exit_with_error(f"{flag} needs OpenGL, and there is no display: {advice}")
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).close()
    except Exception as error:  # whatever the platform's OpenGL raises
        exit_with_error(f"{flag} needs OpenGL, which does not start ({error}): {advice}")


def video(policy: EpisodePolicy, args: Args, task: dict[str, Any]) -> None:
    """Write a video of one episode, in real time, the depth images in its corners."""
    fps, (width, height) = FPS[args.video.suffix], PICTURE[args.video.suffix]
    envs = gym.make_vec("Ballbot-v0", num_envs=1, num_threads=1, copy=False, **task)
    shots = []  # pose, depth images or None, arrows, caption
    force, pushed = np.zeros(3), 0  # of the last push, and the step of it
    for step, total, end in episode(envs, policy, args, args.episode):
        if not end:
            pose = envs.batch.qpos[0].copy()
            frames = None if envs.frames is None else envs.frames[0].numpy().copy()
            now = envs.forces[0]
            if now.any() or step > pushed + PUSH_SHOWN:  # a push is shorter than a picture
                force, pushed = now.copy(), step
            speed, arrows = f"{np.linalg.norm(envs.velocities[0, :2]):.2f} m/s", envs.arrows(0, force)
            if envs.commands is not None:
                speed += "    command ({:+.2f}, {:+.2f}) m/s".format(*envs.commands[0])
        if end or (step - 1) * TIMESTEP * fps >= len(shots):
            fallen = "    fell" if end == "fell" else ""
            caption = f"{step * TIMESTEP:.2f} s    {speed}    return {total:.1f}{fallen}"
            shots.append((pose, frames, arrows, caption))
            progress(f"playing: step {step:,} of at most {args.horizon:,}", step / args.horizon)

    places = [pose[envs.model.joint("base").qposadr[0] :][:2] for pose, *_ in shots]
    renderer = SceneRenderer(height, width, np.array(places), envs.terrain)

    def pictures():
        for i, (pose, frames, arrows, caption) in enumerate(shots):
            picture = compose(renderer.render(pose, arrows), frames, caption)
            yield from [picture] * (fps if i == len(shots) - 1 else 1)  # the end stays for a second
            progress(f"rendering: picture {i + 1} of {len(shots)}", (i + 1) / len(shots))

    write(args.video, lambda part: encode(pictures(), part, fps))
    renderer.close()
    print(f"{args.video}: return {total:.1f}, {step} steps, {end}")


def compose(picture: np.ndarray, frames: np.ndarray | None, caption: str) -> "Image.Image":
    """A picture with the left and right camera's depth (2, size, size), m, in its upper corners, and a caption."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(picture)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=image.height // 36)
    margin = image.height // 48
    draw.text((margin, image.height - margin), caption, "white", font, "ls", stroke_width=2, stroke_fill="black")
    if frames is None:
        return image
    side = image.width // 5
    near, far = 0.07, 0.7  # m
    palette = np.array([[253, 231, 37], [94, 201, 98], [33, 145, 140], [59, 82, 139], [68, 1, 84]])  # viridis
    place = np.log(np.maximum(frames, near) / near) / np.log(far / near) * (len(palette) - 1)
    for i, name, left in ((1, "left", margin), (0, "right", image.width - margin - side)):
        colors = np.stack([np.interp(place[i], range(len(palette)), c) for c in palette.T], -1).astype(np.uint8)
        image.paste(Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST), (left, margin))
        draw.rectangle((left - 1, margin - 1, left + side, margin + side), outline="white")
        text = f"{name} depth camera"
        at = (left + side // 2, margin + side + margin // 2)
        draw.text(at, text, "white", font, "ma", stroke_width=2, stroke_fill="black")
    return image


def encode(pictures: Iterable["Image.Image"], path: Path, fps: int) -> None:
    """Write pictures to an .mp4 (imageio with its own ffmpeg) or a .gif (Pillow)."""
    if path.suffix == ".mp4":
        from imageio.v2 import get_writer

        with get_writer(path, fps=fps, codec="libx264", quality=7) as writer:
            for picture in pictures:
                writer.append_data(np.asarray(picture))
        return
    from PIL import Image

    pictures = list(pictures)
    # One palette for all: no flicker, and a smaller file. The most frequent colours, and some of the rare ones.
    few = np.concatenate([np.asarray(picture) for picture in pictures[:: max(1, len(pictures) // 8)]])
    colors = []
    for method, count in ((Image.Quantize.MEDIANCUT, 192), (Image.Quantize.MAXCOVERAGE, 64)):
        colors += Image.fromarray(few).quantize(count, method).getpalette()[: 3 * count]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


def main(args: Args) -> None:
    check(args)
    torch.set_num_threads(1)
    loaded, _ = load(args.checkpoint, args.script)
    task, policy = conditions(args, loaded.args, args.checkpoint), trained(loaded, args.stochastic)
    held = loaded.args.frame_skip
    check_argument(
        args.horizon > held, f"--horizon is {args.horizon}: give more than the policy's --frame-skip, {held}"
    )
    if args.render:
        check_display()
        render(policy, args, task, first=args.episode)
    else:
        check_video(args.video)
        video(policy, args, task)


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
