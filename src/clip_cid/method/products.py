"""Matrix products: which library multiplies, and in which precision.

It uses oneDNN where PyTorch has it, because on AMD processors it is much faster than the default library. int8
codes give int32. Floats are multiplied in float32 at least, whatever the autocast precision of the student.
"""

import contextlib
import math
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_LEAST_STEP, _SIZES = 32, 8
_ADDS_IN_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")  # from torch 2.8 on CUDA multiplies bfloat16 into float32


class LeftRows:
    """Rows that are to be multiplied with many blocks of others; their layout is changed once.

    Only the library differs from `rows @ others.T`, and only the type and the device choose it: equal inputs
    give equal bits for a number of threads (docs/decisions.md, D33). oneDNN keeps a kernel of more than half
    a MB for every shape, so rows are padded with zeros to a few shapes.

    Args:
        rows: Floats.
        rounded_to: A type of less precision to which both sides are rounded before they are multiplied; products and
            sums are in float32.
    """

    def __init__(self, rows: Float[Tensor, "rows dim"], *, rounded_to: torch.dtype | None = None) -> None:
        self._shape, self._rounded_to = rows.shape, rounded_to
        rows = self._rounded(rows)
        self._rows = _in_room(rows).to_mkldnn() if _by_onednn(rows) else rows

    def times(self, others: Float[Tensor, "others dim"]) -> Float[Tensor, "rows others"]:
        """Each row with each of the others.

        Raises:
            ValueError: The widths differ.
        """
        if others.shape[1] != self._shape[1]:  # zeros beside the narrower would hide it
            raise ValueError(f"others must have the width {self._shape[1]} of the rows, got {others.shape[1]}")
        others = self._rounded(others)
        if self._rows.is_mkldnn:
            products = F.linear(self._rows, _in_room(others).contiguous()).to_dense()
            return products[: self._shape[0], : len(others)]
        if self._rows.dtype == self._rounded_to:
            return torch.mm(self._rows, others.T, out_dtype=torch.float32)
        return self._rows @ others.T

    def _rounded(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        if self._rounded_to is None:
            return rows
        rounded = rows.to(self._rounded_to)
        # Elsewhere the product of rounded values is computed in float32: the same number, and not faster.
        return rounded if rows.device.type == "cuda" and _ADDS_IN_FLOAT32 else rounded.float()


def product(
    left: Float[Tensor, "n k"], right: Float[Tensor, "k m"], *, rounded_to: torch.dtype | None = None
) -> Float[Tensor, "n m"]:
    """`left @ right`; `rounded_to` as in `LeftRows`."""
    return LeftRows(left, rounded_to=rounded_to).times(right.T)


def _by_onednn(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _in_room(values: Float[Tensor, "n k"]) -> Float[Tensor, "n_and_zeros k_and_zeros"]:
    below, beside = (_room(size) - size for size in values.shape)
    return F.pad(values, (0, beside, 0, below)) if below or beside else values


def _room(size: int) -> int:
    """The next larger of some sizes: multiples of 32; from 256 on eight for each power of two (at most 1/8 more)."""
    step = max(_LEAST_STEP, (1 << size.bit_length()) // (2 * _SIZES))
    return max(math.ceil(size / step), 1) * step


def int8_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """(n, width) by (width, m) int8 into int32; with the processor's instructions four times float32's speed."""
    product: Any = getattr(torch, "_int_mm")  # noqa: B009 - torch does not export it
    return product(left, right) if out is None else product(left, right, out=out)


def int8_products_are_right() -> bool:
    """Whether this machine multiplies int8 codes into int32 without overflow, tested at the extremes."""
    for rows, width in ((5, 67), (300, 130)):
        left, right = np.random.default_rng(rows).choice(np.array([-127, -1, 0, 127], np.int8), (2, rows, width))
        left[0], right[0] = 127, -127
        try:
            product = int8_product(torch.from_numpy(left), torch.from_numpy(right).T).numpy()
        except (AttributeError, RuntimeError):  # it is not public in torch, and not everywhere
            return False
        if not np.array_equal(product, left.astype(np.float64) @ right.astype(np.float64).T):
            return False
    return True


@contextlib.contextmanager
def float32_sums() -> Generator[None]:
    """Products on a GPU are added up in full float32, whatever the process has allowed: the error bounds count on it."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction, settings.allow_tf32
    settings.allow_fp16_reduced_precision_reduction, settings.allow_tf32 = False, False
    try:
        yield
    finally:
        settings.allow_fp16_reduced_precision_reduction, settings.allow_tf32 = before


def autocast_off(tensor: Tensor) -> torch.autocast:
    """A region in which matrix products on this tensor's device keep the precision of their inputs."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, so that gradients can be checked in it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
