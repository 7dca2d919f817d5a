"""Each loss part by step."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clip_cid.figures import style

_ORDER = ("loss", "clip", "cluster_cls", "cluster_kl", "instance")
"""The parts in the order of the paper, by the beginning of their names; others come behind them."""
_NAMES = {"loss": "total", "clip": "CLIP", "cluster_cls": "cluster classification", "cluster_kl": "cluster KL"}
_PART, VALIDATION, WEIGHT = "loss/", "val/", "weight/"


def is_loss(name: str) -> bool:
    """Whether a column of the training's log is a loss, or what a validation measured."""
    return name == "loss" or name.startswith((_PART, VALIDATION))


def running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Mean over a centered window, which is cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def loss_parts(metrics: Mapping[str, Float[np.ndarray, " lines"]]) -> list[str]:
    """The columns that are losses: the total, then the parts in the order of the paper, then those of a validation."""
    return sorted(filter(is_loss, metrics), key=_place)


def display_name(part: str) -> str:
    """A column's name in words: `loss/instance_image` is `instance image`, `val/clip` is `CLIP (validation)`."""
    if part.startswith(WEIGHT):
        return f"weight of {display_name(part.removeprefix(WEIGHT))}"
    plain = _plain(part)
    return _NAMES.get(plain, plain.replace("_", " ")) + (" (validation)" if part.startswith(VALIDATION) else "")


def draw(metrics: Mapping[str, Float[np.ndarray, " lines"]], out: Path) -> dict[str, dict[str, float]]:
    """Write `losses.svg` and `.csv`: a small panel for each part, since their units of size differ.

    What a validation measured of a part is drawn into the panel of that part, and the numbers behind one of its means
    (`val/retrieval/...`) as thin lines beside it. Weights that follow the gradients are in the table only. Returns the
    first and last value of all but the numbers behind means.
    """
    parts, weights = loss_parts(metrics), sorted(name for name in metrics if name.startswith(WEIGHT))
    steps = metrics["step"]
    cells = {
        name: [None if math.isnan(value) else value for value in metrics[name].tolist()] for name in (*parts, *weights)
    }
    style.write_csv(out / "losses.csv", {"step": [int(step) for step in steps], **cells})

    # A panel for each part, with what a validation measured of it.
    panels: dict[str, list[str]] = {}
    for part in parts:
        panels.setdefault(_plain(part).partition("/")[0], []).append(part)
    if panels.get("loss") == ["loss"] and len([part for part in parts if part.startswith(_PART)]) == 1:
        del panels["loss"]  # one part alone is the total again

    rows = math.ceil(len(panels) / 2)
    with style.new_figure(1.75 * rows if len(panels) > 1 else 3.0) as figure:
        grid = figure.subplots(rows, min(2, len(panels)), squeeze=False, sharex=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (plain, shown) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, {part: _known(steps, metrics[part]) for part in shown})
            axes.set_title(_NAMES.get(plain, plain.replace("_", " ")), loc="left", fontsize=9, color=style.INK)
        for axes in grid.flat[max(0, len(panels) - grid.shape[1]) : len(panels)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
        if any(part.startswith(VALIDATION) for part in parts):
            handles = [
                Line2D([], [], color=color, label=name)
                for color, name in ((style.BLUE, "training"), (style.VERMILLION, "validation"))
            ]
            figure.legend(handles=handles, loc="outside upper right", ncols=2)
        style.save_svg(figure, out / "losses.svg")

    told = [part for part in parts if not _is_detail(part)] + weights
    known = {name: _known(steps, metrics[name])[1] for name in told}
    return {name: {"first": float(values[0]), "last": float(values[-1])} for name, values in known.items()}


def _plain(part: str) -> str:
    """The name of the part alone: `val/loss/clip`, `val/clip` and `loss/clip` are `clip`."""
    return part.removeprefix(VALIDATION).removeprefix(_PART)


def _is_detail(part: str) -> bool:
    """One of several numbers behind a mean, such as the score on one set."""
    return "/" in _plain(part)


def _place(part: str) -> tuple[bool, int, str]:
    plain = _plain(part)
    begins = [place for place, name in enumerate(_ORDER) if plain == name or plain.startswith(f"{name}_")]
    return part.startswith(VALIDATION), begins[0] if begins else len(_ORDER), part


def _known(
    steps: Float[np.ndarray, " lines"], values: Float[np.ndarray, " lines"]
) -> tuple[Float[np.ndarray, " known"], Float[np.ndarray, " known"]]:
    measured = ~np.isnan(values)
    return steps[measured], values[measured]


def _panel(axes: Axes, curves: Mapping[str, tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]) -> None:
    for part, (steps, values) in curves.items():
        window = max(1, len(steps) // 25)
        color = style.VERMILLION if part.startswith(VALIDATION) else style.BLUE
        if _is_detail(part):
            axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
        elif window == 1:
            axes.plot(steps, values, color=color, marker="." if len(steps) <= 12 else None)
        else:
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, running_mean(values, window), color=color)
    axes.xaxis.set_major_formatter(style.plain_ticks())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
