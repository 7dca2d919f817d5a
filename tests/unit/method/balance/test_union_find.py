import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import connected_sets
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from clip_cid.method.balance.union_find import UnionFind

SIZE = 12
edges = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)), max_size=30)


def joined(portions: list[list[tuple[int, int]]], size: int) -> UnionFind:
    sets = UnionFind(size)
    for portion in portions:
        array = np.array(portion, dtype=np.int64).reshape(-1, 2)
        sets.union(array[:, 0], array[:, 1])
    return sets


@given(st.lists(edges, max_size=5))
def test_sets_are_the_connected_components_however_the_edges_are_portioned(portions):
    labels = joined(portions, SIZE).labels()
    expected = connected_sets(SIZE, [edge for portion in portions for edge in portion])
    assert [np.flatnonzero(labels == number).tolist() for number in range(labels.max() + 1)] == expected


def test_large_random_graphs_give_the_components_of_scipy():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 20_000, size=(2, 9_000))
    sets = UnionFind(20_000)
    for at in range(0, 9_000, 700):
        sets.union(left[at : at + 700], right[at : at + 700])
    graph = coo_matrix((np.ones(9_000), (left, right)), shape=(20_000, 20_000))
    count, expected = connected_components(graph, directed=False)
    pairs = np.unique(np.stack([sets.labels(), expected]), axis=1)
    assert pairs.shape[1] == count == sets.labels().max() + 1


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_chain_joined_edge_by_edge_never_grows_a_long_path(order):
    size = 600
    sets = UnionFind(size)
    for i in range(size - 1) if order == "forward" else range(size - 2, -1, -1):
        sets.union(np.array([i]), np.array([i + 1]))
    longest = 0
    for node in range(size):
        steps = 0
        while sets._parent[node] != node:
            node, steps = sets._parent[node], steps + 1
        longest = max(longest, steps)
    assert longest <= np.log2(size)
    assert len(np.unique(sets.labels())) == 1


def test_repeated_edges_and_loops_change_nothing():
    sets = joined([[(0, 0), (1, 2), (2, 1), (1, 2)], [(2, 1)]], 4)
    assert sets.labels().tolist() == [0, 1, 1, 2]


def test_find_does_not_need_all_nodes_or_any():
    sets = joined([[(0, 3)]], 5)
    roots = sets.find(np.array([3, 0, 4, 3]))
    assert roots[0] == roots[1] == roots[3] != roots[2]
    assert len(sets.find(np.array([], dtype=np.int64))) == 0


def test_an_edge_to_nowhere_is_refused():
    with pytest.raises(ValueError, match="nodes must be 0 to 2, got 1 to 3"):
        UnionFind(3).union(np.array([0, 1]), np.array([1, 3]))
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        UnionFind(3).union(np.array([0]), np.array([1, 2]))
    with pytest.raises(ValueError, match="size must be at least 0, got -1"):
        UnionFind(-1)
