"""Evaluate trained policies: `python -m ballbot_utils.evaluate runs/a runs/b/last.pt`.

Every checkpoint plays episodes on terrain it was not trained on, and a table sets them side by side: return,
length, speed and more, with 95 % bootstrap intervals, the guide's targets, and the gap between training and
unseen terrain; for a policy that is given commands, their tracking error instead of speed. Longer episodes
(`--horizon`), higher hills (`--terrain-amplitude`) and disturbances tell how robust a policy is.
Each episode has its own random numbers, from --seed and its place in the order. It is the same among any number of
episodes, and `python -m ballbot_utils.watch --episode I` with the same flags shows it.

--push J is a horizontal force on the base's centre of mass in a random direction, of impulse J (N·s) and 20 ms,
every `--push-interval` seconds. 1 N·s changes the speed of the robot, 3.9 kg, by some 0.26 m/s.

--obs-noise S adds Gaussian noise of standard deviation S to every sensor in its own unit: 0.01 is 0.01 rad, rad/s,
m/s and m of depth, and 0.1 rad/s of a wheel. It is drawn anew each step, for depth with each frame. The last action
and the frames' age have none.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from numpy.typing import ArrayLike

from ballbot_env import spawn_seeds
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
from ballbot_utils.console import check_argument
from ballbot_utils.model import TIMESTEP
from ballbot_utils.runs import TARGET_LENGTH, TARGET_RETURN

MAX_ENVS = 100  # episodes at a time, as in ppo_ballbot.evaluate


@dataclass
class Figures(Conditions):
    """What every program that prints the table takes."""

    episodes: int = 100
    """episodes per policy"""
    num_threads: int = 0
    """CPU threads of the physics, 0: one per core"""
    json: str = ""
    """file for all figures, those of each episode and its seed too; - is standard output, and the table then goes to
    standard error"""


@dataclass
class Args(Figures):
    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """checkpoints, .pt files, or folders of runs, whose best.pt is meant"""
    stochastic: bool = False
    """also draw actions from the policy instead of taking its mean, in columns of their own"""
    script: Path | None = None
    """the script that trained them; default: the one that each names, in the working directory"""
    allow_training_terrain: bool = False
    """permit a --terrain-seed that a checkpoint was trained on"""
    gap: bool = True
    """evaluate on the training terrain too and print the gap, the guide's sign of overfitting; doubles the time"""


def label(path: Path, paths: Sequence[Path]) -> str:
    """A short name for a checkpoint: its run's, with the file's unless that is best.pt; the whole path if ambiguous."""

    def short(path):
        path = path / "best.pt" if path.is_dir() else path
        folder = path.resolve().parent.name
        return folder if path.name == "best.pt" else f"{folder}/{path.name}"

    return short(path) if [short(p) for p in paths].count(short(path)) == 1 else str(path)


def check(args: Figures) -> None:
    """Exit with one line on the first flag in `Figures` that cannot be, before any work starts."""
    require_min(args, 1, "episodes")
    require_min(args, 0, "num_threads")
    check_conditions(args)
    if args.json not in ("", "-"):
        require_writable("--json", Path(args.json), args.overwrite, ".json")


def run_episodes(policy: EpisodePolicy, args: Figures, task: dict[str, Any], title: str = "") -> dict[str, np.ndarray]:
    """Play `args.episodes` episodes under the conditions `task`.

    `policy` is as `play` wants it. Returns a dict of arrays (episodes,), in the order of their seeds: return, length
    (steps), speed (m/s) and distance (m) along the goal, effort (mean of ||action||² after clipping), and whether it
    fell or left the terrain. With commands, tracking_error (m/s), the mean distance of the velocity from the command,
    is there instead of speed and distance. As in ppo_ballbot.evaluate every environment's first episode counts, and no
    other, so that short ones are not favoured.
    """
    envs = gym.make_vec("Ballbot-v0", num_envs=min(args.episodes, MAX_ENVS), num_threads=args.num_threads, copy=False,
                        **task)  # fmt: skip
    along = ("tracking_error",) if envs.goal is None else ("speed", "distance")
    names = ("return", "length", *along, "effort", "fell", "left")
    rows, done, rounds = np.empty((args.episodes, len(names))), 0, -(-args.episodes // envs.num_envs)
    for round_ in range(rounds):
        first = round_ * envs.num_envs
        seeds = spawn_seeds(args.seed, first + envs.num_envs)[first:]
        obs, info = begin(envs, seeds, args.horizon)
        start = info["position"][:, :2]
        effort, error, wanted = np.zeros(envs.num_envs), np.zeros(envs.num_envs), obs.get("command")
        running = first + np.arange(envs.num_envs) < args.episodes
        for step, actions, result in play(envs, obs, policy, args, seeds):
            obs, _, terminations, truncations, infos = result
            effort += np.square(np.clip(actions, -1, 1)).sum(1)
            ended = np.flatnonzero((terminations | truncations) & running)
            for i in ended:
                length = infos["episode"]["l"][i]
                left = truncations[i] and length < args.horizon
                if envs.goal is None:
                    error[i] += np.linalg.norm(infos["final_obs"][i]["vel"][:2] - wanted[i])
                    along = (error[i] * envs.frame_skip / step,)
                else:
                    distance = (infos["final_info"]["position"][i, :2] - start[i]) @ envs.goal
                    along = distance / (length * TIMESTEP), distance
                rows[first + i] = (infos["episode"]["r"][i], length, *along, effort[i] * envs.frame_skip / step,
                                   terminations[i], left)  # fmt: skip
            running[ended] = False
            if envs.goal is None:
                error += np.linalg.norm(obs["vel"][:, :2] - wanted, axis=1)
                wanted = obs["command"]
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


def bootstrap_interval(
    values: ArrayLike, minus: ArrayLike = (0.0,), resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of `values` (n,), less that of `minus` (m,)."""
    rng = np.random.default_rng(seed)

    def resampled_means(sample):
        sample = np.asarray(sample, float)
        return sample[rng.integers(len(sample), size=(resamples, len(sample)))].mean(1)

    means = resampled_means(values) - resampled_means(minus)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(episodes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means with intervals of every quantity, counts of falls, and whether the targets hold."""
    summary = {"episodes": len(episodes["return"])}
    for name in [name for name in episodes if name not in ("fell", "left")]:
        low, high = bootstrap_interval(episodes[name])
        summary[name] = {"mean": float(episodes[name].mean()), "low": low, "high": high}
    summary |= {name: int(episodes[name].sum()) for name in ("fell", "left")}
    targets = (("return", TARGET_RETURN), ("length", TARGET_LENGTH))
    return summary | {"targets": {name: summary[name]["mean"] > target for name, target in targets}}


def column(
    label: str,
    args: Figures,
    task: dict[str, Any],
    episodes: dict[str, np.ndarray],
    global_step: int = 0,
    stochastic: bool = False,
) -> dict[str, Any]:
    """What `table` shows of the `episodes` (of `run_episodes`) that one policy played, as a dict."""
    return {
        "label": label,
        "global_step": global_step,
        "stochastic": stochastic,
        "task": task,
        "push": args.push,
        "push_interval": args.push_interval,
        "obs_noise": args.obs_noise,
        "seed": args.seed,
        "summary": summarise(episodes),
        "gap": None,
        "no_gap": "",
        "per_episode": {"seed": spawn_seeds(args.seed, args.episodes)}
        | {key: values.tolist() for key, values in episodes.items()},
    }


def table(results: list[dict[str, Any]], width: int) -> str:
    """The results side by side, in as many blocks as the width (characters) needs."""

    def interval(name, digits):
        figures = "{mean:.{0}f} [{low:.{0}f}, {high:.{0}f}]"
        return lambda r: figures.format(digits, **r["summary"][name]) if name in r["summary"] else "-"

    def verdict(name, target):
        def text(r):
            if "tracking_error" in r["summary"]:
                return "-"  # another task
            s = r["summary"][name]
            unsure = ", within error" if s["low"] <= target < s["high"] else ""
            return ("reached" if s["mean"] > target else "missed") + unsure

        return text

    def ground(r):
        t = r["task"]
        if t["terrain"] == "flat":
            return "flat"
        return f"{t['terrain']} {t['terrain_seed']}, {t['terrain_amplitude']:g} m"

    def gap(r):
        g = r["gap"]
        return "-" if g is None else f"{g['mean']:+.1f} [{g['low']:+.1f}, {g['high']:+.1f}]"

    rows = {
        "": lambda r: r["label"],
        "steps trained": lambda r: f"{r['global_step']:,}",
        "actions": lambda r: "drawn" if r["stochastic"] else "mean",
        "terrain, amplitude": ground,
        "action held for (steps)": lambda r: f"{r['task']['frame_skip']}",
        "wheel damping (N·m·s/rad)": lambda r: f"{r['task']['wheel_damping']:g}",
        "return": interval("return", 1),
        "length (steps)": interval("length", 0),
        "falls": lambda r: f"{r['summary']['fell']} of {r['summary']['episodes']}",
        "speed along goal (m/s)": interval("speed", 3),
        "distance along goal (m)": interval("distance", 2),
        "tracking error (m/s)": interval("tracking_error", 3),
        "effort (mean ||action||²)": interval("effort", 3),
        f"target: return > {TARGET_RETURN}": verdict("return", TARGET_RETURN),
        f"target: length > {TARGET_LENGTH}": verdict("length", TARGET_LENGTH),
    }
    for name, key in (("speed along goal (m/s)", "speed"), ("distance along goal (m)", "distance"),
                      ("tracking error (m/s)", "tracking_error")):  # fmt: skip
        if not any(key in r["summary"] for r in results):
            del rows[name]
    if any(r["summary"]["left"] for r in results):
        rows["ended at the terrain's edge"] = lambda r: f"{r['summary']['left']} of {r['summary']['episodes']}"
    if any(r["gap"] for r in results):
        rows["return, training terrain"] = lambda r: "-" if r["gap"] is None else f"{r['gap']['training']:.1f}"
        rows["gap: training - unseen"] = gap
    cells = [[text(r) for text in rows.values()] for r in results]
    columns = [max(map(len, column)) for column in cells]
    head, lines = max(map(len, rows)), []
    while cells:
        fit = max(1, sum(head + sum(columns[:k]) + 3 * k <= width for k in range(1, len(cells) + 1)))
        for i, name in enumerate(rows):
            line = name.ljust(head) + "".join(f"   {cells[k][i]:>{columns[k]}}" for k in range(fit))
            lines.append(line.rstrip())
        lines.append("")
        cells, columns = cells[fit:], columns[fit:]
    return "\n".join(lines)


def notes(args: Figures, results: list[dict[str, Any]]) -> str:
    """What a reader of the table should know, a line each."""
    lines = [f"In brackets: 95 % bootstrap intervals of the mean over {args.episodes} episodes."]
    usual = {"push": 0, "obs_noise": 0, "terrain_amplitude": 0.1}
    changed = [f"--{name.replace('_', '-')} {value:g}" for name, default in usual.items()
               if (value := getattr(args, name)) not in (None, default)]  # fmt: skip
    changed += [f"--horizon {args.horizon}"] if args.horizon != 4000 else []
    if changed:
        lines.append(f"The targets are meant for 4000 steps undisturbed; here: {', '.join(changed)}.")
    if args.episodes < 100:
        lines.append("The targets are meant for the mean over 100 episodes.")
    constant = [r for r in results if r["task"]["terrain"] == "flat" and not r["stochastic"]]
    if constant and not (args.push or args.obs_noise):
        lines.append(
            "On flat ground all undisturbed episodes of a policy's mean are the same: their intervals say nothing."
        )
    for r in results:
        name = r["label"] + (", actions drawn" if r["stochastic"] else "")
        if r["gap"] is not None:
            sign = "no sign of overfitting"
            if r["gap"]["low"] > 0:
                sign = "better on its training terrain, the guide's sign of overfitting"
            lines.append(f"{name}: {sign}.")
        elif r["no_gap"]:
            lines.append(f"{name}: no gap, {r['no_gap']}.")
    return "\n".join(lines)


def evaluate(args: Args, loaded: list[tuple[Path, Any, int]], tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluate every checkpoint; returns a list of dicts, one per column of the table."""
    results = []
    modes = (False, True) if args.stochastic else (False,)
    for (path, policy, global_step), task in zip(loaded, tasks):
        train_args = policy.args
        for stochastic in modes:
            name = label(path, args.checkpoints)
            episodes = run_episodes(trained(policy, stochastic), args, task, name)
            result = column(name, args, task, episodes, global_step, stochastic) | {"checkpoint": str(path)}
            if not args.gap:
                pass
            elif train_args.terrain == "flat" or task["terrain"] == "flat":
                result["no_gap"] = "flat ground is the same everywhere"
            elif task["terrain_seed"] == train_args.terrain_seed:
                result["no_gap"] = "this is its training terrain"
            else:
                there = task | {"terrain_seed": train_args.terrain_seed}
                seen = run_episodes(trained(policy, stochastic), args, there, f"{name}, training terrain")["return"]
                low, high = bootstrap_interval(seen, minus=episodes["return"])
                mean = float(seen.mean() - episodes["return"].mean())
                result["gap"] = {"training": float(seen.mean()), "mean": mean, "low": low, "high": high}
            results.append(result)
    return results


def show(args: Figures, results: list[dict[str, Any]]) -> None:
    """Print the table and its notes, and write --json."""
    text = table(results, shutil.get_terminal_size((160, 24)).columns) + "\n" + notes(args, results)
    print(text, file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json == "-":
        json.dump(results, sys.stdout, indent=1)
        print()
    elif args.json:
        write(Path(args.json), lambda part: part.write_text(json.dumps(results, indent=1) + "\n"))


def main(args: Args) -> None:
    check_argument(args.checkpoints, "no checkpoints given: give .pt files or folders of runs, runs/<name>")
    check(args)
    torch.set_num_threads(1)  # as in training, whose own evaluations then have the same figures to the last bit
    loaded = [(path, *load(path, args.script)) for path in args.checkpoints]
    tasks = [conditions(args, policy.args, path) for path, policy, _ in loaded]
    for (path, policy, _), task in zip(loaded, tasks):
        seed = task.get("terrain_seed")
        trained_on = policy.args.terrain != "flat" and seed == policy.args.terrain_seed
        check_argument(args.allow_training_terrain or not trained_on, f"{path} was trained on terrain seed {seed}: "
                       "give another --terrain-seed, or --allow-training-terrain")  # fmt: skip
    show(args, evaluate(args, loaded, tasks))


def cli() -> None:
    run_program(main, Args, description=__doc__)


if __name__ == "__main__":
    cli()
