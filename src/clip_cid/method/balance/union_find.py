"""Disjoint sets over arrays: whole arrays of edges are joined at once, none is kept."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

_EDGES = 1 << 18  # joined at once: what they need beside is some 30 MB
_SMALL = 1 << 31  # fewer numbers fit into four bytes


class UnionFind:
    """Sets of the numbers 0 to `size - 1`, each alone at first; the Union-Find of `balance_sets` in docs/method.md.

    The memory is two integers a number (of four bytes each, up to 2^31 numbers), however many edges are joined. A
    smaller set is always hung below a larger one, so no path is longer than log2(size).
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"size must be at least 0, got {size}")
        kind = np.int32 if size < _SMALL else np.int64
        self._parent = np.arange(size, dtype=kind)
        self._members = np.ones(size, dtype=kind)  # right at the roots only

    def __len__(self) -> int:
        return len(self._parent)

    def find(self, nodes: Int[np.ndarray, " nodes"]) -> Int[np.ndarray, " nodes"]:
        """The root of each number's set, the same for all numbers of a set; valid until the next union."""
        if len(nodes) and (nodes.min() < 0 or nodes.max() >= len(self)):
            raise ValueError(f"nodes must be 0 to {len(self) - 1}, got {nodes.min()} to {nodes.max()}")
        roots = self._parent[nodes]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[nodes] = roots
        return roots

    def union(self, left: Int[np.ndarray, " left"], right: Int[np.ndarray, " right"]) -> None:
        """Join the sets of `left[i]` and `right[i]`, for every i."""
        if len(left) != len(right):
            raise ValueError(f"left and right must have one length, got {len(left)} and {len(right)}")
        for some in _blocks(len(left)):
            self._union(self.find(left[some]), self.find(right[some]))

    def labels(self) -> Int[np.ndarray, " size"]:
        """The number of each one's set, int64; sets are numbered in the order of their smallest members."""
        # The root of each number, and of each set its smallest member: the last that is written stays.
        smallest = np.empty_like(self._parent)
        for some in reversed(list(_blocks(len(self)))):
            descending = np.arange(some.start, min(some.stop, len(self)))[::-1]
            smallest[self.find(descending)] = descending

        # Where the smallest member comes, the set gets the next number: from there on `smallest` holds -1 - number.
        labels, count = np.empty(len(self), dtype=np.int64), 0
        for some in _blocks(len(self)):
            roots = self._parent[some]
            begins = smallest[roots] == np.arange(some.start, some.start + len(roots))
            new = int(begins.sum())
            smallest[roots[begins]] = -1 - np.arange(count, count + new)
            labels[some] = -1 - smallest[roots].astype(np.int64)
            count += new
        return labels

    def _union(self, left: Int[np.ndarray, " edges"], right: Int[np.ndarray, " edges"]) -> None:
        """Join sets that are named by their roots."""
        apart = left != right
        if not apart.any():
            return

        # The components of the sets that meet.
        roots, edges = np.unique(np.stack([left[apart], right[apart]]), return_inverse=True)
        edges = edges.reshape(2, -1)
        graph = coo_matrix((np.ones(edges.shape[1], dtype=bool), (edges[0], edges[1])), shape=(len(roots), len(roots)))
        count, component = connected_components(graph, directed=False)

        # The largest set of each component takes up the others.
        order = np.lexsort((-self._members[roots], component))
        firsts = roots[order[np.searchsorted(component[order], np.arange(count))]]
        members = np.zeros(count, dtype=self._members.dtype)
        np.add.at(members, component, self._members[roots])
        self._parent[roots] = firsts[component]
        self._members[firsts] = members


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _EDGES):
        yield slice(start, start + _EDGES)
