"""The teacher: a frozen CLIP whose unit embeddings are computed once."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16
from PIL import Image
from torch import Tensor

from clip_cid.devices import Copies, Returning
from clip_cid.errors import ConfigError, DataError
from clip_cid.models.clip import Clip, count_truncated, crop_transform
from clip_cid.models.loading import NEEDS_ARCHITECTURE, load_clip
from clip_cid.models.references import HUB, LOCAL, RUN, is_checkpoint
from clip_cid.recipe import EmbedConfig, Precision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Embedding = Callable[[], Float16[np.ndarray, "batch dim"]]
"""Waits for unit rows that a device was told to compute, and gives them on the host.

Raises: DataError, if one is not finite, or zero.
"""


@dataclass(frozen=True)
class Teacher:
    """Both towers of a CLIP, giving unit vectors in float32 whatever the precision of the arithmetic."""

    clip: Clip
    dim: int
    identity: dict[str, Any]
    """reference, weights_sha256, model_cfg, preprocessing, precision: what decides the numbers of an embedding; and
    logit_scale, the factor from its cosines to its logits."""

    @property
    def device(self) -> torch.device:
        return self.clip.device

    @property
    def image_side(self) -> int:
        return self.clip.image_side

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        return self.clip.preprocess

    @property
    def preprocess_crop(self) -> Callable[[Image.Image], Tensor]:
        return crop_transform(self.clip)

    def encode_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """`v_t` of docs/method.md: unit image embeddings, on the teacher's device.

        Raises:
            DataError: An embedding is not finite, or zero.
        """
        unit, bad = self._images(images)
        self._refuse(bad, len(unit), "image")
        return unit

    def encode_texts(self, captions: list[str]) -> Float[Tensor, "batch dim"]:
        """`u_t` of docs/method.md: unit text embeddings, on the teacher's device.

        Raises:
            DataError: An embedding is not finite, or zero.
        """
        unit, bad = self._texts(captions)
        self._refuse(bad, len(unit), "text")
        return unit

    def begin_images(self, images: Float[Tensor, "batch 3 height width"]) -> Embedding:
        """As `encode_images`, of which the host waits for nothing before it asks for the rows."""
        return self._begun(*self._images(images), "image")

    def begin_texts(self, captions: list[str]) -> Embedding:
        """As `encode_texts`, likewise."""
        return self._begun(*self._texts(captions), "text")

    def count_truncated(self, captions: list[str]) -> int:
        """How many captions are longer than its context."""
        return count_truncated(self.clip, captions)

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        dtype = _DTYPES.get(self.identity["precision"])
        with torch.inference_mode(), torch.autocast(self.clip.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    @functools.cached_property
    def _copies(self) -> Copies:
        return Copies(self.clip.device)

    def _images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.clip.model
        with self._arithmetic():
            features = model.encode_image(self._copies(images))
        return _unit(features)

    def _texts(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        model: Any = self.clip.model
        with self._arithmetic():
            features = model.encode_text(self._copies(self.clip.tokenizer(captions)))
        return _unit(features)

    def _begun(self, unit: Tensor, bad: Tensor, kind: str) -> Embedding:
        rows, of_them = Returning(unit.half()), Returning(bad)

        def finished() -> Float16[np.ndarray, "batch dim"]:
            self._refuse(of_them.here(), len(unit), kind)
            return rows.here().numpy()

        return finished

    def _refuse(self, bad: Tensor, rows: int, kind: str) -> None:
        if count := int(bad):
            raise DataError(
                f"{self.identity['reference']}: {count} of {rows} {kind} embeddings are zero or not finite.",
                fix=f"Set embed.precision: fp32 (it was {self.identity['precision']}), or use another teacher.",
            )


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length one in float32, and how many cannot have it."""
    features = features.float()
    norms = features.norm(dim=-1)
    return F.normalize(features, dim=-1), (~(torch.isfinite(norms) & (norms > 0))).sum()


def load_teacher(embed: EmbedConfig, *, device: str) -> Teacher:
    """The teacher a recipe names, with its weights.

    Raises:
        ConfigError: No such model, or no weights named for an open_clip architecture.
        DataError: The weights could not be loaded.
    """
    reference = teacher_reference(embed)
    clip = load_clip(reference, device=device)
    clip.model.requires_grad_(False)
    identity = {
        "reference": reference,
        "weights_sha256": weights_sha256(clip.model),
        "model_cfg": clip.model_cfg,
        "preprocessing": clip.preprocess_cfg,
        "precision": _precision(embed.precision, clip.device),
        "logit_scale": float(clip.model.state_dict()["logit_scale"].exp()),
    }
    return Teacher(clip=clip, dim=clip.dim, identity=identity)


def teacher_reference(embed: EmbedConfig) -> str:
    """The teacher as `load_clip` names it; `embed.pretrained` belongs to plain open_clip names only."""
    if embed.teacher == "none":
        raise ConfigError(
            "embed.teacher: none, so there is nothing to embed with.",
            fix="Name a teacher, give embed.existing, or train without: distill.weights: clip-only.",
        )
    if embed.teacher.startswith((RUN, LOCAL, HUB)):
        return embed.teacher
    if is_checkpoint(embed.teacher):
        raise ConfigError(
            f"embed.teacher: {embed.teacher} is a checkpoint, which does not say its architecture.",
            fix=NEEDS_ARCHITECTURE,
        )
    if embed.pretrained is None:
        raise ConfigError(
            f"embed.teacher: {embed.teacher} is an architecture without weights.",
            fix="Set embed.pretrained to one of its tags in open_clip or to a checkpoint (.pt), or give local-dir:,"
            " hf-hub: or run:.",
        )
    return f"{embed.teacher}/{embed.pretrained}"


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights; it does not depend on the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision
