"""Checks of arguments and of loaded data. Each problem is reported in one line."""

import math
from typing import Any

import numpy as np
import torch


def check_value(valid: Any, name: str, value: Any, expected: str) -> None:
    """Raise a ValueError of one line, "`name` is `value`: give `expected`", unless `valid`."""
    if not valid:
        raise ValueError(f"{name} is {' '.join(repr(value).split())}: give {expected}")  # arrays have several lines


def is_number(value: Any, kinds: tuple = (int, float, np.number)) -> bool:
    """Whether it is a finite number. True and False are not numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, low: int) -> bool:
    """Whether it is a whole number, `low` or more."""
    return is_number(value, (int, np.integer)) and value >= low


def find_mismatch(value: Any, like: Any, name: str = "content") -> str:
    """The name of the first part of `value` whose structure differs from `like`, or "".

    Both are dicts of tensors, strings and dicts. The structures are equal if keys and types are, and of tensors shapes,
    strides and dtypes. All numbers in `value` must be finite.
    """
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            return name
        return next(filter(None, (find_mismatch(value[key], like[key], f"{name} {key}") for key in like)), "")
    if not isinstance(like, torch.Tensor):
        return "" if type(value) is type(like) else name
    equal = type(value) is torch.Tensor and value.layout == like.layout and not value.requires_grad
    equal = equal and (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)
    return "" if equal and (not value.is_floating_point() or value.isfinite().all()) else name
