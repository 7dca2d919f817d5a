"""Computed from the teacher once, before the first step: sigma, perplexity, logit scale, soft centers, more labels."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_cid import log
from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import ConfigError
from clip_cid.method.distill.center_pass import near_centers
from clip_cid.method.distill.cluster_distillation import calibrated_scale, nearest_labels
from clip_cid.method.distill.cluster_passes import passes_of
from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.method.unit_rows import Rows
from clip_cid.recipe import DistillConfig
from clip_cid.training.batches import SoftTargets, TrainingPairs, add_rows, unit_teacher_rows
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.training.ranks.parts import Column, compute_by_parts

USUAL_SCALE = 100.0
"""The logit scale at which published CLIP models end."""
_SAMPLE = 512  # teacher embeddings that give the perplexity: its mean is then known to a few percent
_CENTERS = 8192  # at once


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """How sharply the teacher's distribution over the centers peaks."""

    scale: float
    """sigma."""
    perplexity: float | None
    """How many centers are likely for an image by the teacher, on average; None without clusters."""
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    """sigma of the other passes over centers, by their names."""

    @property
    def summary(self) -> dict[str, float]:
        return {} if self.perplexity is None else {"head_scale": self.scale, "teacher_perplexity": self.perplexity}


def measure_sharpness(
    settings: DistillConfig,
    training: TrainingPairs,
    store: EmbeddingStore | None,
    centers: Float[np.ndarray, "centers dim"] | None,
    text_centers: Float[np.ndarray, "text_centers dim"] | None = None,
) -> Sharpness:
    """Sigma, as it is set or calibrated to `head_perplexity`, and the teacher's perplexity over all centers with it.

    Each pass over centers has its own: the cosines of a text to centers of images are other than those of an image.

    Raises:
        ConfigError: No sigma gives `head_perplexity`.
    """
    if store is None or training.store_rows is None:
        return Sharpness(settings.head_scale, None)

    sample = np.unique(np.linspace(0, len(training) - 1, _SAMPLE).astype(np.int64))
    rows = training.store_rows[sample]
    sharpness = Sharpness(settings.head_scale, None)
    if centers is not None:
        teacher = unit_teacher_rows(store.images[rows], rows, "image")
        sharpness = Sharpness(*_sharpness(settings, teacher, centers, "centers likely for an image"))

    # The passes beside that of the images over their own centers.
    scales: dict[str, float] = {}
    for one in passes_of(settings.weights.switched_on):
        table = text_centers if one.centers == "text_clusters" else centers
        if one.name == "cluster_kl" or table is None:
            continue
        of, stored = ("image", store.images) if one.teacher == "teacher_image" else ("text", store.texts)
        what = f"{'text centers' if one.centers == 'text_clusters' else 'centers'} likely for {'an image' if of == 'image' else 'a text'}"
        scales[one.name], _ = _sharpness(settings, unit_teacher_rows(stored[rows], rows, of), table, what)
    return dataclasses.replace(sharpness, scales=scales)


def _sharpness(
    settings: DistillConfig, teacher: Float[Tensor, "rows dim"], centers: Float[np.ndarray, "centers dim"], what: str
) -> tuple[float, float]:
    """Sigma and perplexity of the teacher's rows over the centers; `what` says which these are."""
    table = torch.from_numpy(centers)
    scale = settings.head_scale
    if settings.head_perplexity is not None:
        try:
            scale = calibrated_scale(teacher, table, perplexity=settings.head_perplexity)
        except ValueError as error:
            raise ConfigError(
                f"distill.head_perplexity: {error}.", fix="Choose another, or leave it out and set distill.head_scale."
            ) from error

    softened = soft_centers(teacher, table, scale=scale, temperature=settings.temperature)
    perplexity = float(softened.entropy.mean().exp())
    log.info(
        f"distill   the teacher finds {perplexity:,.4g} of {len(centers):,} {what}"
        f" (perplexity, at sigma {scale:.4g} and temperature {settings.temperature:g})"
    )
    return scale, perplexity


def teacher_scale(settings: DistillConfig, teacher: dict[str, Any] | None) -> float:
    """The teacher's factor from cosines to logits: as set, as stored with its embeddings, or the usual one.

    Args:
        settings: Of the training.
        teacher: What is stored of it; None if there are no embeddings.
    """
    if settings.teacher_scale is not None or not settings.weights.affinity or teacher is None:
        return settings.teacher_scale or USUAL_SCALE
    if "logit_scale" in teacher:
        return float(teacher["logit_scale"])
    log.info(f"distill   the teacher's logit scale is not stored with these embeddings; using {USUAL_SCALE:g}")
    return USUAL_SCALE


def measure_near_centers(
    settings: DistillConfig, training: TrainingPairs, centers: Float[np.ndarray, "centers dim"]
) -> None:
    """Say how many centers `ignore_near` leaves out for an image, from a sample of the images."""
    every = training.labels_of_losses
    if settings.ignore_near is None or settings.ignore_near >= 1 or every is None:
        return

    sample = np.unique(np.linspace(0, len(training) - 1, _SAMPLE).astype(np.int64))
    labels = every[sample].reshape(len(sample), -1).astype(np.int64)
    table = torch.from_numpy(centers)
    near, ignored = near_centers(table, torch.from_numpy(labels), settings.ignore_near, None), 0
    for block in table.split(_CENTERS):
        ignored += int(near.among(block).sum())
    mean = ignored / len(sample) - labels.shape[1]  # a center is near to itself

    log.info(
        f"distill   ignore_near {settings.ignore_near:g} leaves out {mean:,.4g} of {len(centers):,} centers as"
        " negatives of an image, on average"
    )
    if mean > len(centers) / 2:
        log.warn(
            f"distill.ignore_near: at a cosine above {settings.ignore_near:g} most centers are no negatives, so"
            " cluster_cls has little to learn from; raise it"
        )


def uses_soft_centers(settings: DistillConfig) -> bool:
    """Whether the teacher's side of `L_kl` can be computed once: all centers take part, and none learns.

    With embedded views it is computed in each step all the same: of every view once, it would take twice their disk.
    """
    return settings.weights.cluster_kl > 0 and settings.head_lr == 0 and settings.sample_rate == 1


def with_soft_centers(
    training: TrainingPairs,
    centers: Float[np.ndarray, "centers dim"],
    settings: DistillConfig,
    folder: Path,
    scale: float,
    key: str,
    ranks: Ranks,
) -> TrainingPairs:
    """The same pairs with the teacher's soft centers, computed, or resumed from a killed attempt."""
    if training.store is None or training.store_rows is None:
        return training

    targets = soft_targets(
        folder,
        training.store.images,
        training.store_rows,
        centers,
        scale=scale,
        temperature=settings.temperature,
        key=key,
        ranks=ranks,
    )
    return dataclasses.replace(training, soft_centers=targets)


def soft_targets(
    folder: Path,
    images: Rows,
    store_rows: Int[np.ndarray, " rows"],
    centers: Float[np.ndarray, "centers dim"],
    *,
    scale: float,
    temperature: float,
    key: str,
    ranks: Ranks = ALONE,
) -> SoftTargets:
    """Mu and H of the teacher for each training row; `soft_centre` in docs/method.md.

    They are float32: in float16 the error would exceed the divergence of a well-trained student. A killed
    attempt is resumed, part by part, if it had the same `key`.

    Args:
        folder: Where the parts of `mean` (rows, dim) and `entropy` (rows, 1) are or will be.
        images: The teacher's stored image embeddings (rows, dim).
        store_rows: The row of these for each training row.
        centers: Unit rows, all of them.
        scale: sigma.
        temperature: tau.
        key: Digest of everything that decides the result.
        ranks: Each computes some parts, on its device.

    Raises:
        DataError: A teacher vector is not of unit length.
    """
    table = torch.from_numpy(centers).to(ranks.device)

    def soften(block: slice) -> dict[str, Tensor]:
        rows = store_rows[block]
        teacher = unit_teacher_rows(images[rows], rows, "image").to(ranks.device)
        softened = soft_centers(teacher, table, scale=scale, temperature=temperature)
        return {"mean": softened.mean, "entropy": softened.entropy}

    columns = {"mean": Column(np.float32, images.shape[1]), "entropy": Column(np.float64, 1)}
    found = compute_by_parts(folder, columns, soften, rows=len(store_rows), key=key, what="soft centers", ranks=ranks)
    return SoftTargets(found["mean"], found["entropy"], scale / temperature)


def several_labels(
    folder: Path,
    images: Rows,
    store_rows: Int[np.ndarray, " rows"],
    labels: Int[np.ndarray, " rows"],
    centers: Float[np.ndarray, "centers dim"],
    *,
    count: int,
    key: str,
    ranks: Ranks = ALONE,
) -> ShardedRows:
    """The cluster of each training row and the next nearest centers, int32; `nearest_labels` in docs/method.md.

    A killed attempt is resumed as in `soft_targets`.

    Args:
        folder: Where the parts of `labels` (rows, count) are or will be.
        images: The teacher's stored image embeddings (rows, dim).
        store_rows: The row of these for each training row.
        labels: The cluster of each.
        centers: Unit rows, all of them.
        count: l.
        key: Digest of everything else that decides the result.
        ranks: Each computes some parts, on its device.

    Raises:
        DataError: A teacher vector is not of unit length.
    """
    table = torch.from_numpy(centers).to(ranks.device)

    def label(block: slice) -> dict[str, Tensor]:
        rows = store_rows[block]
        teacher = unit_teacher_rows(images[rows], rows, "image").to(ranks.device)
        own = torch.from_numpy(labels[block].astype(np.int64)).to(ranks.device)
        return {"labels": nearest_labels(teacher, table, own, count)}

    # Which rows are held out also depends on the number of ranks.
    digest = hashlib.sha256(key.encode())
    add_rows(digest, store_rows)
    columns = {"labels": Column(np.int32, count)}
    return compute_by_parts(
        folder, columns, label, rows=len(labels), key=digest.hexdigest(), what="labels", ranks=ranks
    )["labels"]
