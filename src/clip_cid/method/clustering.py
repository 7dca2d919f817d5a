"""Spherical k-means over teacher image embeddings (paper section 3.2, Eq. 1), by FAISS."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from clip_cid.method.unit_rows import BLOCK_ROWS, Rows, UnitRows, cosine_error

_CENTER_BLOCK = 8192
_CELLS = 1 << 22  # numbers in a temporary array of float64: 32 MB
_TIED = 1e-9  # centers nearer to equal than this are decided by their number, not by rounding


@dataclass(frozen=True)
class Clusters:
    """Centers, and the cluster of each row."""

    centers: Float32[np.ndarray, "centers dim"]
    """Unit rows."""
    labels: Int32[np.ndarray, " rows"]
    """The nearest center of each row; the lowest of equally near ones."""
    objective: float
    """Eq. 1 over all rows: mean squared distance to the own center, 2 - 2 cos, between 0 and 4."""
    history: list[dict[str, float]]
    """A dictionary a round, over the training sample: `objective` with the centers the round began with, `imbalance`
    (1 is even; FAISS's factor) and `empty` (clusters that got no row and were split off a large one)."""

    @property
    def empty(self) -> int:
        """Centers that are no row's nearest."""
        return len(self.centers) - len(np.unique(self.labels))


def spherical_kmeans(
    embeddings: Rows,
    *,
    num_centers: int,
    iterations: int = 20,
    seed: int = 0,
    max_points_per_center: int = 256,
    on_iteration: Callable[[dict[str, float]], Any] | None = None,
) -> Clusters:
    r"""Unit centers near all rows, and the nearest center of each row; `eq_kmeans` (Eq. 1) in docs/method.md.

    .. math:: \min_{C, y} \frac1M \sum_i \| v_i - C y_i \|^2, \quad y_i \in \{0,1\}^K,\ y_i^T 1 = 1,\ \|C_j\| = 1

    The centers are trained by FAISS on a random sample of at most `max_points_per_center * num_centers` rows; all rows
    are assigned at the end. Rows count by their direction only. Equal seeds and thread counts give equal results.

    Args:
        embeddings: (rows, dim), an array or anything with a shape and rows by slice and by row numbers.
        num_centers: K.
        iterations: Rounds of assignment and update.
        seed: Of the sample and of the first centers.
        max_points_per_center: Size of the training sample for each center.
        on_iteration: Called after each round with its entry of the history.

    Raises:
        ValueError: An argument is out of its limits, there are more centers than rows, or a row is zero or not finite.
    """
    for name, value, least in (
        ("num_centers", num_centers, 1),
        ("iterations", iterations, 1),
        ("seed", seed, 0),
        ("max_points_per_center", max_points_per_center, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    rows = UnitRows(embeddings, name="embeddings", any_length=True)
    if num_centers > len(rows):
        raise ValueError(f"num_centers must be at most the number of rows, {len(rows)}, got {num_centers}")
    sample = _training_sample(rows, num_centers * max_points_per_center, seed)
    centers, history = _train(sample, num_centers, iterations, seed, on_iteration)
    labels, cosines = _assign(rows, centers, BLOCK_ROWS)
    return Clusters(centers, labels, float(np.mean(2 - 2 * cosines)), history)


def assign(
    embeddings: Rows, centers: Float[np.ndarray, "centers dim"], *, block_rows: int = BLOCK_ROWS
) -> tuple[Int32[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """The nearest center of each row and the cosine to it; `assignment` in docs/method.md.

    Blocks of a float32 matrix product find the nearest center; where a second one is within float32's error, float64
    decides, and of centers equal within 1e-9 the lowest is taken. So labels do not depend on `block_rows`.

    Raises:
        ValueError: A row is zero or not finite, a center is not a unit vector, or the widths differ.
    """
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    return _assign(UnitRows(embeddings, name="embeddings", any_length=True), centers, block_rows)


def _training_sample(rows: UnitRows, size: int, seed: int) -> Float32[np.ndarray, "sample dim"]:
    chosen = np.arange(len(rows))
    if size < len(rows):
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size=size, replace=False))
    sample = np.empty((len(chosen), rows.dim), dtype=np.float32)
    for start in range(0, len(chosen), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        sample[block] = rows[chosen[block]]
    return sample


def _train(
    sample: Float32[np.ndarray, "sample dim"],
    num_centers: int,
    iterations: int,
    seed: int,
    on_iteration: Callable[[dict[str, float]], Any] | None,
) -> tuple[Float32[np.ndarray, "centers dim"], list[dict[str, float]]]:
    """FAISS, one round a call so that each can be reported; it goes on from the centers it has."""
    settings = faiss.ClusteringParameters()
    settings.spherical = True
    settings.niter = 1
    settings.seed = seed % 2**31  # FAISS takes a C int
    settings.min_points_per_centroid = 1  # FAISS prints a warning below its own minimum of 39
    settings.max_points_per_centroid = len(sample)  # the sample is drawn already
    clustering = faiss.Clustering(sample.shape[1], num_centers, settings)
    history: list[dict[str, float]] = []
    for _ in range(iterations):
        clustering.train(sample, faiss.IndexFlatIP(sample.shape[1]))
        rounds: Any = clustering.iteration_stats  # a C++ vector, whatever the type stubs say
        stats = rounds.at(rounds.size() - 1)
        round_ = {
            "objective": 2 - 2 * stats.obj / len(sample),
            "imbalance": stats.imbalance_factor,
            "empty": stats.nsplit,
        }
        if num_centers == len(sample):  # FAISS then copies the rows and measures nothing
            round_ = {"objective": 0.0, "imbalance": 1.0, "empty": 0}
        history.append(round_)
        if on_iteration is not None:
            on_iteration(round_)
    centers = faiss.vector_to_array(clustering.centroids).reshape(num_centers, -1)
    return _unit_centers(centers, sample), history


def _unit_centers(
    centers: Float32[np.ndarray, "centers dim"], sample: Float32[np.ndarray, "sample dim"]
) -> Float32[np.ndarray, "centers dim"]:
    """Centers at unit length; one whose rows cancel out has no direction and becomes the row worst served by the rest."""
    lengths = np.linalg.norm(centers.astype(np.float64), axis=1)
    zero = np.flatnonzero(lengths == 0)
    if len(zero):
        index = faiss.IndexFlatIP(centers.shape[1])
        index.add(centers)
        cosines, _ = index.search(sample, 1)
        centers[zero] = sample[np.argsort(cosines[:, 0], kind="stable")[: len(zero)]]
        lengths[zero] = 1
    return (centers / lengths[:, None]).astype(np.float32)


def _assign(
    rows: UnitRows, centers: Float[np.ndarray, "centers dim"], block_rows: int
) -> tuple[Int32[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    unit_centers = UnitRows(centers, name="centers", any_length=False)
    if unit_centers.dim != rows.dim:
        raise ValueError(f"centers must have the width {rows.dim} of embeddings, got {unit_centers.dim}")
    labels = np.empty(len(rows), dtype=np.int32)
    cosines = np.empty(len(rows), dtype=np.float64)
    for block in rows.blocks(block_rows):
        unit = rows[block]
        nearest, doubtful = _nearest(unit, unit_centers)
        nearest[doubtful] = _nearest_exactly(unit[doubtful], unit_centers)
        labels[block] = nearest
        cosines[block] = (unit * unit_centers[nearest]).sum(axis=1)
    return labels, cosines


def _nearest(
    unit: Float[np.ndarray, "rows dim"], centers: UnitRows
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " doubtful"]]:
    """The nearest center by float32 cosines, and the rows of which a second center is within their error."""
    unit32 = unit.astype(np.float32)
    best = np.full((len(unit), 2), -np.inf, dtype=np.float32)
    nearest = np.zeros(len(unit), dtype=np.int64)
    for some in centers.blocks(_CENTER_BLOCK):
        cosines = unit32 @ centers[some].astype(np.float32).T
        here = cosines.argmax(axis=1)[:, None]
        top = np.take_along_axis(cosines, here, axis=1)
        np.put_along_axis(cosines, here, -np.inf, axis=1)
        nearest = np.where(top[:, 0] > best[:, 0], some.start + here[:, 0], nearest)
        best = -np.sort(-np.concatenate([best, top, cosines.max(axis=1, keepdims=True)], axis=1), axis=1)[:, :2]
    return nearest, np.flatnonzero(best[:, 0] - best[:, 1] <= 2 * cosine_error(unit.shape[1]) + _TIED)


def _nearest_exactly(unit: Float[np.ndarray, "rows dim"], centers: UnitRows) -> Int[np.ndarray, " rows"]:
    """The lowest center whose float64 cosine is the best within 1e-9."""
    block_rows = max(1, _CELLS // max(1, len(unit)))
    best = np.full(len(unit), -np.inf)
    for some in centers.blocks(block_rows):
        best = np.maximum(best, (unit @ centers[some].T).max(axis=1))
    nearest = np.full(len(unit), len(centers), dtype=np.int64)
    for some in centers.blocks(block_rows):
        tied = unit @ centers[some].T >= best[:, None] - _TIED
        nearest = np.minimum(nearest, np.where(tied.any(axis=1), some.start + tied.argmax(axis=1), len(centers)))
    return nearest
