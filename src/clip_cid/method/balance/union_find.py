"""Disjoint sets over arrays: whole arrays of edges are joined at once, none is kept."""

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


class UnionFind:
    """Sets of the numbers 0 to `size - 1`, each alone at first; the Union-Find of `balance_sets` in docs/method.md.

    The memory is two integers a number, however many edges are joined. A smaller set is always hung below a larger
    one, so no path is longer than log2(size).
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"size must be at least 0, got {size}")
        self._parent = np.arange(size, dtype=np.int64)
        self._members = np.ones(size, dtype=np.int64)  # right at the roots only

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
        left, right = self.find(left), self.find(right)
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
        members = np.zeros(count, dtype=np.int64)
        np.add.at(members, component, self._members[roots])
        self._parent[roots] = firsts[component]
        self._members[firsts] = members

    def labels(self) -> Int[np.ndarray, " size"]:
        """The number of each one's set; sets are numbered in the order of their smallest members."""
        roots = self.find(np.arange(len(self)))
        _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
        number = np.empty(len(first), dtype=np.int64)
        number[np.argsort(first)] = np.arange(len(first))
        return number[inverse]
