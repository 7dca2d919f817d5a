"""How near pairs will be looked for: chosen from a sample of the rows, and never of influence on what is found."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int

from clip_cid.method.balance.sketch import Sketch, make_sketch, principal_directions
from clip_cid.method.codes import CodeType, Coding, coding_for
from clip_cid.method.distances import squared_distances
from clip_cid.method.products import int8_product, int8_products_are_right
from clip_cid.method.unit_rows import FLOAT32_ERROR, UnitRows, product_error

_WIDTHS = (64, 96, 128, 192, 256)
_DIRECTIONS = (64, 128, 256)  # so many at a time: twice as many take twice the time, and are not always asked for
_LARGEST_CODE, _WHOLE_ROWS = 1 << 10, 1 << 29  # bytes: of a row's code, and of all rows where they are their own codes
_SAMPLE, _LARGEST_SAMPLE, _EXACT_ROWS = 6, 2048, 128  # the first times the root of the number of rows
_SMALL_WORK = 1.5e9  # rows x rows x dim: so little is compared sooner than planned for
_CELLS_FROM = 20_000
_WORTH = 5  # times its cost has to be what a trial might save at the very most
_TRIAL_WIDTHS, _WIDER_FROM = (64, 128), 400_000  # windows are tried in sketches of these widths; of many rows in both
_CELL_ROUNDS, _POINTS_PER_CELL = 4, 16
_MOST_CELLS = 4096  # a bit for each and each row: half a kB a row at most
_FEWEST_CHUNKS, _LEAST_CHUNK, _LARGEST_CHUNK = 8, 1 << 16, 1 << 20
_SCORES = 1 << 18
_ENTRIES, _TIMED_WORK = 1 << 18, 1 << 26  # of the block whose product is timed: of long codes a smaller one
# What a core does in a second, for estimates only
_RATE = 8e10  # additions and multiplications in float32
_SECONDS_A_NUMBER = 5e-9
_SECONDS_A_CALL = 1.5e-4
_SECONDS_A_CENTER = 8e-9  # beside the product: the comparison with the window, and its bit
_SECONDS_A_PASSING = 5e-8
_SECONDS_A_CANDIDATE = 6e-7  # beside its exact distance
_SMALL_PRODUCTS = 1.3  # small blocks are slower by this


@dataclass(frozen=True)
class Plan:
    """The choices. Any plan finds the same pairs; they differ in time and memory."""

    kind: CodeType = "float32"
    """What a row's code is made of."""
    width: int | None = None
    """Numbers in a code; None for the row itself."""
    cells: int = 0
    """Cells of the windows; 0 compares all rows with all."""
    chunk_rows: int = _LARGEST_CHUNK
    """Rows of a chunk: a task compares two chunks."""
    device: str = "cpu"
    """Where the products are computed."""

    def __post_init__(self) -> None:
        if self.device != "cpu" and (self.kind == "int8" or self.cells):
            raise ValueError(f"a plan for a device has floats and no cells, got {self}")
        if self.chunk_rows < 1 or self.cells < 0 or (self.width is not None and self.width < 1):
            raise ValueError(f"a plan has width >= 1, cells >= 0 and chunk_rows >= 1, got {self}")


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to cost, from a sample."""

    pairs: float
    """Pairs of codes to multiply."""
    candidates: float
    """Pairs to compute exactly."""
    seconds: float
    """Of one core (or of the device)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A plan, and the arrays it needs."""

    plan: Plan
    coding: Coding
    sketch: Sketch | None = None
    centers: Float32[np.ndarray, "cells width"] | None = None
    estimate: Estimate | None = None

    @property
    def error(self) -> float:
        """How far a projected row may be from what it stands for."""
        return 2 * FLOAT32_ERROR if self.sketch is None else self.sketch.error

    def projected(self, rows: Float32[np.ndarray, "n dim"]) -> Float32[np.ndarray, "n width"]:
        """What the windows see."""
        return rows if self.sketch is None else self.sketch.project(rows)

    def completed(self, projected: Float32[np.ndarray, "n width"]) -> Float32[np.ndarray, "n width"]:
        """What the codes stand for."""
        return projected if self.sketch is None else self.sketch.complete(projected)

    def describe(self) -> str:
        """The plan in one line, with the expected time where it is known."""
        plan = self.plan
        what = f"{'whole rows' if plan.width is None else f'{plan.width}-number sketches'} in {plan.kind}"
        where = f", {plan.cells:,} cells" if plan.cells else ", all pairs"
        on = "" if plan.device == "cpu" else f" on {plan.device}"
        if self.estimate is None:
            return f"{what}{where}{on}"
        found = self.estimate
        return (
            f"{what}{where}{on}: about {found.pairs:.2g} products and {found.candidates:.2g} exact distances,"
            f" {_duration(found.seconds)} of one {'core' if plan.device == 'cpu' else 'device'}"
        )


def make_plan(images: UnitRows, limit: float, *, device: str = "cpu", new_rows: int | None = None) -> Layout:
    """Choose from a sample: code, sketch and cells, for pairs at squared distance `limit` or less.

    With `new_rows` the pairs of all other rows are known, so that fewer pairs are left.
    """
    rows = len(images)
    chunk = _chunk_rows(rows)
    if device != "cpu":
        return lay_out(images, Plan("float16", None, 0, min(chunk, _device_rows(images.dim, device)), device))
    if rows * rows * images.dim <= _SMALL_WORK:
        return lay_out(images, Plan(chunk_rows=chunk))
    sample = _Sample(images, limit, rows if new_rows is None else new_rows)
    best = sample.with_cells(sample.codes())
    return replace(best, plan=replace(best.plan, chunk_rows=chunk))


def lay_out(images: UnitRows, plan: Plan) -> Layout:
    """The arrays of a plan that is given, not chosen."""
    rows = images.float32(_sampled(images))
    sketch = None
    if plan.width is not None or plan.kind == "int8":
        sketch = _sketch(rows, images.dim if plan.width is None else plan.width)
    layout, _ = _coded(plan, sketch, rows)
    return replace(layout, centers=_centers(images, layout, plan.cells)) if plan.cells else layout


def _coded(plan: Plan, sketch: Sketch | None, rows: Float32[np.ndarray, "n dim"]) -> tuple[Layout, np.ndarray]:
    """A layout with a coding for rows like these, and what their codes stand for."""
    if sketch is None:
        return Layout(plan, coding_for(plan.kind, rows, 4 * FLOAT32_ERROR)), rows
    short = sketch.complete(sketch.project(rows))
    return Layout(plan, coding_for(plan.kind, short, sketch.slack), sketch), short


class _Sample:
    """Rows drawn at random, and what a code or a window would do to their pairs."""

    def __init__(self, images: UnitRows, limit: float, new_rows: int) -> None:
        self._pairs = new_rows * (len(images) - new_rows / 2)
        self._reading = len(images) * images.dim * _SECONDS_A_NUMBER
        self._images, self._least, self._limit = images, 1 - limit / 2, limit
        chosen = _sampled(images)
        self._rows = images.float32(chosen)
        self._directions: dict[int, np.ndarray] = {}
        self._exact_seconds = self._time_of_exact(images[chosen[:_EXACT_ROWS]])
        self._near = self._pairs * _share_above(self._rows, self._least)
        self._least_seconds = self._reading + self._near * self._exact_seconds  # whatever the plan

    def codes(self) -> list[Layout]:
        """Sketches and whole rows, each with its estimate for all pairs."""
        kind: CodeType = "int8" if int8_products_are_right() else "float32"
        found: list[Layout] = []
        for width in (width for width in _WIDTHS if width < self._images.dim):
            if found and self._seconds_of_passing(min(found, key=_seconds)) < _WORTH * self._time_of_trial(width):
                break
            found.append(self._sketched(kind, width))
            if _seconds(found[-1]) > 1.05 * min(map(_seconds, found)):
                break
        row_bytes = 4 * self._images.dim
        if row_bytes <= _LARGEST_CODE or row_bytes * len(self._images) <= _WHOLE_ROWS:
            least = self._least_seconds + self._pairs * self._images.dim / _RATE  # of a core twice as fast as assumed
            if not found or least < min(map(_seconds, found)):
                found.append(self._estimated(Plan("float32"), None))
        best = min(found, key=_seconds)
        if kind == "int8" and self._seconds_of_passing(best) > 0.2 * _seconds(best):
            # Too many pairs pass: more of the row, or smaller errors (at tiny thresholds those of int8 count).
            if best.sketch is not None:
                found.append(self._estimated(Plan("float32", best.plan.width), best.sketch))
            if self._seconds_of_passing(best) > _WORTH * 20 * self._images.dim**3 / _RATE:
                found.append(self._estimated(Plan(kind), _sketch(self._rows, self._images.dim)))
        return found

    def with_cells(self, codes: list[Layout]) -> Layout:
        """The cheapest of the codes, each without cells and with as many as pay.

        Doubling the cells may not pay until there are as many as the data have clusters, so all numbers are tried whose
        centers are found in a small part of the time that the best plan so far would take beyond what any plan takes.
        """
        best = min(codes, key=_seconds)
        if len(self._images) < _CELLS_FROM:
            return best
        for width in _TRIAL_WIDTHS[: 1 if len(self._images) < _WIDER_FROM else None]:
            best = self._celled_by(width, codes, best)
        if best.plan.cells and best.centers is None:
            best = replace(best, centers=_centers(self._images, best, best.plan.cells))
        return best

    def _celled_by(self, width: int, codes: list[Layout], best: Layout) -> Layout:
        """The best so far, or a code with windows as a sketch of this width would see them."""
        trial = next((code for code in codes if code.coding.width == width and code.sketch), None)
        if trial is None:
            trial = self._sketched(best.plan.kind, min(width, self._images.dim))
        wide = [trial, *(code for code in codes if code.coding.width > width)]  # narrower ones would see less
        cells = 1 << round(math.log2(1.5 * math.sqrt(len(self._images))))
        while cells <= _MOST_CELLS and self._time_of_centers(cells, trial) < 0.05 * (
            _seconds(best) - self._least_seconds
        ):
            centers = _centers(self._images, trial, cells)
            pairs = self._pairs_in_windows(trial, centers)
            found = min((self._celled(code, cells, pairs) for code in wide), key=_seconds)
            if _seconds(found) < _seconds(best):
                best = replace(found, centers=centers if found.coding == trial.coding else None)
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
        layout, short = _coded(plan, sketch, self._rows)
        passing, candidates = (share * self._pairs for share in self._shares(layout, short))
        seconds = self._seconds_of(layout, self._pairs, candidates) + passing * _SECONDS_A_PASSING
        return replace(layout, estimate=Estimate(self._pairs, candidates, seconds))

    def _shares(self, layout: Layout, short: Float32[np.ndarray, "n width"]) -> tuple[float, float]:
        """The share of pairs that pass the floor of their block, and of those that pass their own."""
        errors = layout.coding.encode(short)[1].astype(np.float64)
        products = short @ short.T
        np.fill_diagonal(products, -2)
        found: list[float] = []
        for error in (errors.max(keepdims=True), errors.mean(keepdims=True)):
            floor = np.float32(layout.coding.floor(self._least, error, error)[0] * layout.coding.unit)
            found.append(float(np.count_nonzero(products >= floor)) / (len(short) * (len(short) - 1)))
        return found[0], found[1]

    def _seconds_of(self, layout: Layout, pairs: float, candidates: float) -> float:
        projecting = len(self._images) * self._images.dim * 2 * layout.coding.width / _RATE
        return (
            self._reading
            + projecting
            + pairs * _time_of_product(layout.coding.kind, layout.coding.width)
            + candidates * self._exact_seconds
        )

    def _seconds_of_passing(self, layout: Layout) -> float:
        """What goes to exact distances of pairs that are not near: the most that a better code could save."""
        assert layout.estimate is not None
        return (layout.estimate.candidates - self._near) * self._exact_seconds

    def _time_of_trial(self, width: int) -> float:
        """About what it takes to estimate a sketch of this width."""
        rows, count = len(self._rows), self._directions_for(width)
        directions = 0 if count in self._directions else 20 * rows * self._images.dim * count / _RATE
        return directions + rows * rows * _SECONDS_A_CENTER

    def _celled(self, flat: Layout, cells: int, pairs: float) -> Layout:
        assert flat.estimate is not None
        rows, width = len(self._images), flat.coding.width
        chunks = math.ceil(rows / _chunk_rows(rows))
        seconds = (
            self._seconds_of(flat, _SMALL_PRODUCTS * pairs, flat.estimate.candidates)
            + rows * cells * (2 * width / _RATE + _SECONDS_A_CENTER)
            + (chunks + 1) * cells * _SECONDS_A_CALL
            + self._time_of_centers(cells, flat)
        )
        return replace(
            flat, plan=replace(flat.plan, cells=cells), estimate=Estimate(pairs, flat.estimate.candidates, seconds)
        )

    def _pairs_in_windows(self, flat: Layout, centers: Float32[np.ndarray, "cells width"]) -> float:
        """How many products windows would leave."""
        find = Windows(centers, self._limit, flat.error)
        home, visits = find(flat.projected(self._rows))
        own = home[:, None] == home[None, :]
        seen = visits[:, home] & ~own  # row i visits the cell of row j
        return 2 * self._pairs * (float(seen.mean()) + float(own.mean()) / 2)

    def _time_of_exact(self, units: Float[np.ndarray, "n dim"]) -> float:
        """Seconds of a candidate, though of those in a crowd few need an exact distance."""
        one, other = np.random.default_rng(2).integers(0, len(units), (2, len(units)))
        return _SECONDS_A_CANDIDATE + _seconds_of(lambda: squared_distances(units[one], units[other])) / len(units)

    def _time_of_centers(self, cells: int, layout: Layout) -> float:
        return _CELL_ROUNDS * _POINTS_PER_CELL * cells * cells * 2 * layout.coding.width / _RATE


class Windows:
    r"""The cell of each row, and the cells it has to be compared with; `cell_windows` in docs/method.md.

    Two rows at most eps apart, of cells A and B, cannot both be further than eps / 2 from the plane half way between
    the two centers: each row visits the cells whose plane is that near, and one of the two visits the other's cell.
    A cell need not be the nearest for this to hold.
    """

    def __init__(self, centers: Float32[np.ndarray, "cells width"], limit: float, error: float) -> None:
        """`error` is how far a row that is asked about may be from what it stands for."""
        exact = centers.astype(np.float64)
        squares = (exact * exact).sum(axis=1)
        apart = np.sqrt(np.clip(squares[:, None] + squares[None, :] - 2 * exact @ exact.T, 0, None) + 1e-12)
        half = math.sqrt(limit) / 2
        # Of two scores: the row's error, that of a float32 product, and some roundings of numbers up to 3.
        margin = 2 * (error + product_error(centers.shape[1]) * (1 + error) + 2.0**-20) * max(1.0, squares.max() ** 0.5)
        self._centers, self._half_squares = centers, (squares / 2).astype(np.float32)
        self._reach = (half * apart * (1 + 1e-6) + margin).astype(np.float32)

    def __call__(
        self, projected: Float32[np.ndarray, "n width"]
    ) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, "n cells"]]:
        if len(projected) > (some := max(8, _SCORES // len(self._centers))):  # scores that stay in the cache
            parts = [self(projected[start : start + some]) for start in range(0, len(projected), some)]
            return np.concatenate([home for home, _ in parts]), np.concatenate([seen for _, seen in parts])
        scores = projected @ self._centers.T
        scores -= self._half_squares
        home = scores.argmax(axis=1)
        scores -= scores[np.arange(len(scores)), home][:, None]
        scores += self._reach[home]
        return home, scores >= 0


def _share_above(rows: Float32[np.ndarray, "n dim"], least: float) -> float:
    """Of all pairs of different rows."""
    products = rows @ rows.T
    return (np.count_nonzero(products >= np.float32(least)) - len(rows)) / (len(rows) * (len(rows) - 1))


def _sketch(rows: Float32[np.ndarray, "n dim"], width: int) -> Sketch:
    dim = rows.shape[1]
    if width >= dim:
        return make_sketch(np.eye(dim), dim)
    return make_sketch(principal_directions(rows, min(max((*_WIDTHS, width)), dim)), width)


def _centers(images: UnitRows, layout: Layout, cells: int) -> Float32[np.ndarray, "cells width"]:
    points = layout.projected(images.float32(_some(len(images), _POINTS_PER_CELL * cells, seed=3)))
    search = faiss.Kmeans(
        points.shape[1],
        min(cells, len(points)),
        niter=_CELL_ROUNDS,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=10**6,
    )
    search.train(points)
    return np.ascontiguousarray(search.centroids)


def _sampled(images: UnitRows) -> Int[np.ndarray, " n"]:
    """Fewer of few rows: the plan should cost little beside the work."""
    return _some(len(images), min(int(_SAMPLE * math.sqrt(len(images))), _LARGEST_SAMPLE), seed=0)


def _some(rows: int, count: int, *, seed: int) -> Int[np.ndarray, " n"]:
    if rows <= count:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, size=count, replace=False))


def _chunk_rows(rows: int) -> int:
    return min(max(math.ceil(rows / _FEWEST_CHUNKS), _LEAST_CHUNK), _LARGEST_CHUNK)


def _device_rows(dim: int, device: str) -> int:
    """Rows of a chunk of which two take a quarter of the device's free memory."""
    if not torch.cuda.is_available():
        return _LARGEST_CHUNK
    free, _ = torch.cuda.mem_get_info(device)
    return max(_LEAST_CHUNK, free // 8 // (2 * dim))


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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
