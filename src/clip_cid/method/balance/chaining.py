"""How much chaining there is: a set joined link by link may hold rows that are far apart."""

import numpy as np

from clip_cid import units
from clip_cid.method.balance.set_explanation import Explanation
from clip_cid.method.distances import from_squared
from clip_cid.summaries import Chains, Giant

GIANT_BEYOND = 0.1
"""At least this share of a giant's removed rows is farther than the threshold from the kept one."""
GIANT_SIZES = ((0.01, 10), (0.001, 100))
"""A giant has at least this share of all rows and at least this many, by one of these pairs."""

_TOP = 10
_QUANTILES = (0.5, 0.9, 0.99)


def chain_summary(explanation: Explanation, *, rows: int, squared: float, metric: str) -> Chains:
    """The chaining that the explanation of all sets shows.

    Args:
        explanation: Of all sets.
        rows: How many rows were balanced.
        squared: The threshold, a squared distance.
        metric: The scale of the distances in the answer.
    """
    to_kept = explanation.to_kept[explanation.removed]
    distances = from_squared(to_kept, metric)
    quantiles = {f"{share:g}": float(np.quantile(distances, share)) for share in _QUANTILES if len(distances)}
    return Chains(
        beyond_threshold_share=float((to_kept > squared).mean()) if len(to_kept) else 0.0,
        distance=quantiles | ({"max": float(distances.max())} if len(distances) else {}),
        largest=int(explanation.size.max(initial=1)),
        top_sizes=np.sort(explanation.size)[::-1][:_TOP].tolist(),
        giants=_giants(explanation, rows, squared, metric),
    )


def giant_warning(chains: Chains, *, metric: str, threshold: float) -> str | None:
    """A sentence about the giants; None when there is none."""
    if not chains.giants:
        return None
    first = chains.giants[0]
    return (
        f"{units.counted(len(chains.giants), 'set')} of chained images: the largest has {first.size:,} images"
        f" ({units.percent(first.share_of_rows)} of all), and"
        f" {units.percent(first.beyond_threshold_share, 0)} of its removed images are farther than {threshold:g}"
        f" from the kept one (up to {first.farthest:.3g}, {metric.replace('_', ' ')})"
    )


def _giants(explanation: Explanation, rows: int, squared: float, metric: str) -> list[Giant]:
    beyond = np.bincount(explanation.owner[explanation.to_kept > squared], minlength=len(explanation.group))
    size = explanation.size
    share = beyond / np.maximum(size - 1, 1)
    large = np.any([(size >= part * rows) & (size >= least) for part, least in GIANT_SIZES], axis=0)
    giants = np.flatnonzero(large & (share >= GIANT_BEYOND))

    largest_first = giants[np.argsort(-size[giants], kind="stable")]
    farthest = from_squared(explanation.farthest[largest_first], metric)
    widest = from_squared(explanation.widest[largest_first], metric)
    return [
        Giant(
            set=int(explanation.group[at]),
            size=int(size[at]),
            share_of_rows=float(size[at] / rows),
            beyond_threshold_share=float(share[at]),
            farthest=float(farthest[place]),
            widest=float(widest[place]),
        )
        for place, at in enumerate(largest_first.tolist())
    ]
