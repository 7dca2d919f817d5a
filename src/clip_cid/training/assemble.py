"""Assemble a training from its recipe: pairs with their targets, student, objective and trainer.

`read_inputs` opens the pairs and targets, `assemble` builds the rest around them. `clip-cid check` tries the
same assembly, with random inputs if a run has none yet.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Num

from clip_cid import log, units
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.data.sets.evaluation_sets import open_set
from clip_cid.deciding_settings import deciding
from clip_cid.errors import ConfigError
from clip_cid.loss_table import rows_of
from clip_cid.method.distill.cluster_distillation import Shard
from clip_cid.method.distill.objective import Objective
from clip_cid.method.unit_rows import Rows
from clip_cid.models.clip import Clip, train_transform, use_grad_checkpointing
from clip_cid.models.student import build_student
from clip_cid.models.teacher import weights_sha256
from clip_cid.models.text_tower import TextTower
from clip_cid.recipe import DistillConfig, MachineConfig, Recipe, settled
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import EMBED
from clip_cid.training.bank import Bank, log_perplexities
from clip_cid.training.batch_order import epoch_size
from clip_cid.training.batches import Batches, PairDataset, TrainingPairs, add_rows
from clip_cid.training.join import distilled_pairs, plain_pairs, read_centers, read_lines
from clip_cid.training.kept_texts import compare_with_stored, open_text_tower
from clip_cid.training.loop import Plan, Trainer
from clip_cid.training.model import Distillation
from clip_cid.training.ranks.distributed import Ranks
from clip_cid.training.ranks.parallel import with_joint_statistics
from clip_cid.training.soft_targets import (
    USUAL_SCALE,
    Sharpness,
    measure_near_centers,
    measure_sharpness,
    several_labels,
    teacher_scale,
    uses_soft_centers,
    with_soft_centers,
)
from clip_cid.training.validation import HeldOut, Validation, hold_out

SOFT_CENTERS, LABELS = "soft_centers", "labels"
"""The folders of these, beside the checkpoints: what was computed of all images before the first step."""
_LABEL_ROWS = 1 << 20  # at once


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a training, checked and joined."""

    pairs: TrainingPairs
    held_out: HeldOut | None
    """To measure on."""
    store: EmbeddingStore | None = None
    """The teacher's embeddings."""
    centers: Float[np.ndarray, "centers dim"] | None = None
    """Of the clusters, if a loss reads them."""
    text_centers: Float[np.ndarray, "text_centers dim"] | None = None
    """Of the clusters of texts, likewise."""


@dataclasses.dataclass(frozen=True)
class Training:
    """All parts of a training, checked and ready for its first step."""

    inputs: Inputs
    clip: Clip
    """The student."""
    sharpness: Sharpness
    trainer: Trainer
    text_tower: TextTower | None = None
    """The teacher's that the student keeps, without its weights, which the student has."""


def prepare(folder: RunFolder, out: Path, recipe: Recipe, ranks: Ranks, *, first_pass: bool = True) -> Training:
    """The training of a run; nothing has been learned yet.

    Args:
        folder: With the stages before the training.
        out: Where the training works.
        recipe: The settings.
        ranks: Who trains together.
        first_pass: Whether to compute now what the training needs of all images: soft centers and several labels.

    Raises:
        ConfigError: Settings do not fit each other or the data.
        DataError: The data contradict themselves or each other.
        RunError: A stage before this one has not finished, or ranks differ.
    """
    inputs = read_inputs(folder, recipe, ranks)
    # Before the student is built, which takes longer.
    steps = count_steps(recipe.distill, inputs.pairs.epoch_size(recipe.distill.per_cluster))
    teacher_dim = inputs.store.dim if inputs.store is not None else None
    tower = open_text_tower(recipe.distill, inputs.store)
    clip = make_student(recipe.distill, teacher_dim, recipe.machine, text_tower=tower)
    if tower is not None:
        compare_with_stored(clip, inputs.pairs)
        tower = tower.without_weights()
    training = assemble(inputs, clip, teacher_dim, out, recipe, ranks, steps=steps, first_pass=first_pass)
    return dataclasses.replace(training, text_tower=tower)


def read_inputs(folder: RunFolder, recipe: Recipe, ranks: Ranks) -> Inputs:
    """Open the pairs and join them with the results of the stages before the training.

    Raises:
        DataError: The data contradict themselves or each other.
        RunError: A stage before this one has not finished.
    """
    with ranks.main_first():
        pairs = open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)
    store = EmbeddingStore.open(folder.stage(EMBED)) if recipe.has_teacher else None
    training = plain_pairs(pairs) if store is None else distilled_pairs(folder, recipe, pairs, store, ranks)
    centers = read_centers(folder, store) if store is not None and recipe.uses_clusters else None
    text_centers = read_centers(folder, store, texts=True) if store is not None and recipe.uses_text_clusters else None
    training, held_out = split_off(training, recipe.distill, ranks)
    if recipe.distill.texts and not recipe.uses_texts:
        log.warn("distill.texts: no loss of the recipe reads a text alone, so they teach nothing")
    if store is not None and recipe.uses_texts:
        training = dataclasses.replace(training, lines=read_lines(folder, recipe, store))
    return Inputs(training, held_out, store, centers, text_centers)


def split_off(training: TrainingPairs, settings: DistillConfig, ranks: Ranks) -> tuple[TrainingPairs, HeldOut | None]:
    """The pairs to train on, and those to measure on if the recipe holds some out.

    Raises:
        DataError: As `hold_out`.
    """
    if not (share := settings.validation.share):
        return training, None
    return hold_out(training, share, batch_size=settled(settings.batch_size), ranks=ranks.size)


def assemble(
    inputs: Inputs,
    clip: Clip,
    teacher_dim: int | None,
    out: Path,
    recipe: Recipe,
    ranks: Ranks,
    *,
    steps: int,
    first_pass: bool,
) -> Training:
    """Build the training around its inputs and its student; see `prepare`.

    Args:
        inputs: What it learns from.
        clip: The student.
        teacher_dim: Width of the teacher's embeddings and of the centers; None without a teacher.
        out: Where it works.
        recipe: The settings.
        ranks: Who trains together.
        steps: Of the whole run.
        first_pass: Whether to compute now what the training needs of all images.
    """
    settings, machine = recipe.distill, recipe.machine
    training, store, centers = inputs.pairs, inputs.store, inputs.centers

    # What learns: the student, and the objective beside it.
    sharpness = _sharpness(settings, inputs, ranks)
    objective = make_objective(
        settings,
        clip,
        teacher_dim,
        centers,
        text_centers=inputs.text_centers,
        scale=sharpness.scale,
        scales=sharpness.scales,
        teacher_scale=teacher_scale(settings, store.info.teacher if store is not None else None),
        ranks=ranks,
    )
    model = Distillation(clip.model, objective, lock=settings.lock).train()  # except for the tower that is locked
    model.student = with_joint_statistics(model.student, ranks, machine.micro_batch)
    if settings.per_cluster is not None and training.labels is not None:
        _say_how_pairs_take_turns(training.labels, settings.per_cluster, len(training))
    if centers is not None and recipe.uses_several_labels:
        refuse_too_many_labels(settings, len(centers))

    # All ranks must train the same.
    key = _key(settings, training, store, centers, inputs.text_centers)
    ranks.agree("data or settings", key)
    ranks.agree("weights", weights_sha256(clip.model) if ranks.size > 1 else None)

    # The data: batches with their labels and the teacher's soft centers, and what to measure on.
    held_out = inputs.held_out
    if first_pass and centers is not None and recipe.uses_several_labels:
        training = _with_labels(training, centers, settings, out / LABELS / "trained", key, ranks)
        if held_out is not None:
            pairs = _with_labels(held_out.pairs, centers, settings, out / LABELS / "held_out", key, ranks)
            held_out = held_out._replace(pairs=pairs)
    if ranks.is_main and centers is not None and (labels := training.labels_of_losses) is not None:
        _warn_of_negatives(settings, labels, len(centers))
        measure_near_centers(settings, training, centers)
    if first_pass and centers is not None and training.views is None and uses_soft_centers(settings):
        training = with_soft_centers(training, centers, settings, out / SOFT_CENTERS, sharpness.scale, key, ranks)
    bank = _make_bank(settings, training, ranks)
    trainer = Trainer(
        model,
        make_batches(training, clip, recipe, ranks, bank),
        settings,
        Plan(steps, key, recipe.pairs.max_bad_share),
        out=out,
        ranks=ranks,
        machine=machine,
        validation=_validation(clip, held_out, recipe, ranks, bank),
    )
    return Training(dataclasses.replace(inputs, pairs=training, held_out=held_out), clip, sharpness, trainer)


def _sharpness(settings: DistillConfig, inputs: Inputs, ranks: Ranks) -> Sharpness:
    """As the main process has measured it: on another processor the last bits may differ."""
    measured: Sharpness | None = None
    if ranks.is_main:
        measured = measure_sharpness(settings, inputs.pairs, inputs.store, inputs.centers, inputs.text_centers)
    measured = ranks.from_main(measured)
    assert measured is not None
    return measured


def _make_bank(settings: DistillConfig, training: TrainingPairs, ranks: Ranks) -> Bank | None:
    if not settings.weights.any_reads_bank or training.store is None:
        return None
    bank = Bank(training, settings, ranks.device)
    log_perplexities(bank, training, settings)
    return bank


def count_steps(settings: DistillConfig, epoch_pairs: int) -> int:
    """How many full batches the epochs hold together; the rows left at the end of one open the next.

    Raises:
        ConfigError: There are not enough pairs in an epoch for one batch.
    """
    batch_size = settled(settings.batch_size)
    if batch_size > epoch_pairs:
        where, more = "to train on", "give more pairs"
        if settings.per_cluster is not None:
            where = f"in an epoch (distill.per_cluster: {settings.per_cluster:,})"
            more = "raise distill.per_cluster"
        raise ConfigError(
            f"distill.batch_size: {batch_size:,}, but there are {epoch_pairs:,} pairs {where}.",
            fix=f"Set distill.batch_size to at most {epoch_pairs:,}, or {more}.",
        )
    return settings.steps or settled(settings.epochs) * epoch_pairs // batch_size


def largest_epoch(recipe: Recipe, num_pairs: int) -> int:
    """The most pairs an epoch can have, before the clusters are known."""
    per_cluster = recipe.distill.per_cluster
    if per_cluster is None or recipe.cluster.existing is not None:
        return num_pairs
    return min(num_pairs, per_cluster * settled(recipe.cluster.num_centers))


def make_student(
    settings: DistillConfig, teacher_dim: int | None, machine: MachineConfig, *, text_tower: TextTower | None = None
) -> Clip:
    """The student, on the CPU; as wide as the teacher if it is compared without a map.

    Args:
        settings: Of the training.
        teacher_dim: None without a teacher.
        machine: Whether activations are computed again.
        text_tower: Of the teacher, which the student keeps.
    """
    width = teacher_dim if settings.alignment == "native" else None
    clip = build_student(
        settings.student,
        embed_dim=width,
        pretrained=settings.pretrained,
        seed=settings.seed,
        with_bias=settings.weights.any_reads("logit_bias"),
        text_tower=text_tower,
        own_scale=settings.trains_logit_scale,
    )

    if settings.lock != "none" and settings.pretrained is None:
        raise ConfigError(
            f"distill.lock: {settings.lock}, but no weights are loaded, so the tower would stay random.",
            fix="Set distill.pretrained, or distill.lock: none.",
        )

    if machine.grad_checkpointing:
        use_grad_checkpointing(clip)
    return clip


def make_objective(
    settings: DistillConfig,
    clip: Clip,
    teacher_dim: int | None,
    centers: Float[np.ndarray, "centers dim"] | None,
    *,
    text_centers: Float[np.ndarray, "text_centers dim"] | None = None,
    scale: float,
    scales: Mapping[str, float] = MappingProxyType({}),
    ranks: Ranks,
    teacher_scale: float = USUAL_SCALE,
) -> Objective:
    """The objective. A head that learns is spread over the ranks, and its gradient stays on its rank."""
    shard = None
    if centers is not None and settings.head_lr > 0 and ranks.size > 1:
        first, stop = Shard.bounds(len(centers), ranks.rank, ranks.size)
        shard, centers = Shard(first, len(centers), dist.distributed_c10d._get_default_group()), centers[first:stop]

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # for the maps of `alignment: linear`
        return Objective(
            losses=settings.weights.switched_on,
            student_dim=clip.dim,
            teacher_dim=teacher_dim,
            alignment=settings.alignment,
            centers=torch.from_numpy(centers) if centers is not None else None,
            shard=shard,
            text_centers=torch.from_numpy(text_centers) if text_centers is not None else None,
            head_scale=scale,
            scales=scales,
            train_head=settings.head_lr > 0,
            sample_rate=settings.sample_rate,
            logq=settings.logq,
            ignore_near=settings.ignore_near,
            temperature=settings.temperature,
            teacher_scale=teacher_scale,
            affinity_scale=settings.affinity_scale,
            bank_scale=settings.bank_scale,
            share_scale=settings.share_scale,
            stored_texts=settings.keeps_text_tower,
            precision=settings.loss_precision,
        )


def make_batches(
    training: TrainingPairs, clip: Clip, recipe: Recipe, ranks: Ranks, bank: Bank | None = None
) -> Batches:
    """The batches the student learns from."""
    settings = recipe.distill
    crop_scale = settings.crop_scale if training.views is None else None  # a view is a crop already
    transform = train_transform(clip, crop_scale=crop_scale, more=settings.augmentation)
    return Batches(
        training,
        _dataset(training, clip, recipe, transform),
        batch_size=settled(settings.batch_size),
        seed=settings.seed,
        workers=recipe.machine.workers,
        pin=ranks.device.type == "cuda",
        ranks=ranks,
        bank=bank.at if bank is not None else None,
        per_cluster=settings.per_cluster,
        shuffle_window=settings.shuffle_window,
    )


def _validation(
    clip: Clip, held_out: HeldOut | None, recipe: Recipe, ranks: Ranks, bank: Bank | None
) -> Validation | None:
    """The validation. Its sets are opened now, so that a missing one is an error before the first step."""
    settings = recipe.distill
    if not settings.validation.measures:
        return None

    sets = [
        open_set(name, where, max_pixels=recipe.pairs.max_pixels, splits=("test",), cache_dir=recipe.machine.cache_dir)
        for name, where in settings.validation.sets.items()
    ]
    for labelled in sets:
        labelled.prompts(0)

    batches = None
    if held_out is not None:
        batches = Batches(
            held_out.pairs,
            _dataset(held_out.pairs, clip, recipe, clip.preprocess),
            batch_size=held_out.batch_size,
            seed=settings.seed,
            workers=recipe.machine.workers,
            pin=ranks.device.type == "cuda",
            ranks=ranks,
            bank=bank.at if bank is not None else None,
        )
    return Validation(clip, batches, sets, settings.weights.model_dump(), settings.seed, ranks)


def _dataset(training: TrainingPairs, clip: Clip, recipe: Recipe, transform: Any) -> PairDataset:
    return PairDataset(
        training,
        transform=transform,
        tokenizer=clip.tokenizer,
        max_pixels=recipe.pairs.max_pixels,
        seed=recipe.distill.seed,
    )


def refuse_without_float64(device: torch.device, recipe: Recipe) -> None:
    """Some losses are summed in float64, which Apple's devices do not have.

    Raises:
        ConfigError: The recipe has such a loss, and the device is one of these.
    """
    losses = [loss.name for loss in rows_of(recipe.distill.weights.switched_on) if loss.needs_float64]
    if device.type == "mps" and losses:
        raise ConfigError(
            f"machine.device: mps has no float64, which the losses {', '.join(losses)} need for their sums.",
            fix="Set machine.device: cpu, or the weights of these losses to 0 (distill.weights).",
        )


def refuse_too_many_labels(settings: DistillConfig, num_centers: int) -> None:
    if settings.labels > num_centers:
        raise ConfigError(
            f"distill.labels: {settings.labels:,} labels for an image, but there are only {num_centers:,} centers.",
            fix=f"Set distill.labels to at most {num_centers:,}; 8 suit a million centers.",
        )


def _with_labels(
    training: TrainingPairs,
    centers: Float[np.ndarray, "centers dim"],
    settings: DistillConfig,
    folder: Path,
    key: str,
    ranks: Ranks,
) -> TrainingPairs:
    """The same pairs with several labels, computed, or resumed from a killed attempt."""
    if training.store is None or training.store_rows is None or training.labels is None:
        return training
    labels = several_labels(
        folder,
        training.store.images,
        training.store_rows,
        training.labels,
        centers,
        count=settings.labels,
        key=key,
        ranks=ranks,
    )
    return dataclasses.replace(training, several_labels=labels)


def distinct_labels(labels: Rows, batch_size: int, *, per_cluster: int | None = None) -> float:
    """How many different clusters a random batch has on average, each image being in one or in several."""
    counts = np.zeros(0, dtype=np.int64)
    for several in _label_blocks(labels):
        counts = _sum_by_label(counts, several[:, 0])
    taken = counts if per_cluster is None else np.minimum(counts, per_cluster)

    weights, weighed = taken / np.maximum(counts, 1), np.zeros(0)
    for several in _label_blocks(labels):
        weighed = _sum_by_label(weighed, several.ravel(), np.repeat(weights[several[:, 0]], several.shape[1]))
    return float((1 - (1 - weighed / taken.sum()) ** batch_size).sum())


def _label_blocks(labels: Rows) -> Iterator[Int[np.ndarray, "block labels"]]:
    """The labels of some rows after the other: those of all rows may be gigabytes."""
    for start in range(0, labels.shape[0], _LABEL_ROWS):
        block = labels[start : start + _LABEL_ROWS]
        yield block.reshape(len(block), -1)


def _sum_by_label(
    sums: Num[np.ndarray, " labels"], labels: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None
) -> Num[np.ndarray, " more"]:
    """The sums by label, with a count or a weight of each of `labels` added."""
    added = np.bincount(labels, weights, minlength=len(sums))
    added[: len(sums)] += sums
    return added


def _warn_of_negatives(settings: DistillConfig, labels: Rows, num_centers: int) -> None:
    """Say once when the centers of a batch fill the sample, so that no random negatives take part."""
    quota = round(settings.sample_rate * num_centers)
    batch_size = settled(settings.batch_size)
    own = distinct_labels(labels, batch_size, per_cluster=settings.per_cluster)
    if quota <= own:
        log.info(
            f"distill.sample_rate {settings.sample_rate:g} is {quota:,} of {num_centers:,} centers a step, but"
            f" a batch of {batch_size:,} holds {own:,.0f} of them by itself: its own centers are the only"
            " negatives"
        )


def _say_how_pairs_take_turns(labels: Int[np.ndarray, " rows"], per_cluster: int, num_pairs: int) -> None:
    epoch, largest = epoch_size(labels, per_cluster), int(np.bincount(labels).max())
    log.info(
        f"distill   an epoch is {epoch:,} of {num_pairs:,} pairs, at most {per_cluster:,} of a cluster; the largest"
        f" cluster has {largest:,}, all of which are seen after {units.counted(-(-largest // per_cluster), 'epoch')}"
    )


def _key(
    settings: DistillConfig,
    training: TrainingPairs,
    store: EmbeddingStore | None,
    centers: Float[np.ndarray, "centers dim"] | None,
    text_centers: Float[np.ndarray, "text_centers dim"] | None,
) -> str:
    """Digest of everything that decides the result."""
    decide = deciding({"distill": settings.model_dump(mode="json")})
    digest = hashlib.sha256(json.dumps(decide, sort_keys=True).encode())

    add_rows(digest, training.rows)
    for values in (training.labels, training.store_rows, centers):
        if values is None:
            digest.update(b"none")
        elif values is training.store_rows:
            add_rows(digest, values)
        else:
            digest.update(np.ascontiguousarray(values).data)  # not a copy: centers may be gigabytes

    # What later settings added: a training without them keeps the key it had.
    if training.merged is not None:
        training.merged.add_to(digest)
    if training.lines is not None:
        digest.update(training.lines.digest)
    if training.views is not None:
        digest.update(json.dumps(dataclasses.asdict(training.views), sort_keys=True).encode())
    for values in (training.text_labels, training.first_texts, text_centers):
        if values is not None:
            digest.update(np.ascontiguousarray(values).data)
    digest.update(json.dumps(store.info.teacher if store is not None else None, sort_keys=True).encode())
    return digest.hexdigest()
