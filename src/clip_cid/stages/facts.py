"""The facts of each stage: the stages it needs, the settings and files behind its result, its summary.

Nothing here imports torch, so `clip-cid status` and a finished run are quick. The work of a stage is in the
module of its name beside this one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid import extras, summaries
from clip_cid.data.embeddings.files_behind import is_of_embeddings
from clip_cid.data.outside_files import Outside, Reader
from clip_cid.models.references import files_behind_model, is_checkpoint, is_of_files, split_checkpoint
from clip_cid.recipe import LARGEST_FILE, PairsConfig, Recipe
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, DRAW, EMBED, EVALUATE, TEXTS
from clip_cid.summaries import Summary

EMBED_VIEWS = "embed.views"
"""The settings of the views among those of the training: with other views, the stages between are still as they were."""


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
    only: tuple[str, ...] = ()
    """The settings of these sections that it depends on, where these are few; all others are left out."""
    outside: Callable[[Recipe, Reader], dict[str, Outside]] = lambda recipe, reader: {}
    """The files made elsewhere that it reads, by the setting that names them."""
    in_parts: frozenset[str] = frozenset()
    """Of these, those that unfinished work knows part by part: a change does not end it."""
    resumable: bool = False
    """A killed attempt leaves work that the next one resumes."""
    costly: bool = False
    """Its results take so long that those of other settings are kept aside when new ones replace them."""
    verifies: tuple[str, ...] = ()
    """Of the stages it needs, those whose results are verified byte by byte before it works."""
    grows: bool = False
    """It builds upon its earlier results, also those of other settings."""
    extras: Callable[[Recipe], tuple[str, ...]] = lambda recipe: ()
    """The optional parts of the package that its work needs."""
    machine: tuple[str, ...] = ()
    """The settings of `machine` that concern its work; `threads` concerns that of all."""
    shows: bool = False
    """It shows what is there: alone, it leaves out the stages it needs that have not run."""
    joint: bool = False
    """Several processes of torchrun can share it."""

    @property
    def name(self) -> str:
        return self.summary.stage

    def concerns(self, setting: str) -> bool:
        """Whether a setting, such as `distill.lr`, decides its result or is of its work."""
        section, _, name = setting.partition(".")
        if section == "machine":
            return name == "threads" or name in self.machine
        return section in self.sections and (not self.only or setting in self.only)

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """The settings its result depends on, by section, as plain values; views, if there are any, beside them."""
        values = recipe.model_dump(mode="json")
        sections: dict[str, Any] = {section: values[section] for section in self.sections}
        if self.only:
            sections = {
                section: {name: value for name, value in settings.items() if f"{section}.{name}" in self.only}
                for section, settings in sections.items()
            }
        if self.name == DISTILL and recipe.embed.views:
            sections[EMBED_VIEWS] = f"{recipe.embed.views} (embed.view_crop_scale {recipe.embed.view_crop_scale:g})"
        return sections


def _outside_embed(recipe: Recipe, reader: Reader) -> dict[str, Outside]:
    existing = recipe.embed.existing
    outside = _pairs(recipe, reader, keep_fields=recipe.pairs.keep_fields)
    if existing is not None:
        outside["embed.existing"] = reader.embeddings(existing)
    return outside | _teacher(recipe, reader)


def _teacher(recipe: Recipe, reader: Reader) -> dict[str, Outside]:
    teacher, pretrained = recipe.embed.teacher, recipe.embed.pretrained or ""
    reference = f"{teacher}/{pretrained}" if is_checkpoint(pretrained) else teacher
    return {"embed.teacher": _model(reader, reference)} if is_of_files(reference) else {}


def _outside_balance(recipe: Recipe, reader: Reader) -> dict[str, Outside]:
    settings = recipe.balance  # what it grows from saves time and decides nothing
    if settings.existing is not None:
        return {"balance.existing": reader.file(settings.existing)}
    outside = {f"balance.against.{name}": reader.against(where) for name, where in settings.against.items()}
    if LARGEST_FILE in settings.keep:
        outside |= _pairs(recipe, reader)
    if settings.protected_lists:
        outside["balance.protect"] = reader.files(settings.protected_lists)
    decisions = None if settings.decisions is None else reader.decisions(settings.decisions)
    return outside if decisions is None else {**outside, "balance.decisions": decisions}


def _outside_cluster(recipe: Recipe, reader: Reader) -> dict[str, Outside]:
    existing = recipe.cluster.existing
    return {} if existing is None else {"cluster.existing": reader.file(existing)}


def _outside_texts(recipe: Recipe, reader: Reader) -> dict[str, Outside]:
    if not recipe.distill.texts:
        return {}
    return {"distill.texts": reader.files(recipe.distill.text_files), **_teacher(recipe, reader)}


def _outside_distill(recipe: Recipe, reader: Reader) -> dict[str, Outside]:
    settings, outside = recipe.distill, _pairs(recipe, reader)
    if settings.student.endswith(".json"):
        outside["distill.student"] = reader.file(Path(settings.student))
    if pretrained := settings.pretrained:
        outside["distill.pretrained"] = reader.model(pretrained, _weights_to_start_from(pretrained))
    if is_of_files(settings.text_tower):
        outside["distill.text_tower"] = _model(reader, settings.text_tower)
    if settings.validation.keep == "best":
        for name, where in settings.validation.sets.items():
            outside[f"distill.validation.sets.{name}"] = reader.set(where, trained=False)
    return outside


def _weights_to_start_from(pretrained: str) -> list[Path]:
    if Path(pretrained).is_file():
        return [Path(pretrained)]
    return files_behind_model(pretrained) or files_behind_model(f"local-dir:{pretrained}")


def _outside_evaluate(recipe: Recipe, reader: Reader) -> dict[str, Outside]:
    settings, outside = recipe.evaluate, dict[str, Outside]()
    trained = settings.linear_probe or settings.knn
    for name, where in settings.sets.items():
        outside[f"evaluate.sets.{name}"] = reader.set(where, trained=trained)
    for name, source in settings.retrieval.items():
        outside[f"evaluate.retrieval.{name}"] = reader.pairs(
            _read_for_training(recipe, source=source, captions="required")
        )
    for name, reference in settings.compare.items():
        if is_of_files(reference):
            outside[f"evaluate.compare.{name}"] = _model(reader, reference)
    return outside


def _model(reader: Reader, reference: str) -> Outside:
    architecture, _ = split_checkpoint(reference) or ("", None)
    if Path(architecture).is_file():  # one of the files, then
        architecture = ""
    return reader.model(reference, files_behind_model(reference), architecture=architecture)


def _pairs(recipe: Recipe, reader: Reader, *, keep_fields: tuple[str, ...] = ()) -> dict[str, Outside]:
    if not recipe.pairs.source:
        return {}
    return {"pairs.source": reader.pairs(_read_for_training(recipe, keep_fields=keep_fields))}


def _read_for_training(recipe: Recipe, **changes: Any) -> PairsConfig:
    """How pairs are read where only their images and captions are used."""
    return recipe.pairs.model_copy(update={"keep_fields": (), **changes})


def _extras_of_embed(recipe: Recipe) -> tuple[str, ...]:
    return () if recipe.embed.existing is not None else (extras.DISTILL,)


def _extras_of_balance(recipe: Recipe) -> tuple[str, ...]:
    settings = recipe.balance
    embeds = settings.existing is None and not all(map(is_of_embeddings, settings.against.values()))
    return (extras.DISTILL,) if embeds else ()


def _needs(*names: str) -> Callable[[Recipe], tuple[str, ...]]:
    return lambda recipe: names


STAGES = (
    Stage(
        summaries.EmbedSummary,
        needs=(),
        sections=("pairs", "embed"),
        version=2,
        outside=_outside_embed,
        in_parts=frozenset({"pairs.source"}),
        resumable=True,
        costly=True,
        extras=_extras_of_embed,
        machine=("device", "workers", "embed_batch", "ray", "cache_dir"),
    ),
    Stage(
        summaries.BalanceSummary,
        needs=(EMBED,),
        sections=("balance",),
        version=2,
        verifies=(EMBED,),
        outside=_outside_balance,
        resumable=True,
        grows=True,
        extras=_extras_of_balance,
        machine=("device", "balance_processes", "ray", "cache_dir"),
    ),
    Stage(
        summaries.ClusterSummary,
        needs=(EMBED, BALANCE),
        sections=("cluster",),
        version=3,
        verifies=(EMBED, BALANCE),
        outside=_outside_cluster,
        resumable=True,
        costly=True,
        machine=("device", "balance_processes", "ray"),
    ),
    Stage(
        summaries.TextsSummary,
        needs=(),
        sections=("embed", "distill"),
        version=1,
        only=("embed.teacher", "embed.pretrained", "embed.precision", "distill.texts"),
        outside=_outside_texts,
        resumable=True,
        costly=True,
        extras=_needs(extras.DISTILL),
        machine=("device", "embed_batch"),
    ),
    Stage(
        summaries.DistillSummary,
        needs=(EMBED, BALANCE, CLUSTER, TEXTS),
        sections=("pairs", "distill"),
        version=4,
        verifies=(EMBED, BALANCE, CLUSTER, TEXTS),
        outside=_outside_distill,
        resumable=True,
        costly=True,
        joint=True,
        extras=_needs(extras.DISTILL),
        machine=(
            "device",
            "workers",
            "micro_batch",
            "grad_checkpointing",
            "compile",
            "loss_kernels",
            "checkpoint_minutes",
            "keep_checkpoints",
            "tensorboard",
            "callbacks",
            "cache_dir",
        ),
    ),
    Stage(
        summaries.EvaluateSummary,
        needs=(DISTILL,),
        sections=("pairs", "evaluate"),
        version=2,
        verifies=(DISTILL,),
        outside=_outside_evaluate,
        resumable=True,
        extras=_needs(extras.EVALUATE),
        machine=("device", "workers", "embed_batch", "ray", "cache_dir"),
    ),
    Stage(
        summaries.DrawSummary,
        needs=(EMBED, BALANCE, CLUSTER, DISTILL, EVALUATE),
        sections=("draw",),
        verifies=(BALANCE, CLUSTER, DISTILL, EVALUATE),
        version=5,
        shows=True,
        extras=_needs(extras.DISTILL, extras.REPORT),
        machine=("device", "distance_block", "cache_dir"),
    ),
    Stage(
        summaries.ReportSummary,
        needs=(EMBED, BALANCE, CLUSTER, DISTILL, EVALUATE, DRAW),
        sections=("pairs", "report"),
        verifies=(BALANCE, CLUSTER, DISTILL, EVALUATE, DRAW),
        version=4,
        shows=True,
        extras=_needs(extras.DISTILL, extras.REPORT),
        machine=("cache_dir",),
    ),
)
"""In the order in which they run."""

BY_NAME = {stage.name: stage for stage in STAGES}
