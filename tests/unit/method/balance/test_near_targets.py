"""Rows near an evaluation's images, against a comparison of all pairs in float64."""

import numpy as np
import pytest

from clip_cid.method.balance import near_targets as module
from clip_cid.method.balance.near_targets import near_targets
from clip_cid.method.unit_rows import UnitRows


def unit(rows: np.ndarray) -> UnitRows:
    return UnitRows(rows, name="rows", any_length=True)


@pytest.mark.parametrize("block", [3, 7, 4096])
@pytest.mark.parametrize("limit", [0.0, 0.05, 0.4, 4.0])
def test_the_nearest_target_of_each_row_is_that_of_a_plain_search(
    monkeypatch: pytest.MonkeyPatch, block: int, limit: float
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_PAIRS", 5)
    random = np.random.default_rng(0)
    targets = random.standard_normal((11, 6))
    targets[[4, 9]] = targets[1]  # of equal ones the lowest is named
    images = random.standard_normal((23, 6))
    images[[2, 5, 17]] = targets[[9, 3, 0]] * 2
    images[8] = targets[7] + 0.05 * random.standard_normal(6)

    found = near_targets(unit(images), unit(targets), limit)
    own, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, targets))
    squared = ((own[:, None] - others[None]) ** 2).sum(axis=2)
    near = np.flatnonzero(squared.min(axis=1) <= limit + 1e-12)
    np.testing.assert_array_equal(found.rows, near)
    np.testing.assert_allclose(found.squared, squared[near].min(axis=1), atol=1e-12)
    assert found.target[found.rows == 2].tolist() == [1]
    exact = [row for row in near.tolist() if row not in (2, 5, 17)]
    np.testing.assert_array_equal(found.target[np.isin(found.rows, exact)], squared[exact].argmin(axis=1))


def test_a_smaller_threshold_needs_no_other_comparison() -> None:
    random = np.random.default_rng(1)
    images, targets = unit(random.standard_normal((40, 3))), unit(random.standard_normal((9, 3)))
    wide, narrow = near_targets(images, targets, 0.5), near_targets(images, targets, 0.1)
    for name in ("rows", "target", "squared"):
        np.testing.assert_array_equal(getattr(wide.within(0.1), name), getattr(narrow, name))


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="targets must have the width of the rows, 3, got 2"):
        near_targets(unit(np.eye(3)), unit(np.eye(2)), 0.1)
