"""Short codes of vectors, and how wrong a product of two codes may be.

Balance and cluster both compare codes first, because their products are cheap. They compute exactly only
where the codes cannot decide.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped

from clip_cid.method.unit_rows import FLOAT32_ERROR, product_error

CodeType = Literal["int8", "float32", "float16"]

LEVELS = 127
ROUNDING = 2.0**-20  # more than float32 loses in an error or a residual, and float64 in the exact distance


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
        codes, errors = encode(torch.from_numpy(short), torch.tensor(self.step, dtype=torch.float32), self.kind)
        return codes.numpy(), errors.numpy()

    @property
    def unit(self) -> float:
        """The cosine of one unit of a product of codes."""
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
        return (least - self.slack - ROUNDING - left * (1 + right) - right - self.product_error) / self.unit


def encode(
    rows: Float32[torch.Tensor, "n width"], step: Float32[torch.Tensor, "*_"], kind: CodeType
) -> tuple[Shaped[torch.Tensor, "n width"], Float32[torch.Tensor, " n"]]:
    """Codes, and the length of what each lacks, rounded up; `step` is one number, or one for each row."""
    if kind == "float32":
        return rows, torch.zeros(len(rows))
    if kind == "int8":
        units = (rows / step).round_().clamp_(-LEVELS, LEVELS)
        codes, missed = units.to(torch.int8), torch.addcmul(rows, units, step, value=-1)
    else:
        codes = rows.half()
        missed = rows - codes.float()
    return codes, torch.linalg.vector_norm(missed, dim=1) * (1 + ROUNDING) + ROUNDING


def coding_for(kind: CodeType, short: Float32[np.ndarray, "n width"], slack: float) -> Coding:
    """A coding of rows like these; of int8 the finest at which none of them is cut off."""
    step = float(np.abs(short).max()) / LEVELS if kind == "int8" else 1.0
    return Coding(kind, short.shape[1], float(np.float32(step)), slack)
