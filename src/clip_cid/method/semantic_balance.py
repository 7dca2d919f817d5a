"""Image semantic balance (paper section 3.1): join near-duplicates into sets, keep one image of each."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from clip_cid.method.union_find import UnionFind
from clip_cid.method.unit_rows import BLOCK_ROWS, Rows, UnitRows, cosine_error

Metric = Literal["cosine", "squared_euclidean", "euclidean"]

_LARGEST: dict[Metric, float] = {"cosine": 2.0, "squared_euclidean": 4.0, "euclidean": 2.0}
_TIED = 1e-9  # far above the rounding of float64, far below any difference between two images
_CELLS = 1 << 22  # numbers in a temporary array: 16 to 32 MB
_PAIRS = 1 << 14  # pairs verified at once; few, because a union makes most of a clique's other pairs needless


@dataclass(frozen=True)
class Balance:
    """One row of every set."""

    kept: Int[np.ndarray, " kept"]
    """Rows kept, ascending, int64."""
    set_of: Int[np.ndarray, " rows"]
    """The set of each row, int64: `kept[set_of[i]]` is the row kept for row i."""
    threshold: float
    """Distance at or below which two rows were joined."""
    metric: Metric
    """The scale of `threshold`."""

    @property
    def removed_share(self) -> float:
        return 1 - len(self.kept) / len(self.set_of)


@dataclass(frozen=True)
class PairAgreement:
    """How well sets agree with true groups, counted over pairs of rows."""

    precision: float
    """Share of the pairs in one set that are in one true group; 1 when no set has two rows."""
    recall: float
    """Share of the pairs in one true group that are in one set; 1 when no group has two rows."""
    rows: int
    set_pairs: int
    true_pairs: int
    shared_pairs: int


def balance(
    embeddings: Rows,
    *,
    threshold: float = 0.07,
    metric: Metric = "cosine",
    text_embeddings: Rows | None = None,
    normalize: bool = False,
    block_rows: int = BLOCK_ROWS,
    on_progress: Callable[[int], Any] | None = None,
) -> Balance:
    """Join rows within `threshold` of each other into sets and keep one row of each; `balance_edge`, `balance_sets` and `balance_keep` in docs/method.md.

    Two rows are joined when the float64 distance of their unit vectors is at most `threshold`; sets are the connected
    components (so two rows of one set may be further apart). A set keeps the row nearest its centroid; of rows equally
    near within 1e-9 the one with the better image-text cosine, then the lowest. The result does not depend on
    `block_rows`.

    Args:
        embeddings: (rows, dim), an array or anything with a shape and rows by slice and by row numbers.
        threshold: On the scale of `metric`.
        metric: cosine is 1 - cos; the others are of the unit vectors.
        text_embeddings: The caption of each row in the same space, for ties.
        normalize: Accept rows that are not unit vectors; a zero or non-finite row is refused all the same.
        block_rows: Rows of a block of the distance matrix: speed and memory, not the result.
        on_progress: Called with the rows' worth of work done since the last call; in all, the number of rows.

    Raises:
        ValueError: An argument is out of its limits, or a row is not a unit vector.
    """
    squared = threshold_on(metric, threshold, "squared_euclidean")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    images = UnitRows(embeddings, name="embeddings", any_length=normalize)
    texts = None
    if text_embeddings is not None:
        texts = UnitRows(text_embeddings, name="text_embeddings", any_length=normalize)
        if (len(texts), texts.dim) != (len(images), images.dim):
            raise ValueError(
                f"text_embeddings must match embeddings of shape ({len(images)}, {images.dim}),"
                f" got ({len(texts)}, {texts.dim})"
            )
    sets = UnionFind(len(images))
    _join(images, sets, squared, block_rows, on_progress)
    set_of = sets.labels()
    kept_of_set = _nearest_to_centroid(images, texts, set_of)
    kept = np.sort(kept_of_set)
    return Balance(kept, np.searchsorted(kept, kept_of_set)[set_of], float(threshold), metric)


def threshold_on(metric_from: Metric, threshold: float, metric_to: Metric) -> float:
    r"""The same threshold on another scale; `threshold_scales` in docs/method.md.

    .. math:: 1 - \cos = \tfrac12 d^2 \text{ for unit vectors at Euclidean distance } d

    Raises:
        ValueError: `threshold` is not above 0 and below the largest distance there is.
    """
    for metric in (metric_from, metric_to):
        if metric not in _LARGEST:
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
    largest = _LARGEST[metric_from]
    if not 0 < threshold < largest:
        raise ValueError(f"threshold must be above 0 and below {largest:g} for metric {metric_from}, got {threshold}")
    if metric_from == metric_to:
        return float(threshold)
    squared = {"cosine": 2 * threshold, "squared_euclidean": threshold, "euclidean": threshold**2}[metric_from]
    return float({"cosine": squared / 2, "squared_euclidean": squared, "euclidean": math.sqrt(squared)}[metric_to])


def agreement(set_of: Int[np.ndarray, " rows"], truth: np.ndarray) -> PairAgreement:
    """Pair precision and recall of sets against true groups; `pair_agreement` in docs/method.md.

    Counted from the table of sets against groups, so no pair is ever listed.

    Args:
        set_of: The set of each row; rows with -1 are left out.
        truth: The true group of each row, of any type that can be sorted.
    """
    if truth.shape != set_of.shape:
        raise ValueError(f"truth must have the shape {set_of.shape} of set_of, got {truth.shape}")
    used = set_of != -1
    _, sets = np.unique(set_of[used], return_inverse=True)
    names, groups = np.unique(truth[used], return_inverse=True)
    cells = sets.astype(np.int64) * max(len(names), 1) + groups
    shared, found, true = (_pairs(np.unique(each, return_counts=True)[1]) for each in (cells, sets, groups))
    return PairAgreement(
        precision=shared / found if found else 1.0,
        recall=shared / true if true else 1.0,
        rows=int(used.sum()),
        set_pairs=found,
        true_pairs=true,
        shared_pairs=shared,
    )


def _pairs(sizes: Int[np.ndarray, " sets"]) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def _join(
    images: UnitRows, sets: UnionFind, squared: float, block_rows: int, on_progress: Callable[[int], Any] | None
) -> None:
    """Union all pairs at squared distance `squared` or less, a block of the upper triangle at a time."""
    least = 1 - squared / 2 - cosine_error(images.dim)
    portion = max(1, min(_PAIRS, _CELLS // images.dim))
    rows, pairs_done, told = len(images), 0, 0
    for top in images.blocks(block_rows):
        left = images[top]
        left32 = left.astype(np.float32)
        for start in range(top.start, rows, block_rows):
            right_rows = slice(start, min(start + block_rows, rows))
            same = right_rows == top
            right = left if same else images[right_rows]
            cosines = left32 @ (left32 if same else right.astype(np.float32)).T
            if same:
                np.fill_diagonal(cosines, -2.0)
            for i, j in _candidates(cosines, least, sets, (top.start, start), portion):
                close = _squared_distances(left[i], right[j]) <= squared
                sets.union(top.start + i[close], start + j[close])
            pairs_done += len(left) * len(right) * (1 if same else 2)
            now = rows * pairs_done // rows**2
            if on_progress is not None and now > told:
                on_progress(now - told)
                told = now


def _candidates(
    cosines: Float[np.ndarray, "left right"], least: float, sets: UnionFind, starts: tuple[int, int], portion: int
) -> Iterator[tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]]:
    """Pairs of a block (by their places in it) that may be edges and whose sets are still apart, in portions.

    Sets are looked at anew for each portion: once the first row of a clique has joined it, the rest of its pairs are
    neither verified nor kept.
    """
    left, right = (start + np.arange(count) for start, count in zip(starts, cosines.shape, strict=True))
    hits = np.flatnonzero(cosines.max(axis=1) >= least)
    for some in np.array_split(hits, max(1, math.ceil(len(hits) * len(right) / _CELLS))):
        at, j = np.nonzero(cosines[some] >= least)
        i = some[at]
        apart = np.flatnonzero((sets.find(left)[i] != sets.find(right)[j]) & (left[i] < right[j]))
        for first in range(0, len(apart), portion):
            now = apart[first : first + portion]
            still = now[sets.find(left[i[now]]) != sets.find(right[j[now]])]
            if len(still):
                yield i[still], j[still]


def _squared_distances(left: Float[np.ndarray, "n dim"], right: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, " n"]:
    """From the differences, not from 1 - cos: equal rows are at exactly 0, and rounding is relative to the distance."""
    difference = left - right
    return (difference * difference).sum(axis=1)


def _nearest_to_centroid(
    images: UnitRows, texts: UnitRows | None, set_of: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " sets"]:
    """The row that each set keeps."""
    by_set = np.argsort(set_of, kind="stable")
    sizes = np.bincount(set_of)
    starts = np.cumsum(sizes) - sizes
    kept = by_set[starts]
    several = np.flatnonzero(sizes > 1)
    for at in range(0, len(several), BLOCK_ROWS):
        some = several[at : at + BLOCK_ROWS]
        span = slice(some[0], some[-1] + 1)
        members = by_set[starts[some[0]] :][: sizes[span].sum()][np.repeat(sizes[span] > 1, sizes[span])]
        kept[some] = _keep_in_each(images, texts, members, sizes[some])
    return kept


def _keep_in_each(
    images: UnitRows, texts: UnitRows | None, members: Int[np.ndarray, " members"], sizes: Int[np.ndarray, " sets"]
) -> Int[np.ndarray, " sets"]:
    """As `_nearest_to_centroid`, of sets whose members are listed one set after the other."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum(sizes) - sizes
    portions = [slice(at, at + BLOCK_ROWS) for at in range(0, len(members), BLOCK_ROWS)]
    centroids = np.zeros((len(sizes), images.dim))
    for some in portions:
        firsts = np.flatnonzero(np.diff(owner[some], prepend=-1))
        centroids[owner[some][firsts]] += np.add.reduceat(images[members[some]], firsts, axis=0)
    centroids /= sizes[:, None]
    distances = np.empty(len(members))
    for some in portions:
        distances[some] = np.sqrt(_squared_distances(images[members[some]], centroids[owner[some]]))
    tied = distances <= np.minimum.reduceat(distances, starts)[owner] + _TIED
    if texts is not None:
        cosines = np.full(len(members), -np.inf)
        candidates = np.flatnonzero(tied)
        for some in np.array_split(candidates, math.ceil(len(candidates) / BLOCK_ROWS)):
            cosines[some] = (images[members[some]] * texts[members[some]]).sum(axis=1)
        tied &= cosines >= np.maximum.reduceat(cosines, starts)[owner] - _TIED
    first_tied = np.minimum.reduceat(np.where(tied, np.arange(len(members)), len(members)), starts)
    return members[first_tied]
