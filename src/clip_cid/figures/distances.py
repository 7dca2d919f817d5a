"""Distances of the removed images to the one kept for them."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

from clip_cid.figures import style

_BINS = 60


def draw(distances: Float[np.ndarray, " removed"], *, threshold: float, metric: str, out: Path) -> dict[str, float]:
    """Write `distances.svg` and `.csv`: a histogram beside the threshold.

    A bar right of the threshold is a removed image that joined its set through others; each link is within it.
    """
    limit = max(float(distances.max()), threshold) * 1.05 or 1.0  # all are equal to the kept image
    edges = _edges(threshold, limit)
    # A distance at an edge belongs to the bar on its left, since a distance at the threshold is not beyond it.
    counts = np.bincount(np.searchsorted(edges[1:], distances), minlength=len(edges) - 1)
    columns = {"from": edges[:-1].tolist(), "to": edges[1:].tolist(), "removed": counts.tolist()}
    style.write_csv(out / "distances.csv", columns)
    with style.new_figure(3.2) as figure:
        axes = figure.add_subplot()
        axes.stairs(counts, edges, color=style.BLUE, fill=True, alpha=0.85)
        axes.axvline(threshold, color=style.VERMILLION, linewidth=1.2)
        on_the_left = threshold > limit / 2
        axes.annotate(
            f"threshold {threshold:g}",
            *((threshold, 1.0), (-4 if on_the_left else 4, -3)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            va="top",
            color=style.VERMILLION,
        )
        axes.set(
            xlabel=f"{metric.replace('_', ' ')} distance to the kept image",
            ylabel="removed images",
            xlim=(0, edges[-1]),
        )
        axes.yaxis.set_major_formatter(style.plain_ticks())
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="x", visible=False)
        style.save_svg(figure, out / "distances.svg")
    return {
        "median": float(np.median(distances)),
        "largest": float(distances.max()),
        "beyond_threshold_share": float((distances > threshold).mean()),
    }


def _edges(threshold: float, limit: float) -> Float[np.ndarray, " edges"]:
    """Edges of about 60 equal bars up to `limit` or a little beyond; one edge is the threshold."""
    if threshold == 0:
        return np.linspace(0, limit, _BINS + 1)
    below = max(1, round(_BINS * threshold / limit))
    step = threshold / below
    beyond = max(0, math.ceil((limit - threshold) / step))
    return np.concatenate([np.linspace(0, threshold, below + 1), threshold + step * np.arange(1, beyond + 1)])
