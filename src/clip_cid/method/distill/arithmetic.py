"""In which precision the losses multiply, and in which they look at a logit."""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

LossPrecision = Literal["auto", "fp32", "bf16"]

_chosen: ContextVar[LossPrecision] = ContextVar("loss_precision", default="auto")


@dataclass(frozen=True)
class Arithmetic:
    """How a loss is computed; `loss_precision` in docs/method.md.

    Statistics of a row are in float64 anyhow: they are few.
    """

    rounded_to: torch.dtype | None
    """What rows, centers and slopes are rounded to before they are multiplied; sums are in float32. None is not at all."""
    per_logit: torch.dtype
    """The type of what is computed from each logit and of its sums: float64 on the CPU, where it costs little."""

    def row_sums(self, values: Float[Tensor, "batch some"]) -> Float64[Tensor, " batch"]:
        return values.sum(dim=1, dtype=self.per_logit).double()

    @property
    def unrounded(self) -> "Arithmetic":
        """For products that cancel afterwards."""
        return Arithmetic(None, self.per_logit)


@contextlib.contextmanager
def loss_precision(precision: LossPrecision) -> Generator[None]:
    """The losses computed in the block have this precision.

    Args:
        precision: `fp32`; `bf16` for products of rows rounded to bfloat16, added up in float32; `auto` for `bf16` on
            CUDA and `fp32` elsewhere. Rows in float64 stay in it.
    """
    before = _chosen.set(precision)
    try:
        yield
    finally:
        _chosen.reset(before)


def arithmetic_of(rows: Tensor) -> Arithmetic:
    """The arithmetic of losses of these rows, by their type, their device and `loss_precision`."""
    if rows.dtype == torch.float64:
        return Arithmetic(None, torch.float64)
    rounds = _chosen.get() == "bf16" or (_chosen.get() == "auto" and rows.device.type == "cuda")
    # float64 is slow on a device (1/64 of float32's rate on many), and of no use beside rounded products.
    of_logits = torch.float32 if rounds or rows.device.type != "cpu" else torch.float64
    return Arithmetic(torch.bfloat16 if rounds else None, of_logits)
