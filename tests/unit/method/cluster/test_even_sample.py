"""A cap on clusters: small ones are whole, large ones are cut to the cap, and each row can be drawn.

A total is shared evenly from the top of a hierarchy down, however the clusters are.
"""

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.cluster.even_sample import (
    cap_clusters,
    clusters_of_clusters,
    draw_of_clusters,
    even_shares,
)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 10))
def test_each_cluster_keeps_all_or_as_many_as_the_cap_says(sizes: list[int], most: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    stays = cap_clusters(labels, most)
    assert np.bincount(labels[stays], minlength=len(sizes)).tolist() == [min(size, most) for size in sizes]
    np.testing.assert_array_equal(stays, cap_clusters(labels, most))


def test_what_stays_of_a_large_cluster_is_from_all_of_it() -> None:
    stays = np.flatnonzero(cap_clusters(np.zeros(10_000, dtype=np.int64), 1000))
    assert abs(stays.mean() / 10_000 - 0.5) < 0.05  # five standard deviations


def test_a_cap_above_all_sizes_takes_everything() -> None:
    assert cap_clusters(np.array([0, 0, 1]), 10**30).all()
    assert even_shares(10**30, np.array([2, 1])).tolist() == [2, 1]


def test_a_cap_of_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        cap_clusters(np.zeros(3, dtype=np.int64), 0)


@st.composite
def hierarchies(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Sizes of clusters, and of one or two levels the number of the cluster above of each."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    parents, below = [], len(sizes)
    for _ in range(draw(st.integers(0, 2))):
        count = draw(st.integers(1, below))
        others = draw(st.lists(st.integers(0, count - 1), min_size=below - count, max_size=below - count))
        parents.append(draw(st.permutations([*range(count), *others])))
        below = count
    return sizes, parents


def shares_of(total: int, sizes: list[int], parents: list[list[int]]) -> np.ndarray:
    return even_shares(total, np.array(sizes), [np.array(above) for above in parents])


@given(hierarchies(), st.integers(1, 90))
def test_shares_are_those_of_giving_a_row_after_the_other_at_each_node(
    tree: tuple[list[int], list[list[int]]], total: int
) -> None:
    sizes, parents = tree
    given, held = shares_of(total, sizes, parents), np.array(sizes)
    assert given.sum() == min(total, sum(sizes))
    for above in parents:
        given_above, held_above = (np.bincount(above, rows).astype(int) for rows in (given, held))
        for node, rows in enumerate(given_above.tolist()):
            inside = np.array(above) == node
            assert sorted(given[inside].tolist()) == oracles.even_shares(rows, held[inside].tolist())
        given, held = given_above, held_above
    assert sorted(given.tolist()) == oracles.even_shares(total, held.tolist())


@given(hierarchies(), st.integers(1, 90), st.integers(1, 9))
def test_a_larger_total_lists_what_a_smaller_one_does_and_a_cap_holds(
    tree: tuple[list[int], list[list[int]]], total: int, cap: int
) -> None:
    sizes, parents = tree
    most = [min(size, cap) for size in sizes]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    smaller, larger = (draw_of_clusters(labels, shares_of(total + more, most, parents)) for more in (0, 1))
    assert (smaller <= larger).all()
    assert larger.sum() == min(total + 1, sum(most))
    assert np.bincount(labels[larger]).max() <= cap


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 10))
def test_without_levels_a_total_is_the_cap_that_gives_it(sizes: list[int], most: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    capped = cap_clusters(labels, most)
    np.testing.assert_array_equal(draw_of_clusters(labels, even_shares(int(capped.sum()), np.array(sizes))), capped)


def test_each_center_counts_once_in_the_levels_above() -> None:
    """Four themes that fill 40, 4, 4 and 2 clusters: each is one cluster of clusters, and gives a quarter."""
    random = np.random.default_rng(0)
    themes = np.repeat([0, 1, 2, 3], [40, 4, 4, 2])
    centers = np.eye(8)[themes] + 0.02 * random.normal(size=(50, 8))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    levels = clusters_of_clusters(centers, [12, 4])
    tops = levels[1][levels[0]]
    assert [len(set(tops[themes == theme])) for theme in range(4)] == [1, 1, 1, 1]
    assert len(set(tops)) == 4

    shares = even_shares(200, np.full(50, 100), levels)
    assert np.bincount(themes, shares).tolist() == [50, 50, 50, 50]
    assert np.bincount(themes, even_shares(200, np.full(50, 100))).tolist() == [160, 16, 16, 8]
