"""Pictures in rows and columns: the images, and below them a picture of each from every model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from clip_cid.figures import style

Picture = UInt8[np.ndarray, "height width 3"]

_LABELS, _GAP, _HEADING, _NOTE = 0.72, 0.06, 0.24, 0.17  # inches
_LETTER = 0.073  # inches that a letter takes, about
_BLOCKS = 40  # pixels: a smaller picture is a map of patches, whose edges should stay visible


@dataclass(frozen=True)
class Band:
    """Rows of pictures that belong together, as label -> pictures, with words above them."""

    rows: Mapping[str, Sequence[Picture]]
    heading: str = ""
    column_headings: Sequence[str] = ()
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Label of a row -> words under each of its pictures."""

    def height(self, side: float) -> float:
        """In inches, for pictures this wide."""
        return _HEADING + sum(side + _GAP + (_NOTE if label in self.notes else 0) for label in self.rows)


def draw(bands: Sequence[Band], path: Path) -> None:
    """Write an SVG of the bands below each other; every picture gets the same square."""
    across = max(len(pictures) for band in bands for pictures in band.rows.values())
    side = (style.WIDTH - _LABELS) / across - _GAP
    height = sum(band.height(side) for band in bands)
    with style.new_figure(height) as figure:
        figure.set_layout_engine("none")  # everything has its place in inches
        top = height
        for band in bands:
            _band(figure, band, top, side)
            top -= band.height(side)
        style.save_svg(figure, path)


def _band(figure: Figure, band: Band, top: float, side: float) -> None:
    """One band from `top` (inches above the figure's lower edge) downwards."""
    line = top - _HEADING + 0.07
    _words(figure, _LABELS, line, band.heading, fontweight="bold")
    for column, words in enumerate(band.column_headings):
        _words(figure, _LABELS + column * (side + _GAP), line, _cut(words, side), fontsize=8)
    top -= _HEADING
    for label, pictures in band.rows.items():
        _words(figure, 0, top - side / 2, _cut(label, _LABELS), va="center", fontsize=8.5)
        notes = band.notes.get(label, [""] * len(pictures))
        for column, (picture, note) in enumerate(zip(pictures, notes, strict=True)):
            left = _LABELS + column * (side + _GAP)
            _picture(figure, left, top - side, side, picture)
            _words(figure, left, top - side - 0.13, note, fontsize=7.5, color=style.MUTED)
        top -= side + _GAP + (_NOTE if label in band.notes else 0)


def _picture(figure: Figure, left: float, bottom: float, side: float, picture: Picture) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    axes.imshow(picture, interpolation="nearest" if len(picture) < _BLOCKS else "antialiased")
    axes.set_axis_off()


def _words(figure: Figure, left: float, bottom: float, words: str, **look: Any) -> None:
    if words:
        width, height = figure.get_size_inches()
        figure.text(left / width, bottom / height, words, **look)


def _cut(words: str, inches: float) -> str:
    letters = int(inches / _LETTER)
    return words if len(words) <= letters else words[: letters - 1] + "…"
