"""Scores of the student beside other models: a table of every number, and bars with their intervals."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from clip_cid import units
from clip_cid.evaluation.protocols import RETRIEVAL
from clip_cid.evaluation.scores import (
    STUDENT,
    Differences,
    Score,
    ScoreRow,
    models_of,
    reference_model,
    score_rows,
)
from clip_cid.figures import style


def write_table(scores: Sequence[Score], differences: Differences, path: Path) -> None:
    """Every number of the results as one CSV: a score or a difference and its interval in three columns."""
    rows, models = score_rows(scores), models_of(scores)
    columns: dict[str, list[object]] = {
        name: [getattr(row, name) for row in rows] for name in ("task", "set", "metric")
    }
    for fact in ("n", "classes", "chance"):
        columns[fact] = [getattr(row.any, fact) for row in rows]

    for model in models:
        cells = [row.by_model.get(model) for row in rows]
        columns |= {
            model: [cell.score if cell else None for cell in cells],
            f"{model}_low": [cell.low if cell else None for cell in cells],
            f"{model}_high": [cell.high if cell else None for cell in cells],
        }

    for other in models:
        if STUDENT in models and other != STUDENT:
            paired = [differences.of(row.task, row.set, row.metric, other) for row in rows]
            columns |= {
                f"delta_to_{other}": [row.delta(other) for row in rows],
                f"delta_to_{other}_low": [gap.low if gap else None for gap in paired],
                f"delta_to_{other}_high": [gap.high if gap else None for gap in paired],
            }

    style.write_csv(path, columns)


def draw(scores: Sequence[Score], differences: Differences, task: str, out: Path) -> dict[str, float]:
    """Write `scores_TASK.svg` and `.csv` of one task: bars with intervals, and the student's lead over the baseline."""
    rows, models = score_rows(scores), models_of(scores)
    reference = reference_model(models)
    write_table(scores, differences, out / f"scores_{task}.csv")

    places = np.arange(len(rows), dtype=np.float64)[::-1]
    names = [row.set if task != RETRIEVAL else f"{row.set}\n{row.metric.replace('_', ' ')}" for row in rows]
    lines = math.ceil(len(models) / style.legend_columns(models))
    with style.new_figure(0.7 + 0.2 * lines + len(rows) * (0.16 + 0.14 * len(models))) as figure:
        both = reference is not None
        panels = figure.subplots(1, 2 if both else 1, squeeze=False, sharey=True, width_ratios=[2.2, 1][: 1 + both])[0]

        _bars(panels[0], rows, models, places)
        panels[0].set_yticks(places, names, color=style.INK)
        panels[0].set_ylim(-0.6, len(rows) - 0.4)
        if reference is not None:
            _deltas(panels[1], rows, reference, places, differences)

        colors = style.model_colors(models)
        handles = [Patch(color=colors[model], label=model) for model in models]
        across = style.legend_columns(models)
        figure.legend(handles=handles, loc="outside upper left", ncols=across, handlelength=0.8, handleheight=0.8)
        style.save_svg(figure, out / f"scores_{task}.svg")

    return {model: mean for model in models if (mean := mean_score(rows, model)) is not None}


def mean_score(rows: Sequence[ScoreRow], model: str) -> float | None:
    """Mean over the sets, only if the model has all of them, since means over different sets mislead."""
    values = [row.by_model[model].score for row in rows if model in row.by_model]
    return math.fsum(values) / len(values) if values and len(values) == len(rows) else None


def _bars(axes: Axes, rows: Sequence[ScoreRow], models: Sequence[str], places: np.ndarray) -> None:
    height = 0.8 / len(models)
    colors = style.model_colors(models)
    for index, model in enumerate(models):
        present = [
            (row.by_model[model], place) for row, place in zip(rows, places, strict=True) if model in row.by_model
        ]
        offsets = [place + 0.4 - height * (index + 0.5) for _, place in present]
        values = [100 * score.score for score, _ in present]
        axes.barh(offsets, values, height=height * 0.86, color=colors[model])
        for (score, _), offset in zip(present, offsets, strict=True):
            if score.low is not None and score.high is not None:
                axes.plot([100 * score.low, 100 * score.high], [offset, offset], color=style.INK, linewidth=0.8)

    # Chance, as a dotted line across the bars of a row.
    for row, place in zip(rows, places, strict=True):
        chance = row.any.chance
        if chance is not None:
            axes.plot([100 * chance] * 2, [place - 0.44, place + 0.44], color=style.INK, linewidth=0.9, linestyle=":")

    axes.set_xlabel("score, %")
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _deltas(axes: Axes, rows: Sequence[ScoreRow], reference: str, places: np.ndarray, differences: Differences) -> None:
    """The lead with its paired interval, faint if it contains 0; the number is at the interval's end."""
    present = [(d, row, p) for row, p in zip(rows, places, strict=True) if (d := row.delta(reference)) is not None]
    largest = 0.0
    for delta, row, place in present:
        paired = differences.of(row.task, row.set, row.metric, reference)
        low, high = (paired.low, paired.high) if paired else (delta, delta)
        color = style.GREEN if delta > 0 else style.VERMILLION
        axes.barh(place, 100 * delta, height=0.36, color=color, alpha=1.0 if paired and paired.clear else 0.45)
        axes.plot([100 * low, 100 * high], [place, place], color=style.INK, linewidth=0.8)
        axes.annotate(
            units.signed_points(delta),
            *((100 * (max(high, 0) if delta >= 0 else min(low, 0)), place), (3 if delta >= 0 else -3, 0)),
            textcoords="offset points",
            ha="left" if delta >= 0 else "right",
            va="center",
            fontsize=8,
        )
        largest = max(largest, 100 * abs(low), 100 * abs(high))

    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_xlim(-1.7 * (largest or 1.0), 1.7 * (largest or 1.0))
    axes.set_xlabel(f"vs {reference}, points")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
