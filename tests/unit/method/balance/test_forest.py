import numpy as np
import oracles
import pytest
from hard_rows import kruskal, links_of, spanning_forest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from clip_cid.method.balance import forest
from clip_cid.method.balance.forest import Forest, Links, join_links, merged_links, spanning_links, whole_forest
from clip_cid.method.balance.union_find import UnionFind

SIZE = 9
NAMES = [(i, j) for i in range(SIZE) for j in range(i + 1, SIZE)]
# Few distances, 0 among them, so that ties abound; a pair has one distance however often it is listed.
pairs = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 5e-324, 0.25, 0.5, 1.0])).flatmap(
    lambda found: st.permutations([(squared, i, j) for (i, j), squared in found.items()])
)


def as_links(listed: list[tuple[float, int, int]]) -> Links:
    squared, left, right = (
        np.array([pair[column] for pair in listed], dtype=dtype) for column, dtype in enumerate((float, int, int))
    )
    return Links(left, right, squared)


def forest_of(listed: list[tuple[float, int, int]], rows: int = SIZE, limit: float = 1.0) -> Forest:
    return spanning_forest(rows, *as_links(listed), limit)


@given(pairs)
def test_the_forest_is_the_one_that_kruskal_finds(listed):
    assert links_of(forest_of(listed)) == kruskal(SIZE, listed)


@pytest.mark.slow
@given(pairs, st.randoms(use_true_random=False))
def test_neither_the_order_of_pairs_nor_their_repetition_matters(listed, random):
    again = listed + [pair for pair in listed if random.random() < 0.5]
    random.shuffle(again)
    one, other = forest_of(listed), forest_of(again)
    for name in ("left", "right", "squared"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


@given(pairs, st.data())
def test_the_forest_of_forests_is_the_forest_of_all_pairs(listed, draws):
    parts: list[list[tuple[float, int, int]]] = [[], [], []]
    for pair in listed:
        for part in draws.draw(st.sets(st.integers(0, 2), min_size=1)):
            parts[part].append(pair)
    joined = join_links([spanning_links(as_links(part)) for part in parts])
    assert links_of(spanning_forest(SIZE, *joined, 1.0)) == kruskal(SIZE, listed)


@given(pairs, st.data(), st.sampled_from([1, 2, 5, 1000]))
def test_merging_some_links_at_a_time_gives_the_forest_of_all_pairs(listed, draws, at_once):
    parts: list[list[tuple[float, int, int]]] = [[], [], []]
    for pair in listed:
        for part in draws.draw(st.sets(st.integers(0, 2), min_size=1)):
            parts[part].append(pair)
    forests = [spanning_links(as_links(part)) for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "_MERGED", at_once)
        merged = join_links(list(merged_links(forests, UnionFind(SIZE))))
        assert links_of(merged) == kruskal(SIZE, listed)

    # Rows at distance 0 are equal, so that all their pairs are; the whole forest links them to the lowest.
    equal = oracles.connected_sets(SIZE, [(i, j) for squared, i, j in listed if squared == 0])
    star = [(0.0, members[0], row) for members in equal for row in members[1:]]
    farther = [pair for pair in listed if pair[0] > 0]
    assert links_of(whole_forest(SIZE, forests, 1.0)) == kruskal(SIZE, star + farther)


@given(pairs, st.sampled_from([0.0, 5e-324, 0.1, 0.25, 0.3, 0.5, 0.99, 1.0]))
def test_at_every_threshold_the_sets_are_those_of_all_pairs(listed, threshold):
    forest = forest_of(listed)
    labels = forest.sets(threshold)
    expected = oracles.connected_sets(SIZE, [(i, j) for squared, i, j in listed if squared <= threshold])
    assert [np.flatnonzero(labels == number).tolist() for number in range(labels.max() + 1)] == expected
    assert forest.removed_share(threshold) == (SIZE - len(expected)) / SIZE


def test_large_random_graphs_weigh_what_scipys_tree_weighs():
    rng = np.random.default_rng(0)
    names = np.unique(np.sort(rng.integers(0, 3000, (9000, 2)), axis=1), axis=0)
    left, right = names[names[:, 0] < names[:, 1]].T
    squared = rng.uniform(0.1, 1, len(left))
    found = spanning_forest(3000, left, right, squared, 1.0)
    graph = coo_matrix((squared, (left, right)), shape=(3000, 3000)).tocsr()
    tree = minimum_spanning_tree(graph)
    assert np.sort(tree.data).tolist() == found.squared.tolist()
    for threshold in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0):
        near = squared <= threshold
        kept = coo_matrix((squared[near], (left[near], right[near])), shape=(3000, 3000))
        count, expected = connected_components(kept, directed=False)
        both = np.unique(np.stack([found.sets(threshold), expected]), axis=1)
        assert both.shape[1] == count == 3000 - found.links(threshold)


def test_exact_duplicates_keep_the_links_that_scipy_alone_would_lose():
    listed = [(0.0, 0, 1), (0.0, 0, 2), (0.0, 1, 2), (0.5, 2, 3)]
    found = forest_of(listed, rows=4)
    assert links_of(found) == [(0.0, 0, 1), (0.0, 0, 2), (0.5, 2, 3)]
    left, right, squared = as_links(listed)
    assert minimum_spanning_tree(coo_matrix((squared, (left, right)), shape=(4, 4))).nnz == 1  # of 3
    assert found.sets(0.0).tolist() == [0, 0, 0, 1]
    assert found.removed_share(0.0) == 0.5


def test_of_equal_distances_the_lower_rows_are_linked():
    listed = [(0.25, i, j) for i in range(5) for j in range(i + 1, 5)]
    assert links_of(forest_of(listed[::-1])) == [(0.25, 0, 1), (0.25, 0, 2), (0.25, 0, 3), (0.25, 0, 4)]


def test_the_columns_are_of_the_types_that_are_stored():
    found = forest_of([(0.25, 0, 1)])
    assert (found.left.dtype, found.right.dtype, found.squared.dtype) == (np.int64, np.int64, np.float64)
    assert found.sets(0.25).dtype == np.int64


def test_rows_without_near_pairs_are_sets_of_their_own():
    found = forest_of([], rows=3)
    assert found.sets(1.0).tolist() == [0, 1, 2]
    assert (found.links(1.0), found.removed_share(1.0)) == (0, 0)
    assert len(spanning_links(join_links([])).left) == 0


def test_the_threshold_that_removes_a_share_is_the_distance_of_a_link():
    found = forest_of([(0.0, 0, 1), (0.25, 1, 2), (0.25, 3, 4), (0.5, 5, 6)], rows=10)
    shares = {0.01: 0.0, 0.1: 0.0, 0.11: 0.25, 0.2: 0.25, 0.3: 0.25, 0.31: 0.5, 0.4: 0.5}
    assert {share: found.squared_for(share) for share in shares} == shares
    with pytest.raises(ValueError, match=r"share must be at most 0\.4000, which .* removes, got 0\.41"):
        found.squared_for(0.41)


@pytest.mark.parametrize("rows", [3, 7, 10, 49, 100])
def test_a_share_of_whole_rows_asks_for_no_row_more(rows):
    """The product of a share and the rows may be a hair above the whole number: 0.07 x 100 is 7.000000000000001."""
    found = forest_of([(i / rows, 0, i) for i in range(1, rows)], rows=rows)
    for removed in range(1, rows):
        assert found.squared_for(removed / rows) == removed / rows


def test_the_smallest_share_still_removes_a_row():
    found = forest_of([(0.25, 0, 1), (0.5, 1, 2)])
    assert found.squared_for(1e-12) == 0.25
    with pytest.raises(ValueError, match=r"share must be at most 0\.0000"):
        forest_of([]).squared_for(1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_nobody_can_mean_is_refused(share):
    with pytest.raises(ValueError, match="share must be above 0 and below 1, got"):
        forest_of([(0.25, 0, 1)]).squared_for(share)


def test_thresholds_beyond_the_limit_are_refused():
    found = forest_of([(0.25, 0, 1)], limit=0.5)
    assert found.links(0.5) == 1
    for asked in (found.sets, found.links, found.removed_share):
        with pytest.raises(ValueError, match=r"squared must be at most the forest's limit 0\.5, got 0\.6"):
            asked(0.6)


@pytest.mark.parametrize(
    ("left", "right", "squared", "message"),
    [
        ([1], [1], [0.1], "links must join rows 0 <= left < right < 3"),
        ([2], [1], [0.1], "links must join rows"),
        ([-1], [1], [0.1], "links must join rows"),
        ([0], [3], [0.1], "links must join rows"),
        ([0, 1], [1, 2], [0.2, 0.1], r"squared must ascend from 0 to the limit 0\.5"),
        ([0], [1], [0.6], "squared must ascend"),
        ([0], [1], [-0.1], "squared must ascend"),
        ([0, 1], [1, 2], [0.1, float("nan")], "squared must ascend"),
        ([0], [1], [float("nan")], "squared must ascend"),
    ],
)
def test_what_is_no_forest_is_refused(left, right, squared, message):
    with pytest.raises(ValueError, match=message):
        Forest(3, np.array(left), np.array(right), np.array(squared), 0.5)
