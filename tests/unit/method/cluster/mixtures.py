"""Made-up rows in clusters, which the tests of the k-means share."""

import numpy as np
import oracles


def mixture(rows: int, dim: int, *, clusters: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middles = oracles.unit(rng.standard_normal((clusters, dim)))
    return oracles.unit(middles[rng.integers(0, clusters, rows)] + noise * rng.standard_normal((rows, dim)))
