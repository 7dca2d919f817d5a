"""Examples of duplicates: the largest sets, those at the threshold, random ones; and pairs of each kind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from clip_cid.data.balance.tables import BalanceTables
from clip_cid.figures import style

Stratum = Literal["largest", "at the threshold", "random"]
STRATA: tuple[Stratum, ...] = ("largest", "at the threshold", "random")
PAIR_KINDS = ("perceptual", "semantic")
"""As in Fig. 2a and Fig. 2b of the paper."""
_MOST_SHOWN = 60


@dataclass(frozen=True)
class RemovedSet:
    """One kept image and those removed for it, nearest first.

    `rows` holds 60 at most; `size` counts all images, the kept one included.
    """

    stratum: Stratum
    set: int
    size: int
    component_size: int
    """Size of the connected set that holds it."""
    farthest: float
    """From the kept image to the farthest removed one."""
    widest: float
    """Largest distance between any two of the set: beyond the threshold it is a chain."""
    widest_exact: bool
    """False for a set so large that not all pairs were compared: `widest` is then the least it can be."""
    weakest_link: float
    """Below this threshold the connected set falls apart."""
    kept: int
    rows: Int[np.ndarray, " shown"]
    distances: Float[np.ndarray, " shown"]
    kinds: Sequence[str]
    """Perceptual, semantic, unknown, or empty if the image was not drawn for the comparison."""


@dataclass(frozen=True)
class RemovedPair:
    """A removed image of a known kind and the one kept for it."""

    kind: str
    kept: int
    row: int
    distance: float


def choose(tables: BalanceTables, *, sets: int, seed: int) -> list[RemovedSet]:
    """Up to `sets` sets, a third of each stratum, none twice; equal inputs and seed give equal sets."""
    table = tables.sets
    chosen = _strata(table["size"], table["weakest_link"], sets, seed)
    members = tables.members(table["set"][index] for _, index in chosen)

    sets_shown: list[RemovedSet] = []
    for stratum, index in chosen:
        own = np.flatnonzero((members["set"] == table["set"][index]) & ~members["kept"])
        shown = own[np.argsort(members["distance"][own], kind="stable")][:_MOST_SHOWN]
        sets_shown.append(
            RemovedSet(
                stratum=stratum,
                set=int(table["set"][index]),
                size=int(table["size"][index]),
                component_size=int(table["component_size"][index]),
                farthest=float(table["farthest"][index]),
                widest=float(table["widest"][index]),
                widest_exact=bool(table["widest_exact"][index]),
                weakest_link=float(table["weakest_link"][index]),
                kept=int(table["kept_row"][index]),
                rows=members["row"][shown],
                distances=members["distance"][shown],
                kinds=members["kind"][shown].tolist(),
            )
        )
    return sets_shown


def choose_pairs(tables: BalanceTables, *, pairs: int, seed: int) -> list[RemovedPair]:
    """Up to `pairs` of each kind at random, each of another set, nearest first."""
    drawn_pairs: list[RemovedPair] = []
    for kind in PAIR_KINDS:
        members = tables.of_kind(kind)
        order = np.random.default_rng(seed).permutation(len(members["row"]))
        _, first = np.unique(members["set"][order], return_index=True)
        drawn = order[np.sort(first)[:pairs]]
        nearest_first = drawn[np.argsort(members["distance"][drawn], kind="stable")]
        places = np.searchsorted(tables.sets["set"], members["set"])
        drawn_pairs += [
            RemovedPair(
                kind=kind,
                kept=int(tables.sets["kept_row"][places[at]]),
                row=int(members["row"][at]),
                distance=float(members["distance"][at]),
            )
            for at in nearest_first.tolist()
        ]
    return drawn_pairs


def distance_note(distance: float, kind: str) -> str:
    """The text under a removed picture: its distance to the kept one, and its kind if it is known."""
    return f"{distance:.3f} {kind}" if kind in PAIR_KINDS else f"{distance:.3f}"


def write_table(sets: Sequence[RemovedSet], keys: dict[int, str], captions: dict[int, str], path: Path) -> None:
    """One line an image, the kept one of a set first, at distance 0."""
    lines = [
        {
            "stratum": chosen.stratum,
            "set": chosen.set,
            "size": chosen.size,
            "component_size": chosen.component_size,
            "farthest": chosen.farthest,
            "widest_pair": chosen.widest,
            "widest_exact": chosen.widest_exact,
            "weakest_link": chosen.weakest_link,
            "place": place,
            "row": row,
            "distance": distance,
            "kind": kind,
            "key": keys[row],
            "caption": captions[row],
        }
        for chosen in sets
        for place, (row, distance, kind) in enumerate(_images(chosen))
    ]

    _write_lines(lines, path)


def write_pairs(pairs: Sequence[RemovedPair], keys: dict[int, str], captions: dict[int, str], path: Path) -> None:
    """Two lines a pair, the kept image first, at distance 0."""
    lines = [
        {"kind": pair.kind, "pair": place, "row": row, "distance": distance, "key": keys[row], "caption": captions[row]}
        for place, pair in enumerate(pairs)
        for row, distance in ((pair.kept, 0.0), (pair.row, pair.distance))
    ]
    _write_lines(lines, path)


def _images(chosen: RemovedSet) -> Iterator[tuple[int, float, str]]:
    yield chosen.kept, 0.0, ""
    yield from zip(chosen.rows.tolist(), chosen.distances.tolist(), chosen.kinds, strict=True)


def _write_lines(lines: Sequence[dict[str, Any]], path: Path) -> None:
    style.write_csv(path, {name: [line[name] for line in lines] for name in (lines[0] if lines else ())})


def _strata(
    counts: Int[np.ndarray, " sets"], weakest: Float[np.ndarray, " sets"], sets: int, seed: int
) -> list[tuple[Stratum, int]]:
    each = -(-sets // len(STRATA))
    left = np.ones(len(counts), dtype=bool)
    picked: list[tuple[Stratum, int]] = []
    random = np.random.default_rng(seed).permutation(len(counts))
    # No link is longer than the threshold, and the farthest image of a chain says nothing about it.
    orders = (np.argsort(-counts, kind="stable"), np.argsort(-weakest, kind="stable"), random)
    for stratum, order in zip(STRATA, orders, strict=True):
        chosen = order[left[order]][: min(each, sets - len(picked))]
        left[chosen] = False
        picked.extend((stratum, int(index)) for index in chosen)
    return picked
