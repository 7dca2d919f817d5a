"""Short codes of unit rows that never hide a near pair: what two codes say is an upper bound of the rows' cosine."""

import math
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, UInt64
from scipy import linalg

from clip_cid.method.unit_rows import FLOAT32_ERROR, product_error

CodeType = Literal["int8", "float32", "float16"]

_POWER_ROUNDS = 2
_SPARE_DIRECTIONS = 16
_LEVELS = 127
_ROUNDING = 2.0**-20  # more than float32 loses in an error or a residual, and float64 in the exact distance
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
    """q; zeros where W is square and nothing is left."""

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
        """What the float32 bound may lack: the error in both projections, and in both along q."""
        return 4 * self.error + self.error**2 + _ROUNDING

    def project(self, rows: Float32[np.ndarray, "n dim"]) -> Float32[np.ndarray, "n width"]:
        """W x, whose distances do not exceed those of the rows."""
        short = rows[:, :_SUMMED] @ self.basis[:, :_SUMMED].T
        for start in range(_SUMMED, rows.shape[1], _SUMMED):
            short += rows[:, start : start + _SUMMED] @ self.basis[:, start : start + _SUMMED].T
        return short

    def complete(self, projected: Float32[np.ndarray, "n width"]) -> Float32[np.ndarray, "n width"]:
        """z, with what is left taken as large as it may be."""
        square = (projected * projected).sum(axis=1) - (2 * self.error + self.error**2 + _ROUNDING)
        left = np.sqrt(np.clip(1 - square, 0, None))
        return projected + left[:, None] * self.rest


def principal_directions(rows: Float[np.ndarray, "n dim"], count: int) -> Float64[np.ndarray, "count dim"]:
    """Orthonormal directions that hold most of the rows' length, the most important first (randomized subspace rounds)."""
    dim = rows.shape[1]
    guess = np.random.default_rng(0).standard_normal((dim, min(dim, count + _SPARE_DIRECTIONS)), dtype=np.float32)
    rows = rows.astype(np.float32, copy=False)
    for again in range(_POWER_ROUNDS):
        if again:
            guess = _orthonormal(guess)
        guess = rows.T @ (rows @ guess)
    q = _orthonormal(guess.astype(np.float64))
    short = rows @ q.astype(np.float32)
    _, turn = np.linalg.eigh((short.T @ short).astype(np.float64))
    found = q @ turn[:, ::-1][:, :count]  # orthonormal as both are
    return np.ascontiguousarray(found.T)


def _orthonormal(columns: Float[np.ndarray, "dim count"]) -> Float[np.ndarray, "dim count"]:
    """In the type of the columns: numpy's would take four times as long for float32, which it turns into float64."""
    return cast(np.ndarray, linalg.qr(columns, mode="economic", overwrite_a=True, check_finite=False)[0])


def make_sketch(directions: Float64[np.ndarray, "count dim"], width: int) -> Sketch:
    """A sketch of `width` numbers from the first directions: one fewer than `width`, or all where they span the space."""
    dim = directions.shape[1]
    whole = width >= dim
    kept = directions[: dim if whole else width - 1]
    if len(kept) < (dim if whole else width - 1):
        raise ValueError(f"width must be at most {len(directions) + 1}, got {width}")
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((len(kept) + (not whole),) * 2))
    rest = np.zeros(len(turn)) if whole else turn[:, -1].copy()
    basis = np.ascontiguousarray(turn[:, : len(kept)] @ kept, dtype=np.float32)
    return Sketch(basis, rest.astype(np.float32))


@dataclass(frozen=True)
class Coding:
    r"""How z becomes a code c of few bits, and what the products of codes are worth; `code_bound` in docs/method.md.

    .. math:: z \cdot z' \le s^2 c \cdot c' + e (1 + e') + e', \qquad e = |z - s c|

    Each e is measured, not estimated, so the bound holds for rows that the step s does not suit: they are only
    compared more often.
    """

    kind: CodeType
    width: int
    step: float = 1.0
    """s: what one unit of a code is worth."""
    slack: float = 4 * FLOAT32_ERROR
    """What z itself may lack."""

    def encode(self, short: Float32[np.ndarray, "n width"]) -> tuple[np.ndarray, Float32[np.ndarray, " n"]]:
        """Codes, and the error e of each row, rounded up."""
        if self.kind == "float32":
            return short, np.zeros(len(short), dtype=np.float32)
        if self.kind == "int8":
            units = np.clip(np.rint(short / np.float32(self.step)), -_LEVELS, _LEVELS)
            codes, missed = units.astype(np.int8), short - np.float32(self.step) * units
        else:
            codes = short.astype(self.kind)
            missed = short - codes.astype(np.float32)
        return codes, np.sqrt((missed * missed).sum(axis=1)) * np.float32(1 + _ROUNDING) + np.float32(_ROUNDING)

    @property
    def unit(self) -> float:
        """What one unit of a product of codes is worth."""
        return self.step**2

    @property
    def product_error(self) -> float:
        """How far a computed product (times `unit`) may be from the exact one; integers have none."""
        if self.kind == "int8":
            return 0.0
        # Tensor cores add in float32 without IEEE rounding, within a few units; a float16 result is rounded once more.
        return 2.0**-10 + 4 * product_error(self.width) if self.kind == "float16" else product_error(self.width)

    def floor(
        self, least: float, left: Float[np.ndarray, " pairs"], right: Float[np.ndarray, " pairs"]
    ) -> Float[np.ndarray, " pairs"]:
        """The product of codes below which the cosine of rows with these errors is below `least`."""
        return (least - self.slack - _ROUNDING - left * (1 + right) - right - self.product_error) / self.unit


def coding_for(kind: CodeType, short: Float32[np.ndarray, "n width"], slack: float) -> Coding:
    """A coding of rows like these; of int8 the finest at which none of them is cut off."""
    step = float(np.abs(short).max()) / _LEVELS if kind == "int8" else 1.0
    return Coding(kind, short.shape[1], float(np.float32(step)), slack)


def identical_groups(
    hashes: UInt64[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " repeats"], Int[np.ndarray, " repeats"]]:
    """Rows whose hash an earlier row has, and the first row of that hash for each."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = ordered[1:] == ordered[:-1]
    firsts = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
    return order[again], firsts[again]
