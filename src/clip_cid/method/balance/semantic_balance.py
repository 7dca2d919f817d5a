"""Image semantic balance (paper section 3.1): join near-duplicates into sets, keep one image of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.near_pairs import near_forest
from clip_cid.method.balance.pair_plan import Layout, Plan, lay_out
from clip_cid.method.distances import LARGEST, Metric, squared_distances, threshold_for, threshold_on
from clip_cid.method.unit_rows import Rows, UnitRows

Keep = Literal["nearest_centroid", "best_caption"]

_TIED = 1e-9  # far above the rounding of float64, far below any difference between two images
_MEMBERS = 1 << 12  # rows of sets read at once


@dataclass(frozen=True, eq=False)
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
    forest: Forest
    """Answers every threshold up to its limit without the embeddings."""

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
    max_threshold: float | None = None,
    target_removed: float | None = None,
    keep: Keep = "nearest_centroid",
    max_radius: float | None = None,
    text_embeddings: Rows | None = None,
    normalize: bool = False,
    device: str = "cpu",
    plan: Plan | None = None,
    on_plan: Callable[[Layout], Any] | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> Balance:
    """Join rows within `threshold` of each other into sets and keep one row of each; `balance_edge`, `balance_sets` and `balance_keep` in docs/method.md.

    Two rows are joined when the float64 distance of their unit vectors is at most `threshold`; sets are the connected
    components (so two rows of one set may be further apart). A set keeps the row nearest its centroid; of rows equally
    near within 1e-9 the one with the better image-text cosine, then the lowest. Neither `plan` nor `device` has an
    influence on the result.

    Args:
        embeddings: (rows, dim), an array or anything with a shape and rows by slice and by row numbers.
        threshold: On the scale of `metric`.
        metric: cosine is 1 - cos; the others are of the unit vectors.
        max_threshold: The forest answers every threshold up to this one; `threshold` when None, twice that with
            `target_removed`.
        target_removed: Take the smallest threshold up to `max_threshold` that removes this share of the rows instead.
        keep: Which row of a set: the one nearest the centroid (the paper's rule), or the one whose caption fits best.
        max_radius: Keep more rows of a set, until every removed one is within this distance of the one kept for it.
        text_embeddings: The caption of each row in the same space: for ties, and for `best_caption`.
        normalize: Accept rows that are not unit vectors; a zero or non-finite row is refused all the same.
        device: Where the products of blocks are computed, for torch.
        plan: How to look for near pairs; chosen from a sample when None.
        on_plan: Called with what was chosen, before the work begins.
        on_progress: Called with the rows' worth of work done since the last call; in all, the number of rows.

    Raises:
        ValueError: An argument is out of its limits, or a row is not a unit vector.
    """
    squared = threshold_on(metric, threshold, "squared_euclidean")
    limit = search_limit(metric, threshold, max_threshold, target_removed)
    images = UnitRows(embeddings, name="embeddings", any_length=normalize)
    texts = None
    if text_embeddings is not None:
        texts = UnitRows(text_embeddings, name="text_embeddings", any_length=normalize)
    layout = None if plan is None else lay_out(images, plan)
    check_keep(images, texts, keep)
    forest = near_forest(images, limit, layout=layout, device=device, on_plan=on_plan, on_progress=on_progress)
    if target_removed is not None:
        squared = forest.squared_for(target_removed)
        threshold = threshold_for(squared, metric)
    radius = None if max_radius is None else threshold_on(metric, max_radius, "squared_euclidean")
    kept, set_of = keep_one_of_each(images, texts, forest.sets(squared), keep=keep, squared_radius=radius)
    return Balance(kept, set_of, float(threshold), metric, forest)


def search_limit(metric: Metric, threshold: float, max_threshold: float | None, target_removed: float | None) -> float:
    """The squared distance up to which pairs have to be known.

    Raises:
        ValueError: A threshold is out of its limits, or `max_threshold` is below `threshold`.
    """
    squared = threshold_on(metric, threshold, "squared_euclidean")
    if max_threshold is None and target_removed is None:
        return squared
    if max_threshold is None:
        max_threshold = min(2 * threshold, 0.99 * LARGEST[metric])
    limit = threshold_on(metric, max_threshold, "squared_euclidean")
    if target_removed is None and limit < squared:
        raise ValueError(f"max_threshold must be at least the threshold {threshold}, got {max_threshold}")
    return limit


def check_keep(images: UnitRows, texts: UnitRows | None, keep: Keep) -> None:
    """Whether the captions fit the images and the rule.

    Raises:
        ValueError: They do not.
    """
    if keep not in get_args(Keep):
        raise ValueError(f"keep must be one of {', '.join(get_args(Keep))}, got {keep!r}")
    if keep == "best_caption" and texts is None:
        raise ValueError("keep='best_caption' needs text_embeddings")
    if texts is not None and (len(texts), texts.dim) != (len(images), images.dim):
        raise ValueError(
            f"text_embeddings must match embeddings of shape ({len(images)}, {images.dim}),"
            f" got ({len(texts)}, {texts.dim})"
        )


def keep_one_of_each(
    images: UnitRows,
    texts: UnitRows | None,
    labels: Int[np.ndarray, " rows"],
    *,
    keep: Keep = "nearest_centroid",
    squared_radius: float | None = None,
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " rows"]]:
    """Rows kept, ascending, and for each row its place among them; `balance_keep` in docs/method.md.

    With `squared_radius` the rows of a set that are further from the kept one are a set of their own, of which again
    one is kept, and so on until none is left.
    """
    kept_for = np.arange(len(labels))
    rows = np.arange(len(labels))
    while len(rows):
        sizes = np.bincount(labels)
        several = sizes[labels] > 1
        rows, (names, labels) = rows[several], np.unique(labels[several], return_inverse=True)
        if not len(names):
            break
        kept_for[rows] = _choose(images, texts, rows, labels, keep)[labels]
        if squared_radius is None:
            break
        far = _distances(images, rows, kept_for[rows]) > squared_radius
        rows, labels = rows[far], labels[far]
        kept_for[rows] = rows
    kept, set_of = np.unique(kept_for, return_inverse=True)
    return kept, set_of.astype(np.int64)


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


def _distances(
    images: UnitRows, left: Int[np.ndarray, " rows"], right: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    out = np.empty(len(left))
    for start in range(0, len(left), images.cached_rows):
        part = slice(start, start + images.cached_rows)
        out[part] = squared_distances(images[left[part]], images[right[part]])
    return out


def _choose(
    images: UnitRows,
    texts: UnitRows | None,
    rows: Int[np.ndarray, " rows"],
    labels: Int[np.ndarray, " rows"],
    keep: Keep,
) -> Int[np.ndarray, " sets"]:
    """The row that each set keeps, of sets of two or more."""
    order = np.argsort(labels, kind="stable")
    members, sizes = rows[order], np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    chosen = members[starts]
    # Two rows are equally near their centroid: without captions the lower one is kept, and nothing need be read.
    undecided = np.flatnonzero(sizes > (2 if texts is None else 1))
    portions = np.cumsum(sizes[undecided]) // _MEMBERS
    for some in np.split(undecided, np.flatnonzero(np.diff(portions)) + 1) if len(undecided) else []:
        inside = np.repeat(starts[some], sizes[some]) + _counted(sizes[some])
        chosen[some] = _choose_some(images, texts, members[inside], sizes[some], keep)
    return chosen


def _counted(sizes: Int[np.ndarray, " sets"]) -> Int[np.ndarray, " members"]:
    """0, 1, ... up to each size."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _choose_some(
    images: UnitRows,
    texts: UnitRows | None,
    members: Int[np.ndarray, " members"],
    sizes: Int[np.ndarray, " sets"],
    keep: Keep,
) -> Int[np.ndarray, " sets"]:
    """As `_choose`, of sets whose members are listed one set after the other."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum(sizes) - sizes
    tied = np.ones(len(members), dtype=bool)
    if keep == "nearest_centroid":
        distances = np.sqrt(_from_centroid(images, members, owner, sizes))
        tied = distances <= np.minimum.reduceat(distances, starts)[owner] + _TIED
    if texts is not None:
        cosines = np.full(len(members), -np.inf)
        asked = np.flatnonzero(tied)
        for start in range(0, len(asked), images.cached_rows):
            some = asked[start : start + images.cached_rows]
            cosines[some] = (images[members[some]] * texts[members[some]]).sum(axis=1)
        tied &= cosines >= np.maximum.reduceat(cosines, starts)[owner] - _TIED
    first_tied = np.minimum.reduceat(np.where(tied, np.arange(len(members)), len(members)), starts)
    return members[first_tied]


def _from_centroid(
    images: UnitRows,
    members: Int[np.ndarray, " members"],
    owner: Int[np.ndarray, " members"],
    sizes: Int[np.ndarray, " sets"],
) -> Float[np.ndarray, " members"]:
    """Squared distance of each member from the mean of its set."""
    portions = [slice(at, at + images.cached_rows) for at in range(0, len(members), images.cached_rows)]
    centroids = np.zeros((len(sizes), images.dim))
    for some in portions:
        firsts = np.flatnonzero(np.diff(owner[some], prepend=-1))
        centroids[owner[some][firsts]] += np.add.reduceat(images[members[some]], firsts, axis=0)
    centroids /= sizes[:, None]
    squared = np.empty(len(members))
    for some in portions:
        squared[some] = squared_distances(images[members[some]], centroids[owner[some]])
    return squared
