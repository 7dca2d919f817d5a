"""Spherical k-means over teacher image embeddings (paper section 3.2, Eq. 1)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32

from clip_cid import units
from clip_cid.method.array_likes import ArrayLike, as_whole_number
from clip_cid.method.unit_rows import BLOCK_ROWS, Rows, UnitRows

if TYPE_CHECKING:
    from clip_cid.method.cluster.nearest_centers import CenterSearch
    from clip_cid.method.cluster.range_tasks import Shared


@dataclass(frozen=True)
class KMeansState:
    """The centers after a round: the state from which a later call resumes."""

    centers: Float32[np.ndarray, "centers dim"]
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """As in `Clusters`; an entry for each finished round."""


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
    (1 is even) and `empty` (centers that had no row, or whose rows cancel out, and were moved to another row)."""

    def __repr__(self) -> str:
        count, dim = self.centers.shape
        return (
            f"Clusters({count:,} centers of width {dim:,}, {len(self.labels):,} rows; objective {self.objective:.4g})"
        )

    @property
    def empty(self) -> int:
        """Centers that are no row's nearest."""
        return len(self.centers) - len(np.unique(self.labels))

    def explain(self) -> str:
        """In words how large the clusters are, and how near their rows."""
        sizes = np.bincount(self.labels, minlength=len(self.centers))
        rounds = units.counted(len(self.history), "round")
        return (
            f"{len(self.labels):,} rows in {units.counted(len(sizes), 'cluster')} of {sizes.min():,} to {sizes.max():,}"
            f" rows (median {np.median(sizes):g}); {self.empty:,} are empty. The mean squared distance of a row to its"
            f" center is {self.objective:.4g}, a mean cosine of {1 - self.objective / 2:.4g}, after {rounds}."
        )


def spherical_kmeans(
    embeddings: Rows | ArrayLike,
    *,
    num_centers: int,
    iterations: int = 20,
    seed: int = 0,
    max_points_per_center: int = 256,
    device: str = "cpu",
    start: KMeansState | None = None,
    on_state: Callable[[KMeansState], Any] | None = None,
    on_assigned: Callable[[int], Any] | None = None,
) -> Clusters:
    r"""Unit centers near all rows, and the nearest center of each row; `eq_kmeans` (Eq. 1) in docs/method.md.

    .. math:: \min_{C, y} \frac1M \sum_i \| v_i - C y_i \|^2, \quad y_i \in \{0,1\}^K,\ y_i^T 1 = 1,\ \|C_j\| = 1

    The centers are trained on a random sample of at most `max_points_per_center * num_centers` rows; all rows are
    assigned at the end. Every round reads the sample from `embeddings` in blocks, so it need not fit in memory. Rows
    count by their direction only.

    Equal seeds give equal bits whatever the threads and the device. A run that was stopped after any round can be
    resumed, with the same result as without the stop.

    Args:
        embeddings: (rows, dim), an array, tensor, data frame or list of rows, or anything with a shape and rows by
            slice and by row numbers.
        num_centers: K.
        iterations: Rounds of assignment and update.
        seed: Of the sample and of the first centers.
        max_points_per_center: Size of the training sample for each center.
        device: Where products are computed; it does not change the result.
        start: The state to resume from, as an earlier call with the same arguments gave it to `on_state`.
        on_state: Called with the state before the first round and after each.
        on_assigned: Called during the last assignment with the number of rows just assigned.

    Raises:
        ValueError: An argument is out of its limits, there are more centers than rows, or a row is zero or not finite.
    """
    for name, value, least in (
        ("num_centers", num_centers, 1),
        ("iterations", iterations, 1),
        ("seed", seed, 0),
        ("max_points_per_center", max_points_per_center, 1),
    ):
        as_whole_number(value, name=name, least=least)

    rows = UnitRows(embeddings, name="embeddings", any_length=True)
    if num_centers > len(rows):
        raise ValueError(f"num_centers must be at most the number of rows, {len(rows)}, got {num_centers}")
    _check_start(start, num_centers, rows.dim, iterations)

    return cluster_rows(
        rows,
        num_centers=num_centers,
        iterations=iterations,
        seed=seed,
        max_points_per_center=max_points_per_center,
        device=device,
        start=start,
        on_state=on_state,
        on_assigned=on_assigned,
    )


def cluster_rows(
    rows: UnitRows,
    *,
    num_centers: int,
    iterations: int,
    seed: int,
    max_points_per_center: int,
    device: str,
    start: KMeansState | None,
    on_state: Callable[[KMeansState], Any] | None,
    on_assigned: Callable[[int], Any] | None,
    shared: "Shared | None" = None,
) -> Clusters:
    """As `spherical_kmeans`, of rows that are open and arguments that are checked; by tasks where `shared` says so.

    The result is the same bits. With tasks `on_assigned` is not called.
    """
    from clip_cid.method.cluster.kmeans_rounds import kmeans_rounds  # torch, which `import clip_cid` does without
    from clip_cid.method.cluster.range_tasks import RoundsByTasks, assign_by_tasks, ranges_of
    from clip_cid.method.cluster.starting_centers import two_level_start

    chosen = _training_sample(len(rows), num_centers * max_points_per_center, seed)
    sample = rows if chosen is None else rows.part(chosen)
    state = start
    if state is None:
        first = two_level_start(sample, num_centers, seed=seed, device=device, numbers=chosen, shared=shared)
        state = KMeansState(first)
        if on_state is not None:
            on_state(state)

    work = None
    if shared is not None:
        shared.store.drop(shared.scratch)
        ranges = ranges_of(shared, sample, chosen, num_centers)
        work = RoundsByTasks(shared, ranges, rows.dim, done=len(state.history), device=device)
    rounds = iterations - len(state.history)
    for centers, stats in kmeans_rounds(sample, state.centers, rounds=rounds, device=device, work=work):
        state = KMeansState(centers, [*state.history, stats])
        if on_state is not None:
            on_state(state)

    if shared is not None:
        labels, cosines = assign_by_tasks(shared, rows, state.centers, device)
    else:
        labels, cosines = _search(state.centers, rows, device).assign(rows, on_assigned=on_assigned)
    return Clusters(state.centers, labels, float(np.mean(2 - 2 * cosines)), state.history)


def assign(
    embeddings: Rows, centers: Float[np.ndarray, "centers dim"], *, block_rows: int = BLOCK_ROWS, device: str = "cpu"
) -> tuple[Int32[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """The nearest center of each row and the cosine to it; `assignment` in docs/method.md.

    Products of short codes nominate centers, and float32 and float64 decide among them
    (`nearest_centers.CenterSearch`); of centers equal within 1e-9 the lowest is taken. So labels
    depend neither on `block_rows` nor on `device`.

    Raises:
        ValueError: A row is zero or not finite, a center is not a unit vector, or the widths differ.
    """
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    rows = UnitRows(embeddings, name="embeddings", any_length=True)
    return _search(centers, rows, device).assign(rows, block_rows)


def _search(centers: Float[np.ndarray, "centers dim"], rows: UnitRows, device: str) -> "CenterSearch":
    from clip_cid.method.cluster.nearest_centers import CenterSearch  # torch

    unit_centers = UnitRows(centers, name="centers", any_length=False)
    if unit_centers.dim != rows.dim:
        raise ValueError(f"centers must have the width {rows.dim} of embeddings, got {unit_centers.dim}")
    return CenterSearch(unit_centers, device=device)


def _check_start(start: KMeansState | None, num_centers: int, dim: int, iterations: int) -> None:
    if start is None:
        return
    if start.centers.shape != (num_centers, dim):
        raise ValueError(f"start must have centers of shape {(num_centers, dim)}, got {start.centers.shape}")
    if len(start.history) > iterations:
        raise ValueError(f"start must have done at most {iterations} iterations, got {len(start.history)}")


def _training_sample(rows: int, size: int, seed: int) -> Int[np.ndarray, " sample"] | None:
    """Some of the rows, in their order; None for all."""
    if size >= rows:
        return None
    return np.sort(np.random.default_rng(seed).choice(rows, size=size, replace=False))
