"""Even samples of clusters: the long tail is kept, and the head is cut."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from clip_cid.method.cluster.clustering import KMeansState, spherical_kmeans

_SEED = 0
_FEW = 64  # clusters; k-means spreads the starts of more by itself
_DRAWN_FROM = 1 << 16  # rows that starts are drawn from; some hundred MB
_STEPS = 1 << 20  # of a squared distance, for draws in whole numbers


def cap_clusters(labels: Int[np.ndarray, " rows"], most: int) -> Bool[np.ndarray, " rows"]:
    """Which rows stay: all of a cluster of at most `most` rows, of a larger one so many at random.

    Equal arguments give equal rows.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    return draw_of_clusters(labels, np.minimum(np.bincount(labels), min(most, len(labels))))


def draw_of_clusters(
    labels: Int[np.ndarray, " rows"], shares: Int[np.ndarray, " clusters"]
) -> Bool[np.ndarray, " rows"]:
    """Which rows stay where each cluster gives its share, drawn at random.

    The order of the draw is always the same, so a larger share holds the rows of a smaller one.
    """
    sizes = np.bincount(labels, minlength=len(shares))

    # In a random order, the first rows of each cluster.
    order = np.random.default_rng(_SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    stays = np.zeros(len(labels), dtype=bool)
    stays[order[place < np.repeat(shares, sizes)]] = True
    return stays


def clusters_of_clusters(
    centers: Float[np.ndarray, "clusters dim"], levels: Sequence[int], *, device: str = "cpu"
) -> list[Int[np.ndarray, " _"]]:
    """Cluster the centers, then the centers of these clusters, and so on: the hierarchy of Vo et al. (2024).

    Every center counts once, however many rows it has. So the centers of a level lie more evenly than those below.

    Args:
        centers: Of the clusters that have rows.
        levels: The number of clusters of each level, from the clusters of clusters up; each smaller than the last.
        device: Where products are computed; it does not change the result.

    Returns:
        Of each level below the top, the number of the cluster above of each of its clusters. All have some below.

    Raises:
        ValueError: A level has not fewer clusters than there are below.
    """
    parents: list[Int[np.ndarray, " _"]] = []
    for count in levels:
        if not 1 <= count < len(centers):
            raise ValueError(f"{count:,} clusters of the {len(centers):,} below; there must be fewer, and at least 1")
        found = spherical_kmeans(
            centers,
            num_centers=count,
            seed=_SEED,
            max_points_per_center=len(centers),
            device=device,
            start=KMeansState(_spread_start(centers, count)) if count < _FEW else None,
        )
        used, above = np.unique(found.labels, return_inverse=True)
        parents.append(above)
        centers = found.centers[used]
    return parents


def _spread_start(centers: Float[np.ndarray, "clusters dim"], count: int) -> Float32[np.ndarray, "count dim"]:
    """Rows to start from as k-means++ draws them: each with the square of its distance to those drawn before.

    Few random rows would all be of the themes that fill most clusters.
    """
    random = np.random.default_rng(_SEED)
    rows = random.permutation(len(centers))[: max(_DRAWN_FROM, count)]
    directions = centers[rows].astype(np.float64)

    chosen, nearest = [0], np.full(len(rows), 4.0)
    while len(chosen) < count:
        nearest = np.minimum(nearest, 2 - 2 * directions @ directions[chosen[-1]])
        nearest[chosen] = 0
        weights = np.cumsum(np.maximum(nearest * _STEPS, 0).astype(np.int64))
        if not weights[-1]:  # the others are equal to these
            others = np.setdiff1d(np.arange(len(rows)), chosen)
            chosen += others[: count - len(chosen)].tolist()
            break
        chosen.append(int(np.searchsorted(weights, random.integers(weights[-1]), side="right")))
    return centers[rows[chosen]].astype(np.float32)


def even_shares(
    total: int, sizes: Int[np.ndarray, " clusters"], parents: Sequence[Int[np.ndarray, " _"]] = ()
) -> Int[np.ndarray, " clusters"]:
    """How many rows each cluster gives, so that they are `total`, or all if there are fewer.

    The total is shared evenly by the clusters of the top level, the share of each by the clusters in it, and so on down.
    A cluster that has fewer rows than its share gives all, and the others share the rest. Shares that cannot be equal
    differ by one, and a larger total takes from no cluster less than a smaller one.

    Args:
        total: Rows.
        sizes: Of the clusters at the bottom: as many rows as each can give.
        parents: As from `clusters_of_clusters`; without them the clusters share alike.
    """
    sizes_by_level = [sizes]
    for above in parents:
        sizes_by_level.append(_sums(sizes_by_level[-1], above))

    # From the top down; one random order at each level says who gets one more.
    random = np.random.default_rng(_SEED)
    shares = _shares(total, sizes_by_level[-1], random.permutation(len(sizes_by_level[-1])))
    for below, above in zip(reversed(sizes_by_level[:-1]), reversed(parents), strict=True):
        order = random.permutation(len(below))
        order = order[np.argsort(above[order], kind="stable")]
        families = np.split(order, np.cumsum(np.bincount(above))[:-1])
        shares_below = np.zeros_like(below)
        for share, family in zip(shares.tolist(), families, strict=True):
            shares_below[family] = _shares(share, below[family], np.arange(len(family)))
        shares = shares_below
    return shares


def _sums(sizes: Int[np.ndarray, " nodes"], above: Int[np.ndarray, " nodes"]) -> Int[np.ndarray, " above"]:
    sums = np.zeros(above.max() + 1, dtype=np.int64)
    np.add.at(sums, above, sizes)
    return sums


def _shares(
    total: int, sizes: Int[np.ndarray, " nodes"], order: Int[np.ndarray, " nodes"]
) -> Int[np.ndarray, " nodes"]:
    """`total` shared evenly by nodes of these sizes; those first in `order` get one more where it must be."""
    if total >= sizes.sum():
        return sizes.astype(np.int64)

    # The highest level to which all can be filled: the i smallest nodes are full there, and the others equal.
    rising = np.sort(sizes).astype(np.int64)
    full = np.concatenate([[0], np.cumsum(rising)])
    filled = full[:-1] + rising * np.arange(len(rising), 0, -1)  # rows, if every node gave at most this one's size
    smaller = int(np.searchsorted(filled, total, side="right"))
    level, rest = divmod(int(total - full[smaller]), len(rising) - smaller)

    shares = np.minimum(sizes, level).astype(np.int64)
    larger = order[sizes[order] > level]
    shares[larger[:rest]] += 1
    return shares
