"""Pretrain the depth encoder as half of an autoencoder: `python -m ballbot_utils.pretrain_encoder --overwrite`.

With --small a small encoder learns the features of the one in assets/. With --heights its features predict the heights
of the ground ahead. A robot needs them to steer around obstacles:

    python -m ballbot_utils.pretrain_encoder --heights --terrain potholes:depth=0.1 --camera-pitch 25 --output see.pt
    python ppo_ballbot.py --terrain potholes:depth=0.1 --env-kwargs camera_pitch=25 --encoder-path see.pt

Frames are rendered at random poses on terrains that neither training nor evaluation uses by default. The encoder of
ppo_ballbot.py learns features from which a decoder reconstructs the frame; the decoder is not saved. Linear probes on
held-out terrains measure the quality of the features. Needs no display and no GPU.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn as nn
from pydantic import Field

from ballbot_utils.checkpoints import read_checkpoint
from ballbot_utils.common import check_flags, progress, require_packages, require_writable, run_program, write
from ballbot_utils.console import check_argument, exit_with_error
from ballbot_utils.depth import DepthRenderer
from ballbot_utils.flags import Count, NonNegative, Positive, Seed
from ballbot_utils.model import ASSETS, BALL_RADIUS, BASE_OVER_BALL, make_model
from ballbot_utils.observations import SCAN
from ballbot_utils.terrain import TERRAIN_EXTENT, TERRAIN_MARGIN, Terrain, is_scaled
from ppo_ballbot import DepthEncoder, SmallDepthEncoder

SIZE = 64  # pixels a side, fixed by the encoder's last layer
TRAIN_TERRAIN_SEED, VAL_TERRAIN_SEED = 2_000_000, 3_000_000  # the first of each; 0 and 1,000,000 are ppo_ballbot's
MAX_TILT = np.radians(20.0)  # beyond it an episode ends
NOISE_FLOOR = 0.002  # m, added to a pixel's standard deviation in the loss
FEATURE_STD = 0.6  # standard deviation of the features before tanh: about 0.5 after it


@dataclass
class Args:
    output: Path | None = None
    """file to write; default: assets/depth_encoder.pt, or assets/depth_encoder_small.pt"""
    small: bool = False
    """train a small encoder to have the features of assets/depth_encoder.pt"""
    heights: bool = False
    """train a small encoder to predict the heights ahead, those of height_scan in the robot's frame"""
    terrain: str = "perlin"
    """ground, as in ppo_ballbot.py"""
    terrain_amplitude: Positive = 0.1
    """height of Perlin hills, m"""
    camera_pitch: Annotated[float, Field(ge=-90, le=90)] = 0.0
    """how far the cameras are turned up, degrees; train policies with --env-kwargs camera_pitch=..."""
    picture: Path | None = None
    """PNG of held-out frames and their reconstructions (needs matplotlib)"""
    overwrite: bool = False
    """replace an output that exists"""
    seed: Seed = 1
    """seed of poses, networks and minibatches"""
    num_threads: Annotated[int, Field(ge=0, le=1000)] = 0
    """CPU threads, 0: one per core"""
    num_frames: Annotated[int, Field(ge=256)] = 65_536
    """training frames, half from each camera; 16 KB of memory each"""
    num_val_frames: Annotated[int, Field(ge=256)] = 8_192
    """held-out frames, from other terrains"""
    num_terrains: Count = 8
    """training terrains, with seeds from 2,000,000; held-out frames come from 2 terrains, with seeds from 3,000,000"""
    epochs: Count = 8
    """passes over the training frames"""
    batch_size: Count = 64
    """frames per gradient step"""
    learning_rate: Positive = 3e-3
    """Adam's step size at the start; it falls to 0 along a cosine"""
    feature_coef: NonNegative = 0.1
    """weight of the loss that keeps features centered and within the range of tanh"""


def height_at(heights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear terrain heights, m, at x and y, m, arrays of any one shape."""
    cell = 2 * TERRAIN_EXTENT / (len(heights) - 1)
    col, row = (x + TERRAIN_EXTENT) / cell, (y + TERRAIN_EXTENT) / cell
    j, i = col.astype(int), row.astype(int)
    u, v = col - j, row - i
    near = heights[i, j] * (1 - u) + heights[i, j + 1] * u
    far = heights[i + 1, j] * (1 - u) + heights[i + 1, j + 1] * u
    return near * (1 - v) + far * v


def random_poses(rng: np.random.Generator, heights: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poses of a robot on its ball on the terrain: position (n, 3), quaternion (n, 4), and targets (n, 4 + points).

    Tilts are up to 20° in any direction, and half of them below 5°. Yaw is near 0, as at the start of an episode. One
    robot in twenty is up to 3 cm higher, as at the start. Targets are the tilts about the robot's x and y axes, rad,
    the terrain's slopes along these axes, and the heights at the points of SCAN over that under the ball, m, all in
    the frame rotated by the yaw only.
    """
    x, y = rng.uniform(TERRAIN_MARGIN - TERRAIN_EXTENT, TERRAIN_EXTENT - TERRAIN_MARGIN, (2, n))
    yaw = rng.normal(0, 0.5, n)
    tilt, direction = MAX_TILT * rng.uniform(0, 1, n) ** 2, rng.uniform(0, 2 * np.pi, n)
    tilt_x, tilt_y = tilt * np.cos(direction), tilt * np.sin(direction)

    # The ball rests where it first touches the ground: the highest center that any point below it requires
    grid = np.linspace(-1, 1, 13)
    dx, dy = (g.ravel() for g in np.meshgrid(grid, grid))
    dx, dy = (BALL_RADIUS * g[dx**2 + dy**2 < 1] for g in (dx, dy))
    lift = np.sqrt(BALL_RADIUS**2 - dx**2 - dy**2)
    centre = (height_at(heights, x[:, None] + dx, y[:, None] + dy) + lift).max(1)
    centre += rng.normal(0, 0.001, n) + np.where(rng.uniform(size=n) < 0.05, rng.uniform(0, 0.03, n), 0)

    half_yaw, half_tilt = yaw / 2, tilt / 2
    sine = np.sin(half_tilt)
    axis = direction + yaw / 2  # yaw after tilt rotates the quaternion's horizontal part by half the yaw
    quaternion = np.stack(
        [np.cos(half_yaw) * np.cos(half_tilt), sine * np.cos(axis), sine * np.sin(axis),
         np.sin(half_yaw) * np.cos(half_tilt)], 1)  # fmt: skip
    up = np.stack([np.sin(tilt) * np.sin(direction + yaw), -np.sin(tilt) * np.cos(direction + yaw), np.cos(tilt)], 1)
    position = np.stack([x, y, centre], 1) + BASE_OVER_BALL * up

    reach = 0.15  # m, to either side
    slopes = []
    for angle in (yaw, yaw + np.pi / 2):
        dx, dy = reach * np.cos(angle), reach * np.sin(angle)
        slopes.append((height_at(heights, x + dx, y + dy) - height_at(heights, x - dx, y - dy)) / (2 * reach))
    right, ahead = np.concatenate([np.zeros((1, 2)), SCAN]).T
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    scan = height_at(heights, x[:, None] + cos * right - sin * ahead, y[:, None] + sin * right + cos * ahead)
    return position, quaternion, np.column_stack([tilt_x, tilt_y, *slopes, scan[:, 1:] - scan[:, :1]])


def make_frames(
    args: Args, rng: np.random.Generator, terrain_seeds: Sequence[int], n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (n, 2, 64, 64), m, of both cameras at n random poses spread over the terrains, and targets (n, ...)."""
    model = make_model(camera_pitch=args.camera_pitch)
    frames, targets = torch.empty(n, 2, SIZE, SIZE), []
    for seed, share in zip(terrain_seeds, np.array_split(np.arange(n), len(terrain_seeds))):
        terrain = Terrain(args.terrain, seed, args.terrain_amplitude)
        heights = terrain.heights
        renderer = DepthRenderer(model, SIZE, heights, precise=terrain.has_edges or args.camera_pitch != 0)
        position, quaternion, target = random_poses(rng, heights, len(share))
        targets.append(target)
        for i in range(0, len(share), 64):
            frames[share[i : i + 64]] = renderer.render(position[i : i + 64], quaternion[i : i + 64])
        progress(f"rendering: terrain {seed}", (share[-1] + 1) / n)
    return frames, torch.from_numpy(np.concatenate(targets)).float()


class Decoder(nn.Module):
    """Features (n, 20) and the camera's index (n,) to standardized frames (n, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(DepthEncoder.num_features + 2, 256),
            nn.LeakyReLU(),
            nn.Linear(256, 256),
            nn.LeakyReLU(),
            nn.Linear(256, SIZE * SIZE),
        )

    def forward(self, features: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
        one_hot = nn.functional.one_hot(camera, 2).to(features.dtype)
        return self.layers(torch.cat([features, one_hot], 1)).view(-1, SIZE, SIZE)


def fit(args: Args, frames: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> tuple[DepthEncoder, Decoder]:
    """Train encoder and decoder on frames (n, 2, 64, 64). Returns both.

    Frames are nearly the same: the information for control is in millimeters. So the loss compares deviations from
    each camera's mean frame, in units of each pixel's standard deviation. A second term gives, for each camera, every
    feature before tanh mean 0 and standard deviation FEATURE_STD. Without it the two cameras' mirrored views would use
    up the range of tanh, and features could have any size.
    """
    encoder, decoder = DepthEncoder(), Decoder()
    encoder.to(memory_format=torch.channels_last)  # convolutions are twice as fast on CPUs
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=args.learning_rate, fused=True)
    steps_per_epoch = 2 * len(frames) // args.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps_per_epoch)
    flat = frames.flatten(0, 1)[:, None]  # (2n, 1, 64, 64), cameras alternate
    for epoch in range(args.epochs):
        order, total = torch.randperm(len(flat)), 0.0
        for step in range(steps_per_epoch):
            indices = order[step * args.batch_size : (step + 1) * args.batch_size]
            camera = indices % 2
            depth = flat[indices]
            before_tanh = encoder.layers[:-1](depth)
            target = (depth[:, 0] - mean[camera]) / std[camera]
            loss = (decoder(before_tanh.tanh(), camera) - target).square().mean()
            spread = 0.0
            for c in (0, 1):
                features = before_tanh[camera == c]
                if len(features) > 1:
                    spread += features.mean(0).square().mean() + (features.std(0) - FEATURE_STD).square().mean()
            optimizer.zero_grad()
            (loss + args.feature_coef * spread).backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            if step % 50 == 49 or step == steps_per_epoch - 1:
                share = (epoch + (step + 1) / steps_per_epoch) / args.epochs
                progress(f"training: epoch {epoch + 1} of {args.epochs}, loss {total / (step + 1):.4f}", share)
        if not torch.isfinite(total):
            exit_with_error(f"the loss of epoch {epoch + 1} is not finite: lower --learning-rate")
    return encoder.to(memory_format=torch.contiguous_format), decoder


def fit_small(args: Args, images: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> SmallDepthEncoder:
    """Train a small encoder on images (n, k, 64, 64): `head` makes targets (n, m) of their features (n, 20 k)."""
    encoder = SmallDepthEncoder()
    pool, first = encoder.layers[0], encoder.layers[2]
    pooled = torch.cat([pool(part).flatten(2) for part in images.split(1024)])
    mean, std = pooled.mean((0, 1)), pooled.std((0, 1)) + NOISE_FLOOR
    pooled = (pooled - mean) / std
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=args.learning_rate, fused=True)
    steps_per_epoch = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps_per_epoch)
    for epoch in range(args.epochs):
        for indices in torch.randperm(len(images))[: steps_per_epoch * args.batch_size].view(steps_per_epoch, -1):
            features = encoder.layers[2:](pooled[indices].flatten(0, 1))
            loss = (head(features.view(len(indices), -1)) - targets[indices]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(f"training: epoch {epoch + 1} of {args.epochs}, loss {loss:.6f}", (epoch + 1) / args.epochs)
    with torch.no_grad():  # the first layer takes over the standardization
        first.weight /= std
        first.bias -= first.weight @ mean
    return encoder


@torch.no_grad()
def encode(encoder: DepthEncoder, frames: torch.Tensor) -> torch.Tensor:
    """Features (n, 40) of frames (n, 2, 64, 64), in the order of ppo_ballbot.py."""
    return torch.cat([encoder(part.flatten(0, 1)[:, None]).view(len(part), -1) for part in frames.split(64)])


@torch.no_grad()
def reconstruct(
    encoder: DepthEncoder, decoder: Decoder, frames: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Frames (n, 2, 64, 64) reconstructed from their features."""
    features = encode(encoder, frames).view(-1, DepthEncoder.num_features)
    camera = torch.arange(2).repeat(len(frames))
    parts = [decoder(*part) for part in zip(features.split(64), camera.split(64))]
    return torch.cat(parts).view(frames.shape) * std + mean


def probe(
    train_x: torch.Tensor, train_y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor, noise: float = 0.0
) -> torch.Tensor:
    """R² (k,) on held-out data of linear regression from x (n, features) to y (n, k); `noise` is added to x."""

    def prepare(x):
        x = x.double()
        return torch.cat([x + noise * torch.randn(x.shape, dtype=x.dtype), torch.ones(len(x), 1).double()], 1)

    weights = torch.linalg.lstsq(prepare(train_x), train_y.double(), driver="gelsd").solution
    error = (prepare(val_x) @ weights - val_y).square().mean(0)
    return 1 - error / val_y.double().var(0, correction=0)


def probe_all(
    train_x: torch.Tensor, train_y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor, noise: float = 0.0
) -> list[float]:
    """R² of tilt x, y; slope x, y; tilt to the ground x, y; and slope x, y when the tilt is given as well."""

    def with_relative(y):  # a slope along y is a tilt about x, a slope along x one about -y
        return torch.cat([y, y[:, 0:1] - y[:, 3:4], y[:, 1:2] + y[:, 2:3]], 1)

    alone = probe(train_x, with_relative(train_y), val_x, with_relative(val_y), noise)
    # The tilt is scaled up, so that the added noise is negligible
    train_x, val_x = (torch.cat([x, 1e3 * y[:, :2]], 1) for x, y in ((train_x, train_y), (val_x, val_y)))
    return torch.cat([alone, probe(train_x, train_y[:, 2:], val_x, val_y[:, 2:], noise)]).tolist()


def save_picture(path: Path, frames: torch.Tensor, reconstruction: torch.Tensor, mean: torch.Tensor) -> None:
    """PNG: held-out frames, reconstructions, both as deviations from the mean frame, and their difference."""
    from matplotlib.figure import Figure

    columns = [(i, c) for i in range(4) for c in (0, 1)]
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    axes = figure.subplots(5, len(columns))
    titles = ("frame", "reconstruction", "frame\nminus mean", "reconstruction\nminus mean", "difference")
    for col, (i, c) in enumerate(columns):
        x, y = frames[i, c], reconstruction[i, c]
        axes[0, col].set_title(f"pose {i + 1}, camera {c}", fontsize=9)
        for row, image in enumerate((x, y, x - mean[c], y - mean[c], y - x)):
            limits = dict(vmin=0, vmax=0.6, cmap="viridis") if row < 2 else dict(vmin=-50, vmax=50, cmap="RdBu_r")
            shown = axes[row, col].imshow(image * (1 if row < 2 else 1e3), **limits)
            axes[row, col].set(xticks=[], yticks=[])
            if col == 0:
                axes[row, 0].set_ylabel(titles[row])
            if row in (0, 2) and col == len(columns) - 1:
                last = 2 if row == 0 else 5
                figure.colorbar(shown, ax=axes[row:last], label="depth, m" if row == 0 else "mm", shrink=0.8)
    figure.savefig(path, dpi=80)


def check_args(args: Args) -> None:
    """Exit with one line on the first invalid flag, before any work starts."""
    check_flags(args)
    check_argument(not (args.small and args.heights), "--small and --heights are two encoders: give one of them")
    check_argument(args.output or not args.heights, "--heights needs --output: give a name, such as runs/see.pt")
    args.output = args.output or ASSETS / f"depth_encoder{'_small' * args.small}.pt"
    for name in ("small", "heights"):
        useless = getattr(args, name) and args.picture is not None
        check_argument(not useless, f"--picture has no effect with --{name}: leave it out")
    try:
        plane = Terrain(args.terrain, TRAIN_TERRAIN_SEED, args.terrain_amplitude).is_plane
    except (ValueError, OSError) as error:
        exit_with_error(error)
    check_argument(is_scaled(args.terrain) or args.terrain_amplitude == Args.terrain_amplitude,
                   f"--terrain-amplitude has no effect on --terrain {args.terrain}: leave it out")  # fmt: skip
    check_argument(not plane, "--terrain is flat: give ground with something to see")
    smallest = max(2 * args.num_terrains, args.batch_size)
    check_argument(args.num_frames >= smallest, f"--num-frames is {args.num_frames}: give {smallest} or more for "
                   f"{args.num_terrains} terrains and batches of {args.batch_size}")  # fmt: skip
    require_writable("--output", args.output, args.overwrite, ".pt")
    if args.output.exists():  # --overwrite replaces an encoder, or an unreadable file
        with contextlib.suppress(ValueError):
            is_encoder = "encoder" in read_checkpoint(args.output)
            check_argument(is_encoder, f"--output is {args.output}, which is no encoder: give another name")
    if args.picture is not None:
        require_writable("--picture", args.picture, args.overwrite, ".png")
        require_packages("--picture", "matplotlib")


def pretrain_small(args: Args) -> dict[str, Any]:
    """Train, measure and save a small encoder. Returns the content of the file."""
    rng, start = np.random.default_rng(args.seed), time.perf_counter()
    train_seeds = [TRAIN_TERRAIN_SEED + i for i in range(args.num_terrains)]
    frames, targets = make_frames(args, rng, train_seeds, args.num_frames // 2)
    val_frames, val_targets = make_frames(args, rng, [VAL_TERRAIN_SEED, VAL_TERRAIN_SEED + 1], args.num_val_frames // 2)
    if args.heights:
        targets, expected = targets[:, 4:], val_targets[:, 4:]
        scale = targets.std()
        head = nn.Linear(2 * DepthEncoder.num_features, len(SCAN))
        encoder = fit_small(args, frames, targets / scale, head)
        with torch.no_grad():
            outputs, names = head(encode(encoder, val_frames)) * scale, f"{len(SCAN)} heights"
    else:
        teacher = DepthEncoder()
        teacher.load_state_dict(read_checkpoint(ASSETS / "depth_encoder.pt")["encoder"])
        images = frames.flatten(0, 1)[:, None]
        encoder = fit_small(args, images, encode(teacher, frames).view(len(images), -1), nn.Identity())
        outputs, expected = (encode(net, val_frames).view(-1, DepthEncoder.num_features) for net in (encoder, teacher))
        names = "20 features"
    seconds = time.perf_counter() - start
    error = (outputs - expected).square().mean(0)
    r2 = 1 - error / expected.var(0, correction=0)
    result = {"r2": r2.tolist(), "rmse": error.mean().sqrt().item(), "seconds": seconds}
    print(f"R² of the {names} on held-out terrain: {r2.min():.4f} to {r2.max():.4f}, median {r2.median():.4f}; "
          f"mean error {result['rmse']:.4f}, standard deviation {expected.std():.4f}")  # fmt: skip
    return save(args, encoder, result)


def save(args: Args, encoder: nn.Module, result: dict[str, Any]) -> dict[str, Any]:
    """Write an encoder and what was measured. Returns the content of the file."""
    flags = {key: value for key, value in asdict(args).items() if key not in ("output", "picture")}
    content = {"encoder": encoder.state_dict(), "seed": args.seed, "args": flags} | result
    write(args.output, lambda part: torch.save(content, part))
    print(f"{args.output}: trained in {result['seconds']:.0f} s")
    return content


def pretrain(args: Args) -> dict[str, Any]:
    """Train, measure and save an encoder. Returns the content of the file."""
    check_args(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or os.cpu_count())
    if args.small or args.heights:
        return pretrain_small(args)
    start = time.perf_counter()
    train_seeds = [TRAIN_TERRAIN_SEED + i for i in range(args.num_terrains)]
    val_seeds = [VAL_TERRAIN_SEED, VAL_TERRAIN_SEED + 1]
    rng = np.random.default_rng(args.seed)
    frames, targets = make_frames(args, rng, train_seeds, args.num_frames // 2)
    val_frames, val_targets = make_frames(args, rng, val_seeds, args.num_val_frames // 2)
    mean = frames.mean(0)
    std = frames.std(0) + NOISE_FLOOR
    initial = DepthEncoder()
    encoder, decoder = fit(args, frames, mean, std)
    seconds = time.perf_counter() - start

    sample = torch.randperm(len(frames))[: len(val_frames)]  # as many training frames
    frames, targets, val_targets = frames[sample], targets[sample, :4], val_targets[:, :4]
    reconstruction = reconstruct(encoder, decoder, val_frames, mean, std)
    error, baseline = reconstruction - val_frames, val_frames - mean
    features = encode(encoder, val_frames)
    result = {
        "train_mse": (reconstruct(encoder, decoder, frames, mean, std) - frames).square().mean().item(),
        "val_mse": error.square().mean().item(),
        "val_mae_mm": 1e3 * error.abs().mean().item(),
        "val_loss": (error / std).square().mean().item(),
        "mean_frame_mse": baseline.square().mean().item(),
        "mean_frame_mae_mm": 1e3 * baseline.abs().mean().item(),
        "mean_frame_loss": (baseline / std).square().mean().item(),
        "feature_mean": features.mean(0).tolist(),
        "feature_std": features.std(0).tolist(),
        "saturated": (features.abs() > 0.97).float().mean().item(),
        "seconds": seconds,
        "num_threads": torch.get_num_threads(),
    }
    for key in ("mse", "mae_mm", "loss"):
        print(f"held-out {key}: {result[f'val_{key}']:.3g}, of the mean frame: {result[f'mean_frame_{key}']:.3g}")
    print(f"training mse: {result['train_mse']:.3g}")
    deviations = torch.tensor(result["feature_std"])
    print(f"features: standard deviation {deviations.min():.2f} to {deviations.max():.2f}, "
          f"{100 * result['saturated']:.1f} % beyond ±0.97")  # fmt: skip

    print("R² of linear probes on held-out terrain; with noise of 0.05 added to the features")
    names = ("tilt x", "tilt y", "slope x", "slope y", "tilt to ground x", "tilt to ground y",
             "slope x, tilt given", "slope y, tilt given")  # fmt: skip
    train_x, val_x = encode(encoder, frames), features
    initial_x = encode(initial, frames), encode(initial, val_frames)
    rows = {
        "mean depth of each frame": (frames.mean((2, 3)), val_frames.mean((2, 3)), 0.0),
        "random weights, 40 features": (*initial_x, 0.0),
        "camera 0, 20 features": (train_x[:, :20], val_x[:, :20], 0.0),
        "both, 40 features": (train_x, val_x, 0.0),
        "random weights, 40, noise": (*initial_x, 0.05),
        "camera 0, 20 features, noise": (train_x[:, :20], val_x[:, :20], 0.05),
        "both, 40 features, noise": (train_x, val_x, 0.05),
    }
    print(f"{'':30}" + "  ".join(names))
    result["probes"] = {}
    for name, (a, b, noise) in rows.items():
        scores = result["probes"][name] = dict(zip(names, probe_all(a, targets, b, val_targets, noise)))
        print(f"{name:30}" + "  ".join(f"{score:{len(n)}.3f}" for n, score in scores.items()))

    content = save(args, encoder, result)
    if args.picture is not None:
        write(args.picture, lambda part: save_picture(part, val_frames, reconstruction, mean))
    return content


def cli() -> None:
    run_program(pretrain, Args, description=__doc__)


if __name__ == "__main__":
    cli()
