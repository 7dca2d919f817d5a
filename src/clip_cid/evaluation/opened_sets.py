"""The sets that a recipe evaluates on, opened and checked before the first model runs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from clip_cid import log
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.data.sets.evaluation_sets import EvaluationSet, MissingSetError, open_set
from clip_cid.data.sets.known_sets import IMAGENET
from clip_cid.data.sets.readers import tars
from clip_cid.errors import DataError
from clip_cid.evaluation.measurements import Measurement, PairSet, measurements_of, retrieval_measurement
from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.tables import is_shifted
from clip_cid.recipe import PairsConfig, Recipe


class Split(NamedTuple):
    """Images whose features are computed together: those of a split, or of a set of pairs."""

    set: str
    split: str | None


@dataclass(frozen=True)
class OpenedSets:
    """The sets that every model is measured on, and those that are not measured."""

    labelled: list[EvaluationSet]
    retrieval: list[PairSet]
    missing: dict[str, str]
    """Set -> why it is left out of everything."""
    failed: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    """Set and protocol -> why it turned out not to be measurable."""

    def reasons(self, task: str) -> dict[str, str]:
        """Set -> why this protocol has no score of it."""
        failed = {name: reason for (name, of_task), reason in self.failed.items() if of_task == task}
        return {**self.missing, **failed}

    def not_measured(self) -> dict[str, str]:
        """Set -> why it has no score, or which ones it lacks and why."""
        lacks: dict[tuple[str, str], list[str]] = {}
        for (name, task), reason in self.failed.items():
            lacks.setdefault((name, reason), []).append(PROTOCOLS[task].short)
        reasons: dict[str, list[str]] = {}
        for (name, reason), protocols in lacks.items():
            reasons.setdefault(name, []).append(f"no {', no '.join(protocols)}: {reason}")
        return {**self.missing, **{name: " ".join(parts) for name, parts in reasons.items()}}

    def splits(self, names: Collection[str]) -> list[Split]:
        """The splits of these sets."""
        of_labelled = [Split(labelled.name, split) for labelled in self.labelled for split in labelled.splits]
        of_pairs = [Split(pairs.name_of_set, None) for pairs in self.retrieval]
        return [split for split in (*of_labelled, *of_pairs) if split.set in names]

    def measurements(self, recipe: Recipe) -> list[Measurement]:
        settings = recipe.evaluate
        imagenet = next((labelled for labelled in self.labelled if labelled.known_key == IMAGENET), None)
        measurements: list[Measurement] = []
        for labelled in self.labelled:
            measurements += measurements_of(labelled, settings, recipe.machine, imagenet=imagenet)
        return measurements + [retrieval_measurement(pairs, seed=settings.seed) for pairs in self.retrieval]


def open_sets_of(recipe: Recipe, digest_of: Callable[[Path], str]) -> OpenedSets:
    """Index and check all sets before the first model runs; missing ones are left out and named."""
    settings = recipe.evaluate
    sets = OpenedSets([], [], {})
    trained = settings.linear_probe or settings.knn
    splits = ("train", "val", "test") if trained else ("test",)

    for name, where in settings.sets.items():
        try:
            labelled = open_set(
                name,
                where,
                max_pixels=recipe.pairs.max_pixels,
                splits=splits,
                cache_dir=recipe.machine.cache_dir,
                digest_of=digest_of,
            )
        except MissingSetError as error:
            _leave_out(sets, name, error)
            continue
        if trained and "train" not in labelled.splits and not is_shifted(name):
            log.warn(f"{name}: no train split at {where}, so no linear probe and no neighbors on it")
        sets.labelled.append(labelled)

    for name, source in settings.retrieval.items():
        try:
            sets.retrieval.append(
                _open_pairs(name, recipe.pairs.model_copy(update={"source": source, "captions": "required"}), recipe)
            )
        except _MissingPairsError as error:
            _leave_out(sets, name, error)

    if not sets.labelled and not sets.retrieval:
        raise DataError(
            f"evaluate: none of {len(sets.missing)} sets exists"
            f" ({'; '.join(sets.missing.values()) or 'none is named'}).",
            fix="Name sets that exist in evaluate.sets or evaluate.retrieval; builtin:digits always does.",
        )
    return sets


class _MissingPairsError(DataError):
    """The pairs of a retrieval set do not exist."""


def _leave_out(sets: OpenedSets, name: str, error: DataError) -> None:
    sets.missing[name] = f"{error.problem} {error.fix}"
    log.warn(f"{error.problem} Left out. {error.fix}")


def _open_pairs(name: str, settings: PairsConfig, recipe: Recipe) -> PairSet:
    try:
        find_sources(settings)
    except DataError as error:
        raise _MissingPairsError(f"evaluate.retrieval.{name}: {error.problem}", fix=error.fix) from error
    for folder in map(Path, settings.source):
        if (folder / "test" / tars.SHARDS).is_file():
            raise DataError(
                f"evaluate.retrieval.{name}: {folder} is a folder of CLIP_benchmark's, and pairs are read from its tars.",
                fix=f"Name them: {folder}/test/*.tar",
            )
    pairs = open_pairs(settings, cache_dir=recipe.machine.cache_dir)
    return PairSet(f"{name}/pairs", pairs, settings.max_pixels)
