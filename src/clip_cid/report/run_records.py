"""The records and summaries of the finished stages of a run."""

from dataclasses import dataclass

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
    """The records of the stages that a recipe uses, and their summaries; None if a stage is not used."""

    by_stage: dict[str, StageRecord]
    embed: EmbedSummary | None
    balance: BalanceSummary | None
    cluster: ClusterSummary | None
    distill: DistillSummary
    evaluate: EvaluateSummary | None
    draw: DrawSummary

    @classmethod
    def read(cls, folder: RunFolder, recipe: Recipe) -> "RunRecords":
        """The records of a run whose stages up to `draw` are finished."""
        names = (EMBED, BALANCE, CLUSTER, DISTILL, EVALUATE, DRAW)
        records = {name: record for name in names if recipe.uses(name) and (record := folder.record(name))}

        def summary(kind: type[AnySummary]) -> AnySummary | None:
            return read_summary(kind, records[kind.stage].summary) if kind.stage in records else None

        return cls(
            records,
            summary(EmbedSummary),
            summary(BalanceSummary),
            summary(ClusterSummary),
            read_summary(DistillSummary, records[DISTILL].summary),
            summary(EvaluateSummary),
            read_summary(DrawSummary, records[DRAW].summary),
        )
