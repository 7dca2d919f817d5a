"""All pairs of rows within a distance, as the links of their minimum spanning forest: exact, and in tasks of two chunks."""

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8, UInt64

from clip_cid.method.balance.crowds import groups_of_pairs, numbered, possible_links
from clip_cid.method.balance.forest import Forest, Links, join_links, spanning_links, whole_forest
from clip_cid.method.balance.pair_plan import Layout, Windows, make_plan
from clip_cid.method.codes import Coding
from clip_cid.method.distances import squared_distances
from clip_cid.method.products import int8_product
from clip_cid.method.unit_rows import UnitRows

Task = tuple[int, int]
Allocate = Callable[[str, tuple[int, int], np.dtype[Any]], np.ndarray]
"""Makes an array to be filled, of this name, shape and type."""

_SIDE = 1024  # rows of a block: 4 MB of products, which the look at them finds in the cache
_DEVICE_SIDE = 16_384  # half a GB of float16 products: long enough that starting one does not count
_PRODUCTS = _SIDE * _SIDE
_FOLDS = 16
_PLACES = 1 << 16  # pairs looked at one by one together
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # the finalizer of splitmix64
_TURNED = 4096  # a multiple of 8
_WINDOW = 1 << 27  # bytes
_PENDING_PAIRS = 1 << 21
_PENDING_LINKS = 1 << 21
_LARGE_CROWD = 256
_DIFFERENCES = 1 << 15  # computed at once: a quarter of a MB
_UNIT_NUMBERS = 1 << 20  # of the rows whose distances are computed together: 8 MB


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the tasks read beside the embeddings. Rows have positions: new ones first, then by cell."""

    limit: float
    coding: Coding
    device: str
    row_at: Int[np.ndarray, " positions"]
    """The row at each position: one of every group of bit-identical rows."""
    codes: np.ndarray
    """(positions, width)"""
    errors: Float[np.ndarray, " positions"]
    """How far each code is from what it stands for."""
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

    def tasks(self) -> list[Task]:
        """Pairs of chunks that cover every wanted pair of positions once."""
        chunks = len(self.chunk_starts) - 1
        return [(a, b) for a in range(self.new_chunks) for b in range(a, chunks)]

    def work(self, task: Task) -> float:
        """How large a task is, in pairs of positions."""
        sizes = np.diff(self.chunk_starts)
        a, b = task
        return float(sizes[a]) * float(sizes[b]) / (2 if a == b else 1)

    def identical(self) -> Links:
        """The links of bit-identical rows, at distance 0."""
        return Links(self.firsts, self.repeats, np.zeros(len(self.firsts)))


def near_forest(
    images: UnitRows,
    limit: float,
    *,
    layout: Layout | None = None,
    device: str = "cpu",
    on_plan: Callable[[Layout], Any] | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> Forest:
    """The minimum spanning forest of all pairs at squared distance `limit` or less; `balance_forest` in docs/method.md.

    Args:
        images: The rows.
        limit: Squared Euclidean distance of unit vectors.
        layout: How to look; chosen from a sample when None. It has no influence on the result.
        device: Where products are computed, for torch.
        on_plan: Called with the layout before the work begins.
        on_progress: Called with the rows' worth of work done since the last call; in all, the number of rows.
    """
    layout = layout or make_plan(images, limit, device=device)
    if on_plan is not None:
        on_plan(layout)
    prepared = prepare(images, limit, layout)
    tasks = prepared.tasks()
    told, done, total = 0, 0.0, sum(map(prepared.work, tasks))
    parts = [prepared.identical()]
    for task in tasks:
        parts.append(near_links(prepared, images, task))
        done += prepared.work(task)
        now = int(len(images) * done / total)
        if on_progress is not None and now > told:
            on_progress(now - told)
            told = now
    if on_progress is not None and len(images) > told:
        on_progress(len(images) - told)
    return whole_forest(len(images), join_links(parts), limit)


def _in_memory(name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
    return np.empty(shape, dtype=dtype)


def prepare(
    images: UnitRows,
    limit: float,
    layout: Layout,
    *,
    new: Bool[np.ndarray, " rows"] | None = None,
    allocate: Allocate = _in_memory,
    window_bytes: int = _WINDOW,
) -> Prepared:
    """Codes, windows and chunks of all rows, in one pass over them.

    Args:
        images: The rows.
        limit: Squared Euclidean distance of unit vectors.
        layout: How to look.
        new: Rows whose pairs are wanted; all when None. Pairs of two others are left out.
        allocate: Where the large arrays lie: `codes` and `visits`, and those of the rows in their own order that they
            are made of, `codes_by_row` and `visits_by_row`, which nobody needs afterwards.
        window_bytes: How much of an array is put into the order of positions at a time: a part that fits into memory.
    """
    rows, coding = len(images), layout.coding
    new = np.ones(rows, dtype=bool) if new is None else new
    codes = allocate("codes_by_row", (rows, coding.width), np.dtype(coding.kind))
    errors, hashes = np.empty(rows, dtype=np.float32), np.empty((rows, 2), dtype=np.uint64)
    home = np.zeros(rows, dtype=np.int32)
    window = None if layout.centers is None else Windows(layout.centers, limit, layout.error)
    cells = 0 if layout.centers is None else len(layout.centers)
    visits = allocate("visits_by_row", (rows, math.ceil(cells / 8)), np.dtype(np.uint8))
    for block in images.blocks(images.cached_rows):
        hashes[block] = row_hashes(images.raw(block))
        projected = layout.projected(images.float32(block))
        codes[block], errors[block] = coding.encode(layout.completed(projected))
        if window is not None:
            home[block], seen = window(projected)
            visits[block] = np.packbits(seen, axis=1)
    repeats, firsts = _identical(images, hashes)
    alone = np.ones(rows, dtype=bool)
    alone[repeats] = False
    order = np.lexsort((home, ~new))
    row_at = order[alone[order]]
    fresh = int(new[row_at].sum())
    starts = _chunk_starts(fresh, len(row_at), layout.plan.chunk_rows)
    return Prepared(
        limit=limit,
        coding=coding,
        device=layout.plan.device,
        row_at=row_at,
        codes=_by_position(codes, row_at, allocate, window_bytes),
        errors=errors[row_at],
        cell_at=home[row_at],
        visits=_by_cell(visits, row_at, cells, allocate, window_bytes),
        chunk_starts=starts,
        new_chunks=int(np.searchsorted(starts, fresh)),
        repeats=repeats,
        firsts=firsts,
        hashes=hashes,
    )


def near_links(prepared: Prepared, images: UnitRows, task: Task) -> Links:
    """The minimum spanning forest of the near pairs of two chunks: pure, and the same whenever it is computed."""
    a, b = (slice(*prepared.chunk_starts[chunk : chunk + 2].tolist()) for chunk in task)
    found = _Found(images, prepared.limit)
    if prepared.device != "cpu":
        with _InBackground(found) as aside:
            _compare_on_device(prepared, aside, a, b)
        return found.links()
    compare = _Comparison(prepared, found)
    if len(prepared.visits):
        _compare_cells(compare, prepared, a, b, own=True)
        if a != b:
            _compare_cells(compare, prepared, b, a, own=False)
    else:
        _compare_all(compare, a, b)
    return found.links()


def row_hashes(rows: np.ndarray) -> UInt64[np.ndarray, "n 2"]:
    """A digest of each row's bytes: two sums of its mixed words times fixed odd numbers, modulo 2^64."""
    width = rows.shape[1] * rows.itemsize
    words = np.zeros((len(rows), math.ceil(width / 8) * 8), dtype=np.uint8)
    words[:, :width] = rows.view(np.uint8).reshape(len(rows), width)
    factors = np.random.default_rng(7).integers(0, 2**64, (words.shape[1] // 8, 2), dtype=np.uint64) | np.uint64(1)
    mixed = words.view(np.uint64)
    for shift, factor in _MIXING:  # without it a sum hardly sees the high bits of a word, such as signs
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed @ factors


class _Found:
    """Near pairs as they come, made exact when they are many, and reduced to a forest whenever the links are many."""

    def __init__(self, images: UnitRows, limit: float) -> None:
        self._images, self._limit = images, limit
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_count = 0
        self._links: list[Links] = []
        self._links_count = 0
        self._crowd_of: Int[np.ndarray, " rows"] | None = None
        self._crowds = 0

    def add(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> None:
        """Rows that may be near, of one comparison (which bounds their number)."""
        if self._crowd_of is not None:
            open_pairs = (self._crowd_of[i] != self._crowd_of[j]) | (self._crowd_of[i] == 0)
            i, j = i[open_pairs], j[open_pairs]
        self._waiting.append((i, j))
        self._waiting_count += len(i)
        if self._waiting_count >= _PENDING_PAIRS:
            self._measure()

    def links(self) -> Links:
        self._measure()
        self._reduce()
        return self._links[0]

    def _measure(self) -> None:
        if not self._waiting_count:
            return
        i, j = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_count = [], 0
        for some in groups_of_pairs(i, j, max(2, _UNIT_NUMBERS // self._images.dim)):
            self._measure_some(i[some], j[some])

    def _measure_some(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> None:
        rows, left, right = numbered(i, j)
        units = self._images[rows]
        i, j, crowds = possible_links(units, left, right, self._limit)
        for crowd in crowds:
            self._settle(rows[crowd])
        squared = _distances(units, i, j)
        near = squared <= self._limit
        i, j = rows[i[near]], rows[j[near]]
        self._links.append(Links(np.minimum(i, j), np.maximum(i, j), squared[near]))
        self._links_count += len(i)
        if self._links_count > _PENDING_LINKS:
            self._reduce()

    def _settle(self, rows: Int[np.ndarray, " crowd"]) -> None:
        """All pairs of these rows have been looked at: those that still come need not be."""
        if len(rows) < _LARGE_CROWD:
            return
        if self._crowd_of is None:
            self._crowd_of = np.zeros(len(self._images), dtype=np.int32)
        self._crowds += 1
        self._crowd_of[rows] = self._crowds

    def _reduce(self) -> None:
        self._links = [spanning_links(join_links(self._links))]
        self._links_count = 0  # a forest is never larger than its rows: only what comes on top is counted


def _distances(
    units: Float[np.ndarray, "rows dim"], i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    out, dim = np.empty(len(i)), units.shape[1]
    some = max(1, _DIFFERENCES // dim)
    left, right = np.empty((2, some, dim))
    for start in range(0, len(i), some):
        part = slice(start, start + some)
        count = len(out[part])
        # "clip" because numpy writes to `out` by way of a copy unless it need not check the places first
        np.take(units, i[part], axis=0, out=left[:count], mode="clip")
        np.take(units, j[part], axis=0, out=right[:count], mode="clip")
        out[part] = squared_distances(left[:count], right[:count])
    return out


class _InBackground:
    """Hands pairs to `found` in another thread, so that the device goes on while the CPU measures; at most a few wait."""

    def __init__(self, found: _Found) -> None:
        self._found = found
        self._queue: queue.Queue[tuple[np.ndarray, np.ndarray] | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> "_InBackground":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def add(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> None:
        self._queue.put((i, j))

    def _work(self) -> None:
        while (pairs := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._found.add(*pairs)
            except BaseException as error:  # goes on taking, so that the other side never waits in vain
                self._error = error


class _Comparison:
    """Products of the codes of two lists of positions; pairs that may be near go to `found`."""

    def __init__(self, prepared: Prepared, found: _Found) -> None:
        self._prepared, self._found = prepared, found
        self._least = 1 - prepared.limit / 2
        self._space: np.ndarray | None = None

    def __call__(self, left: Int[np.ndarray, " left"], right: slice, *, triangle: bool) -> None:
        """Every pair, or (triangle) every pair of which the left position is the lower."""
        side = right.stop - right.start
        step = max(1, _PRODUCTS // max(side, 1))
        for start in range(0, len(left), step):
            some = left[start : start + step]
            for i, j in self._candidates(some, right):
                i, j = some[i], j + right.start
                if triangle:
                    i, j = i[i < j], j[i < j]
                if len(i):
                    self._found.add(self._prepared.row_at[i], self._prepared.row_at[j])

    def _candidates(
        self, left: Int[np.ndarray, " left"], right: slice
    ) -> Iterator[tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]]:
        """Places in `left` and in `right` of the pairs whose cosine may be large enough."""
        prepared = self._prepared
        errors = prepared.errors[left].astype(np.float64), prepared.errors[right].astype(np.float64)
        lowest = prepared.coding.floor(self._least, *(some.max(keepdims=True) for some in errors))
        # Not a copy where it can be a view: numpy takes half the time for the product of a matrix with itself.
        products = self._product(prepared.codes[_as_slice(left)], prepared.codes[right])
        places = _places_above(products, float(lowest[0]))
        for start in range(0, len(places), _PLACES):
            yield self._exactly_above(products, places[start : start + _PLACES], *errors)

    def _exactly_above(
        self,
        products: np.ndarray,
        places: Int[np.ndarray, " places"],
        left_errors: Float[np.ndarray, " left"],
        right_errors: Float[np.ndarray, " right"],
    ) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
        """Of the places above the lowest floor of the block, those above their own."""
        i, j = np.divmod(places, products.shape[1])
        above = products.reshape(-1)[places] >= self._prepared.coding.floor(
            self._least, left_errors[i], right_errors[j]
        )
        return i[above], j[above]

    def _product(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Into the same memory each time."""
        shape, whole = (len(one), len(other)), one.dtype == np.int8
        if self._space is None or self._space.size < shape[0] * shape[1]:
            self._space = np.empty(max(_PRODUCTS, shape[0] * shape[1]), dtype=np.int32 if whole else np.float32)
        out = self._space[: shape[0] * shape[1]].reshape(shape)
        if whole:
            int8_product(torch.from_numpy(one), torch.from_numpy(other).T, out=torch.from_numpy(out))
            return out
        return np.matmul(np.asarray(one, np.float32), np.asarray(other, np.float32).T, out=out)


def _places_above(products: np.ndarray, floor: float) -> Int[np.ndarray, " places"]:
    """Flat places of the products that reach the floor, which are rare: the maxima of every 16 rows are looked at first."""
    folded = len(products) // _FOLDS * _FOLDS
    if folded:
        largest = products[:folded].reshape(_FOLDS, -1).max(axis=0)
        flat = np.flatnonzero(largest >= floor)
        if len(flat) * _FOLDS < products.size // 8:
            flat = (flat + len(largest) * np.arange(_FOLDS)[:, None]).reshape(-1)
            flat = flat[products.reshape(-1)[flat] >= floor]
            rest = np.flatnonzero(products[folded:] >= floor)
            return np.concatenate([flat, folded * products.shape[1] + rest])
    return np.flatnonzero(products >= floor)


def _compare_on_device(prepared: Prepared, found: _InBackground, a: slice, b: slice) -> None:
    """All pairs of two chunks, which lie on the device as a whole; only pairs above the floor come back."""
    least, errors = 1 - prepared.limit / 2, prepared.errors.astype(np.float64)
    one = torch.from_numpy(prepared.codes[a]).to(prepared.device)
    other = one if a == b else torch.from_numpy(prepared.codes[b]).to(prepared.device)
    with _full_accumulation():
        for left in _blocks(a, _DEVICE_SIDE):
            for right in _blocks(b, _DEVICE_SIDE):
                if right.stop <= left.start:
                    continue
                loosest = (errors[rows].max(keepdims=True) for rows in (left, right))
                floor = float(prepared.coding.floor(least, *loosest)[0])
                products = one[_within(left, a)] @ other[_within(right, b)].T
                i, j, values = above_on_device(products, floor)
                i, j = i + left.start, j + right.start
                near = (i < j) & (values >= prepared.coding.floor(least, errors[i], errors[j]))
                if near.any():
                    found.add(prepared.row_at[i[near]], prepared.row_at[j[near]])


def above_on_device(products: torch.Tensor, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places and values of the products that reach the floor: rows without one are passed over on the device."""
    hits = torch.nonzero(products.amax(dim=1) >= floor).squeeze(1)
    some = products[hits]
    at, j = torch.nonzero(some >= floor, as_tuple=True)
    return hits[at].cpu().numpy(), j.cpu().numpy(), some[at, j].double().cpu().numpy()


@contextlib.contextmanager
def _full_accumulation() -> Generator[None]:
    """Sums of float16 products in float32 all the way, as the code's margin assumes."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction
    settings.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_fp16_reduced_precision_reduction = before


def _within(rows: slice, chunk: slice) -> slice:
    return slice(rows.start - chunk.start, rows.stop - chunk.start)


def _compare_all(compare: _Comparison, a: slice, b: slice) -> None:
    for left in _blocks(a, _SIDE):
        rows = np.arange(left.start, left.stop)
        for right in _blocks(b, _SIDE):
            if right.stop > left.start:
                compare(rows, right, triangle=right.start < left.stop)


def _compare_cells(compare: _Comparison, prepared: Prepared, visiting: slice, visited: slice, *, own: bool) -> None:
    """The rows of one chunk that visit a cell, against the rows of another chunk in it, cell by cell."""
    cells = prepared.cell_at[visited]
    names, starts = np.unique(cells, return_index=True)
    stops = np.append(starts[1:], len(cells))
    for cell, start, stop in zip(names.tolist(), starts.tolist(), stops.tolist(), strict=True):
        visitors = _visitors(prepared.visits[cell], visiting)
        at_home = prepared.cell_at[visitors] == cell
        piece = slice(visited.start + start, visited.start + stop)
        guests, family = visitors[~at_home], visitors[at_home]
        for right in _blocks(piece, _SIDE):
            if len(guests):
                compare(guests, right, triangle=False)
            if own and len(family):
                compare(family, right, triangle=visiting == visited)


def _as_slice(positions: Int[np.ndarray, " positions"]) -> slice | Int[np.ndarray, " positions"]:
    """Ascending positions, as a slice where none is left out."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def _blocks(rows: slice, side: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, side):
        yield slice(start, min(start + side, rows.stop))


def _chunk_starts(fresh: int, rows: int, chunk_rows: int) -> Int[np.ndarray, " chunks_and_one"]:
    """Chunks of about `chunk_rows`; none holds both new and old rows."""
    new = np.linspace(0, fresh, math.ceil(fresh / chunk_rows) + 1)
    old = np.linspace(fresh, rows, math.ceil((rows - fresh) / chunk_rows) + 1)[1:]
    return np.concatenate([new, old]).round().astype(np.int64)


def _identical(images: UnitRows, hashes: UInt64[np.ndarray, "rows 2"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows equal to an earlier row bit for bit, and that row. A hash only nominates; the bytes decide."""
    repeats, firsts = identical_groups(hashes[:, 0])
    same = np.empty(len(repeats), dtype=bool)
    for start in range(0, len(repeats), images.cached_rows):
        part = slice(start, start + images.cached_rows)
        one, other = images.raw(repeats[part]), images.raw(firsts[part])
        same[part] = (one.view(np.uint8) == other.view(np.uint8)).reshape(len(one), -1).all(axis=1)
    return repeats[same], firsts[same]


def _by_position(
    codes: np.ndarray, row_at: Int[np.ndarray, " positions"], allocate: Allocate, window_bytes: int
) -> np.ndarray:
    found = allocate("codes", (len(row_at), codes.shape[1]), codes.dtype)
    for positions, window in _windows(codes, row_at, window_bytes):
        found[positions] = window
    return found


def _by_cell(
    visits: UInt8[np.ndarray, "rows bytes_of_cells"],
    row_at: Int[np.ndarray, " positions"],
    cells: int,
    allocate: Allocate,
    window_bytes: int,
) -> UInt8[np.ndarray, "cells bytes"]:
    """Bits of cells for each row as bits of positions for each cell."""
    turned = allocate("visits", (cells, math.ceil(len(row_at) / 8)), np.dtype(np.uint8))
    for positions, window in _windows(visits, row_at, window_bytes) if cells else ():
        for start in range(0, len(window), _TURNED):
            bits = np.unpackbits(window[start : start + _TURNED], axis=1, count=cells)
            first = (positions.start + start) // 8
            turned[:, first : first + _TURNED // 8] = np.packbits(np.ascontiguousarray(bits.T), axis=1)
    return turned


def _windows(
    values: np.ndarray, row_at: Int[np.ndarray, " positions"], window_bytes: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Values by row in the order of positions, some positions at a time, a multiple of `_TURNED` but for the last.

    The rows of a window are read in their own order, as a disk likes it.
    """
    some = max(1, window_bytes // max(1, values.itemsize * values.shape[1]) // _TURNED) * _TURNED
    for start in range(0, len(row_at), some):
        rows = row_at[start : start + some]
        order = np.argsort(rows)
        window = np.empty((len(rows), values.shape[1]), dtype=values.dtype)
        for part in _blocks(slice(0, len(rows)), _TURNED):
            window[order[part]] = values[rows[order[part]]]
        yield slice(start, start + len(rows)), window


def _visitors(bits: UInt8[np.ndarray, " bytes"], positions: slice) -> Int[np.ndarray, " visits"]:
    """The positions of a range whose bit is set."""
    first = positions.start // 8
    found = np.flatnonzero(np.unpackbits(bits[first : math.ceil(positions.stop / 8)])) + 8 * first
    return found[slice(*np.searchsorted(found, [positions.start, positions.stop]).tolist())]


def identical_groups(
    hashes: UInt64[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " repeats"], Int[np.ndarray, " repeats"]]:
    """Rows whose hash an earlier row has, and the first row of that hash for each."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = ordered[1:] == ordered[:-1]
    firsts = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
    return order[again], firsts[again]
