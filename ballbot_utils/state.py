"""Copying the arrays of an environment."""

import numpy as np
import torch


def copy_array(value: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """A copy of an array or tensor."""
    return value.clone() if torch.is_tensor(value) else value.copy()


def to_tensors(arrays: dict) -> dict:
    """Copies of arrays and tensors, as tensors, in a dict of any depth."""
    if isinstance(arrays, dict):
        return {name: to_tensors(value) for name, value in arrays.items()}
    return arrays.clone() if torch.is_tensor(arrays) else torch.tensor(arrays)


def copy_into(arrays: dict, tensors: dict) -> None:
    """Copy `tensors`, in a dict like that of `to_tensors`, into `arrays`."""
    for name, value in arrays.items():
        if isinstance(value, dict):
            copy_into(value, tensors[name])
        elif torch.is_tensor(value):
            value.copy_(tensors[name])
        else:
            value[:] = tensors[name].numpy()
