"""Spherical k-means over teacher image embeddings (paper section 3.2, Eq. 1), by FAISS or in blocks of rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import faiss
import numpy as np
from jaxtyping import Float, Float32, Int32

from clip_cid.method.unit_rows import BLOCK_ROWS, Rows, UnitRows

Algorithm = Literal["faiss", "blocks"]


@dataclass(frozen=True)
class Training:
    """How far the training of the centers has come: all that a later call needs to go on."""

    centers: Float32[np.ndarray, "centers dim"]
    """As the algorithm left them."""
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """As in `Clusters`; an entry for each round that is done."""


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
    (1 is even; FAISS's factor) and `empty` (clusters that got no row, or rows that cancel out, and were put elsewhere)."""

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
    algorithm: Algorithm = "faiss",
    device: str = "cpu",
    start: Training | None = None,
    on_iteration: Callable[[dict[str, float]], Any] | None = None,
    on_state: Callable[[Training], Any] | None = None,
    on_assigned: Callable[[int], Any] | None = None,
) -> Clusters:
    r"""Unit centers near all rows, and the nearest center of each row; `eq_kmeans` (Eq. 1) in docs/method.md.

    .. math:: \min_{C, y} \frac1M \sum_i \| v_i - C y_i \|^2, \quad y_i \in \{0,1\}^K,\ y_i^T 1 = 1,\ \|C_j\| = 1

    The centers are trained on a random sample of at most `max_points_per_center * num_centers` rows; all rows are
    assigned at the end. Rows count by their direction only.

    - `faiss` holds the sample in memory (4 bytes a number). Equal seeds and thread counts give equal results; another
      number of threads, machine or version of FAISS may give others.
    - `blocks` reads the sample from `embeddings` in every round, and starts at two levels (`block_kmeans`). Equal seeds
      give equal results whatever the threads and the device.

    Both can be stopped after any round and gone on with, to the same end as without a stop.

    Args:
        embeddings: (rows, dim), an array or anything with a shape and rows by slice and by row numbers.
        num_centers: K.
        iterations: Rounds of assignment and update.
        seed: Of the sample and of the first centers.
        max_points_per_center: Size of the training sample for each center.
        algorithm: `faiss` or `blocks`.
        device: Where the products of `blocks` and of the last assignment are computed; of no influence on the result.
        start: Where an earlier call with the same arguments stopped, as `on_state` was told.
        on_iteration: Called after each round with its entry of the history.
        on_state: Called with what a later call needs as `start`: after each round, and by `blocks` also before the first.
        on_assigned: Called during the last assignment with the number of rows that are newly done.

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
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm must be one of {', '.join(get_args(Algorithm))}, got {algorithm!r}")
    rows = UnitRows(embeddings, name="embeddings", any_length=True)
    if num_centers > len(rows):
        raise ValueError(f"num_centers must be at most the number of rows, {len(rows)}, got {num_centers}")
    _check_start(start, num_centers, rows.dim, iterations)
    sample = _training_sample(rows, num_centers * max_points_per_center, seed)
    tell = _Told(on_iteration, on_state)
    if algorithm == "faiss":
        last = _train_by_faiss(sample, num_centers, iterations, seed, start, tell)
    else:
        last = _train_in_blocks(sample, num_centers, iterations, seed, device, start, tell)
    labels, cosines = _assign(rows, last.centers, BLOCK_ROWS, device, on_assigned)
    return Clusters(last.centers, labels, float(np.mean(2 - 2 * cosines)), last.history)


def assign(
    embeddings: Rows,
    centers: Float[np.ndarray, "centers dim"],
    *,
    block_rows: int = BLOCK_ROWS,
    device: str = "cpu",
) -> tuple[Int32[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """The nearest center of each row and the cosine to it; `assignment` in docs/method.md.

    Products of short codes nominate centers, and float32 and float64 decide among them (`nearest_centers.CenterSearch`);
    of centers equal within 1e-9 the lowest is taken. So labels depend neither on `block_rows` nor on `device`.

    Raises:
        ValueError: A row is zero or not finite, a center is not a unit vector, or the widths differ.
    """
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    return _assign(UnitRows(embeddings, name="embeddings", any_length=True), centers, block_rows, device, None)


@dataclass(frozen=True)
class _Told:
    """Who is told of a round."""

    on_iteration: Callable[[dict[str, float]], Any] | None
    on_state: Callable[[Training], Any] | None

    def round(self, state: Training) -> None:
        if self.on_state is not None:
            self.on_state(state)
        if self.on_iteration is not None:
            self.on_iteration(state.history[-1])


def _check_start(start: Training | None, num_centers: int, dim: int, iterations: int) -> None:
    if start is None:
        return
    if start.centers.shape != (num_centers, dim):
        raise ValueError(f"start must have centers of shape {(num_centers, dim)}, got {start.centers.shape}")
    if len(start.history) > iterations:
        raise ValueError(f"start must have done at most {iterations} iterations, got {len(start.history)}")


def _training_sample(rows: UnitRows, size: int, seed: int) -> UnitRows:
    if size >= len(rows):
        return rows
    return rows.part(np.sort(np.random.default_rng(seed).choice(len(rows), size=size, replace=False)))


def _in_memory(rows: UnitRows) -> Float32[np.ndarray, "rows dim"]:
    found = np.empty((len(rows), rows.dim), dtype=np.float32)
    for block in rows.blocks(BLOCK_ROWS):
        found[block] = rows[block]
    return found


def _train_in_blocks(
    sample: UnitRows,
    num_centers: int,
    iterations: int,
    seed: int,
    device: str,
    start: Training | None,
    tell: _Told,
) -> Training:
    from clip_cid.method.cluster.block_kmeans import block_rounds, two_level_start  # torch, which FAISS does without

    if start is None:
        start = Training(two_level_start(sample, num_centers, seed=seed, device=device))
        if tell.on_state is not None:
            tell.on_state(start)
    rounds = iterations - len(start.history)
    for centers, round_ in block_rounds(sample, start.centers, rounds=rounds, device=device):
        start = Training(centers, [*start.history, round_])
        tell.round(start)
    return start


def _train_by_faiss(
    rows: UnitRows, num_centers: int, iterations: int, seed: int, start: Training | None, tell: _Told
) -> Training:
    """One round a call, so that each can be reported and stored: FAISS goes on from the centers it has."""
    sample = _in_memory(rows)
    settings = faiss.ClusteringParameters()
    settings.spherical = True
    settings.niter = 1
    settings.seed = seed % 2**31  # FAISS takes a C int
    settings.min_points_per_centroid = 1  # FAISS prints a warning below its own minimum of 39
    settings.max_points_per_centroid = len(sample)  # the sample is drawn already
    clustering = faiss.Clustering(sample.shape[1], num_centers, settings)
    history: list[dict[str, float]] = []
    if start is not None:
        faiss.copy_array_to_vector(start.centers.reshape(-1), clustering.centroids)
        history = list(start.history)
    while len(history) < iterations:
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
        history = [*history, round_]
        tell.round(Training(_centroids(clustering, num_centers), history))
    return Training(_unit_centers(_centroids(clustering, num_centers), sample), history)


def _centroids(clustering: Any, num_centers: int) -> Float32[np.ndarray, "centers dim"]:
    return faiss.vector_to_array(clustering.centroids).reshape(num_centers, -1)


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
    rows: UnitRows,
    centers: Float[np.ndarray, "centers dim"],
    block_rows: int,
    device: str,
    on_assigned: Callable[[int], Any] | None,
) -> tuple[Int32[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    from clip_cid.method.cluster.nearest_centers import CenterSearch  # torch, which FAISS does without

    unit_centers = UnitRows(centers, name="centers", any_length=False)
    if unit_centers.dim != rows.dim:
        raise ValueError(f"centers must have the width {rows.dim} of embeddings, got {unit_centers.dim}")
    search = CenterSearch(unit_centers, device=device)
    labels = np.empty(len(rows), dtype=np.int32)
    cosines = np.empty(len(rows), dtype=np.float64)
    for block in rows.blocks(block_rows):
        labels[block], _ = search.nearest(rows, block)
        cosines[block] = search.cosines(rows[block], labels[block])
        if on_assigned is not None:
            on_assigned(block.stop - block.start)
    return labels, cosines
