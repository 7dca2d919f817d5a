"""Crowds of near-duplicates: the few pairs that can be links of the forest, without an exact distance for each pair."""

from collections.abc import Iterator
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from clip_cid.method.unit_rows import cosine_error

_FEW = 256  # fewer pairs are not worth a look at all of them together
_SECONDS_A_CROWD, _SECONDS_AN_ENTRY, _SECONDS_A_PRODUCT, _SECONDS_A_NUMBER = 4e-4, 2e-8, 2.5e-11, 1.7e-9
_FAR = 9.0  # beyond any squared distance of unit vectors

Pairs = tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]


def possible_links(
    units: Float[np.ndarray, "rows dim"], i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"], limit: float
) -> Pairs:
    """Pairs whose minimum spanning forest is that of the given ones: fewer, where these are crowded together.

    Of a crowd the float32 distances of all its rows give a single-linkage tree. A pair is left out when its distance
    exceeds the longest step on the tree between its rows by more than both may be wrong: by the cycle law it is not in
    the exact forest either. The others, and the pairs of no crowd, come back.
    """
    if len(i) < _FEW:
        return i, j
    labels = _components(len(units), i, j)
    crowds = _crowds(labels, i, units.shape[1])
    if not len(crowds):
        return i, j
    scattered = ~np.isin(labels[i], crowds)
    found = [(i[scattered], j[scattered])]
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], crowds)
    stops = np.searchsorted(labels[order], crowds, side="right")
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        found += _crowd_links(units, order[start:stop], limit)
    left, right = (np.concatenate(column) for column in zip(*found, strict=True))
    return left, right


def _components(rows: int, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, " rows"]:
    graph = coo_matrix((np.ones(len(i), dtype=bool), (i, j)), shape=(rows, rows))
    _, labels = connected_components(graph, directed=False)
    return labels


def _crowds(labels: Int[np.ndarray, " rows"], i: Int[np.ndarray, " pairs"], dim: int) -> Int[np.ndarray, " crowds"]:
    """The components of so many pairs that a look at all their rows together is cheaper."""
    rows = np.bincount(labels)
    pairs = np.bincount(labels[i], minlength=len(rows))
    together = _SECONDS_A_CROWD + rows.astype(np.float64) ** 2 * (_SECONDS_AN_ENTRY + dim * _SECONDS_A_PRODUCT)
    return np.flatnonzero((pairs >= _FEW) & (together < pairs * dim * _SECONDS_A_NUMBER))


def _crowd_links(
    units: Float[np.ndarray, "rows dim"], rows: Int[np.ndarray, " crowd"], limit: float
) -> Iterator[Pairs]:
    error = 2 * cosine_error(units.shape[1]) + 2.0**-21  # of a squared distance; the last part is 2 - 2 cos itself
    short = units[rows].astype(np.float32)
    squared = short @ short.T
    squared *= -2
    squared += 2
    flat = squareform(squared, checks=False).astype(np.float64)  # the pairs (0, 1), (0, 2), ..., (1, 2), ...
    flat[flat > limit + error] = _FAR
    np.maximum(flat, 0, out=flat)
    longest = cast(np.ndarray, cophenet(linkage(flat, "single")))
    kept = np.flatnonzero((flat <= longest + 2 * error) & (flat < _FAR))
    firsts = np.cumsum(np.arange(len(rows) - 1, 0, -1)) - np.arange(len(rows) - 1, 0, -1)
    left = np.searchsorted(firsts, kept, side="right") - 1
    yield rows[left], rows[kept - firsts[left] + left + 1]
