"""The first steps of a training, made and then discarded, to measure what they cost here."""

import contextlib
import dataclasses
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Generator, Iterator

import torch

from clip_cid import tasks, units
from clip_cid.errors import RunError
from clip_cid.method.distill.center_pass import SoftCenters
from clip_cid.method.distill.cluster_distillation import nearest_labels
from clip_cid.method.distill.fused_cluster_loss import soft_centers
from clip_cid.training.batches import Batch, Batches
from clip_cid.training.loop import Trainer
from clip_cid.training.metrics import peak_memory
from clip_cid.training.step import Measured

_READ_SECONDS = 5.0  # a rate measured for this long is exact enough
_STEP_SECONDS = 10.0
_MOST_STEPS = 10
_ROWS_OF_PASS = 256  # at least, or the call itself would be measured
_MOST_ROUNDS = 4  # batches of each worker


@dataclasses.dataclass(frozen=True)
class Reading:
    """How fast the workers make batches when no step is computed."""

    batch: Batch
    """The first one of the training."""
    seconds_per_batch: float
    batches: int
    """How many were read to measure it."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Some steps on one real batch."""

    first: Measured
    """The first step: the losses of a student that has learned nothing."""
    seconds_per_step: float
    """The median of `steps`, after one that does not count."""
    steps: int
    centers: int | None
    """How many take part in a step."""
    memory_gib: float
    """The peak memory of this process, everything it has loaded included."""
    device_memory_gib: float | None
    """The peak memory of tensors on the CUDA device."""


def batches_to_try(batches: Batches, *, workers: int, steps: int) -> Generator[Batch]:
    """The first batches of a training of `steps`, as many as the measurements may need."""
    return batches.between(0, min(_MOST_ROUNDS * max(workers, 1) + _MOST_STEPS, steps))


def read_batches(batches: Iterator[Batch], *, workers: int) -> Reading:
    """Read the first batch and, if that is quick, more of them.

    Args:
        batches: As `batches_to_try` gives them; some are left.
        workers: As many batches are made at once; those in which they start do not count if more are read.

    Raises:
        DataError: As `Batches.between`.
    """
    at_once = max(workers, 1)
    started = time.monotonic()
    arrived: list[float] = []
    first: Batch | None = None
    for batch in itertools.islice(batches, _MOST_ROUNDS * at_once):
        first = first or batch
        arrived.append(time.monotonic())
        if len(arrived) > at_once and arrived[-1] - started > _READ_SECONDS:
            break
    assert first is not None, "a training has a step"

    if (settled := len(arrived) - at_once) > 0:
        return Reading(first, (arrived[-1] - arrived[at_once - 1]) / settled, len(arrived))
    return Reading(first, (arrived[-1] - started) / len(arrived), len(arrived))


def soften(batch: Batch, trainer: Trainer) -> tuple[Batch, float]:
    """The batch with the teacher's soft centers, and how many seconds those of a pair take.

    A training computes them before its first step, of many pairs at once.
    """
    objective = trainer.model.objective
    assert objective.head is not None
    assert batch.teacher_image is not None
    head, device = objective.head, trainer.ranks.device
    centers, teacher = head.weight.detach(), batch.teacher_image.to(device)

    def soften_rows(rows: torch.Tensor) -> SoftCenters:
        return soft_centers(teacher[rows], centers, scale=head.scale, temperature=objective.temperature)

    softened = soften_rows(torch.arange(len(teacher)))
    return dataclasses.replace(batch, soft_centers=softened), _seconds_a_row(soften_rows, len(teacher), device)


def label(batch: Batch, trainer: Trainer, count: int) -> tuple[Batch, float]:
    """The batch with several labels an image, and how many seconds those of a pair take.

    A training computes them before its first step, of many pairs at once.
    """
    head = trainer.model.objective.head
    assert head is not None
    assert batch.teacher_image is not None
    assert batch.labels is not None
    device = trainer.ranks.device
    centers, teacher, own = head.weight.detach(), batch.teacher_image.to(device), batch.labels.to(device)

    def label_rows(rows: torch.Tensor) -> torch.Tensor:
        return nearest_labels(teacher[rows], centers, own[rows], count)

    labels = label_rows(torch.arange(len(teacher)))
    return dataclasses.replace(batch, labels=labels), _seconds_a_row(label_rows, len(teacher), device)


def rehearse(trainer: Trainer, batch: Batch, beside: Iterator[Batch]) -> Rehearsal:
    """Make a few steps.

    Args:
        trainer: Whose weights will have moved.
        batch: What the steps are made on.
        beside: One of these is taken before each step, so that workers make others while it is computed: they share
            the cores with it, as in the training. There may be fewer.

    Raises:
        RunError: The step does not fit the device, or its loss is not finite.
    """
    device = trainer.ranks.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            first, seconds = _timed_steps(trainer, batch, beside)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"A step of {len(batch.rows):,} pairs does not fit {device} ({str(error).splitlines()[0]}).",
            fix="Set machine.micro_batch, machine.grad_checkpointing: true or a smaller distill.batch_size.",
        ) from error

    centers, memory = trainer.model.objective.diagnostics().get("centers"), peak_memory(device)
    return Rehearsal(
        first=first,
        seconds_per_step=statistics.median(seconds),
        steps=len(seconds),
        centers=None if centers is None else int(centers),
        memory_gib=memory["memory_gib"],
        device_memory_gib=memory.get("device_memory_gib"),
    )


def _seconds_a_row(work: Callable[[torch.Tensor], object], batch: int, device: torch.device) -> float:
    """Of rows of the batch, which come again where they are fewer than what is computed at once."""
    rows = torch.arange(max(batch, _ROWS_OF_PASS)) % batch
    _finish_work(device)
    started = time.monotonic()
    work(rows)
    _finish_work(device)
    return (time.monotonic() - started) / len(rows)


def worker_memory_gib() -> float:
    """The most memory that one of this process's ended workers has held, shared pages included."""
    return units.gib(tasks.peak_memory(resource.RUSAGE_CHILDREN))


def _timed_steps(trainer: Trainer, batch: Batch, beside: Iterator[Batch]) -> tuple[Measured, list[float]]:
    seconds: list[float] = []
    with contextlib.closing(trainer.rehearse(batch)) as steps:
        first = next(steps)
        _refuse_sick(first, trainer)
        while not seconds or (sum(seconds) < _STEP_SECONDS and len(seconds) < _MOST_STEPS):
            next(beside, None)
            _finish_work(trainer.ranks.device)
            started = time.monotonic()
            next(steps)
            _finish_work(trainer.ranks.device)
            seconds.append(time.monotonic() - started)
    return first, seconds


def _refuse_sick(first: Measured, trainer: Trainer) -> None:
    """Float16 alone may overflow in its first gradients: its scaler then scales less."""
    sick = [name for name, part in first.parts.items() if not abs(part) < float("inf")]
    if first.is_finite or (not sick and trainer.learner.precision == torch.float16):
        return
    what = f"loss {', '.join(sick)}" if sick else "gradient"
    raise RunError(
        f"The {what} of the first step is not finite, before anything is learned.",
        fix="Try distill.precision: fp32; if it stays so, look at the weights in distill.pretrained and at the pairs.",
    )


def _finish_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
