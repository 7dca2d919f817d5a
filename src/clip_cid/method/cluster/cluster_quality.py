"""The quality of clusters: how similar their rows are, how clearly each belongs, and their purity."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int

from clip_cid.method.cluster.kmeans_rounds import DirectionSums, add_rows
from clip_cid.method.cluster.range_tasks import Shared, add_by_tasks
from clip_cid.method.unit_rows import Rows, UnitRows

_SEED = 0
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SAMPLE = 10_000
_CELLS = 1 << 31  # products of the sample with all centers; with a million centers the sample is about 2,000 rows
_BLOCK = 2048


@dataclass(frozen=True)
class Quality:
    """Cosines between rows of one cluster and between any rows, and how much nearer the own center is than the next."""

    within_cosine: float | None
    """Mean over all pairs of two rows of one cluster; None if every cluster has one row."""
    all_pairs_cosine: float | None
    """Mean over all pairs of two rows."""
    margins: Float64[np.ndarray, " sample"]
    """Cosine with the own center less the greatest with another; of a sample of the rows. Empty for a single center."""


def cluster_quality(
    embeddings: Rows, centers: Float[np.ndarray, "centers dim"], labels: Int[np.ndarray, " rows"]
) -> Quality:
    r"""A proxy of purity from two passes over the rows; `cluster_cosine` in docs/method.md.

    .. math:: \frac{\sum_j (\|S_j\|^2 - n_j)}{\sum_j n_j (n_j - 1)}, \qquad S_j = \sum_{i: y_i = j} v_i

    is the mean cosine of two different rows of one cluster, since |S_j|^2 sums the cosines of all its pairs and of each
    row with itself; with one cluster for all rows it is the mean over all pairs. It needs O(rows) time and holds the
    sums. The margins are of at most 10,000 rows drawn at random, fewer of more than 200,000 centers.

    Raises:
        ValueError: Labels are not of these rows and centers, or a row is zero or not finite.
    """
    return quality_of_rows(UnitRows(embeddings, name="embeddings", any_length=True), centers, labels)


def quality_of_rows(
    rows: UnitRows,
    centers: Float[np.ndarray, "centers dim"],
    labels: Int[np.ndarray, " rows"],
    shared: Shared | None = None,
) -> Quality:
    """As `cluster_quality`, of rows that are open; by tasks where `shared` says so."""
    if len(labels) != len(rows) or labels.min() < 0 or labels.max() >= len(centers):
        raise ValueError(f"labels must be of {len(rows)} rows and {len(centers)} centers, got {len(labels)}")

    within, overall = _mean_cosines(rows, labels, len(centers), shared)
    return Quality(within, overall, _margins(rows, centers, labels))


@dataclass(frozen=True)
class Purity:
    """How far clusters agree with classes that they were not made from."""

    share: float
    """Share of the rows that have the most frequent class of their cluster."""
    shuffled: float
    """The same with classes assigned to the rows at random, which small clusters alone would give."""
    rows: int
    """Rows whose class is known; the others count nowhere."""
    classes: int


def purity(labels: Int[np.ndarray, " rows"], classes: Int[np.ndarray, " _"]) -> Purity:
    """Purity of clusters against known classes; `purity` in docs/method.md.

    Args:
        labels: The cluster of each row.
        classes: The class of each row as a number; below 0 where it is not known.

    Raises:
        ValueError: The two are of different lengths, or no class is known.
    """
    if labels.shape != classes.shape:
        raise ValueError(f"classes must have the shape {labels.shape} of labels, got {classes.shape}")
    known = classes >= 0
    if not known.any():
        raise ValueError("classes must be known of some row, got none")

    labels, classes = labels[known], classes[known]
    shuffled = np.random.default_rng([_SEED, 2]).permutation(classes)
    return Purity(
        share=_share_of_most_frequent(labels, classes),
        shuffled=_share_of_most_frequent(labels, shuffled),
        rows=len(classes),
        classes=len(np.unique(classes)),
    )


def size_quantiles(sizes: Int[np.ndarray, " clusters"]) -> dict[str, int]:
    """Sizes at some shares of the clusters, smallest first, each the size of a cluster."""
    values = np.quantile(sizes, QUANTILES, method="inverted_cdf")
    return {f"{share:g}": int(value) for share, value in zip(QUANTILES, values, strict=True)}


def margin_quantiles(margins: Float64[np.ndarray, " sample"]) -> dict[str, float]:
    """Margins at the same shares of the sample; empty for a single center."""
    if not len(margins):
        return {}
    return {f"{share:g}": float(np.quantile(margins, share)) for share in QUANTILES}


def _share_of_most_frequent(labels: Int[np.ndarray, " rows"], classes: Int[np.ndarray, " rows"]) -> float:
    width = int(classes.max()) + 1
    cells, counts = np.unique(labels.astype(np.int64) * width + classes, return_counts=True)
    starts = np.flatnonzero(np.diff(cells // width, prepend=-1))
    return float(np.maximum.reduceat(counts, starts).sum() / len(labels))


def _mean_cosines(
    rows: UnitRows, labels: Int[np.ndarray, " rows"], num_centers: int, shared: Shared | None
) -> tuple[float | None, float | None]:
    if shared is not None:
        sums = add_by_tasks(shared, rows, labels, num_centers)
    else:
        sums = DirectionSums(num_centers, rows.dim)
        add_rows(rows, labels, sums)

    # The squared length of a sum is the sum of the cosines of all pairs, a row with itself among them.
    own_total, total = 0.0, np.zeros(rows.dim)
    for block in sums.blocks():
        directions = sums[block]
        own_total += float((directions * directions).sum())
        total += directions.sum(axis=0)

    sizes = sums.sizes.astype(np.float64)
    own_pairs, pairs = float((sizes * (sizes - 1)).sum()), len(rows) * (len(rows) - 1.0)
    return (
        (own_total - len(rows)) / own_pairs if own_pairs else None,
        (float(total @ total) - len(rows)) / pairs if pairs else None,
    )


def _margins(
    rows: UnitRows, centers: Float[np.ndarray, "centers dim"], labels: Int[np.ndarray, " rows"]
) -> Float64[np.ndarray, " sample"]:
    if len(centers) < 2:
        return np.empty(0)
    count = min(len(rows), _SAMPLE, max(1, _CELLS // len(centers)))
    sample = np.sort(np.random.default_rng([_SEED, 1]).choice(len(rows), size=count, replace=False))

    margins = np.empty(count)
    for start in range(0, count, _BLOCK):
        some = sample[start : start + _BLOCK]
        unit, own = rows[some].astype(np.float32), labels[some].astype(np.int64)

        # The greatest cosine with a center that is not the row's own, over blocks of centers.
        other = np.full(len(some), -np.inf, dtype=np.float32)
        for first in range(0, len(centers), _BLOCK):
            cosines = unit @ centers[first : first + _BLOCK].astype(np.float32).T
            here = np.flatnonzero((own >= first) & (own < first + _BLOCK))
            cosines[here, own[here] - first] = -np.inf
            other = np.maximum(other, cosines.max(axis=1))

        margins[start : start + _BLOCK] = np.vecdot(unit, centers[own].astype(np.float32)) - other
    return margins


def gini(sizes: Int[np.ndarray, " clusters"]) -> float:
    """How unequal the clusters are: 0 when all are equally large, near 1 when one holds everything."""
    if not sizes.sum():
        raise ValueError("sizes: all clusters are empty")
    ordered = np.sort(sizes).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))
