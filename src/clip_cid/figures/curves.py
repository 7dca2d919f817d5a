"""The losses of several trainings by step, one color each."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clip_cid.figures import style
from clip_cid.figures.losses import VALIDATION, display_name, loss_parts, running_mean

_PALETTE = (style.BLUE, style.VERMILLION, style.GREEN, style.ORANGE, style.PURPLE, style.SKY)
_DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")


def draw(trainings: Mapping[str, Mapping[str, Float[np.ndarray, " lines"]]], out: Path) -> None:
    """Write `curves.svg` and `curves.csv`: a panel for each loss that two trainings share.

    Args:
        trainings: Name -> the columns of its log, as `losses.draw` takes them.
        out: The folder.
    """
    parts = _shared(trainings)
    table: dict[str, list[object]] = {"training": [], "step": [], "loss": [], "value": []}

    rows = math.ceil(len(parts) / 2)
    with style.new_figure(1.75 * rows + 0.4) as figure:
        grid = figure.subplots(rows, min(2, len(parts)), squeeze=False)
        for axes in grid.flat[len(parts) :]:
            axes.set_visible(False)

        for axes, part in zip(grid.flat, parts, strict=False):
            for place, (name, metrics) in enumerate(trainings.items()):
                if part not in metrics:
                    continue
                known = ~np.isnan(metrics[part])
                steps, values = metrics["step"][known], metrics[part][known]
                smooth = running_mean(values, max(1, len(values) // 25))
                axes.plot(steps, smooth, color=_color(place), linestyle=_dash(place))
                for column, cells in zip(
                    table, ([name] * len(steps), steps.astype(int), [part] * len(steps), values), strict=True
                ):
                    table[column] += list(cells)
            axes.set_title(display_name(part), loc="left", fontsize=9, color=style.INK)
            axes.xaxis.set_major_formatter(style.plain_ticks())
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axes.set_xlabel("step")

        names = list(trainings)
        handles = [
            Line2D([], [], color=_color(place), linestyle=_dash(place), label=name) for place, name in enumerate(names)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=style.legend_columns(names))
        style.save_svg(figure, out / "curves.svg")
    style.write_csv(out / "curves.csv", table)


def _shared(trainings: Mapping[str, Mapping[str, Float[np.ndarray, " lines"]]]) -> list[str]:
    """The losses of at least two trainings, or of the only one; not the numbers behind the mean of a validation."""
    parts = [part for metrics in trainings.values() for part in loss_parts(metrics)]
    least = min(2, len(trainings))
    shown = [part for part in dict.fromkeys(parts) if parts.count(part) >= least]
    return [part for part in shown if part.removeprefix(VALIDATION).count("/") <= part.count("loss/")]


def _color(place: int) -> str:
    return _PALETTE[place % len(_PALETTE)]


def _dash(place: int) -> Literal["-", "--", ":"]:
    return _DASHES[place // len(_PALETTE) % len(_DASHES)]
