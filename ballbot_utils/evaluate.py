"""Evaluate trained policies: `python -m ballbot_utils.evaluate runs/a runs/b/last.pt`.

Each policy runs episodes on terrain that it was not trained on. A table compares the policies: return, length, speed
and more, with 95 % bootstrap intervals, the guide's targets, and the gap between training terrain and unseen terrain;
for policies that follow commands, the tracking error instead of the speed. Longer episodes (`--horizon`), higher hills
(`--terrain-amplitude`) and disturbances show how robust a policy is.

Each episode has its own random numbers, from --seed and its index. It does not depend on the number of episodes, and
`python -m ballbot_utils.watch --episode I` shows it, with the same flags.

--push J applies a horizontal force to the base's centre of mass, in a random direction, of impulse J (N·s) and 20 ms,
every `--push-interval` seconds. 1 N·s changes the speed of the robot, 3.9 kg, by some 0.26 m/s.

--obs-noise S adds Gaussian noise of standard deviation S to every sensor in its own unit: 0.01 is 0.01 rad, rad/s,
m/s and m of depth, and 0.1 rad/s of a wheel. It is sampled at each step, for depth with each frame. The last action
and the frames' age have no noise.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from numpy.typing import ArrayLike
from pydantic import Field

from ballbot_env import spawn_seeds
from ballbot_utils.common import (
    EvalSettings,
    PolicyFactory,
    check_settings,
    eval_task,
    load,
    policy_factory,
    progress,
    require_writable,
    reset_for_horizon,
    run_program,
    step_policy,
    write,
)
from ballbot_utils.console import check_argument, print_rank0
from ballbot_utils.flags import Count, format_flags
from ballbot_utils.model import TIMESTEP
from ballbot_utils.runs import TARGET_LENGTH, TARGET_RETURN

MAX_ENVS = 100  # episodes at a time, as in ppo_ballbot.evaluate


@dataclass
class EvalArgs(EvalSettings):
    """Flags of every program that prints the table."""

    episodes: Count = 100
    """episodes per policy"""
    num_threads: Annotated[int, Field(ge=0, le=1000)] = 0
    """CPU threads of the physics, 0: one per core"""
    json: str = ""
    """file for all results, with those of each episode and its seed; - is standard output, and the table then goes to
    standard error"""


@dataclass
class Args(EvalArgs):
    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """checkpoints (.pt files), or folders of runs, for their best.pt"""
    stochastic: bool = False
    """also evaluate with sampled actions instead of the mean, in additional columns"""
    script: Path | None = None
    """the script that trained them; default: each checkpoint names its script, in the working directory"""
    allow_training_terrain: bool = False
    """permit a --terrain-seed that a checkpoint was trained on"""
    gap: bool = True
    """evaluate on the training terrain too and print the gap, the guide's sign of overfitting; doubles the time"""


def short_name(path: Path, paths: Sequence[Path]) -> str:
    """A checkpoint's run, with the file's name unless that is best.pt; the whole path if this is ambiguous."""

    def shorten(path):
        path = path / "best.pt" if path.is_dir() else path
        folder = path.resolve().parent.name
        return folder if path.name == "best.pt" else f"{folder}/{path.name}"

    return shorten(path) if [shorten(p) for p in paths].count(shorten(path)) == 1 else str(path)


def check_args(args: EvalArgs) -> None:
    """Exit with one line on the first invalid flag, before any work starts."""
    check_settings(args)
    if args.json not in ("", "-"):
        require_writable("--json", Path(args.json), args.overwrite, ".json")


def evaluate_policy(
    policy: PolicyFactory, args: EvalArgs, task: dict[str, Any], title: str = ""
) -> dict[str, np.ndarray]:
    """Run `args.episodes` episodes in environments with the arguments `task`; `title` is shown with the progress.

    Returns a dict of arrays (episodes,), in the order of their seeds: return, length (steps), speed (m/s) and distance
    (m) along the goal, effort (mean of ||action||² after clipping), and whether it falls or left_terrain. With
    commands, tracking_error (m/s), the mean distance of the velocity from the command, replaces speed and distance.
    Only the first episode of each environment counts, otherwise short episodes would have too much weight.
    """
    envs = gym.make_vec("Ballbot-v0", num_envs=min(args.episodes, MAX_ENVS), num_threads=args.num_threads, copy=False,
                        **task)  # fmt: skip
    motion = ("tracking_error",) if envs.goal is None else ("speed", "distance")
    names = ("return", "length", *motion, "effort", "falls", "left_terrain")
    rows, done, rounds = np.empty((args.episodes, len(names))), 0, -(-args.episodes // envs.num_envs)
    for round_ in range(rounds):
        first = round_ * envs.num_envs
        seeds = spawn_seeds(args.seed, first + envs.num_envs)[first:]
        obs, info = reset_for_horizon(envs, seeds, args.horizon)
        start, command = info["position"][:, :2], obs.get("command")
        effort, error = np.zeros(envs.num_envs), np.zeros(envs.num_envs)
        running = first + np.arange(envs.num_envs) < args.episodes
        for step, actions, result in step_policy(envs, obs, policy, args, seeds):
            obs, _, terminations, truncations, infos = result
            effort += np.square(np.clip(actions, -1, 1)).sum(1)
            ended = np.flatnonzero((terminations | truncations) & running)
            for i in ended:
                length = infos["episode"]["l"][i]
                if envs.goal is None:
                    error[i] += np.linalg.norm(infos["final_obs"][i]["vel"][:2] - command[i])
                    motion = (error[i] * envs.frame_skip / step,)
                else:
                    distance = (infos["final_info"]["position"][i, :2] - start[i]) @ envs.goal
                    motion = distance / (length * TIMESTEP), distance
                left_terrain = truncations[i] and length < args.horizon
                rows[first + i] = (infos["episode"]["r"][i], length, *motion, effort[i] * envs.frame_skip / step,
                                   terminations[i], left_terrain)  # fmt: skip
            running[ended] = False
            if envs.goal is None:
                error += np.linalg.norm(obs["vel"][:, :2] - command, axis=1)
                command = obs["command"]
            done += len(ended)
            if step // envs.frame_skip % 50 == 0:
                share = (round_ + step / args.horizon) / rounds
                at = f"step {step:,} of at most {args.horizon:,}"
                progress(f"{title}: {done:>4} of {args.episodes} episodes, {at}", share)
            if not running.any():
                break
    envs.close()
    return dict(zip(names, rows.T))


# Statistics


def bootstrap_interval(values: ArrayLike, minus: ArrayLike = (0.0,), resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval (low, high) of the mean of `values` (n,), minus that of `minus` (m,)."""
    rng = np.random.default_rng(0)
    samples = (np.asarray(sample, float) for sample in (values, minus))
    means, others = (x[rng.integers(len(x), size=(resamples, len(x)))].mean(1) for x in samples)
    low, high = np.quantile(means - others, ((1 - 0.95) / 2, (1 + 0.95) / 2))
    return float(low), float(high)


def summarize(episodes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means with intervals of all quantities, numbers of falls and of episodes that left the terrain, targets."""
    counts = {name: int(episodes[name].sum()) for name in ("falls", "left_terrain")}
    summary = {"episodes": len(episodes["return"])}
    for name in [name for name in episodes if name not in counts]:
        low, high = bootstrap_interval(episodes[name])
        summary[name] = {"mean": float(episodes[name].mean()), "low": low, "high": high}
    targets = (("return", TARGET_RETURN), ("length", TARGET_LENGTH))
    return summary | counts | {"targets": {name: summary[name]["mean"] > target for name, target in targets}}


def make_column(
    label: str, args: EvalArgs, task: dict[str, Any], episodes: dict[str, np.ndarray], **more: Any
) -> dict[str, Any]:
    """A column of `format_table` from the `episodes` of one policy, by `evaluate_policy`; `more` replaces defaults."""
    settings = {name: getattr(args, name) for name in ("push", "push_interval", "obs_noise", "seed")}
    values = {key: values.tolist() for key, values in episodes.items()}
    column = {"label": label, "global_step": 0, "stochastic": False, "task": task, **settings,
              "summary": summarize(episodes), "gap": None, "no_gap": "",
              "per_episode": {"seed": spawn_seeds(args.seed, args.episodes), **values}}  # fmt: skip
    return column | more


def format_table(results: list[dict[str, Any]], width: int) -> str:
    """The columns of `make_column` side by side, in as many blocks as the width (characters) needs."""

    def interval(name, digits):
        text = "{mean:.{0}f} [{low:.{0}f}, {high:.{0}f}]"
        return lambda r: text.format(digits, **r["summary"][name]) if name in r["summary"] else "-"

    def target(name, value):
        def text(r):
            if "tracking_error" in r["summary"]:
                return "-"  # another task
            s = r["summary"][name]
            unsure = ", within error" if s["low"] <= value < s["high"] else ""
            return ("reached" if s["mean"] > value else "missed") + unsure

        return text

    def count(name):
        return lambda r: f"{r['summary'][name]} of {r['summary']['episodes']}"

    def terrain(r):
        t = r["task"]
        seed = f" {t['terrain_seed']}" if "terrain_seed" in t else ""
        return t["terrain"] + seed + (f", {t['terrain_amplitude']:g} m" if "terrain_amplitude" in t else "")

    def generalization_gap(r):
        g = r["gap"]
        return "-" if g is None else f"{g['mean']:+.1f} [{g['low']:+.1f}, {g['high']:+.1f}]"

    rows = {
        "": lambda r: r["label"],
        "steps trained": lambda r: f"{r['global_step']:,}",
        "actions": lambda r: "sampled" if r["stochastic"] else "mean",
        "terrain, amplitude": terrain,
        "frame skip (steps per action)": lambda r: f"{r['task']['frame_skip']}",
        "wheel damping (N·m·s/rad)": lambda r: f"{r['task']['wheel_damping']:g}",
        "return": interval("return", 1),
        "length (steps)": interval("length", 0),
        "falls": count("falls"),
    }
    for name, key, digits in (("speed along goal (m/s)", "speed", 3), ("distance along goal (m)", "distance", 2),
                              ("tracking error (m/s)", "tracking_error", 3)):  # fmt: skip
        if any(key in r["summary"] for r in results):
            rows[name] = interval(key, digits)
    usual = "terrain terrain_seed terrain_amplitude cameras wheel_damping frame_skip max_episode_steps goal".split()
    others = [" ".join(f"{k}={v}" for k, v in r["task"].items() if k not in usual) for r in results]
    if any(others):
        rows["--env-kwargs and --reward"] = lambda r: others[[x is r for x in results].index(True)] or "-"
    rows |= {
        "effort (mean ||action||²)": interval("effort", 3),
        f"target: return > {TARGET_RETURN}": target("return", TARGET_RETURN),
        f"target: length > {TARGET_LENGTH}": target("length", TARGET_LENGTH),
    }
    if any(r["summary"]["left_terrain"] for r in results):
        rows["ended at the terrain's edge"] = count("left_terrain")
    if any(r["gap"] for r in results):
        rows["return, training terrain"] = lambda r: "-" if r["gap"] is None else f"{r['gap']['training']:.1f}"
        rows["gap: training - unseen"] = generalization_gap
    cells = [[text(r) for text in rows.values()] for r in results]
    widths = [max(map(len, column)) for column in cells]
    head, lines = max(map(len, rows)), []
    while cells:
        fit = max(1, sum(head + sum(widths[:k]) + 3 * k <= width for k in range(1, len(cells) + 1)))
        for i, name in enumerate(rows):
            line = name.ljust(head) + "".join(f"   {cells[k][i]:>{widths[k]}}" for k in range(fit))
            lines.append(line.rstrip())
        lines.append("")
        cells, widths = cells[fit:], widths[fit:]
    return "\n".join(lines)


def format_notes(args: EvalArgs, results: list[dict[str, Any]]) -> str:
    """Notes on the table, one per line."""
    lines = [f"In brackets: 95 % bootstrap intervals of the mean over {args.episodes} episodes."]
    defaults = {"push": 0, "obs_noise": 0, "terrain_amplitude": 0.1, "horizon": 4000}
    changed = {name: getattr(args, name) for name in defaults if getattr(args, name) not in (None, defaults[name])}
    if changed:
        lines.append(f"The targets are for 4000 steps without disturbances; here: {format_flags(changed)}.")
    if args.episodes < 100:
        lines.append("The targets are for the mean over 100 episodes.")
    constant = any(r["task"]["terrain"] == "flat" and r["task"].get("goal") != "command" and not r["stochastic"]
                   for r in results)  # fmt: skip
    if constant and not (args.push or args.obs_noise):
        lines.append("On flat ground, without disturbances, all episodes with mean actions are the same: their "
                     "intervals say nothing.")  # fmt: skip
    for r in results:
        name = r["label"] + (", sampled actions" if r["stochastic"] else "")
        if r["gap"] is not None:
            overfits = r["gap"]["low"] > 0
            sign = (
                "better on its training terrain, the guide's sign of overfitting"
                if overfits
                else "no sign of overfitting"
            )
            lines.append(f"{name}: {sign}.")
        elif r["no_gap"]:
            lines.append(f"{name}: no gap, {r['no_gap']}.")
    return "\n".join(lines)


def evaluate(args: Args, loaded: list[tuple[Path, Any, int]], tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluate policies, (path, Policy, training steps) each, in environments with the arguments `tasks`.

    Returns the columns of `format_table`.
    """
    results = []
    for (path, policy, global_step), task in zip(loaded, tasks):
        train_args, name = policy.args, short_name(path, args.checkpoints)
        for stochastic in (False, True)[: 1 + args.stochastic]:
            factory, gap, no_gap = policy_factory(policy, stochastic), None, ""
            episodes = evaluate_policy(factory, args, task, name)
            if args.gap and train_args.terrain != task["terrain"]:
                no_gap = f"it was trained on another kind of terrain, {train_args.terrain}"
            elif args.gap and "terrain_seed" not in task:
                no_gap = "this terrain is the same for every seed"
            elif args.gap and task["terrain_seed"] == train_args.terrain_seed:
                no_gap = "this is its training terrain"
            elif args.gap:
                training = task | {"terrain_seed": train_args.terrain_seed}
                returns = evaluate_policy(factory, args, training, f"{name}, training terrain")["return"]
                low, high = bootstrap_interval(returns, minus=episodes["return"])
                mean = float(returns.mean() - episodes["return"].mean())
                gap = {"training": float(returns.mean()), "mean": mean, "low": low, "high": high}
            results.append(make_column(name, args, task, episodes, global_step=global_step, stochastic=stochastic,
                                       gap=gap, no_gap=no_gap, checkpoint=str(path)))  # fmt: skip
    return results


def print_results(args: EvalArgs, results: list[dict[str, Any]]) -> None:
    """Print the table and its notes, and write --json."""
    width = shutil.get_terminal_size((160, 24)).columns
    text = format_table(results, width) + "\n" + format_notes(args, results)
    print_rank0(text, sys.stderr if args.json == "-" else None)
    if args.json == "-":
        print(json.dumps(results, indent=1))
    elif args.json:
        write(Path(args.json), lambda part: part.write_text(json.dumps(results, indent=1) + "\n"))


def main(args: Args) -> None:
    check_argument(args.checkpoints, "no checkpoints given: give .pt files or folders of runs, runs/<name>")
    check_args(args)
    torch.set_num_threads(1)  # as in training: its own evaluations then give the same results to the last bit
    loaded = [(path, *load(path, args.script)) for path in args.checkpoints]
    tasks = [eval_task(args, policy.args, path) for path, policy, _ in loaded]
    for (path, policy, _), task in zip(loaded, tasks):
        seed = task.get("terrain_seed")
        trained_on = seed == policy.args.terrain_seed and task["terrain"] == policy.args.terrain
        check_argument(args.allow_training_terrain or not trained_on, f"{path} was trained on terrain seed {seed}: "
                       "give another --terrain-seed, or --allow-training-terrain")  # fmt: skip
    print_results(args, evaluate(args, loaded, tasks))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
