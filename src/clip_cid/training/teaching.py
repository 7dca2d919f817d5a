"""What is read off the teacher before the first step: sigma, its perplexity, its own scale, its soft centers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from clip_cid import log
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import ConfigError
from clip_cid.method.distill.cluster_distillation import calibrated_scale
from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.recipe import DistillConfig
from clip_cid.training.batches import TrainingPairs, unit_teacher_rows
from clip_cid.training.soft_targets import soft_targets

USUAL_SCALE = 100.0
"""What the logit scale of published CLIP models ends at."""
_ASKED = 512  # teacher embeddings that tell the perplexity: its mean is then known to a few percent


@dataclasses.dataclass(frozen=True)
class Teaching:
    """How sharply the teacher sees the centers."""

    scale: float
    """sigma."""
    perplexity: float | None
    """How many centers the teacher finds likely for an image, on average; None without clusters."""

    @property
    def summary(self) -> dict[str, float]:
        return {} if self.perplexity is None else {"head_scale": self.scale, "teacher_perplexity": self.perplexity}


def read_teacher(
    settings: DistillConfig,
    training: TrainingPairs,
    store: EmbeddingStore | None,
    centers: Float[np.ndarray, "centers dim"] | None,
) -> Teaching:
    """Sigma, as it is set or calibrated to `head_perplexity`, and the teacher's perplexity over all centers with it.

    Raises:
        ConfigError: No sigma gives the perplexity asked for.
    """
    if store is None or centers is None or training.store_rows is None:
        return Teaching(settings.head_scale, None)
    asked = np.unique(np.linspace(0, len(training) - 1, _ASKED).astype(np.int64))
    rows = training.store_rows[asked]
    teacher, table = unit_teacher_rows(store.images[rows], rows, "image"), torch.from_numpy(centers)
    scale = settings.head_scale
    if settings.head_perplexity is not None:
        try:
            scale = calibrated_scale(teacher, table, perplexity=settings.head_perplexity)
        except ValueError as error:
            raise ConfigError(
                f"distill.head_perplexity: {error}.", fix="Choose another, or leave it out and set distill.head_scale."
            ) from error
    softened = soft_centers(teacher, table, scale=scale, temperature=settings.temperature)
    found = Teaching(scale, float(softened.entropy.mean().exp()))
    log.info(
        f"distill   the teacher finds {found.perplexity:,.4g} of {len(centers):,} centers likely for an image"
        f" (perplexity, at sigma {scale:.4g} and temperature {settings.temperature:g})"
    )
    return found


def uses_soft_centers(settings: DistillConfig) -> bool:
    """Whether all that `L_kl` needs of the teacher can be computed once: all centers take part, and none moves."""
    return settings.weights.cluster_kl > 0 and settings.head_lr == 0 and settings.sample_rate == 1


def with_soft_centers(
    training: TrainingPairs,
    centers: Float[np.ndarray, "centers dim"],
    settings: DistillConfig,
    folder: Path,
    scale: float,
    key: str,
    device: torch.device,
) -> TrainingPairs:
    """The same pairs with the teacher's soft centers, computed or taken up from a killed attempt."""
    if training.store is None or training.store_rows is None:
        return training
    found = soft_targets(
        folder,
        training.store.images,
        training.store_rows,
        centers,
        scale=scale,
        temperature=settings.temperature,
        key=key,
        device=device,
    )
    return dataclasses.replace(training, soft_centers=found)


def teacher_scale(settings: DistillConfig, teacher: dict[str, Any] | None) -> float:
    """The teacher's factor from cosines to logits: as set, as stored with its embeddings, or what CLIP models end with."""
    if settings.teacher_scale is not None or not settings.weights.affinity:
        return settings.teacher_scale or USUAL_SCALE
    if "logit_scale" in (teacher or {}):
        return float((teacher or {})["logit_scale"])
    log.info(f"distill   the teacher's logit scale is not stored with these embeddings; {USUAL_SCALE:g} is taken")
    return USUAL_SCALE
