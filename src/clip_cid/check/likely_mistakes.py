"""Likely mistakes that would not stop a training, each in a sentence with its numbers."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from clip_cid import tasks, units
from clip_cid.check.captions import Sights
from clip_cid.check.estimates import Disk, Duration
from clip_cid.check.rehearsal import Reading
from clip_cid.loss_table import LOSSES, rows_of
from clip_cid.recipe import DistillConfig, EmbedConfig, MachineConfig, settled
from clip_cid.training.step import resolve_precision

_WARM_UP = 0.1  # of the steps
_TRUNCATED = 0.1  # of the captions
_WAITING = 0.1  # of the time
_ERROR = 0.025  # of a recall on the held-out pairs, at worst
_UNEVEN = 100.0  # one weight over another
_LONG = 1800.0  # seconds: losing a run of this length costs much


def of_settings(settings: DistillConfig, *, steps: int, pairs: int, held_out: int) -> Iterator[str]:
    """Settings that do not fit the length of the run; `pairs` are those of an epoch."""
    warmup, batch_size = settled(settings.warmup_steps), settled(settings.batch_size)
    if warmup > _WARM_UP * steps:
        yield (
            f"distill.warmup_steps: {warmup:,} is {units.percent(warmup / steps, 0)}"
            f" of the {steps:,} steps; a tenth would be {steps // 10:,}"
        )

    if settings.texts and not settings.weights.learn_from_texts:
        yield f"distill.texts: no loss reads a text alone, so they teach nothing; {_named_texts()} do"

    if settings.log_every > steps:
        yield (
            f"distill.log_every: {settings.log_every:,}, but the run has {steps:,} steps, so metrics.jsonl"
            " gets only one line"
        )

    if batch_size > pairs / 2:
        yield (
            f"distill.batch_size: {batch_size:,} of {pairs:,} pairs: every batch is most of the data, and an "
            f"epoch has {pairs / batch_size:.1f} steps"
        )

    if held_out and 0.5 / held_out**0.5 > _ERROR:
        yield (
            f"distill.validation.share: {held_out:,} pairs are held out, on which a recall is uncertain by up to "
            f"{units.percent(0.5 / held_out**0.5)} (one standard error)"
        )


def of_weights(settings: DistillConfig) -> Iterator[str]:
    """Weights that were made for losses, and weigh gradients."""
    weights = {name: getattr(settings.weights, name) for name in settings.weights.switched_on}
    least, most = min(weights, key=weights.__getitem__), max(weights, key=weights.__getitem__)
    if settings.weigh_gradients_every is not None and weights[most] > _UNEVEN * weights[least]:
        yield (
            f"distill.weigh_gradients_every: the gradient of {most} (weight {weights[most]:g}) is to be"
            f" {weights[most] / weights[least]:,.0f} times that of {least} ({weights[least]:g}); weights that were made"
            " for the size of a loss are too uneven for its gradient"
        )


def of_head(settings: DistillConfig) -> Iterator[str]:
    """A head that learns from all centers (docs/decisions.md, D6)."""
    if settings.weights.cluster_cls and settings.head_lr > 0 and settings.sample_rate == 1:
        yield (
            f"distill.sample_rate: 1 with a head that learns (distill.head_lr: {settings.head_lr:g}); authors of the"
            " paper found it far worse than 0.1 with a million centers (MLCD, Table 5b: 63.2 against 75.2)"
        )


def of_views(settings: EmbedConfig, *, epochs: float) -> Iterator[str]:
    """Views that are embedded and never seen."""
    if settings.views > math.ceil(epochs):
        yield (
            f"embed.views: {settings.views:,}, but the training shows an image {epochs:,.1f} times, one view each time:"
            f" at least {settings.views - math.ceil(epochs):,} of its views are embedded in vain"
        )


def of_negatives(settings: DistillConfig, *, num_centers: int, own: float) -> Iterator[str]:
    """The centers of a batch may fill the sample."""
    quota = round(settings.sample_rate * num_centers)
    if settings.sample_rate < 1 and quota <= own:
        yield (
            f"distill.sample_rate: {settings.sample_rate:g} is {quota:,} of {num_centers:,} centers a step,"
            f" but a batch of {settled(settings.batch_size):,} holds {own:,.0f} of them by itself:"
            " there are no random negatives"
        )


def of_machine(settings: DistillConfig, machine: MachineConfig, device: torch.device) -> Iterator[str]:
    """Settings that do not suit this machine."""
    if machine.workers > (cores := tasks.available_cores()):
        yield f"machine.workers: {machine.workers}, but this process may use {cores} cores"
    precision = resolve_precision(settings.precision, device)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        slowly = f"bf16, which {torch.cuda.get_device_name(device)} computes in float32 and rounds"
        if precision == torch.bfloat16:
            yield f"distill.precision: {slowly}; fp16 suits it"
        if settings.loss_precision != "fp32":
            yield f"distill.loss_precision: {slowly}; fp32 suits it"
    if device.type == "cpu" and precision == torch.float16:
        yield "distill.precision: fp16 on the CPU, which gains nothing and overflows; fp32 suits it"


def of_time(duration: Duration, machine: MachineConfig) -> Iterator[str]:
    """Time spent waiting, and work that a kill would lose."""
    if duration.wait_share > _WAITING:
        yield (
            f"machine.workers: {units.percent(duration.wait_share, 0)} of the time would be spent waiting for"
            f" pairs to be read and decoded (now {machine.workers} workers of {tasks.available_cores()} cores);"
            " raise it, or store smaller images"
        )
    interval = 60 * machine.checkpoint_minutes
    if duration.seconds > _LONG and interval > duration.seconds / 2:
        yield (
            f"machine.checkpoint_minutes: {machine.checkpoint_minutes:g}, but the run takes about "
            f"{duration.seconds / 60:,.0f}: a kill would cost most of it"
        )


def of_absent_captions(settings: DistillConfig, sights: Sights) -> Iterator[str]:
    """Losses that read captions, and images alone."""
    losses = rows_of(settings.weights.switched_on)
    readers = [loss.name for loss in losses if loss.reads_captions or loss.reads_teacher_texts]
    if readers and sights.without_caption == sights.pairs - sights.unreadable > 0:
        yield (
            f"none of the {sights.without_caption:,} pairs looked at has a caption, but {', '.join(readers)} read one:"
            " if no pair has one, the training is refused"
        )


def of_pairs(sights: Sights, reading: Reading, *, max_bad_share: float) -> Iterator[str]:
    """Pairs that the student sees in part or not at all."""
    if sights.truncated > _TRUNCATED * sights.captions:
        yield (
            f"{units.percent(sights.truncated / sights.captions, 0)} of {sights.captions:,} captions are longer"
            f" than the student's {reading.batch.texts.shape[1]} tokens and lose their end"
        )
    rows = len(reading.batch.rows)
    if len(reading.batch.bad) > max_bad_share * rows:
        row, reason = reading.batch.bad[0]
        yield (
            f"pairs.max_bad_share: {max_bad_share:g}, but {len(reading.batch.bad):,} pairs could not be read for"
            f" a batch of {rows:,}; row {row:,}: {reason}"
        )


def of_room(disk: Disk, where: Path, *, memory: float, available: float) -> Iterator[str]:
    """More than there is.

    Args:
        disk: What is written.
        where: To this folder.
        memory: Bytes that the batches under way will take, beyond what was held when `available` was asked for.
        available: Bytes this process may still take.
    """
    if disk.needed > disk.free:
        yield (
            f"{where}: {units.size(disk.needed)} are needed, but {units.size(disk.free)} are free; the run"
            " cannot finish"
        )
    if memory > available:
        yield (
            f"machine.workers: the batches they hold ready take {units.memory(memory)}, but"
            f" {units.memory(available)} of memory are left; lower it"
        )


def _named_texts() -> str:
    return " and ".join(f"distill.weights.{loss.name}" for loss in LOSSES if loss.learns_from_texts)
