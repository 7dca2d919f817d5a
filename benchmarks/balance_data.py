"""Synthetic unit embeddings with planted duplicates, for `balance_speed.py`; float16 rows in a .npy, made in blocks.

    python benchmarks/balance_data.py pow 100000 512 FOLDER

`pow`, and in what the others differ from it (the numbers are choices of ours, not measurements of CLIP):

- pow: variances 1 / (i + 5) along the axes of a random rotation (so that no method gains from the order of columns);
  half of the variance lies between rows / 100 clusters; a common mean puts the mean cosine of two rows at about 0.30.
  45 % of the rows are planted duplicates of the others: 20 % of them bit for bit, the rest at a cosine distance
  log-uniform in 1e-4..0.15 from their original, in a random direction of the same spectrum. Copies of one original:
  Zipf with exponent 2.2, at most 100.
- flat: the noise and the directions of the duplicates are isotropic (the clusters keep the spectrum).
- soft: rows / 10 clusters with a fifth of the variance.
- tight: rows / 1000 clusters with four fifths of the variance.
- cont: no clusters.
- outlier: four columns 20 times the others before rows are normalized (which moves the mean cosine).
- heavy: 6 % of the rows are near-copies of one, 0.005 to 0.02 from each other.
- clique: 99 % of the rows are such near-copies of one.
- drift: min(5000, rows / 4) rows are a random walk with steps of 0.005, so that all of them chain into one set.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Kind = Literal["pow", "tight", "flat", "soft", "cont", "outlier", "heavy", "clique", "drift"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PLANTED, IDENTICAL, NEAREST, FARTHEST = 0.45, 0.20, 1e-4, 0.15
MEAN_COSINE = 0.30
ZIPF, MOST_COPIES = 2.2, 100
_VERSION = 1  # raise it when equal arguments would give other rows
_BLOCK = 8192


def dataset(kind: Kind, rows: int, dim: int, folder: Path, *, seed: int = 0) -> Path:
    """The .npy of these rows, written when it is not there yet."""
    path = folder / f"{kind}-{rows}x{dim}-seed{seed}-v{_VERSION}.npy"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(rows, dim))
        place, filled = np.random.default_rng([seed, 1]).permutation(rows), 0
        for block in _blocks(kind, rows, dim, seed):
            out[place[filled : filled + len(block)]] = block
            filled += len(block)
        assert filled == rows, (filled, rows)
        out.flush()
        del out
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def mean_cosine(path: Path, *, sample: int = 2048) -> float:
    """Of two different rows, from a sample."""
    rows = np.load(path, mmap_mode="r")
    some = np.random.default_rng(0).choice(len(rows), min(sample, len(rows)), replace=False)
    total = rows[np.sort(some)].astype(np.float64).sum(axis=0)
    return float((total @ total - len(some)) / (len(some) * (len(some) - 1)))


@dataclass(frozen=True)
class _World:
    """Where rows of a kind come from."""

    mean: np.ndarray
    centers: np.ndarray | None
    """Clusters, already at the right variance; None for no clusters."""
    noise: np.ndarray
    """Standard deviations along the axes of `turn`; of length 1 in all."""
    noise_share: float
    """Standard deviation of a row around its cluster."""
    turn: np.ndarray
    scale: np.ndarray
    """A factor for each column, applied before rows are normalized."""

    def directions(self, count: int, random: np.random.Generator) -> np.ndarray:
        return (random.standard_normal((count, len(self.noise)), dtype=np.float32) * self.noise) @ self.turn

    def originals(self, count: int, random: np.random.Generator) -> np.ndarray:
        rows = self.mean + np.float32(self.noise_share) * self.directions(count, random)
        if self.centers is not None:
            rows += self.centers[random.integers(0, len(self.centers), count)]
        return _unit(rows * self.scale)


def _world(kind: Kind, rows: int, dim: int, random: np.random.Generator) -> _World:
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
    spectrum = np.sqrt(1 / (np.arange(dim) + 5.0))
    spectrum = (spectrum / np.linalg.norm(spectrum)).astype(np.float32)
    noise = np.full(dim, dim**-0.5, dtype=np.float32) if kind == "flat" else spectrum
    mean = _unit(random.standard_normal((1, dim), dtype=np.float32))[0] * (MEAN_COSINE / (1 - MEAN_COSINE)) ** 0.5

    clusters, between = {"soft": (rows // 10, 0.2), "tight": (rows // 1000, 0.8), "cont": (0, 0.0)}.get(
        kind, (rows // 100, 0.5)
    )
    centers = None
    if clusters:
        drawn = random.standard_normal((clusters, dim), dtype=np.float32) * spectrum
        centers = (drawn @ turn) * np.float32(between**0.5)

    scale = np.ones(dim, dtype=np.float32)
    if kind == "outlier":
        scale[random.choice(dim, 4, replace=False)] = 20
    return _World(mean.astype(np.float32), centers, noise, (1 - between) ** 0.5, turn, scale)


def _blocks(kind: Kind, rows: int, dim: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng([seed, 0])
    world = _world(kind, rows, dim, random)

    # Rows of which a kind has its name.
    special = 0
    if kind in ("heavy", "clique"):
        special = int((0.06 if kind == "heavy" else 0.99) * rows)
        yield from _near_copies(special, dim, world, random)
    elif kind == "drift":
        special = min(5000, rows // 4)
        yield _walk(special, dim, random)

    # Originals, and behind each block its duplicates.
    copies = _copies(rows - special, random)
    for start in range(0, len(copies), _BLOCK):
        some = copies[start : start + _BLOCK]
        originals = world.originals(len(some), random)
        yield originals.astype(np.float16)
        of = np.repeat(np.arange(len(some)), some)
        for at in range(0, len(of), _BLOCK):
            around = originals[of[at : at + _BLOCK]]
            distance = np.exp(random.uniform(np.log(NEAREST), np.log(FARTHEST), len(around)))
            distance[random.random(len(around)) < IDENTICAL] = 0
            directions = world.directions(len(around), random) * world.scale
            yield _at_distance(around, distance, directions).astype(np.float16)


def _copies(rows: int, random: np.random.Generator) -> np.ndarray:
    """How many duplicates each original has; rows = originals + duplicates."""
    planted = int(PLANTED * rows)
    drawn = np.empty(0, dtype=np.int64)
    while drawn.sum() < planted:
        drawn = np.concatenate([drawn, np.minimum(random.zipf(ZIPF, 1 + planted // 4), MOST_COPIES)])
    drawn = drawn[: 1 + int(np.searchsorted(np.cumsum(drawn), planted))]
    drawn[-1] -= drawn.sum() - planted
    copies = np.zeros(rows - planted, dtype=np.int64)
    copies[random.choice(len(copies), len(drawn), replace=False)] = drawn
    return copies


def _near_copies(rows: int, dim: int, world: _World, random: np.random.Generator) -> Iterator[np.ndarray]:
    one = world.originals(1, random)
    for start in range(0, rows, _BLOCK):
        count = min(_BLOCK, rows - start)
        directions = random.standard_normal((count, dim), dtype=np.float32)
        distance = random.uniform(0.004, 0.008, count)  # of two rows: about the sum of theirs
        yield _at_distance(np.repeat(one, count, axis=0), distance, directions).astype(np.float16)


def _walk(steps: int, dim: int, random: np.random.Generator) -> np.ndarray:
    walk = np.empty((steps, dim), dtype=np.float32)
    here = _unit(random.standard_normal((1, dim), dtype=np.float32))
    for step in range(steps):
        walk[step] = here
        here = _at_distance(here, np.array([0.005]), random.standard_normal((1, dim), dtype=np.float32))
    return walk.astype(np.float16)


def _at_distance(units: np.ndarray, distance: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Unit rows at this cosine distance from `units`, on the side of `directions`; distance 0 gives the same bits."""
    directions = directions - (directions * units).sum(axis=1, keepdims=True) * units
    cosine = (1 - distance).astype(np.float32)[:, None]
    sine = np.sqrt(distance * (2 - distance)).astype(np.float32)[:, None]
    return np.where(distance[:, None] == 0, units, cosine * units + sine * _unit(directions))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in KINDS:
        sys.exit(__doc__)
    made = dataset(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    print(f"{made}: mean cosine {mean_cosine(made):.3f}, sha256 {sha256(made)}")
