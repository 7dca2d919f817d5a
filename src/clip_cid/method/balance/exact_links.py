"""Candidate pairs measured exactly and reduced to the links of their minimum spanning forest, in bounded memory."""

import numpy as np
from jaxtyping import Float, Int

from clip_cid.method.balance.crowds import groups_of_pairs, numbered, possible_links
from clip_cid.method.balance.forest import Links, join_links, spanning_links
from clip_cid.method.distances import squared_distances
from clip_cid.method.unit_rows import UnitRows

_PENDING_CANDIDATES = 1 << 21
_PENDING_LINKS = 1 << 21
_LARGE_CROWD = 256
_DIFFERENCES = 1 << 15  # numbers computed at once: a quarter of a MB
_UNIT_NUMBERS = 1 << 20  # of the rows whose distances are computed together: 8 MB


class ExactLinks:
    """Collects candidates; measures them when they are many, and reduces the links when those are many."""

    def __init__(self, images: UnitRows, limit: float) -> None:
        self._images, self._limit = images, limit
        self._candidates: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_candidates = 0
        self._links: list[Links] = []
        self._num_links = 0
        self._crowd_of: Int[np.ndarray, " rows"] | None = None
        self._crowds = 0

    def add(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> None:
        """Rows that may be near; the caller bounds how many come at once."""
        if self._crowd_of is not None:
            undecided = (self._crowd_of[i] != self._crowd_of[j]) | (self._crowd_of[i] == 0)
            i, j = i[undecided], j[undecided]

        self._candidates.append((i, j))
        self._num_candidates += len(i)
        if self._num_candidates >= _PENDING_CANDIDATES:
            self._measure_all()

    def take(self, links: Links) -> None:
        """Near pairs that were measured elsewhere."""
        self._links.append(links)
        self._num_links += len(links.left)

    def links(self) -> Links:
        """The minimum spanning forest of all near pairs so far."""
        self._measure_all()
        self._reduce()
        return self._links[0]

    def _measure_all(self) -> None:
        if not self._num_candidates:
            return
        i, j = (np.concatenate(column) for column in zip(*self._candidates, strict=True))
        self._candidates, self._num_candidates = [], 0
        for group in groups_of_pairs(i, j, max(2, _UNIT_NUMBERS // self._images.dim)):
            self._measure(i[group], j[group])

    def _measure(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> None:
        # Of a crowd only the pairs that can be links are left.
        rows, left, right = numbered(i, j)
        units = self._images[rows]
        i, j, crowds = possible_links(units, left, right, self._limit)
        for crowd in crowds:
            self._settle(rows[crowd])

        squared = _distances(units, i, j)
        near = squared <= self._limit
        i, j = rows[i[near]], rows[j[near]]

        self._links.append(Links(np.minimum(i, j), np.maximum(i, j), squared[near]))
        self._num_links += len(i)
        if self._num_links > _PENDING_LINKS:
            self._reduce()

    def _settle(self, rows: Int[np.ndarray, " crowd"]) -> None:
        """All pairs of these rows were compared: candidates among them that come later are skipped."""
        if len(rows) < _LARGE_CROWD:
            return
        if self._crowd_of is None:
            self._crowd_of = np.zeros(len(self._images), dtype=np.int32)
        self._crowds += 1
        self._crowd_of[rows] = self._crowds

    def _reduce(self) -> None:
        self._links = [spanning_links(join_links(self._links))]
        self._num_links = 0  # a forest is never larger than its rows, so count only the links beyond it


def _distances(
    units: Float[np.ndarray, "rows dim"], i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    squared, dim = np.empty(len(i)), units.shape[1]
    at_once = max(1, _DIFFERENCES // dim)
    left, right = np.empty((2, at_once, dim))

    for start in range(0, len(i), at_once):
        part = slice(start, start + at_once)
        count = len(squared[part])
        # "clip" because numpy writes to `out` by way of a copy unless it need not check the places first
        np.take(units, i[part], axis=0, out=left[:count], mode="clip")
        np.take(units, j[part], axis=0, out=right[:count], mode="clip")
        squared[part] = squared_distances(left[:count], right[:count])

    return squared
