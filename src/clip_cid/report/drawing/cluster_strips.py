"""Examples of clusters: the images nearest the center, and those farthest from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from clip_cid.figures import style

Classes = tuple[Int[np.ndarray, " rows"], Sequence[str]]
Stratum = Literal["largest", "median", "smallest"]
STRATA: tuple[Stratum, ...] = ("largest", "median", "smallest")
_EACH, _NEAREST, _FARTHEST, _BLOCK_ROWS = 3, 6, 4, 65_536


@dataclass(frozen=True)
class ClusterStrip:
    """One cluster: six images nearest the center and four farthest from it (or all), nearest first."""

    stratum: Stratum
    cluster: int
    size: int
    rows: Int[np.ndarray, " shown"]
    cosines: Float[np.ndarray, " shown"]
    places: Int[np.ndarray, " shown"]
    """Places of the images by their nearness to the center, from 0."""
    common: tuple[str, float] | None = None
    """The most frequent class of its images and the share they have in it, if classes are known."""

    @property
    def gap(self) -> int | None:
        """Before which of the shown images some are skipped; None if all of the cluster are shown."""
        return _NEAREST if len(self.rows) < self.size else None


def choose(
    embeddings: Any,
    kept: Int[np.ndarray, " kept"],
    labels: Int[np.ndarray, " kept"],
    centers: Float[np.ndarray, "clusters dim"],
    classes: Classes | None = None,
) -> list[ClusterStrip]:
    """Three of the largest, three of median size and three of the smallest clusters; empty ones have nothing to show.

    Args:
        embeddings: All rows of the store.
        kept: The rows that were clustered.
        labels: The cluster of each of them.
        centers: Unit rows.
        classes: The class of each row of the store by its number, -1 if it has none; and the names of the classes.
    """
    sizes = np.bincount(labels, minlength=len(centers))
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    last = max(_EACH, len(order) - _EACH)  # of few clusters the smallest are not of median size
    middle = max(_EACH, min((len(order) - _EACH) // 2, last - _EACH))
    spans = (order[:_EACH], order[middle : min(middle + _EACH, last)], order[last:])
    return [
        _strip(stratum, int(cluster), embeddings, kept[labels == cluster], centers[cluster], classes)
        for stratum, clusters in zip(STRATA, spans, strict=True)
        for cluster in clusters
    ]


def write_table(strips: Sequence[ClusterStrip], keys: dict[int, str], captions: dict[int, str], path: Path) -> None:
    """One line an image, nearest the center first."""
    lines = [
        (
            strip.stratum,
            strip.cluster,
            strip.size,
            *(strip.common or ("", "")),
            place,
            row,
            cosine,
            keys[row],
            captions[row],
        )
        for strip in strips
        for place, row, cosine in zip(strip.places.tolist(), strip.rows.tolist(), strip.cosines.tolist(), strict=True)
    ]
    names = ("stratum", "cluster", "size", "class", "class_share", "place", "row", "cosine", "key", "caption")
    style.write_csv(path, {name: [line[index] for line in lines] for index, name in enumerate(names)})


def _strip(
    stratum: Stratum,
    cluster: int,
    embeddings: Any,
    rows: Int[np.ndarray, " members"],
    center: Float[np.ndarray, " dim"],
    classes: Classes | None,
) -> ClusterStrip:
    cosines = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK_ROWS):
        vectors = embeddings[rows[start : start + _BLOCK_ROWS]].astype(np.float64)
        cosines[start : start + len(vectors)] = vectors @ center / np.linalg.norm(vectors, axis=1)
    order = np.argsort(-cosines, kind="stable")
    places = np.arange(len(rows))
    if len(rows) > _NEAREST + _FARTHEST:
        places = np.r_[places[:_NEAREST], places[-_FARTHEST:]]
    shown = order[places]
    common = None if classes is None else _most_frequent(classes[0][rows], classes[1])
    return ClusterStrip(stratum, cluster, len(rows), rows[shown], cosines[shown], places, common)


def _most_frequent(numbers: Int[np.ndarray, " members"], names: Sequence[str]) -> tuple[str, float] | None:
    """The first by name of those that are equally frequent; None if no class is known."""
    counts = np.bincount(numbers[numbers >= 0])
    return (names[int(counts.argmax())], float(counts.max() / counts.sum())) if len(counts) else None
