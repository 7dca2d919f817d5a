"""The cells to compare each row with, so that no near pair is missed."""

import math

import numpy as np
from jaxtyping import Bool, Float32, Int

from clip_cid.method.unit_rows import product_error

_SCORES = 1 << 18  # numbers that stay in the cache


class Windows:
    r"""The cell of each row, and the cells it has to be compared with; `cell_windows` in docs/method.md.

    Two rows at most eps apart, of cells A and B, cannot both be farther than eps / 2 from the plane half way between
    the two centers: each row visits the cells whose plane is that near, and one of the two visits the other's cell.
    A cell need not be the nearest for this to hold.
    """

    def __init__(self, centers: Float32[np.ndarray, "cells width"], limit: float, error: float) -> None:
        """`error` is how far a projected row may be from its exact projection."""
        exact = centers.astype(np.float64)
        squares = (exact * exact).sum(axis=1)
        apart = np.sqrt(np.clip(squares[:, None] + squares[None, :] - 2 * exact @ exact.T, 0, None) + 1e-12)

        half = math.sqrt(limit) / 2
        # Of two scores: the row's error, that of a float32 product, and some roundings of numbers up to 3.
        margin = 2 * (error + product_error(centers.shape[1]) * (1 + error) + 2.0**-20) * max(1.0, squares.max() ** 0.5)

        self._centers, self._half_squares = centers, (squares / 2).astype(np.float32)
        self._reach = (half * apart * (1 + 1e-6) + margin).astype(np.float32)

    def __call__(
        self, projected: Float32[np.ndarray, "n width"]
    ) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, "n cells"]]:
        """The cell of each row, and which cells it visits."""
        at_once = max(8, _SCORES // len(self._centers))
        if len(projected) > at_once:
            parts = [self(projected[start : start + at_once]) for start in range(0, len(projected), at_once)]
            return np.concatenate([home for home, _ in parts]), np.concatenate([visits for _, visits in parts])

        scores = projected @ self._centers.T
        scores -= self._half_squares
        home = scores.argmax(axis=1)
        scores -= scores[np.arange(len(scores)), home][:, None]
        scores += self._reach[home]
        return home, scores >= 0
