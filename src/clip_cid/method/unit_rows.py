"""Rows of any array-like read as float64 unit vectors, checked once before anything is computed from them."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

NORM_TOLERANCE = 1e-2  # float16 storage moves a length by 1e-4 at most; more is not a stored unit vector
BLOCK_ROWS = 4096

_EPS32 = 2.0**-24
_EPS64 = 2.0**-53


@runtime_checkable
class Rows(Protocol):
    """An array, a memory map, or an embedding store's shards: a shape, and rows by slice or by array of row numbers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class UnitRows:
    """The rows at length one, in float64.

    A row comes out the same bit for bit whichever other rows are read with it: that is why results do not depend on
    the size of blocks.

    Args:
        rows: (rows, dim) numbers.
        name: What to call them in an error.
        any_length: Accept rows of any length but zero.

    Raises:
        ValueError: Not two-dimensional, empty, or a row that is not finite, is zero, or has a wrong length.
    """

    def __init__(self, rows: Rows, *, name: str, any_length: bool) -> None:
        shape = tuple(getattr(rows, "shape", ()))
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name} must be an array of (rows, dim), neither of them 0, got shape {shape}")
        self._rows = rows
        self.name = name
        self.dim = int(shape[1])
        self._lengths = np.empty(shape[0], dtype=np.float64)
        for block in self.blocks(BLOCK_ROWS):
            self._lengths[block] = self._checked_lengths(block, any_length=any_length)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, rows: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        return self._read(rows) / self._lengths[rows][:, None]

    def blocks(self, block_rows: int) -> Iterator[slice]:
        """Slices that cover all rows in order."""
        for start in range(0, len(self), block_rows):
            yield slice(start, min(start + block_rows, len(self)))

    def _read(self, rows: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        values = np.asarray(self._rows[rows])
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{self.name} must be real numbers, got {values.dtype}")
        return np.ascontiguousarray(values, dtype=np.float64)

    def _checked_lengths(self, block: slice, *, any_length: bool) -> Float[np.ndarray, " n"]:
        values = self._read(block)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt((values * values).sum(axis=1))
        bad = ~np.isfinite(lengths) | (lengths == 0)
        if not any_length:
            bad |= np.abs(lengths - 1) > NORM_TOLERANCE
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            limit = "finite and not zero" if any_length else f"of length 1 (within {NORM_TOLERANCE})"
            raise ValueError(
                f"{self.name} must have rows that are {limit}, but row {block.start + first} has length"
                f" {lengths[first]:.6g} ({int(bad.sum())} such rows among rows {block.start} to {block.stop - 1})"
            )
        return lengths


def cosine_error(dim: int) -> float:
    """No float32 cosine of this width is further than this from the float64 one.

    With u = 2^-24, rounding two unit vectors moves their product by at most 2u + u^2, and summing `dim` products in any
    order by at most gamma = dim u / (1 - dim u) times the product of the rounded lengths, (1 + u)^2. The float64
    distance and lengths of the exact test are off by less than 8 (dim + 4) 2^-53.
    """
    gamma = dim * _EPS32 / (1 - dim * _EPS32)
    return gamma * (1 + _EPS32) ** 2 + 2 * _EPS32 + _EPS32**2 + 8 * (dim + 4) * _EPS64
