"""The settings of the draw stage."""

from typing import Annotated

from pydantic import Field, PositiveInt

from clip_cid.recipe.section import Config


class DrawConfig(Config):
    """The figures of the paper, from the files of the run."""

    gallery_sets: PositiveInt = 24
    """How many removed sets the galleries show."""
    map_images: Annotated[int, Field(ge=30)] = 1_000
    """How many kept images the map of the embeddings shows."""
    images_of: str | None = None
    """The evaluation set whose images patch PCA and activation maps show. When absent: the first
    one that is there."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of what is shown."""
