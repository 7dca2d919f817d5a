"""Rows of any array-like as float64 unit vectors, checked once before any computation."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int

from clip_cid.method.array_likes import ArrayLike, as_array
from clip_cid.unit_length import NORM_TOLERANCE, is_unit

BLOCK_ROWS = 4096

FLOAT32_ERROR = 2.0**-22  # the number, the length and the division are each rounded once

_CACHED_NUMBERS = 1 << 17  # 1 MB of float64: a block that stays in the cache

_GATHERED_NUMBERS = 1 << 27  # a quarter of a GB of float16

_COME_AND_GONE = (32 << 20) - (64 << 10)  # the largest block that glibc learns from is 32 MB

_EPS32 = 2.0**-24
_EPS64 = 2.0**-53


@runtime_checkable
class Rows(Protocol):
    """An array, a memory map, or an embedding store's shards: a shape, and rows by slice or by array of row numbers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class _Part:
    """Some rows of an array-like, read when they are used."""

    def __init__(self, rows: Rows, chosen: Int[np.ndarray, " n"]) -> None:
        self._rows, self._chosen = rows, chosen
        self.shape = (len(chosen), *rows.shape[1:])

    def __getitem__(self, rows: Any) -> Any:
        return self._rows[self._chosen[rows]]


class UnitRows:
    """The rows at length one, in float64.

    A row has the same bits whichever other rows are read with it, so results do not depend on the block size.

    Args:
        rows: (rows, dim) numbers, in any form that `as_array` reads.
        name: What to call them in an error.
        any_length: Accept rows of any length but zero.
        lengths: Of these very rows, measured earlier; then nothing is read or checked here.

    Raises:
        ValueError: Not numbers, not two-dimensional, empty, or a row that is not finite, is zero, or has a wrong
            length.
    """

    def __init__(
        self, rows: Rows | ArrayLike, *, name: str, any_length: bool, lengths: Float[np.ndarray, " rows"] | None = None
    ) -> None:
        rows = as_array(rows, name=name)
        shape = tuple(rows.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name} must be an array of (rows, dim), neither of them 0, got shape {shape}")
        self._rows = rows
        self.name = name
        self.dim = int(shape[1])

        if lengths is not None:
            if len(lengths) != shape[0]:
                raise ValueError(f"lengths must be of the {shape[0]} rows of {name}, got {len(lengths)}")
            self._lengths = lengths
        else:
            keep_freed_memory()
            self._lengths = np.empty(shape[0], dtype=np.float64)
            for block in self.blocks(self.cached_rows):
                self._lengths[block] = self._checked_lengths(block, any_length=any_length)

        # Of rows much longer or shorter float32 may lose numbers before they are scaled.
        self.fit_float32 = bool(self._lengths.min() > 0.5 and self._lengths.max() < 2)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, rows: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        values = self._read(rows)
        values /= self._lengths[rows][:, None]
        return values

    def float32(self, rows: slice | Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n dim"]:
        """The rows rounded: no number is off by more than `FLOAT32_ERROR` times itself (or 2^-140)."""
        values = np.asarray(self._rows[rows])
        if values.dtype != np.float16 and not (values.dtype == np.float32 and self.fit_float32):
            return self[rows].astype(np.float32)
        units = _to_float32(values)
        units /= self._lengths[rows][:, None].astype(np.float32)
        return units

    def part(self, rows: Int[np.ndarray, " n"], *, fit_float32: bool | None = None) -> "UnitRows":
        """Some of the rows, in this order; nothing is read or checked again.

        Args:
            rows: Their numbers.
            fit_float32: As of rows of which these are a part, so that they have the same bits as there.
        """
        part = UnitRows(_Part(self._rows, rows), name=self.name, any_length=True, lengths=self._lengths[rows])
        if fit_float32 is not None:
            part.fit_float32 = fit_float32
        return part

    def gathered(self, rows: Int[np.ndarray, " n"]) -> "UnitRows":
        """As `part`, with the rows read now, in one go, unless they are in memory already or very many."""
        if type(self._rows) is np.ndarray or len(rows) > 2 * self.gathered_rows:
            return self.part(rows)
        return self.read(rows)

    def read(self, rows: Int[np.ndarray, " n"]) -> "UnitRows":
        """As `part`, with the rows read now, in one go."""
        return UnitRows(self.raw(rows), name=self.name, any_length=True, lengths=self._lengths[rows])

    @property
    def lengths(self) -> Float[np.ndarray, " rows"]:
        """How long the stored rows are."""
        return self._lengths

    @property
    def cached_rows(self) -> int:
        """How many rows stay in a processor's cache."""
        return max(1, _CACHED_NUMBERS // self.dim)

    @property
    def gathered_rows(self) -> int:
        """About how many rows are read in one go where they lie in any order."""
        return max(1, _GATHERED_NUMBERS // self.dim)

    def raw(self, rows: slice | Int[np.ndarray, " n"]) -> np.ndarray:
        """The rows as they are stored, in one piece."""
        return np.ascontiguousarray(self._rows[rows])

    def blocks(self, block_rows: int) -> Iterator[slice]:
        """Slices that cover all rows in order."""
        for start in range(0, len(self), block_rows):
            yield slice(start, min(start + block_rows, len(self)))

    def _read(self, rows: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        values = np.asarray(self._rows[rows])
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{self.name} must be real numbers, got {values.dtype}")
        if values.dtype == np.float16:
            values = _to_float32(values)  # float32 holds every float16, and by this way it takes a third of the time
        return np.array(values, dtype=np.float64, order="C")

    def _checked_lengths(self, block: slice, *, any_length: bool) -> Float[np.ndarray, " n"]:
        values = self._read(block)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= values
            lengths = np.sqrt(values.sum(axis=1))

        bad = ~np.isfinite(lengths) | (lengths == 0)
        if not any_length:
            bad |= ~is_unit(lengths)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            limit = "finite and not zero" if any_length else f"of length 1 (within {NORM_TOLERANCE})"
            raise ValueError(
                f"{self.name} must have rows that are {limit}, but row {block.start + first} has length"
                f" {lengths[first]:.6g} ({int(bad.sum())} such rows among rows {block.start} to {block.stop - 1})"
            )
        return lengths


def keep_freed_memory() -> None:
    """Let the C library reuse the memory of freed blocks, which glibc would return to the system.

    The system zeroes returned memory at every use. glibc keeps it after it has freed one block of this size.
    A loop over blocks of a megabyte is then several times as fast (docs/decisions.md, D21).
    """
    np.empty(_COME_AND_GONE, dtype=np.uint8)


def _to_float32(values: np.ndarray) -> Float32[np.ndarray, "n dim"]:
    if values.dtype != np.float16:
        return np.array(values, dtype=np.float32)
    import torch  # twenty times as fast as numpy at this, and loaded by whoever compares rows

    return torch.from_numpy(np.array(values)).float().numpy()


def cosine_error(dim: int) -> float:
    """No float32 cosine of this width is further than this from the float64 one.

    With u = 2^-24, rounding two unit vectors moves their product by at most 2u + u^2, and summing by `product_error`.
    The float64 distance and lengths of the exact test are off by less than 8 (dim + 4) 2^-53.
    """
    return product_error(dim) + 2 * _EPS32 + _EPS32**2 + 8 * (dim + 4) * _EPS64


def product_error(dim: int) -> float:
    """How far a float32 product of two float32 rows may be from the exact one, in any order of summing.

    gamma = dim u / (1 - dim u) times the product of the rows' lengths, which are at most 1 + u.
    """
    gamma = dim * _EPS32 / (1 - dim * _EPS32)
    return gamma * (1 + _EPS32) ** 2
