"""Choose the fastest plan for these rows by estimates from a sample of them."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32

from clip_cid.method.balance.cell_windows import Windows
from clip_cid.method.balance.dense_crowds import FEWEST_ROWS, SAMPLED, ball_of, find_balls
from clip_cid.method.balance.pair_plan import (
    CELL_ROUNDS,
    POINTS_PER_CELL,
    WIDTHS,
    Estimate,
    Layout,
    Plan,
    cell_centers,
    coded,
    lay_out,
    make_row_sketch,
    sampled_rows,
)
from clip_cid.method.balance.sketch import Sketch, make_sketch, principal_directions
from clip_cid.method.codes import CodeType
from clip_cid.method.distances import squared_distances
from clip_cid.method.products import int8_product, int8_products_are_right
from clip_cid.method.unit_rows import UnitRows

_SMALL_WORK = 1.5e9  # rows x rows x dim: comparing so little takes less time than a plan
_FEWEST_CHUNKS, _LEAST_CHUNK, _LARGEST_CHUNK = 8, 1 << 16, 1 << 20
_FEWEST_GROUPS, _LARGEST_TILE, _TASK_SECONDS = 8, 16, 600.0  # of chunks; a longer task would be lost by an interruption
_EXACT_ROWS = 128
_DIRECTIONS = (64, 128, 256)  # computed together: twice as many take twice the time, and are not always needed
_LARGEST_CODE, _WHOLE_ROWS = 1 << 10, 1 << 29  # bytes: of a row's code, and of all rows where they are their own codes
_WORTH = 5  # a trial must be able to save this many times its cost
_CELLS_FROM = 20_000
_TRIAL_WIDTHS, _WIDER_FROM = (64, 128), 400_000  # widths of the sketches to try windows in; both for many rows
_MOST_CELLS = 4096  # a bit for each and each row: half a kB a row at most
_ENTRIES, _TIMED_WORK = 1 << 18, 1 << 26  # of the block whose product is timed; smaller for long codes

# What a core does in a second, for estimates only
_RATE = 8e10  # additions and multiplications in float32
_DEVICE_RATE = 4e14  # in float16, of a device of 2023
_SECONDS_A_NUMBER = 5e-9
_SECONDS_A_CALL = 1.5e-4
_SECONDS_A_CENTER = 8e-9  # beside the product: the comparison with the window, and its bit
_SECONDS_A_PASSING = 5e-8
_SECONDS_A_CROWDED = 4e-9  # of a pair in a crowd, beside the product
_SECONDS_A_CANDIDATE = 6e-7  # beside its exact distance
_SMALL_PRODUCTS = 1.3  # small blocks are slower by this


def make_plan(images: UnitRows, limit: float, *, device: str = "cpu", new_rows: int | None = None) -> Layout:
    """Choose from a sample: code, sketch and cells, for pairs at squared distance `limit` or less.

    With `new_rows` the pairs of all other rows are known, so that fewer pairs are left.
    """
    rows = len(images)
    chunk = _chunk_rows(rows)
    if device != "cpu":
        chunk, resident = _device_chunks(chunk, images.dim, device)
        seconds = 2 * images.dim * chunk**2 / _DEVICE_RATE
        tile = min(resident, _tile_chunks(math.ceil(rows / chunk), seconds))
        return lay_out(images, Plan("float16", None, 0, chunk, device, tile))
    if rows * rows * images.dim <= _SMALL_WORK:
        return lay_out(images, Plan(chunk_rows=chunk))

    sample = _Sample(images, limit, rows if new_rows is None else new_rows)
    best = sample.with_cells(sample.codes())
    chunks = math.ceil(rows / chunk)
    tile = _tile_chunks(chunks, 2 * _seconds(best) / chunks**2)
    return replace(best, plan=replace(best.plan, chunk_rows=chunk, tile_chunks=tile))


class _Sample:
    """Rows drawn at random, and what a code or a window would do to their pairs."""

    def __init__(self, images: UnitRows, limit: float, new_rows: int) -> None:
        chosen = sampled_rows(images)
        self._images, self._least, self._limit = images, 1 - limit / 2, limit
        self._rows = images.float32(chosen)
        self._directions: dict[int, np.ndarray] = {}

        # What every plan has to do.
        self._pairs = new_rows * (len(images) - new_rows / 2)
        self._reading = len(images) * images.dim * _SECONDS_A_NUMBER
        self._exact_seconds = self._time_of_exact(images[chosen[:_EXACT_ROWS]])
        self._apart = _apart(self._rows, len(images), limit)
        crowded = 0.0 if self._apart is None else self._pairs * (1 - float(self._apart.mean()))
        self._reading += crowded * (_time_of_product("int8", images.dim) + _SECONDS_A_CROWDED) if crowded else 0.0
        self._near = self._pairs * self._share_above(self._rows @ self._rows.T, np.float32(self._least))
        self._least_seconds = self._reading + self._near * self._exact_seconds

    def codes(self) -> list[Layout]:
        """Sketches and whole rows, each with its estimate for all pairs."""
        kind: CodeType = "int8" if int8_products_are_right() else "float32"
        codes: list[Layout] = []

        # Wider sketches, while they may still save more than their trial costs.
        for width in (width for width in WIDTHS if width < self._images.dim):
            if codes and self._seconds_of_passing(min(codes, key=_seconds)) < _WORTH * self._time_of_trial(width):
                break
            codes.append(self._sketched(kind, width))
            if _seconds(codes[-1]) > 1.05 * min(map(_seconds, codes)):
                break

        # Whole rows, if they fit into memory and may be faster on a core twice as fast as assumed.
        row_bytes = 4 * self._images.dim
        if row_bytes <= _LARGEST_CODE or row_bytes * len(self._images) <= _WHOLE_ROWS:
            least = self._least_seconds + self._pairs * self._images.dim / _RATE
            if not codes or least < min(map(_seconds, codes)):
                codes.append(self._estimated(Plan("float32"), None))

        # Where too many pairs pass: more of the row, or smaller errors (at tiny thresholds those of int8 count).
        best = min(codes, key=_seconds)
        if kind == "int8" and self._seconds_of_passing(best) > 0.2 * _seconds(best):
            if best.sketch is not None:
                codes.append(self._estimated(Plan("float32", best.plan.width), best.sketch))
            if self._seconds_of_passing(best) > _WORTH * 20 * self._images.dim**3 / _RATE:
                codes.append(self._estimated(Plan(kind), make_row_sketch(self._rows, self._images.dim)))
        return codes

    def with_cells(self, codes: list[Layout]) -> Layout:
        """The cheapest of the codes, each without cells and with as many as pay.

        Doubling the cells may not pay until there are as many as the data have clusters. So all numbers are tried whose
        centers take a small part of the time that the best plan so far would take beyond what any plan takes.
        """
        best = min(codes, key=_seconds)
        if len(self._images) < _CELLS_FROM:
            return best
        for width in _TRIAL_WIDTHS[: 1 if len(self._images) < _WIDER_FROM else None]:
            best = self._celled_by(width, codes, best)
        if best.plan.cells and best.centers is None:
            best = replace(best, centers=cell_centers(self._images, best, best.plan.cells))
        return best

    def _celled_by(self, width: int, codes: list[Layout], best: Layout) -> Layout:
        """The best so far, or a code with windows whose number of pairs a sketch of this width tells."""
        trial = next((code for code in codes if code.coding.width == width and code.sketch), None)
        if trial is None:
            trial = self._sketched(best.plan.kind, min(width, self._images.dim))
        candidates = [trial, *(code for code in codes if code.coding.width > width)]  # narrower windows are looser

        cells = 1 << round(math.log2(1.5 * math.sqrt(len(self._images))))
        while cells <= _MOST_CELLS and self._time_of_centers(cells, trial) < 0.05 * (
            _seconds(best) - self._least_seconds
        ):
            centers = cell_centers(self._images, trial, cells)
            pairs = self._pairs_in_windows(trial, centers)
            cheapest = min((self._celled(code, cells, pairs) for code in candidates), key=_seconds)
            if _seconds(cheapest) < _seconds(best):
                best = replace(cheapest, centers=centers if cheapest.coding == trial.coding else None)
            cells *= 2
        return best

    def _sketched(self, kind: CodeType, width: int) -> Layout:
        count = self._directions_for(width)
        if count not in self._directions:
            self._directions[count] = principal_directions(self._rows, count)
        return self._estimated(Plan(kind, width), make_sketch(self._directions[count], width))

    def _directions_for(self, width: int) -> int:
        return min(next(count for count in _DIRECTIONS if count >= width), self._images.dim)

    def _estimated(self, plan: Plan, sketch: Sketch | None) -> Layout:
        layout, short = coded(plan, sketch, self._rows)
        passing, candidates = (share * self._pairs for share in self._shares(layout, short))
        seconds = self._seconds_of(layout, self._pairs, candidates) + passing * _SECONDS_A_PASSING
        return replace(layout, estimate=Estimate(self._pairs, candidates, seconds))

    def _shares(self, layout: Layout, short: Float32[np.ndarray, "n width"]) -> tuple[float, float]:
        """The share of pairs that pass the floor of their block, and of those that pass their own."""
        errors = layout.coding.encode(short)[1].astype(np.float64)
        products = short @ short.T

        def share(error: Float[np.ndarray, " one"]) -> float:
            floor = np.float32(layout.coding.floor(self._least, error, error)[0] * layout.coding.unit)
            return self._share_above(products, floor)

        return share(errors.max(keepdims=True)), share(errors.mean(keepdims=True))

    def _share_above(self, products: Float32[np.ndarray, "n n"], floor: np.float32) -> float:
        """Of all pairs of different rows; pairs within a crowd do not count, because they are compared in another way."""
        above = products >= floor
        np.fill_diagonal(above, False)
        if self._apart is not None:
            above &= self._apart
        return float(np.count_nonzero(above)) / (len(above) * (len(above) - 1))

    def _seconds_of(self, layout: Layout, pairs: float, candidates: float) -> float:
        projecting = len(self._images) * self._images.dim * 2 * layout.coding.width / _RATE
        return (
            self._reading
            + projecting
            + pairs * _time_of_product(layout.coding.kind, layout.coding.width)
            + candidates * self._exact_seconds
        )

    def _seconds_of_passing(self, layout: Layout) -> float:
        """Seconds for exact distances of pairs that are not near: the most that a better code could save."""
        assert layout.estimate is not None
        return (layout.estimate.candidates - self._near) * self._exact_seconds

    def _time_of_trial(self, width: int) -> float:
        """About what it takes to estimate a sketch of this width."""
        rows, count = len(self._rows), self._directions_for(width)
        directions = 0 if count in self._directions else 20 * rows * self._images.dim * count / _RATE
        return directions + rows * rows * _SECONDS_A_CENTER

    def _celled(self, flat: Layout, cells: int, pairs: float) -> Layout:
        """The same code with cells that leave so many pairs."""
        assert flat.estimate is not None
        rows, width = len(self._images), flat.coding.width
        chunks = math.ceil(rows / _chunk_rows(rows))
        seconds = (
            self._seconds_of(flat, _SMALL_PRODUCTS * pairs, flat.estimate.candidates)
            + rows * cells * (2 * width / _RATE + _SECONDS_A_CENTER)
            + (chunks + 1) * cells * _SECONDS_A_CALL
            + self._time_of_centers(cells, flat)
        )
        estimate = Estimate(pairs, flat.estimate.candidates, seconds)
        return replace(flat, plan=replace(flat.plan, cells=cells), estimate=estimate)

    def _pairs_in_windows(self, flat: Layout, centers: Float32[np.ndarray, "cells width"]) -> float:
        """How many products windows would leave."""
        windows = Windows(centers, self._limit, flat.error)
        home, visits = windows(flat.projected(self._rows))
        own = home[:, None] == home[None, :]
        visited = visits[:, home] & ~own  # row i visits the cell of row j
        if self._apart is not None:
            own, visited = own & self._apart, visited & self._apart
        return 2 * self._pairs * (float(visited.mean()) + float(own.mean()) / 2)

    def _time_of_exact(self, units: Float[np.ndarray, "n dim"]) -> float:
        """Seconds of a candidate, though of those in a crowd few need an exact distance."""
        one, other = np.random.default_rng(2).integers(0, len(units), (2, len(units)))
        return _SECONDS_A_CANDIDATE + _seconds_of(lambda: squared_distances(units[one], units[other])) / len(units)

    def _time_of_centers(self, cells: int, layout: Layout) -> float:
        return CELL_ROUNDS * POINTS_PER_CELL * cells * cells * 2 * layout.coding.width / _RATE


def _apart(sample: Float32[np.ndarray, "n dim"], rows: int, limit: float) -> Bool[np.ndarray, "n n"] | None:
    """Which pairs of the sample are not in one crowd; None if there is no crowd."""
    balls = find_balls(sample[:: math.ceil(len(sample) / SAMPLED)], limit)
    if not balls:
        return None
    of = ball_of(sample, balls)
    of[np.bincount(of)[of] * rows < FEWEST_ROWS * len(sample)] = 0
    return (of[:, None] != of) | (of == 0)


def _chunk_rows(rows: int) -> int:
    return min(max(math.ceil(rows / _FEWEST_CHUNKS), _LEAST_CHUNK), _LARGEST_CHUNK)


def _tile_chunks(chunks: int, pair_seconds: float) -> int:
    """A tile of so many chunks takes minutes, and there are enough tiles to share them.

    Args:
        chunks: In all.
        pair_seconds: What two of them take.
    """
    of_minutes = int(math.sqrt(_TASK_SECONDS / pair_seconds)) if pair_seconds > 0 else _LARGEST_TILE
    return max(1, min(chunks // _FEWEST_GROUPS, of_minutes, _LARGEST_TILE))


def _device_chunks(chunk_rows: int, dim: int, device: str) -> tuple[int, int]:
    """Rows of a chunk, at most an eighth of the device's free memory; and how many chunks take half of it."""
    if not torch.cuda.is_available():
        return chunk_rows, _LARGEST_TILE
    free, _ = torch.cuda.mem_get_info(device)
    chunk_rows = min(chunk_rows, max(_LEAST_CHUNK, free // 8 // (2 * dim)))
    return chunk_rows, max(1, free // 2 // (2 * dim * chunk_rows))


@functools.cache
def _time_of_product(kind: CodeType, width: int) -> float:
    """Seconds for the product of two codes and the look at it, measured."""
    side = math.isqrt(min(_ENTRIES, _TIMED_WORK // width))
    codes = np.random.default_rng(0).integers(-9, 9, (side, width)).astype(kind)
    tensor, other = torch.from_numpy(codes), codes.T.copy()  # of a matrix and itself numpy computes half
    if kind == "int8":
        return _seconds_of(lambda: int8_product(tensor, tensor.T).numpy().max(axis=1)) / side**2
    return _seconds_of(lambda: (codes @ other).max(axis=1)) / side**2


def _seconds_of(work: Callable[[], Any]) -> float:
    work()
    times: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _seconds(layout: Layout) -> float:
    assert layout.estimate is not None
    return layout.estimate.seconds
