"""Numbers that follow from the number of pairs: what `auto` means, and what `clip-cid init` begins with.

`auto` depends on the data and on other settings alone, so equal data and settings give equal results on every machine. It
is settled once the number of kept pairs is known; the record of the stage holds the number.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from clip_cid.recipe import Recipe, auto_settings, settled
from clip_cid.stage_names import CLUSTER

PAPER_CENTERS = 1_000_000
PAPER_BATCH = 32_768
PAPER_EPOCHS = 32
LONGEST_WARMUP = 2_000
BATCH = 1_024
"""Pairs of a step that a GPU can hold."""
FEWEST_EPOCHS = 4
FORMER_DEFAULTS: Mapping[str, int] = MappingProxyType(
    {
        "cluster.num_centers": PAPER_CENTERS,
        "distill.epochs": PAPER_EPOCHS,
        "distill.batch_size": PAPER_BATCH,
        "distill.warmup_steps": LONGEST_WARMUP,
    }
)
"""What recipes that do not name these settings meant before there was `auto`."""

_IN_A_CLUSTER = 30
_STEPS_OF_AN_EPOCH = 16  # at least
_SEEN = 100_000_000  # pairs


@dataclasses.dataclass(frozen=True)
class Choice:
    """The value of a setting, and why it is that."""

    setting: str
    value: Any
    why: str


@dataclasses.dataclass(frozen=True)
class Settled:
    """A recipe, and the choices that were made for its `auto`."""

    recipe: Recipe
    choices: tuple[Choice, ...] = ()
    """Of the settings that have an effect."""


def settle(recipe: Recipe, kept: int) -> Settled:
    """The recipe with a number in place of each `auto`.

    Args:
        recipe: The settings.
        kept: Images that are kept, or all pairs where nothing is balanced.
    """
    choices: list[Choice] = []
    of_effect = chosen_settings(recipe)
    for choose in (_choose_centers, _choose_batch, _choose_epochs, _choose_warmup):  # each may read those before
        for choice in choose(recipe, kept):
            choices += [choice] if choice.setting in of_effect else []
            recipe = _with(recipe, choice.setting, choice.value)
    return Settled(recipe, tuple(choices))


def chosen_settings(recipe: Recipe) -> tuple[str, ...]:
    """The settings for which `auto` has an effect on results."""
    without = {
        "cluster.num_centers": recipe.cluster.existing is not None or not recipe.uses(CLUSTER),
        "distill.epochs": recipe.distill.steps is not None,
    }
    return tuple(setting for setting in auto_settings(recipe) if not without.get(setting, False))


def as_before(recipe: Recipe, stored: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with the defaults of before `auto`, where its run was made with them; and these settings.

    A recipe that does not name them meant these numbers then, and what is finished or under way stays valid.
    """
    kept: list[str] = []
    for setting in chosen_settings(recipe):
        if _get(stored, setting) == FORMER_DEFAULTS[setting]:
            recipe = _with(recipe, setting, FORMER_DEFAULTS[setting])
            kept.append(setting)
    return recipe, kept


def num_centers(kept: int) -> int:
    """Clusters for so many images."""
    return min(PAPER_CENTERS, max(2, _rounded(kept // _IN_A_CLUSTER)))


def batch_size(pairs: int, *, most: int = BATCH, ranks: int = 1) -> int:
    """A power of two for each of `ranks`, so that an epoch has a few steps if it can."""
    least = 1 if ranks > 1 else 2
    return ranks * max(least, _power_of_two(min(most, pairs // _STEPS_OF_AN_EPOCH // ranks)))


def epochs(pairs: int, *, seen: int = _SEEN) -> int:
    """The paper's, or as many as see so many pairs."""
    return min(PAPER_EPOCHS, max(FEWEST_EPOCHS, seen // max(1, pairs)))


def warmup_steps(steps: int) -> int:
    """A tenth of the steps, or what is usual for long runs."""
    return min(LONGEST_WARMUP, steps // 10)


def _choose_centers(recipe: Recipe, kept: int) -> Iterator[Choice]:
    if "cluster.num_centers" in auto_settings(recipe):
        centers = min(num_centers(kept), max(1, kept))
        yield Choice("cluster.num_centers", centers, f"{kept / centers:,.0f} of {kept:,} kept images a cluster")


def _choose_batch(recipe: Recipe, kept: int) -> Iterator[Choice]:
    if "distill.batch_size" in auto_settings(recipe):
        pairs = _of_an_epoch(recipe, kept)
        batch = batch_size(pairs)
        yield Choice(
            "distill.batch_size", batch, f"about {pairs // batch:,} steps an epoch; larger is better, and takes memory"
        )


def _choose_epochs(recipe: Recipe, kept: int) -> Iterator[Choice]:
    if "distill.epochs" in auto_settings(recipe):
        pairs = _of_an_epoch(recipe, kept)
        passes = epochs(pairs)
        why = "the paper's" if passes == PAPER_EPOCHS else "the paper has 32"
        yield Choice("distill.epochs", passes, f"about {passes * pairs:,} pairs seen; {why}")


def _choose_warmup(recipe: Recipe, kept: int) -> Iterator[Choice]:
    if "distill.warmup_steps" in auto_settings(recipe):
        settings = recipe.distill
        steps = settings.steps or settled(settings.epochs) * _of_an_epoch(recipe, kept) // settled(settings.batch_size)
        warmup = warmup_steps(steps)
        why = "usual for long runs" if warmup == LONGEST_WARMUP else "a tenth"
        yield Choice("distill.warmup_steps", warmup, f"{why}, of about {steps:,} steps")


def _of_an_epoch(recipe: Recipe, kept: int) -> int:
    """Pairs, without those held out; an epoch of few pairs a cluster may have fewer."""
    pairs, per_cluster = round(kept * (1 - recipe.distill.validation.share)), recipe.distill.per_cluster
    if per_cluster is None or recipe.cluster.existing is not None:
        return pairs
    return min(pairs, per_cluster * settled(recipe.cluster.num_centers))


def _get(recipe: Recipe, setting: str) -> Any:
    section, _, name = setting.partition(".")
    return getattr(getattr(recipe, section), name)


def _with(recipe: Recipe, setting: str, value: Any) -> Recipe:
    section, _, name = setting.partition(".")
    changed = getattr(recipe, section).model_copy(update={name: value})
    return recipe.model_copy(update={section: changed})


def _rounded(number: int) -> int:
    """Down to two digits and zeros."""
    digits = 10 ** max(0, len(str(number)) - 2)
    return number // digits * digits


def _power_of_two(most: int) -> int:
    """The largest one up to `most`; 0 for 0."""
    return 1 << (most.bit_length() - 1) if most else 0
