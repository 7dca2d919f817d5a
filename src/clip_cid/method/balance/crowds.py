"""Crowds of near-duplicates: find the few pairs that can be links of the forest.

Most pairs of a crowd need no exact distance.
"""

from collections.abc import Iterator
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from clip_cid.method.unit_rows import cosine_error

_FEW = 256  # fewer pairs are not worth being treated as a crowd
_SECONDS_A_CROWD, _SECONDS_AN_ENTRY, _SECONDS_A_PRODUCT, _SECONDS_A_NUMBER = 4e-4, 2e-8, 2.5e-11, 1.7e-9
_WHOLE, _RUN = 4096, 1 << 14
_FAR = 9.0  # beyond any squared distance of unit vectors


def possible_links(
    units: Float[np.ndarray, "rows dim"], i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"], limit: float
) -> tuple[Int[np.ndarray, " some"], Int[np.ndarray, " some"], list[Int[np.ndarray, " crowd"]]]:
    """Fewer pairs with the same minimum spanning forest as the given ones, if these are crowded together.

    Of a crowd the float32 distances of all its rows give a single-linkage tree. A pair is left out when its distance
    exceeds the longest step on the tree between its rows by more than both may be wrong: by the cycle law it is not in
    the exact forest either. The others, and the pairs of no crowd, come back.

    Returns:
        Both rows of each pair, and the rows of each crowd: of these all pairs were compared, whether given or not.
    """
    if len(i) < _FEW:
        return i, j, []
    labels = _components(len(units), i, j)
    names = _crowds(labels, i, units.shape[1])
    if not len(names):
        return i, j, []

    scattered = ~np.isin(labels[i], names)
    order = np.argsort(labels, kind="stable")
    starts, stops = (np.searchsorted(labels[order], names, side=side) for side in ("left", "right"))
    crowds = [order[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    pairs = [(i[scattered], j[scattered]), *(_crowd_links(units, crowd, limit) for crowd in crowds)]
    left, right = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return left, right, crowds


def groups_of_pairs(
    i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"], most_rows: int
) -> Iterator[Int[np.ndarray, " some"]]:
    """The pairs in groups of about `most_rows` rows; connected pairs are together, so that a row is read once.

    Only where more than some thousand rows are connected are their pairs divided, in the order of the first row.
    """
    rows, left, right = numbered(i, j)
    if len(rows) <= min(most_rows, _WHOLE):
        yield np.arange(len(i))
        return

    # In the order of components; within a large one by the first row.
    labels = _components(len(rows), left, right)
    sizes = np.bincount(labels)
    divided = (sizes > _WHOLE).any()
    order = np.lexsort((left, labels[left])) if divided else np.argsort(labels[left], kind="stable")

    # A new group begins where the rows of the components before fill one, or a large component is cut.
    label = labels[left[order]]
    portion = (np.cumsum(sizes) - 1) // most_rows
    run = np.where(sizes[label] > _WHOLE, 1 + (np.arange(len(order)) - np.searchsorted(label, label)) // _RUN, 0)
    begins = np.flatnonzero((np.diff(portion[label]) != 0) | (np.diff(run) != 0)) + 1
    yield from np.split(order, begins)


def numbered(
    i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """The different rows of the pairs, ascending, and each pair as places among them."""
    highest = int(max(i.max(), j.max())) + 1
    if highest > 8 * len(i):
        rows, places = np.unique(np.concatenate([i, j]), return_inverse=True)
        return rows, places[: len(i)], places[len(i) :]
    there = np.zeros(highest, dtype=bool)  # a table of all numbers is quicker than a sorting, while it is small
    there[i] = there[j] = True
    place = np.cumsum(there) - 1
    return np.flatnonzero(there), place[i], place[j]


def _components(rows: int, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, " rows"]:
    graph = coo_matrix((np.ones(len(i), dtype=bool), (i, j)), shape=(rows, rows))
    _, labels = connected_components(graph, directed=False)
    return labels


def _crowds(labels: Int[np.ndarray, " rows"], i: Int[np.ndarray, " pairs"], dim: int) -> Int[np.ndarray, " crowds"]:
    """The components of so many pairs that comparing all their rows together is cheaper."""
    rows = np.bincount(labels)
    pairs = np.bincount(labels[i], minlength=len(rows))
    together = _SECONDS_A_CROWD + rows.astype(np.float64) ** 2 * (_SECONDS_AN_ENTRY + dim * _SECONDS_A_PRODUCT)
    return np.flatnonzero((pairs >= _FEW) & (together < pairs * dim * _SECONDS_A_NUMBER))


def _crowd_links(
    units: Float[np.ndarray, "rows dim"], rows: Int[np.ndarray, " crowd"], limit: float
) -> tuple[Int[np.ndarray, " links"], Int[np.ndarray, " links"]]:
    # The float32 distances of all pairs, (0, 1), (0, 2), ..., (1, 2), ...
    error = 2 * cosine_error(units.shape[1]) + 2.0**-21  # of a squared distance; the last part is 2 - 2 cos itself
    short = units[rows].astype(np.float32)
    squared = short @ short.T
    squared *= -2
    squared += 2
    flat = squareform(squared, checks=False).astype(np.float64)
    flat[flat > limit + error] = _FAR
    np.maximum(flat, 0, out=flat)

    # Pairs no longer than the longest step of the single-linkage tree between their rows.
    longest = cast(np.ndarray, cophenet(linkage(flat, "single")))
    kept = np.flatnonzero((flat <= longest + 2 * error) & (flat < _FAR))

    firsts = np.cumsum(np.arange(len(rows) - 1, 0, -1)) - np.arange(len(rows) - 1, 0, -1)
    left = np.searchsorted(firsts, kept, side="right") - 1
    return rows[left], rows[kept - firsts[left] + left + 1]
