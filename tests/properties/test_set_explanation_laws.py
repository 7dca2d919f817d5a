"""Laws of what explains the sets of balance, against a slow version that knows nothing of forests or batches."""

import itertools

import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.balance import set_explanation
from clip_cid.method.balance.chaining import chain_summary
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.set_explanation import explain
from clip_cid.method.unit_rows import UnitRows


@st.composite
def balanced(draw, max_rows: int = 14):
    """Rows, a threshold, and sets that are connected at it; any row of a set may be the kept one."""
    dim = draw(st.integers(2, 4))
    row = st.lists(st.integers(-3, 3), min_size=dim, max_size=dim).filter(any)
    integers = np.array(draw(st.lists(row, min_size=1, max_size=max_rows)), dtype=np.float64)
    images = UnitRows(integers, name="rows", any_length=True)
    squared = draw(st.floats(0.01, 3.9))
    rows = images[0 : len(images)]
    sets = oracles.connected_sets(len(rows), [(i, j) for _, i, j in all_pairs(rows, squared)])
    keepers = [draw(st.sampled_from(members)) for members in sets]
    kept = sorted(keepers)
    set_of = np.empty(len(rows), dtype=np.int64)
    for members, keeper in zip(sets, keepers, strict=True):
        set_of[members] = kept.index(keeper)
    return images, rows, squared, np.array(kept), set_of


def all_pairs(rows, limit):
    """(squared, left, right) of the pairs within the limit, nearest first."""
    pairs = [(float(((rows[i] - rows[j]) ** 2).sum()), i, j) for i, j in itertools.combinations(range(len(rows)), 2)]
    return sorted(pair for pair in pairs if pair[0] <= limit)


def explained(data):
    images, rows, squared, kept, set_of = data
    links, distances = oracles.spanning_forest(rows, squared)
    ends = np.array(links, dtype=np.int64).reshape(-1, 2)
    forest = Forest(len(rows), ends[:, 0], ends[:, 1], np.array(distances), squared)
    return explain(images, kept, set_of, forest, squared)


@given(balanced())
def test_the_batched_explanation_is_the_slow_one(data):
    _, rows, squared, all_kept, set_of = data
    explanation, pairs = explained(data), all_pairs(rows, squared)
    distance = {(i, j): d for d, i, j in all_pairs(rows, 9)}
    groups = [np.flatnonzero(set_of == number).tolist() for number in range(len(all_kept))]
    listed = [number for number, members in enumerate(groups) if len(members) > 1]
    assert explanation.group.tolist() == listed
    assert explanation.row.tolist() == [row for number in listed for row in groups[number]]
    for place, number in enumerate(listed):
        members, kept = groups[number], int(all_kept[number])
        to_kept = {row: distance.get((min(row, kept), max(row, kept)), 0.0) for row in members}
        own = explanation.owner == place
        np.testing.assert_allclose(explanation.to_kept[own], [to_kept[row] for row in members], atol=1e-14)
        assert explanation.size[place] == explanation.component_size[place] == len(members)
        assert abs(explanation.farthest[place] - max(to_kept.values())) < 1e-14
        assert abs(explanation.widest[place] - max(distance[p] for p in itertools.combinations(members, 2))) < 1e-13
        # The weakest link is the nearest distance at which the set hangs together.
        edges = [(members.index(i), members.index(j), d) for d, i, j in pairs if i in members and j in members]
        weakest = explanation.weakest[place]
        upto = [(i, j) for i, j, d in edges if d <= weakest]
        below = [(i, j) for i, j, d in edges if d < weakest]
        assert len(oracles.connected_sets(len(members), upto)) == 1
        assert len(oracles.connected_sets(len(members), below)) > 1
        link = (int(explanation.weakest_left[place]), int(explanation.weakest_right[place]))
        assert distance[link] == weakest


@given(balanced(), st.integers(2, 5))
def test_farthest_weakest_and_widest_are_in_their_places_whatever_is_compared(data, exact_size):
    was = set_explanation.EXACT_SIZE
    set_explanation.EXACT_SIZE = exact_size
    try:
        explanation = explained(data)
    finally:
        set_explanation.EXACT_SIZE = was
    exact = explained(data)
    assert (explanation.weakest <= data[2]).all()
    assert (explanation.farthest <= explanation.widest).all()
    assert (explanation.widest <= exact.widest + 1e-13).all()
    assert (np.sqrt(explanation.widest) >= np.sqrt(exact.widest) / 2 - 1e-9).all()
    assert (explanation.widest_exact == (explanation.size <= exact_size)).all()


@given(balanced(), st.sampled_from(["cosine", "squared_euclidean", "euclidean"]))
def test_the_summary_is_that_of_the_removed_rows(data, metric):
    _, rows, squared, kept, set_of = data
    summary = chain_summary(explained(data), rows=len(rows), squared=squared, metric=metric)
    removed = [row for row in range(len(rows)) if kept[set_of[row]] != row]
    far = [float(((rows[row] - rows[kept[set_of[row]]]) ** 2).sum()) > squared for row in removed]
    assert summary.beyond_threshold_share == (np.mean(far) if far else 0)
    assert summary.largest == np.bincount(set_of).max()
    assert list(summary.distance.values()) == sorted(summary.distance.values())
    assert len(summary.distance) == (4 if removed else 0)
