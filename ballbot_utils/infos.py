"""Gymnasium's layout of `info` in vector environments: arrays (num_envs, ...), each `key` with a mask `_key`."""

import numpy as np


def unbatch_infos(infos: dict) -> dict:
    """The info of the first environment, as a single environment has it."""
    single = {}
    for key, value in infos.items():
        if isinstance(value, dict):
            single[key] = unbatch_infos(value)
        elif key[0] != "_":
            single[key] = value[0] if value.ndim > 1 else value[0].item()
    return single


def mask_infos(infos: dict, where: np.ndarray) -> dict:
    """The infos of the environments `where`, bool (num_envs,), and zeros for the others; {} where it is all False."""
    masked = {}
    for key, value in infos.items() if where.any() else ():
        if key[0] != "_":
            if isinstance(value, dict):
                masked[key] = mask_infos(value, where)
            else:
                masked[key] = np.where(where[:, None] if value.ndim > 1 else where, value, np.zeros_like(value))
            masked[f"_{key}"] = where.copy()
    return masked
