"""When rows come or go: what an earlier forest still knows, and which rows have to be compared anew."""

import numpy as np
from jaxtyping import Bool, Int, UInt64

from clip_cid.method.balance.forest import Forest, Links


def match_rows(
    old: UInt64[np.ndarray, "old_rows 2"], new: UInt64[np.ndarray, "rows 2"]
) -> Int[np.ndarray, " old_rows"]:
    """For each old row the new row of the same contents, by digest; -1 where it is gone or has changed.

    Of several rows with equal contents the first is matched with the first, and so on.
    """
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
    """What an earlier forest says about the rows as they are now.

    Taking a row away can only change its own set, so all rows of that set are compared anew; the links of every other
    set hold. The forest of these links and of all pairs with an unknown row is the forest of all pairs.

    Args:
        old: The earlier forest.
        row_of: For each of its rows the row now, or -1.
        rows: How many there are now.
        limit: The squared distance that is asked for.

    Returns:
        The links up to `limit`, and which rows are known: pairs of two of them need not be looked at. None is known
        when the earlier forest does not reach the limit, or its rows are now in another order (which decides ties).
    """
    known = np.zeros(rows, dtype=bool)
    none = Links(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
    if old.limit < limit:
        return none, known
    sets = old.sets(old.limit)
    whole = ~np.isin(sets, sets[row_of < 0])
    there = row_of[whole]
    if (np.diff(there) <= 0).any():
        return none, known
    known[there] = True
    holds = whole[old.left] & (old.squared <= limit)
    return Links(row_of[old.left[holds]], row_of[old.right[holds]], old.squared[holds]), known


def _nth_of(group: Int[np.ndarray, " rows"], base: int) -> Int[np.ndarray, " rows"]:
    """A number for each row that says its group and how many of that group came before it."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    nth = np.empty(len(group), dtype=np.int64)
    nth[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return group * base + nth
