"""Running policies in environments."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def run_episodes(envs: Any, policy: Callable, seeds: Sequence[int]) -> list[tuple[float, int, bool]]:
    """One episode for each seed, in as many environments: a list of (return, length, whether the robot fell).

    Only the first episode of each environment counts, otherwise short episodes would have too much weight.
    """
    obs, _ = envs.reset(seed=list(seeds))
    results, active = [], np.ones(envs.num_envs, bool)
    while active.any():
        obs, _, terminations, truncations, infos = envs.step(policy(obs))
        ended = (terminations | truncations) & active
        if ended.any():
            columns = infos["episode"]["r"], infos["episode"]["l"], terminations
            results += zip(*(column[ended].tolist() for column in columns))
            active &= ~ended
    return results


def apply_in_blocks(network: Callable, x: torch.Tensor, size: int) -> torch.Tensor:
    """`network(x)`, on a CPU on `size` rows at a time: no bit of a row's result then depends on the other rows."""
    if x.is_cuda:
        return network(x)
    filled = torch.cat([x, x.new_zeros(-len(x) % size, *x.shape[1:])])
    return torch.cat([network(block) for block in filled.split(size)])[: len(x)]


def as_float32(value: Any) -> np.ndarray | torch.Tensor:
    """A float32 array from an array, list or tensor; images on a GPU stay there as tensors."""
    if torch.is_tensor(value):
        value = value.detach().float()
        return value if value.is_cuda and value.ndim > 2 else value.cpu().numpy()
    return np.asarray(value, np.float32)
