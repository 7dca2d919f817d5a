"""The files and models behind the figures of a run, opened when a figure asks for them."""

from functools import cached_property

import numpy as np

from clip_cid import log, os_errors
from clip_cid.data.npy_files import read_array_of_stage
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
from clip_cid.report.drawing.stored_inputs import LeftOut, StoredInputs
from clip_cid.report.drawing.training_log import read_metrics
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import CLUSTER, DISTILL, EVALUATE

NO_CLUSTERS = "this recipe does not cluster"
NO_SCORES = "this recipe has no such evaluation"
NO_STUDENT = "this recipe trains no student"


class RunInputs(StoredInputs):
    """The inputs of the figures of one run; a missing one raises `LeftOut` with the reason."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        super().__init__(folder, recipe)
        self._clips: dict[str, Clip] = {}
        self._broken: dict[str, str] = {}

    @cached_property
    def clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """Centers, and the label of each kept row."""
        folder = self.of_stage(CLUSTER, NO_CLUSTERS)
        centers = read_array_of_stage(folder / "centers.npy", mmap_mode="r")
        return centers, read_array_of_stage(folder / "labels.npy")

    @cached_property
    def scores(self) -> list[Score]:
        return read_scores(self.of_stage(EVALUATE, NO_SCORES) / RESULTS)

    @cached_property
    def differences(self) -> Differences:
        """Between the student and the other models; empty if there are none."""
        tables = read_task_summaries(self.of_stage(EVALUATE, NO_SCORES)).values()
        return Differences(one for table in tables for one in table.differences)

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns of the training's log."""
        return read_metrics(self.of_stage(DISTILL, NO_STUDENT) / "metrics.jsonl")

    @cached_property
    def references(self) -> dict[str, str]:
        """Teacher, student and baseline, as far as there are any -> what to load."""
        compare, embed = self.recipe.evaluate.compare, self.recipe.embed
        references: dict[str, str] = {}
        if TEACHER in compare:
            references[TEACHER] = compare[TEACHER]
        elif self.recipe.has_teacher and embed.existing is None:
            references[TEACHER] = teacher_reference(embed)
        references[STUDENT] = f"local-dir:{self.of_stage(DISTILL, NO_STUDENT) / 'student'}"
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
