"""Evaluate trained policies: `python -m ballbot_utils.evaluate runs/a runs/b/last.pt`.

Every checkpoint plays episodes on terrain it was not trained on, and a table sets them side by side: return,
length, speed and more, with 95 % bootstrap intervals, the guide's targets, and the gap between training and
unseen terrain. `--render` and `--video` show one instead. Longer episodes (`--horizon`), higher hills
(`--terrain-amplitude`) and disturbances tell how robust a policy is:

--push J is a horizontal force on the base's centre of mass in a random direction, of impulse J (N·s) and 20 ms,
every `--push-interval` seconds. 1 N·s changes the speed of the robot, 3.9 kg, by some 0.26 m/s.

--obs-noise S adds Gaussian noise of standard deviation S to every sensor in its own unit: 0.01 is 0.01 rad, rad/s,
m/s and m of depth, and 0.1 rad/s of a wheel. It is drawn anew each step, for depth with each frame. The last action
and the frames' age have none.
"""

import json
import math
import os
import shutil
import sys
import time
from ctypes.util import find_library
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

try:
    import mujoco
except (AttributeError, OSError):  # MUJOCO_GL names a library that is not there
    sys.exit(f"error: MUJOCO_GL={os.environ.get('MUJOCO_GL')}: its library is missing (Debian: apt-get install "
             "libosmesa6 for osmesa, libegl1 and libgl1-mesa-dri for egl); only --video needs it")  # fmt: skip

import ppo_ballbot
from ballbot_env import (
    ASSETS,
    BALL_START,
    BASE_START,
    EDGE,
    START_EXTENT,
    TERRAIN_EXTENT,
    TERRAIN_NODES,
    TIMESTEP,
    BallbotEnv,
    perlin_terrain,
)
from ppo_ballbot import TARGET_LENGTH, TARGET_RETURN, depth_features, proprioception

MAX_ENVS = 100  # episodes at a time, as in ppo_ballbot.play
TOP_SPEED = 1.0  # m/s, more than the robot can reach at wheel damping 0.4
PUSH_STEPS = 10  # steps that a push lasts: 20 ms
PICTURE, FPS = {".mp4": (960, 720), ".gif": (480, 360)}, {".mp4": 30, ".gif": 20}
# What a checkpoint's args must have. All else ppo_ballbot.Args has is for training and may differ.
NEEDED = {"cameras": bool, "hidden_size": int, "pi_layers": int, "vf_layers": int, "terrain": str,
          "terrain_seed": int, "eval_terrain_seed": int, "wheel_damping": float, "frame_skip": int}  # fmt: skip


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """checkpoints, .pt files, or folders of runs, whose best.pt is meant"""
    episodes: int = 100
    """episodes per checkpoint"""
    horizon: int = 4000
    """steps at which an episode ends; 10000 is the paper's test of generalisation (fig. 7)"""
    stochastic: bool = False
    """also draw actions from the policy instead of taking its mean, in columns of their own"""
    seed: int = 1_000_000
    """seed of start poses, pushes and noise; the default starts where ppo_ballbot.py's own evaluations do"""
    num_threads: int = 0
    """CPU threads of the physics, 0: one per core"""

    # The ground and the robot
    terrain: str | None = None
    """ground: perlin or flat; default: what the checkpoint was trained on"""
    terrain_seed: int | None = None
    """which Perlin terrain; default: the checkpoint's eval_terrain_seed"""
    allow_training_terrain: bool = False
    """permit a --terrain-seed that a checkpoint was trained on"""
    terrain_amplitude: float | None = None
    """height of the hills, m; default: 0.1, as in training"""
    wheel_damping: float | None = None
    """damping of the wheels' axles, N·m·s/rad; default: the checkpoint's"""
    gap: bool = True
    """evaluate on the training terrain too and print the gap, the guide's sign of overfitting; doubles the time"""

    # Disturbances
    push: float = 0.0
    """impulse of random horizontal pushes on the base, N·s"""
    push_interval: float = 1.0
    """seconds from one push to the next, and from the start to the first"""
    obs_noise: float = 0.0
    """standard deviation of Gaussian noise on the observations, each in its own unit"""

    # Output
    json: str = ""
    """file for all figures, every episode's too; - is standard output, and the table then goes to standard error"""
    render: bool = False
    """show the policy in MuJoCo's viewer, episode after episode in real time, instead of evaluating"""
    video: Path | None = None
    """write a video of one episode, .mp4 or .gif, instead of evaluating (needs OpenGL and requirements-dev.txt)"""
    overwrite: bool = False
    """replace a --json or --video file that exists"""


# Loading


def load(path):
    """The policy in a checkpoint, the args it was trained by and its steps; exits with one line on a bad file."""

    def need(good, problem):
        if not good:
            sys.exit(f"error: {path} {problem}")

    if path.is_dir():
        folder, path = path, path / "best.pt"
        other = "name its last.pt" if (folder / "last.pt").exists() else "give a .pt file or the folder of a run"
        if not path.exists():
            sys.exit(f"error: {folder} has no best.pt (no evaluation yet?): {other}")
    need(path.exists(), "does not exist: give a .pt file or the folder of a run, runs/<name>")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on damaged and foreign files
        foreign = "Weights only load failed" in str(error)
        need(False, "is no checkpoint of ppo_ballbot.py, or holds code, which is never run" if foreign
             else f"is damaged, cut short or no checkpoint ({type(error).__name__})")  # fmt: skip
    need(isinstance(content, dict) and isinstance(content.get("args"), dict) and isinstance(content.get("model"), dict),
         "is no checkpoint of ppo_ballbot.py: it has no model or args")  # fmt: skip
    given = content["args"]
    need("frame_skip" in given or "num_steps" not in given, "was trained on the robot before its rollers were mended, "
         "which spun up at speed: train anew")  # fmt: skip
    missing = [name for name in NEEDED if name not in given]
    need(not missing, f"has no {', '.join(missing)} in its args: it is no checkpoint of ppo_ballbot.py")
    need(isinstance(content.get("global_step", 0), int), "has a global_step that is no whole number")
    for name, kind in NEEDED.items():
        kinds = (int, float) if kind is float else kind
        need(isinstance(given[name], kinds), f"has {name} = {given[name]!r} in its args: expected {kind.__name__}")
    need(given["terrain"] in ("perlin", "flat"), f"has terrain = {given['terrain']!r}: expected perlin or flat")
    known = {field.name for field in fields(ppo_ballbot.Args)}
    train_args = ppo_ballbot.Args(**{name: value for name, value in given.items() if name in known})
    try:
        agent = ppo_ballbot.Agent(train_args)
        agent.load_state_dict(content["model"])
    except Exception as error:  # sizes that cannot be, or weights that do not fit them
        need(False, f"has weights that do not fit its args: {str(error).splitlines()[-1].strip()}")
    need(all(tensor.isfinite().all() for tensor in agent.state_dict().values()), "has weights that are not finite")
    return agent, train_args, content.get("global_step", 0)


def label(path, paths):
    """A short name for a checkpoint: its run's, with the file's unless that is best.pt; the whole path if ambiguous."""

    def short(path):
        path = path / "best.pt" if path.is_dir() else path
        folder = path.resolve().parent.name
        return folder if path.name == "best.pt" else f"{folder}/{path.name}"

    return short(path) if [short(p) for p in paths].count(short(path)) == 1 else str(path)


def check(args):
    """Exit with one line on the first flag that cannot be, before any work starts."""

    def need(good, message):
        if not good:
            sys.exit(f"error: {message}")

    need(args.checkpoints, "no checkpoints given: give .pt files or folders of runs, runs/<name>")
    for name in ("episodes", "horizon"):
        value = getattr(args, name)
        need(value >= 1, f"--{name} is {value}: give 1 or more")
    for name in ("seed", "num_threads", "terrain_seed", "wheel_damping", "push", "obs_noise"):
        value = getattr(args, name)
        need(value is None or 0 <= value < math.inf, f"--{name.replace('_', '-')} is {value}: give 0 or more")
    for name in ("terrain_amplitude", "push_interval"):
        value = getattr(args, name)
        need(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')} is {value}: give more than 0")
    shortest = 2 * PUSH_STEPS * TIMESTEP
    need(args.push_interval >= shortest, f"--push-interval is {args.push_interval}: give {shortest} s or more")
    need(args.terrain in (None, "perlin", "flat"), f"--terrain is {args.terrain}: give perlin or flat")
    for name in ("terrain_seed", "terrain_amplitude"):
        unused = args.terrain == "flat" and getattr(args, name) is not None
        need(not unused, f"--{name.replace('_', '-')} means nothing on --terrain flat: leave one out")

    shown = args.render or args.video is not None
    need(not (args.render and args.video), "--render and --video: give one of them")
    need(not (shown and args.json), "--json is for evaluations, which --render and --video take the place of")
    need(not shown or len(args.checkpoints) == 1, f"{len(args.checkpoints)} checkpoints: --render and --video show one")
    outputs = {"--json": Path(args.json) if args.json not in ("", "-") else None, "--video": args.video}
    for flag, path in outputs.items():
        if path is not None:
            need(not path.is_dir(), f"{flag} is {path}, a folder: give a file")
            need(args.overwrite or not path.exists(), f"{path} exists: give --overwrite or another name")
            need(path.parent.is_dir(), f"{flag} is {path}: there is no folder {path.parent}")
    if args.video:
        need(args.video.suffix in FPS, f"--video is {args.video}: give a name ending in .mp4 or .gif")


def conditions(args, train_args, path):
    """The arguments of the environment that a checkpoint is evaluated in."""
    task = {
        "terrain": args.terrain or train_args.terrain,
        "cameras": train_args.cameras,
        "wheel_damping": train_args.wheel_damping if args.wheel_damping is None else args.wheel_damping,
        "frame_skip": train_args.frame_skip,
        "max_episode_steps": args.horizon,
    }
    if task["terrain"] == "perlin":
        task["terrain_seed"] = train_args.eval_terrain_seed if args.terrain_seed is None else args.terrain_seed
        task["terrain_amplitude"] = args.terrain_amplitude or 0.1
        trained_on = train_args.terrain == "perlin" and task["terrain_seed"] == train_args.terrain_seed
        if trained_on and not args.allow_training_terrain:
            sys.exit(f"error: {path} was trained on terrain seed {task['terrain_seed']}: "
                     "give another --terrain-seed, or --allow-training-terrain")  # fmt: skip
    elif args.terrain_seed is not None or args.terrain_amplitude is not None:
        sys.exit(f"error: {path} was trained on flat ground, where --terrain-seed and --terrain-amplitude mean "
                 "nothing: give --terrain perlin with them")  # fmt: skip
    return task


# Playing


def move_back(envs, horizon):
    """Start further back along y where a long episode could otherwise end at the terrain's edge.

    Up to 4000 steps nothing changes. For longer ones the starts are squeezed towards y = -18 m so that
    at TOP_SPEED none reaches the far edge; from 18,000 steps on the terrain is too small for that.
    """
    limit = TERRAIN_EXTENT - 2 * EDGE
    latest = max(limit - TOP_SPEED * horizon * TIMESTEP, -limit)
    if latest >= START_EXTENT:
        return
    for i in range(envs.num_envs):
        x, y = envs._position[i, :2]
        y = -limit + (y + START_EXTENT) / (2 * START_EXTENT) * (latest + limit)
        ground = envs._highest(x, y)
        envs._position[i] = x, y, ground + BASE_START
        envs._ball_position[i] = x, y, ground + BALL_START
    envs._take_frames(np.arange(envs.num_envs), envs._position, envs._quaternion, envs._clock)


def disturb(obs, envs, std, generator):
    """A batch of observations with noise of standard deviation `std` on its sensors, and on new frames, in place."""
    if not std:
        return obs
    noisy = dict(obs)
    for key in ("orientation", "angular_vel", "vel", "motor_state"):
        noisy[key] = obs[key] + std * torch.randn(obs[key].shape, generator=generator).numpy()
    if envs.frames is not None and envs.new_frames.any():
        new = torch.from_numpy(envs.new_frames.copy())
        noise = std * torch.randn(envs.frames[new].shape, generator=generator)
        envs.frames[new] = (envs.frames[new] + noise).clamp_(0, 1)
    return noisy


def trained(agent, stochastic=False):
    """A trained policy for `run_episodes`; a stochastic one draws its actions."""

    def start(envs, generator):
        depth = torch.zeros(envs.num_envs, agent.num_depth)

        @torch.no_grad()
        def act(obs):
            nonlocal depth
            depth = depth_features(envs, agent, depth)
            actions = agent.actor(agent.features(proprioception(obs, agent), depth))
            if stochastic:
                actions += agent.log_std.exp() * torch.randn(actions.shape, generator=generator)
            return actions.numpy()

        return act

    return start


def push(envs, args, step, rng):
    """Apply or end the push that is due before `step` (0 is the first of an episode).

    Where actions are held, a push lasts as many of them as 20 ms need, at least one, and its impulse stays."""
    if not args.push:
        return
    held = envs.frame_skip
    forces = envs.batch.bind("xfrc_applied")[:, envs.model.body("base").id]
    phase = step // held % max(1, round(args.push_interval / TIMESTEP / held))
    lasts = -(-PUSH_STEPS // held)
    if phase == 0 and step > 0:
        angle = rng.uniform(0, 2 * np.pi, envs.num_envs)
        direction = np.stack([np.cos(angle), np.sin(angle)], 1)
        forces[:, :2] = args.push / (lasts * held * TIMESTEP) * direction
    elif phase == lasts:
        forces[:] = 0


def run_episodes(policy, args, task, title=""):
    """Play `args.episodes` episodes under the conditions `task`.

    `policy(envs, generator)` begins new episodes and returns a function from observations, a dict of (n, ...), to
    actions (n, 3). Returns a dict of arrays (episodes,), in the order of their seeds: return, length (steps), speed
    (m/s) and distance (m) along the goal, effort (mean of ||action||² after clipping), and whether it fell or left the
    terrain. As in ppo_ballbot.play every environment's first episode counts, and no other, so that short ones are not
    favoured.
    """
    envs = gym.make_vec("Ballbot-v0", num_envs=min(args.episodes, MAX_ENVS), num_threads=args.num_threads, **task)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    names = ("return", "length", "speed", "distance", "effort", "fell", "left")
    rows, done, rounds = np.empty((args.episodes, len(names))), 0, -(-args.episodes // envs.num_envs)
    for round_ in range(rounds):
        first = round_ * envs.num_envs
        obs, _ = envs.reset(seed=args.seed + first)
        move_back(envs, args.horizon)
        start = envs._position[:, :2].copy()
        effort = np.zeros(envs.num_envs)
        running = first + np.arange(envs.num_envs) < args.episodes
        act, step = policy(envs, generator), 0
        while running.any():
            actions = act(disturb(obs, envs, args.obs_noise, generator))
            push(envs, args, step, rng)
            obs, _, terminations, truncations, infos = envs.step(actions)
            effort += np.square(np.clip(actions, -1, 1)).sum(1)
            step += envs.frame_skip
            ended = np.flatnonzero((terminations | truncations) & running)
            for i in ended:
                length = infos["episode"]["l"][i]
                distance = (infos["final_info"]["position"][i, :2] - start[i]) @ envs.goal
                left = truncations[i] and length < args.horizon
                rows[first + i] = (infos["episode"]["r"][i], length, distance / (length * TIMESTEP), distance,
                                   effort[i] * envs.frame_skip / step, terminations[i], left)  # fmt: skip
            running[ended] = False
            done += len(ended)
            if step // envs.frame_skip % 50 == 0:
                share = (round_ + step / args.horizon) / rounds
                at = f"step {step:,} of at most {args.horizon:,}"
                progress(f"{title}: {done:>4} of {args.episodes} episodes, {at}", share)
    envs.close()
    return dict(zip(names, rows.T))


_progress_shown = 0.0


def progress(line, share):
    """Show how far a long job is: in place on a terminal, else a line every half minute."""
    global _progress_shown
    now, terminal = time.monotonic(), sys.stderr.isatty()
    if now - _progress_shown < (0.2 if terminal else 30):
        return
    _progress_shown = now
    bar = "#" * int(20 * share)
    print(f"[{bar:<20}] {line}".ljust(100), end="\r" if terminal else "\n", file=sys.stderr, flush=True)


def clear_progress():
    if sys.stderr.isatty():
        print(" " * 100, end="\r", file=sys.stderr, flush=True)


# Statistics


def bootstrap_interval(values, minus=(0.0,), resamples=2000, level=0.95, seed=0):
    """Percentile bootstrap interval (low, high) of the mean of `values` (n,), less that of `minus` (m,)."""
    rng = np.random.default_rng(seed)

    def resampled_means(sample):
        sample = np.asarray(sample, float)
        return sample[rng.integers(len(sample), size=(resamples, len(sample)))].mean(1)

    means = resampled_means(values) - resampled_means(minus)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(episodes):
    """Means with intervals of every quantity, counts of falls, and whether the targets hold."""
    summary = {"episodes": len(episodes["return"])}
    for name in ("return", "length", "speed", "distance", "effort"):
        low, high = bootstrap_interval(episodes[name])
        summary[name] = {"mean": float(episodes[name].mean()), "low": low, "high": high}
    summary |= {name: int(episodes[name].sum()) for name in ("fell", "left")}
    targets = (("return", TARGET_RETURN), ("length", TARGET_LENGTH))
    return summary | {"targets": {name: summary[name]["mean"] > target for name, target in targets}}


def column(label, args, task, episodes, global_step=0, stochastic=False):
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
        "per_episode": {key: values.tolist() for key, values in episodes.items()},
    }


def table(results, width):
    """The results side by side, in as many blocks as the width (characters) needs."""

    def interval(name, digits):
        return lambda r: "{mean:.{0}f} [{low:.{0}f}, {high:.{0}f}]".format(digits, **r["summary"][name])

    def verdict(name, target):
        def text(r):
            s = r["summary"][name]
            unsure = ", within error" if s["low"] <= target < s["high"] else ""
            return ("reached" if s["mean"] > target else "missed") + unsure

        return text

    def ground(r):
        t = r["task"]
        return f"perlin {t['terrain_seed']}, {t['terrain_amplitude']:g} m" if t["terrain"] == "perlin" else "flat"

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
        "effort (mean ||action||²)": interval("effort", 3),
        f"target: return > {TARGET_RETURN}": verdict("return", TARGET_RETURN),
        f"target: length > {TARGET_LENGTH}": verdict("length", TARGET_LENGTH),
    }
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


def notes(args, results):
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
        elif args.gap:
            lines.append(f"{name}: no gap, {r['no_gap']}.")
    return "\n".join(lines)


def evaluate(args, loaded, tasks):
    """Evaluate every checkpoint; returns a list of dicts, one per column of the table."""
    results = []
    modes = (False, True) if args.stochastic else (False,)
    for (path, agent, train_args, global_step), task in zip(loaded, tasks):
        for stochastic in modes:
            name = label(path, args.checkpoints)
            policy = trained(agent, stochastic)
            episodes = run_episodes(policy, args, task, name)
            result = column(name, args, task, episodes, global_step, stochastic) | {"checkpoint": str(path)}
            if train_args.terrain == "flat" or task["terrain"] == "flat":
                result["no_gap"] = "flat ground is the same everywhere"
            elif task["terrain_seed"] == train_args.terrain_seed:
                result["no_gap"] = "this is its training terrain"
            elif args.gap:
                there = task | {"terrain_seed": train_args.terrain_seed}
                seen = run_episodes(policy, args, there, f"{name}, training terrain")["return"]
                low, high = bootstrap_interval(seen, minus=episodes["return"])
                mean = float(seen.mean() - episodes["return"].mean())
                result["gap"] = {"training": float(seen.mean()), "mean": mean, "low": low, "high": high}
            results.append(result)
    clear_progress()
    return results


def show(args, results):
    """Print the table and its notes, and write --json."""
    text = table(results, shutil.get_terminal_size((160, 24)).columns) + "\n" + notes(args, results)
    print(text, file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json == "-":
        json.dump(results, sys.stdout, indent=1)
        print()
    elif args.json:
        part = Path(args.json + ".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, args.json)


# Showing


def play(agent, env, args, seed):
    """One episode in a single environment. After each action yields reward, steps so far and whether it fell."""
    envs = env._envs
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    move_back(envs, args.horizon)
    act = trained(agent, args.stochastic)(envs, generator)
    for step in range(0, args.horizon, envs.frame_skip):
        batch = {key: value[None] for key, value in obs.items()}
        actions = act(disturb(batch, envs, args.obs_noise, generator))
        push(envs, args, step, rng)
        obs, reward, terminated, truncated, _ = env.step(actions[0])
        yield reward, min(step + envs.frame_skip, args.horizon), terminated
        if terminated or truncated:
            return


def check_display():
    """Exit with one line where no window can be opened: MuJoCo's viewer would end the process with its own."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        sys.exit("error: --render needs a display, and there is none (DISPLAY is not set): write a --video instead")


def render(agent, args, task):
    """Show episodes in MuJoCo's viewer, in real time, until its window is closed."""
    env = BallbotEnv(render_mode="human", num_threads=1, **task)
    print("episodes follow one another until you close the window or press Ctrl-C")
    try:
        for seed in range(args.seed, args.seed + args.episodes):
            total, fell, started = 0.0, False, time.perf_counter()
            for reward, step, fell in play(agent, env, args, seed):
                total += reward
                time.sleep(max(0, started + step * TIMESTEP - time.perf_counter()))
                if not env._viewer.is_running():
                    return
            print(f"start {seed}: return {total:.1f}, {step} steps, {'fell' if fell else 'did not fall'}")
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:  # no window after all
        sys.exit(f"error: --render: {error}")
    finally:
        env.close()


def check_video(path):
    """Exit with one line if a library or OpenGL is missing for a video."""
    try:
        import PIL  # noqa: F401

        if path.suffix == ".mp4":
            import imageio_ffmpeg  # noqa: F401
            from imageio.v2 import get_writer  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: --video {path} needs {error.name}: pip install -r requirements-dev.txt")
    advice = ("install libosmesa6 and put MUJOCO_GL=osmesa before the command, or libegl1 and libgl1-mesa-dri and "
              "MUJOCO_GL=egl (Debian: apt-get install ...)")  # fmt: skip
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not (display or os.environ.get("MUJOCO_GL")):
        present = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if find_library(library)]
        advice = f"put MUJOCO_GL={' or MUJOCO_GL='.join(present)} before the command" if present else advice
        sys.exit(f"error: --video needs OpenGL, and there is no display: {advice}")
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).close()
    except Exception as error:  # whatever the platform's OpenGL raises
        sys.exit(f"error: --video needs OpenGL, which does not start ({error}): {advice}")


def video(agent, args, task):
    """Write a video of one episode, in real time, the depth images in its corners."""
    fps, (width, height) = FPS[args.video.suffix], PICTURE[args.video.suffix]
    env = BallbotEnv(num_threads=1, **task)
    envs = env._envs
    shots, total, fell = [], 0.0, False  # shots: (pose, depth images or None, caption)

    def shoot():
        frames = None if envs.frames is None else envs.frames[0].numpy().copy()
        shots.append((envs.batch.qpos[0].copy(), frames, f"{step * TIMESTEP:.2f} s    return {total:.1f}"))

    for reward, step, fell in play(agent, env, args, args.seed):
        total += reward
        if (step - 1) * TIMESTEP * fps >= len(shots):
            shoot()
            progress(f"playing: step {step:,} of at most {args.horizon:,}", step / args.horizon)
    shoot()
    env.close()

    model = scene([pose[envs.model.joint("base").qposadr[0] :][:2] for pose, *_ in shots], task)
    data = mujoco.MjData(model)
    with mujoco.Renderer(model, height, width) as renderer:
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_FOG] = True

        def pictures():
            for i, (pose, frames, caption) in enumerate(shots):
                data.qpos[:] = pose
                mujoco.mj_forward(model, data)
                renderer.update_scene(data, camera="track")
                for geom in renderer.scene.geoms[: renderer.scene.ngeom]:
                    if geom.category == mujoco.mjtCatBit.mjCAT_STATIC:  # the ground: its shadows on itself are ragged,
                        geom.category = mujoco.mjtCatBit.mjCAT_DECOR  # and decoration casts none
                last = i == len(shots) - 1
                picture = compose(renderer.render(), frames, caption + ("    fell" if last and fell else ""))
                yield from [picture] * (fps if last else 1)  # the end stays for a second
                progress(f"rendering: picture {i + 1} of {len(shots)}", (i + 1) / len(shots))

        part = args.video.with_suffix(".part" + args.video.suffix)
        encode(pictures(), part, fps)
        os.replace(part, args.video)
    clear_progress()
    print(f"{args.video}: return {total:.1f}, {step} steps, {'fell' if fell else 'did not fall'}")


def scene(places, task):
    """A model to render the robot by: of the terrain only what the camera sees from `places` (n, 2), m.

    The whole of it would take a second a picture without a GPU. Its texture shows the relief: green valleys, sandy
    hills, and the shading of a low sun.
    """
    spec = mujoco.MjSpec.from_file(str(ASSETS / "ballbot.xml"))
    spec.visual.map.fogstart, spec.visual.map.fogend = 4, 8
    spec.visual.rgba.fog = [0.8, 0.88, 0.95, 1]  # as the sky at the horizon
    spec.visual.quality.shadowsize = 2048  # faster
    spec.visual.map.shadowclip = 0.6  # and yet as sharp
    model = spec.compile()
    if task["terrain"] == "flat":
        return model
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    right, _, back = data.camera("track").xmat.reshape(3, 3).T[:, :2]
    corners = np.array([(2, 2), (-2, -2), 5 * right - 8 * back, -5 * right - 8 * back])  # of what is in view
    low, high = np.min(places, 0) + corners.min(0), np.max(places, 0) + corners.max(0)
    cell, stride = 2 * TERRAIN_EXTENT / (TERRAIN_NODES - 1), 2  # every other node is enough to see
    low, high = (np.clip((c + TERRAIN_EXTENT) / cell, 0, TERRAIN_NODES - 1).astype(int) for c in (low, high))
    heights = perlin_terrain(task["terrain_seed"])[low[1] : high[1] + 1 : stride, low[0] : high[0] + 1 : stride]
    bottom, span = heights.min(), np.ptp(heights)
    rows, cols = heights.shape
    half = np.array([cols - 1, rows - 1]) * stride * cell / 2
    middle = low * cell - TERRAIN_EXTENT + half
    amplitude = task["terrain_amplitude"]
    spec.add_hfield(name="terrain", nrow=rows, ncol=cols, size=[*half, amplitude * span, 0.1],
                    userdata=((heights - bottom) / span).ravel())  # fmt: skip
    ground = spec.geom("ground")
    ground.type, ground.hfieldname = mujoco.mjtGeom.mjGEOM_HFIELD, "terrain"
    ground.pos = [*middle, amplitude * bottom]

    pixels = 2048
    spec.add_texture(name="relief", type=mujoco.mjtTexture.mjTEXTURE_2D, width=pixels, height=pixels, nchannel=3,
                     builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT)  # fmt: skip
    material = spec.material("ground")
    textures = list(material.textures)
    textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "relief"
    material.textures, material.texrepeat, material.texuniform = textures, [1, 1], False
    model = spec.compile()

    height = torch.nn.functional.interpolate(torch.tensor(heights)[None, None], size=(pixels, pixels), mode="bilinear",
                                             align_corners=True)[0, 0].numpy()  # fmt: skip
    slope_y, slope_x = np.gradient(amplitude * height, 2 * half[1] / (pixels - 1), 2 * half[0] / (pixels - 1))
    sun = np.array([0.4, -0.5, 0.4])
    light = (sun[2] - sun[0] * slope_x - sun[1] * slope_y) / (sun[2] * np.sqrt(1 + slope_x**2 + slope_y**2))
    x, y = (m + h * np.linspace(-1, 1, pixels) for m, h in zip(middle, half))
    tile = (np.floor(x / 0.25)[None] + np.floor(y / 0.25)[:, None]) % 2  # tiles of 25 cm
    colors = np.array([[112, 142, 104], [196, 186, 140], [240, 224, 196]])
    rgb = np.stack([np.interp(height, [0, 0.35, 1], channel) for channel in colors.T], -1)
    rgb = np.clip(rgb * (light * (1 - 0.1 * tile))[..., None], 0, 255).astype(np.uint8)
    start = model.texture("relief").adr[0]
    model.tex_data[start : start + rgb.size] = rgb.ravel()
    return model


def compose(picture, frames, caption):
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


def encode(pictures, path, fps):
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


def main(args):
    check(args)
    if args.render:
        check_display()
    if args.video:
        check_video(args.video)
    torch.set_num_threads(1)  # as in training, whose own evaluations then have the same figures to the last bit
    loaded = [(path, *load(path)) for path in args.checkpoints]
    tasks = [conditions(args, train_args, path) for path, _, train_args, _ in loaded]
    if args.render:
        return render(loaded[0][1], args, tasks[0])
    if args.video:
        return video(loaded[0][1], args, tasks[0])
    show(args, evaluate(args, loaded, tasks))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
