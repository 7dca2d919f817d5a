"""Weights that say how strongly each loss pulls, whatever the size of the loss."""

from collections.abc import Mapping

LARGEST_FACTOR = 1e5
"""Losses of the table differ by some 2e4 at most: `feature` at width 1,280 against `clip` at scale 100."""


def weights_by_gradients(weights: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    r"""The weights with which the gradients have the proportions asked for; `gradient_weights` in docs/method.md.

    .. math:: w'_i = w_i \, \min(\max(\bar g / g_i, 1/L), L), \quad \bar g = \sum_i w_i g_i / \sum_i w_i

    So the weighted norms w' g are as w to each other, and their sum is that of w g. This is GradNorm (arXiv
    1711.02257) with alpha = 0, solved instead of learned; for two losses it is the adaptive weight of VQGAN
    (2012.09841).

    Args:
        weights: By loss, none negative.
        norms: Of the gradient of each loss, unweighted. A loss without a norm, or with a norm of 0, keeps its weight.

    Returns:
        A weight for each of `weights`.
    """
    pulling = {name: norm for name, norm in norms.items() if norm > 0 and weights[name] > 0}
    if not pulling:
        return dict(weights)

    total = sum(weights[name] for name in pulling)
    mean = sum(weights[name] / total * norm for name, norm in pulling.items())
    factors = {name: min(max(mean / norm, 1 / LARGEST_FACTOR), LARGEST_FACTOR) for name, norm in pulling.items()}
    return {name: weight * factors.get(name, 1.0) for name, weight in weights.items()}
