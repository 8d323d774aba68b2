"""Watch a trained policy: `python -m ballbot_utils.watch runs/a --render`, or `--video robot.mp4`.

`--render` shows episode after episode in MuJoCo's viewer, in real time, until its window is closed; it needs a display.
`--video` writes one episode to a file, .mp4 or .gif, with the depth images in the upper corners and the command in the
caption; it needs OpenGL and the packages of requirements-dev.txt. Arrows show the goal or the commanded velocity
(green), the robot's velocity (white, to the same scale) and pushes (red). Settings and disturbances are those of
`python -m ballbot_utils.evaluate`; with the same flags, `--episode I` is its episode I, counted from 0.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import Field

from ballbot_utils.console import check_argument, exit_with_error, has_display, print_rank0

try:
    from ballbot_env import BallbotVectorEnv, spawn_seeds
except ImportError as error:  # MUJOCO_GL names a missing library
    exit_with_error(error)

import mujoco

from ballbot_utils.common import (
    EvalSettings,
    PolicyFactory,
    check_settings,
    eval_task,
    load,
    policy_factory,
    progress,
    require_packages,
    require_writable,
    reset_for_horizon,
    run_program,
    step_policy,
    write,
)
from ballbot_utils.flags import Seed
from ballbot_utils.model import TIMESTEP
from ballbot_utils.scene import SceneRenderer, draw_arrows

if TYPE_CHECKING:
    from PIL import Image

WIDTH, FPS = {".mp4": 960, ".gif": 480}, {".mp4": 30, ".gif": 20}
RENDER_INTERVAL = 8  # steps, in the window
PUSH_ARROW_STEPS = 150  # steps that a push's arrow stays in a video


@dataclass
class Args(EvalSettings):
    checkpoint: tyro.conf.Positional[Path] = tyro.MISSING
    """a checkpoint (.pt file), or the folder of a run, for its best.pt"""
    render: bool = False
    """show it in MuJoCo's viewer"""
    video: Path | None = None
    """file to write one episode to, .mp4 or .gif"""
    width: Annotated[int, Field(ge=64, le=1920, multiple_of=64)] | None = None
    """width of the video, pixels; its height is 3/4 of that; default: 960 of an .mp4, 480 of a .gif"""
    episode: Seed = 0
    """the episode to show, from 0 as in evaluate; --render continues with the next ones"""
    stochastic: bool = False
    """sample actions instead of taking their mean"""
    script: Path | None = None
    """the script that trained it; default: the checkpoint names its script, in the working directory"""


def check_args(args: Args) -> None:
    """Exit with one line on the first invalid flag, before any work starts."""
    check_settings(args)
    check_argument(args.render != (args.video is not None), "give one of --render and --video")
    if args.video:
        require_writable("--video", args.video, args.overwrite, *FPS)


def run_episode(
    envs: BallbotVectorEnv, policy: PolicyFactory, args: EvalSettings, number: int = 0
) -> Iterator[tuple[int, float, str]]:
    """Run episode `number` in the only environment of `envs`.

    Yields after each step the episode's length and return so far, and its end: "fell", "did not fall", or "" while it
    runs. At the end `envs` has already started the next episode.
    """
    seeds = spawn_seeds(args.seed, number + 1)[number:]
    obs, _ = reset_for_horizon(envs, seeds, args.horizon)
    total = 0.0
    for steps, _, (_, rewards, terminations, truncations, infos) in step_policy(envs, obs, policy, args, seeds):
        total += rewards[0]
        if terminations[0] or truncations[0]:
            yield infos["episode"]["l"][0], total, "fell" if terminations[0] else "did not fall"
            return
        yield steps, total, ""


def check_display(what: str = "--render", instead: str = "write a --video instead") -> None:
    """Exit with one line if no window can be opened. MuJoCo's viewer would end the process with its own message."""
    if not has_display():
        exit_with_error(f"{what} needs a display (DISPLAY is not set): {instead}")


def render(
    policy: PolicyFactory,
    args: EvalSettings,
    task: dict[str, Any],
    on_key: Callable[[int], None] | None = None,
    steer: Callable[[BallbotVectorEnv, "mujoco.viewer.Handle"], None] | None = None,
    first: int = 0,
) -> None:
    """Show episodes, from number `first`, in MuJoCo's viewer, in real time, until its window is closed.

    `on_key(code)` is called with the GLFW code of each key, and `steer(envs, viewer)` before each image.
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
            for steps, total, end in run_episode(envs, policy, args, number):
                if steps % RENDER_INTERVAL < envs.frame_skip and not end:
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
    except RuntimeError as error:  # the window cannot be opened
        exit_with_error(f"the window: {error}")
    finally:
        if viewer is not None:
            viewer.close()


def check_video(path: Path) -> None:
    """Exit with one line if a video needs a missing package or OpenGL."""
    packages = ["imageio.v2", "imageio_ffmpeg"] * (path.suffix == ".mp4")
    require_packages("--video", *packages, requirements="requirements-dev.txt")
    advice = ("install libosmesa6 and put MUJOCO_GL=osmesa before the command, or libegl1 and libgl1-mesa-dri and "
              "MUJOCO_GL=egl (Debian: apt-get install ...)")  # fmt: skip
    if not (has_display() or os.environ.get("MUJOCO_GL")):
        present = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if find_library(library)]
        advice = f"put MUJOCO_GL={' or MUJOCO_GL='.join(present)} before the command" if present else advice
        exit_with_error(f"--video needs OpenGL, and there is no display: {advice}")
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).close()
    except Exception as error:  # whatever the platform's OpenGL raises
        exit_with_error(f"--video needs OpenGL, which does not start ({error}): {advice}")


def write_video(policy: PolicyFactory, args: Args, task: dict[str, Any]) -> None:
    """Write a video of one episode in real time."""
    fps, width = FPS[args.video.suffix], args.width or WIDTH[args.video.suffix]
    envs = gym.make_vec("Ballbot-v0", num_envs=1, num_threads=1, copy=False, **task)
    shots = []  # pose, frames or None, arrows, caption
    force, pushed_at = np.zeros(3), 0  # the last push, and its step
    for step, total, end in run_episode(envs, policy, args, args.episode):
        if not end:
            pose = envs.batch.qpos[0].copy()
            frames = None if envs.frames is None else envs.frames[0].numpy().copy()
            now = envs.forces[0]
            if now.any() or step > pushed_at + PUSH_ARROW_STEPS:  # a push is shorter than an image's time
                force, pushed_at = now.copy(), step
            speed, arrows = f"{np.linalg.norm(envs.velocities[0, :2]):.2f} m/s", envs.arrows(0, force)
            if envs.commands is not None:
                speed += "    command ({:+.2f}, {:+.2f}) m/s".format(*envs.commands[0])
        if end or (step - 1) * TIMESTEP * fps >= len(shots):
            end_text = "    fell" if end == "fell" else ""
            caption = f"{step * TIMESTEP:.2f} s    {speed}    return {total:.1f}{end_text}"
            shots.append((pose, frames, arrows, caption))
            progress(f"running: step {step:,} of at most {args.horizon:,}", step / args.horizon)

    positions = [pose[envs.model.joint("base").qposadr[0] :][:2] for pose, *_ in shots]
    renderer = SceneRenderer(width * 3 // 4, width, np.array(positions), envs.terrain)

    def render_images():
        for i, (pose, frames, arrows, caption) in enumerate(shots):
            image = compose_image(renderer.render(pose, arrows), frames, caption)
            yield from [image] * (fps if i == len(shots) - 1 else 1)  # the end stays for a second
            progress(f"rendering: image {i + 1} of {len(shots)}", (i + 1) / len(shots))

    write(args.video, lambda part: encode_video(render_images(), part, fps))
    renderer.close()
    print_rank0(f"{args.video}: return {total:.1f}, {step} steps, {end}")


def compose_image(pixels: np.ndarray, frames: np.ndarray | None, caption: str) -> "Image.Image":
    """An image of `pixels`, uint8 (height, width, 3), with depth `frames` (2, size, size), m, and a caption."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=image.height // 36)
    margin = image.height // 48
    draw.text((margin, image.height - margin), caption, "white", font, "ls", stroke_width=2, stroke_fill="black")
    if frames is None:
        return image
    side = image.width // 5
    near, far = 0.07, 0.7  # m
    palette = np.array([[253, 231, 37], [94, 201, 98], [33, 145, 140], [59, 82, 139], [68, 1, 84]])  # viridis
    shade = np.log(np.maximum(frames, near) / near) / np.log(far / near) * (len(palette) - 1)
    for i, name, left in ((1, "left", margin), (0, "right", image.width - margin - side)):
        colors = np.stack([np.interp(shade[i], range(len(palette)), c) for c in palette.T], -1).astype(np.uint8)
        image.paste(Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST), (left, margin))
        draw.rectangle((left - 1, margin - 1, left + side, margin + side), outline="white")
        text = f"{name} depth camera"
        at = (left + side // 2, margin + side + margin // 2)
        draw.text(at, text, "white", font, "ma", stroke_width=2, stroke_fill="black")
    return image


def encode_video(images: Iterable["Image.Image"], path: Path, fps: int) -> None:
    """Write images to an .mp4 (imageio with its own ffmpeg) or a .gif (Pillow)."""
    if path.suffix == ".mp4":
        from imageio.v2 import get_writer

        with get_writer(path, fps=fps, codec="libx264", quality=7) as writer:
            for image in images:
                writer.append_data(np.asarray(image))
        return
    from PIL import Image

    images = list(images)
    # One palette, of the most frequent colors and some rare ones: no flicker, and a smaller file
    few = np.concatenate([np.asarray(image) for image in images[:: max(1, len(images) // 8)]])
    colors = []
    for method, count in ((Image.Quantize.MEDIANCUT, 192), (Image.Quantize.MAXCOVERAGE, 64)):
        colors += Image.fromarray(few).quantize(count, method).getpalette()[: 3 * count]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)


def main(args: Args) -> None:
    check_args(args)
    torch.set_num_threads(1)
    loaded, _ = load(args.checkpoint, args.script)
    task, policy = eval_task(args, loaded.args, args.checkpoint), policy_factory(loaded, args.stochastic)
    check_argument(args.horizon > task["frame_skip"], f"--horizon is {args.horizon}: give more than the policy's "
                   f"--frame-skip, {task['frame_skip']}")  # fmt: skip
    if args.render:
        check_display()
        render(policy, args, task, first=args.episode)
    else:
        check_video(args.video)
        write_video(policy, args, task)


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
