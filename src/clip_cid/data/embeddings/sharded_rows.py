"""Rows of embeddings, and of other numbers, over memory-mapped .npy shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Integer, Num

from clip_cid.open_files import KeptOpen

_FEW = 8  # rows of a shard: up to so many are read faster one by one
_AT_ONCE = 2048  # shards whose maps are held at the same time, beside those that are kept


def row_type(rows: int) -> type[np.int32] | type[np.int64]:
    """What the number of one of so many rows is held in: of hundreds of millions there are several in memory."""
    return np.int32 if rows < 2**31 else np.int64


class _Files:
    """Maps the rows of one file after the other; of several for each image, (images, each, dim), one after the other.

    A file is closed when it is mapped, since a store may have more shards than a process may have files. Its header is
    read once.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths
        self._headers: dict[int, tuple[tuple[int, ...], bool, np.dtype[Any], int]] = {}

    def __call__(self, number: int) -> np.ndarray:
        with pa.memory_map(str(self.paths[number])) as file:
            if number not in self._headers:
                self._headers[number] = _header(file)
            shape, by_columns, dtype, begins = self._headers[number]
            file.seek(begins)
            stored = np.ndarray(shape, dtype, buffer=file.read_buffer(), order="F" if by_columns else "C")
        return stored.reshape(-1, shape[-1])


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order (by columns or not) and type of a .npy, and where its numbers begin."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return *read(file), file.tell()


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
        self._maps = KeptOpen(_Files(self._files), maps=True)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._dim

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: slice | Integer[np.ndarray, " n"]) -> Num[np.ndarray, "n dim"]:
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
        self.__dict__.update(state, _maps=KeptOpen(_Files(state["_files"]), maps=True))

    def _range(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self._dim), dtype=self.dtype)

        first, last = (int(np.searchsorted(self._starts, row, side="right")) - 1 for row in (start, stop - 1))
        for begin in range(first, last + 1, _AT_ONCE):
            shards = range(begin, min(begin + _AT_ONCE, last + 1))
            parts = [self._maps(shard) for shard in shards if self._counts[shard]]
            since, until = max(start, int(self._starts[begin])), min(stop, int(self._starts[shards.stop]))
            if not parts:
                continue

            # The first and the last may be cut.
            parts[-1] = parts[-1][: len(parts[-1]) - int(self._starts[shards.stop]) + until]
            parts[0] = parts[0][since - int(self._starts[begin]) :]
            np.concatenate(parts, out=out[since - start : until - start])
        return out

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Any rows in any order; each shard is visited once, front to back."""
        out = np.empty((len(rows), self._dim), dtype=self.dtype)
        if not len(rows):
            return out
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]

        # Where the rows of one shard end and those of the next begin.
        shards = np.searchsorted(self._starts, ordered, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        local = ordered - self._starts[shards]
        places, one_by_one, visited = order.tolist(), local.tolist(), shards[edges[:-1]].tolist()

        for shard, first, stop in zip(visited, edges, edges[1:], strict=False):
            stored = self._maps(shard)
            if stop - first == 1:
                out[places[first]] = stored[one_by_one[first]]
            elif stop - first > _FEW:
                out[order[first:stop]] = stored[local[first:stop]]
            else:
                for at in range(first, stop):
                    out[places[at]] = stored[one_by_one[at]]
        return out


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
