"""Fig. 1: all sets at a glance, each axis on its own range."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clip_cid.evaluation.scores import STUDENT, Score, ScoreRow, models_of, score_rows
from clip_cid.figures import style

MIN_SETS = 3
_LONGEST = 15  # letters of a set's name; the end is kept, because it may be what differs
_NARROWEST = 0.02  # an axis spans two points at least, or noise would look like a difference


def axis_ranges(values: Float[np.ndarray, "models sets"]) -> Float[np.ndarray, "2 sets"]:
    """Begin and end of each axis: the models' range, with a margin inside so that differences are visible."""
    low, high = values.min(axis=0), values.max(axis=0)
    span = np.maximum(high - low, _NARROWEST)
    return np.stack([low - span, high + 0.15 * span])


def common_rows(scores: Sequence[Score]) -> list[ScoreRow]:
    """The sets of one task where every model has a score."""
    models = models_of(scores)
    return [row for row in score_rows(scores) if all(model in row.by_model for model in models)]


def draw(scores: Sequence[Score], out: Path) -> dict[str, list[float]]:
    """Write `radar.svg` and `.csv` of one task's sets where every model has a score.

    The numbers at the ends of the axes are the student's.
    """
    models = models_of(scores)
    rows = common_rows(scores)
    values = np.array([[row.by_model[model].score for row in rows] for model in models])
    ranges = axis_ranges(values)
    columns = {"set": [row.set for row in rows], "axis_from": ranges[0].tolist(), "axis_to": ranges[1].tolist()}
    style.write_csv(out / "radar.csv", columns | dict(zip(models, values.tolist(), strict=True)))

    angles = np.linspace(0, 2 * np.pi, len(rows), endpoint=False)
    around = np.append(angles, angles[0])
    with style.new_figure(4.4) as figure:
        axes = figure.add_subplot(projection="polar")
        axes.set(theta_offset=np.pi / 2, theta_direction=-1, ylim=(0, 1), yticks=[0.25, 0.5, 0.75, 1.0], yticklabels=[])
        for model, curve in reversed(list(zip(models, (values - ranges[0]) / (ranges[1] - ranges[0]), strict=True))):
            color = style.model_colors(models)[model]
            axes.plot(around, np.append(curve, curve[0]), color=color, label=model, marker="o", markersize=3)

        # The names of the sets, with the student's scores, stand outside the circle.
        student = models.index(STUDENT) if STUDENT in models else 0
        axes.set_xticks(angles, [])
        for row, value, angle in zip(rows, values[student], angles, strict=True):
            across = _side(-np.sin(angle), "left", "right")
            upright = _side(-np.cos(angle), "bottom", "top")
            axes.text(angle, 1.06, f"{_cut(row.set)}\n{100 * value:.1f}", ha=across, va=upright)
        axes.spines["polar"].set_visible(False)

        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper left", handlelength=1.2)
        style.save_svg(figure, out / "radar.svg")

    return dict(zip(models, values.tolist(), strict=True))


def _side(direction: float, before: Any, behind: Any) -> Any:
    """The side of a label that touches the circle, so that the two never overlap."""
    return "center" if abs(direction) < 0.3 else behind if direction > 0 else before


def _cut(name: str) -> str:
    """A shortened name; two long ones would leave no room for the circle. The table has the whole name."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 7]}…{name[-6:]}"
