"""The settings of the evaluate stage."""

from typing import Literal

from pydantic import NonNegativeInt, model_validator

from clip_cid.recipe.section import Config
from clip_cid.recipe.values import Model, ModelName, Place, Places, SetName

STUDENT = "student"
"""The name of a run's own model among those it compares."""


class EvaluateConfig(Config):
    """Zero-shot, linear probe, neighbors and retrieval (docs/evaluation.md)."""

    sets: dict[SetName, Place] = {}
    """Name -> labelled set. It is `builtin:digits` (of scikit-learn), a folder in CLIP_benchmark's
    WebDataset layout or its URL, a folder with train/ and test/ of one folder a class, or a known
    set as it is published; see docs/evaluation_sets.md."""
    retrieval: dict[SetName, Places] = {}
    """Name -> pairs, as in pairs.source, on which image-text retrieval is measured."""
    zero_shot: bool = True
    """Zero-shot classification by the nearest prompt."""
    linear_probe: bool = True
    """Logistic regression on frozen features."""
    knn: bool = True
    """Vote of the 20 nearest training images. Scores for 10, 100 and 200 are written too."""
    features: Literal["before_projection", "after_projection"] = "before_projection"
    """The features for linear probe and neighbors. CLIP's protocol uses the output of the image tower
    before its projection."""
    student: bool = True
    """Off for a recipe without a student of its own: nothing is trained, and only the models of
    compare are measured."""
    compare: dict[ModelName, Model] = {}
    """Name -> model evaluated beside the student: `run:path`, `local-dir:path`, `hf-hub:org/name`,
    or `name/tag` of open_clip, where the tag may be a checkpoint (.pt)."""
    seed: NonNegativeInt = 0
    """Seed of hold-outs and intervals."""

    @model_validator(mode="after")
    def _has_a_model(self) -> "EvaluateConfig":
        if not self.student and not self.compare:
            raise ValueError(
                "evaluate.student: false, and evaluate.compare names no model, so there is none to evaluate"
            )
        if self.student and STUDENT in self.compare:
            raise ValueError(f"evaluate.compare: a model is named {STUDENT!r}, which is this run's own; rename it")
        return self
