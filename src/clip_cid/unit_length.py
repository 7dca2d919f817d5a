"""Whether stored vectors are unit vectors: one tolerance for every reader of embeddings and centers."""

from typing import Any

NORM_TOLERANCE = 1e-2
"""float16 changes the length of a unit vector by less than 1e-3; a larger error means a wrong vector."""


def is_unit(lengths: Any) -> Any:
    """Which of an array or a tensor of lengths are 1 within the tolerance; NaN is not."""
    return abs(lengths - 1) <= NORM_TOLERANCE
