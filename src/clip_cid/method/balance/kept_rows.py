"""Choose the row that a set keeps: the nearest to the centroid, or the one whose caption fits best."""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from clip_cid.method.distances import squared_distances
from clip_cid.method.unit_rows import UnitRows

Keep = Literal["nearest_centroid", "best_caption"]

TIED = 1e-9  # far above the rounding of float64, far below any difference between two images
_MEMBERS = 1 << 12  # rows of sets read at once


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

    With `squared_radius` the rows of a set that are farther from the kept one form a new set, which keeps
    one row again, and so on until no row is left.
    """
    kept_for = np.arange(len(labels))
    rows = np.arange(len(labels))

    while len(rows):
        # A row that is alone is kept.
        sizes = np.bincount(labels)
        several = sizes[labels] > 1
        rows, (names, labels) = rows[several], np.unique(labels[several], return_inverse=True)
        if not len(names):
            break

        kept_for[rows] = _choose(images, texts, rows, labels, keep)[labels]
        if squared_radius is None:
            break

        far = distances_to(images, rows, kept_for[rows]) > squared_radius
        rows, labels = rows[far], labels[far]
        kept_for[rows] = rows

    kept, set_of = np.unique(kept_for, return_inverse=True)
    return kept, set_of.astype(np.int64)


def distances_to(
    images: UnitRows, left: Int[np.ndarray, " rows"], right: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """The squared distance from each row on the left to that on the right."""
    squared = np.empty(len(left))
    for start in range(0, len(left), images.cached_rows):
        part = slice(start, start + images.cached_rows)
        squared[part] = squared_distances(images[left[part]], images[right[part]])
    return squared


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

    # Two rows are equally near their centroid: without captions the lower one is kept, and no row is read.
    undecided = np.flatnonzero(sizes > (2 if texts is None else 1))
    portions = np.cumsum(sizes[undecided]) // _MEMBERS
    for part in np.split(undecided, np.flatnonzero(np.diff(portions)) + 1) if len(undecided) else []:
        inside = np.repeat(starts[part], sizes[part]) + _counted(sizes[part])
        chosen[part] = _choose_in_part(images, texts, members[inside], sizes[part], keep)

    return chosen


def _counted(sizes: Int[np.ndarray, " sets"]) -> Int[np.ndarray, " members"]:
    """0, 1, ... up to each size."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _choose_in_part(
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
        distances = np.sqrt(from_centroid(images, members, owner, sizes))
        tied = distances <= np.minimum.reduceat(distances, starts)[owner] + TIED

    # Of tied rows the one whose caption fits best; of those that fit equally well the lowest.
    if texts is not None:
        cosines = np.full(len(members), -np.inf)
        candidates = np.flatnonzero(tied)
        for start in range(0, len(candidates), images.cached_rows):
            part = candidates[start : start + images.cached_rows]
            cosines[part] = (images[members[part]] * texts[members[part]]).sum(axis=1)
        tied &= cosines >= np.maximum.reduceat(cosines, starts)[owner] - TIED
    first_tied = np.minimum.reduceat(np.where(tied, np.arange(len(members)), len(members)), starts)
    return members[first_tied]


def from_centroid(
    images: UnitRows,
    members: Int[np.ndarray, " members"],
    owner: Int[np.ndarray, " members"],
    sizes: Int[np.ndarray, " sets"],
) -> Float[np.ndarray, " members"]:
    """Squared distance of each member from the mean of its set."""
    portions = [slice(at, at + images.cached_rows) for at in range(0, len(members), images.cached_rows)]

    centroids = np.zeros((len(sizes), images.dim))
    for part in portions:
        firsts = np.flatnonzero(np.diff(owner[part], prepend=-1))
        centroids[owner[part][firsts]] += np.add.reduceat(images[members[part]], firsts, axis=0)
    centroids /= sizes[:, None]

    squared = np.empty(len(members))
    for part in portions:
        squared[part] = squared_distances(images[members[part]], centroids[owner[part]])
    return squared
