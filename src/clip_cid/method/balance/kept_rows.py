"""Choose the row that a set keeps: the nearest to the centroid, or the one whose caption fits best."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from clip_cid.method.array_store import ArrayStore, MemoryStore
from clip_cid.method.distances import squared_distances
from clip_cid.method.jobs import Context, RunJob, counted_from, cut, in_parts
from clip_cid.method.unit_rows import UnitRows

Keep = Literal["nearest_centroid", "best_caption"]

ChooseOfSets = Callable[[Int[np.ndarray, " members"], Int[np.ndarray, " sets"]], Int[np.ndarray, " sets"]]
"""The row that each set keeps, of sets of two or more whose members are listed one set after the other."""
DistancesTo = Callable[[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]], Float[np.ndarray, " rows"]]
"""The squared distance from each row on the left to that on the right."""

TIED = 1e-9  # far above the rounding of float64, far below any difference between two images
_MEMBERS = 1 << 12  # rows of sets in memory as numbers
_NUMBER_SECONDS = 1e-8  # of a core, for estimates only


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
    store: ArrayStore | None = None,
    run_job: RunJob | None = None,
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " rows"]]:
    """Rows kept, ascending, and for each row its place among them; `balance_keep` in docs/method.md.

    With `squared_radius` the rows of a set that are farther from the kept one form a new set, which keeps
    one row again, and so on until no row is left.
    """
    context = Context(images, texts, MemoryStore() if store is None else store, run_job)
    return kept_in_rounds(
        labels,
        functools.partial(_choose, context, keep=keep),
        functools.partial(_distances, context),
        squared_radius=squared_radius,
    )


def kept_in_rounds(
    labels: Int[np.ndarray, " rows"], choose: ChooseOfSets, distances: DistancesTo, *, squared_radius: float | None
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " rows"]]:
    """Rows kept, ascending, and for each row its place among them.

    Args:
        labels: The set of each row.
        choose: Which row a set keeps.
        distances: From each row on the left to that on the right.
        squared_radius: The rows of a set that are farther from the kept one form a new set, which chooses again, and
            so on until no row is left.
    """
    kept_for = np.arange(len(labels))

    # The rows of the sets that have several, one set after the other.
    members, sizes = _listed(np.arange(len(labels)), labels)
    while len(sizes):
        chosen = np.repeat(choose(members, sizes), sizes)
        kept_for[members] = chosen
        if squared_radius is None:
            break

        far = distances(members, chosen) > squared_radius
        kept_for[members[far]] = members[far]
        members, sizes = _listed(members[far], np.repeat(np.arange(len(sizes)), sizes)[far])

    # A row that is kept is kept for itself.
    is_kept = kept_for == np.arange(len(labels))
    place = np.cumsum(is_kept) - 1
    return np.flatnonzero(is_kept), place[kept_for]


def _listed(
    rows: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, " members"], Int[np.ndarray, " sets"]]:
    """The rows of sets of two or more, set by set, and the sizes of these sets; a row that is alone is kept."""
    sizes = np.bincount(labels)
    several = sizes[labels] > 1
    members = rows[several]
    return members[np.argsort(labels[several], kind="stable")], sizes[sizes > 1]


def distances_to(
    images: UnitRows, left: Int[np.ndarray, " rows"], right: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """The squared distance from each row on the left to that on the right."""
    squared = np.empty(len(left))
    for start in range(0, len(left), images.cached_rows):
        part = slice(start, start + images.cached_rows)
        squared[part] = squared_distances(images[left[part]], images[right[part]])
    return squared


def _distances(
    context: Context, left: Int[np.ndarray, " rows"], right: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    most = context.images.gathered_rows
    parts = np.diff([*range(0, len(left), most), len(left)]).tolist()
    squared = in_parts(
        context, "radius", functools.partial(_distances_of_part, most), {"left": left, "right": right}, parts
    )
    return np.concatenate(list(squared))


def _distances_of_part(
    most: int, arrays: Mapping[str, np.ndarray], images: UnitRows, texts: UnitRows | None, part: int
) -> Float[np.ndarray, " rows"]:
    left, right = (arrays[name][part * most : (part + 1) * most] for name in ("left", "right"))
    both = images.gathered(np.concatenate([left, right]))
    return distances_to(both, np.arange(len(left)), len(left) + np.arange(len(left)))


def _choose(
    context: Context, members: Int[np.ndarray, " members"], sizes: Int[np.ndarray, " sets"], keep: Keep
) -> Int[np.ndarray, " sets"]:
    """The row that each set keeps, of sets of two or more."""
    starts = np.cumsum(sizes) - sizes
    chosen = members[starts]

    # Two rows are equally near their centroid: without captions the lower one is kept, and no row is read.
    undecided = np.flatnonzero(sizes > (2 if context.texts is None else 1))
    starts, sizes = starts[undecided], sizes[undecided]

    # Portions that are in memory as numbers, and parts of portions that are read in one go.
    edges = cut(sizes, _MEMBERS)
    first_member = np.concatenate([[0], np.cumsum(sizes)])[edges]
    parts = cut(np.diff(first_member), context.images.gathered_rows)
    chosen[undecided] = _joined(
        in_parts(
            context,
            "choose",
            functools.partial(_choose_in_parts, keep),
            {"members": members, "starts": starts, "sizes": sizes, "edges": edges, "parts": parts},
            np.diff(first_member[parts]).tolist(),
            decided_by=keep,
            row_seconds=_NUMBER_SECONDS * context.images.dim,
        )
    )
    return chosen


def _joined(parts: Iterable[Int[np.ndarray, " sets"]]) -> Int[np.ndarray, " sets"]:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _choose_in_parts(
    keep: Keep, arrays: Mapping[str, np.ndarray], images: UnitRows, texts: UnitRows | None, part: int
) -> Int[np.ndarray, " sets"]:
    first, last = arrays["parts"][part : part + 2].tolist()
    edges = arrays["edges"][first : last + 1].tolist()
    starts, sizes = (arrays[name][edges[0] : edges[-1]] for name in ("starts", "sizes"))
    members = arrays["members"][counted_from(starts, sizes)]
    images, texts = images.gathered(members), None if texts is None else texts.gathered(members)

    # From here on a member's number is its place.
    chosen, first = np.empty(len(sizes), dtype=np.int64), 0
    for start, stop in itertools.pairwise(edges):
        own = slice(start - edges[0], stop - edges[0])
        count = int(sizes[own].sum())
        chosen[own] = _choose_in_part(images, texts, np.arange(first, first + count), sizes[own], keep)
        first += count
    return members[chosen]


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
        cosines[tied] = cosines_to_texts(images, texts, members[tied])
        tied &= cosines >= np.maximum.reduceat(cosines, starts)[owner] - TIED
    first_tied = np.minimum.reduceat(np.where(tied, np.arange(len(members)), len(members)), starts)
    return members[first_tied]


def cosines_to_texts(images: UnitRows, texts: UnitRows, rows: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """The cosine of each of some rows and its caption; there is at least one."""
    parts = (rows[start : start + images.cached_rows] for start in range(0, len(rows), images.cached_rows))
    return np.concatenate([(images[part] * texts[part]).sum(axis=1) for part in parts])


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
