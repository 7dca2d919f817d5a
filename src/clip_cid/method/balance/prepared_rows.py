"""The codes, cells and chunks that the comparison reads beside the embeddings; one pass over all rows."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64

from clip_cid.method.balance.array_store import ArrayStore
from clip_cid.method.balance.cell_windows import Windows
from clip_cid.method.balance.forest import Links
from clip_cid.method.balance.pair_plan import Layout
from clip_cid.method.balance.row_hashes import identical_rows, row_hashes
from clip_cid.method.codes import Coding
from clip_cid.method.unit_rows import UnitRows

_TURNED = 4096  # positions put in order together; a multiple of 8


class ChunkPair(NamedTuple):
    """Two chunks of positions to compare with each other; the first with itself if they are equal."""

    first: int
    second: int


@dataclass(frozen=True, eq=False)
class PreparedRows:
    """Rows in the order of positions: new rows first, then by cell."""

    limit: float
    """The squared distance up to which pairs are near."""
    coding: Coding
    device: str
    """Where products are computed."""
    seconds: float
    """How long one core (or the device) will take, as far as is known."""
    row_at: Int[np.ndarray, " positions"]
    """The row at each position: one of every group of bit-identical rows."""
    codes: np.ndarray
    """(positions, width)"""
    errors: Float[np.ndarray, " positions"]
    """The error of each code."""
    cell_at: Int[np.ndarray, " positions"]
    """The cell of each position; all 0 without cells."""
    visits: UInt8[np.ndarray, "cells bytes"]
    """For each cell a bit for each position: whether it has to be compared with the cell. No cells without windows."""
    chunk_starts: Int[np.ndarray, " chunks_and_one"]
    new_chunks: int
    """Chunks before this one hold the rows whose pairs are wanted; the pairs of the others are known."""
    repeats: Int[np.ndarray, " repeats"]
    """Rows that are bit-identical to an earlier one,"""
    firsts: Int[np.ndarray, " repeats"]
    """and that earlier one."""
    hashes: UInt64[np.ndarray, "rows 2"]
    """A digest of the stored bytes of each row."""
    lengths: Float[np.ndarray, " rows"]
    """How long each stored row is."""
    known: Bool[np.ndarray, " rows"]
    """Rows whose pairs with each other are known."""

    def chunk_pairs(self) -> list[ChunkPair]:
        """Pairs of chunks that cover every wanted pair of positions once."""
        chunks = len(self.chunk_starts) - 1
        return [ChunkPair(a, b) for a in range(self.new_chunks) for b in range(a, chunks)]

    def positions(self, chunk: int) -> slice:
        return slice(*self.chunk_starts[chunk : chunk + 2].tolist())

    def work(self, pair: ChunkPair) -> float:
        """How much a pair of chunks is to compare, in pairs of positions."""
        sizes = np.diff(self.chunk_starts)
        return float(sizes[pair.first]) * float(sizes[pair.second]) / (2 if pair.first == pair.second else 1)

    def identical_links(self) -> Links:
        """The links of bit-identical rows, at distance 0."""
        return Links(self.firsts, self.repeats, np.zeros(len(self.firsts)))

    def save(self, store: ArrayStore) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        facts = {name: value for name, value in values.items() if name not in arrays}
        store.save_all(arrays, facts | {"coding": dataclasses.asdict(self.coding)})

    @classmethod
    def load(cls, store: ArrayStore) -> "PreparedRows | None":
        """The rows as `save` wrote them; None if nothing is complete, or another version wrote it."""
        if (saved := store.load_all()) is None:
            return None

        arrays, facts = saved
        if arrays.keys() | facts.keys() != {field.name for field in dataclasses.fields(cls)}:
            return None
        try:
            coding = Coding(**facts.pop("coding"))
        except TypeError:
            return None
        return cls(**arrays, **facts, coding=coding)


def prepare(
    images: UnitRows, limit: float, layout: Layout, *, known: Bool[np.ndarray, " rows"] | None = None, store: ArrayStore
) -> PreparedRows:
    """Codes, cells and chunks of all rows.

    Args:
        images: The rows.
        limit: Squared Euclidean distance of unit vectors.
        layout: How near pairs are looked for.
        known: Rows whose pairs with each other are known and left out; none when None.
        store: Where the large arrays lie: `codes` and `visits`, and those in the order of the rows that they are made
            of, `codes_by_row` and `visits_by_row`, which nothing needs afterwards.
    """
    rows, coding = len(images), layout.coding
    new = np.ones(rows, dtype=bool) if known is None else ~known
    cells = 0 if layout.centers is None else len(layout.centers)
    windows = None if layout.centers is None else Windows(layout.centers, limit, layout.error)

    # One pass over the rows, in their own order.
    codes = store.new("codes_by_row", (rows, coding.width), np.dtype(coding.kind))
    visits = store.new("visits_by_row", (rows, math.ceil(cells / 8)), np.dtype(np.uint8))
    errors, hashes = np.empty(rows, dtype=np.float32), np.empty((rows, 2), dtype=np.uint64)
    home = np.zeros(rows, dtype=np.int32)
    for block in images.blocks(images.cached_rows):
        hashes[block] = row_hashes(images.raw(block))
        projected = layout.projected(images.float32(block))
        codes[block], errors[block] = coding.encode(layout.completed(projected))
        if windows is not None:
            home[block], visited = windows(projected)
            visits[block] = np.packbits(visited, axis=1)

    # Of bit-identical rows one has a position.
    repeats, firsts = identical_rows(images, hashes)
    alone = np.ones(rows, dtype=bool)
    alone[repeats] = False
    order = np.lexsort((home, ~new))
    row_at = order[alone[order]]

    new_positions = int(new[row_at].sum())
    starts = _chunk_starts(new_positions, len(row_at), layout.plan.chunk_rows)
    return PreparedRows(
        limit=limit,
        coding=coding,
        device=layout.plan.device,
        seconds=layout.estimate.seconds if layout.estimate else 0.0,
        row_at=row_at,
        codes=_by_position(codes, row_at, store),
        errors=errors[row_at],
        cell_at=home[row_at],
        visits=_by_cell(visits, row_at, cells, store),
        chunk_starts=starts,
        new_chunks=int(np.searchsorted(starts, new_positions)),
        repeats=repeats,
        firsts=firsts,
        hashes=hashes,
        lengths=images.lengths,
        known=~new,
    )


def _chunk_starts(new: int, rows: int, chunk_rows: int) -> Int[np.ndarray, " chunks_and_one"]:
    """Chunks of about `chunk_rows`; none holds both new and old rows."""
    of_new = np.linspace(0, new, math.ceil(new / chunk_rows) + 1)
    of_old = np.linspace(new, rows, math.ceil((rows - new) / chunk_rows) + 1)[1:]
    return np.concatenate([of_new, of_old]).round().astype(np.int64)


def _by_position(codes: np.ndarray, row_at: Int[np.ndarray, " positions"], store: ArrayStore) -> np.ndarray:
    ordered = store.new("codes", (len(row_at), codes.shape[1]), codes.dtype)
    for positions, window in _windows(codes, row_at, store.window_bytes):
        ordered[positions] = window
    return ordered


def _by_cell(
    visits: UInt8[np.ndarray, "rows bytes_of_cells"],
    row_at: Int[np.ndarray, " positions"],
    cells: int,
    store: ArrayStore,
) -> UInt8[np.ndarray, "cells bytes"]:
    """Bits of cells for each row as bits of positions for each cell."""
    turned = store.new("visits", (cells, math.ceil(len(row_at) / 8)), np.dtype(np.uint8))
    for positions, window in _windows(visits, row_at, store.window_bytes) if cells else ():
        for start in range(0, len(window), _TURNED):
            bits = np.unpackbits(window[start : start + _TURNED], axis=1, count=cells)
            first = (positions.start + start) // 8
            turned[:, first : first + _TURNED // 8] = np.packbits(np.ascontiguousarray(bits.T), axis=1)
    return turned


def _windows(
    values: np.ndarray, row_at: Int[np.ndarray, " positions"], window_bytes: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Values by row in the order of positions, some positions at a time, a multiple of `_TURNED` but for the last.

    The rows of a window are read in their own order, which is fast on a disk.
    """
    at_once = max(1, window_bytes // max(1, values.itemsize * values.shape[1]) // _TURNED) * _TURNED
    for start in range(0, len(row_at), at_once):
        rows = row_at[start : start + at_once]
        order = np.argsort(rows)

        window = np.empty((len(rows), values.shape[1]), dtype=values.dtype)
        for part in (slice(at, at + _TURNED) for at in range(0, len(rows), _TURNED)):
            window[order[part]] = values[rows[order[part]]]

        yield slice(start, start + len(rows)), window
