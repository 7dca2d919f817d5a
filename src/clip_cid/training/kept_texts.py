"""A student with its teacher's text tower: which model that is, and whether it made the stored text embeddings."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clip_cid import log
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pair import BadSample
from clip_cid.errors import ClipCidError, ConfigError, DataError
from clip_cid.models.clip import Clip
from clip_cid.models.text_tower import TextTower, load_text_tower
from clip_cid.recipe import TEACHERS_TEXT_TOWER, DistillConfig
from clip_cid.training.batches import TrainingPairs

_COMPARED = 16  # captions
_LEAST_COSINE = 0.99  # bfloat16 and float16 leave 0.999; another model, tokenizer or activation is far below

_GIVE_REFERENCE = (
    "Give the teacher as distill.text_tower (local-dir:PATH, hf-hub:ORG/NAME, NAME/TAG or run:PATH), or set"
    " distill.text_tower: own."
)


def open_text_tower(settings: DistillConfig, store: EmbeddingStore | None) -> TextTower | None:
    """The text tower that the student keeps; None if it trains one of its own.

    Raises:
        ConfigError: The embeddings do not name their teacher, or its text tower cannot be taken out of it.
        DataError: The model cannot be loaded, is not the one that made the embeddings, or is of another width.
    """
    if not settings.keeps_text_tower or store is None:
        return None

    reference = text_tower_reference(settings, store.info.teacher)
    try:
        tower = load_text_tower(reference, weights_digest=store.info.teacher.get("weights_sha256"))
    except ClipCidError as error:
        if settings.text_tower != TEACHERS_TEXT_TOWER:
            raise
        raise type(error)(
            f"distill.text_tower: teacher, which the embeddings name as {reference}: {error.problem}",
            fix=f"{error.fix} If it lies elsewhere now, give it as distill.text_tower.",
        ) from error

    if tower.dim != store.dim:
        raise DataError(
            f"distill.text_tower: {reference} gives texts of width {tower.dim:,}, but the embeddings are"
            f" {store.dim:,} wide.",
            fix=_GIVE_REFERENCE,
        )
    return tower


def text_tower_reference(settings: DistillConfig, teacher: dict[str, Any]) -> str:
    """The model whose text tower is kept: as the recipe names it, or the embeddings.

    Raises:
        ConfigError: Neither does, or the embeddings are of several teachers.
    """
    if "joined" in teacher:
        raise ConfigError(
            f"distill.text_tower: {settings.text_tower}, but the embeddings are of {len(teacher['joined'])} joined"
            " teachers, and no text tower gives those.",
            fix="Set distill.text_tower: own.",
        )
    if settings.text_tower != TEACHERS_TEXT_TOWER:
        return settings.text_tower
    reference = str(teacher.get("reference", "unknown"))
    if "model_cfg" not in teacher:
        raise ConfigError(
            f"distill.text_tower: teacher, but the embeddings do not name a model that made them ({reference}).",
            fix=_GIVE_REFERENCE,
        )
    return reference


def compare_with_stored(clip: Clip, training: TrainingPairs) -> None:
    """Encode some captions: their embeddings must be those stored, or the student would not fit its targets.

    Raises:
        DataError: They are not.
    """
    captions, stored = _captions(training)
    if not captions:
        log.info("distill   no stored text embeddings are read, so the text tower is not compared with them")
        return

    model: Any = clip.model
    model.eval()
    with torch.inference_mode():
        texts = F.normalize(model.encode_text(clip.tokenizer(captions).to(clip.device)).float(), dim=1)
    model.train()
    cosines = (texts.cpu() * stored).sum(dim=1)
    worst = int(cosines.argmin())
    if not cosines[worst] >= _LEAST_COSINE:
        raise DataError(
            f"distill.text_tower: the embedding of {captions[worst]!r} has cosine {cosines[worst]:.3f} with the stored"
            f" one (the median of {len(captions)} captions is {cosines.median():.3f}), so another model made these.",
            fix=_GIVE_REFERENCE,
        )
    log.info(f"distill   the teacher's text tower is kept; {len(captions)} captions agree with the stored embeddings")


def _captions(training: TrainingPairs) -> tuple[list[str], Float[Tensor, "captions dim"]]:
    """First captions, and their stored embeddings at length one."""
    if training.store is None or training.store_rows is None or training.num_captions is None:
        return [], torch.empty(0, 0)
    captions: list[str] = []
    rows: list[int] = []
    captioned = np.flatnonzero(training.num_captions)
    for index in np.unique(captioned[np.linspace(0, len(captioned) - 1, _COMPARED).astype(np.int64)]).tolist():
        try:
            captions.append(training.pairs.read(int(training.rows[index])).captions[0])
        except BadSample:
            continue  # the training reads it again, and counts it
        rows.append(int(training.store_rows[index]))
    stored = torch.from_numpy(training.store.texts[np.array(rows, dtype=np.int64)].astype(np.float32))
    return captions, F.normalize(stored, dim=1)
