import numpy as np
import pytest

from clip_cid.method.balance.pair_agreement import agreement


def test_agreement_counts_pairs():
    found = agreement(np.array([0, 0, 0, 1, 1, 2]), np.array(["a", "a", "b", "b", "b", "c"]))
    assert (found.set_pairs, found.true_pairs, found.shared_pairs, found.rows) == (4, 4, 2, 6)
    assert (found.precision, found.recall) == (0.5, 0.5)


def test_agreement_leaves_rows_without_a_set_out():
    found = agreement(np.array([0, 0, -1, -1]), np.array([1, 1, 1, 2]))
    assert (found.rows, found.precision, found.recall) == (2, 1, 1)


def test_agreement_without_pairs_is_no_error():
    found = agreement(np.array([-1, -1]), np.array([1, 1]))
    assert (found.rows, found.precision, found.recall) == (0, 1, 1)
    assert agreement(np.array([0, 1]), np.array([1, 1])).recall == 0
    assert agreement(np.array([0, 0]), np.array([1, 2])).precision == 0
    with pytest.raises(ValueError, match=r"truth must have the shape \(2,\) of set_of, got \(1,\)"):
        agreement(np.array([0, 1]), np.array([1]))
