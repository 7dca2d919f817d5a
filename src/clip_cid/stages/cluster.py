"""Spherical k-means over the kept teacher image embeddings (paper section 3.2, Eq. 1), and over their captions'."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import engine, log, tasks, units
from clip_cid.data.array_folder import ArrayFolder
from clip_cid.data.embeddings.caption_rows import CaptionRows
from clip_cid.data.embeddings.files import read_info
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import read_npy
from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.method.cluster.cluster_quality import gini, margin_quantiles, purity, quality_of_rows, size_quantiles
from clip_cid.method.cluster.clustering import Clusters, KMeansState, cluster_rows
from clip_cid.method.cluster.range_tasks import LAST_ASSIGNMENT, Shared
from clip_cid.method.jobs import Job, Progress
from clip_cid.method.unit_rows import Rows, UnitRows
from clip_cid.models.device import resolve_device
from clip_cid.recipe import Recipe, settled
from clip_cid.run_folder import WORK, RunFolder, atomic_file
from clip_cid.stage_names import EMBED
from clip_cid.summaries import ClusterSummary, ClusterTruth, KmeansRound, TextClusters
from clip_cid.training.join import read_kept
from clip_cid.unit_length import is_unit

_OF_IMAGES, OF_TEXTS = "", "text_"
"""How the names of files begin that belong to the images and to their captions."""
_STATE_FILE = "training.npz"
_DIGITS = 16  # of the fingerprint, in the names of what tasks leave
_LONG = 60.0  # expected seconds from which more processes are worth their start
_ROW_SECONDS, _PRODUCT_SECONDS = 5e-6, 1e-11  # of one core, for a row and for each number of it and center
_CENTER_BYTES = 25  # of a process that does tasks, for each number of a center
_MEMORY_SHARE = 0.5  # of what is left, that all of them may take
_ONLY_OF_TEXTS = {"texts", "num_text_centers"}
"""Settings that say nothing of the clusters of images."""


def run(folder: RunFolder, out: Path, recipe: Recipe) -> ClusterSummary:
    """Centers and the cluster of each kept image; writes `centers.npy` and `labels.npy`.

    With `cluster.texts` likewise of the captions of these images: `text_centers.npy` and `text_labels.npy`, in the
    order of `CaptionRows`. While it runs, `work/training.npz` (and `work/text_training.npz`) hold the centers after
    the last finished round.
    """
    settings = recipe.cluster
    store = EmbeddingStore.open(folder.stage(EMBED))
    kept = read_kept(folder, store) if recipe.balance.enabled else np.flatnonzero(store.ok)
    texts = CaptionRows(store, kept) if settings.texts else None

    # What does not fit is refused before anything old is touched.
    num_centers = settled(settings.num_centers)
    if settings.existing is None:
        _check_centers("num_centers", num_centers, len(kept), "kept images")
        if texts is not None:
            _check_centers("num_text_centers", settings.text_centers, len(texts), "captions of kept images")
        folder.accept()

    centers, labels, made = _clusters(_Work(_OF_IMAGES, num_centers, store, kept, out, recipe))
    of_texts = None
    if texts is not None:
        of_texts = _text_summary(*_clusters(_Work(OF_TEXTS, settings.text_centers, store, kept, out, recipe)))

    truth = None
    if settings.truth_field is not None:
        classes, _ = store.classes(settings.truth_field)
        truth = _against_truth(classes[kept], labels, settings.truth_field)

    summary = ClusterSummary(
        images=len(kept),
        centers=len(centers),
        **size_summary(labels, len(centers)),
        **({} if settings.existing is None else {"from_": str(settings.existing)}),
        **made,
        truth=truth,
        texts=of_texts,
    )
    _log(summary)
    return summary


def _check_centers(setting: str, centers: int, rows: int, what: str) -> None:
    if centers > rows:
        raise ConfigError(
            f"cluster.{setting}: {centers:,} centers for {rows:,} {what}.",
            fix=f"Set cluster.{setting} to {max(1, rows // 20):,} or so (20 rows a cluster).",
        )


class _Work:
    """The rows of images, or of captions, and who clusters them: this process, or tasks in several.

    Args:
        prefix: Of the names of its files.
        num_centers: K.
        store: The embeddings.
        kept: The images.
        out: The work folder of the stage.
        recipe: The settings.
    """

    def __init__(
        self, prefix: str, num_centers: int, store: EmbeddingStore, kept: np.ndarray, out: Path, recipe: Recipe
    ) -> None:
        self.prefix, self.num_centers, self.store, self.out, self.recipe = prefix, num_centers, store, out, recipe
        self.fingerprint = _fingerprint(store, kept, recipe, prefix)
        self.device = str(resolve_device(recipe.machine.device))
        self._kept = kept
        self._arrays = ArrayFolder(out / WORK / f"{prefix}tasks")

    @functools.cached_property
    def rows(self) -> UnitRows:
        """Read once, to measure them."""
        try:
            return UnitRows(_stored(self.store, self._kept, self.prefix), name="embeddings", any_length=True)
        except ValueError as error:
            raise DataError(f"{self.store.path}: {error}", fix="Run the embed stage again, with --force.") from error

    @functools.cached_property
    def _measured(self) -> ArrayFolder:
        """What other processes need to open the rows without reading them."""
        folder = ArrayFolder(self.out / WORK / f"{self.prefix}rows")
        folder.save_all({"kept": self._kept, "lengths": self.rows.lengths}, {})
        return folder

    def shared(self, on_assigned: Callable[[int], Any] | None = None) -> Shared | None:
        """Who does the tasks; None where this process does everything.

        Args:
            on_assigned: Called with the number of rows that were assigned at last.
        """
        if self.recipe.cluster.existing is not None or (self.recipe.machine.ray is None and self._processes <= 1):
            return None
        return Shared(self._arrays, functools.partial(self._run_job, on_assigned), self.fingerprint[:_DIGITS])

    def _run_job(self, on_assigned: Callable[[int], Any] | None, job: Job, missing: Sequence[Any]) -> None:
        """Do what is missing of a job: a `clip_cid.method.jobs.RunJob`."""
        if done := len(job.tasks) - len(missing):
            log.info(f"cluster   {job.title}: {done:,} of {len(job.tasks):,} tasks were done before")
        progress = Progress(job, missing)
        tell = on_assigned if job.title == LAST_ASSIGNMENT else None
        if tell is not None:
            tell(progress.rows)
        engine.run_tasks(
            missing,
            functools.partial(_open_job, job, self._arrays, self.store.path, self._measured, self.prefix),
            machine=self.recipe.machine,
            folder=self._arrays.path,
            processes=self._processes,
            leaves=lambda task: self._arrays.file(job.array(task)),
            gpus=0 if job.device == "cpu" else 1,
            on_done=lambda task: None if tell is None else tell(progress.finish(task)),
            stay=True,
        )

    @functools.cached_property
    def _processes(self) -> int:
        """Processes of this machine: several where the work is long, as far as their memory goes."""
        machine, settings = self.recipe.machine, self.recipe.cluster
        if self.device != "cpu":
            return 1
        if machine.balance_processes:
            return machine.balance_processes

        size = self.num_centers * self.rows.dim
        trained = min(len(self.rows), settings.max_points_per_center * self.num_centers)
        seconds = (settings.iterations * trained + len(self.rows)) * (_ROW_SECONDS + size * _PRODUCT_SECONDS)
        if seconds < _LONG:
            return 1
        by_memory = int(_MEMORY_SHARE * tasks.available_memory() / (_CENTER_BYTES * size))
        return max(1, min(machine.threads or tasks.available_cores(), by_memory))


def _stored(store: EmbeddingStore, kept: np.ndarray, prefix: str) -> Rows:
    return CaptionRows(store, kept) if prefix == OF_TEXTS else store.images.select(kept)


def _open_job(
    job: Job, arrays: ArrayFolder, store_path: Path, shared: ArrayFolder, prefix: str
) -> Callable[[Any], None]:
    """Open what the tasks read; in each process once."""
    if (saved := shared.load_all()) is None:
        raise RunError(
            f"{shared.path}: what was prepared for the tasks cannot be read any more.",
            fix="Check the disk, then run the same command again; what is missing is done again.",
        )
    store = EmbeddingStore(store_path, read_info(store_path))
    kept, lengths = (saved[0][name] for name in ("kept", "lengths"))
    rows = UnitRows(_stored(store, kept, prefix), name="embeddings", any_length=True, lengths=lengths)
    return job.open(arrays, rows, None)


def _clusters(work: _Work) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Centers and labels of all rows, written as `centers.npy` and `labels.npy` after the prefix; and what is said of them.

    They are computed, or read from where they were made.
    """
    origin: dict[str, Any] = {}
    if (existing := work.recipe.cluster.existing) is not None:
        centers, labels = read_clusters(existing, dim=work.store.dim, kept=len(work.rows), prefix=work.prefix)
    else:
        clusters = _cluster(work)
        centers, labels = clusters.centers, clusters.labels
        origin = {"objective": clusters.objective, "history": [KmeansRound(**stats) for stats in clusters.history]}

    np.save(work.out / f"{work.prefix}centers.npy", centers)
    np.save(work.out / f"{work.prefix}labels.npy", labels)
    return centers, labels, {**_quality(work, centers, labels), **origin}


def _cluster(work: _Work) -> Clusters:
    """Cluster the rows, from the state that an earlier attempt left if there is one."""
    settings = work.recipe.cluster
    (work.out / WORK).mkdir(exist_ok=True)
    file = _StateFile(work.out / WORK / f"{work.prefix}{_STATE_FILE}", work.fingerprint)
    start = file.read()
    with _Progress(settings.iterations, len(work.rows), start, texts=work.prefix == OF_TEXTS) as progress:

        def on_state(state: KMeansState) -> None:
            file.write(state)
            progress.round(state)

        return cluster_rows(
            work.rows,
            num_centers=work.num_centers,
            iterations=settings.iterations,
            seed=settings.seed,
            max_points_per_center=settings.max_points_per_center,
            device=work.device,
            start=start,
            on_state=on_state,
            on_assigned=progress.assigned,
            shared=work.shared(progress.assigned),
        )


class _Progress:
    """A bar over the rounds and a line for each, then a bar over the last assignment."""

    def __init__(self, rounds: int, rows: int, start: KMeansState | None, *, texts: bool) -> None:
        self._rounds, self._rows = rounds, rows
        self._name, self._what = ("cluster   texts:", "texts") if texts else ("cluster  ", "images")
        self._finished = 0 if start is None else len(start.history)
        self._last_time = time.monotonic()
        self._open: Any = None
        self._bar: Any = None
        self._assigning = False

    def __enter__(self) -> "_Progress":
        if self._finished:
            log.info(f"{self._name} resumes after round {self._finished} of {self._rounds}")
        self._show("cluster", self._rounds, unit="rounds", start=self._finished)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)

    def round(self, state: KMeansState) -> None:
        seconds, self._last_time = time.monotonic() - self._last_time, time.monotonic()
        if not state.history:
            log.info(f"{self._name} first centers in {units.duration(seconds)}")
            return

        stats = state.history[-1]
        note = (
            f"objective {stats['objective']:.5f} (cosine {1 - stats['objective'] / 2:.4f}),"
            f" {stats['empty']:,.0f} empty,"
            f" imbalance {stats['imbalance']:.2f}"
        )
        log.info(f"{self._name} round {len(state.history)} of {self._rounds}: {note}, {units.duration(seconds)}")
        self._bar.advance(note=note)

    def assigned(self, rows: int) -> None:
        if not self._assigning:
            self._assigning = True
            self._open.__exit__(None, None, None)
            self._show("assign", self._rows, unit=self._what, start=0)
        self._bar.advance(rows)

    def _show(self, what: str, total: int, *, unit: str, start: int) -> None:
        self._open = log.progress(what, total, unit=unit, start=start)
        self._bar = self._open.__enter__()


@dataclasses.dataclass(frozen=True)
class _StateFile:
    """The k-means after the last finished round: whole or absent, and only of the same settings and rows."""

    path: Path
    fingerprint: str

    def write(self, state: KMeansState) -> None:
        history = json.dumps([self.fingerprint, state.history])
        with atomic_file(self.path) as temporary, temporary.open("wb") as handle:
            np.savez(handle, centers=state.centers, history=np.array(history))

    def read(self) -> KMeansState | None:
        """The state, or None if there is none of these settings and rows."""
        if not self.path.is_file():
            return None

        try:
            with self.path.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                fingerprint, history = json.loads(str(stored["history"]))
                state = KMeansState(stored["centers"], history)
        except Exception as error:  # a damaged archive raises nearly anything
            log.warn(f"{self.path}: cannot be read ({error}); the k-means starts anew")
            return None

        if fingerprint != self.fingerprint:
            log.warn(f"{self.path}: belongs to other rows or settings; the k-means starts anew")
            return None
        return state


def _fingerprint(store: EmbeddingStore, kept: np.ndarray, recipe: Recipe, prefix: str) -> str:
    """A digest of all that decides the rounds: the settings, the rows and their store."""
    digest = hashlib.sha256(kept.tobytes())
    digest.update(recipe.cluster.model_dump_json(exclude=set() if prefix == OF_TEXTS else _ONLY_OF_TEXTS).encode())
    shards = [dataclasses.asdict(shard) for shard in store.info.shards]
    for shard in shards:
        del shard["made_on"]  # older versions did not know it, and their work goes on
    digest.update(json.dumps(shards, sort_keys=True).encode())
    return digest.hexdigest()


def _quality(work: _Work, centers: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How similar the rows of a cluster are, and how clearly they belong to it."""
    quality = quality_of_rows(work.rows, centers, labels, work.shared())
    return {
        "size_quantiles": size_quantiles(np.bincount(labels, minlength=len(centers))),
        "within_cosine": quality.within_cosine,
        "all_pairs_cosine": quality.all_pairs_cosine,
        "margin_quantiles": margin_quantiles(quality.margins),
        "margin_sample": len(quality.margins),
    }


def _text_summary(centers: np.ndarray, labels: np.ndarray, made: dict[str, Any]) -> TextClusters:
    return TextClusters(texts=len(labels), centers=len(centers), **size_summary(labels, len(centers)), **made)


def _against_truth(classes: np.ndarray, labels: np.ndarray, field: str) -> ClusterTruth | None:
    """Purity against the classes that the data names."""
    if (classes < 0).all():
        log.warn(f"cluster.truth_field: no kept image has {field!r}, so the purity is not computed")
        return None
    return ClusterTruth(field=field, **dataclasses.asdict(purity(labels, classes)))


def _log(summary: ClusterSummary) -> None:
    """Log the sizes, the cosines and the purity; warn if most clusters hold one image, or one text."""
    _log_sizes(summary, "cluster  ", "images")
    if summary.texts is not None:
        _log_sizes(summary.texts, "cluster   texts:", "texts")
        _warn_of_singletons(summary.texts, summary.texts.texts, "text", "num_text_centers")

    if (truth := summary.truth) is not None:
        log.info(
            f"cluster   purity {truth.share:.3f} by {truth.field!r} ({truth.classes:,} classes,"
            f" {truth.rows:,} images), {truth.shuffled:.3f} with the classes shuffled"
        )

    _warn_of_singletons(summary, summary.images, "image", "num_centers")


def _log_sizes(clusters: ClusterSummary | TextClusters, name: str, what: str) -> None:
    sizes = ", ".join(f"{size:,}" for size in clusters.size_quantiles.values())
    log.info(f"{name} sizes (smallest, 5, 25, 50, 75, 95 %, largest): {sizes}; {clusters.empty:,} empty")
    if clusters.within_cosine is not None:
        log.info(
            f"{name} mean cosine of two {what} of a cluster {clusters.within_cosine:.3f}, of any two"
            f" {clusters.all_pairs_cosine:.3f}"
        )


def _warn_of_singletons(clusters: ClusterSummary | TextClusters, rows: int, what: str, setting: str) -> None:
    if clusters.singletons > clusters.centers / 2:
        log.warn(
            f"{clusters.singletons:,} of {clusters.centers:,} clusters hold one {what}; "
            f"{rows:,} {what}s are few for cluster.{setting}: {clusters.centers:,}"
        )


def size_summary(labels: np.ndarray, num_centers: int) -> dict[str, Any]:
    """How evenly the rows are spread: Gini 0 is even, 1 is all in one cluster."""
    sizes = np.sort(np.bincount(labels, minlength=num_centers))
    return {
        "empty": int((sizes == 0).sum()),
        "singletons": int((sizes == 1).sum()),
        "smallest": int(sizes[0]),
        "median": float(np.median(sizes)),
        "largest": int(sizes[-1]),
        "gini": gini(sizes),
    }


def read_clusters(folder: Path, *, dim: int, kept: int, prefix: str = _OF_IMAGES) -> tuple[np.ndarray, np.ndarray]:
    """Clusters made elsewhere: unit centers of the store's width, a label for each kept image or each caption of one."""
    fix = "Give the cluster folder of a run over the same kept images, or run the cluster stage."
    what, names = "kept images", [f"{prefix}{name}.npy" for name in ("centers", "labels")]
    if prefix == OF_TEXTS:
        what = "captions of kept images"
        fix = "Give the cluster folder of a run with cluster.texts: true over the same kept images, or run the stage."
    try:
        centers, labels = (read_npy(folder / name) for name in names)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot read {' and '.join(names)} ({error}).", fix=fix) from error

    if centers.ndim != 2 or centers.shape[1] != dim or centers.dtype.kind != "f":
        raise DataError(
            f"{folder}: centers are {centers.dtype} of shape {centers.shape}, but embeddings of width {dim}.", fix=fix
        )
    wrong = np.flatnonzero(~is_unit(np.linalg.norm(centers.astype(np.float64), axis=1)))
    if len(wrong):
        raise DataError(f"{folder}: center {wrong[0]} is not a unit vector.", fix=fix)

    if labels.shape != (kept,):
        raise DataError(f"{folder}: {labels.size:,} labels for {kept:,} {what}.", fix=fix)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(centers):
        raise DataError(f"{folder}: labels outside the {len(centers):,} centers.", fix=fix)

    return centers.astype(np.float32, order="C"), labels.astype(np.int32)
