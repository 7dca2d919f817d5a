"""Spherical k-means over the kept teacher image embeddings (paper section 3.2, Eq. 1)."""

from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import log
from clip_cid.data.embeddings import EmbeddingStore
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.clustering import Clusters, spherical_kmeans
from clip_cid.recipe import ClusterConfig, Recipe
from clip_cid.run_folder import RunFolder

_NORM_TOLERANCE = 1e-3


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Centers and the cluster of each kept image; writes `centers.npy` and `labels.npy`."""
    settings = recipe.cluster
    store = EmbeddingStore.open(folder.stage("embed"))
    kept = np.load(folder.stage("balance") / "kept.npy") if recipe.balance.enabled else np.flatnonzero(store.ok)
    if settings.existing is not None:
        centers, labels = _read_clusters(settings.existing, dim=store.dim, kept=len(kept))
        extra: dict[str, Any] = {"from": str(settings.existing)}
    else:
        if settings.num_centers > len(kept):
            raise ConfigError(
                f"cluster.num_centers: {settings.num_centers:,} centers for {len(kept):,} kept images.",
                fix=f"Set cluster.num_centers to {max(1, len(kept) // 20):,} or so (20 images a cluster).",
            )
        clusters = _cluster(store, kept, settings)
        centers, labels = clusters.centers, clusters.labels
        extra = {"objective": clusters.objective, "history": clusters.history}
    np.save(out / "centers.npy", centers)
    np.save(out / "labels.npy", labels)
    summary = {"images": len(kept), "centers": len(centers), **size_summary(labels, len(centers)), **extra}
    if summary["singletons"] > len(centers) / 2:
        log.warn(
            f"{summary['singletons']:,} of {len(centers):,} clusters hold one image; "
            f"{len(kept):,} images are few for cluster.num_centers: {len(centers):,}"
        )
    return summary


def _cluster(store: EmbeddingStore, kept: np.ndarray, settings: ClusterConfig) -> Clusters:
    with log.progress("cluster", settings.iterations, unit="rounds") as bar:
        try:
            return spherical_kmeans(
                store.images.select(kept),
                num_centers=settings.num_centers,
                iterations=settings.iterations,
                seed=settings.seed,
                max_points_per_center=settings.max_points_per_center,
                on_iteration=lambda _: bar.advance(),
            )
        except ValueError as error:
            raise DataError(f"{store.path}: {error}", fix="Run the embed stage again, with --force.") from error


def size_summary(labels: np.ndarray, num_centers: int) -> dict[str, Any]:
    """How evenly the images are spread: Gini 0 is even, 1 is all in one cluster."""
    sizes = np.sort(np.bincount(labels, minlength=num_centers))
    ranks = np.arange(1, num_centers + 1)
    gini = float(2 * (ranks * sizes).sum() / (num_centers * sizes.sum()) - (num_centers + 1) / num_centers)
    return {
        "empty": int((sizes == 0).sum()),
        "singletons": int((sizes == 1).sum()),
        "smallest": int(sizes[0]),
        "median": float(np.median(sizes)),
        "largest": int(sizes[-1]),
        "gini": gini,
    }


def _read_clusters(folder: Path, *, dim: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters made elsewhere: unit centers of the store's width, a label for each kept image."""
    fix = "Give the cluster folder of a run over the same kept images, or run the cluster stage."
    try:
        centers = np.load(folder / "centers.npy", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot read centers.npy and labels.npy ({error}).", fix=fix) from error
    if centers.ndim != 2 or centers.shape[1] != dim:
        raise DataError(f"{folder}: centers of shape {centers.shape}, but embeddings of width {dim}.", fix=fix)
    off = np.abs(np.linalg.norm(centers.astype(np.float64), axis=1) - 1)
    if not (off <= _NORM_TOLERANCE).all():  # also false for NaN
        raise DataError(f"{folder}: center {int(np.argmax(off))} is not a unit vector.", fix=fix)
    if labels.shape != (kept,):
        raise DataError(f"{folder}: {labels.size:,} labels for {kept:,} kept images.", fix=fix)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(centers):
        raise DataError(f"{folder}: labels outside the {len(centers):,} centers.", fix=fix)
    return centers.astype(np.float32), labels.astype(np.int32)
