"""The cost of a whole run, by arithmetic from measured and counted numbers."""

import math
from dataclasses import dataclass

from clip_cid.recipe import DistillConfig, Recipe, settled
from clip_cid.training import room
from clip_cid.training.loop import Trainer

_METRICS_LINE, _METRICS_LOSS = 700, 150  # bytes of a line and of what it says of each loss, at most
_HALF, _SINGLE, _LABEL = 2, 4, 4  # bytes of a number


@dataclass(frozen=True)
class Duration:
    """Seconds of the training, without validation and checkpoints."""

    steps: int
    compute: float
    """Seconds of a step."""
    reading: float
    """Seconds in which the workers make a batch."""
    overlaps: bool
    """Whether they do so while the step is computed."""

    @property
    def seconds_per_step(self) -> float:
        return max(self.compute, self.reading) if self.overlaps else self.compute + self.reading

    @property
    def wait_share(self) -> float:
        """Share of the time in which the step waits for its pairs."""
        return 1 - self.compute / self.seconds_per_step

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_per_step


@dataclass(frozen=True)
class Disk:
    """Bytes the rest of the run writes, at its largest."""

    checkpoint: int
    """One of them."""
    checkpoints: int
    """Bytes of the checkpoints kept, of the one being written, and of the best student if it is kept."""
    student: int
    soft_centers: int
    labels: int
    metrics: int
    before: int
    """Bytes of the results of the stages before the training that have not run."""
    free: int

    @property
    def needed(self) -> int:
        return self.checkpoints + self.student + self.soft_centers + self.labels + self.metrics + self.before


def forward_passes(recipe: Recipe, rows: int) -> int:
    """Forward passes in a step: one more for micro-batches, one more for activations it did not keep."""
    in_micro_batches = recipe.machine.micro_batch is not None and recipe.machine.micro_batch < rows
    return 1 + in_micro_batches + recipe.machine.grad_checkpointing


def chance_levels(
    settings: DistillConfig,
    *,
    width: int,
    num_centers: int | None,
    in_step: int | None,
    perplexity: float | None,
    logit_bias: float | None,
) -> dict[str, float]:
    """Each loss for a student that knows nothing: all similarities equal, or random vectors.

    Args:
        settings: Of the training.
        width: Of the teacher's vectors.
        num_centers: K; None without clusters.
        in_step: Centers that take part in a step.
        perplexity: Of the teacher over all centers.
        logit_bias: The student's, if it has one.

    Returns:
        By the loss's name, in its own unit; a loss without such a level is not there.
    """
    batch_size = settled(settings.batch_size)
    crossed = math.log(batch_size)
    levels: dict[str, float] = {"clip": crossed, "instance_image": crossed, "instance_text": crossed, "icl": crossed}
    towers = 1 if settings.keeps_text_tower else 2
    levels["feature"] = 2 * towers / width  # squared distance 2 of unit vectors at a right angle, for each tower
    levels |= {"cosine_image": 1.0, "cosine_text": 1.0}
    if settings.keeps_text_tower:
        del levels["icl"]  # half of it is the teacher's own
    if logit_bias is not None:
        levels["siglip"] = _softplus(-logit_bias) + (batch_size - 1) * _softplus(logit_bias)
    if num_centers is not None and in_step is not None:
        # Each label against all negatives; how many of these `ignore_near` leaves out is not known.
        if settings.ignore_near is None:
            centers, labels = num_centers if settings.logq == "both" else in_step, settings.labels
            levels["cluster_cls"] = math.log(1 + labels * (centers - labels))
        if perplexity is not None and (settings.logq != "none" or in_step == num_centers):
            levels["cluster_kl"] = math.log(num_centers / perplexity)
    return {name: level for name, level in levels.items() if getattr(settings.weights, name) > 0}


def estimate_disk(trainer: Trainer, *, before: int, soft_rows: int, labels: int, width: int, free: int) -> Disk:
    """How much room the run takes.

    Args:
        trainer: Of the training.
        before: Bytes of the stages that have not run.
        soft_rows: Pairs whose soft centers are kept while it trains.
        labels: How many labels of images are.
        width: Of the teacher's vectors.
        free: Bytes.
    """
    lines = trainer.plan.steps // trainer.settings.log_every + 1
    return Disk(
        checkpoint=room.checkpoint_bytes(trainer.model, trainer.settings),
        checkpoints=room.checkpoints_bytes(trainer.model, trainer.settings, trainer.machine),
        student=room.student_bytes(trainer.model),
        soft_centers=soft_rows * (_SINGLE * width + 8),
        labels=labels * _LABEL,
        metrics=lines * (_METRICS_LINE + _METRICS_LOSS * len(trainer.model.objective.losses)),
        before=before,
        free=free,
    )


def embedding_bytes(pairs: int, width: int, *, views: int) -> int:
    """Image, first caption and views of each pair, in float16."""
    return (2 + views) * _HALF * width * pairs


def text_bytes(texts: int, width: int) -> int:
    """Texts without images, in float16."""
    return _HALF * width * texts


def cluster_bytes(pairs: int, centers: int, width: int) -> int:
    """The centers in float32, a label for each pair, and as much for a round to resume from."""
    return 2 * (_SINGLE * width * centers + 4 * pairs)


def balance_memory(pairs: int) -> int:
    """Bytes that balance holds; docs/scale.md."""
    return 70 * pairs + (1 << 30)


def balance_room(pairs: int, width: int, *, on_cuda: bool) -> tuple[int, int]:
    """The least and the most bytes on the disk while balance works: codes and windows, twice; docs/scale.md."""
    least, most = (2 * width, 2 * width) if on_cuda else (64, 256 + 512)
    return 2 * least * pairs, 2 * most * pairs


def cluster_memory(pairs: int, centers: int, width: int) -> int:
    """Bytes that cluster holds; docs/scale.md."""
    return 25 * width * centers + 30 * pairs


def _softplus(value: float) -> float:
    return max(value, 0) + math.log1p(math.exp(-abs(value)))
