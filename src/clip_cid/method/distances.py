"""Distances of unit vectors: the three scales of a threshold, and the squared distance that decides."""

import math
from typing import Literal, TypeVar, cast, get_args

import numpy as np
from jaxtyping import Float

Metric = Literal["cosine", "squared_euclidean", "euclidean"]
LARGEST: dict[Metric, float] = {"cosine": 2.0, "squared_euclidean": 4.0, "euclidean": 2.0}
"""The largest distance there is on each scale."""

Distance = TypeVar("Distance", float, np.ndarray)


def squared_distances(
    left: Float[np.ndarray, "*left dim"], right: Float[np.ndarray, "*right dim"]
) -> Float[np.ndarray, "*left"]:
    """The distance that decides, from the differences: equal rows are at exactly 0, small distances stay exact.

    The rows on the right may be fewer, where numpy repeats them.
    """
    difference = left - right
    difference *= difference
    return difference.sum(axis=-1)


def from_squared(squared: Distance, metric: str) -> Distance:
    """Squared Euclidean distances of unit vectors on the scale of `metric`; 0 is 0 on each.

    Raises:
        ValueError: There is no such metric.
    """
    if metric == "squared_euclidean":
        return squared
    if metric == "euclidean":
        return cast(Distance, np.sqrt(squared) if isinstance(squared, np.ndarray) else math.sqrt(squared))
    if metric == "cosine":
        return squared / 2
    raise ValueError(_unknown(metric))


def to_squared(distance: Distance, metric: str) -> Distance:
    """Distances on the scale of `metric` as squared Euclidean ones.

    Raises:
        ValueError: There is no such metric.
    """
    if metric == "squared_euclidean":
        return distance
    if metric == "euclidean":
        return distance * distance
    if metric == "cosine":
        return distance * 2
    raise ValueError(_unknown(metric))


def threshold_on(metric_from: Metric, threshold: float, metric_to: Metric) -> float:
    r"""The same threshold on another scale; `threshold_scales` in docs/method.md.

    .. math:: 1 - \cos = \tfrac12 d^2 \text{ for unit vectors at Euclidean distance } d

    Raises:
        ValueError: `threshold` is not above 0 and below the largest distance there is.
    """
    for metric in (metric_from, metric_to):
        if metric not in LARGEST:
            raise ValueError(_unknown(metric))

    largest = LARGEST[metric_from]
    if isinstance(threshold, str):
        raise ValueError(f"threshold must be a number, got {threshold!r}")
    if not 0 < threshold < largest:
        raise ValueError(f"threshold must be above 0 and below {largest:g} for metric {metric_from}, got {threshold}")

    if metric_from == metric_to:
        return float(threshold)
    return float(from_squared(to_squared(float(threshold), metric_from), metric_to))


def threshold_for(squared: float, metric: Metric) -> float:
    """The smallest threshold on the scale of `metric` that is not below a squared one: a root is rounded up."""
    threshold = from_squared(squared, metric)
    while threshold > 0 and threshold_on(metric, threshold, "squared_euclidean") < squared:
        threshold = math.nextafter(threshold, math.inf)
    return threshold


def _unknown(metric: str) -> str:
    return f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}"
