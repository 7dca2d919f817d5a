"""Fig. 2d: sizes of the clusters before and after balance."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.ticker import LogLocator, NullLocator

from clip_cid import units
from clip_cid.figures import style
from clip_cid.method.cluster.cluster_quality import gini

_SMALL_WIDTH = 3.4  # inches; a third of the report's page
_HUNDRED = 100  # of fewer clusters no one is 1 %
_MAX_POINTS = 400  # a million ranks look the same on paper as these, and weigh 25 MB more


def top_share(sizes: Int[np.ndarray, " clusters"]) -> float:
    """The part of all images that is in the largest 1 % of the clusters (at least one cluster)."""
    count = max(1, round(len(sizes) * 0.01))
    return float(np.sort(sizes)[::-1][:count].sum() / sizes.sum())


def describe(sizes: Int[np.ndarray, " clusters"]) -> dict[str, float]:
    """The summary of a size distribution."""
    return {
        "images": int(sizes.sum()),
        "gini": gini(sizes),
        "top_1_percent_share": top_share(sizes),
        "largest": int(sizes.max()),
        "median": float(np.median(sizes)),
        "empty": int((sizes == 0).sum()),
    }


def ranks_to_draw(clusters: int) -> Int[np.ndarray, " points"]:
    """Ranks from 1 to `clusters`: all of them, or some 400 evenly spaced on the logarithmic axis."""
    if clusters <= _MAX_POINTS:
        return np.arange(1, clusters + 1)
    return np.unique(np.geomspace(1, clusters, _MAX_POINTS).round().astype(np.int64))


def draw(sizes: Mapping[str, Int[np.ndarray, " clusters"]], out: Path) -> dict[str, dict[str, float]]:
    """Write `cluster_sizes.svg`, a small one, and `.csv`: size by rank, for each named set of images."""
    ranks = ranks_to_draw(len(next(iter(sizes.values()))))
    curves = {name: np.sort(values)[::-1][ranks - 1] for name, values in sizes.items()}
    style.write_csv(out / "cluster_sizes.csv", {"rank": ranks.tolist(), **{n: c.tolist() for n, c in curves.items()}})
    numbers = {name: describe(values) for name, values in sizes.items()}
    labels = {name: _label(name, numbers[name], len(values)) for name, values in sizes.items()}
    _save(out / "cluster_sizes.svg", ranks, curves, labels, width=style.WIDTH)
    _save(out / "cluster_sizes_small.svg", ranks, curves, {name: name for name in sizes}, width=_SMALL_WIDTH)
    return numbers


def _save(
    path: Path,
    ranks: Int[np.ndarray, " points"],
    curves: Mapping[str, Int[np.ndarray, " points"]],
    labels: Mapping[str, str],
    *,
    width: float,
) -> None:
    with style.new_figure(0.62 * width, width=width) as figure:
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="cluster, largest first", ylabel="images in it")
        for (name, curve), color in zip(curves.items(), (style.MUTED, style.BLUE), strict=False):
            filled = curve > 0  # an empty cluster has no place on a logarithmic axis; its count is in the numbers
            marker = "." if filled.sum() <= 40 else None
            axes.plot(ranks[filled], curve[filled], color=color, label=labels[name], marker=marker)
        for axis, most in ((axes.xaxis, ranks[-1]), (axes.yaxis, max(curve.max() for curve in curves.values()))):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 200 else (1,)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(style.plain_ticks())
        figure.legend(loc="outside upper left", ncols=1 if width == style.WIDTH else len(curves))
        style.save_svg(figure, path)


def _label(name: str, numbers: Mapping[str, float], clusters: int) -> str:
    largest = "the largest 1 %" if clusters >= _HUNDRED else "the largest"
    return f"{name}: Gini {numbers['gini']:.3f}, {units.percent(numbers['top_1_percent_share'])} in {largest}"


def count(labels: Int[np.ndarray, " images"], clusters: int) -> Int[np.ndarray, " clusters"]:
    """How many images each cluster holds, empty clusters included."""
    return np.bincount(labels, minlength=clusters)
