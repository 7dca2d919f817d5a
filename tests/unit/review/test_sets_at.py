"""The forest asked for one threshold after the other: what it says at once is what looking at every set says."""

import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.balance.forest import Forest
from clip_cid.review.sets_at import SetsAt


@st.composite
def forests(draw):
    dim = draw(st.integers(1, 3))
    row = st.lists(st.integers(-3, 3), min_size=dim, max_size=dim).filter(any)
    rows = oracles.unit(np.array(draw(st.lists(row, min_size=1, max_size=16)), dtype=np.float64))
    limit = draw(st.floats(0.05, 3.9))
    links, distances = oracles.spanning_forest(rows, limit)
    ends = np.array(links, dtype=np.int64).reshape(-1, 2)
    return Forest(len(rows), ends[:, 0], ends[:, 1], np.array(distances, dtype=np.float64), limit)


@st.composite
def forests_and_thresholds(draw):
    forest = draw(forests())
    exact = [st.sampled_from(forest.squared.tolist())] if len(forest.squared) else []
    return forest, draw(st.one_of(st.floats(0, forest.limit), *exact))


@given(forests_and_thresholds())
def test_the_counts_are_those_of_the_sets(data):
    forest, squared = data
    counts, labels = SetsAt(forest).counts(squared), forest.sets(squared)
    sizes = np.bincount(labels)
    assert counts.links == forest.rows - len(sizes)
    assert counts.sets == (sizes > 1).sum()


@given(forests_and_thresholds())
def test_the_sets_are_those_of_the_forest(data):
    forest, squared = data
    sets, labels = SetsAt(forest).sets(squared), forest.sets(squared)
    expected = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    expected = [members for members in expected if len(members) > 1]
    assert [sets.members(number).tolist() for number in range(len(sets))] == expected
    assert sets.lowest.tolist() == [members[0] for members in expected]
    for row in range(forest.rows):
        number = next((number for number, members in enumerate(expected) if row in members), -1)
        assert sets.set_of_row[row] == number
    assert sets.sum_of(np.arange(forest.rows)).tolist() == [sum(members) for members in expected]
    first = np.zeros(forest.rows, dtype=bool)
    first[0] = True
    assert sets.any_of(first).tolist() == [0 in members for members in expected]


@given(forests_and_thresholds())
def test_each_set_falls_apart_below_its_longest_link_and_grows_at_the_next(data):
    forest, squared = data
    view = SetsAt(forest)
    sets = view.sets(squared)
    for number in range(len(sets)):
        members = sets.members(number)
        links = view.links_among(members, squared)
        assert len(links) == len(members) - 1
        assert sets.weakest[number] == forest.squared[links].max()
        inside = np.isin(forest.left, members) | np.isin(forest.right, members)
        later = forest.squared[inside & (forest.squared > squared)]
        assert sets.grows_at[number] == (later.min() if len(later) else np.inf)
