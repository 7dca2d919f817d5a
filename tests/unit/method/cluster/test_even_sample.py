"""A cap on clusters: small ones are whole, large ones are cut to the cap, and each row can be drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.cluster.even_sample import cap_clusters


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 10))
def test_each_cluster_keeps_all_or_as_many_as_the_cap_says(sizes: list[int], most: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    stays = cap_clusters(labels, most)
    assert np.bincount(labels[stays], minlength=len(sizes)).tolist() == [min(size, most) for size in sizes]
    np.testing.assert_array_equal(stays, cap_clusters(labels, most))


def test_what_stays_of_a_large_cluster_is_from_all_of_it() -> None:
    stays = np.flatnonzero(cap_clusters(np.zeros(10_000, dtype=np.int64), 1000))
    assert abs(stays.mean() / 10_000 - 0.5) < 0.05  # five standard deviations


def test_a_cap_of_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        cap_clusters(np.zeros(3, dtype=np.int64), 0)
