"""The settings of `distill.validation`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from clip_cid.recipe.section import Config
from clip_cid.recipe.values import Place, SetName


class ValidationConfig(Config):
    """What is measured while the student learns."""

    share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the pairs held out of the training. Losses and image-text retrieval are measured on
    them."""
    every: PositiveInt | None = None
    """Pairs between two measurements. When absent: an epoch."""
    sets: dict[SetName, Place] = {}
    """Name -> labelled set, as in evaluate.sets. It is classified zero-shot at each measurement."""
    metric: Literal["retrieval", "zero_shot", "loss"] = "retrieval"
    """The number that decides which student is the best: mean recall on the held-out pairs, mean
    zero-shot score, or the held-out loss."""
    keep: Literal["last", "best"] = "last"
    """Which student the run keeps."""
    patience: PositiveInt | None = None
    """Stop after this many measurements without a better student. When absent: never."""

    @property
    def measures(self) -> bool:
        return self.share > 0 or bool(self.sets)
