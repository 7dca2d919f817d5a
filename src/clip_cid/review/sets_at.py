"""What the forest says at any threshold: counts at once, the sets themselves in a fraction of a second."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from clip_cid.method.balance.forest import Forest


class Counts(NamedTuple):
    """What a threshold gives, before any decision to keep or to remove."""

    links: int
    """Each of them removes one image."""
    sets: int
    """Of two images or more."""


@dataclass(frozen=True, eq=False)
class Sets:
    """Every set of two or more rows at one threshold, numbered by lowest row."""

    squared: float
    rows: Int[np.ndarray, " members"]
    """Set by set, ascending within each."""
    starts: Int[np.ndarray, " sets"]
    size: Int[np.ndarray, " sets"]
    weakest: Float[np.ndarray, " sets"]
    """The longest link of each, squared."""
    grows_at: Float[np.ndarray, " sets"]
    """The squared distance at which each joins another row; infinite beyond the forest's limit."""
    set_of_row: Int[np.ndarray, " rows"]
    """-1 for a row that is alone."""

    def __len__(self) -> int:
        return len(self.starts)

    def members(self, number: int) -> Int[np.ndarray, " members"]:
        start = int(self.starts[number])
        return self.rows[start : start + int(self.size[number])]

    def any_of(self, rows: np.ndarray) -> np.ndarray:
        """Which sets have a row that this mask over all rows names."""
        return np.logical_or.reduceat(rows[self.rows], self.starts) if len(self) else np.zeros(0, dtype=bool)

    def sum_of(self, values: np.ndarray) -> np.ndarray:
        """The sum of these values of all rows over each set."""
        return np.add.reduceat(values[self.rows], self.starts) if len(self) else np.zeros(0, dtype=values.dtype)

    @cached_property
    def lowest(self) -> Int[np.ndarray, " sets"]:
        """The lowest row of each set, by which it is named."""
        return self.rows[self.starts]


class SetsAt:
    """A forest without the links that decisions cut, asked for its sets at one threshold after the other."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        linked = np.zeros(forest.rows, dtype=bool)
        linked[forest.left] = linked[forest.right] = True
        self._rows = np.flatnonzero(linked)
        number = np.cumsum(linked) - 1
        self._left, self._right = number[forest.left].astype(np.int32), number[forest.right].astype(np.int32)

        # After how many links how many rows are linked: a set of n rows has n - 1 links.
        first = np.full(len(self._rows), len(self._left))
        backwards = np.arange(len(self._left))[::-1]
        first[self._left[::-1]] = backwards
        first_right = np.full(len(self._rows), len(self._left))
        first_right[self._right[::-1]] = backwards
        begun = np.bincount(np.minimum(first, first_right), minlength=len(self._left))
        self._linked = np.concatenate([[0], np.cumsum(begun)])

    def counts(self, squared: float) -> Counts:
        """Exactly, without looking at any set."""
        links = self.forest.links(squared)
        return Counts(links, int(self._linked[links]) - links)

    def sets(self, squared: float) -> Sets:
        """Every set at this squared threshold."""
        links = self.forest.links(squared)
        left, right = self._left[:links], self._right[:links]
        if not links:
            none, alone = np.zeros(0, dtype=np.int64), np.full(self.forest.rows, -1)
            return Sets(squared, none, none, none, np.zeros(0), np.zeros(0), alone)
        graph = coo_matrix((np.ones(links, dtype=bool), (left, right)), shape=(len(self._rows),) * 2).tocsr()
        _, component = connected_components(graph, directed=False)
        sizes = np.bincount(component)

        # Rows that are alone are left out, and the others listed set by set; sets ascend by their lowest row.
        joined = np.flatnonzero(sizes[component] > 1)
        number = np.full(len(sizes), -1)
        lowest = np.unique(component[joined], return_index=True)
        number[lowest[0][np.argsort(lowest[1])]] = np.arange(len(lowest[0]))
        set_of = number[component]
        order = joined[np.argsort(set_of[joined], kind="stable")]
        size = np.bincount(set_of[joined], minlength=len(lowest[0]))

        weakest = np.full(len(size), -1)
        weakest[set_of[left]] = np.arange(links)  # links ascend, and the last one written stays
        set_of_row = np.full(self.forest.rows, -1)
        set_of_row[self._rows] = set_of
        return Sets(
            squared=squared,
            rows=self._rows[order],
            starts=np.cumsum(size) - size,
            size=size,
            weakest=self.forest.squared[weakest],
            grows_at=self._next_link(links, set_of, len(size)),
            set_of_row=set_of_row,
        )

    def links_among(self, rows: Int[np.ndarray, " members"], squared: float) -> Int[np.ndarray, " links"]:
        """The links of a whole set, by their places, ascending."""
        member = np.zeros(self.forest.rows, dtype=bool)
        member[rows] = True
        return np.flatnonzero(member[self.forest.left[: self.forest.links(squared)]])

    def _next_link(self, links: int, set_of: Int[np.ndarray, " linked"], count: int) -> Float[np.ndarray, " sets"]:
        """The first link of each set beyond the threshold."""
        later = np.arange(links, len(self._left))[::-1]
        beyond = np.append(self.forest.squared, np.inf)
        first = np.full((2, count + 1), len(self._left))  # the last place is of rows that are alone
        for place, ends in enumerate((self._left, self._right)):
            first[place, set_of[ends[later]]] = later
        return beyond[first.min(axis=0)[:count]]
