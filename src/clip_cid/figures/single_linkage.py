"""The tree in which balance joined the images of one set of duplicates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from scipy.cluster import hierarchy

from clip_cid.figures import style

MOST_IMAGES = 14
"""More pictures than this would be too small in a column of the report."""
_TREE, _WORDS = 2.4, 0.42  # inches: the tree, and the words under the pictures


@dataclass(frozen=True)
class LinkedSet:
    """The images of one connected set and the links of the spanning forest that join them, nearest first."""

    rows: Int[np.ndarray, " images"]
    kept: Bool[np.ndarray, " images"]
    """More than one if a largest radius was set."""
    distances: Float[np.ndarray, " images"]
    """To the image kept for it, on the balance's metric; 0 for the kept."""
    left: Int[np.ndarray, " links"]
    """Places in `rows`."""
    right: Int[np.ndarray, " links"]
    heights: Float[np.ndarray, " links"]
    """On the balance's metric, ascending."""


def linkage(
    left: Int[np.ndarray, " links"], right: Int[np.ndarray, " links"], heights: Float[np.ndarray, " links"]
) -> Float[np.ndarray, "links 4"]:
    """The links of a spanning tree, nearest first, as SciPy's matrix of merges.

    Raises:
        ValueError: The links are not a tree's, or not in order.
    """
    count = len(left) + 1
    if (np.diff(heights) < 0).any():
        raise ValueError("heights must ascend")
    cluster, sizes = list(range(count)), [1] * count  # of each image, and of each cluster
    merges = np.empty((len(left), 4))
    for step, (a, b, height) in enumerate(zip(left.tolist(), right.tolist(), heights.tolist(), strict=True)):
        one, other = sorted((cluster[a], cluster[b]))
        if one == other:
            raise ValueError(f"link {step} joins images {a} and {b}, which are joined already")
        sizes.append(sizes[one] + sizes[other])
        merges[step] = one, other, height, sizes[-1]
        cluster = [count + step if number in (one, other) else number for number in cluster]
    return merges


def draw(
    linked: LinkedSet,
    pictures: Mapping[int, UInt8[np.ndarray, "height width 3"]],
    *,
    threshold: float,
    metric: str,
    out: Path,
) -> dict[str, float]:
    """Write `single_linkage.svg` and `.csv`; under each leaf its distance and, if known, its picture."""
    tree = hierarchy.dendrogram(linkage(linked.left, linked.right, linked.heights), no_plot=True)
    order = tree["leaves"]
    _write_table(linked, out / "single_linkage.csv")

    side = min(0.75, (style.WIDTH - 0.7) / len(order) - 0.04)
    height = _TREE + side + _WORDS

    with style.new_figure(height) as figure:
        figure.set_layout_engine("none")
        box = (0.6 / style.WIDTH, (side + _WORDS) / height, (style.WIDTH - 0.7) / style.WIDTH, (_TREE - 0.1) / height)
        axes = figure.add_axes(box)
        _tree(axes, tree["icoord"], tree["dcoord"], threshold, metric)
        axes.set_xlim(0, 10 * len(order))

        step = (style.WIDTH - 0.7) / len(order)
        for place, leaf in enumerate(order):
            left = 0.6 + step * place + (step - side) / 2
            frame = figure.add_axes((left / style.WIDTH, (_WORDS - 0.05) / height, side / style.WIDTH, side / height))
            _leaf(frame, pictures.get(int(linked.rows[leaf])), kept=bool(linked.kept[leaf]))
            words = "kept" if linked.kept[leaf] else f"{linked.distances[leaf]:.3f}"
            color = style.GREEN if linked.kept[leaf] else style.MUTED
            small = {"fontsize": 7.5, "ha": "center", "va": "top"}
            across = (left + side / 2) / style.WIDTH
            figure.text(across, (_WORDS - 0.09) / height, words, color=color, **small)

        style.save_svg(figure, out / "single_linkage.svg")
    return {"images": len(order), "longest_link": float(linked.heights[-1]), "farthest": float(linked.distances.max())}


def _tree(
    axes: Axes, across: Sequence[Sequence[float]], upward: Sequence[Sequence[float]], threshold: float, metric: str
) -> None:
    for x, y in zip(across, upward, strict=True):
        axes.plot(x, y, color=style.BLUE, linewidth=1.3, solid_joinstyle="miter")
    axes.axhline(threshold, color=style.VERMILLION, linewidth=1.2)
    axes.annotate(
        f"threshold {threshold:g}",
        *((1.0, threshold), (0, 3)),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=style.VERMILLION,
    )
    axes.set(ylabel=f"{metric.replace('_', ' ')} distance", ylim=(0, 1.18 * threshold or 1.0), xticks=[])
    axes.grid(axis="x", visible=False)
    axes.spines["bottom"].set_visible(False)


def _leaf(axes: Axes, picture: UInt8[np.ndarray, "height width 3"] | None, *, kept: bool) -> None:
    if picture is not None:
        axes.imshow(picture, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set(
        visible=kept or picture is None, color=style.GREEN if kept else style.GRID, linewidth=2.5 * kept or 1
    )


def _write_table(linked: LinkedSet, path: Path) -> None:
    """One line a link: the two rows it joins, how far each is from the kept image, and its own length."""
    columns: dict[str, Sequence[float | int | bool]] = {}
    for name, ends in (("left", linked.left), ("right", linked.right)):
        columns[f"{name}_row"] = linked.rows[ends].tolist()
        columns[f"{name}_kept"] = linked.kept[ends].tolist()
        columns[f"{name}_distance"] = linked.distances[ends].tolist()
    style.write_csv(path, {**columns, "link": linked.heights.tolist()})
