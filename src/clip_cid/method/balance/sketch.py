"""Short codes of unit rows that never miss a near pair: two codes give an upper bound of the cosine."""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy import linalg

from clip_cid.method.codes import ROUNDING
from clip_cid.method.unit_rows import FLOAT32_ERROR, product_error

_POWER_ROUNDS = 2
_SPARE_DIRECTIONS = 16
_SUMMED = 256  # columns of a product that float32 adds up at once: shorter sums lose less


@dataclass(frozen=True, eq=False)
class Sketch:
    r"""Maps a unit row to a shorter vector; `sketch_bound` in docs/method.md.

    .. math:: z = W x + \sqrt{1 - |W x|^2}\, q, \qquad x \cdot y \le z_x \cdot z_y

    W has orthonormal rows and q is the one direction that they leave free, so z holds the projection of x and the
    length of what is left of it. By Cauchy-Schwarz what is left of two rows adds at most the product of the lengths.
    Computed in float32 the bound holds up to `slack`.
    """

    basis: Float32[np.ndarray, "width dim"]
    """W: principal directions in random coordinates, so that no coordinate of z is much larger than the others."""
    rest: Float32[np.ndarray, " width"]
    """q; zeros if W is square and nothing is left."""

    @property
    def width(self) -> int:
        return len(self.basis)

    @property
    def error(self) -> float:
        """How far a computed W x may be from the exact one."""
        terms = min(_SUMMED, self.basis.shape[1]) + math.ceil(self.basis.shape[1] / _SUMMED)
        return math.sqrt(self.width) * (product_error(terms) + 2 * FLOAT32_ERROR)

    @property
    def slack(self) -> float:
        """The error of the float32 bound: that of both projections, and of both along q."""
        return 4 * self.error + self.error**2 + ROUNDING

    def project(self, rows: Float32[np.ndarray, "n dim"]) -> Float32[np.ndarray, "n width"]:
        """W x, whose distances do not exceed those of the rows."""
        short = rows[:, :_SUMMED] @ self.basis[:, :_SUMMED].T
        for start in range(_SUMMED, rows.shape[1], _SUMMED):
            short += rows[:, start : start + _SUMMED] @ self.basis[:, start : start + _SUMMED].T
        return short

    def complete(self, projected: Float32[np.ndarray, "n width"]) -> Float32[np.ndarray, "n width"]:
        """z, with what is left taken as large as it may be."""
        square = (projected * projected).sum(axis=1) - (2 * self.error + self.error**2 + ROUNDING)
        left = np.sqrt(np.clip(1 - square, 0, None))
        return projected + left[:, None] * self.rest


def principal_directions(rows: Float[np.ndarray, "n dim"], count: int) -> Float64[np.ndarray, "count dim"]:
    """Orthonormal directions with most of the rows' length, largest first (randomized subspace iteration)."""
    dim = rows.shape[1]
    guess = np.random.default_rng(0).standard_normal((dim, min(dim, count + _SPARE_DIRECTIONS)), dtype=np.float32)
    rows = rows.astype(np.float32, copy=False)

    for again in range(_POWER_ROUNDS):
        if again:
            guess = _orthonormal(guess)
        guess = rows.T @ (rows @ guess)

    # Within the space that these span, the directions in the order of their importance.
    q = _orthonormal(guess.astype(np.float64))
    short = rows @ q.astype(np.float32)
    _, turn = np.linalg.eigh((short.T @ short).astype(np.float64))
    directions = q @ turn[:, ::-1][:, :count]  # orthonormal as both are
    return np.ascontiguousarray(directions.T)


def _orthonormal(columns: Float[np.ndarray, "dim count"]) -> Float[np.ndarray, "dim count"]:
    """In the type of the columns: numpy's would take four times as long for float32, which it turns into float64."""
    return cast(np.ndarray, linalg.qr(columns, mode="economic", overwrite_a=True, check_finite=False)[0])


def make_sketch(directions: Float64[np.ndarray, "count dim"], width: int) -> Sketch:
    """A sketch of `width` numbers from the first directions: `width - 1`, or all if they span the space."""
    dim = directions.shape[1]
    whole = width >= dim
    kept = directions[: dim if whole else width - 1]
    if len(kept) < (dim if whole else width - 1):
        raise ValueError(f"width must be at most {len(directions) + 1}, got {width}")
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((len(kept) + (not whole),) * 2))
    rest = np.zeros(len(turn)) if whole else turn[:, -1].copy()
    basis = np.ascontiguousarray(turn[:, : len(kept)] @ kept, dtype=np.float32)
    return Sketch(basis, rest.astype(np.float32))
