"""The records and summaries of the finished stages of a run."""

from dataclasses import dataclass
from typing import Any

from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder, StageRecord
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, DRAW, EMBED, EVALUATE
from clip_cid.summaries import (
    AnySummary,
    BalanceSummary,
    ClusterSummary,
    DistillSummary,
    DrawSummary,
    EmbedSummary,
    EvaluateSummary,
    read_summary,
)


@dataclass(frozen=True)
class RunRecords:
    """The records of the stages that a recipe uses and that have run, and their summaries; None for the others."""

    by_stage: dict[str, StageRecord]
    missing: list[str]
    """The stages that the recipe uses and that have not run."""
    embed: EmbedSummary | None
    balance: BalanceSummary | None
    cluster: ClusterSummary | None
    distill: DistillSummary | None
    evaluate: EvaluateSummary | None
    draw: DrawSummary

    @classmethod
    def read(cls, folder: RunFolder, recipe: Recipe) -> "RunRecords":
        """The records of a run that is drawn."""
        used = [name for name in (EMBED, BALANCE, CLUSTER, DISTILL, EVALUATE, DRAW) if recipe.uses(name)]
        records = {name: record for name in used if (record := folder.record(name))}

        def summary(kind: type[AnySummary]) -> AnySummary | None:
            return read_summary(kind, records[kind.stage].summary) if kind.stage in records else None

        return cls(
            records,
            [name for name in used if name not in records],
            summary(EmbedSummary),
            summary(BalanceSummary),
            summary(ClusterSummary),
            summary(DistillSummary),
            summary(EvaluateSummary),
            read_summary(DrawSummary, records[DRAW].summary),
        )

    def settings_of(self, stage: str) -> dict[str, Any]:
        """The stage's own section of the settings that it ran with."""
        return self.by_stage[stage].settings[stage]
