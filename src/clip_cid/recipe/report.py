"""The settings of the report stage."""

from typing import Annotated

from pydantic import Field

from clip_cid.recipe.section import Config


class ReportConfig(Config):
    """One self-contained HTML page."""

    title: str = "clip-cid report"
    """Headline of the page."""
    images: bool = True
    """Off leaves out pictures, captions and keys of the data: numbers only, for sharing."""
    blur: bool = False
    """Blur every picture of the data until the pointer is on it or it is clicked, and on paper: web
    data can hold disturbing pictures."""
    thumbnail_px: Annotated[int, Field(ge=16, le=512)] = 96
    """Long side of a thumbnail, in pixels."""
