"""Stage `evaluate`: zero-shot, linear probe, neighbors and retrieval of the student and of the models beside it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid import log, units
from clip_cid.data.pairs.pairs import fingerprint, open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.data.sets.evaluation_sets import EvaluationSet, MissingSetError, open_set
from clip_cid.data.sets.known_sets import IMAGENET, find_task, task_table
from clip_cid.errors import ConfigError, DataError
from clip_cid.evaluation.clip_benchmark import write_clip_benchmark
from clip_cid.evaluation.comparison import differences
from clip_cid.evaluation.features import Encoder, prune
from clip_cid.evaluation.measure import PairSet, Task, retrieval_task, tasks_of
from clip_cid.evaluation.results import Results
from clip_cid.evaluation.tables import (
    Group,
    Row,
    difference_lines,
    recall_lines,
    retrieval_table,
    same_class_lines,
    score_lines,
    score_table,
    variant_notes,
)
from clip_cid.models.device import resolve_device
from clip_cid.models.student import load_clip
from clip_cid.recipe import PairsConfig, Recipe
from clip_cid.run_folder import RunFolder, write_json

STUDENT = "student"
_WORDS = {"zero_shot": "Zero-shot", "linear_probe": "Linear probe", "knn": "Neighbors", "retrieval": "Retrieval"}


@dataclass(frozen=True)
class _Asked:
    """What is asked of every model, and what of it is not there."""

    sets: list[EvaluationSet]
    retrieval: list[PairSet]
    missing: dict[str, str]
    """Set -> why it is left out of everything."""

    def tasks(self, recipe: Recipe) -> list[Task]:
        settings = recipe.evaluate
        imagenet = next((opened for opened in self.sets if opened.task == IMAGENET), None)
        found: list[Task] = []
        for opened in self.sets:
            found += tasks_of(opened, settings, recipe.machine, imagenet=imagenet)
        return found + [retrieval_task(pairs, seed=settings.seed) for pairs in self.retrieval]


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Measure every model on every set; writes results.jsonl, a table for each task, differences and CLIP_benchmark's files.

    A task that was measured before, in a killed attempt or in the results about to be replaced, is taken over.
    """
    models = _models(folder, recipe)
    asked = _open_all(recipe)
    tasks = asked.tasks(recipe)
    _say_plan(models, asked, tasks)
    results = Results(out, folder.earlier("evaluate"))
    for name, reference in models.items():
        _measure(_encoder(name, reference, folder, recipe), tasks, results)
    results.close()
    if stale := prune(_cache(folder), frozenset(entry for row in results.rows for entry in row["cached"])):
        log.info(f"evaluate: {stale} cached features of other models or sets deleted")
    tables = _tables(results, asked, recipe)
    for name, table in tables.items():
        write_json(out / f"{name}.json", table)
    write_clip_benchmark(out / "clip_benchmark", results.rows, models)
    _print(list(models), tables, results.rows)
    for name, reason in asked.missing.items():
        log.say(f"{name} was not measured: {reason}")
    return _summary(list(models), tables, asked)


def _models(folder: RunFolder, recipe: Recipe) -> dict[str, str]:
    """Name -> reference of every model, the student first."""
    compare = recipe.evaluate.compare
    if not recipe.evaluate.student:
        return compare
    if STUDENT in compare:
        raise ConfigError(
            f"evaluate.compare: a model is named {STUDENT!r}, which is this run's own.", fix="Give it another name."
        )
    return {STUDENT: f"local-dir:{folder.stage('distill') / 'student'}", **compare}


def _open_all(recipe: Recipe) -> _Asked:
    """Index and check everything before the first model runs; sets that are not there are left out and named."""
    settings = recipe.evaluate
    asked = _Asked([], [], {})
    trained = settings.linear_probe or settings.knn
    splits = ("train", "val", "test") if trained else ("test",)
    for name, where in settings.sets.items():
        try:
            opened = open_set(
                name, where, max_pixels=recipe.pairs.max_pixels, splits=splits, cache_dir=recipe.machine.cache_dir
            )
        except MissingSetError as error:
            _leave_out(asked, name, error)
            continue
        if trained and "train" not in opened.splits and not _is_shifted(name):
            log.warn(f"{name}: no train split at {where}, so no linear probe and no neighbors on it")
        asked.sets.append(opened)
    for name, source in settings.retrieval.items():
        try:
            asked.retrieval.append(_open_pairs(name, recipe.pairs.model_copy(update={"source": source}), recipe))
        except _MissingPairsError as error:
            _leave_out(asked, name, error)
    if not asked.sets and not asked.retrieval:
        raise DataError(
            f"evaluate: none of {len(asked.missing)} sets is there ({'; '.join(asked.missing.values()) or 'none is named'}).",
            fix="Name sets that exist in evaluate.sets or evaluate.retrieval; builtin:digits always does.",
        )
    return asked


class _MissingPairsError(DataError):
    """The pairs of a retrieval set cannot be found."""


def _leave_out(asked: _Asked, name: str, error: DataError) -> None:
    asked.missing[name] = f"{error.problem} {error.fix}"
    log.warn(f"{error.problem} Left out. {error.fix}")


def _open_pairs(name: str, settings: PairsConfig, recipe: Recipe) -> PairSet:
    try:
        find_sources(settings.source)
    except DataError as error:
        raise _MissingPairsError(f"evaluate.retrieval.{name}: {error.problem}", fix=error.fix) from error
    pairs = open_pairs(settings, cache_dir=recipe.machine.cache_dir)
    digest = hashlib.sha256(json.dumps(fingerprint(settings)).encode()).hexdigest()
    return PairSet(f"{name}/pairs", digest, pairs, settings.max_pixels)


def _cache(folder: RunFolder) -> Path:
    return folder.path / "features"


def _encoder(name: str, reference: str, folder: RunFolder, recipe: Recipe) -> Encoder:
    machine = recipe.machine
    device = resolve_device(machine.device)
    clip = load_clip(reference, device=str(device))
    return Encoder(name, clip, _cache(folder), device=device, batch_size=machine.embed_batch, workers=machine.workers)


def _say_plan(models: dict[str, str], asked: _Asked, tasks: Sequence[Task]) -> None:
    images = sum(len(split) for opened in asked.sets for split in opened.splits.values())
    images += sum(len(pairs) for pairs in asked.retrieval)
    log.info(
        f"evaluate: {len(models)} models, {len(tasks)} tasks each on {len(asked.sets) + len(asked.retrieval)} sets; "
        f"{images:,} images to embed for each model, less what was embedded before"
    )


def _measure(encoder: Encoder, tasks: Sequence[Task], results: Results) -> None:
    """Every task of one model, those measured before only by name."""
    known = 0
    for task in tasks:
        key = task.key(encoder)
        if results.take_over(key, model=encoder.name) is not None:
            known += 1
            continue
        encoder.forget_used()
        rows, answers = task.measure(encoder)
        cached = encoder.forget_used()
        results.add(key, [{"model": encoder.name, **row, "cached": cached} for row in rows], answers)
    if known:
        log.info(f"evaluate: {known} of {len(tasks)} tasks of {encoder.name} were measured before")


def _groups(task: str, recipe: Recipe) -> list[Group]:
    """The sets whose scores may be averaged: CLIP's, the shifted ImageNets (which have nothing to train on), all others."""
    named = list(recipe.evaluate.sets)
    others = tuple(name for name in named if find_task(name) is None)
    shifted = tuple(name for name in named if _is_shifted(name))
    clip = tuple(name for name in named if name not in {*others, *shifted})
    of_shifted = sum(entry.shifted for entry in task_table().values())
    found = [Group("CLIP's sets", clip, len(task_table()) - of_shifted)] if clip else []
    found += [Group("other sets" if clip or shifted else "", others, len(others))] if others else []
    return found + ([Group("shifted ImageNets", shifted, of_shifted)] if shifted and task == "zero_shot" else [])


def _is_shifted(name: str) -> bool:
    found = find_task(name)
    return found is not None and found.shifted


def _tables(results: Results, asked: _Asked, recipe: Recipe) -> dict[str, Row]:
    """One table for each task the recipe asks for, with the models' differences."""
    settings, rows = recipe.evaluate, results.rows
    untrained = {opened.name: "no train split" for opened in asked.sets if "train" not in opened.splits}
    tables: dict[str, Row] = {}
    wanted = {"zero_shot": settings.zero_shot, "linear_probe": settings.linear_probe, "knn": settings.knn}
    for name in (name for name, on in wanted.items() if on):
        groups = _groups(name, recipe)
        missing = asked.missing if name == "zero_shot" else {**asked.missing, **untrained}
        if groups:
            tables[name] = score_table(rows, name, groups=groups, missing=missing)
            tables[name]["differences"] = _differences(results, name, groups, recipe)
    if settings.retrieval:
        tables["retrieval"] = retrieval_table(rows, asked=list(settings.retrieval), missing=asked.missing)
        tables["retrieval"]["differences"] = _differences(results, "retrieval", [], recipe)
    return tables


def _differences(results: Results, task: str, groups: Sequence[Group], recipe: Recipe) -> list[Row]:
    rows = [row for row in results.rows if row["task"] == task]
    return differences(rows, results.answers, groups=groups, seed=recipe.evaluate.seed)


def _print(models: list[str], tables: dict[str, Row], rows: Sequence[Row]) -> None:
    for name, table in tables.items():
        lines = recall_lines if name == "retrieval" else score_lines
        log.table(*lines(table, models), title=f"{_WORDS[name]}, in percent")
        if name == "zero_shot" and (beside := same_class_lines(rows, models))[1]:
            log.table(*beside, title="Robustness, in percent")
        if table["differences"]:
            log.table(*difference_lines(table["differences"], models), title=f"{_WORDS[name]}: differences in points")
    for note in variant_notes(tables):
        log.say(note)


def _summary(models: list[str], tables: dict[str, Row], asked: _Asked) -> dict[str, Any]:
    keys = {name: name if name == "retrieval" else f"{name}_mean" for name in tables}
    scores = {model: {keys[name]: table["mean"].get(model) for name, table in tables.items()} for model in models}
    words = [
        f"{_WORDS[name].lower()} {units.in_percent(table['mean'].get(models[0]))} % (mean of {table['mean_of']})"
        for name, table in tables.items()
    ]
    return {
        "models": scores,
        "mean_of": {name: table["mean_of"] for name, table in tables.items()},
        "missing": asked.missing,
        "headline": f"{models[0]}: {', '.join(words)}",
    }
