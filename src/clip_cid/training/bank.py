"""The bank: stored embeddings of a draw of all training pairs, for the losses that compare a batch with them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_cid import log
from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.recipe import DistillConfig
from clip_cid.training.batches import BankRows, TrainingPairs, unit_teacher_rows

_STEPS = 50  # with one draw: rows all over a large store are slow to read
_SAMPLE = 256  # teacher embeddings that give the perplexity


class Bank:
    """Draws of stored embeddings, each for some steps. Seed and step alone decide a draw, on every rank alike.

    Args:
        training: Pairs with a store.
        settings: Of the training.
        device: Where the losses are computed.
    """

    def __init__(self, training: TrainingPairs, settings: DistillConfig, device: torch.device) -> None:
        self._training, self._device = training, device
        self._size, self._seed = min(settings.bank_size, len(training)), settings.seed
        self._drawn: tuple[int, BankRows] | None = None

    def __len__(self) -> int:
        return self._size

    def at(self, step: int) -> BankRows:
        """The draw of a step.

        Raises:
            DataError: A stored vector is not of unit length.
        """
        number = step // _STEPS
        if self._drawn is None or (self._drawn[0] != number and self._size < len(self._training)):
            self._drawn = number, self._draw(number)
        return self._drawn[1]

    def _draw(self, number: int) -> BankRows:
        training, random = self._training, np.random.default_rng([self._seed, number])
        assert training.store is not None
        assert training.store_rows is not None

        index = np.sort(random.choice(len(training), self._size, replace=False, shuffle=False))  # reads go forward
        rows = training.store_rows[index]
        images = unit_teacher_rows(training.store.images[rows], rows, "image").to(self._device)
        if training.num_captions is None:
            return BankRows(images, None)

        # An image without a caption has no text to store.
        captioned = np.flatnonzero(training.num_captions)
        if len(captioned) < len(training):
            index = np.sort(random.choice(captioned, min(self._size, len(captioned)), replace=False, shuffle=False))
            rows = training.store_rows[index]
        captions = random.integers(training.num_captions[index])
        texts = unit_teacher_rows(training.store.text_for(rows, captions), rows, "text")
        return BankRows(images, texts.to(self._device))


def log_perplexities(bank: Bank, training: TrainingPairs, settings: DistillConfig) -> None:
    """Say how many rows of the bank the teacher finds likely, on average, for each loss that reads them."""
    store, drawn = training.store, bank.at(0)
    sample = np.unique(np.linspace(0, len(training) - 1, _SAMPLE).astype(np.int64))
    assert store is not None
    assert training.store_rows is not None
    rows = training.store_rows[sample]

    compared: list[tuple[str, str, Any, Tensor | None]] = [
        ("image", "texts", store.images, drawn.texts),
        ("text", "images", store.texts if settings.weights.bank_text else None, drawn.images),
    ]
    for one, others, vectors, stored in compared:
        if not getattr(settings.weights, f"bank_{one}") or stored is None:
            continue
        teacher = unit_teacher_rows(vectors[rows], rows, one).to(stored.device)
        perplexity = float(soft_centers(teacher, stored, scale=settings.bank_scale).entropy.mean().exp())
        log.info(
            f"distill   the teacher finds {perplexity:,.4g} of {len(bank):,} stored {others} likely for one {one}"
            f" (perplexity, at distill.bank_scale {settings.bank_scale:g})"
        )
