"""Stage `evaluate`: zero-shot, linear probe and retrieval of the student and of the models beside it."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_cid import log
from clip_cid.data.evaluation_sets import EvaluationSet, LabelledImages, MissingSetError, open_set
from clip_cid.data.images import decode_image
from clip_cid.data.pairs import Pairs, fingerprint, open_pairs
from clip_cid.data.sources import find_sources
from clip_cid.errors import ConfigError, DataError
from clip_cid.evaluation.features import Encoder, ImageFeatures, prune
from clip_cid.evaluation.linear_probe import MOST_FITS, linear_probe
from clip_cid.evaluation.metrics import bootstrap_interval
from clip_cid.evaluation.retrieval import retrieval
from clip_cid.evaluation.tables import Row, percent, recall_lines, retrieval_table, score_lines, score_table
from clip_cid.evaluation.zero_shot import prompt_classifier, zero_shot
from clip_cid.models.device import resolve_device
from clip_cid.models.student import load_clip
from clip_cid.recipe import PairsConfig, Recipe
from clip_cid.run_folder import RunFolder, write_json

STUDENT = "student"
_WORDS = {"zero_shot": "Zero-shot", "linear_probe": "Linear probe", "retrieval": "Retrieval"}


@dataclass(frozen=True)
class _PairSet:
    """Image-text pairs as an `ImageSource`."""

    title: str
    fingerprint: str
    pairs: Pairs
    max_pixels: int

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, row: int) -> str:
        return self.pairs.key(row)

    def load(self, row: int) -> Image.Image:
        return decode_image(self.pairs.read(row).image, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class _Task:
    """What is asked of every model, and what of it is not there."""

    sets: list[EvaluationSet]
    retrieval: list[_PairSet]
    missing: dict[str, str]
    """Set -> why it is left out of everything."""


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Measure every model on every set; writes results.jsonl and a table for each task."""
    models = _models(folder, recipe)
    task = _open_all(recipe)
    rows: list[Row] = []
    used: frozenset[str] = frozenset()
    with open(out / "results.jsonl", "a", encoding="utf-8") as results:
        for name, reference in models.items():
            encoder = _encoder(name, reference, folder, recipe)
            for row in _measure(encoder, task, recipe):
                results.write(json.dumps({"model": name, **row}, allow_nan=False) + "\n")
                results.flush()
                rows.append({"model": name, **row})
            used |= encoder.used
    if stale := prune(_cache(folder), used):
        log.info(f"evaluate: {stale} cached features of other models or sets deleted")
    tables = _tables(rows, task, recipe)
    for name, table in tables.items():
        write_json(out / f"{name}.json", table)
    _print(list(models), tables)
    return _summary(list(models), tables, task)


def _models(folder: RunFolder, recipe: Recipe) -> dict[str, str]:
    """Name -> reference of every model, the student first."""
    if STUDENT in recipe.evaluate.compare:
        raise ConfigError(
            f"evaluate.compare: a model is named {STUDENT!r}, which is this run's own.", fix="Give it another name."
        )
    return {STUDENT: f"local-dir:{folder.stage('distill') / 'student'}", **recipe.evaluate.compare}


def _open_all(recipe: Recipe) -> _Task:
    """Index and check everything before the first model runs; sets that are not there are left out and named."""
    settings = recipe.evaluate
    task = _Task([], [], {})
    splits = ("train", "val", "test") if settings.linear_probe else ("test",)
    for name, where in settings.sets.items():
        try:
            opened = open_set(
                name, where, max_pixels=recipe.pairs.max_pixels, splits=splits, cache_dir=recipe.machine.cache_dir
            )
        except MissingSetError as error:
            _leave_out(task, name, error)
            continue
        if settings.zero_shot:
            opened.prompts(0)
        if settings.linear_probe and "train" not in opened.splits:
            log.warn(f"{name}: no train split at {where}, so no linear probe on it")
        task.sets.append(opened)
    for name, source in settings.retrieval.items():
        try:
            task.retrieval.append(_open_pairs(name, recipe.pairs.model_copy(update={"source": source}), recipe))
        except _MissingPairsError as error:
            _leave_out(task, name, error)
    if not task.sets and not task.retrieval:
        raise DataError(
            f"evaluate: none of {len(task.missing)} sets is there ({'; '.join(task.missing.values()) or 'none is named'}).",
            fix="Name sets that exist in evaluate.sets or evaluate.retrieval; builtin:digits always does.",
        )
    return task


class _MissingPairsError(DataError):
    """The pairs of a retrieval set cannot be found."""


def _leave_out(task: _Task, name: str, error: DataError) -> None:
    task.missing[name] = error.problem
    log.warn(f"{error.problem} Left out. {error.fix}")


def _open_pairs(name: str, settings: PairsConfig, recipe: Recipe) -> _PairSet:
    try:
        find_sources(settings.source)
    except DataError as error:
        raise _MissingPairsError(f"evaluate.retrieval.{name}: {error.problem}", fix=error.fix) from error
    pairs = open_pairs(settings, cache_dir=recipe.machine.cache_dir)
    digest = hashlib.sha256(json.dumps(fingerprint(settings)).encode()).hexdigest()
    return _PairSet(f"{name}/pairs", digest, pairs, settings.max_pixels)


def _cache(folder: RunFolder) -> Path:
    return folder.path / "features"


def _encoder(name: str, reference: str, folder: RunFolder, recipe: Recipe) -> Encoder:
    machine = recipe.machine
    device = resolve_device(machine.device)
    clip = load_clip(reference, device=str(device))
    return Encoder(name, clip, _cache(folder), device=device, batch_size=machine.embed_batch, workers=machine.workers)


def _measure(encoder: Encoder, task: _Task, recipe: Recipe) -> Iterator[Row]:
    settings = recipe.evaluate
    for labelled in task.sets:
        before = settings.linear_probe and settings.features == "before_projection"
        test = encoder.images(labelled.split("test"), before=before and "train" in labelled.splits)
        _say_bad(labelled.split("test"), test)
        if settings.zero_shot:
            yield _zero_shot(encoder, labelled, test, seed=settings.seed)
        if settings.linear_probe and "train" in labelled.splits:
            yield _linear_probe(encoder, labelled, test, recipe)
    for pairs in task.retrieval:
        yield from _retrieval(encoder, pairs, seed=settings.seed)


def _zero_shot(encoder: Encoder, labelled: EvaluationSet, test: ImageFeatures, *, seed: int) -> Row:
    labels = labelled.split("test").labels[test.rows]
    classes = len(labelled.class_names)
    prompts = [prompt for label in range(classes) for prompt in labelled.prompts(label)]
    classifier = prompt_classifier(encoder.texts(f"{labelled.name}/prompts", prompts), num_classes=classes)
    result = zero_shot(test.after, classifier, labels, metric=labelled.metric)
    low, high = bootstrap_interval(result.correct, labels, metric=labelled.metric, seed=seed)
    return {
        **_row(labelled, "zero_shot", result.score, low, high, len(labels)),
        "top1": result.top1,
        "top5": result.top5,
        "mean_per_class": result.mean_per_class,
        "per_class": _without_nan(result.per_class),
        "templates": list(labelled.templates),
        "bad_images": list(test.bad),
    }


def _linear_probe(encoder: Encoder, labelled: EvaluationSet, test: ImageFeatures, recipe: Recipe) -> Row:
    settings, machine = recipe.evaluate, recipe.machine
    parts = {name: _probe_input(encoder, labelled, name, recipe) for name in labelled.splits if name != "test"}
    test_x, test_y = _chosen(test, recipe), labelled.split("test").labels[test.rows]
    with log.progress(f"probe {encoder.name} {labelled.name}", MOST_FITS, unit="fits") as bar:
        result = linear_probe(
            *parts["train"],
            test_x,
            test_y,
            metric=labelled.metric,
            val=parts.get("val"),
            seed=settings.seed,
            threads=machine.threads or os.cpu_count() or 1,
            on_fit=bar.advance,
        )
    if not result.final_converged:
        log.info(f"{encoder.name} {labelled.name}: the final fit (C = {result.C:.3g}) stopped before it converged")
    low, high = bootstrap_interval(result.correct, test_y, metric=labelled.metric, seed=settings.seed)
    return {
        **_row(labelled, "linear_probe", result.score, low, high, len(test_y)),
        "top1": result.top1,
        "mean_per_class": result.mean_per_class,
        "per_class": _without_nan(result.per_class),
        "C": result.C,
        "curve": [list(point) for point in result.curve],
        "validation": result.validation,
        "unconverged": list(result.unconverged),
        "final_converged": result.final_converged,
        "features": settings.features,
        "n_train": result.n_train,
        "bad_images": list(test.bad),
    }


def _probe_input(encoder: Encoder, labelled: EvaluationSet, name: str, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    split = labelled.split(name)
    found = encoder.images(split, before=recipe.evaluate.features == "before_projection")
    _say_bad(split, found)
    return _chosen(found, recipe), split.labels[found.rows]


def _chosen(found: ImageFeatures, recipe: Recipe) -> np.ndarray:
    """The features the recipe wants the probe to see."""
    if recipe.evaluate.features == "after_projection" or found.before is None:
        return found.after
    return found.before


def _retrieval(encoder: Encoder, source: _PairSet, *, seed: int) -> Iterator[Row]:
    found = encoder.images(source, before=False)
    _say_bad(source, found)
    captions = [source.pairs.read(int(row)).captions for row in found.rows]
    image_of = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    texts = encoder.texts(source.title, [text for texts in captions for text in texts])
    for recall in retrieval(found.after, texts, image_of, seed=seed):
        yield {
            "set": source.title.removesuffix("/pairs"),
            "task": "retrieval",
            "metric": recall.metric,
            "score": recall.score,
            "low": recall.low,
            "high": recall.high,
            "n": recall.queries,
            "classes": None,
            "chance": recall.chance,
            "bad_images": list(found.bad),
        }


def _row(labelled: EvaluationSet, task: str, score: float, low: float, high: float, n: int) -> Row:
    classes = len(labelled.class_names)
    return {
        "set": labelled.name,
        "task": task,
        "metric": labelled.metric,
        "score": score,
        "low": low,
        "high": high,
        "n": n,
        "classes": classes,
        "chance": 1 / classes,
    }


def _without_nan(values: np.ndarray) -> list[float | None]:
    """JSON has no NaN: a class without an image is null."""
    return [None if np.isnan(value) else float(value) for value in values]


def _say_bad(source: LabelledImages | _PairSet, found: ImageFeatures) -> None:
    if found.bad:
        log.warn(
            f"{source.title}: {len(found.bad)} of {len(source):,} images cannot be used and are left out, "
            f"the first {found.bad[0]}"
        )


def _tables(rows: list[Row], task: _Task, recipe: Recipe) -> dict[str, Row]:
    """One table for each task the recipe asks for."""
    settings = recipe.evaluate
    untrained = {opened.name: "no train split" for opened in task.sets if "train" not in opened.splits}
    sets, tables = list(settings.sets), dict[str, Row]()
    if settings.zero_shot and sets:
        tables["zero_shot"] = score_table(rows, "zero_shot", asked=sets, missing=task.missing)
    if settings.linear_probe and sets:
        missing = {**task.missing, **untrained}
        tables["linear_probe"] = score_table(rows, "linear_probe", asked=sets, missing=missing)
    if settings.retrieval:
        tables["retrieval"] = retrieval_table(rows, asked=list(settings.retrieval), missing=task.missing)
    return tables


def _print(models: list[str], tables: dict[str, Row]) -> None:
    for name, table in tables.items():
        lines = recall_lines if name == "retrieval" else score_lines
        log.table(*lines(table, models), title=f"{_WORDS[name]}, in percent")


def _summary(models: list[str], tables: dict[str, Row], task: _Task) -> dict[str, Any]:
    keys = {"zero_shot": "zero_shot_mean", "linear_probe": "linear_probe_mean", "retrieval": "retrieval"}
    scores = {model: {keys[name]: table["mean"].get(model) for name, table in tables.items()} for model in models}
    words = [
        f"{_WORDS[name].lower()} {percent(table['mean'].get(STUDENT))} % (mean of {table['mean_of']})"
        for name, table in tables.items()
    ]
    return {
        "models": scores,
        "mean_of": {name: table["mean_of"] for name, table in tables.items()},
        "missing": task.missing,
        "headline": f"{STUDENT}: {', '.join(words)}",
    }
