"""Nearest neighbors as a classifier: a third score beside zero-shot and probe; nothing is fitted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.data.sets.known_sets import MetricName
from clip_cid.evaluation.metrics import accuracy
from clip_cid.evaluation.zero_shot import unit_rows

NEIGHBORS = (10, 20, 100, 200)
"""The numbers of neighbors DINOv2 reports."""

MAIN = 20
"""The number of neighbors of the reported score. It is fixed: choosing the best would use the test images."""

TEMPERATURE = 0.07
_CELLS = 20_000_000  # similarities held at once


@dataclass(frozen=True)
class KnnResult:
    """How often the vote of the nearest training images is right."""

    score: float
    """With `k` neighbors, in `metric`."""
    metric: MetricName
    k: int
    """`MAIN`, or all training images if they are fewer."""
    by_k: dict[int, float]
    """Score by number of neighbors."""
    predicted: Int[np.ndarray, " images"]
    """The answers with `k` neighbors."""
    correct: Bool[np.ndarray, " images"]


def knn(
    train_x: Float[np.ndarray, "train dim"],
    train_y: Int[np.ndarray, " train_labels"],
    test_x: Float[np.ndarray, "test test_dim"],
    test_y: Int[np.ndarray, " test_labels"],
    *,
    metric: MetricName = "top1",
    neighbors: tuple[int, ...] = NEIGHBORS,
    on_images: Callable[[int], Any] | None = None,
) -> KnnResult:
    """Classify each test image by its nearest training images by cosine, each voting with `exp(cosine / 0.07)`.

    The rule of DINOv2's evaluation (arXiv 2304.07193), whose weights are Wu et al.'s (arXiv
    1805.01978). Of equally near images the earlier one counts as nearer; of classes with equal
    votes the lower one is the answer. A number of neighbors above the number of training images
    means all of them.

    Args:
        train_x: Features of the training images, of any length.
        train_y: Their class numbers.
        test_x: Features of the test images.
        test_y: Their class numbers.
        metric: What `score` is.
        neighbors: How many neighbors vote; each number gives a score.
        on_images: Called after each block of test images with their number.

    Raises:
        ValueError: Lengths or widths differ, a feature is not finite or zero, or a number of neighbors is below 1.
    """
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y) or len(y) == 0:
            raise ValueError(f"{name}_x and {name}_y must have one row an image, got {len(x)} and {len(y)}")
    if test_x.shape[1] != train_x.shape[1]:
        raise ValueError(f"test_x has width {test_x.shape[1]}, but train_x has width {train_x.shape[1]}")
    if not neighbors or min(neighbors) < 1:
        raise ValueError(f"neighbors must be 1 or more, got {neighbors}")

    ks = sorted({min(k, len(train_y)) for k in neighbors})
    predicted = _predictions(train_x, train_y, test_x, ks, on_images)
    scores = {k: accuracy(predicted[k] == test_y, test_y, metric=metric) for k in ks}

    main = min(MAIN, len(train_y))
    main = main if main in scores else ks[-1]
    return KnnResult(scores[main], metric, main, scores, predicted[main], predicted[main] == test_y)


def _predictions(
    train_x: Float[np.ndarray, "train dim"],
    train_y: Int[np.ndarray, " train"],
    test_x: Float[np.ndarray, "test dim"],
    ks: list[int],
    on_images: Callable[[int], Any] | None,
) -> dict[int, Int[np.ndarray, " test"]]:
    train, classes = unit_rows(train_x, name="train_x"), int(train_y.max()) + 1
    answers: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    step = max(1, _CELLS // len(train))
    for start in range(0, len(test_x), step):
        similarity = unit_rows(test_x[start : start + step], name="test_x") @ train.T
        nearest = _nearest(similarity, ks[-1])  # (block, k), the nearest first
        cosines = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
        weights = np.exp((cosines - cosines[:, :1]) / TEMPERATURE)
        for k in ks:
            votes = np.zeros((len(similarity), classes))
            np.add.at(votes, (np.arange(len(votes))[:, None], train_y[nearest[:, :k]]), weights[:, :k])
            answers[k].append(votes.argmax(axis=1))
        if on_images is not None:
            on_images(len(similarity))
    return {k: np.concatenate(parts) for k, parts in answers.items()}


def _nearest(similarity: Float[np.ndarray, "block train"], k: int) -> Int[np.ndarray, "block k"]:
    """The columns of the k largest values of each row, the largest first; of equal values the earlier column first."""
    cut = -np.partition(-similarity, k - 1, axis=1)[:, k - 1]
    nearest = np.empty((len(similarity), k), dtype=np.int64)
    for row, values in enumerate(similarity):
        candidates = np.flatnonzero(values >= cut[row])
        nearest[row] = candidates[np.argsort(-values[candidates], kind="stable")[:k]]
    return nearest
