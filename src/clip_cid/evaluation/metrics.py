"""Scores of predicted classes, and how far they can be trusted."""

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.data.evaluation_sets import MetricName

RESAMPLES = 2_000


def accuracy(correct: Bool[np.ndarray, " images"], labels: Int[np.ndarray, " labels"], *, metric: MetricName) -> float:
    """Share of right answers over all images (`top1`), or the mean of each class's share (`mean_per_class`)."""
    if len(correct) != len(labels) or len(labels) == 0:
        raise ValueError(f"correct and labels must have one entry an image, got {len(correct)} and {len(labels)}")
    if metric == "top1":
        return float(correct.mean())
    return float(np.nanmean(per_class(correct, labels, num_classes=int(labels.max()) + 1)))


def per_class(
    correct: Bool[np.ndarray, " images"], labels: Int[np.ndarray, " images"], *, num_classes: int
) -> Float[np.ndarray, " classes"]:
    """Share of right answers of each class; NaN for a class without an image."""
    right = np.bincount(labels, weights=correct, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return right / np.bincount(labels, minlength=num_classes)


def bootstrap_interval(
    correct: Bool[np.ndarray, " images"], labels: Int[np.ndarray, " images"], *, metric: MetricName, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `accuracy`: over images, or within each class for `mean_per_class`.

    Answers are right or wrong, so the number of right ones among n redrawn images is exactly a binomial draw; nothing
    has to be redrawn image by image.
    """
    random = np.random.default_rng(seed)
    groups = np.zeros_like(labels) if metric == "top1" else labels
    right, total = np.bincount(groups, weights=correct), np.bincount(groups)
    right, total = right[total > 0], total[total > 0]
    draws = random.binomial(total, right / total, size=(RESAMPLES, len(total))) / total
    return _middle_95(draws.mean(axis=1))


def bootstrap_ratio(
    hits: Float[np.ndarray, " units"], counts: Float[np.ndarray, " units"], *, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `hits.sum() / counts.sum()` when whole units (an image and its captions) are redrawn."""
    random = np.random.default_rng(seed)
    units = len(hits)
    draws = np.empty(RESAMPLES)
    step = max(1, 10_000_000 // units)  # bounds the memory of the redrawn rows
    for start in range(0, RESAMPLES, step):
        rows = random.integers(0, units, size=(min(step, RESAMPLES - start), units))
        draws[start : start + step] = hits[rows].sum(axis=1) / counts[rows].sum(axis=1)
    return _middle_95(draws)


def _middle_95(draws: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
