"""Measure one model on one set by each protocol: its scores, and the answers behind them."""

import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from clip_cid import log, tasks, units
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.data.sets.evaluation_sets import EvaluationSet
from clip_cid.data.sets.known_sets import known_sets
from clip_cid.evaluation.features import Encoder, ImageFeatures, ImageSource, UnmeasurableError
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
from clip_cid.evaluation.protocols import KNN, LINEAR_PROBE, RETRIEVAL, ZERO_SHOT
from clip_cid.evaluation.results import Answers
from clip_cid.evaluation.retrieval import retrieval
from clip_cid.evaluation.scores import Score
from clip_cid.evaluation.zero_shot import on_classes, prompt_classifier, zero_shot
from clip_cid.recipe import EvaluateConfig, MachineConfig

_ROUNDS = (300, 1_000)  # of a fit, on average over a search: what easy sets take, and the solver's limit
_WORTH_SAYING = 60.0  # seconds
_PACKAGES = ("clip-cid", "torch", "open_clip_torch", "scikit-learn", "numpy")

Measured = tuple[list[Score], Answers]


def measure_zero_shot(
    labelled: EvaluationSet, imagenet: EvaluationSet | None, settings: EvaluateConfig, encoder: Encoder
) -> Measured:
    """Zero-shot classification; of a shifted ImageNet also on `imagenet`'s own images of its classes."""
    test, labels = _images(encoder, labelled, "test", settings)
    result = zero_shot(test.after, _classifier(encoder, labelled), labels, metric=labelled.metric)
    details = {
        "top1": result.top1,
        "top5": result.top5,
        "mean_per_class": result.mean_per_class,
        "per_class": _without_nan(result.per_class),
        "templates": list(labelled.templates),
        "template_hash": short_digest([labelled.class_names, prompts_of(labelled)]),
        "bad_images": list(test.bad),
    }

    if imagenet is not None and (classes := imagenet_classes(labelled)) is not None:
        theirs, theirs_y = _images(encoder, imagenet, "test", settings)
        same = on_classes(theirs.after, _classifier(encoder, imagenet), theirs_y, classes)
        details |= {"imagenet_same_classes": same.score, "imagenet_same_classes_n": len(same.correct)}

    score = _score(encoder, labelled, ZERO_SHOT, result.score, result.predicted, labels, settings, details)
    return [score], {"predicted": result.predicted, "labels": labels}


def measure_linear_probe(
    labelled: EvaluationSet, settings: EvaluateConfig, machine: MachineConfig, encoder: Encoder
) -> Measured:
    """CLIP's linear probe on frozen features, once for each official fold of the training images.

    Raises:
        UnmeasurableError: A tested class has no training image that can be decoded; or nothing can be held out.
    """
    threads, device = machine.threads or tasks.available_cores(), _probe_device(encoder)
    splits = {name: _images(encoder, labelled, name, settings) for name in labelled.splits}
    _check_trained(labelled, {name: labels for name, (_, labels) in splits.items()})
    if "val" not in splits:
        _check_can_hold_out(labelled, splits["train"][1])
    parts = {name: (_probed(features, settings), labels) for name, (features, labels) in splits.items()}
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
            score, predicted, about = result.score, result.predicted, _about_probe(result)
        else:
            decoded = splits["train"][0].rows
            folds = [np.flatnonzero(np.isin(decoded, rows)) for rows in labelled.folds]
            folded = folded_probe(*parts["train"], *parts["test"], folds, **options)
            score, predicted = folded.score, folded.predicted
            about = {"folds": [{"score": fold.score, **_about_probe(fold)} for fold in folded.folds]}

    right = shares(predicted, test_y)
    details = {
        **_accuracies(right, test_y),
        "per_class": _without_nan(per_class(right, test_y, num_classes=len(labelled.class_names))),
        **about,
        "features": settings.features,
        "bad_images": list(test.bad),
    }
    scored = _score(encoder, labelled, LINEAR_PROBE, score, predicted, test_y, settings, details)
    return [scored], {"predicted": predicted, "labels": test_y}


def measure_knn(labelled: EvaluationSet, settings: EvaluateConfig, encoder: Encoder) -> Measured:
    """The vote of the nearest training images.

    Raises:
        UnmeasurableError: A tested class has no training image that can be decoded.
    """
    (train, train_y), (test, test_y) = (_images(encoder, labelled, name, settings) for name in ("train", "test"))
    _check_trained(labelled, {"train": train_y, "test": test_y})
    train_x, test_x = _probed(train, settings), _probed(test, settings)
    with log.progress(f"neighbors {encoder.name} {labelled.name}", len(test_y)) as bar:
        result = knn(train_x, train_y, test_x, test_y, metric=labelled.metric, on_images=bar.advance)

    details = {
        **_accuracies(result.correct, test_y),
        "k": result.k,
        "by_k": {str(k): score for k, score in result.by_k.items()},
        "temperature": TEMPERATURE,
        "features": settings.features,
        "n_train": len(train_y),
        "bad_images": list(test.bad),
    }
    score = _score(encoder, labelled, KNN, result.score, result.predicted, test_y, settings, details)
    return [score], {"predicted": result.predicted, "labels": test_y}


def measure_retrieval(name: str, source: ImageSource, pairs: Pairs, encoder: Encoder, *, seed: int) -> Measured:
    """Recall of captions by images and of images by captions."""
    images = encoder.images(source, before=False)
    captions = [pairs.read(int(row)).captions for row in images.rows]
    counts = np.array([len(texts) for texts in captions])
    texts = encoder.texts(source.title, [text for texts in captions for text in texts])
    recalls = retrieval(images.after, texts, np.repeat(np.arange(len(captions)), counts), seed=seed)

    scores = [
        Score(
            model=encoder.name,
            set=name,
            task=RETRIEVAL,
            metric=recall.metric,
            score=recall.score,
            low=recall.low,
            high=recall.high,
            n=recall.queries,
            chance=recall.chance,
            details={"bad_images": list(images.bad), "versions": _versions()},
        )
        for recall in recalls
    ]
    return scores, {"captions": counts, **{recall.metric: recall.hits for recall in recalls}}


def imagenet_classes(labelled: EvaluationSet) -> Int[np.ndarray, " classes"] | None:
    """The ImageNet classes of a shifted set: some, or all of them; None for any other set."""
    if (
        labelled.superset_classes is None
        and labelled.known_key is not None
        and known_sets()[labelled.known_key].shifted
    ):
        return np.arange(len(labelled.class_names))
    return labelled.superset_classes


def prompts_of(labelled: EvaluationSet) -> list[str]:
    """All prompts, class by class."""
    return [prompt for label in range(len(labelled.class_names)) for prompt in labelled.prompts(label)]


def short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _score(
    encoder: Encoder,
    labelled: EvaluationSet,
    task: str,
    score: float,
    predicted: np.ndarray,
    labels: np.ndarray,
    settings: EvaluateConfig,
    details: dict[str, Any],
) -> Score:
    """A score on a labelled set with its interval; the commonest mistakes and the versions precede `details`."""
    low, high = bootstrap_interval(shares(predicted, labels), labels, metric=labelled.metric, seed=settings.seed)
    names, classes = labelled.class_names, len(labelled.class_names)
    every_label = np.broadcast_to(labels, predicted.shape).ravel()  # of several folds the mistakes of all
    mistakes = confusions(predicted.ravel(), every_label)

    return Score(
        model=encoder.name,
        set=labelled.name,
        task=task,
        metric=labelled.metric,
        score=score,
        low=low,
        high=high,
        n=len(labels),
        classes=classes,
        chance=1 / classes,
        variant=labelled.variant,
        details={
            "confusions": [[names[right], names[answered], count] for right, answered, count in mistakes],
            "versions": _versions(),
            **details,
        },
    )


def _accuracies(right: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {name: accuracy(right, labels, metric=name) for name in ("top1", "mean_per_class")}


def _about_probe(result: ProbeResult) -> dict[str, Any]:
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
    """The GPU that computed the features, if scikit-learn can fit there."""
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
    """Log what a long probe will cost before it starts; a short one needs no message."""
    images, classes = len(labelled.folds[0]) if labelled.folds else len(train_x), len(labelled.class_names)
    a_round = seconds_a_round(train_x[:images], classes=classes, threads=threads, device=device)
    quick, slow = (fits * rounds * a_round for rounds in _ROUNDS)
    if slow > _WORTH_SAYING:
        log.info(
            f"probe {encoder.name} {labelled.name}: {images:,} images x {train_x.shape[1]:,} features x"
            f" {classes:,} classes"
            f" ({units.memory(2 * train_x.nbytes)} of memory); a round of the solver takes about {a_round:.2g} s,"
            f" so {fits} fits of {_ROUNDS[0]} to {_ROUNDS[1]} rounds take {units.duration(quick)} to"
            f" {units.duration(slow)}"
        )


def _images(
    encoder: Encoder, labelled: EvaluationSet, name: str, settings: EvaluateConfig
) -> tuple[ImageFeatures, np.ndarray]:
    """Features and labels of a split's decodable images."""
    features = split_features(encoder, labelled, name, settings)
    return features, labelled.split(name).labels[features.rows]


def split_features(encoder: Encoder, labelled: EvaluationSet, name: str, settings: EvaluateConfig) -> ImageFeatures:
    """Features of a split's decodable images; one pass serves all protocols."""
    trained = "train" in labelled.splits and (settings.linear_probe or settings.knn)
    return encoder.images(labelled.split(name), before=trained and settings.features == "before_projection")


def _check_trained(labelled: EvaluationSet, labels: Mapping[str, np.ndarray]) -> None:
    """Every class that is answered for has a training image left."""
    answered = np.concatenate([values for name, values in labels.items() if name != "train"])
    if len(lost := np.setdiff1d(answered, labels["train"])):
        raise UnmeasurableError(
            f"{labelled.name}: {len(lost)} of {len(labelled.class_names)} classes have no training image that can be"
            f" decoded, the first {labelled.class_names[lost[0]]}.",
            fix="Copy the training images again, or leave the train split out.",
        )


def _check_can_hold_out(labelled: EvaluationSet, train_y: np.ndarray) -> None:
    """The probe holds out a part of the training images to choose its C."""
    if len(train_y) == len(np.unique(train_y)):
        raise UnmeasurableError(
            f"{labelled.name}: every class has a single training image, so none can be held out to choose the probe's"
            " C.",
            fix="Add a val split or training images, or set evaluate.linear_probe: false.",
        )


def _probed(features: ImageFeatures, settings: EvaluateConfig) -> np.ndarray:
    """The features that the recipe chooses for probe and neighbors."""
    if settings.features == "after_projection" or features.before is None:
        return features.after
    return features.before


def _classifier(encoder: Encoder, labelled: EvaluationSet) -> np.ndarray:
    texts = encoder.texts(f"{labelled.name}/prompts", prompts_of(labelled))
    return prompt_classifier(texts, num_classes=len(labelled.class_names))


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {package: metadata.version(package) for package in _PACKAGES}


def _without_nan(values: np.ndarray) -> list[float | None]:
    """JSON has no NaN: a class without an image is null."""
    return [None if np.isnan(value) else float(value) for value in values]
