"""Drive a policy trained with --goal command: `python -m ballbot_utils.drive runs/NAME`.

In MuJoCo's window the arrow keys change the commanded velocity (up: +y, away from the camera), and space stops; the
window needs a display. Arrows over the robot show the command (green) and its velocity (white, to the same scale).

`--commands FILE` follows commands without a window and prints the mean tracking error. Each line of the file is
`seconds vx vy`, in m/s in the world's frame; `--plot FILE.png` shows velocity against command. Settings and
disturbances are those of `python -m ballbot_utils.evaluate`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
import tyro

from ballbot_env import spawn_seeds
from ballbot_utils.commands import COMMAND_LIMIT, MAX_COMMAND
from ballbot_utils.common import (
    EvalSettings,
    PolicyFactory,
    check_settings,
    eval_task,
    load,
    policy_factory,
    require_packages,
    require_writable,
    run_program,
    step_policy,
    write,
)
from ballbot_utils.console import check_argument
from ballbot_utils.flags import Count
from ballbot_utils.model import TIMESTEP
from ballbot_utils.watch import check_display, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = 0.1  # m/s by which a key changes the command
KEYS = {262: (STEP, 0), 263: (-STEP, 0), 264: (0, -STEP), 265: (0, STEP)}  # GLFW's codes: right, left, down, up
SPACE = 32


@dataclass
class Args(EvalSettings):
    checkpoint: tyro.conf.Positional[Path] = tyro.MISSING
    """a checkpoint (.pt file), or the folder of a run, for its best.pt"""
    horizon: Count = 30_000
    """steps at which an episode in the window ends; with --commands it ends with them"""
    commands: Path | None = None
    """file of commands to follow without a window, lines of `seconds vx vy`; # begins a comment"""
    plot: Path | None = None
    """file for a plot of velocity against command, .png; with --commands"""
    script: Path | None = None
    """the script that trained it; default: the checkpoint names its script, in the working directory"""


def check_args(args: Args) -> None:
    """Exit with one line on the first invalid flag, before any work starts."""
    check_settings(args)
    if args.plot:
        check_argument(args.commands, "--plot needs --commands")
        require_writable("--plot", args.plot, args.overwrite, ".png")
        require_packages("--plot", "matplotlib")
    if args.commands:
        check_argument(args.commands.is_file(), f"--commands is {args.commands}: there is no such file")


def read_commands(path: Path) -> np.ndarray:
    """The commands in a file, (n, 3): seconds, x and y of the velocity, m/s. Exits with one line on an invalid one."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            seconds, x, y = row = tuple(map(float, words))
            valid = TIMESTEP <= seconds < 1e6 and max(abs(x), abs(y)) <= COMMAND_LIMIT
        except ValueError:
            valid = False
        check_argument(valid, f"{path}, line {number}: {line.strip()!r}: give seconds vx vy, up to {COMMAND_LIMIT:g} "
                       "m/s, as in: 2 0 0.4")  # fmt: skip
        rows.append(row)
    check_argument(rows, f"{path} has no commands: give lines of seconds vx vy, as in: 2 0 0.4")
    return np.array(rows)


def follow_commands(
    policy: PolicyFactory, args: Args, task: dict[str, Any], commands: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Follow the `commands` of `read_commands` for one episode, in an environment with the arguments `task`.

    Returns times (n,), s, targets (n, 2) and velocities (n, 2), m/s, after each action, and how the episode ended:
    "fell", "left the terrain" or "".
    """
    envs = gym.make_vec("Ballbot-v0", num_envs=1, num_threads=1, copy=False, **task)
    seeds = spawn_seeds(args.seed, 1)
    obs, _ = envs.reset(seed=seeds)
    ends, target, rows = np.cumsum(commands[:, 0]), commands[0, 1:], []
    envs.set_command([target])
    obs["command"][:] = target
    for steps, _, result in step_policy(envs, obs, policy, args, seeds):
        obs, _, terminations, truncations, infos = result
        ended = terminations[0] or truncations[0]
        velocity = infos["final_obs"][0]["vel"] if ended else obs["vel"][0]
        rows.append((steps * TIMESTEP, *target, *velocity[:2]))
        if ended:
            early = infos["episode"]["l"][0] < task["max_episode_steps"] * envs.frame_skip
            rows = np.array(rows)
            end = "fell" if terminations[0] else "left the terrain" if early else ""
            return rows[:, 0], rows[:, 1:3], rows[:, 3:], end
        target = commands[min(np.searchsorted(ends, steps * TIMESTEP + 1e-9), len(ends) - 1), 1:]
        if (target != envs.commands[0]).any():
            envs.set_command([target])
            obs["command"][:] = target


def format_report(commands: np.ndarray, times: np.ndarray, errors: np.ndarray, end: str) -> str:
    """The mean tracking error of each command and of all, as lines of text."""
    lines, start = ["seconds      vx      vy   tracking error (m/s)"], 0.0
    for seconds, x, y in commands:
        own = errors[(times > start + 1e-9) & (times <= start + seconds + 1e-9)]
        start += seconds
        lines.append(f"{seconds:7.2f}  {x:6.2f}  {y:6.2f}   " + (f"{own.mean():.3f}" if len(own) else "-"))
    lines.append(f"{times[-1]:7.2f}     all           {errors.mean():.3f}")
    return "\n".join(lines + ([f"{end} at {times[-1]:.2f} s"] if end else []))


def draw_figure(times: np.ndarray, targets: np.ndarray, velocities: np.ndarray) -> "Figure":
    """A figure of velocity against command, with a panel each for x and y."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    for i, axis in enumerate(figure.subplots(2, 1, sharex=True, sharey=True)):
        axis.plot(times, targets[:, i], color="black", linestyle="--", label="command")
        axis.plot(times, velocities[:, i], color="#0072B2", label="velocity")
        axis.set(ylabel=f"{'xy'[i]} (m/s)", xlim=(0, times[-1]))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.axes[1].set_xlabel("time (s)")
    return figure


def drive_by_keys(policy: PolicyFactory, args: Args, task: dict[str, Any]) -> None:
    """Drive by keyboard in MuJoCo's window until it is closed."""
    command = np.zeros(2)

    def on_key(code):
        if code == SPACE or code in KEYS:
            change = KEYS.get(code, -command)
            command[:] = np.clip(np.round(command + change, 2), -MAX_COMMAND, MAX_COMMAND)
            print(f"command: {command[0]:+.1f} {command[1]:+.1f} m/s", flush=True)

    def steer(envs, viewer):
        envs.set_command([command])
        x, y, _ = envs.velocities[0]
        values = f"{command[0]:+.2f} {command[1]:+.2f} m/s\n{x:+.2f} {y:+.2f} m/s\narrow keys, space stops"
        viewer.set_texts((None, None, "command\nvelocity\nkeys", values))

    print("the arrow keys change the command, space stops")
    render(policy, args, task, on_key, steer)


def main(args: Args) -> None:
    check_args(args)
    if args.commands:
        commands = read_commands(args.commands)
        args = replace(args, horizon=max(1, round(commands[:, 0].sum() / TIMESTEP)))
    else:
        check_display("the window", "give --commands FILE, which needs no window")
    torch.set_num_threads(1)
    policy, _ = load(args.checkpoint, args.script)
    commanded = policy.args.goal == "command"
    check_argument(commanded, f"{args.checkpoint} was trained without commands: train one with --goal command")
    task, policy = eval_task(args, policy.args, args.checkpoint), policy_factory(policy)
    if not args.commands:
        return drive_by_keys(policy, args, task)
    times, targets, velocities, end = follow_commands(policy, args, task, commands)
    print(format_report(commands, times, np.linalg.norm(velocities - targets, axis=1), end))
    if args.plot:
        write(args.plot, lambda part: draw_figure(times, targets, velocities).savefig(part, dpi=150))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
