"""Digests of the stored bytes of rows: they find equal rows, and rows that an earlier run has compared."""

import functools
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int, UInt64

from clip_cid.method.jobs import Context, in_parts
from clip_cid.method.mixed_words import SPLITMIX64, mix_words
from clip_cid.method.unit_rows import UnitRows

_AT_ONCE = 1 << 20


def row_hashes(rows: np.ndarray) -> UInt64[np.ndarray, "n 2"]:
    """A digest of each row's bytes: two sums of its mixed words times fixed odd numbers, modulo 2^64."""
    width = rows.shape[1] * rows.itemsize
    words = np.zeros((len(rows), math.ceil(width / 8) * 8), dtype=np.uint8)
    words[:, :width] = rows.view(np.uint8).reshape(len(rows), width)
    factors = np.random.default_rng(7).integers(0, 2**64, (words.shape[1] // 8, 2), dtype=np.uint64) | np.uint64(1)

    # Without the mixing a sum hardly depends on the high bits of a word, such as signs.
    return mix_words(words.view(np.uint64), SPLITMIX64) @ factors


def all_row_hashes(images: UnitRows) -> UInt64[np.ndarray, "rows 2"]:
    """The digests of all rows, read block by block."""
    return np.concatenate([row_hashes(images.raw(block)) for block in images.blocks(images.cached_rows)])


def identical_rows(
    context: Context, hashes: UInt64[np.ndarray, "rows 2"]
) -> tuple[Int[np.ndarray, " repeats"], Int[np.ndarray, " repeats"]]:
    """Rows equal to an earlier row bit for bit, and that row. A digest only nominates; the bytes decide."""
    repeats, firsts = identical_groups(hashes[:, 0])
    most = context.images.gathered_rows
    same = in_parts(
        context,
        "identical",
        functools.partial(_same_in_part, most),
        {"repeats": repeats, "firsts": firsts},
        np.diff([*range(0, len(repeats), most), len(repeats)]).tolist(),
    )
    chosen = np.concatenate([np.zeros(0, dtype=bool), *same])
    return repeats[chosen], firsts[chosen]


def identical_groups(
    hashes: UInt64[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " repeats"], Int[np.ndarray, " repeats"]]:
    """Rows whose digest an earlier row has, and the first row of that digest for each; in the order of the first."""
    ordered = np.sort(hashes)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered  # of all rows; from here on only of those of a digest that comes more than once
    rows = np.flatnonzero(_among(hashes, several))
    if not len(rows):
        return rows, rows

    digests = hashes[rows]
    order = np.argsort(digests, kind="stable")
    rows, digests = rows[order], digests[order]
    begins = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1]]))
    firsts = np.repeat(rows[begins], np.diff(begins, append=len(rows)))

    order = np.lexsort((rows, firsts))
    rows, firsts = rows[order], firsts[order]
    return rows[rows != firsts], firsts[rows != firsts]


def _among(hashes: UInt64[np.ndarray, " rows"], some: UInt64[np.ndarray, " some"]) -> Bool[np.ndarray, " rows"]:
    """Which of the digests are among a few, which ascend."""
    found = np.zeros(len(hashes), dtype=bool)
    for start in range(0, len(hashes) if len(some) else 0, _AT_ONCE):
        own = hashes[start : start + _AT_ONCE]
        found[start : start + _AT_ONCE] = some[np.searchsorted(some[:-1], own)] == own
    return found


def _same_in_part(
    most: int, arrays: Mapping[str, np.ndarray], images: UnitRows, texts: UnitRows | None, part: int
) -> Bool[np.ndarray, " repeats"]:
    repeats, firsts = (arrays[name][part * most : (part + 1) * most] for name in ("repeats", "firsts"))
    same = np.empty(len(repeats), dtype=bool)
    ones, others = images.gathered(repeats), images.gathered(firsts)
    for block in ones.blocks(images.cached_rows):
        one, other = ones.raw(block), others.raw(block)
        same[block] = (one.view(np.uint8) == other.view(np.uint8)).reshape(len(one), -1).all(axis=1)
    return same
