"""The codes, cells and chunks that the comparison reads beside the embeddings, in the order of cells."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64

from clip_cid.method.array_store import ArrayStore
from clip_cid.method.balance.forest import Links, equal_links
from clip_cid.method.balance.pair_plan import Layout
from clip_cid.method.balance.row_hashes import identical_rows
from clip_cid.method.balance.row_scan import ScannedRows, scan
from clip_cid.method.codes import Coding
from clip_cid.method.jobs import Context

_TURNED = 4096  # positions put in order together; a multiple of 8
_ASCENDING = 1 << 24  # bytes of a window of rows that are read in order anyway


class ChunkPair(NamedTuple):
    """Two chunks of positions to compare with each other; the first with itself if they are equal."""

    first: int
    second: int


class Tile(NamedTuple):
    """Two groups of neighboring chunks, each chunk of the first to be compared with each of the second."""

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
    tile_chunks: int
    """Chunks of a group of a tile."""
    repeats: Int[np.ndarray, " repeats"]
    """Rows that are bit-identical to an earlier one,"""
    firsts: Int[np.ndarray, " repeats"]
    """and that earlier one."""
    hashes: UInt64[np.ndarray, "rows 2"]
    """A digest of the stored bytes of each row."""
    known: Bool[np.ndarray, " rows"]
    """Rows whose pairs with each other are known."""

    def tiles(self) -> list[Tile]:
        """Tiles that cover every wanted pair of positions once."""
        new, groups = (-(-count // self.tile_chunks) for count in (self.new_chunks, len(self.chunk_starts) - 1))
        return [Tile(a, b) for a in range(new) for b in range(a, groups)]

    def chunk_pairs(self, tile: Tile) -> list[ChunkPair]:
        """The pairs of chunks of a tile, by the second chunk."""
        chunks = len(self.chunk_starts) - 1
        first, second = (
            range(group * self.tile_chunks, min((group + 1) * self.tile_chunks, stop))
            for group, stop in zip(tile, (self.new_chunks, chunks), strict=True)
        )
        return [ChunkPair(a, b) for b in second for a in first if a <= b]

    def positions(self, chunk: int) -> slice:
        return slice(*self.chunk_starts[chunk : chunk + 2].tolist())

    def work(self, tile: Tile) -> float:
        """How much a tile is to compare, in pairs of positions."""
        sizes = np.diff(self.chunk_starts).tolist()
        return sum(float(sizes[a]) * float(sizes[b]) / (2 if a == b else 1) for a, b in self.chunk_pairs(tile))

    def identical_links(self) -> Links:
        """The links of bit-identical rows, at distance 0."""
        return equal_links(self.firsts, self.repeats)

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

        # Before tasks had tiles they compared two chunks, and the lengths of the rows lay here, too.
        arrays, facts = saved
        arrays.pop("lengths", None)
        facts.setdefault("tile_chunks", 1)
        if arrays.keys() | facts.keys() != {field.name for field in dataclasses.fields(cls)}:
            return None
        try:
            coding = Coding(**facts.pop("coding"))
        except TypeError:
            return None
        return cls(**arrays, **facts, coding=coding)


def prepare(
    context: Context, limit: float, layout: Layout, *, known: Bool[np.ndarray, " rows"] | None = None
) -> PreparedRows:
    """Codes, cells and chunks of all rows.

    Args:
        context: The rows, and where large arrays lie: `codes`, `visits` and `hashes`, and what the scan leaves, which
            nothing needs afterwards.
        limit: Squared Euclidean distance of unit vectors.
        layout: How near pairs are looked for.
        known: Rows whose pairs with each other are known and left out; none when None.
    """
    rows, coding, store = len(context.images), layout.coding, context.store
    new = np.ones(rows, dtype=bool) if known is None else ~known
    scanned = scan(context, limit, layout)
    hashes = scanned.column("hash", store.new("hashes", (rows, 2), np.dtype(np.uint64)))

    # Of bit-identical rows one has a position.
    repeats, firsts = identical_rows(context, hashes)
    alone = np.ones(rows, dtype=bool)
    alone[repeats] = False
    home = scanned.column("home", np.empty(rows, dtype=np.int32))
    order = np.lexsort((home, ~new))
    row_at = order[alone[order]]
    cell_at = home[row_at]
    errors = scanned.column("error", np.empty(rows, dtype=np.float32))[row_at]

    new_positions = int(new[row_at].sum())
    starts = _chunk_starts(new_positions, len(row_at), layout.plan.chunk_rows)
    return PreparedRows(
        limit=limit,
        coding=coding,
        device=layout.plan.device,
        seconds=layout.estimate.seconds if layout.estimate else 0.0,
        row_at=row_at,
        codes=_by_position(scanned, row_at, coding, store, ascending=layout.centers is None),
        errors=errors,
        cell_at=cell_at,
        visits=_by_cell(scanned, row_at, 0 if layout.centers is None else len(layout.centers), store),
        chunk_starts=starts,
        new_chunks=int(np.searchsorted(starts, new_positions)),
        tile_chunks=layout.plan.tile_chunks,
        repeats=repeats,
        firsts=firsts,
        hashes=hashes,
        known=~new,
    )


def _chunk_starts(new: int, rows: int, chunk_rows: int) -> Int[np.ndarray, " chunks_and_one"]:
    """Chunks of about `chunk_rows`; none holds both new and old rows."""
    of_new = np.linspace(0, new, math.ceil(new / chunk_rows) + 1)
    of_old = np.linspace(new, rows, math.ceil((rows - new) / chunk_rows) + 1)[1:]
    return np.concatenate([of_new, of_old]).round().astype(np.int64)


def _by_position(
    scanned: ScannedRows, row_at: Int[np.ndarray, " positions"], coding: Coding, store: ArrayStore, *, ascending: bool
) -> np.ndarray:
    ordered = store.new("codes", (len(row_at), coding.width), np.dtype(coding.kind))
    window_bytes = min(store.window_bytes, _ASCENDING) if ascending else store.window_bytes
    for positions, window in _windows(scanned, "code", row_at, window_bytes):
        ordered[positions] = window
    return ordered


def _by_cell(
    scanned: ScannedRows, row_at: Int[np.ndarray, " positions"], cells: int, store: ArrayStore
) -> UInt8[np.ndarray, "cells bytes"]:
    """Bits of cells for each row as bits of positions for each cell."""
    turned = store.new("visits", (cells, math.ceil(len(row_at) / 8)), np.dtype(np.uint8))
    for positions, window in _windows(scanned, "visits", row_at, store.window_bytes) if cells else ():
        for start in range(0, len(window), _TURNED):
            bits = np.unpackbits(window[start : start + _TURNED], axis=1, count=cells)
            first = (positions.start + start) // 8
            turned[:, first : first + _TURNED // 8] = np.packbits(np.ascontiguousarray(bits.T), axis=1)
    return turned


def _windows(
    scanned: ScannedRows, name: str, row_at: Int[np.ndarray, " positions"], window_bytes: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """What was found of each row in the order of positions, some positions at a time, a multiple of `_TURNED` but for the last.

    The rows of a window are read in their own order, which is fast on a disk.
    """
    width = scanned.ascending(name, row_at[:1]).nbytes
    at_once = max(1, window_bytes // max(1, width) // _TURNED) * _TURNED
    for start in range(0, len(row_at), at_once):
        rows = row_at[start : start + at_once]
        order = np.argsort(rows)

        window: np.ndarray | None = None
        for part in (slice(at, at + _TURNED) for at in range(0, len(rows), _TURNED)):
            values = scanned.ascending(name, rows[order[part]])
            window = np.empty((len(rows), *values.shape[1:]), dtype=values.dtype) if window is None else window
            window[order[part]] = values

        assert window is not None
        yield slice(start, start + len(rows)), window
