"""The common style of all figures: Okabe-Ito colors, no titles, equal bytes for equal numbers."""

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from clip_cid.csv_tables import read_csv as read_csv
from clip_cid.csv_tables import write_csv as write_csv
from clip_cid.run_folder import atomic_file

PAPER, INK, MUTED, GRID = "#ffffff", "#1c1c21", "#6a6a75", "#dddde3"
BLUE, VERMILLION, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
SKY, PURPLE = "#56b4e9", "#cc79a7"
WIDTH = 5.5
"""Inches; a column of the report, and still readable on a phone."""
_HANDLE, _LETTER = 0.45, 0.085  # inches that a legend's mark and a letter of it take, about
_PICTURE_DPI = 130  # of pictures inside a figure; lines have none

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
