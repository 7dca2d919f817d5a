"""Spherical k-means that reads its rows in blocks, at every round anew: they need not fit in memory."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int

from clip_cid.method.cluster.nearest_centers import BLOCK_ROWS, TIED, CenterSearch
from clip_cid.method.unit_rows import UnitRows

_UNIT = 2.0**32  # what a number is multiplied by before it is rounded to whole ones
_CENTER_BLOCK = 8192
_FLAT_BELOW = 64  # so few centers start as rows drawn at random
_START_POINTS, _START_ROUNDS = 100, 10  # rows of a center, and rounds at each of the two levels
_GROUP_POINTS = 256  # rows of a group at the first level


class DirectionSums:
    """Sums of unit rows by cluster, in whole numbers of 2^-32.

    Whole numbers add up to the same in any order: a row can be taken out of one sum and put into another, and nothing
    depends on blocks or threads. A coordinate is off by 2^-33 a row at most; up to 2^31 rows fit.
    """

    def __init__(self, num_centers: int, dim: int) -> None:
        self.sizes = np.zeros(num_centers, dtype=np.int64)
        self._sums = torch.zeros((num_centers, dim), dtype=torch.int64)

    def move(
        self,
        unit: Float32[np.ndarray, "n dim"],
        old: Int[np.ndarray, " n"],
        new: Int[np.ndarray, " n"],
    ) -> None:
        """Take rows out of their old clusters (-1 is none) and put them into their new ones."""
        whole = torch.from_numpy(unit).double().mul_(_UNIT).round_().long()
        self._sums.index_add_(0, torch.from_numpy(new.astype(np.int64)), whole)
        self.sizes += np.bincount(new, minlength=len(self.sizes))
        leave = np.flatnonzero(old >= 0)
        if len(leave):
            self._sums.index_add_(0, torch.from_numpy(old[leave].astype(np.int64)), whole[leave], alpha=-1)
            self.sizes -= np.bincount(old[leave], minlength=len(self.sizes))

    def __getitem__(self, some: slice) -> Float64[np.ndarray, "n dim"]:
        return self._sums[some].double().div_(_UNIT).numpy()

    def blocks(self) -> Iterator[slice]:
        """Slices that cover all clusters in order."""
        for start in range(0, len(self.sizes), _CENTER_BLOCK):
            yield slice(start, min(start + _CENTER_BLOCK, len(self.sizes)))


def block_rounds(
    images: UnitRows,
    centers: Float32[np.ndarray, "centers dim"],
    *,
    rounds: int,
    device: str = "cpu",
    block_rows: int = BLOCK_ROWS,
) -> Iterator[tuple[Float32[np.ndarray, "centers dim"], dict[str, float]]]:
    """Lloyd's rounds from given centers: after each the new centers, and what it found with those it began with.

    A center that has no rows, or whose rows cancel out, becomes one of the rows that are served worst, each a different
    one; where there is none, it stays. Equal arguments give equal bits whatever the threads, `block_rows` or the
    device; a round depends on its centers only, so that later ones can be had by starting from them.

    Yields:
        The centers, and `objective`, `imbalance` (1 is even: the mean size of a row's cluster over the mean size) and
        `empty` (centers without rows or direction).
    """
    labels = np.full(len(images), -1, dtype=np.int32)
    sums = DirectionSums(len(centers), images.dim)
    stats: dict[str, float] = {}
    settled = False
    for _ in range(rounds):
        if not settled:
            _assign_and_add(images, centers, labels, sums, device, block_rows)
            found, lost = _next_centers(sums, centers)
            stats = {
                "objective": _objective(sums, centers, len(images)),
                "imbalance": float(((sums.sizes / len(images)) ** 2).sum()) * len(centers),
                "empty": len(lost),
            }
            if len(lost):
                _reseed(found, lost, images, centers, labels)
            settled = np.array_equal(found, centers)  # then all later rounds are this one again
            centers = found
        yield centers, stats


def two_level_start(
    images: UnitRows, num_centers: int, *, seed: int, device: str = "cpu"
) -> Float32[np.ndarray, "centers dim"]:
    """Centers to start from: about sqrt(K) groups of a sample, and in each its share of the centers; `two_level_start`.

    A group of n_g of the sample's n rows gets K n_g / n centers, rounded so that they add up. Both levels take ten rounds,
    in which a row is compared with about sqrt(K) centers only. Fewer than 64 centers are rows drawn at random.
    """
    random = np.random.default_rng([seed, 0])
    if num_centers < _FLAT_BELOW:
        return _some_rows(images, num_centers, random)
    sample = images
    if len(images) > _START_POINTS * num_centers:
        sample = images.part(_drawn(len(images), _START_POINTS * num_centers, random))
    groups = round(math.sqrt(num_centers))
    coarse = sample.part(_drawn(len(sample), min(len(sample), _GROUP_POINTS * groups), random))
    middles = _last(coarse, _some_rows(coarse, groups, random), device)
    group_of = assign_rows(sample, CenterSearch(UnitRows(middles, name="centers", any_length=True), device=device))
    sizes = np.bincount(group_of, minlength=groups)
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1])
    centers: list[np.ndarray] = []
    for own, count in zip(members, _shares(sizes, num_centers), strict=True):
        if count:
            group = sample.part(own)
            centers.append(_last(group, _some_rows(group, int(count), random), device))
    return np.concatenate(centers)


def assign_rows(images: UnitRows, search: CenterSearch, block_rows: int = BLOCK_ROWS) -> Int[np.ndarray, " rows"]:
    """The nearest center of each row."""
    labels = np.empty(len(images), dtype=np.int32)
    for block in images.blocks(block_rows):
        labels[block], _ = search.nearest(images, block)
    return labels


def _assign_and_add(
    images: UnitRows,
    centers: Float32[np.ndarray, "centers dim"],
    labels: Int[np.ndarray, " rows"],
    sums: DirectionSums,
    device: str,
    block_rows: int,
) -> None:
    """Bring labels and sums up to date: only rows that change their cluster are added and taken away."""
    search = CenterSearch(UnitRows(centers, name="centers", any_length=True), device=device)
    for block in images.blocks(block_rows):
        nearest, unit = search.nearest(images, block)
        moved = np.flatnonzero(nearest != labels[block])
        sums.move(unit[moved], labels[block][moved], nearest[moved])
        labels[block] = nearest


def _objective(sums: DirectionSums, centers: Float32[np.ndarray, "centers dim"], rows: int) -> float:
    return 2 - 2 * math.fsum(float((sums[some] * centers[some]).sum()) for some in sums.blocks()) / rows


def _next_centers(
    sums: DirectionSums, centers: Float32[np.ndarray, "centers dim"]
) -> tuple[Float32[np.ndarray, "centers dim"], Int[np.ndarray, " lost"]]:
    """The directions of the sums, and the centers that have none: they stay what they were."""
    found = centers.copy()
    lost: list[np.ndarray] = []
    for some in sums.blocks():
        total = sums[some]
        lengths = np.sqrt((total * total).sum(axis=1))
        has = lengths > 0
        found[some][has] = total[has] / lengths[has, None]
        lost.append(some.start + np.flatnonzero(~has))
    return found, np.concatenate(lost)


def _reseed(
    found: Float32[np.ndarray, "centers dim"],
    lost: Int[np.ndarray, " lost"],
    images: UnitRows,
    centers: Float32[np.ndarray, "centers dim"],
    labels: Int[np.ndarray, " rows"],
) -> None:
    """Put the rows with the lowest cosines to their centers in the places of the lost ones; equal rows count once."""
    served = UnitRows(centers, name="centers", any_length=True)
    cosines = np.empty(len(images))
    for block in images.blocks(BLOCK_ROWS):
        cosines[block] = (images[block] * served[labels[block]]).sum(axis=1)
    seen: set[bytes] = set()
    for row in _lowest(cosines, 4 * len(lost)):
        unit = images.float32(np.array([row]))[0]
        if unit.tobytes() not in seen:
            found[lost[len(seen)]] = unit
            seen.add(unit.tobytes())
            if len(seen) == len(lost):
                return


def _lowest(cosines: Float64[np.ndarray, " rows"], count: int) -> Int[np.ndarray, " some"]:
    """At most `count` rows that are not at their center, the farthest first, and of equally far ones the first."""
    limit = np.partition(cosines, count - 1)[count - 1] if count < len(cosines) else np.inf
    rows = np.flatnonzero((cosines <= limit) & (cosines < 1 - TIED))
    return rows[np.argsort(cosines[rows], kind="stable")][:count]


def _shares(sizes: Int[np.ndarray, " groups"], total: int) -> Int[np.ndarray, " groups"]:
    """`total` divided in proportion to the sizes: rounded down, the rest to the largest remainders."""
    exact = sizes * (total / sizes.sum())
    shares = np.minimum(np.floor(exact).astype(np.int64), sizes)
    short = total - int(shares.sum())
    room = np.flatnonzero(shares < sizes)
    shares[room[np.argsort((shares - exact)[room], kind="stable")][:short]] += 1
    return shares


def _last(
    images: UnitRows, centers: Float32[np.ndarray, "centers dim"], device: str
) -> Float32[np.ndarray, "centers dim"]:
    for found, _ in block_rounds(images, centers, rounds=_START_ROUNDS, device=device):
        centers = found
    return centers


def _some_rows(images: UnitRows, count: int, random: np.random.Generator) -> Float32[np.ndarray, "count dim"]:
    return images[_drawn(len(images), count, random)].astype(np.float32)


def _drawn(rows: int, count: int, random: np.random.Generator) -> Int[np.ndarray, " count"]:
    return np.sort(random.choice(rows, size=count, replace=False))
