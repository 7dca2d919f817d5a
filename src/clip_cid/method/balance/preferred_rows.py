"""Choose the row that a set keeps by rules of preference in their order; the next rule decides between equals."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.method.balance.kept_rows import (
    TIED,
    Keep,
    cosines_to_texts,
    distances_to,
    from_centroid,
    kept_in_rounds,
)
from clip_cid.method.jobs import counted_from, cut
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
    return kept_in_rounds(
        labels,
        functools.partial(_choose, images, texts, rules=order),
        functools.partial(distances_to, images),
        squared_radius=squared_radius,
    )


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
            inside = counted_from(starts[part], sizes[part])
            tied[inside] = _best(images, texts, members[inside], sizes[part], tied[inside], rule)

    first = np.minimum.reduceat(np.where(tied, np.arange(len(members)), len(members)), starts)
    return members[first]


def _portions(sizes: Int[np.ndarray, " sets"], wanted: Bool[np.ndarray, " sets"]) -> Iterator[Int[np.ndarray, " part"]]:
    """The wanted sets in portions of about so many rows as are read at once."""
    open_sets = np.flatnonzero(wanted)
    for start, stop in itertools.pairwise(cut(sizes[open_sets], _MEMBERS).tolist()):
        yield open_sets[start:stop]


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
        values[tied] = cosines_to_texts(images, texts, members[tied])
        equal = TIED
    else:
        values[tied] = np.nan_to_num(rule(members[tied]), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return tied & (values >= np.maximum.reduceat(values, starts)[owner] - equal)
