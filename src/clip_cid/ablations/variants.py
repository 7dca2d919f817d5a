"""The variants of an ablation: which settings of a recipe each row of the paper's table changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from clip_cid import log
from clip_cid.auto_numbers import chosen_settings
from clip_cid.data.embeddings.files_behind import STORE_FILE
from clip_cid.errors import ConfigError
from clip_cid.loss_table import LOSSES
from clip_cid.recipe import AUTO, PRESETS, Recipe, parse_recipe, settled
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, EMBED, EVALUATE

Name = Literal["threshold", "losses", "clusters", "teacher"]
Number = TypeVar("Number", int, float)

THRESHOLDS = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08)
"""Table 4; scaled to a recipe whose own threshold is not the paper's 0.07."""
LOSS_PARTS = {
    "clip": (),
    "clip + cls": ("cluster_cls",),
    "clip + kl": ("cluster_kl",),
    "clip + cluster": ("cluster_cls", "cluster_kl"),
    "clip + instance": ("instance_image", "instance_text"),
    "clip + cluster + instance": ("cluster_cls", "cluster_kl", "instance_image", "instance_text"),
}
"""Table 5: what each row adds to the contrastive loss; the rows of `cls` and `kl` alone are ours."""
_BASELINE = "clip"
READINGS = ("paper-r1", "paper-r2")
OURS = "best"
PEERS = ("open-clip", "clip-kd", "tiny-clip", "mobile-clip")
CLUSTER_COUNTS = (100_000, 500_000, 1_000_000, 5_000_000)
"""Table 6; scaled to a recipe whose own number is not the paper's million."""
_PAPER_THRESHOLD, _PAPER_CLUSTERS = 0.07, 1_000_000
TITLES: dict[Name, str] = {
    "threshold": "Ablation of balance.threshold (paper Table 4)",
    "losses": "Ablation of distill.weights (paper Table 5)",
    "clusters": "Ablation of cluster.num_centers (paper Table 6)",
    "teacher": "Ablation of embed.teacher (paper Table 7)",
}


@dataclass(frozen=True)
class Variant:
    """A row of the table: dotted names of settings and their new values."""

    label: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """The variants and their reference; `seeded` are the settings that take the number of the seed."""

    name: Name
    variants: tuple[Variant, ...]
    reference: str
    seeded: tuple[str, ...] = ("distill.seed",)


def plan(name: Name, recipe: Recipe, *, values: Sequence[str] = (), peers: bool = False) -> Ablation:
    """The variants of a recipe.

    Args:
        name: Which of the paper's tables.
        recipe: What all variants have in common; its own setting is the reference if it is one of them.
        values: Thresholds, numbers of clusters, or teachers as in evaluate.compare, instead of the paper's.
        peers: Also train with the losses of peers; for `losses` only.

    Raises:
        ConfigError: The recipe has nothing to vary, or the values do not fit.
    """
    if peers and name != "losses":
        raise ConfigError(f"--peers: {name} compares no losses.", fix="Use it with `clip-cid ablate losses`.")
    if not recipe.uses(DISTILL) or not recipe.uses(EVALUATE):
        raise ConfigError("ablate: this recipe measures no student.", fix="Name sets in evaluate.sets or retrieval.")
    if name in ("threshold", "teacher") and (auto := chosen_settings(recipe)):
        log.warn(
            f"{', '.join(auto)}: auto, which fits what each variant keeps, so more than the {name} varies; with numbers"
            " in the recipe nothing else does"
        )
    if name == "losses":
        return _losses(recipe, values, peers=peers)
    return {"threshold": _thresholds, "clusters": _clusters, "teacher": _teachers}[name](recipe, values)


def _thresholds(recipe: Recipe, values: Sequence[str]) -> Ablation:
    settings = recipe.balance
    _refuse_unused(recipe, BALANCE, settings.existing)
    if not values and settings.target_removed is not None:
        raise ConfigError(
            "balance.target_removed: it replaces the threshold, so there is no threshold to scale the paper's by.",
            fix="Name thresholds with --values.",
        )

    scale = settings.threshold / _PAPER_THRESHOLD
    chosen = _numbers(values, float) or [
        settings.threshold if value == _PAPER_THRESHOLD else float(f"{scale * value:.3g}") for value in THRESHOLDS
    ]

    furthest = max(*chosen, settings.max_threshold or 0)  # one search for pairs answers all of them
    changes = {
        f"{value:g}": {
            "balance.threshold": value,
            "balance.max_threshold": furthest,
            "balance.target_removed": None,
        }
        for value in chosen
    }

    return _ablation("threshold", changes, own=f"{settings.threshold:g}" if settings.target_removed is None else None)


def _clusters(recipe: Recipe, values: Sequence[str]) -> Ablation:
    _refuse_unused(recipe, CLUSTER, recipe.cluster.existing)
    own, chosen = recipe.cluster.num_centers, _numbers(values, int)
    if not chosen and own == AUTO:
        raise ConfigError(
            "cluster.num_centers: auto is no number to scale the paper's by.",
            fix="Write one into the recipe (`clip-cid check RUN --recipe FILE` says that of auto), or give --values.",
        )
    chosen = chosen or [max(1, round(settled(own) * count / _PAPER_CLUSTERS)) for count in CLUSTER_COUNTS]
    changes = {f"{count:,}": {"cluster.num_centers": count} for count in chosen}
    own_label = None if own == AUTO else f"{own:,}"
    return _ablation("clusters", changes, own=own_label, seeded=("distill.seed", "cluster.seed"))


def _teachers(recipe: Recipe, values: Sequence[str]) -> Ablation:
    _refuse_unused(recipe, EMBED, recipe.embed.existing)
    changes = {value: _teacher(value) for value in values}
    if len(changes) < 2:
        raise ConfigError(
            f"ablate teacher: {len(changes)} teachers to compare.",
            fix="Name two or more with --values: run:PATH, local-dir:PATH, hf-hub:ORG/NAME, NAME/TAG of open_clip, or an"
            " embedding store.",
        )
    if recipe.uses(BALANCE) and recipe.balance.target_removed is None:
        log.warn(
            "a threshold means something else in each teacher's space; balance.target_removed in the recipe removes the"
            " same share for all"
        )
    own = recipe.embed.teacher
    return _ablation("teacher", changes, own=own if ":" in own else f"{own}/{recipe.embed.pretrained}")


def _teacher(reference: str) -> dict[str, Any]:
    if (Path(reference) / STORE_FILE).is_file():  # such as joined teachers
        return {"embed.existing": reference}
    if ":" in reference:
        return {"embed.teacher": reference}
    name, _, tag = reference.partition("/")
    if not tag:
        raise ConfigError(f"--values: {reference} is an architecture without weights.", fix=f"Give {reference}/TAG.")
    return {"embed.teacher": name, "embed.pretrained": tag}


def _losses(recipe: Recipe, values: Sequence[str], *, peers: bool) -> Ablation:
    if values:
        raise ConfigError("--values: the rows of losses are fixed.", fix="Leave it out; --peers adds peers' losses.")
    _refuse_unused(recipe, CLUSTER, None)
    own = recipe.distill.weights.model_dump()
    contrastive = [loss.name for loss in LOSSES if not loss.reads_targets]
    parts = LOSS_PARTS["clip + cluster + instance"]
    if silent := [part for part in parts if own[part] == 0]:
        raise ConfigError(
            f"distill.weights.{silent[0]}: 0 in this recipe, so there is no such loss to take away.",
            fix="Give the losses of the paper weights, or use a preset such as paper-r1.",
        )
    changes: dict[str, dict[str, Any]] = {
        label: {"distill.weights": {name: own[name] if name in (*contrastive, *added) else 0.0 for name in own}}
        for label, added in LOSS_PARTS.items()
    }
    for name in (*READINGS, OURS, *(PEERS if peers else ())):
        weights, settings = PRESETS[name]
        changes[name] = {"distill.weights": weights, **{f"distill.{key}": value for key, value in settings.items()}}
    return _ablation("losses", changes, own=_BASELINE)


def _ablation(
    name: Name,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    own: str | None,
    seeded: tuple[str, ...] = ("distill.seed",),
) -> Ablation:
    variants = tuple(Variant(label, change) for label, change in changes.items())
    reference = own if own is not None and own in changes else variants[0].label
    return Ablation(name, variants, reference, seeded)


def _refuse_unused(recipe: Recipe, stage: str, existing: Path | None) -> None:
    """Refuse to vary a stage that the recipe does not compute."""
    if existing is not None:
        raise ConfigError(f"{stage}.existing: {existing} was made elsewhere, so it cannot be varied.", fix="Remove it.")
    if not recipe.uses(stage):
        raise ConfigError(
            f"ablate: this recipe does not use {stage}.",
            fix="embed.teacher, balance.enabled and distill.weights decide which stages there are.",
        )


def _numbers(values: Sequence[str], kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"--values: {error}.", fix="Give numbers, such as --values 0.05 0.07.") from error


def recipe_of(ablation: Ablation, recipe: Recipe, variant: Variant, seed: int) -> Recipe:
    """The recipe of one run: the student is the only model measured, since the others are the same for all."""
    changes = {**variant.changes, **dict.fromkeys(ablation.seeded, seed), "evaluate.compare": {}}
    values = recipe.model_dump()
    for name, value in changes.items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return parse_recipe(values, where=f"ablate {ablation.name}, {variant.label}")
