import numpy as np
import pytest
import torch

from clip_cid.unit_length import is_unit


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_a_length_is_that_of_a_unit_vector_within_a_hundredth(array) -> None:
    lengths = array([1.0, 0.9901, 1.0099, 0.9899, 1.0101, 0.0, float("nan"), float("inf")])
    assert is_unit(lengths).tolist() == [True] * 3 + [False] * 5


def test_rounding_to_float16_keeps_a_unit_vector_one() -> None:
    rows = np.random.default_rng(0).standard_normal((1000, 7))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    assert is_unit(lengths).all()
    assert np.abs(lengths - 1).max() < 1e-3
