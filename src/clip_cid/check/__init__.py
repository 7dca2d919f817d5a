"""Try the first steps of a training before it begins: `clip-cid check`.

It reads one real batch and makes a few steps on it, in a folder that is deleted afterwards. Nothing in
the run changes.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import threadpoolctl
import torch

from clip_cid import extras, tasks
from clip_cid.auto_numbers import Choice
from clip_cid.check import captions, estimates, likely_mistakes, misfits, rehearsal, trial
from clip_cid.data.inputs import brought_here
from clip_cid.errors import ClipCidError, ConfigError
from clip_cid.models.architectures import architecture, build_skeleton
from clip_cid.models.costs import Costs, count_costs, count_parameters
from clip_cid.models.device import resolve_device
from clip_cid.pipeline import State
from clip_cid.recipe import Recipe, settled
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import CLUSTER, EMBED, TEXTS
from clip_cid.training.assemble import distinct_labels, largest_epoch, refuse_without_float64
from clip_cid.training.batches import Batch
from clip_cid.training.ranks.distributed import Ranks
from clip_cid.training.records import make_listeners
from clip_cid.training.soft_targets import uses_soft_centers

_AHEAD = 2  # batches that each worker of a DataLoader holds ready


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of a check; sizes in bytes, times in seconds."""

    recipe: Recipe
    """With a number for each `auto`."""
    choices: tuple[Choice, ...]
    """These numbers, and why."""
    device: torch.device
    undone: list[State]
    """Stages before the training that have not run: the targets of the steps were random."""
    pairs: int
    """To train on."""
    epoch_pairs: int
    """Of an epoch; at most so many while the clusters are not known."""
    held_out: int
    texts: int
    """Without images, to be read beside the pairs."""
    given_captions: int
    """Of removed near-duplicates, read with the pairs that were kept for them; 0 before a balance."""
    sights: captions.Sights
    parameters: dict[str, int]
    student: Costs | None
    own_towers: Costs | None
    """Of the student with a text tower of its own, if it keeps the teacher's."""
    teacher: trial.TeacherFacts | None
    reading: rehearsal.Reading
    rehearsal: rehearsal.Rehearsal
    worker_memory_gib: float
    chance: dict[str, float]
    duration: estimates.Duration
    soft_seconds: float | None
    """Seconds for all pairs, before the first step; None if the training uses no soft centers."""
    label_seconds: float | None
    """Likewise for several labels an image."""
    waiting_bytes: int
    """Bytes of the batches that the workers hold ready."""
    disk: estimates.Disk
    teacher_dim: int | None
    embed_seconds: float | None
    """Seconds that embedding took, if it was done here."""
    warnings: list[str]
    unchecked: list[str]


def check(folder: RunFolder, recipe: Recipe) -> Report:
    """Try the training of a run; nothing of the run changes.

    Raises:
        ClipCidError: The run would be refused, sooner or later; all reasons that are known are listed.
    """
    if tasks.torchrun_place().size > 1:
        raise ConfigError("check is for one process, but torchrun has started several.", fix="Start it by itself.")
    machine = recipe.machine
    if machine.threads:
        torch.set_num_threads(machine.threads)
    unheard = machine.model_copy(update={"callbacks": (), "tensorboard": "off"})
    missing = trial.undone(folder, recipe)
    with (
        tempfile.TemporaryDirectory(prefix="clip-cid-check-") as scratch,
        threadpoolctl.threadpool_limits(machine.threads or None),
        brought_here(recipe, {state.stage.name for state in missing}) as with_copies,
    ):
        return _try(folder, with_copies.model_copy(update={"machine": unheard}), recipe, Path(scratch), missing)


def _refuse_bad_listeners(recipe: Recipe) -> None:
    """Problems that would stop the first step; no callback is called."""
    machine = recipe.machine
    make_listeners(machine.callbacks, "off", Path(), step=0)
    if machine.tensorboard == "on":
        extras.require("machine.tensorboard: on", extras.TENSORBOARD)


def _try(folder: RunFolder, recipe: Recipe, original: Recipe, scratch: Path, missing: list[State]) -> Report:
    run, out = trial.UntouchedRun(folder.path, scratch), scratch / "distill"
    out.mkdir()

    # What stands against the run, as far as it is known without a step.
    found: list[ClipCidError] = []
    device: torch.device | None = None
    teacher: trial.TeacherFacts | None = None
    settled = misfits.settle_for(run, recipe, missing)
    recipe, original = settled.recipe, settled.recipe.model_copy(update={"machine": original.machine})
    with misfits.noted(found):
        _refuse_bad_listeners(original)
    with misfits.noted(found):
        device = resolve_device(recipe.machine.device)
        refuse_without_float64(device, recipe)
    more, left_out = misfits.find_misfits(run, recipe, missing)
    found += more
    with misfits.noted(found):
        teacher = trial.find_teacher(run, recipe, missing)

    # The training itself; with random targets only if nothing is in the way.
    tried: trial.Tried | None = None
    with misfits.noted(found):
        if device is not None and (not missing or not recipe.has_teacher):
            tried = trial.from_the_run(run, out, recipe, Ranks(device=device))
        elif device is not None and teacher is not None and not found:
            tried = trial.with_random_targets(run, out, recipe, Ranks(device=device), teacher)
    if tried is None:
        found += misfits.of_training(run, recipe, missing, None if teacher is None else teacher.width)

    misfits.raise_together(found)
    assert tried is not None, "nothing was found"
    report = _measure(folder, original, tried, teacher, missing)
    return dataclasses.replace(report, choices=settled.choices, warnings=[*report.warnings, *left_out])


def _measure(
    folder: RunFolder, recipe: Recipe, tried: trial.Tried, teacher: trial.TeacherFacts | None, missing: list[State]
) -> Report:
    trainer, clip, machine = tried.trainer, tried.training.clip, recipe.machine
    training = tried.training.inputs.pairs
    sights, pairs = captions.look_at(training, clip, max_pixels=recipe.pairs.max_pixels), len(training)
    texts = 0 if training.lines is None else len(training.lines)

    # Measure: reading of batches, then steps on the first of them.
    to_try = rehearsal.batches_to_try(trainer.batches, workers=machine.workers, steps=trainer.plan.steps)
    with contextlib.closing(to_try) as batches:
        reading = rehearsal.read_batches(batches, workers=machine.workers)
        student = count_costs(clip.model, context_length=reading.batch.texts.shape[1])
        batch, label_seconds, soft_seconds = _with_targets(reading.batch, recipe, tried)
        rehearsed = rehearsal.rehearse(trainer, batch, beside=batches if machine.workers else iter(()))

    # Estimate what follows from that.
    duration = estimates.Duration(
        trainer.plan.steps, rehearsed.seconds_per_step, reading.seconds_per_batch, overlaps=machine.workers > 0
    )
    width = tried.teacher_dim or clip.dim
    disk = estimates.estimate_disk(
        trainer,
        before=_bytes_before(recipe, missing, pairs, texts, width),
        soft_rows=0 if soft_seconds is None else pairs,
        labels=0 if label_seconds is None else pairs * recipe.distill.labels,
        width=width,
        free=shutil.disk_usage(_existing_parent(folder.path)).free,
    )
    heads = (trainer.model.objective.head, trainer.model.objective.text_head)
    in_head = sum(value.numel() for head in heads if head is not None for value in head.parameters())

    report = Report(
        recipe=recipe,
        choices=(),
        device=trainer.ranks.device,
        undone=missing,
        pairs=pairs,
        epoch_pairs=largest_epoch(recipe, pairs) if tried.invented else trainer.batches.epoch_size,
        held_out=tried.held_out,
        texts=texts,
        given_captions=0 if (merged := tried.training.inputs.pairs.merged) is None else int(merged.counts.sum()),
        sights=sights,
        parameters={**count_parameters(clip.model), "head": in_head},
        student=student,
        own_towers=_own_towers(recipe, width),
        teacher=teacher,
        reading=reading,
        rehearsal=rehearsed,
        worker_memory_gib=rehearsal.worker_memory_gib(),
        chance=_chance(recipe, tried, rehearsed, width),
        duration=duration,
        soft_seconds=None if soft_seconds is None else soft_seconds * pairs,
        label_seconds=None if label_seconds is None else label_seconds * pairs,
        waiting_bytes=_AHEAD * machine.workers * _bytes_of(batch.images, batch.texts),
        disk=disk,
        teacher_dim=tried.teacher_dim,
        embed_seconds=_embed_seconds(folder, missing),
        warnings=[],
        unchecked=_unchecked(recipe, missing, teacher),
    )
    return dataclasses.replace(report, warnings=_warnings(report, folder, tried))


def _with_targets(batch: Batch, recipe: Recipe, tried: trial.Tried) -> tuple[Batch, float | None, float | None]:
    """The batch as the losses read it, and the seconds a pair's labels and soft centers took (if it has any)."""
    if tried.invented:
        batch = trial.add_random_targets(batch, recipe, tried.teacher_dim or tried.training.clip.dim)
    labelled = softened = None
    if recipe.uses_several_labels:
        batch, labelled = rehearsal.label(batch, tried.trainer, recipe.distill.labels)
    if recipe.uses_clusters and not recipe.embed.views and uses_soft_centers(recipe.distill):
        batch, softened = rehearsal.soften(batch, tried.trainer)
    return batch, labelled, softened


def _warnings(report: Report, folder: RunFolder, tried: trial.Tried) -> list[str]:
    recipe = report.recipe
    settings, machine = recipe.distill, recipe.machine
    warnings = [
        *likely_mistakes.of_settings(
            settings, steps=report.duration.steps, pairs=report.epoch_pairs, held_out=report.held_out
        ),
        *likely_mistakes.of_weights(settings),
        *likely_mistakes.of_head(settings),
        *likely_mistakes.of_views(
            recipe.embed, epochs=report.duration.steps * settled(settings.batch_size) / report.pairs
        ),
        *likely_mistakes.of_machine(settings, machine, report.device),
        *likely_mistakes.of_time(report.duration, machine),
        *likely_mistakes.of_absent_captions(settings, report.sights),
        *likely_mistakes.of_pairs(report.sights, report.reading, max_bad_share=recipe.pairs.max_bad_share),
        *likely_mistakes.of_room(
            report.disk, folder.path, memory=report.waiting_bytes, available=tasks.available_memory()
        ),
    ]

    labels, head = tried.training.inputs.pairs.labels, tried.trainer.model.objective.head
    if labels is not None and head is not None:
        own = distinct_labels(labels, settled(settings.batch_size), per_cluster=settings.per_cluster)
        warnings += likely_mistakes.of_negatives(settings, num_centers=head.num_centers, own=own)
    return warnings


def _chance(recipe: Recipe, tried: trial.Tried, rehearsed: rehearsal.Rehearsal, width: int) -> dict[str, float]:
    model = tried.trainer.model
    bias = getattr(model.student, "logit_bias", None)
    return estimates.chance_levels(
        recipe.distill,
        width=width,
        num_centers=model.objective.head.num_centers if model.objective.head is not None else None,
        in_step=rehearsed.centers,
        perplexity=tried.training.sharpness.perplexity,
        logit_bias=None if bias is None else float(bias.detach()),
    )


def _unchecked(recipe: Recipe, missing: list[State], teacher: trial.TeacherFacts | None) -> list[str]:
    unchecked: list[str] = []
    names = [state.stage.name for state in missing]
    if EMBED in names and recipe.embed.existing is not None:
        unchecked.append(f"embed.existing: the rows of {recipe.embed.existing} were not read; the embed stage does")
    elif EMBED in names and teacher is not None:
        unchecked.append(f"whether the weights of {teacher.name} load (they are neither read nor fetched)")
    if EMBED in names and recipe.distill.keeps_text_tower:
        unchecked.append(
            "distill.text_tower: the teacher's was not read, and the student's own stood in for it (in memory and on"
            " the disk)"
        )
    if names:
        unchecked.append(
            f"what {', '.join(names)} will leave: how many pairs stay, the join, the captions the teacher has read"
        )
    if recipe.distill.validation.measures:
        unchecked.append("the time of the measurements on the way (distill.validation)")
    return unchecked


def _own_towers(recipe: Recipe, width: int) -> Costs | None:
    if not recipe.distill.keeps_text_tower:
        return None
    model_cfg = {**architecture(recipe.distill.student)[0], "embed_dim": width}
    skeleton = build_skeleton(model_cfg)
    length = model_cfg["text_cfg"].get("context_length", 77)
    return None if skeleton is None else count_costs(skeleton, context_length=length)


def _bytes_before(recipe: Recipe, missing: list[State], pairs: int, texts: int, width: int) -> int:
    names = {state.stage.name for state in missing}
    embedding = EMBED in names and recipe.embed.existing is None
    embeddings = estimates.embedding_bytes(pairs, width, views=recipe.embed.views) if embedding else 0
    centers = estimates.cluster_bytes(pairs, settled(recipe.cluster.num_centers), width) if CLUSTER in names else 0
    if CLUSTER in names and recipe.cluster.texts:  # one caption a pair
        centers += estimates.cluster_bytes(pairs, recipe.cluster.text_centers, width)
    of_texts = estimates.text_bytes(texts, width) if TEXTS in names else 0
    return embeddings + centers + of_texts


def _embed_seconds(folder: RunFolder, missing: list[State]) -> float | None:
    record = None if any(state.stage.name == EMBED for state in missing) else folder.record(EMBED)
    return record.seconds if record is not None and record.summary.get("images_per_s") else None


def _bytes_of(*values: torch.Tensor) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
