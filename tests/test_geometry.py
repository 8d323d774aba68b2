"""Rotations of NumPy arrays and of torch tensors agree."""

import numpy as np
import pytest
import torch

from ballbot_utils import geometry

RNG = np.random.default_rng(0)
QUATERNIONS = np.concatenate([[[1, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0]], RNG.normal(size=(50, 4))])
QUATERNIONS /= np.linalg.norm(QUATERNIONS, axis=1, keepdims=True)
ORIENTATIONS = geometry.rotation_vector(QUATERNIONS)
CASES = [
    (geometry.rotation_matrix, [QUATERNIONS]),
    (geometry.rotation_vector, [QUATERNIONS]),
    (geometry.in_body_frame, [ORIENTATIONS, RNG.normal(size=(53, 3))]),
]


@pytest.mark.parametrize("function, arrays", CASES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_tensors_give_what_arrays_give(function, arrays, dtype, tolerance):
    tensors = [torch.tensor(array, dtype=dtype) for array in arrays]
    expected, results = function(*arrays), function(*tensors)
    on_meta = function(*(tensor.to("meta") for tensor in tensors))  # fails if anything reads a value
    if function is not geometry.in_body_frame:
        expected, results, on_meta = [expected], [results], [on_meta]
    for array, tensor, meta in zip(expected, results, on_meta):
        assert tensor.dtype == meta.dtype == dtype and tensor.shape == meta.shape == array.shape
        np.testing.assert_allclose(tensor, array, atol=tolerance)
