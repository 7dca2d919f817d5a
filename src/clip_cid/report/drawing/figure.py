"""A figure of a run as one row: drawn by the draw stage, placed on the page by the report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]
"""The result of a figure's draw function: the numbers of its caption and of the tables beside it."""


@dataclass(frozen=True)
class Figure:
    """All that a figure needs; a new one is a row here and a plot in `clip_cid.figures`."""

    name: str
    """Name of its files in `draw/`: `NAME.svg` or `.png`, and `NAME.csv`."""
    draw: Callable[[Any, Path], Numbers]
    """Writes the files into a folder, from `RunInputs`, or from `StoredInputs` where it needs no model. Raises `LeftOut`
    where this run has no input for it."""
    section: str = ""
    """Where on the page; empty for a sheet of pictures, which the page shows one by one."""
    description: str = ""
    """For those who cannot see it."""
    caption: str | Callable[[Numbers], str] = ""
    small_description: str = ""
    """Alternative text of a second file `NAME_small.svg`, which is at the top of the page."""
    small_caption: str = ""
    of_data: bool = False
    """Shows pictures of the data, which a report without images leaves out."""

    def caption_for(self, numbers: Numbers) -> str:
        return self.caption if isinstance(self.caption, str) else self.caption(numbers)
