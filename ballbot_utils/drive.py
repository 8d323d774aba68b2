"""Drive a policy trained with --goal command: `python -m ballbot_utils.drive runs/NAME`.

In MuJoCo's window the arrow keys change the velocity commanded, the upper one away from you (+y), and space stops; the
window needs a display. Arrows over the robot show the command (green) and its velocity (white, to the same scale).

`--commands FILE` follows commands without a window, and prints how far the velocity is from them on average. Each line
of the file is `seconds vx vy`, in m/s in the world's frame; `--plot FILE.png` shows velocity against command.
Conditions and disturbances are those of `python -m ballbot_utils.evaluate`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
import tyro

from ballbot_env import spawn_seeds
from ballbot_utils.common import (
    Conditions,
    EpisodePolicy,
    begin,
    check_conditions,
    conditions,
    load,
    play,
    require_writable,
    run_program,
    trained,
    write,
)
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.model import TIMESTEP
from ballbot_utils.watch import check_display, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP, TOP = 0.1, 0.6  # m/s, by which a key changes the command, and up to which
KEYS = {262: (STEP, 0), 263: (-STEP, 0), 264: (0, -STEP), 265: (0, STEP)}  # GLFW's codes: right, left, down, up
SPACE = 32
SHORT = 4000  # steps of an episode for which a start need not be moved: where this one goes is not known


@dataclass
class Args(Conditions):
    checkpoint: tyro.conf.Positional[Path] = tyro.MISSING
    """a checkpoint, a .pt file, or the folder of a run, whose best.pt is meant"""
    horizon: int = 30_000
    """steps at which an episode in the window ends; with --commands it ends with them"""
    commands: Path | None = None
    """file of commands to follow without a window, lines of `seconds vx vy`; # begins a comment"""
    plot: Path | None = None
    """file for a picture of velocity against command, .png; with --commands"""
    script: Path | None = None
    """the script that trained it; default: the one that it names, in the working directory"""


def check(args: Args) -> None:
    """Exit with one line on the first flag that cannot be, before any work starts."""
    check_conditions(args)
    if args.plot:
        check_argument(args.commands, "--plot needs --commands")
        require_writable("--plot", args.plot, args.overwrite, ".png")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            exit_with_error("--plot needs matplotlib: pip install -r requirements-dev.txt")
    if args.commands:
        check_argument(args.commands.is_file(), f"--commands is {args.commands}: there is no such file")


def read(path: Path) -> np.ndarray:
    """The commands in a file, (n, 3): seconds, and x and y of the velocity, m/s; exits with one line on a bad one."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            seconds, *velocity = map(float, words)
            good = len(velocity) == 2 and TIMESTEP <= seconds < 1e6 and max(map(abs, velocity)) <= 2
        except ValueError:
            good = False
        check_argument(
            good, f"{path}, line {number}: {line.strip()!r}: give seconds vx vy, up to 2 m/s, as in: 2 0 0.4"
        )
        rows.append((seconds, *velocity))
    check_argument(rows, f"{path} has no commands: give lines of seconds vx vy, as in: 2 0 0.4")
    return np.array(rows)


def follow(
    policy: EpisodePolicy, args: Args, task: dict[str, Any], commands: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Follow `commands` of `read` for one episode.

    Returns times (n,), s, commands (n, 2) and velocities (n, 2) after each action, m/s, and how it ended: "fell", "left
    the terrain" or "".
    """
    envs = gym.make_vec("Ballbot-v0", num_envs=1, num_threads=1, copy=False, **task)
    seeds = spawn_seeds(args.seed, 1)
    obs, _ = begin(envs, seeds, SHORT)
    ends = np.cumsum(commands[:, 0])
    wanted = commands[0, 1:]
    envs.set_command([wanted])
    obs["command"][:] = wanted
    rows = []
    for steps, _, result in play(envs, obs, policy, args, seeds):
        obs, _, terminations, truncations, infos = result
        ended = terminations[0] or truncations[0]
        last = infos["final_obs"][0] if ended else {key: value[0] for key, value in obs.items()}
        rows.append((steps * TIMESTEP, *wanted, *last["vel"][:2]))
        if ended:
            early = infos["episode"]["l"][0] < task["max_episode_steps"] * envs.frame_skip
            end = "fell" if terminations[0] else "left the terrain" if early else ""
            rows = np.array(rows)
            return rows[:, 0], rows[:, 1:3], rows[:, 3:], end
        wanted = commands[min(np.searchsorted(ends, steps * TIMESTEP + 1e-9), len(ends) - 1), 1:]
        if (wanted != envs.commands[0]).any():
            envs.set_command([wanted])
            obs["command"][:] = wanted


def report(commands: np.ndarray, times: np.ndarray, errors: np.ndarray, end: str) -> str:
    """The mean tracking error of each command and of all, as lines of text."""
    lines = ["seconds      vx      vy   tracking error (m/s)"]
    start = 0.0
    for seconds, x, y in commands:
        here = errors[(times > start + 1e-9) & (times <= start + seconds + 1e-9)]
        start += seconds
        lines.append(f"{seconds:7.2f}  {x:6.2f}  {y:6.2f}   " + (f"{here.mean():.3f}" if len(here) else "-"))
    lines.append(f"{times[-1]:7.2f}     all           {errors.mean():.3f}")
    return "\n".join(lines + ([f"{end} at {times[-1]:.2f} s"] if end else []))


def draw(times: np.ndarray, wanted: np.ndarray, velocities: np.ndarray) -> "Figure":
    """A figure of velocity against command, a panel each for x and y."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    for i, axis in enumerate(figure.subplots(2, 1, sharex=True, sharey=True)):
        axis.plot(times, wanted[:, i], color="black", linestyle="--", label="command")
        axis.plot(times, velocities[:, i], color="#0072B2", label="velocity")
        axis.set(ylabel=f"{'xy'[i]} (m/s)", xlim=(0, times[-1]))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.axes[1].set_xlabel("time (s)")
    return figure


def by_keys(policy: EpisodePolicy, args: Args, task: dict[str, Any]) -> None:
    """Drive by keyboard in MuJoCo's window until it is closed."""
    wanted = np.zeros(2)

    def on_key(code):
        change = KEYS.get(code, (0, 0))
        wanted[:] = 0 if code == SPACE else np.clip(np.round(wanted + change, 2), -TOP, TOP)
        if code == SPACE or code in KEYS:
            print(f"command: {wanted[0]:+.1f} {wanted[1]:+.1f} m/s", flush=True)

    def steer(envs, viewer):
        envs.set_command([wanted])
        x, y, _ = envs.velocities[0]
        figures = f"{wanted[0]:+.2f} {wanted[1]:+.2f} m/s\n{x:+.2f} {y:+.2f} m/s\narrow keys, space stops"
        viewer.set_texts((None, None, "command\nvelocity\nkeys", figures))

    print("the arrow keys change the command, space stops")
    render(policy, args, task, on_key, steer)


def main(args: Args) -> None:
    check(args)
    if args.commands:
        commands = read(args.commands)
    else:
        check_display("the window", "give --commands FILE, which needs none")
    torch.set_num_threads(1)
    policy, _ = load(args.checkpoint, args.script)
    commanded = policy.args.goal == "command"
    check_argument(commanded, f"{args.checkpoint} was trained without commands: train one with --goal command")
    if not args.commands:
        by_keys(trained(policy), replace(args, horizon=SHORT), conditions(args, policy.args, args.checkpoint))
        return
    args = replace(args, horizon=max(1, round(commands[:, 0].sum() / TIMESTEP)))
    task = conditions(args, policy.args, args.checkpoint)
    times, wanted, velocities, end = follow(trained(policy), args, task, commands)
    print(report(commands, times, np.linalg.norm(velocities - wanted, axis=1), end))
    if args.plot:
        write(args.plot, lambda part: draw(times, wanted, velocities).savefig(part, dpi=150))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
