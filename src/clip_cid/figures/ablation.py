"""Variants of a recipe side by side: means over seeds with their intervals, as Markdown, CSV and a dot plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy.special import stdtrit

from clip_cid import units
from clip_cid.figures import style
from clip_cid.run_folder import atomic_file

_LEVEL = 0.95
_ROW = 0.27  # inches of a variant in the figure


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval by Student's t; one seed has no interval."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        count = len(values)
        mean = float(np.mean(values))
        if count < 2:
            return cls(mean, None, count)
        error = float(np.std(values, ddof=1)) / count**0.5
        return cls(mean, float(stdtrit(count - 1, (1 + _LEVEL) / 2)) * error, count)


@dataclass(frozen=True)
class Line:
    """A variant: what its finished runs scored."""

    label: str
    pairs: tuple[int, ...]
    """Training pairs; they differ between seeds only where the balance does."""
    scores: Mapping[int, Mapping[str, float]]
    """Seed -> metric -> share of 1."""
    collapsed: int = 0
    """Runs in which the alarm of the cluster head's collapse was raised."""

    def score(self, metric: str) -> Estimate | None:
        values = [scores[metric] for scores in self.scores.values()]
        return Estimate.of(values) if values else None

    def ahead_of(self, other: "Line", metric: str) -> Estimate | None:
        """The difference to another variant, seed by seed, over the seeds that both have."""
        both = sorted(self.scores.keys() & other.scores.keys())
        values = [self.scores[seed][metric] - other.scores[seed][metric] for seed in both]
        return Estimate.of(values) if values else None


@dataclass(frozen=True)
class AblationTable:
    """All variants of an ablation, in order; differences are to the line named `reference`."""

    title: str
    reference: str
    metrics: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def reference_line(self) -> Line:
        return next(line for line in self.lines if line.label == self.reference)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Columns and lines to print: scores in percent, differences in points."""
        columns = ["variant", "seeds", "pairs"]
        for metric in self.metrics:
            columns += [f"{metric}, %", f"minus {self.reference}"]
        return columns, [self._cells_of(line) for line in self.lines]

    def _cells_of(self, line: Line) -> list[str]:
        cells = [line.label, str(len(line.scores)), _range(line.pairs)]
        for metric in self.metrics:
            ahead = None if line.label == self.reference else line.ahead_of(self.reference_line, metric)
            cells += [_words(line.score(metric)), _words(ahead, signed=True)]
        return cells


def write(table: AblationTable, out: Path) -> None:
    """Write `ablation.md`, `.csv` and `.svg`."""
    with atomic_file(out / "ablation.md") as temporary:
        temporary.write_text(_markdown(table), encoding="utf-8")
    _write_csv(table, out / "ablation.csv")
    _draw(table, out / "ablation.svg")


def notes(table: AblationTable) -> list[str]:
    """Notes under the table: what its intervals mean."""
    counts = {len(line.scores) for line in table.lines}
    lines: list[str] = []
    if counts & {0, 1}:
        lines.append("A variant with one seed has no interval: its difference may be chance.")
    if max(counts) > 1:
        lines.append(
            "± is half the 95 % interval of the mean over the seeds (Student's t). For a difference it is that of"
            " the mean difference between runs of the same seed. It covers what the seed changes; the images of"
            " the evaluation sets are the same for all."
        )
    collapsed = [
        f"{line.label} ({line.collapsed} of {len(line.scores)} runs)" for line in table.lines if line.collapsed
    ]
    return lines + ([f"The collapse alarm was raised in {', '.join(collapsed)}."] if collapsed else [])


def _markdown(table: AblationTable) -> str:
    columns, lines = table.cells()
    rows = [columns, ["---"] + ["---:"] * (len(columns) - 1), *lines]
    grid = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n\n".join([f"# {table.title}", "\n".join(grid), *notes(table)]) + "\n"


def _words(estimate: Estimate | None, *, signed: bool = False) -> str:
    """A share in percent, or a difference in points, with half of its interval if it is known."""
    if estimate is None:
        return "-"
    mean = units.signed_points(estimate.mean) if signed else f"{100 * estimate.mean:.1f}"
    return mean if estimate.half is None else f"{mean} ± {100 * estimate.half:.1f}"


def _range(counts: Sequence[int]) -> str:
    few, many = min(counts, default=0), max(counts, default=0)
    return "-" if not counts else f"{few:,}" if few == many else f"{few:,} to {many:,}"


def _write_csv(table: AblationTable, path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "variant": [line.label for line in table.lines],
        "seeds": [len(line.scores) for line in table.lines],
        "pairs": [float(np.mean(line.pairs)) if line.pairs else None for line in table.lines],
    }
    for metric in table.metrics:
        scores = [line.score(metric) for line in table.lines]
        ahead = [line.ahead_of(table.reference_line, metric) for line in table.lines]
        for name, intervals in ((metric, scores), (f"{metric} minus {table.reference}", ahead)):
            columns[name] = [one.mean if one else None for one in intervals]
            columns[f"{name}, half interval"] = [one.half if one else None for one in intervals]
    style.write_csv(path, columns)


def _draw(table: AblationTable, path: Path) -> None:
    """A panel for each metric: every run as a small dot, the mean with its interval, the reference's mean as a line."""
    count = len(table.metrics)
    with style.new_figure(1.0 + _ROW * len(table.lines), width=1.6 + 1.9 * count) as figure:
        panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
        for axes, metric in zip(panels, table.metrics, strict=True):
            _panel(axes, table, metric)
        panels[0].set_yticks(range(len(table.lines)), [line.label for line in table.lines], color=style.INK)
        panels[0].set_ylim(len(table.lines) - 0.5, -0.5)
        style.save_svg(figure, path)


def _panel(axes: Axes, table: AblationTable, metric: str) -> None:
    if (level := table.reference_line.score(metric)) is not None:
        axes.axvline(100 * level.mean, color=style.VERMILLION, linewidth=0.9, linestyle=":")
    for place, line in enumerate(table.lines):
        if (estimate := line.score(metric)) is None:
            continue
        color = style.VERMILLION if line.label == table.reference else style.BLUE
        runs = [100 * scores[metric] for scores in line.scores.values()]
        axes.plot(runs, [place + 0.22] * len(runs), linestyle="", marker=".", markersize=3.5, color=style.MUTED)
        half = None if estimate.half is None else 100 * estimate.half
        axes.errorbar(100 * estimate.mean, place, xerr=half, fmt="o", markersize=4.5, color=color, elinewidth=1.2)
    # Beside each other, the names of the paper's metrics would run into one another.
    axes.set_xlabel(f"{metric}, %".replace(", mean", ",\nmean").replace(" (", "\n("))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
