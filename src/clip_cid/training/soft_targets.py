"""Computed from the teacher once, before the first step: sigma, perplexity, logit scale and soft centers."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int

from clip_cid import log
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import new_npy
from clip_cid.errors import ConfigError
from clip_cid.method.distill.cluster_distillation import calibrated_scale
from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.method.unit_rows import Rows
from clip_cid.recipe import DistillConfig
from clip_cid.run_folder import read_json, write_json
from clip_cid.training.batches import SoftTargets, TrainingPairs, unit_teacher_rows

USUAL_SCALE = 100.0
"""The logit scale at which published CLIP models end."""
_SAMPLE = 512  # teacher embeddings that give the perplexity: its mean is then known to a few percent
_ROWS = 8192
_DONE = "done.json"


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """How sharply the teacher's distribution over the centers peaks."""

    scale: float
    """sigma."""
    perplexity: float | None
    """How many centers are likely for an image by the teacher, on average; None without clusters."""

    @property
    def summary(self) -> dict[str, float]:
        return {} if self.perplexity is None else {"head_scale": self.scale, "teacher_perplexity": self.perplexity}


def measure_sharpness(
    settings: DistillConfig,
    training: TrainingPairs,
    store: EmbeddingStore | None,
    centers: Float[np.ndarray, "centers dim"] | None,
) -> Sharpness:
    """Sigma, as it is set or calibrated to `head_perplexity`, and the teacher's perplexity over all centers with it.

    Raises:
        ConfigError: No sigma gives `head_perplexity`.
    """
    if store is None or centers is None or training.store_rows is None:
        return Sharpness(settings.head_scale, None)

    sample = np.unique(np.linspace(0, len(training) - 1, _SAMPLE).astype(np.int64))
    rows = training.store_rows[sample]
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
    sharpness = Sharpness(scale, float(softened.entropy.mean().exp()))
    log.info(
        f"distill   the teacher finds {sharpness.perplexity:,.4g} of {len(centers):,} centers likely for an image"
        f" (perplexity, at sigma {scale:.4g} and temperature {settings.temperature:g})"
    )
    return sharpness


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


def uses_soft_centers(settings: DistillConfig) -> bool:
    """Whether the teacher's side of `L_kl` can be computed once: all centers take part, and none learns."""
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
        device=device,
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
    device: torch.device,
) -> SoftTargets:
    """Mu and H of the teacher for each training row; `soft_centre` in docs/method.md.

    They are float32: in float16 the error would exceed the divergence of a well-trained student. A killed
    attempt is resumed, block by block, if it had the same `key`.

    Args:
        folder: Where `mean.npy` (rows, dim), `entropy.npy` (rows,) and `done.json` are or will be.
        images: The teacher's stored image embeddings (rows, dim).
        store_rows: The row of these for each training row.
        centers: Unit rows, all of them.
        scale: sigma.
        temperature: tau.
        key: Digest of everything that decides the result.
        device: Where the products are computed.

    Raises:
        DataError: A teacher vector is not of unit length.
    """
    # The arrays, mapped from files; a killed attempt has filled their first rows.
    folder.mkdir(exist_ok=True)
    mean, entropy = folder / "mean.npy", folder / "entropy.npy"
    done = _rows_done(folder, key) if mean.is_file() and entropy.is_file() else 0
    if not done:
        new_npy(mean, np.float32, (len(store_rows), images.shape[1]))
        new_npy(entropy, np.float64, (len(store_rows),))
    kept = SoftTargets(np.load(mean, mmap_mode="r+"), np.load(entropy, mmap_mode="r+"), scale / temperature)

    table = torch.from_numpy(centers).to(device)
    with log.progress("soft centers", len(store_rows), unit="images", start=done) as bar:
        for start in range(done, len(store_rows), _ROWS):
            rows = store_rows[start : start + _ROWS]
            teacher = unit_teacher_rows(images[rows], rows, "image").to(device)
            softened = soft_centers(teacher, table, scale=scale, temperature=temperature)
            kept.mean[start : start + _ROWS] = softened.mean.cpu().numpy()
            kept.entropy[start : start + _ROWS] = softened.entropy.cpu().numpy()
            _note(folder, kept, {"key": key, "rows": start + len(rows)})
            bar.advance(len(rows))
    return kept


def _rows_done(folder: Path, key: str) -> int:
    path = folder / _DONE
    state = read_json(path) if path.is_file() else {}
    return int(state["rows"]) if state.get("key") == key else 0


def _note(folder: Path, kept: SoftTargets, state: dict[str, Any]) -> None:
    """Only what is on the disk counts as done."""
    for array in (kept.mean, kept.entropy):
        cast(np.memmap, array).flush()
    write_json(folder / _DONE, state)
