"""Validation while the student learns: losses and retrieval on held-out pairs, and zero-shot scores."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor, nn

from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.sets.evaluation_sets import EvaluationSet, LabelledImages
from clip_cid.devices import Copies
from clip_cid.errors import DataError
from clip_cid.evaluation.retrieval import retrieval
from clip_cid.evaluation.zero_shot import prompt_classifier, zero_shot
from clip_cid.method.distill.objective import weighted_sum
from clip_cid.method.mixed_words import MURMUR3, mix_words
from clip_cid.models.clip import Clip
from clip_cid.training.batches import Batches, TrainingPairs
from clip_cid.training.model import Distillation, step_seed
from clip_cid.training.ranks.distributed import Ranks

Numbers = dict[str, float]
NoteBad = Callable[[list[tuple[int, str]]], None]
_ROWS = 256  # images or prompts in the student at once, where no loss needs more


class HeldOut(NamedTuple):
    """The held-out pairs, as whole batches of equal size."""

    pairs: TrainingPairs
    batch_size: int


def hold_out(training: TrainingPairs, share: float, *, batch_size: int, ranks: int) -> tuple[TrainingPairs, HeldOut]:
    """The pairs to train on, and those held out.

    The row alone decides whether a pair is held out: no run on the same pairs trains on the held-out pairs of
    another, whatever its balance and its number of ranks. So the share is met on average, not exactly.

    Args:
        training: All of them.
        share: Of these, to hold out.
        batch_size: Of the training; the held-out batches are as large, or smaller, but of two pairs at least if the
            training's are: a single pair has no loss.
        ranks: Share every batch; the few pairs that this leaves over are neither measured nor trained on.

    Raises:
        DataError: Too few are held out for one batch.
    """
    mixed = _mixed(training.rows)
    chosen = mixed < np.uint64(share * 2.0**64)
    own = np.flatnonzero(chosen)
    least = max(min(2, batch_size), ranks)
    batches = max(min(-(-len(own) // batch_size), len(own) // least), 1)
    each = min(len(own) // (batches * ranks) * ranks, batch_size)
    count = each * batches
    if count < 2:
        raise DataError(
            f"distill.validation.share: {share:g} of {len(training):,} pairs are too few to measure anything.",
            fix="Hold out more, or set it to 0.",
        )
    measured = np.sort(own[np.argsort(mixed[own], kind="stable")[:count]])
    # Measured on the whole images, and on their own captions.
    plain = dataclasses.replace(training.take(measured), views=None, sizes=None, merged=None)
    return training.take(np.flatnonzero(~chosen)), HeldOut(plain, each)


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validation of a training; every rank does its part."""

    clip: Clip
    batches: Batches | None
    """Batches of the held-out pairs, without random crops and captions."""
    sets: Sequence[EvaluationSet]
    weights: dict[str, float]
    seed: int
    ranks: Ranks

    @torch.no_grad()
    def measure(
        self, model: nn.Module, distillation: Distillation, *, precision: torch.dtype, note_bad: NoteBad
    ) -> Numbers:
        """All numbers by name, `val/...`, equal on all ranks; NaN where an embedding is not finite.

        Args:
            model: The distillation, or what wraps it to join ranks.
            distillation: Itself.
            precision: Of the student.
            note_bad: Gets the held-out pairs that cannot be read, for which the next ones stand in.
        """
        distillation.eval()
        try:
            numbers = Numbers()
            if self.batches is not None:
                numbers |= self._pairs(model, distillation, self.batches, precision, note_bad)
            for labelled in self.sets:
                numbers[f"val/zero_shot/{labelled.name}"] = self._zero_shot(model, labelled, precision)
        finally:
            distillation.train()

        scores = [value for name, value in numbers.items() if name.startswith("val/zero_shot/")]
        numbers |= {"val/zero_shot": float(np.mean(scores))} if scores else {}
        # devices may differ in a last bit, and ranks that disagree about the best student would wait for each other
        return self.ranks.all(numbers)[0]

    def _pairs(
        self, model: nn.Module, distillation: Distillation, batches: Batches, precision: torch.dtype, note_bad: NoteBad
    ) -> Numbers:
        device, parts = self.ranks.device, list[Numbers]()
        copies = Copies(device)
        images, texts = list[np.ndarray](), list[np.ndarray]()
        for batch in batches.in_order():
            note_bad(batch.bad)
            batch = batch.to(copies)
            outputs = model(batch.images, batch.texts, precision=precision)
            generator = torch.Generator(device).manual_seed(step_seed(self.seed, len(parts)))
            losses = distillation.objective(outputs, batch.targets, gather=self.ranks.gather, generator=generator)
            total = weighted_sum(losses, self.weights).item()
            parts.append({**{f"loss/{name}": part.item() for name, part in losses.items()}, "loss": total})
            stored = {} if batch.teacher_text is None else {"text": batch.teacher_text}
            captioned = slice(None)
            if batch.captioned is not None:
                captioned = self.ranks.gather(batch.captioned.long()).all.bool().cpu().numpy()
            for name, into in (("image", images), ("text", texts)):
                into.append(self.ranks.gather({**stored, **outputs}[name]).all.float().cpu().numpy()[captioned])

        mean = self.ranks.mean({name: float(np.mean([part[name] for part in parts])) for name in parts[0]})
        recalls = _recalls(np.concatenate(images), np.concatenate(texts))
        return {f"val/{name}": value for name, value in {**mean, **recalls}.items()}

    def _zero_shot(self, model: nn.Module, labelled: EvaluationSet, precision: torch.dtype) -> float:
        """The set's own score, by the prompts it came with."""
        classes, test = len(labelled.class_names), labelled.split("test")
        prompts = [prompt for label in range(classes) for prompt in labelled.prompts(label)]
        texts = [
            model(None, self.clip.tokenizer(prompts[start : start + _ROWS]).to(self.ranks.device), precision=precision)
            for start in range(0, len(prompts), _ROWS)
        ]
        prompted = _numpy([outputs["text"] for outputs in texts])

        rows, images = self._images(model, test, precision)
        if not (np.isfinite(prompted).all() and np.isfinite(images).all()):
            return math.nan
        classifier = prompt_classifier(prompted, num_classes=classes)
        return zero_shot(images, classifier, test.labels[rows], metric=labelled.metric).score

    def _images(
        self, model: nn.Module, source: LabelledImages, precision: torch.dtype
    ) -> tuple[Int[np.ndarray, " images"], Float[np.ndarray, "images dim"]]:
        """Embeddings of the images that can be read, shared by the ranks; all ranks call the model equally often."""
        rounds = -(-len(source) // (self.ranks.size * _ROWS))
        own: list[tuple[list[int], np.ndarray]] = []
        for number in range(rounds):
            start = (number * self.ranks.size + self.ranks.rank) * _ROWS
            rows, pixels = self._decode(source, range(start, min(start + _ROWS, len(source))))
            outputs = model(torch.stack(pixels).to(self.ranks.device), None, precision=precision)
            own.append((rows, _numpy([outputs["image"]])[: len(rows)]))

        every = [part for parts in self.ranks.all(own) for part in parts]
        rows = np.array([row for rows, _ in every for row in rows], dtype=np.int64)
        return rows, np.concatenate([images for _, images in every])

    def _decode(self, source: LabelledImages, wanted: range) -> tuple[list[int], list[Tensor]]:
        """The images that can be read; without any, a blank one, so that every rank has an image to embed."""
        rows: list[int] = []
        pixels: list[Tensor] = []
        for row in wanted:
            try:
                pixels.append(self.clip.preprocess(source.load(row)))
                rows.append(row)
            except BadSample:
                continue  # the evaluate stage counts and names them
        size: Any = self.clip.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return rows, pixels or [torch.zeros(3, height, width)]


@dataclasses.dataclass
class Best:
    """The best student so far, by a number that is measured."""

    metric: str
    """`retrieval`, `zero_shot` or `loss`."""
    patience: int | None
    value: float | None = None
    step: int = 0
    since: int = 0
    """Measurements without a better one."""

    def is_new(self, numbers: Numbers, step: int) -> bool:
        """Count a measurement; returns whether it is the best so far. A number that is not finite never is."""
        value = numbers[f"val/{self.metric}"]
        better = self.value is None or (value < self.value if self.metric == "loss" else value > self.value)
        if better := better and math.isfinite(value):
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step, self.since = state["value"], state["step"], state["since"]

    @property
    def is_past(self) -> bool:
        """Whether to stop."""
        return self.patience is not None and self.since >= self.patience


def _recalls(images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "images dim"]) -> Numbers:
    if not (len(images) and np.isfinite(images).all() and np.isfinite(texts).all()):
        return {"retrieval": math.nan}
    recalls = {recall.metric: recall.score for recall in retrieval(images, texts, np.arange(len(images)))}
    return {
        **{f"retrieval/{name}": score for name, score in recalls.items()},
        "retrieval": float(np.mean([*recalls.values()])),
    }


def _numpy(rows: Sequence[Tensor]) -> Float[np.ndarray, "rows dim"]:
    return torch.cat(list(rows)).float().cpu().numpy()


def _mixed(rows: Int[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """A pseudo-random number for each row, always the same."""
    return mix_words(rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15), MURMUR3)  # else row 0 would be 0
