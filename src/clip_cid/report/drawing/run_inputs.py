"""The files and models behind the figures of a run, opened when a figure asks for them."""

from functools import cached_property

import numpy as np

from clip_cid import log, os_errors
from clip_cid.data.balance.decided_file import read_cut
from clip_cid.data.balance.forest_file import FOREST_FILE, StoredForest, read_forest
from clip_cid.data.balance.tables import BalanceTables
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import read_array_of_stage
from clip_cid.data.pairs.pictures import NoPicturesError, Pictures, open_pictures
from clip_cid.data.sets.evaluation_sets import DIGITS, EvaluationSet, open_set
from clip_cid.errors import ClipCidError, DataError
from clip_cid.evaluation.scores import (
    RESULTS,
    STUDENT,
    TEACHER,
    Differences,
    Score,
    read_scores,
    read_task_summaries,
    reference_model,
)
from clip_cid.models.clip import Clip
from clip_cid.models.loading import load_clip
from clip_cid.models.patches import why_no_patches
from clip_cid.models.teacher import teacher_reference
from clip_cid.recipe import Recipe
from clip_cid.report.drawing.training_log import read_metrics
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, EMBED, EVALUATE

NO_CLUSTERS = "this recipe does not cluster"
NO_SCORES = "this recipe has no such evaluation"
_NO_BALANCE = "this recipe does not balance"
_NOT_KNOWN = "no image is known to be removed for another"


class LeftOut(Exception):
    """A figure has no input in this run; the message says which."""


class RunInputs:
    """The inputs of the figures of one run; a missing one raises `LeftOut` with the reason."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self._clips: dict[str, Clip] = {}
        self._broken: dict[str, str] = {}

    @cached_property
    def store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.folder.stage(EMBED))

    @cached_property
    def kept(self) -> np.ndarray:
        """The rows of the store that the clusters and the student see."""
        if not self.recipe.uses(BALANCE):
            return np.flatnonzero(self.store.ok)
        return read_array_of_stage(self.folder.stage(BALANCE) / "kept.npy")

    @cached_property
    def balanced(self) -> BalanceTables:
        """The sets of the balance stage."""
        if not self.recipe.uses(BALANCE):
            raise LeftOut(_NO_BALANCE)
        folder = self.folder.stage(BALANCE)
        if not BalanceTables.exist(folder):
            raise LeftOut(_NOT_KNOWN)
        return BalanceTables(folder)

    @cached_property
    def removed(self) -> BalanceTables:
        """The same, if at least one image was removed."""
        if not len(self.balanced.distances):
            raise LeftOut(_NOT_KNOWN)
        return self.balanced

    @cached_property
    def clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """Centers, and the label of each kept row."""
        if not self.recipe.uses(CLUSTER):
            raise LeftOut(NO_CLUSTERS)
        folder = self.folder.stage(CLUSTER)
        centers = read_array_of_stage(folder / "centers.npy", mmap_mode="r")
        return centers, read_array_of_stage(folder / "labels.npy")

    @cached_property
    def scores(self) -> list[Score]:
        if not self.recipe.uses(EVALUATE):
            raise LeftOut(NO_SCORES)
        return read_scores(self.folder.stage(EVALUATE) / RESULTS)

    @cached_property
    def differences(self) -> Differences:
        """Between the student and the other models; empty if there are none."""
        tables = read_task_summaries(self.folder.stage(EVALUATE)).values()
        return Differences(one for table in tables for one in table.differences)

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns of the training's log."""
        return read_metrics(self.folder.stage(DISTILL) / "metrics.jsonl")

    @cached_property
    def forest(self) -> StoredForest:
        """The forest of the balance; its links name rows of the store."""
        if not BalanceTables.exist(self.folder.stage(BALANCE)):
            raise LeftOut(_NOT_KNOWN)
        return read_forest(self.folder.stage(BALANCE) / FOREST_FILE)

    @cached_property
    def joined_forest(self) -> StoredForest:
        """The forest without the links that decisions cut."""
        forest, cut = self.forest, read_cut(self.folder.stage(BALANCE))
        left, right, squared = (np.delete(column, cut) for column in (forest.left, forest.right, forest.squared))
        return forest._replace(left=left, right=right, squared=squared)

    @cached_property
    def references(self) -> dict[str, str]:
        """Teacher, student and baseline, as far as there are any -> what to load."""
        compare, embed = self.recipe.evaluate.compare, self.recipe.embed
        references: dict[str, str] = {}
        if TEACHER in compare:
            references[TEACHER] = compare[TEACHER]
        elif self.recipe.has_teacher and embed.existing is None:
            references[TEACHER] = teacher_reference(embed)
        references[STUDENT] = f"local-dir:{self.folder.stage(DISTILL) / 'student'}"
        baseline = reference_model(list(compare))
        return references if baseline is None else {**references, baseline: compare[baseline]}

    def clip(self, model: str) -> Clip:
        """One of `references`, loaded once.

        Raises:
            LeftOut: It is not the student, and is gone or broken. What may pass is raised as it is.
        """
        if model in self._broken:
            raise LeftOut(self._broken[model])
        if model not in self._clips:
            try:
                self._clips[model] = load_clip(self.references[model], device=self.recipe.machine.device)
            except ClipCidError as error:
                if model == STUDENT or os_errors.may_pass(error.__cause__):
                    raise
                log.warn(f"draw      {model} is left out: {error.problem}")
                self._broken[model] = error.problem
                raise LeftOut(error.problem) from error
        return self._clips[model]

    @cached_property
    def patched(self) -> tuple[dict[str, Clip], dict[str, str]]:
        """The models whose patches are available, and the reason for each of the others."""
        with_patches: dict[str, Clip] = {}
        left_out: dict[str, str] = {}
        for model in self.references:
            try:
                clip = self.clip(model)
            except LeftOut as reason:
                left_out[model] = str(reason)
                continue
            if reason := why_no_patches(clip):
                left_out[model] = reason
            else:
                with_patches[model] = clip
        if STUDENT not in with_patches:
            raise LeftOut(f"the student's patches are not available: {left_out[STUDENT]}")
        return with_patches, left_out

    @cached_property
    def labelled(self) -> EvaluationSet:
        """`draw.images_of`, or the first evaluation set that exists; scikit-learn's digits only as the last."""
        problems: list[str] = []
        chosen, sets = self.recipe.draw.images_of, self.recipe.evaluate.sets.items()
        for name, where in sorted(sets, key=lambda item: item[1] == DIGITS):
            if chosen not in (None, name):
                continue
            try:
                return open_set(
                    name,
                    where,
                    max_pixels=self.recipe.pairs.max_pixels,
                    splits=("test",),
                    cache_dir=self.recipe.machine.cache_dir,
                )
            except DataError as error:
                if os_errors.may_pass(error.__cause__):
                    raise
                problems.append(error.problem)
        raise LeftOut(f"no evaluation set to take images from ({' '.join(problems) or 'none is named'})")

    def words(self, rows: list[int]) -> tuple[dict[int, str], dict[int, str]]:
        """Key and captions of each row."""
        distinct = sorted(set(rows))
        captions = {row: " / ".join(self.store.captions(row)) for row in distinct}
        return {row: self.store.keys[row] for row in distinct}, captions

    def pictures(self, keys: dict[int, str]) -> Pictures:
        try:
            return open_pictures(self.folder, self.recipe, {key: row for row, key in keys.items()})
        except NoPicturesError as reason:
            raise LeftOut(str(reason)) from reason
