"""In which precision the losses multiply, and in which they look at a logit."""

import contextlib
import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

LossPrecision = Literal["auto", "fp32", "bf16"]
LossKernels = Literal["auto", "torch", "triton"]

_precision: ContextVar[LossPrecision] = ContextVar("loss_precision", default="auto")
_kernels: ContextVar[LossKernels] = ContextVar("loss_kernels", default="auto")


@dataclass(frozen=True)
class Arithmetic:
    """How a loss is computed; `loss_precision` in docs/method.md.

    Statistics of a row are in float64 anyhow: they are few.
    """

    rounded_to: torch.dtype | None
    """What rows, centers and slopes are rounded to before they are multiplied; sums are in float32. None is not at all."""
    per_logit: torch.dtype
    """The type of what is computed from each logit and of its sums: float64 on the CPU, where it costs little."""
    triton: bool = False
    """Whether a block of logits is one Triton kernel's work, and not that of a dozen operations of PyTorch."""

    def row_sums(self, values: Float[Tensor, "batch some"]) -> Float64[Tensor, " batch"]:
        return values.sum(dim=1, dtype=self.per_logit).double()

    @property
    def unrounded(self) -> "Arithmetic":
        """For products that cancel afterwards."""
        return replace(self, rounded_to=None)


@contextlib.contextmanager
def loss_precision(precision: LossPrecision, kernels: LossKernels = "auto") -> Generator[None]:
    """The losses computed in the block have this precision, and come from these kernels.

    Args:
        precision: `fp32`; `bf16` for products of rows rounded to bfloat16, added up in float32; `auto` for `bf16` on
            CUDA and `fp32` elsewhere. Rows in float64 stay in it.
        kernels: What computes from logits: `torch`, `triton`, or `auto` for Triton on CUDA where it is installed.
    """
    before = _precision.set(precision), _kernels.set(kernels)
    try:
        yield
    finally:
        _precision.reset(before[0])
        _kernels.reset(before[1])


def arithmetic_of(rows: Tensor) -> Arithmetic:
    """The arithmetic of losses of these rows, by their type, their device and `loss_precision`.

    Raises:
        ValueError: Triton was asked for by name and cannot be used.
    """
    if rows.dtype == torch.float64:
        return Arithmetic(None, torch.float64)
    precision, kernels, on_cuda = _precision.get(), _kernels.get(), rows.device.type == "cuda"
    rounds = precision == "bf16" or (precision == "auto" and on_cuda)
    # float64 is slow on a device (1/64 of float32's rate on many), and of no use beside rounded products.
    of_logits = torch.float32 if rounds or rows.device.type != "cpu" else torch.float64

    reason = None if kernels == "torch" else why_no_triton(rows.device)
    if kernels == "triton" and reason is not None:
        raise ValueError(f"kernels must not be triton: {reason}")
    by_triton = kernels == "triton" or (kernels == "auto" and on_cuda and reason is None)
    return Arithmetic(torch.bfloat16 if rounds else None, torch.float32 if by_triton else of_logits, by_triton)


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot be used; None if they can."""
    if not _has_triton():
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # as its tests do on a CPU
        return f"it needs CUDA, and the device is {device}"
    return _what_triton_cannot_build() if device.type == "cuda" else None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _what_triton_cannot_build() -> str | None:
    """What is missing for the C code that Triton compiles before it first runs a kernel; None if nothing is."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "it needs a C compiler: gcc, clang, or one that CC names"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does on Debian
    if not (header := Path(sysconfig.get_path("include", scheme)) / "Python.h").is_file():
        return f"it needs {header}, which is in the package python3-dev"
    return None
