"""The common style of all figures: Okabe-Ito colors, no titles, equal bytes for equal numbers."""

import contextlib
import csv
import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from clip_cid.run_folder import atomic_file

PAPER, INK, MUTED, GRID = "#ffffff", "#1c1c21", "#6a6a75", "#dddde3"
BLUE, VERMILLION, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
SKY, PURPLE = "#56b4e9", "#cc79a7"
WIDTH = 5.5
"""Inches; a column of the report, and still readable on a phone."""
_HANDLE, _LETTER = 0.45, 0.085  # inches that a legend's mark and a letter of it take, about
_PICTURE_DPI = 130  # of pictures inside a figure; lines have none
_FORMULA = re.compile(r"'*(?:\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|\t)")  # with quotes that were there before
_MOST_CHARACTERS = 2**31 - 1  # of a cell; the default limit of the csv module is 131,072

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the font of the page
    "svg.hashsalt": "clip-cid",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # names of sets and models are data: a $ in them is a $
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


@contextlib.contextmanager
def new_figure(height: float, *, width: float = WIDTH) -> Generator[Figure]:
    """A figure in the house look, in inches; pyplot's global state is never touched."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def save_svg(figure: Figure, path: Path) -> None:
    """Write the figure without a date or a version, so that equal numbers give equal bytes."""
    with atomic_file(path) as temporary:
        figure.savefig(
            temporary,
            format="svg",
            dpi=_PICTURE_DPI,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write the numbers behind a figure, one named column each; floats keep every digit, None is an empty cell.

    A carriage return in a text becomes a line feed: before Python 3.13 it is not quoted, and would end the
    line for a reader. A text that a spreadsheet would run as a formula gets a quote before it, which `read_csv`
    takes away again; numbers stay as they are.

    Raises:
        ValueError: The columns differ in length.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns: must be equally long, got {lengths}")
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(map(_plain_cell, columns))
        writer.writerows(map(_plain_cell, row) for row in zip(*columns.values(), strict=True))


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a table of `write_csv`, their cells as text."""
    csv.field_size_limit(_MOST_CHARACTERS)
    with open(path, encoding="utf-8", newline="") as handle:
        header, *rows = [[_original(cell) for cell in row] for row in csv.reader(handle)] or [[]]
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def _plain_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def _original(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def model_colors(models: Sequence[str]) -> dict[str, str]:
    """The same color for the same role in every figure; the first two colors differ most."""
    palette = (VERMILLION, ORANGE, PURPLE, SKY, GREEN)
    others = [model for model in models if model not in {"student", "teacher"}]
    colors = {model: palette[place % len(palette)] for place, model in enumerate(others)}
    return colors | {"student": BLUE, "teacher": MUTED}


def legend_columns(names: Sequence[str]) -> int:
    """How many entries of a legend fit beside each other in a figure; at least one."""
    return max(1, min(len(names), int(WIDTH / (_HANDLE + _LETTER * max(map(len, names))))))


def plain_ticks() -> FuncFormatter:
    """Ticks of a logarithmic axis as people write numbers: 0.1, 1, 1,000, 10M."""
    return FuncFormatter(lambda value, _: short_number(value))


def short_number(value: float) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1 else f"{value:g}"
