"""Digests of the stored bytes of rows: they find equal rows, and rows that an earlier run has compared."""

import math

import numpy as np
from jaxtyping import Int, UInt64

from clip_cid.method.mixed_words import SPLITMIX64, mix_words
from clip_cid.method.unit_rows import UnitRows


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
    images: UnitRows, hashes: UInt64[np.ndarray, "rows 2"]
) -> tuple[Int[np.ndarray, " repeats"], Int[np.ndarray, " repeats"]]:
    """Rows equal to an earlier row bit for bit, and that row. A digest only nominates; the bytes decide."""
    repeats, firsts = identical_groups(hashes[:, 0])

    same = np.empty(len(repeats), dtype=bool)
    for start in range(0, len(repeats), images.cached_rows):
        part = slice(start, start + images.cached_rows)
        one, other = images.raw(repeats[part]), images.raw(firsts[part])
        same[part] = (one.view(np.uint8) == other.view(np.uint8)).reshape(len(one), -1).all(axis=1)

    return repeats[same], firsts[same]


def identical_groups(
    hashes: UInt64[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " repeats"], Int[np.ndarray, " repeats"]]:
    """Rows whose digest an earlier row has, and the first row of that digest for each."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = ordered[1:] == ordered[:-1]
    firsts = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
    return order[again], firsts[again]
