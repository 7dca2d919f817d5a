"""How fast the training went and how much of the time it waited for data."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

from clip_cid.figures import style

COLUMNS = ("pairs_per_s", "data_wait_share", "skipped_steps")
"""Columns of metrics.jsonl; `skipped_steps` counts from the beginning of the training."""


def draw(metrics: Mapping[str, Float[np.ndarray, " lines"]], out: Path) -> dict[str, float]:
    """Write `throughput.svg` and `.csv`: pairs a second and share of waiting, between two lines of the log.

    Args:
        metrics: The columns of the training's log; needs `step` and `COLUMNS`, NaN in the lines of a validation.
        out: Folder of the figure.

    Returns:
        Median, slowest and fastest pairs a second, the median and largest share of waiting, and the steps skipped.
    """
    trained = ~np.isnan(metrics["pairs_per_s"])
    steps = metrics["step"][trained]
    speed, waiting, skipped = (metrics[name][trained] for name in COLUMNS)

    cells = {name: metrics[name][trained].tolist() for name in COLUMNS}
    style.write_csv(out / "throughput.csv", {"step": steps.astype(int).tolist(), **cells})

    with style.new_figure(1.75) as figure:
        for axes, values, title in zip(
            figure.subplots(1, 2), (speed, 100 * waiting), ("pairs a second", "waiting for data, %"), strict=True
        ):
            axes.plot(steps, values, color=style.BLUE)
            axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left", fontsize=9, color=style.INK)
            axes.set_xlabel("step")
            axes.xaxis.set_major_formatter(style.plain_ticks())
            axes.yaxis.set_major_formatter(style.plain_ticks())
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        style.save_svg(figure, out / "throughput.svg")

    return {
        "median_pairs_per_s": float(np.median(speed)),
        "slowest_pairs_per_s": float(speed.min()),
        "fastest_pairs_per_s": float(speed.max()),
        "median_wait_share": float(np.median(waiting)),
        "largest_wait_share": float(waiting.max()),
        "skipped_steps": int(skipped[-1]),
    }
