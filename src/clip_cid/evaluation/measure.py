"""What is measured of a model on a set, as tasks: each gives lines of results and the answers behind them."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from clip_cid import log, units
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.data.sets.evaluation_sets import EvaluationSet
from clip_cid.data.sets.known_sets import task_table
from clip_cid.data.sets.labelled_images import LabelledImages
from clip_cid.evaluation.features import Encoder, ImageFeatures
from clip_cid.evaluation.knn import TEMPERATURE, knn
from clip_cid.evaluation.linear_probe import (
    MOST_FITS,
    ProbeResult,
    array_api_supported,
    folded_probe,
    linear_probe,
    seconds_a_round,
)
from clip_cid.evaluation.metrics import accuracy, bootstrap_interval, confusions, per_class, shares
from clip_cid.evaluation.results import Answers
from clip_cid.evaluation.retrieval import retrieval
from clip_cid.evaluation.tables import Row
from clip_cid.evaluation.zero_shot import on_classes, prompt_classifier, zero_shot
from clip_cid.recipe import EvaluateConfig, MachineConfig

METHOD = 2
"""Raised when the same features would give other results."""

_ROUNDS = (300, 1_000)  # of a fit, on average over a search: what easy sets take, and the solver's limit
_WORTH_SAYING = 60.0  # seconds
_PACKAGES = ("clip-cid", "torch", "open_clip_torch", "scikit-learn", "numpy")

Measured = tuple[list[Row], Answers]


@dataclass(frozen=True)
class PairSet:
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
class Task:
    """One set measured in one way."""

    set: str
    name: str
    depends: dict[str, Any]
    """All that its result depends on besides the model."""
    measure: Callable[[Encoder], Measured]

    def key(self, encoder: Encoder) -> str:
        """Equal keys, equal results: covers the weights, the images, the prompts and the settings."""
        parts = [METHOD, self.set, self.name, self.depends, encoder.identity]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def tasks_of(
    labelled: EvaluationSet, settings: EvaluateConfig, machine: MachineConfig, *, imagenet: EvaluationSet | None
) -> Iterator[Task]:
    """The tasks the recipe asks for that this set allows; `imagenet` is measured on the classes of a robustness set."""
    prints = {name: _fingerprint(split) for name, split in labelled.splits.items()}
    common = {"metric": labelled.metric, "seed": settings.seed, "classes": labelled.class_names}
    if settings.zero_shot:
        beside = imagenet if _imagenet_classes(labelled) is not None else None
        depends = {**common, "test": prints["test"], "prompts": _prompts(labelled)}
        if beside is not None:
            depends |= {"imagenet": _fingerprint(beside.split("test")), "imagenet_prompts": _prompts(beside)}
        yield Task(labelled.name, "zero_shot", depends, functools.partial(_zero_shot, labelled, beside, settings))
    if "train" not in labelled.splits:
        return
    depends = {**common, "splits": prints, "features": settings.features}
    folds = None if labelled.folds is None else [_digest(rows.tolist()) for rows in labelled.folds]
    if settings.linear_probe:
        work = functools.partial(_linear_probe, labelled, settings, machine)
        yield Task(labelled.name, "linear_probe", {**depends, "folds": folds}, work)
    if settings.knn:
        yield Task(labelled.name, "knn", depends, functools.partial(_knn, labelled, settings))


def retrieval_task(source: PairSet, *, seed: int) -> Task:
    """Recall at 1, 5 and 10, both ways."""
    name = source.title.removesuffix("/pairs")
    depends = {"pairs": source.fingerprint, "seed": seed}
    return Task(name, "retrieval", depends, functools.partial(_retrieval, name, source, seed=seed))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {package: metadata.version(package) for package in _PACKAGES}


def _zero_shot(
    labelled: EvaluationSet, imagenet: EvaluationSet | None, settings: EvaluateConfig, encoder: Encoder
) -> Measured:
    test, labels = _images(encoder, labelled, "test", settings)
    result = zero_shot(test.after, _classifier(encoder, labelled), labels, metric=labelled.metric)
    row = {
        **_row(labelled, "zero_shot", result.score, result.predicted, labels, seed=settings.seed),
        "top1": result.top1,
        "top5": result.top5,
        "mean_per_class": result.mean_per_class,
        "per_class": _without_nan(result.per_class),
        "templates": list(labelled.templates),
        "template_hash": _digest([labelled.class_names, _prompts(labelled)]),
        "bad_images": list(test.bad),
    }
    if imagenet is not None and (classes := _imagenet_classes(labelled)) is not None:
        theirs, theirs_y = _images(encoder, imagenet, "test", settings)
        same = on_classes(theirs.after, _classifier(encoder, imagenet), theirs_y, classes)
        row |= {"imagenet_same_classes": same.score, "imagenet_same_classes_n": len(same.correct)}
    return [row], {"predicted": result.predicted, "labels": labels}


def _imagenet_classes(labelled: EvaluationSet) -> Int[np.ndarray, " classes"] | None:
    """Which of ImageNet's classes a shifted set has: some, or all of them; None for any other set."""
    if labelled.superset_classes is None and labelled.task is not None and task_table()[labelled.task].shifted:
        return np.arange(len(labelled.class_names))
    return labelled.superset_classes


def _linear_probe(
    labelled: EvaluationSet, settings: EvaluateConfig, machine: MachineConfig, encoder: Encoder
) -> Measured:
    threads, device = machine.threads or os.cpu_count() or 1, _probe_device(encoder)
    splits = {name: _images(encoder, labelled, name, settings) for name in labelled.splits}
    parts = {name: (_chosen(found, settings), labels) for name, (found, labels) in splits.items()}
    test, test_y = splits["test"]
    fits = MOST_FITS * len(labelled.folds or [None])
    _say_cost(encoder, labelled, parts["train"][0], fits=fits, threads=threads, device=device)
    with log.progress(f"probe {encoder.name} {labelled.name}", fits, unit="fits") as bar:
        options: dict[str, Any] = {
            "metric": labelled.metric,
            "seed": settings.seed,
            "threads": threads,
            "device": device,
            "on_fit": bar.advance,
        }
        if labelled.folds is None:
            result = linear_probe(*parts["train"], *parts["test"], val=parts.get("val"), **options)
            score, predicted, about = result.score, result.predicted, _of_probe(result)
        else:
            decoded = splits["train"][0].rows
            folds = [np.flatnonzero(np.isin(decoded, rows)) for rows in labelled.folds]
            folded = folded_probe(*parts["train"], *parts["test"], folds, **options)
            score, predicted = folded.score, folded.predicted
            about = {"folds": [{"score": fold.score, **_of_probe(fold)} for fold in folded.folds]}
    right = shares(predicted, test_y)
    row = {
        **_row(labelled, "linear_probe", score, predicted, test_y, seed=settings.seed),
        "top1": accuracy(right, test_y, metric="top1"),
        "mean_per_class": accuracy(right, test_y, metric="mean_per_class"),
        "per_class": _without_nan(per_class(right, test_y, num_classes=len(labelled.class_names))),
        **about,
        "features": settings.features,
        "bad_images": list(test.bad),
    }
    return [row], {"predicted": predicted, "labels": test_y}


def _of_probe(result: ProbeResult) -> Row:
    return {
        "C": result.C,
        "curve": [list(point) for point in result.curve],
        "validation": result.validation,
        "unconverged": list(result.unconverged),
        "final_converged": result.final_converged,
        "rounds": result.rounds,
        "n_train": result.n_train,
    }


def _probe_device(encoder: Encoder) -> torch.device | None:
    """The GPU the features were made on, where scikit-learn can fit there."""
    if encoder.device.type != "cuda":
        return None
    if not array_api_supported():
        log.info("linear probe: this scikit-learn fits on the CPU only; 1.9 and later use the GPU")
        return None
    return encoder.device


def _say_cost(
    encoder: Encoder,
    labelled: EvaluationSet,
    train_x: np.ndarray,
    *,
    fits: int,
    threads: int,
    device: torch.device | None,
) -> None:
    """What a long probe will cost, before it starts; a short one is not worth the words."""
    images, classes = len(labelled.folds[0]) if labelled.folds else len(train_x), len(labelled.class_names)
    a_round = seconds_a_round(train_x[:images], classes=classes, threads=threads, device=device)
    quick, slow = (fits * rounds * a_round for rounds in _ROUNDS)
    if slow > _WORTH_SAYING:
        log.info(
            f"probe {encoder.name} {labelled.name}: {images:,} images x {train_x.shape[1]:,} features x {classes:,} classes "
            f"({units.memory(2 * train_x.nbytes)} of memory); a round of the solver takes about {a_round:.2g} s, so {fits} "
            f"fits of {_ROUNDS[0]} to {_ROUNDS[1]} rounds take {units.duration(quick)} to {units.duration(slow)}"
        )


def _knn(labelled: EvaluationSet, settings: EvaluateConfig, encoder: Encoder) -> Measured:
    (train, train_y), (test, test_y) = (_images(encoder, labelled, name, settings) for name in ("train", "test"))
    train_x, test_x = _chosen(train, settings), _chosen(test, settings)
    with log.progress(f"neighbors {encoder.name} {labelled.name}", len(test_y)) as bar:
        result = knn(train_x, train_y, test_x, test_y, metric=labelled.metric, on_images=bar.advance)
    row = {
        **_row(labelled, "knn", result.score, result.predicted, test_y, seed=settings.seed),
        "top1": accuracy(result.correct, test_y, metric="top1"),
        "mean_per_class": accuracy(result.correct, test_y, metric="mean_per_class"),
        "k": result.k,
        "by_k": {str(k): score for k, score in result.by_k.items()},
        "temperature": TEMPERATURE,
        "features": settings.features,
        "n_train": len(train_y),
        "bad_images": list(test.bad),
    }
    return [row], {"predicted": result.predicted, "labels": test_y}


def _retrieval(name: str, source: PairSet, encoder: Encoder, *, seed: int) -> Measured:
    found = encoder.images(source, before=False)
    captions = [source.pairs.read(int(row)).captions for row in found.rows]
    counts = np.array([len(texts) for texts in captions])
    texts = encoder.texts(source.title, [text for texts in captions for text in texts])
    recalls = retrieval(found.after, texts, np.repeat(np.arange(len(captions)), counts), seed=seed)
    rows = [
        {
            "set": name,
            "task": "retrieval",
            "metric": recall.metric,
            "score": recall.score,
            "low": recall.low,
            "high": recall.high,
            "n": recall.queries,
            "classes": None,
            "chance": recall.chance,
            "bad_images": list(found.bad),
            "versions": versions(),
        }
        for recall in recalls
    ]
    return rows, {"captions": counts, **{recall.metric: recall.hits for recall in recalls}}


def _row(
    labelled: EvaluationSet, task: str, score: float, predicted: np.ndarray, labels: np.ndarray, *, seed: int
) -> Row:
    """What the lines of all tasks on labelled sets have in common."""
    low, high = bootstrap_interval(shares(predicted, labels), labels, metric=labelled.metric, seed=seed)
    classes = len(labelled.class_names)
    every = np.broadcast_to(labels, predicted.shape).ravel()  # of several folds the mistakes of all
    pairs = confusions(predicted.ravel(), every)
    return {
        "set": labelled.name,
        "task": task,
        "metric": labelled.metric,
        "score": score,
        "low": low,
        "high": high,
        "n": len(labels),
        "classes": classes,
        "chance": 1 / classes,
        "variant": labelled.variant,
        "confusions": [[labelled.class_names[a], labelled.class_names[b], count] for a, b, count in pairs],
        "versions": versions(),
    }


def _images(
    encoder: Encoder, labelled: EvaluationSet, name: str, settings: EvaluateConfig
) -> tuple[ImageFeatures, np.ndarray]:
    """A split's features and labels, of the images that could be decoded; one pass gives what all tasks will want."""
    trained = "train" in labelled.splits and (settings.linear_probe or settings.knn)
    found = encoder.images(labelled.split(name), before=trained and settings.features == "before_projection")
    return found, labelled.split(name).labels[found.rows]


def _chosen(found: ImageFeatures, settings: EvaluateConfig) -> np.ndarray:
    """The features the recipe wants probe and neighbors to see."""
    if settings.features == "after_projection" or found.before is None:
        return found.after
    return found.before


def _classifier(encoder: Encoder, labelled: EvaluationSet) -> np.ndarray:
    prompts = _prompts(labelled)
    return prompt_classifier(encoder.texts(f"{labelled.name}/prompts", prompts), num_classes=len(labelled.class_names))


def _prompts(labelled: EvaluationSet) -> list[str]:
    return [prompt for label in range(len(labelled.class_names)) for prompt in labelled.prompts(label)]


def _fingerprint(split: LabelledImages) -> list[str]:
    """Of the images, and of the labels as they were read."""
    return [split.fingerprint, hashlib.sha256(split.labels.tobytes()).hexdigest()[:16]]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _without_nan(values: np.ndarray) -> list[float | None]:
    """JSON has no NaN: a class without an image is null."""
    return [None if np.isnan(value) else float(value) for value in values]
