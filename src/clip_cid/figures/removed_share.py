"""The paper's Table 4 as a curve: which share of the images each threshold removes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from clip_cid import units
from clip_cid.data.balance.forest_file import ForestArrays
from clip_cid.figures import style
from clip_cid.method.distances import from_squared, to_squared

_POINTS = 201
_METRICS = ("cosine", "squared_euclidean", "euclidean")
_NEARBY = (0.8, 0.9, 1.0, 1.1, 1.2)


def draw(forest: ForestArrays, *, threshold: float, metric: str, out: Path) -> dict[str, Any]:
    """Write `removed_share.svg` and `.csv`.

    Every link of the spanning forest up to a threshold removes one image, so the curve is exact at each of its points.
    """
    limit = float(from_squared(np.array([forest.limit]), metric)[0])
    grid = np.union1d(np.linspace(0, limit, _POINTS), threshold)
    squared = to_squared(grid, metric)
    removed = np.searchsorted(forest.squared, squared, side="right")
    share = removed / forest.rows
    scales = {name: from_squared(squared, name).tolist() for name in _METRICS}
    columns = {**scales, metric: grid.tolist(), "removed": removed.tolist(), "removed_share": share.tolist()}
    style.write_csv(out / "removed_share.csv", columns)

    chosen = float(share[np.searchsorted(grid, threshold)])

    with style.new_figure(3.6) as figure:
        axes = figure.add_subplot()
        axes.plot(grid, 100 * share, color=style.BLUE)
        axes.axvline(threshold, color=style.VERMILLION, linewidth=1.2)
        axes.plot([threshold], [100 * chosen], "o", color=style.VERMILLION, markersize=5)

        on_the_left = threshold > grid[-1] / 2
        axes.annotate(
            f"{threshold:g}: {units.percent(chosen)}",
            *((threshold, 1.0), (-4 if on_the_left else 4, -3)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            va="top",
            color=style.VERMILLION,
        )

        axes.set(xlabel=f"threshold, {_name(metric)}", ylabel="removed images, %", xlim=(0, grid[-1]))
        axes.set_ylim(0, 115 * max(float(share[-1]), 0.01))  # room for the words above the curve
        axes.grid(axis="x", visible=False)
        for place, other in enumerate(name for name in _METRICS if name != metric):
            _add_scale(axes, metric, other, 1 + 0.2 * place)
        style.save_svg(figure, out / "removed_share.svg")

    nearby = [factor * threshold for factor in _NEARBY if factor * threshold <= limit or factor == 1]
    shares = np.searchsorted(forest.squared, to_squared(np.array(nearby), metric), side="right") / forest.rows
    return {
        "limit": limit,
        "threshold": threshold,
        "share": chosen,
        "nearby": [{"threshold": at, "share": float(one)} for at, one in zip(nearby, shares, strict=True)],
    }


def _add_scale(axes: Axes, metric: str, other: str, height: float) -> None:
    """The same distances on another scale, above the graph."""

    def converted(distance: ArrayLike, name_from: str, name_to: str) -> np.ndarray:
        # Matplotlib asks for places left of 0 too, where there is no distance.
        return from_squared(to_squared(np.maximum(np.asarray(distance, dtype=np.float64), 0), name_from), name_to)

    there = partial(converted, name_from=metric, name_to=other)
    back = partial(converted, name_from=other, name_to=metric)
    scale = axes.secondary_xaxis(height, functions=(there, back))
    scale.set_xlabel(_name(other))
    scale.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    scale.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.tick_params(top=True, labeltop=True)


def _name(metric: str) -> str:
    return f"{metric.replace('_', ' ')} distance"
