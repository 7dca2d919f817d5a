"""Rows near the rows of another set, such as the images that a model is going to be evaluated on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_cid.devices import Begun, Beside, Copies, one_ahead
from clip_cid.method.balance.decided_sets import DecidedRows
from clip_cid.method.distances import squared_distances
from clip_cid.method.products import LeftRows
from clip_cid.method.unit_rows import UnitRows

_BLOCK = 4096  # rows and targets that are multiplied at once
_PAIRS = 1 << 14  # measured in float64 at once


@dataclass(frozen=True, eq=False)
class NearTargets:
    """Every row that has a target within the limit, and the nearest one; of equally near ones the lowest."""

    rows: Int[np.ndarray, " near"]
    """Ascending."""
    target: Int[np.ndarray, " near"]
    squared: Float[np.ndarray, " near"]
    """Squared Euclidean distances of the unit vectors, float64."""

    def within(self, squared: float) -> "NearTargets":
        """Those at this squared distance or nearer."""
        inside = self.squared <= squared
        return NearTargets(self.rows[inside], self.target[inside], self.squared[inside])


class KeptAndNear(ValueError):
    """Rows that must be kept are near targets, whose neighbors must be removed."""

    def __init__(self, rows: Int[np.ndarray, " rows"]) -> None:
        super().__init__(f"{len(rows)} rows must be kept and are near a target, the first is row {rows[0]}")
        self.rows = rows


def without_near(decided: DecidedRows | None, near: Sequence[NearTargets], squared: float) -> DecidedRows | None:
    """The decisions, with the rows that are near a target at this squared distance to be removed.

    Raises:
        KeptAndNear: Some of these rows must be kept.
    """
    rows = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(one.within(squared).rows for one in near)]))
    if not len(rows):
        return decided
    decided = decided or DecidedRows()
    if len(both := np.intersect1d(rows, decided.keep)):
        raise KeptAndNear(both)
    return replace(decided, remove=np.union1d(decided.remove, rows))


def near_targets(
    images: UnitRows,
    targets: UnitRows,
    limit: float,
    *,
    device: str = "cpu",
    on_progress: Callable[[int], Any] | None = None,
) -> NearTargets:
    """Compare every row with every target; `balance_against` in docs/method.md.

    Products in float32 say which pairs may be near, and the distances in float64 decide, so device and blocks do not
    change the result.

    Args:
        images: The rows.
        targets: Of the same width.
        limit: A squared distance.
        device: Where the products are computed, for torch.
        on_progress: Called with the number of rows compared since the last call.

    Raises:
        ValueError: The widths differ.
    """
    if images.dim != targets.dim:
        raise ValueError(f"targets must have the width of the rows, {images.dim}, got {targets.dim}")
    # Twice what float32 can be wrong by, in its inputs and in a sum of so many products in any order.
    slack = 2 * (images.dim + 8) * 2.0**-24
    where = torch.device(device)
    copies, beside = Copies(where), Beside(where)
    target_blocks = [
        (start, copies(torch.from_numpy(targets.float32(slice(start, start + _BLOCK)))))
        for start in range(0, len(targets), _BLOCK)
    ]

    found: list[NearTargets] = []
    for first in range(0, len(images), _BLOCK):
        some = slice(first, min(first + _BLOCK, len(images)))
        left = LeftRows(copies(torch.from_numpy(images.float32(some))))
        nearest, squared = np.full(some.stop - first, -1), np.full(some.stop - first, np.inf)

        def multiply(start_and_block: tuple[int, Tensor], left: LeftRows = left) -> tuple[int, Begun[Tensor]]:
            start, block = start_and_block
            return start, beside.begun(left.times(block))

        # A device multiplies the next block while the host looks at one.
        for start, begun in one_ahead(target_blocks, multiply, where):
            with begun.waited_for() as cosines:
                least = cosines.amax(dim=1, keepdim=True).clamp_min(1 - limit / 2) - slack
                row, target = (each.cpu().numpy() for each in (cosines >= least).nonzero(as_tuple=True))
            _keep_nearest(images, targets, row, target + start, first, nearest, squared)

        near = np.flatnonzero(squared <= limit)
        found.append(NearTargets(first + near, nearest[near], squared[near]))
        if on_progress is not None:
            on_progress(some.stop - first)
    return NearTargets(
        *(np.concatenate([getattr(one, name) for one in found]) for name in ("rows", "target", "squared"))
    )


def _keep_nearest(
    images: UnitRows,
    targets: UnitRows,
    row: Int[np.ndarray, " pairs"],
    target: Int[np.ndarray, " pairs"],
    first: int,
    nearest: Int[np.ndarray, " block"],
    squared: Float[np.ndarray, " block"],
) -> None:
    """Measure pairs, and note for each row of the block the nearest target so far."""
    for start in range(0, len(row), _PAIRS):
        rows, others = row[start : start + _PAIRS], target[start : start + _PAIRS]
        distances = squared_distances(images[first + rows], targets[others])
        order = np.lexsort((others, distances, rows))
        each, place = np.unique(rows[order], return_index=True)
        best = order[place]
        better = distances[best] < squared[each]  # targets come ascending, so of equal ones the first stays
        nearest[each[better]], squared[each[better]] = others[best[better]], distances[best[better]]
