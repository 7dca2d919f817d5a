"""Rounds of spherical k-means that read their rows in blocks each time, so the rows need not fit in memory."""

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int

from clip_cid.method.cluster.nearest_centers import BLOCK_ROWS, TIED, CenterSearch
from clip_cid.method.unit_rows import UnitRows

WHOLE = 2.0**32  # a coordinate is multiplied by this and rounded to a whole number
CENTER_BLOCK = 8192


@runtime_checkable
class Sums(Protocol):
    """Sums of unit rows by cluster."""

    @property
    def sizes(self) -> Int[np.ndarray, " centers"]:
        """Rows of each cluster."""
        ...

    def __getitem__(self, clusters: slice, /) -> Float64[np.ndarray, "n dim"]: ...

    def blocks(self) -> Iterator[slice]:
        """Slices that cover all clusters in order."""
        ...


@runtime_checkable
class RoundWork(Protocol):
    """Who does the passes over all rows of a round: this process, or tasks."""

    def assign(self, centers: Float32[np.ndarray, "centers dim"], /) -> Sums:
        """Find the nearest center of each row; returns the sums of the rows by center."""
        ...

    def farthest(self, centers: Float32[np.ndarray, "centers dim"], count: int, /) -> Int[np.ndarray, " farthest"]:
        """At most `count` rows that are not at their center as just assigned, as `lowest` orders them."""
        ...


class DirectionSums:
    """Sums of unit rows by cluster, in whole numbers of 2^-32.

    Whole numbers add up to the same in any order: a row can be taken out of one sum and put into another, and nothing
    depends on blocks or threads. A coordinate is off by 2^-33 a row at most; up to 2^31 rows fit.
    """

    def __init__(self, num_centers: int, dim: int) -> None:
        self.sizes = np.zeros(num_centers, dtype=np.int64)
        self._changed = np.zeros(num_centers, dtype=bool)
        self._sums = torch.from_numpy(np.zeros((num_centers, dim), dtype=np.int64))  # untouched it takes no memory

    def move(
        self,
        unit: Float32[np.ndarray, "n dim"],
        old: Int[np.ndarray, " n"],
        new: Int[np.ndarray, " n"],
    ) -> None:
        """Take rows out of their old clusters (-1 is none) and put them into their new ones."""
        whole = torch.from_numpy(unit).double().mul_(WHOLE).round_().long()
        self._sums.index_add_(0, torch.from_numpy(new.astype(np.int64)), whole)
        np.add.at(self.sizes, new, 1)
        self._changed[new] = True

        leave = np.flatnonzero(old >= 0)
        if len(leave):
            self._sums.index_add_(0, torch.from_numpy(old[leave].astype(np.int64)), whole[leave], alpha=-1)
            np.subtract.at(self.sizes, old[leave], 1)
            self._changed[old[leave]] = True

    def changes(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, "n dim"]]:
        """The clusters that rows were moved to or from, and their sizes and sums as whole numbers."""
        changed = np.flatnonzero(self._changed)
        return changed, self.sizes[changed], self._sums.numpy()[changed]

    def __getitem__(self, clusters: slice) -> Float64[np.ndarray, "n dim"]:
        return self._sums[clusters].double().div_(WHOLE).numpy()

    def blocks(self) -> Iterator[slice]:
        """Slices that cover all clusters in order."""
        for start in range(0, len(self.sizes), CENTER_BLOCK):
            yield slice(start, min(start + CENTER_BLOCK, len(self.sizes)))


def kmeans_rounds(
    images: UnitRows,
    centers: Float32[np.ndarray, "centers dim"],
    *,
    rounds: int,
    device: str = "cpu",
    work: RoundWork | None = None,
) -> Iterator[tuple[Float32[np.ndarray, "centers dim"], dict[str, float]]]:
    """Lloyd's rounds from given centers.

    A center without rows, or whose rows cancel out, moves to one of the rows farthest from their centers, each to a
    different one; if there is none, it stays. Equal arguments give equal bits whatever the threads, the blocks or
    the device. A round depends on its centers alone, so the rounds can be resumed from them.

    Args:
        images: The rows.
        centers: To begin with.
        rounds: How many.
        device: Where products are computed.
        work: Who passes over the rows; this process when None.

    Yields:
        After each round the new centers, and of the centers it began with: `objective`, `imbalance` (the mean size of
        a row's cluster over the mean size; 1 is even) and `empty` (centers without rows or direction).
    """
    work = work or _InThisProcess(images, len(centers), device)
    stats: dict[str, float] = {}
    converged = False

    for _ in range(rounds):
        if not converged:
            sums = work.assign(centers)
            new_centers, empty = _directions(sums, centers)
            stats = {
                "objective": _objective(sums, centers, len(images)),
                "imbalance": float(((sums.sizes / len(images)) ** 2).sum()) * len(centers),
                "empty": len(empty),
            }
            if len(empty):
                _reseed(new_centers, empty, images, work.farthest(centers, 4 * len(empty)))

            converged = np.array_equal(new_centers, centers)  # all later rounds repeat this one
            centers = new_centers

        yield centers, stats


class _InThisProcess:
    """The passes over the rows, one block after the other."""

    def __init__(self, images: UnitRows, num_centers: int, device: str) -> None:
        self._images, self._device = images, device
        self._labels = np.full(len(images), -1, dtype=np.int32)
        self._sums = DirectionSums(num_centers, images.dim)

    def assign(self, centers: Float32[np.ndarray, "centers dim"]) -> Sums:
        search = CenterSearch(UnitRows(centers, name="centers", any_length=True), device=self._device)
        assign_and_add(self._images, search, self._labels, self._sums)
        return self._sums

    def farthest(self, centers: Float32[np.ndarray, "centers dim"], count: int) -> Int[np.ndarray, " farthest"]:
        unit_centers = UnitRows(centers, name="centers", any_length=True)
        return lowest(own_cosines(self._images, unit_centers, self._labels), count)


def assign_and_add(
    images: UnitRows, search: CenterSearch, labels: Int[np.ndarray, " rows"], sums: DirectionSums
) -> None:
    """Update the labels and the sums: only rows that change their cluster are subtracted and added."""
    for block, nearest, unit in search.over(images):
        moved = np.flatnonzero(nearest != labels[block])
        sums.move(unit[moved], labels[block][moved], nearest[moved])
        labels[block] = nearest


def add_rows(images: UnitRows, labels: Int[np.ndarray, " rows"], sums: DirectionSums) -> None:
    """Put all rows into their clusters."""
    for block in images.blocks(BLOCK_ROWS):
        unit = images.float32(block)
        sums.move(unit, np.full(len(unit), -1), labels[block])


def own_cosines(
    images: UnitRows, unit_centers: UnitRows, labels: Int[np.ndarray, " rows"]
) -> Float64[np.ndarray, " rows"]:
    """The cosine of each row with its center."""
    cosines = np.empty(len(images))
    for block in images.blocks(BLOCK_ROWS):
        cosines[block] = (images[block] * unit_centers[labels[block]]).sum(axis=1)
    return cosines


def _objective(sums: Sums, centers: Float32[np.ndarray, "centers dim"], rows: int) -> float:
    return 2 - 2 * math.fsum(float((sums[block] * centers[block]).sum()) for block in sums.blocks()) / rows


def _directions(
    sums: Sums, centers: Float32[np.ndarray, "centers dim"]
) -> tuple[Float32[np.ndarray, "centers dim"], Int[np.ndarray, " empty"]]:
    """The directions of the sums; centers whose sum is zero stay where they are, and their numbers are returned."""
    directions = centers.copy()
    empty: list[np.ndarray] = []
    for block in sums.blocks():
        total = sums[block]
        lengths = np.sqrt((total * total).sum(axis=1))
        has_direction = lengths > 0
        directions[block][has_direction] = total[has_direction] / lengths[has_direction, None]
        empty.append(block.start + np.flatnonzero(~has_direction))
    return directions, np.concatenate(empty)


def _reseed(
    new_centers: Float32[np.ndarray, "centers dim"],
    empty: Int[np.ndarray, " empty"],
    images: UnitRows,
    farthest: Int[np.ndarray, " farthest"],
) -> None:
    """Move the empty centers to the rows farthest from their own; rows that are equal count once."""
    used: set[bytes] = set()
    for row in farthest:
        unit = images.float32(np.array([row]))[0]
        if unit.tobytes() not in used:
            new_centers[empty[len(used)]] = unit
            used.add(unit.tobytes())
            if len(used) == len(empty):
                return


def lowest(cosines: Float64[np.ndarray, " rows"], count: int) -> Int[np.ndarray, " lowest"]:
    """At most `count` rows that are not at their center, the farthest first, and of equally far ones the first."""
    limit = np.partition(cosines, count - 1)[count - 1] if count < len(cosines) else np.inf
    rows = np.flatnonzero((cosines <= limit) & (cosines < 1 - TIED))
    return rows[np.argsort(cosines[rows], kind="stable")][:count]
