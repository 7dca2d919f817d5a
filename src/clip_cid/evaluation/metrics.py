"""Scores of predicted classes, and their confidence intervals."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.data.sets.known_sets import MetricName

RESAMPLES = 2_000

Seed = int | Sequence[int]
"""A seed for NumPy's `default_rng`: one number, or several."""

Shares = Bool[np.ndarray, " images"] | Float[np.ndarray, " images"]
"""How right the answer to each image is: true or false, or a share."""


def shares(predicted: Int[np.ndarray, "*folds images"], labels: Int[np.ndarray, " labels"]) -> Shares:
    """How right each image was answered: true or false, or by which share of several classifiers (folds)."""
    right = predicted == labels
    return right if right.ndim == 1 else right.mean(axis=0)


def accuracy(correct: Shares, labels: Int[np.ndarray, " labels"], *, metric: MetricName) -> float:
    """Share of right answers over all images (`top1`), or the mean of each class's share (`mean_per_class`).

    Of the difference between two models' answers it gives the difference of their scores.
    """
    if len(correct) != len(labels) or len(labels) == 0:
        raise ValueError(f"correct and labels must have one entry an image, got {len(correct)} and {len(labels)}")
    if metric == "top1":
        return float(correct.mean())
    return float(np.nanmean(per_class(correct, labels, num_classes=int(labels.max()) + 1)))


def per_class(
    correct: Shares, labels: Int[np.ndarray, " images"], *, num_classes: int
) -> Float[np.ndarray, " classes"]:
    """Share of right answers of each class; NaN for a class without an image."""
    right = np.bincount(labels, weights=correct, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return right / np.bincount(labels, minlength=num_classes)


def bootstrap_interval(
    shares: Shares, labels: Int[np.ndarray, " labels"], *, metric: MetricName, seed: Seed
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `accuracy`: over images, or within each class for `mean_per_class`.

    `shares` says for each image whether it was answered right, or how often by several classifiers
    (the folds of STL10).
    """
    return middle_95(bootstrap_draws(shares, labels, metric=metric, seed=seed))


def bootstrap_draws(
    values: Shares, labels: Int[np.ndarray, " labels"], *, metric: MetricName, seed: Seed
) -> Float[np.ndarray, " resamples"]:
    """The bootstrap's distribution of the mean of `values`, or of the mean of its class means.

    Few values differ (right or wrong; better, equal or worse), so how often each occurs among n
    redrawn images is exactly a multinomial draw; nothing has to be redrawn image by image. The
    difference of two models' answers to the same images makes it the paired bootstrap.
    """
    random = np.random.default_rng(seed)
    distinct, kinds = np.unique(values.astype(np.float64), return_inverse=True)
    groups = np.zeros_like(labels) if metric == "top1" else labels
    counts = np.zeros((int(groups.max()) + 1, len(distinct)), dtype=np.int64)
    np.add.at(counts, (groups, kinds), 1)
    counts = counts[counts.any(axis=1)]
    draws = np.zeros(RESAMPLES)
    for count in counts:
        total = int(count.sum())
        draws += random.multinomial(total, count / total, size=RESAMPLES) @ distinct / total
    return draws / len(counts)


def confusions(
    predicted: Int[np.ndarray, " images"], labels: Int[np.ndarray, " labels"], *, most: int = 20
) -> list[tuple[int, int, int]]:
    """The commonest mistakes: right class, class answered instead, number of images; commonest first."""
    wrong = predicted != labels
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], pairs[0], -counts))[:most]
    return [(int(pairs[0, place]), int(pairs[1, place]), int(counts[place])) for place in order]


def bootstrap_ratio(
    hits: Float[np.ndarray, " units"], counts: Float[np.ndarray, " units"], *, seed: Seed
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `hits.sum() / counts.sum()`.

    Whole units are redrawn: an image together with its captions.
    """
    random = np.random.default_rng(seed)
    units = len(hits)
    draws = np.empty(RESAMPLES)
    step = max(1, 10_000_000 // units)  # bounds the memory of the redrawn rows
    for start in range(0, RESAMPLES, step):
        rows = random.integers(0, units, size=(min(step, RESAMPLES - start), units))
        draws[start : start + step] = hits[rows].sum(axis=1) / counts[rows].sum(axis=1)
    return middle_95(draws)


def middle_95(draws: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
