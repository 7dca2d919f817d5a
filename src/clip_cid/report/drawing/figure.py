"""A figure of a run as one row: drawn by the draw stage, placed on the page by the report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid.report.drawing.run_inputs import RunInputs

Numbers = dict[str, Any]
"""What a figure's draw function returns: the numbers of its caption and of the tables beside it."""


@dataclass(frozen=True)
class Figure:
    """All that a figure needs; a new one is a row here and a plot in `clip_cid.figures`."""

    name: str
    """Of its files in `draw/`: `NAME.svg` or `.png`, and `NAME.csv`."""
    draw: Callable[[RunInputs, Path], Numbers]
    """Writes the files into a folder. Raises `LeftOut` where this run has no input for it."""
    section: str = ""
    """Where on the page; empty for a sheet of pictures, which the page shows one by one."""
    description: str = ""
    """For those who cannot see it."""
    caption: str | Callable[[Numbers], str] = ""
    small_description: str = ""
    """Of a second file `NAME_small.svg`, which the page has at its head."""
    small_caption: str = ""
    of_data: bool = False
    """Shows pictures of the data, which a report without images leaves out."""

    def caption_for(self, numbers: Numbers) -> str:
        return self.caption if isinstance(self.caption, str) else self.caption(numbers)
