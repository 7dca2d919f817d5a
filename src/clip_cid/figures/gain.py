"""The student's lead over the baseline by measure, each with its paired interval."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from clip_cid import units
from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.scores import Difference, Differences
from clip_cid.figures import style

_WIDTH = 3.4  # inches; a third of the report's page


def draw(differences: Differences, other: str, out: Path) -> dict[str, dict[str, float]]:
    """Write `gain.svg` and `.csv`: a line for the mean of each task and for R@1 of each retrieval, both ways.

    Returns:
        The difference and its interval by line, shares of 1.
    """
    headlines = differences.headlines(other)
    names = [_name(one) for one in headlines]
    numbers = ("difference", "low", "high")
    style.write_csv(
        out / "gain.csv",
        {"measure": names, "other": [other] * len(headlines)}
        | {name: [getattr(one, name) for one in headlines] for name in numbers},
    )

    places = np.arange(len(headlines))[::-1]
    with style.new_figure(0.8 + 0.33 * len(headlines), width=_WIDTH) as figure:
        axes = figure.add_subplot()
        for one, place in zip(headlines, places, strict=True):
            _line(axes, one, float(place))
        axes.axvline(0, color=style.INK, linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_yticks(places, names, color=style.INK)
        axes.set_ylim(-0.6, len(headlines) - 0.4)
        axes.set_xlabel(f"student minus {other}, points", loc="right")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        style.save_svg(figure, out / "gain.svg")

    return {name: {n: getattr(one, n) for n in numbers} for name, one in zip(names, headlines, strict=True)}


def _line(axes: Axes, one: Difference, place: float) -> None:
    """A dot with its interval: hollow if the interval holds 0."""
    color = (style.GREEN if one.difference > 0 else style.VERMILLION) if one.clear else style.MUTED
    axes.plot([100 * one.low, 100 * one.high], [place, place], color=color)
    axes.plot([100 * one.difference], [place], marker="o", color=color, mfc=color if one.clear else style.PAPER)
    axes.annotate(
        units.signed_points(one.difference),
        *((100 * one.difference, place), (0, 5)),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )


def _name(one: Difference) -> str:
    if one.of_group:
        return f"{PROTOCOLS[one.task].title}\n{one.set}"
    way = "image to text" if one.metric.startswith("image") else "text to image"
    return f"{one.set}\n{way} R@1"
