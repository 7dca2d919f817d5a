"""How to search for near pairs. A plan changes time and memory, never the pairs."""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int

from clip_cid import units
from clip_cid.method.balance.sketch import Sketch, make_sketch, principal_directions
from clip_cid.method.codes import CodeType, Coding, coding_for
from clip_cid.method.unit_rows import FLOAT32_ERROR, UnitRows

WIDTHS = (64, 96, 128, 192, 256)
"""Numbers in a sketch that are tried."""
CELL_ROUNDS, POINTS_PER_CELL = 4, 16
"""Rounds of the k-means that places the centers of cells, and its points per cell."""

_SAMPLE, _LARGEST_SAMPLE = 6, 2048  # the first times the root of the number of rows
_LARGEST_CHUNK = 1 << 20
_CACHED_SCORES = 1 << 18  # so many stay in the cache


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
    """Rows of a chunk: all pairs of two chunks are compared together."""
    device: str = "cpu"
    """Where the products are computed."""
    tile_chunks: int = 1
    """A task compares so many chunks with so many: more of them need fewer reads, and give longer tasks."""

    def __post_init__(self) -> None:
        if self.device != "cpu" and (self.kind == "int8" or self.cells):
            raise ValueError(f"a plan for a device has floats and no cells, got {self}")
        if self.chunk_rows < 1 or self.tile_chunks < 1 or self.cells < 0 or (self.width is not None and self.width < 1):
            raise ValueError(f"a plan has width, chunk_rows and tile_chunks >= 1 and cells >= 0, got {self}")


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a plan, from a sample."""

    pairs: float
    """Pairs of codes to multiply."""
    candidates: float
    """Pairs whose distance is computed exactly."""
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
        """How far a projected row may be from its exact projection."""
        return 2 * FLOAT32_ERROR if self.sketch is None else self.sketch.error

    def projected(self, rows: Float32[np.ndarray, "n dim"]) -> Float32[np.ndarray, "n width"]:
        """What the windows are computed from."""
        return rows if self.sketch is None else self.sketch.project(rows)

    def completed(self, projected: Float32[np.ndarray, "n width"]) -> Float32[np.ndarray, "n width"]:
        """What the codes stand for."""
        return projected if self.sketch is None else self.sketch.complete(projected)

    def describe(self) -> str:
        """The plan in one line, with the expected time if it is known."""
        plan = self.plan
        what = f"{'whole rows' if plan.width is None else f'{plan.width}-number sketches'} in {plan.kind}"
        where = f", {plan.cells:,} cells" if plan.cells else ", all pairs"
        on = "" if plan.device == "cpu" else f" on {plan.device}"
        if self.estimate is None:
            return f"{what}{where}{on}"
        cost = self.estimate
        return (
            f"{what}{where}{on}: about {cost.pairs:.2g} products and {cost.candidates:.2g} exact distances,"
            f" {units.duration(cost.seconds)} of one {'core' if plan.device == 'cpu' else 'device'}"
        )


def lay_out(images: UnitRows, plan: Plan) -> Layout:
    """The arrays of a plan that is given, not chosen."""
    rows = images.float32(sampled_rows(images))
    sketch = None
    if plan.width is not None or plan.kind == "int8":
        sketch = make_row_sketch(rows, images.dim if plan.width is None else plan.width)
    layout, _ = coded(plan, sketch, rows)
    return replace(layout, centers=cell_centers(images, layout, plan.cells)) if plan.cells else layout


def coded(plan: Plan, sketch: Sketch | None, rows: Float32[np.ndarray, "n dim"]) -> tuple[Layout, np.ndarray]:
    """A layout with a coding for rows like these, and what their codes stand for."""
    if sketch is None:
        return Layout(plan, coding_for(plan.kind, rows, 4 * FLOAT32_ERROR)), rows
    short = sketch.complete(sketch.project(rows))
    return Layout(plan, coding_for(plan.kind, short, sketch.slack), sketch), short


def make_row_sketch(rows: Float32[np.ndarray, "n dim"], width: int) -> Sketch:
    """A sketch of `width` numbers for rows like these, or a turned copy of the whole row."""
    dim = rows.shape[1]
    if width >= dim:
        return make_sketch(np.eye(dim), dim)
    return make_sketch(principal_directions(rows, min(max((*WIDTHS, width)), dim)), width)


def cell_centers(images: UnitRows, layout: Layout, cells: int) -> Float32[np.ndarray, "cells width"]:
    """A few rounds of k-means on a sample, from centers that are rows; the center of an empty cell stays."""
    points = layout.projected(images.float32(_some(len(images), POINTS_PER_CELL * cells, seed=3)))
    centers = points[_some(len(points), cells, seed=1)]
    block_rows = max(8, _CACHED_SCORES // len(centers))
    nearest = np.empty(len(points), dtype=np.int64)

    for _ in range(CELL_ROUNDS):
        half_squares = (centers * centers).sum(axis=1) / 2
        for start in range(0, len(points), block_rows):
            block = slice(start, start + block_rows)
            scores = points[block] @ centers.T
            scores -= half_squares
            nearest[block] = scores.argmax(axis=1)

        order = np.argsort(nearest, kind="stable")
        cells_with_rows, starts = np.unique(nearest[order], return_index=True)
        sizes = np.diff(starts, append=len(points)).astype(np.float32)
        centers = centers.copy()
        centers[cells_with_rows] = np.add.reduceat(points[order], starts) / sizes[:, None]

    return centers


def sampled_rows(images: UnitRows) -> Int[np.ndarray, " n"]:
    """Row numbers drawn at random; of few rows fewer, since the plan should cost little beside the work."""
    return _some(len(images), min(int(_SAMPLE * math.sqrt(len(images))), _LARGEST_SAMPLE), seed=0)


def _some(rows: int, count: int, *, seed: int) -> Int[np.ndarray, " n"]:
    if rows <= count:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, size=count, replace=False))
