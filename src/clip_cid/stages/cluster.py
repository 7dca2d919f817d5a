"""Spherical k-means over the kept teacher image embeddings (paper section 3.2, Eq. 1)."""

import dataclasses
import hashlib
import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import log, tasks, units
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.cluster.cluster_quality import cluster_quality, gini, margin_quantiles, purity, size_quantiles
from clip_cid.method.cluster.clustering import Clusters, Training, spherical_kmeans
from clip_cid.models.device import resolve_device
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder, atomic_file
from clip_cid.unit_length import is_unit

_WORK = "work"
_STATE_FILE = "training.npz"
_SPARE = 1.1  # FAISS's own arrays beside the sample


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Centers and the cluster of each kept image; writes `centers.npy` and `labels.npy`.

    While it works, `work/training.npz` holds the centers after the last finished round.
    """
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
        clusters = _cluster(store, kept, out, recipe)
        centers, labels = clusters.centers, clusters.labels
        extra = {"algorithm": settings.algorithm, "objective": clusters.objective, "history": clusters.history}
    np.save(out / "centers.npy", centers)
    np.save(out / "labels.npy", labels)
    shutil.rmtree(out / _WORK, ignore_errors=True)
    sizes = size_summary(labels, len(centers))
    summary = {"images": len(kept), "centers": len(centers), **sizes, **_quality(store, kept, centers, labels), **extra}
    if settings.truth_field is not None:
        classes, _ = store.classes(settings.truth_field)
        summary |= _against_truth(classes[kept], labels, settings.truth_field)
    _say(summary)
    return summary


def _cluster(store: EmbeddingStore, kept: np.ndarray, out: Path, recipe: Recipe) -> Clusters:
    settings = recipe.cluster
    device = str(resolve_device(recipe.machine.device)) if settings.algorithm == "blocks" else "cpu"
    if settings.algorithm == "faiss":
        _check_memory(min(len(kept), settings.num_centers * settings.max_points_per_center), store.dim, recipe)
    (out / _WORK).mkdir(exist_ok=True)
    state = _StateFile(out / _WORK / _STATE_FILE, _fingerprint(store, kept, recipe))
    start = state.read()
    with _Progress(settings.iterations, len(kept), start) as progress:

        def keep(training: Training) -> None:
            state.write(training)
            progress.round(training)

        try:
            return spherical_kmeans(
                store.images.select(kept),
                num_centers=settings.num_centers,
                iterations=settings.iterations,
                seed=settings.seed,
                max_points_per_center=settings.max_points_per_center,
                algorithm=settings.algorithm,
                device=device,
                start=start,
                on_state=keep,
                on_assigned=progress.assigned,
            )
        except ValueError as error:
            raise DataError(f"{store.path}: {error}", fix="Run the embed stage again, with --force.") from error


class _Progress:
    """A bar over the rounds and a line for each, then a bar over the last assignment."""

    def __init__(self, rounds: int, images: int, start: Training | None) -> None:
        self._rounds, self._images = rounds, images
        self._done = 0 if start is None else len(start.history)
        self._clock = time.monotonic()
        self._open: Any = None
        self._bar: Any = None
        self._assigning = False

    def __enter__(self) -> "_Progress":
        if self._done:
            log.info(f"cluster   going on after round {self._done} of {self._rounds}")
        self._show("cluster", self._rounds, unit="rounds", start=self._done)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)

    def round(self, training: Training) -> None:
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        if not training.history:
            log.info(f"cluster   first centers in {units.duration(seconds)}")
            return
        last = training.history[-1]
        note = (
            f"objective {last['objective']:.5f} (cosine {1 - last['objective'] / 2:.4f}), {last['empty']:,.0f} empty,"
            f" imbalance {last['imbalance']:.2f}"
        )
        log.info(f"cluster   round {len(training.history)} of {self._rounds}: {note}, {units.duration(seconds)}")
        self._bar.advance(note=note)

    def assigned(self, images: int) -> None:
        if not self._assigning:
            self._assigning = True
            self._open.__exit__(None, None, None)
            self._show("assign", self._images, unit="images", start=0)
        self._bar.advance(images)

    def _show(self, what: str, total: int, *, unit: str, start: int) -> None:
        self._open = log.progress(what, total, unit=unit, start=start)
        self._bar = self._open.__enter__()


@dataclasses.dataclass(frozen=True)
class _StateFile:
    """The training as the last finished round left it: whole or absent, and only of the same settings and rows."""

    path: Path
    fingerprint: str

    def write(self, training: Training) -> None:
        history = json.dumps([self.fingerprint, training.history])
        with atomic_file(self.path) as temporary, temporary.open("wb") as handle:
            np.savez(handle, centers=training.centers, history=np.array(history))

    def read(self) -> Training | None:
        """None where there is none that fits."""
        if not self.path.is_file():
            return None
        try:
            with self.path.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                fingerprint, history = json.loads(str(stored["history"]))
                training = Training(stored["centers"], history)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            log.warn(f"{self.path}: cannot be read ({error}); the training starts anew")
            return None
        if fingerprint != self.fingerprint:
            log.warn(f"{self.path}: is of other rows or settings; the training starts anew")
            return None
        return training


def _fingerprint(store: EmbeddingStore, kept: np.ndarray, recipe: Recipe) -> str:
    """What the rounds depend on: the settings, which rows, and of which store."""
    digest = hashlib.sha256(kept.tobytes())
    digest.update(recipe.cluster.model_dump_json().encode())
    digest.update(json.dumps([dataclasses.asdict(shard) for shard in store.info.shards], sort_keys=True).encode())
    return digest.hexdigest()


def _check_memory(sample: int, dim: int, recipe: Recipe) -> None:
    """FAISS holds its sample in memory: better told before than killed after an hour."""
    needed, available = int(4 * dim * sample * _SPARE), tasks.available_memory()
    if needed > available:
        points = int(available / (4 * dim * _SPARE * recipe.cluster.num_centers))
        lower = f", or lower cluster.max_points_per_center to {points:,}" if points else ""
        raise ConfigError(
            f"cluster.algorithm: FAISS would hold {sample:,} embeddings of width {dim:,} in {units.memory(needed)} of"
            f" memory, but {units.memory(available)} are available.",
            fix=f"Set cluster.algorithm: blocks, which reads them from the disk at every round{lower}.",
        )


def _quality(store: EmbeddingStore, kept: np.ndarray, centers: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How alike the images of a cluster are, and how clearly they belong to it."""
    found = cluster_quality(store.images.select(kept), centers, labels)
    return {
        "size_quantiles": size_quantiles(np.bincount(labels, minlength=len(centers))),
        "within_cosine": found.within_cosine,
        "all_pairs_cosine": found.all_pairs_cosine,
        "margin_quantiles": margin_quantiles(found.margins),
        "margin_sample": len(found.margins),
    }


def _against_truth(classes: np.ndarray, labels: np.ndarray, field: str) -> dict[str, Any]:
    """Purity against the classes that the data itself names."""
    if (classes < 0).all():
        log.warn(f"cluster.truth_field: no kept image has {field!r}, so the clusters are compared with nothing")
        return {}
    return {"truth": {"field": field, **dataclasses.asdict(purity(labels, classes))}}


def _say(summary: dict[str, Any]) -> None:
    """The sizes and the purity in a line each; a warning where most clusters hold one image."""
    sizes = ", ".join(f"{size:,}" for size in summary["size_quantiles"].values())
    log.info(f"cluster   sizes (smallest, 5, 25, 50, 75, 95 %, largest): {sizes}; {summary['empty']:,} empty")
    if summary["within_cosine"] is not None:
        log.info(
            f"cluster   mean cosine of two images of a cluster {summary['within_cosine']:.3f}, of any two"
            f" {summary['all_pairs_cosine']:.3f}"
        )
    if (truth := summary.get("truth")) is not None:
        log.info(
            f"cluster   purity {truth['share']:.3f} by {truth['field']!r} ({truth['classes']:,} classes,"
            f" {truth['rows']:,} images), {truth['shuffled']:.3f} with the classes shuffled"
        )
    if summary["singletons"] > summary["centers"] / 2:
        log.warn(
            f"{summary['singletons']:,} of {summary['centers']:,} clusters hold one image; "
            f"{summary['images']:,} images are few for cluster.num_centers: {summary['centers']:,}"
        )


def size_summary(labels: np.ndarray, num_centers: int) -> dict[str, Any]:
    """How evenly the images are spread: Gini 0 is even, 1 is all in one cluster."""
    sizes = np.sort(np.bincount(labels, minlength=num_centers))
    return {
        "empty": int((sizes == 0).sum()),
        "singletons": int((sizes == 1).sum()),
        "smallest": int(sizes[0]),
        "median": float(np.median(sizes)),
        "largest": int(sizes[-1]),
        "gini": gini(sizes),
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
    wrong = np.flatnonzero(~is_unit(np.linalg.norm(centers.astype(np.float64), axis=1)))
    if len(wrong):
        raise DataError(f"{folder}: center {wrong[0]} is not a unit vector.", fix=fix)
    if labels.shape != (kept,):
        raise DataError(f"{folder}: {labels.size:,} labels for {kept:,} kept images.", fix=fix)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(centers):
        raise DataError(f"{folder}: labels outside the {len(centers):,} centers.", fix=fix)
    return centers.astype(np.float32), labels.astype(np.int32)
