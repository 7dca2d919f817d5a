"""Which sets of duplicates are worth looking at: the largest, those at the threshold, and some at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from clip_cid.figures import style

Stratum = Literal["largest", "at the threshold", "random"]
STRATA: tuple[Stratum, ...] = ("largest", "at the threshold", "random")
_BLOCK_ROWS = 65_536
_MOST_SHOWN = 60
_MOST_COMPARED = 1_000


@dataclass(frozen=True)
class RemovedSet:
    """One kept image and those removed for it, nearest first (`rows` stops at 60; `size` counts all, the kept one too)."""

    stratum: Stratum
    set: int
    size: int
    kept: int
    rows: Int[np.ndarray, " shown"]
    distances: Float[np.ndarray, " shown"]
    widest: float
    """Largest distance between any two of the set (of its first 1,000): beyond the threshold it is a chain."""


def distances_to_kept(
    embeddings: Any, kept: Int[np.ndarray, " kept"], set_of: Int[np.ndarray, " rows"], *, metric: str
) -> tuple[Int[np.ndarray, " removed"], Float[np.ndarray, " removed"]]:
    """The removed rows, and how far each is from the row kept for it, on the scale of `metric`."""
    known = np.flatnonzero(set_of >= 0)
    removed = known[kept[set_of[known]] != known]
    squared = np.empty(len(removed))
    for start in range(0, len(removed), _BLOCK_ROWS):
        rows = removed[start : start + _BLOCK_ROWS]
        difference = _unit(embeddings[rows]) - _unit(embeddings[kept[set_of[rows]]])
        squared[start : start + len(rows)] = np.einsum("nd,nd->n", difference, difference)
    return removed, on_metric(squared, metric)


def on_metric(squared: Float[np.ndarray, "*shape"], metric: str) -> Float[np.ndarray, "*shape"]:
    """Squared Euclidean distances of unit vectors on another scale; from the difference, so that small ones stay exact."""
    if metric == "squared_euclidean":
        return squared
    if metric == "euclidean":
        return np.sqrt(squared)
    if metric == "cosine":
        return squared / 2
    raise ValueError(f"metric: must be cosine, squared_euclidean or euclidean, got {metric!r}")


def choose(
    embeddings: Any,
    kept: Int[np.ndarray, " kept"],
    set_of: Int[np.ndarray, " rows"],
    removed: Int[np.ndarray, " removed"],
    distances: Float[np.ndarray, " removed"],
    *,
    metric: str,
    threshold: float,
    sets: int,
    seed: int,
) -> list[RemovedSet]:
    """Up to `sets` sets, a third of each stratum, none twice; equal inputs and seed give equal sets."""
    if not len(removed):
        return []
    order = np.lexsort((removed, distances, set_of[removed]))
    names, starts = np.unique(set_of[removed][order], return_index=True)
    stops = np.append(starts[1:], len(order))
    farthest = distances[order][stops - 1]
    found = []
    for stratum, index in _strata(stops - starts, np.abs(farthest - threshold), sets, seed):
        members = order[starts[index] : stops[index]]
        compared = np.append(kept[names[index]], removed[members[: _MOST_COMPARED - 1]])
        found.append(
            RemovedSet(
                stratum=stratum,
                set=int(names[index]),
                size=len(members) + 1,
                kept=int(kept[names[index]]),
                rows=removed[members[:_MOST_SHOWN]],
                distances=distances[members[:_MOST_SHOWN]],
                widest=_widest(embeddings, compared, metric),
            )
        )
    return found


def write_table(sets: Sequence[RemovedSet], keys: dict[int, str], captions: dict[int, str], path: Path) -> None:
    """One line an image, the kept one of a set first, at distance 0."""
    lines = [
        (chosen.stratum, chosen.set, chosen.size, chosen.widest, place, row, distance, keys[row], captions[row])
        for chosen in sets
        for place, (row, distance) in enumerate(
            [(chosen.kept, 0.0), *zip(chosen.rows.tolist(), chosen.distances.tolist(), strict=True)]
        )
    ]
    names = ("stratum", "set", "size", "widest_pair", "place", "row", "distance", "key", "caption")
    style.write_csv(path, {name: [line[index] for line in lines] for index, name in enumerate(names)})


def _strata(
    counts: Int[np.ndarray, " sets"], from_threshold: Float[np.ndarray, " sets"], sets: int, seed: int
) -> list[tuple[Stratum, int]]:
    each = -(-sets // len(STRATA))
    left = np.ones(len(counts), dtype=bool)
    found: list[tuple[Stratum, int]] = []
    random = np.random.default_rng(seed).permutation(len(counts))
    orders = (np.argsort(-counts, kind="stable"), np.argsort(from_threshold, kind="stable"), random)
    for stratum, order in zip(STRATA, orders, strict=True):
        chosen = order[left[order]][: min(each, sets - len(found))]
        left[chosen] = False
        found.extend((stratum, int(index)) for index in chosen)
    return found


def _widest(embeddings: Any, rows: Int[np.ndarray, " rows"], metric: str) -> float:
    vectors = _unit(embeddings[rows])
    return float(on_metric(np.clip(2 - 2 * (vectors @ vectors.T), 0, None), metric).max())


def _unit(vectors: np.ndarray) -> Float[np.ndarray, "rows dim"]:
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)
