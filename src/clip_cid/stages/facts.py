"""The facts of each stage: the stages it needs, the settings and files behind its result, its summary.

Nothing here imports torch, so `clip-cid status` and a finished run are quick. The work of a stage is in the
module of its name beside this one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid import summaries
from clip_cid.data.outside_files import of_pair_sets, of_pairs, of_paths, of_sets, weights_file
from clip_cid.models.references import files_behind_model, is_checkpoint
from clip_cid.recipe import Recipe
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, DRAW, EMBED, EVALUATE
from clip_cid.summaries import Summary


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline. Its name is its command, its module and its folder in a run."""

    summary: type[Summary]
    """The type of its summary, which also gives the name."""
    needs: tuple[str, ...]
    """The stages whose results it reads."""
    sections: tuple[str, ...]
    """The recipe sections its result depends on."""
    version: int
    """Raise it when the same settings and inputs would give other files."""
    outside: Callable[[Recipe], dict[str, str]] = lambda recipe: {}
    """The files made elsewhere that it reads -> a cheap digest of each."""
    resumable: bool = False
    """A killed attempt leaves work that the next one resumes."""
    grows: bool = False
    """It builds upon its earlier results, also those of other settings."""
    joint: bool = False
    """Several processes of torchrun can share it."""

    @property
    def name(self) -> str:
        return self.summary.stage

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """The settings its result depends on, as plain values."""
        values = recipe.model_dump(mode="json")
        return {section: values[section] for section in self.sections}


def _files_of_model(reference: str) -> list[Path] | list[Path | None]:
    return files_behind_model(reference) if is_checkpoint(reference) else [weights_file(reference)]


def _outside_embed(recipe: Recipe) -> dict[str, str]:
    teacher, pretrained = recipe.embed.teacher, recipe.embed.pretrained or ""
    reference = f"{teacher}/{pretrained}" if is_checkpoint(pretrained) else teacher
    return of_pairs(recipe.pairs) | of_paths(recipe.embed.existing, *_files_of_model(reference))


def _outside_balance(recipe: Recipe) -> dict[str, str]:
    return of_paths(recipe.balance.existing, recipe.balance.grow_from)


def _outside_cluster(recipe: Recipe) -> dict[str, str]:
    return of_paths(recipe.cluster.existing)


def _outside_distill(recipe: Recipe) -> dict[str, str]:
    settings, pretrained = recipe.distill, recipe.distill.pretrained or ""
    models = of_paths(Path(settings.student), weights_file(pretrained) or Path(pretrained))
    return of_pairs(recipe.pairs) | of_sets(settings.validation.sets) | models


def _outside_evaluate(recipe: Recipe) -> dict[str, str]:
    settings = recipe.evaluate
    models = of_paths(*(path for reference in settings.compare.values() for path in _files_of_model(reference)))
    return of_sets(settings.sets) | of_pair_sets(settings.retrieval, recipe.pairs) | models


STAGES = (
    Stage(
        summaries.EmbedSummary,
        needs=(),
        sections=("pairs", "embed"),
        version=2,
        outside=_outside_embed,
        resumable=True,
    ),
    Stage(
        summaries.BalanceSummary,
        needs=(EMBED,),
        sections=("balance",),
        version=2,
        outside=_outside_balance,
        resumable=True,
        grows=True,
    ),
    Stage(
        summaries.ClusterSummary,
        needs=(EMBED, BALANCE),
        sections=("cluster",),
        version=3,
        outside=_outside_cluster,
        resumable=True,
    ),
    Stage(
        summaries.DistillSummary,
        needs=(EMBED, BALANCE, CLUSTER),
        sections=("pairs", "distill"),
        version=4,
        outside=_outside_distill,
        resumable=True,
        joint=True,
    ),
    Stage(
        summaries.EvaluateSummary,
        needs=(DISTILL,),
        sections=("pairs", "evaluate"),
        version=2,
        outside=_outside_evaluate,
        resumable=True,
    ),
    Stage(
        summaries.DrawSummary,
        needs=(EMBED, BALANCE, CLUSTER, DISTILL, EVALUATE),
        sections=("draw",),
        version=5,
    ),
    Stage(
        summaries.ReportSummary,
        needs=(EMBED, BALANCE, CLUSTER, DISTILL, EVALUATE, DRAW),
        sections=("pairs", "report"),
        version=3,
    ),
)
"""In the order in which they run."""

BY_NAME = {stage.name: stage for stage in STAGES}
