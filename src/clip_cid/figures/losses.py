"""Each loss part by step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from clip_cid.errors import DataError
from clip_cid.figures import style

NAMES = {
    "loss": "total",
    "loss/clip": "CLIP",
    "loss/cluster_cls": "cluster classification",
    "loss/cluster_kl": "cluster distribution (KL)",
    "loss/instance": "instance",
}


def read_metrics(path: Path) -> dict[str, Float[np.ndarray, " lines"]]:
    """The columns of a metrics.jsonl: `step`, `loss`, its parts, `lr`, ...; a value a line lacks is NaN.

    Raises:
        DataError: A line is not a JSON object, a loss is not finite, parts come or go, or the steps do not rise.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            losses = {name: line[name] for name in line if name.startswith("loss")}
            if not all(map(math.isfinite, losses.values())) or (lines and line["step"] <= lines[-1]["step"]):
                raise ValueError(f"step {line['step']}, {losses}")
            if lines and losses.keys() != {name for name in lines[0] if name.startswith("loss")}:
                raise ValueError(f"its parts are {', '.join(losses)}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: not the losses of a later step ({error}).",
                fix=f"Run `clip-cid distill {path.parent.parent} --force` to make the stage again.",
            ) from error
        lines.append(line)
    names = sorted({name for line in lines for name, value in line.items() if isinstance(value, int | float)})
    return {name: np.array([line.get(name, math.nan) for line in lines], dtype=np.float64) for name in names}


def running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Mean over a centered window, which is cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def loss_parts(metrics: Mapping[str, Float[np.ndarray, " lines"]]) -> list[str]:
    """The columns that are losses: the total, then the parts in the order of the paper."""
    found = [name for name in metrics if name == "loss" or name.startswith("loss/")]
    order = list(NAMES)
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def draw(metrics: Mapping[str, Float[np.ndarray, " lines"]], out: Path) -> dict[str, dict[str, float]]:
    """Write `losses.svg` and `.csv`: a small panel for each part, since their units of size differ."""
    parts = loss_parts(metrics)
    steps = metrics["step"]
    columns = {"step": [int(step) for step in steps]} | {name: metrics[name].tolist() for name in parts}
    style.write_csv(out / "losses.csv", columns)
    shown = [part for part in parts if part != "loss" or len(parts) != 2]  # one part alone is the total again
    window = max(1, len(steps) // 25)
    rows = math.ceil(len(shown) / 2)
    with style.new_figure(1.75 * rows if len(shown) > 1 else 3.0) as figure:
        grid = figure.subplots(rows, min(2, len(shown)), squeeze=False, sharex=True)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, part in zip(grid.flat, shown, strict=False):
            _panel(axes, steps, metrics[part], window)
            axes.set_title(NAMES.get(part, part.removeprefix("loss/")), loc="left", fontsize=9, color=style.INK)
        for axes in grid.flat[max(0, len(shown) - grid.shape[1]) : len(shown)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
        style.save_svg(figure, out / "losses.svg")
    return {part: {"first": float(metrics[part][0]), "last": float(metrics[part][-1])} for part in parts}


def _panel(axes: Axes, steps: Float[np.ndarray, " lines"], values: Float[np.ndarray, " lines"], window: int) -> None:
    if window == 1:
        axes.plot(steps, values, color=style.BLUE, marker="." if len(steps) <= 12 else None)
    else:
        axes.plot(steps, values, color=style.BLUE, alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_mean(values, window), color=style.BLUE)
    axes.xaxis.set_major_formatter(style.plain_ticks())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
