"""Rows of embeddings over memory-mapped .npy shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from clip_cid.open_files import KeptOpen

_OPEN_FILES = 256  # a process may hold some 65,000 maps; a large store has more shards than that


def _mapped(path: Path) -> np.ndarray:
    """The rows of a file; of several for each image, (images, each, dim), one after the other."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    return stored.reshape(-1, stored.shape[-1])


class ShardedRows:
    """(rows, dim) over memory-mapped .npy shards: `[slice]` and `[int array]` give a fresh array, `select` a view.

    A copy in another process holds paths only and maps the files itself.
    """

    def __init__(
        self,
        files: Sequence[Path],
        rows: Sequence[int],
        *,
        dim: int,
        dtype: np.dtype[Any],
        chosen: Int[np.ndarray, " chosen"] | None = None,
    ) -> None:
        self._files, self._counts = tuple(files), tuple(rows)
        self._starts = np.cumsum([0, *self._counts], dtype=np.int64)
        self._dim, self._chosen = dim, chosen
        self.dtype = dtype
        self._maps = KeptOpen(_mapped, most=_OPEN_FILES)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._dim

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: slice | Integer[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if self._chosen is not None:
                return self._gather(self._chosen[index])
            return self._range(start, max(start, stop)) if step == 1 else self._gather(np.arange(start, stop, step))
        rows = checked_rows(index, len(self))
        return self._gather(rows if self._chosen is None else self._chosen[rows])

    def select(self, rows: Integer[np.ndarray, " n"]) -> "ShardedRows":
        """A view of some rows, in this order; nothing is read yet."""
        rows = checked_rows(rows, len(self))
        chosen = rows if self._chosen is None else self._chosen[rows]
        return ShardedRows(self._files, self._counts, dim=self._dim, dtype=self.dtype, chosen=chosen)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _maps=KeptOpen(_mapped, most=_OPEN_FILES))

    def _range(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self._dim), dtype=self.dtype)

        at, shard = start, int(np.searchsorted(self._starts, start, side="right")) - 1
        while at < stop:
            first, last = int(self._starts[shard]), int(self._starts[shard + 1])
            until = min(stop, last)
            if until > at:
                out[at - start : until - start] = self._map(shard)[at - first : until - first]
            at, shard = until, shard + 1
        return out

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Any rows in any order; each shard is visited once, front to back."""
        out = np.empty((len(rows), self._dim), dtype=self.dtype)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]

        edges = np.searchsorted(ordered, self._starts)
        for shard in np.flatnonzero(np.diff(edges)):
            part = slice(edges[shard], edges[shard + 1])
            out[order[part]] = self._map(int(shard))[ordered[part] - self._starts[shard]]
        return out

    def _map(self, shard: int) -> np.ndarray:
        return self._maps(self._files[shard])


def checked_rows(rows: Integer[np.ndarray, " n"], count: int) -> Int[np.ndarray, " n"]:
    """Row numbers as int64. A negative one is refused: -1 marks an absent row and must not mean the last row.

    Raises:
        IndexError: A row is outside [0, count).
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
        raise IndexError(f"rows: must be a 1-d array of integers, got {rows.ndim}-d {rows.dtype}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise IndexError(f"rows: must be in [0, {count}), got {rows.min()} to {rows.max()}")
    return rows.astype(np.int64, copy=False)
