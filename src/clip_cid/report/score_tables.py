"""The score tables of the page: sets down, models across, the missing sets, and means of comparable sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.scores import (
    MEAN,
    Difference,
    Differences,
    GroupMean,
    Score,
    ScoreRow,
    TaskSummary,
    score_rows,
)


@dataclass(frozen=True)
class ScoreTable:
    """All of one protocol."""

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
        """Set -> how it differs from the one CLIP was measured on, if it does."""
        return {row.set: variant for row in self.rows if (variant := row.any.variant)}

    @property
    def shifted(self) -> list[ScoreRow]:
        """The rows of shifted ImageNets that were also measured on ImageNet's own images of the same classes."""
        return [row for row in self.rows if any(s.imagenet_same_classes is not None for s in row.by_model.values())]


def score_tables(
    summaries: Mapping[str, TaskSummary], scores: Sequence[Score], differences: Differences
) -> list[ScoreTable]:
    """The tables of an evaluation, in the order of the protocols."""
    rows = score_rows(scores)
    return [
        ScoreTable(
            task,
            PROTOCOLS[task].title,
            rows=[row for row in rows if row.task == task],
            means=[group for group in summary.groups if group.by_model],
            missing=summary.missing,
            differences=differences,
        )
        for task, summary in summaries.items()
    ]
