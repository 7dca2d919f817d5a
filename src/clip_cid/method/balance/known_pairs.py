"""When rows are added or removed: the links that still hold, and the rows to compare again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt64

from clip_cid.method.balance.forest import Forest, Links, no_links
from clip_cid.method.balance.row_hashes import all_row_hashes
from clip_cid.method.unit_rows import UnitRows


@dataclass(frozen=True, eq=False)
class KnownPairs:
    """What need not be compared."""

    links: Links
    """Links of the minimum spanning forest of the known pairs."""
    rows: Bool[np.ndarray, " rows"]
    """Pairs of two of these rows are known."""
    hashes: UInt64[np.ndarray, "rows 2"] | None
    """A digest of each row, if it has been computed."""


@dataclass(frozen=True, eq=False)
class EarlierForest:
    """A forest of earlier rows; their digests recognize them."""

    forest: Forest
    hashes: UInt64[np.ndarray, "rows 2"]


def nothing_known(rows: int) -> KnownPairs:
    return KnownPairs(no_links(), np.zeros(rows, dtype=bool), None)


def known_pairs(images: UnitRows, earlier: Sequence[EarlierForest], limit: float) -> KnownPairs:
    """The known pairs up to a squared distance, from the earlier forest that knows most of the rows."""
    most = nothing_known(len(images))
    if not earlier:
        return most

    hashes = all_row_hashes(images)
    for each in earlier:
        links, rows = carry_over(each.forest, match_rows(each.hashes, hashes), len(images), limit)
        if rows.sum() > most.rows.sum():
            most = KnownPairs(links, rows, hashes)
    return most


def match_rows(
    old: UInt64[np.ndarray, "old_rows 2"], new: UInt64[np.ndarray, "rows 2"]
) -> Int[np.ndarray, " old_rows"]:
    """For each old row the new row of the same contents, by digest; -1 where it is gone or has changed.

    Of several rows with equal contents the first is matched with the first, and so on.
    """
    # Rows of equal contents get one number.
    both = np.concatenate([old, new])
    order = np.lexsort((both[:, 1], both[:, 0]))
    begins = np.ones(len(both), dtype=bool)
    begins[1:] = (both[order][1:] != both[order][:-1]).any(axis=1)
    group = np.empty(len(both), dtype=np.int64)
    group[order] = np.cumsum(begins) - 1

    old_keys, new_keys = (_nth_of(part, len(both)) for part in (group[: len(old)], group[len(old) :]))
    _, at_old, at_new = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
    row_of = np.full(len(old), -1, dtype=np.int64)
    row_of[at_old] = at_new
    return row_of


def carry_over(
    old: Forest, row_of: Int[np.ndarray, " old_rows"], rows: int, limit: float
) -> tuple[Links, Bool[np.ndarray, " rows"]]:
    """The links of an earlier forest that hold for the present rows.

    A removed row can only change its own set, so all rows of that set are compared again. The links of every
    other set hold. The forest of these links and of all pairs with an unknown row is the forest of all pairs.

    Args:
        old: The earlier forest.
        row_of: For each of its rows the row now, or -1.
        rows: How many there are now.
        limit: The squared distance up to which pairs are wanted.

    Returns:
        The links up to `limit`, and which rows are known: two of them need not be compared. None is known when the
        earlier forest does not reach the limit, or its rows are now in another order (which decides ties).
    """
    known = np.zeros(rows, dtype=bool)
    if old.limit < limit:
        return no_links(), known

    sets = old.sets(old.limit)
    whole = ~np.isin(sets, sets[row_of < 0])
    still_there = row_of[whole]
    if (np.diff(still_there) <= 0).any():
        return no_links(), known

    known[still_there] = True
    holds = whole[old.left] & (old.squared <= limit)
    return Links(row_of[old.left[holds]], row_of[old.right[holds]], old.squared[holds]), known


def _nth_of(group: Int[np.ndarray, " rows"], base: int) -> Int[np.ndarray, " rows"]:
    """A number for each row that says its group and how many of that group came before it."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    nth = np.empty(len(group), dtype=np.int64)
    nth[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return group * base + nth
