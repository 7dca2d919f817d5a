"""Choose the row that a set keeps by rules of preference in their order; the next rule decides between equals."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.method.balance.kept_rows import TIED, Keep, from_centroid
from clip_cid.method.distances import squared_distances
from clip_cid.method.unit_rows import UnitRows

Values = Callable[[Int[np.ndarray, " rows"]], Float[np.ndarray, " rows"]]
"""A value for each of some rows: the highest is preferred, and NaN is below all."""
Rule = Keep | Values

_MEMBERS = 1 << 12  # rows of sets read at once


def keep_preferred(
    images: UnitRows,
    texts: UnitRows | None,
    labels: Int[np.ndarray, " rows"],
    *,
    rules: Sequence[Rule],
    squared_radius: float | None = None,
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " rows"]]:
    """Rows kept, ascending, and for each row its place among them; `balance_prefer` in docs/method.md.

    What the rules leave open the paper's rule decides: the nearest to the centroid of its set, then the best caption,
    then the lowest row. With `squared_radius` the rows of a set that are farther from the kept one form a new set,
    which chooses by the same rules, and so on until no row is left.
    """
    paper: list[Rule] = ["nearest_centroid"] if texts is None else ["nearest_centroid", "best_caption"]
    order: list[Rule] = [*rules, *(rule for rule in paper if rule not in rules)]
    kept_for = np.arange(len(labels))

    members, sizes = _listed(kept_for, labels)
    while len(sizes):
        chosen = np.repeat(_choose(images, texts, members, sizes, order), sizes)
        kept_for[members] = chosen
        if squared_radius is None:
            break

        far = _squared_between(images, members, chosen) > squared_radius
        kept_for[members[far]] = members[far]
        members, sizes = _listed(members[far], np.repeat(np.arange(len(sizes)), sizes)[far])

    kept, set_of = np.unique(kept_for, return_inverse=True)
    return kept, set_of.astype(np.int64)


def _listed(
    rows: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, " members"], Int[np.ndarray, " sets"]]:
    """The rows of sets of two or more, set by set and ascending in each, and the sizes of these sets."""
    sizes = np.bincount(labels)
    several = sizes[labels] > 1
    members = rows[several]
    return members[np.argsort(labels[several], kind="stable")], sizes[sizes > 1]


def _choose(
    images: UnitRows,
    texts: UnitRows | None,
    members: Int[np.ndarray, " members"],
    sizes: Int[np.ndarray, " sets"],
    rules: Sequence[Rule],
) -> Int[np.ndarray, " sets"]:
    """The row that each set keeps; a rule looks only at sets that those before it have left open."""
    tied = np.ones(len(members), dtype=bool)
    starts = np.cumsum(sizes) - sizes
    for rule in rules:
        for part in _portions(sizes, np.add.reduceat(tied, starts) > 1):
            inside = np.repeat(starts[part], sizes[part]) + _counted(sizes[part])
            tied[inside] = _best(images, texts, members[inside], sizes[part], tied[inside], rule)

    first = np.minimum.reduceat(np.where(tied, np.arange(len(members)), len(members)), starts)
    return members[first]


def _portions(sizes: Int[np.ndarray, " sets"], wanted: Bool[np.ndarray, " sets"]) -> Iterator[Int[np.ndarray, " part"]]:
    """The wanted sets in portions of about so many rows as are read at once."""
    open_sets = np.flatnonzero(wanted)
    if len(open_sets):
        numbers = np.cumsum(sizes[open_sets]) // _MEMBERS
        yield from np.split(open_sets, np.flatnonzero(np.diff(numbers)) + 1)


def _counted(sizes: Int[np.ndarray, " sets"]) -> Int[np.ndarray, " members"]:
    """0, 1, ... up to each size."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _best(
    images: UnitRows,
    texts: UnitRows | None,
    members: Int[np.ndarray, " members"],
    sizes: Int[np.ndarray, " sets"],
    tied: Bool[np.ndarray, " members"],
    rule: Rule,
) -> Bool[np.ndarray, " members"]:
    """Of the tied rows of each set those that the rule prefers."""
    owner, starts = np.repeat(np.arange(len(sizes)), sizes), np.cumsum(sizes) - sizes
    values, equal = np.full(len(members), -np.inf), 0.0
    if rule == "nearest_centroid":
        values[tied] = -np.sqrt(from_centroid(images, members, owner, sizes))[tied]
        equal = TIED
    elif rule == "best_caption":
        assert texts is not None, "the rule was checked against the captions"
        values[tied] = _cosines(images, texts, members[tied])
        equal = TIED
    else:
        values[tied] = np.nan_to_num(rule(members[tied]), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return tied & (values >= np.maximum.reduceat(values, starts)[owner] - equal)


def _cosines(images: UnitRows, texts: UnitRows, rows: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    parts = (rows[start : start + images.cached_rows] for start in range(0, len(rows), images.cached_rows))
    return np.concatenate([(images[part] * texts[part]).sum(axis=1) for part in parts])


def _squared_between(
    images: UnitRows, left: Int[np.ndarray, " rows"], right: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    squared = np.empty(len(left))
    for start in range(0, len(left), images.cached_rows):
        part = slice(start, start + images.cached_rows)
        squared[part] = squared_distances(images[left[part]], images[right[part]])
    return squared
