"""A cap on each cluster: the long tail is kept, and the head is cut."""

import numpy as np
from jaxtyping import Bool, Int

_SEED = 0


def cap_clusters(labels: Int[np.ndarray, " rows"], most: int) -> Bool[np.ndarray, " rows"]:
    """Which rows stay: all of a cluster of at most `most` rows, of a larger one so many at random.

    Equal arguments give equal rows.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    sizes = np.bincount(labels)

    # In a random order, the first rows of each cluster.
    order = np.random.default_rng(_SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    stays = np.zeros(len(labels), dtype=bool)
    stays[order[place < most]] = True
    return stays
