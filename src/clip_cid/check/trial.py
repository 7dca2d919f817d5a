"""The training that a check tries: the run's own if its stages are done, else one with random targets."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from clip_cid import pipeline, tasks, units
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.data.text_files import read_text_lines
from clip_cid.errors import RunError
from clip_cid.models.architectures import build_skeleton
from clip_cid.models.costs import Costs, count_costs
from clip_cid.models.loading import known_architecture
from clip_cid.models.teacher import teacher_reference
from clip_cid.recipe import Recipe, settled
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import DISTILL, EMBED
from clip_cid.training.assemble import (
    Inputs,
    Training,
    assemble,
    count_steps,
    largest_epoch,
    make_student,
    prepare,
    split_off,
)
from clip_cid.training.batches import BankRows, Batch
from clip_cid.training.join import plain_pairs
from clip_cid.training.lines import Lines
from clip_cid.training.loop import Trainer
from clip_cid.training.ranks.distributed import Ranks

_HEAD_COPIES = 3  # of the centers, while the head is made of them


class UntouchedRun(RunFolder):
    """A run that is only read: new parts of its index of the pairs go elsewhere."""

    def __init__(self, path: Path, scratch: Path) -> None:
        super().__init__(path)
        self._index = scratch / "index"
        self._index.mkdir()
        for file in (path / "index").glob("*.arrow"):
            os.symlink(file.absolute(), self._index / file.name)

    @property
    def index(self) -> Path:
        return self._index


@dataclasses.dataclass(frozen=True)
class Tried:
    """A training that is ready for its first step, and what it is made of."""

    training: Training
    invented: bool
    """Whether the targets are random."""
    teacher_dim: int | None
    """None without a teacher."""

    @property
    def trainer(self) -> Trainer:
        return self.training.trainer

    @property
    def held_out(self) -> int:
        """Pairs to measure on; the student does not learn from them."""
        held_out = self.training.inputs.held_out
        return len(held_out.pairs) if held_out is not None else 0


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """The teacher's facts that are known without its weights."""

    name: str
    costs: Costs | None
    width: int | None
    """None if its configuration would have to be fetched."""


def undone(folder: RunFolder, recipe: Recipe) -> list[pipeline.State]:
    """The stages that the training needs and that are not there, or not as the recipe has them."""
    needs = next(stage for stage in pipeline.STAGES if stage.name == DISTILL).needs
    states = pipeline.states(RunFolder(folder.path, read_only=True), recipe)
    states = (state for state in states if state.stage.name in needs)
    return [state for state in states if state.status not in ("done", "off")]


def find_teacher(folder: RunFolder, recipe: Recipe, missing: Sequence[pipeline.State]) -> TeacherFacts | None:
    """The recipe's teacher; as the embeddings name it if they are there. None without one.

    Raises:
        ClipCidError: The embeddings are to be computed, and there is no such model.
    """
    if not recipe.has_teacher:
        return None
    if not any(state.stage.name == EMBED for state in missing):
        store = EmbeddingStore.open(folder.stage(EMBED))
        made_by = store.info.teacher
        return _facts(str(made_by.get("reference", "unknown")), made_by.get("model_cfg"), store.dim)
    if recipe.embed.existing is not None:
        return TeacherFacts(f"of {recipe.embed.existing}", None, None)
    reference = teacher_reference(recipe.embed)
    return _facts(reference, known_architecture(reference), None)


def _facts(name: str, model_cfg: dict | None, width: int | None) -> TeacherFacts:
    if not model_cfg:
        return TeacherFacts(name, None, width)
    skeleton = build_skeleton(model_cfg)
    length = model_cfg["text_cfg"].get("context_length", 77)
    costs = count_costs(skeleton, context_length=length) if skeleton is not None else None
    return TeacherFacts(name, costs, width or int(model_cfg["embed_dim"]))


def from_the_run(folder: RunFolder, out: Path, recipe: Recipe, ranks: Ranks) -> Tried:
    """The training that `distill` would begin.

    Raises:
        ClipCidError: As `assemble.prepare`.
    """
    training = prepare(folder, out, recipe, ranks, first_pass=False)
    store = training.inputs.store
    return Tried(training, invented=False, teacher_dim=store.dim if store is not None else None)


def with_random_targets(folder: RunFolder, out: Path, recipe: Recipe, ranks: Ranks, teacher: TeacherFacts) -> Tried:
    """A training on all pairs, of the size and shape that the recipe's will have; balance will leave fewer pairs.

    The pairs of a cluster take no turns: nobody knows their clusters yet.

    Raises:
        ClipCidError: The pairs, the student or the settings cannot be used, or the centers do not fit the memory.
    """
    pairs = open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)
    inputs = Inputs(*split_off(plain_pairs(pairs), recipe.distill, ranks))
    if recipe.uses_texts:
        texts = read_text_lines(recipe.distill.text_files, setting="distill.texts").texts
        lines = Lines(texts, None, recipe.distill.lines_per_step)
        inputs = dataclasses.replace(inputs, pairs=dataclasses.replace(inputs.pairs, lines=lines))
    steps = count_steps(recipe.distill, largest_epoch(recipe, len(inputs.pairs)))
    clip = make_student(recipe.distill, teacher.width, recipe.machine)  # its own text tower stands in for a teacher's
    teacher_dim = teacher.width or clip.dim
    if recipe.uses_clusters:
        centers = _random_centers("num_centers", settled(recipe.cluster.num_centers), teacher_dim)
        inputs = dataclasses.replace(inputs, centers=centers)
    if recipe.uses_text_clusters:
        centers = _random_centers("num_text_centers", recipe.cluster.text_centers, teacher_dim)
        inputs = dataclasses.replace(inputs, text_centers=centers)
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"per_cluster": None})})
    training = assemble(inputs, clip, teacher_dim, out, recipe, ranks, steps=steps, first_pass=False)
    return Tried(training, invented=True, teacher_dim=teacher_dim)


def add_random_targets(batch: Batch, recipe: Recipe, dim: int) -> Batch:
    """The batch with all that the losses read of a teacher and a clustering."""
    rows, generator = len(batch.rows), np.random.default_rng(0)
    if recipe.uses_teacher_images or recipe.uses_several_labels:
        batch = dataclasses.replace(batch, teacher_image=torch.from_numpy(_unit_rows(rows, dim, generator)))
    if recipe.uses_teacher_texts:
        batch = dataclasses.replace(batch, teacher_text=torch.from_numpy(_unit_rows(rows, dim, generator)))
    if batch.lines is not None:
        lines = _unit_rows(len(batch.lines), dim, generator)
        batch = dataclasses.replace(batch, teacher_lines=torch.from_numpy(lines))
    if recipe.uses_clusters:
        labels = torch.from_numpy(generator.integers(0, settled(recipe.cluster.num_centers), rows))
        batch = dataclasses.replace(batch, labels=labels)
    if recipe.uses_text_clusters:
        text_labels = torch.from_numpy(generator.integers(0, recipe.cluster.text_centers, rows))
        batch = dataclasses.replace(batch, text_labels=text_labels)
    if recipe.distill.weights.any_reads_bank:
        size = recipe.distill.bank_size
        images, texts = (torch.from_numpy(_unit_rows(size, dim, generator)) for _ in range(2))
        batch = dataclasses.replace(batch, bank=BankRows(images, texts))
    return batch


def _random_centers(setting: str, count: int, dim: int) -> np.ndarray:
    needed, available = _HEAD_COPIES * 4 * dim * count, tasks.available_memory()
    if needed > available:
        raise RunError(
            f"cluster.{setting}: {count:,} centers of width {dim:,} take {units.memory(needed)} of memory"
            f" while the head is made, but {units.memory(available)} are available.",
            fix=f"Lower cluster.{setting}, or use a machine with more memory.",
        )
    return _unit_rows(count, dim, np.random.default_rng(1))


def _unit_rows(count: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    rows = generator.standard_normal((count, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows
