"""Learning rate, gradient and the signs of a collapse, by training step."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

from clip_cid.figures import style

SIGNS = {
    "mean_image_norm": "length of the mean image embedding",
    "own_center": "own center first, share of images",
    "text_own_center": "own center first, share of texts",
    "head_drift": "how far the centers moved, share of their length",
}
"""Columns of metrics.jsonl that are `signs_of_collapse` in docs/method.md, and their names in words."""
_RATES = {"lr": "learning rate", "grad_norm": "gradient norm"}


def draw(metrics: Mapping[str, Float[np.ndarray, " lines"]], out: Path) -> None:
    """Write `learning.svg` and `.csv`: a small panel for each of these columns that the log has."""
    shown = {name: title for name, title in (_RATES | SIGNS).items() if name in metrics}
    steps = metrics["step"]
    cells = {name: [None if math.isnan(value) else value for value in metrics[name].tolist()] for name in shown}
    style.write_csv(out / "learning.csv", {"step": [int(step) for step in steps], **cells})

    rows = math.ceil(len(shown) / 2)
    with style.new_figure(1.75 * rows) as figure:
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (name, title) in zip(grid.flat, shown.items(), strict=False):
            known = ~np.isnan(metrics[name])
            axes.plot(steps[known], metrics[name][known], color=style.BLUE, marker="." if known.sum() <= 12 else None)
            axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left", fontsize=9, color=style.INK)
            axes.xaxis.set_major_formatter(style.plain_ticks())
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        for axes in grid.flat[max(0, len(shown) - 2) : len(shown)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
        style.save_svg(figure, out / "learning.svg")
