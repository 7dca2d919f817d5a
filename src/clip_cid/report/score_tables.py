"""The scores as the page's tables show them: sets down, models across, with what is missing and what may be averaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_cid.figures.differences import MEAN, TASKS, Difference, Differences, read_table
from clip_cid.figures.scores import Score, ScoreRow, score_rows


@dataclass(frozen=True)
class GroupMean:
    """A mean over sets that may be averaged; `title` says over how many of how many: mean of 11/14."""

    title: str
    by_model: Mapping[str, float]


@dataclass(frozen=True)
class ScoreTable:
    """All of one task."""

    task: str
    name: str
    rows: Sequence[ScoreRow]
    means: Sequence[GroupMean]
    missing: Mapping[str, str]
    """Set without a result -> why."""
    differences: Differences

    def gap(self, row: ScoreRow, other: str) -> Difference | None:
        """Student minus `other` on the row's set, with its interval."""
        return self.differences.of(self.task, row.set, row.metric, other)

    def mean_gap(self, mean: GroupMean, other: str) -> Difference | None:
        return self.differences.of(self.task, mean.title, MEAN, other)

    @property
    def variants(self) -> dict[str, str]:
        """Set -> how it differs from the one CLIP was measured on, where it does."""
        found = {row.set: next(iter(row.by_model.values())).variant for row in self.rows}
        return {name: words for name, words in found.items() if words}

    @property
    def shifted(self) -> list[ScoreRow]:
        """The rows of shifted ImageNets that were also measured on ImageNet's own images of the same classes."""
        return [row for row in self.rows if any(s.imagenet_same_classes is not None for s in row.by_model.values())]


def score_tables(evaluate: Path, scores: Sequence[Score], differences: Differences) -> list[ScoreTable]:
    """The tables of an `evaluate/` folder, in the order of the tasks; `scores` and `differences` are read from it."""
    rows = score_rows(scores)
    tables: list[ScoreTable] = []
    for task, name in TASKS.items():
        table = read_table(evaluate, task)
        if table is None:
            continue
        means = [GroupMean(group["title"], group["mean"]) for group in table.get("groups", ()) if group["mean"]]
        own = [row for row in rows if row.task == task]
        tables.append(ScoreTable(task, name, own, means, table["missing"], differences))
    return tables
