"""How well sets agree with true groups, counted over pairs of rows."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class PairAgreement:
    """Precision and recall, and what they are made of."""

    precision: float
    """Share of the pairs in one set that are in one true group; 1 when no set has two rows."""
    recall: float
    """Share of the pairs in one true group that are in one set; 1 when no group has two rows."""
    rows: int
    set_pairs: int
    true_pairs: int
    shared_pairs: int


def agreement(set_of: Int[np.ndarray, " rows"], truth: np.ndarray) -> PairAgreement:
    """Pair precision and recall of sets against true groups; `pair_agreement` in docs/method.md.

    Counted from the table of sets against groups, so no pair is ever listed.

    Args:
        set_of: The set of each row; rows with -1 are left out.
        truth: The true group of each row, of any type that can be sorted.
    """
    if truth.shape != set_of.shape:
        raise ValueError(f"truth must have the shape {set_of.shape} of set_of, got {truth.shape}")
    used = set_of != -1
    _, sets = np.unique(set_of[used], return_inverse=True)
    names, groups = np.unique(truth[used], return_inverse=True)

    cells = sets.astype(np.int64) * max(len(names), 1) + groups
    shared, in_sets, in_groups = (_pairs(np.unique(each, return_counts=True)[1]) for each in (cells, sets, groups))
    return PairAgreement(
        precision=shared / in_sets if in_sets else 1.0,
        recall=shared / in_groups if in_groups else 1.0,
        rows=int(used.sum()),
        set_pairs=in_sets,
        true_pairs=in_groups,
        shared_pairs=shared,
    )


def _pairs(sizes: Int[np.ndarray, " sets"]) -> int:
    return int((sizes * (sizes - 1) // 2).sum())
