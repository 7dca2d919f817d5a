"""What the losses do with a block of logits, each in one Triton kernel: the matrix products stay the library's.

A program has one row and goes over the block's columns some at a time: once for the largest, once for the exponentials.
Rows keep their logarithm of a sum of exponentials as `total` times exp(`top`), in float64, and it grows block by block.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64
from torch import Tensor

_COLUMNS = 1024  # at a time
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}  # said, because the default changes with Triton 3.10


@triton.jit
@no_type_check
def _expm1(x):
    """exp(x) - 1, to float32's precision: a series near 0, where the difference would cancel."""
    series = 1.0 + x / 8
    for divisor in tl.static_range(7, 1, -1):
        series = 1.0 + x / divisor * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
@no_type_check
def _largest(row_ptr, count, columns: tl.constexpr):
    """The largest logit of a row."""
    best = tl.full([columns], float("-inf"), tl.float32)
    for start in range(0, count, columns):
        at = start + tl.arange(0, columns)
        best = tl.maximum(best, tl.load(row_ptr + at, mask=at < count, other=float("-inf")))
    return tl.max(best, axis=0)


@triton.jit
@no_type_check
def _raise_top(top_ptr, total_ptr, rescale_ptr, row, best):
    """The new top of a row, which may rise with this block, and the factor of what was added up before."""
    top, total = tl.load(top_ptr + row), tl.load(total_ptr + row)
    highest = tl.maximum(top.to(tl.float32), tl.maximum(best, -3.0e38))  # of a row without logits, too
    rescale = tl.where(total > 0, tl.exp(tl.where(total > 0, top.to(tl.float32) - highest, 0.0)), 0.0)
    tl.debug_barrier()  # every thread has read the older top
    tl.store(top_ptr + row, highest.to(tl.float64))
    tl.store(rescale_ptr + row, rescale)
    return highest, rescale


@triton.jit
@no_type_check
def _add(sum_ptr, row, rescale, values):
    """Add up in float64 what a block gives."""
    before = tl.load(sum_ptr + row)
    tl.store(sum_ptr + row, before * rescale.to(tl.float64) + tl.sum(values, axis=0).to(tl.float64))


@triton.jit
@no_type_check
def _log_sum(logits_ptr, top_ptr, total_ptr, rescale_ptr, count, stride, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    highest, rescale = _raise_top(top_ptr, total_ptr, rescale_ptr, row, _largest(logits, count, columns))

    total = tl.zeros([columns], tl.float32)
    for start in range(0, count, columns):
        at = start + tl.arange(0, columns)
        weight = tl.exp(tl.load(logits + at, mask=at < count, other=float("-inf")) - highest)
        tl.store(logits + at, weight, mask=at < count)
        total += weight
    _add(total_ptr, row, rescale, total)


@triton.jit
@no_type_check
def _comparison(
    logits_ptr, gaps_ptr, reference_ptr, top_ptr, total_ptr, gap_ptr, excess_ptr, rescale_ptr,
    count, logits_stride, gaps_stride, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits, gaps = logits_ptr + row * logits_stride, gaps_ptr + row * gaps_stride
    highest, rescale = _raise_top(top_ptr, total_ptr, rescale_ptr, row, _largest(logits, count, columns))
    reference = tl.load(reference_ptr + row)

    total = tl.zeros([columns], tl.float32)
    gap = tl.zeros([columns], tl.float32)
    excess = tl.zeros([columns], tl.float32)
    for start in range(0, count, columns):
        at = start + tl.arange(0, columns)
        is_column = at < count
        difference = tl.load(gaps + at, mask=is_column, other=0.0)
        teacher = tl.load(logits + at, mask=is_column, other=float("-inf")) - highest
        weight, below = tl.exp(teacher), reference - difference
        # A center that weighs e^-90 for the teacher, which is nothing in float32, may weigh much for the student. Beyond
        # e^80 the divergence is taken from the logarithms.
        term = tl.where(
            below > 30.0, tl.exp(tl.minimum(teacher + below, 80.0)), weight * _expm1(tl.minimum(below, 30.0))
        )
        tl.store(gaps + at, term, mask=is_column)
        total += weight
        gap -= weight * below
        excess += term
    _add(total_ptr, row, rescale, total)
    _add(gap_ptr, row, rescale, gap)
    _add(excess_ptr, row, rescale, excess)


@triton.jit
@no_type_check
def _kl_slopes(
    logits_ptr, gaps_ptr, teacher_sum_ptr, student_sum_ptr, shift_ptr, rest_ptr,
    count, logits_stride, gaps_stride, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits, gaps = logits_ptr + row * logits_stride, gaps_ptr + row * gaps_stride
    teacher_sum, student_sum = tl.load(teacher_sum_ptr + row), tl.load(student_sum_ptr + row)
    shift, rest = tl.load(shift_ptr + row), tl.load(rest_ptr + row)

    for start in range(0, count, columns):
        at = start + tl.arange(0, columns)
        is_column = at < count
        logit = tl.load(logits + at, mask=is_column, other=float("-inf"))
        gap = tl.load(gaps + at, mask=is_column, other=0.0)
        share, v = tl.exp(logit + gap - teacher_sum), gap - shift - rest
        near = share * _expm1(-tl.maximum(v, -1.0))
        tl.store(gaps + at, tl.where(v < -1.0, tl.exp(logit - student_sum) - share, near), mask=is_column)


@triton.jit
@no_type_check
def _negatives(row_ptr, at, own, count):
    """The logits of a row, without that of its own key."""
    logits = tl.load(row_ptr + at, mask=at < count, other=float("-inf"))
    return tl.where(at == own, -3.0e38, logits)  # not -inf: a batch of one has no negatives


@triton.jit
@no_type_check
def _cross_entropy(logits_ptr, excess_ptr, first, count, stride, columns: tl.constexpr):
    # Nothing is written before the last pass: the threads of a program do not wait for each other between a read and a
    # write, and the one who writes would take a number from those who have not read it yet.
    row = tl.program_id(0).to(tl.int64)
    logits, own = logits_ptr + row * stride, first + row
    own_logit = tl.load(logits + own)

    best = tl.full([columns], float("-inf"), tl.float32)
    for start in range(0, count, columns):
        best = tl.maximum(best, _negatives(logits, start + tl.arange(0, columns), own, count))
    highest = tl.max(best, axis=0)

    total = tl.zeros([columns], tl.float32)
    for start in range(0, count, columns):
        total += tl.exp(_negatives(logits, start + tl.arange(0, columns), own, count) - highest)
    whole = tl.sum(total, axis=0)
    excess = highest - own_logit + tl.log(whole)
    less = tl.exp(-tl.abs(excess))
    lost = tl.where(excess > 0, 1.0, less) / (1.0 + less)
    tl.store(excess_ptr + row, excess)

    for start in range(0, count, columns):
        at = start + tl.arange(0, columns)
        weight = tl.exp(_negatives(logits, at, own, count) - highest)
        tl.store(logits + at, tl.where(at == own, -lost, weight / whole * lost), mask=at < count)


def add_to_log_sum(
    logits: Float[Tensor, "batch some"], top: Float64[Tensor, " batch"], total: Float64[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """`LogSum.add`: top and total grow in place, and the logits become exp(logits - top)."""
    rescale = logits.new_empty(len(logits))
    _run(_log_sum, logits, (top, total, rescale))
    return rescale


def add_to_comparison(
    logits: Float[Tensor, "batch some"],
    gaps: Float[Tensor, "batch some"],
    reference: Float[Tensor, " batch"],
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Float[Tensor, " batch"]:
    """`Comparison.add`: the gaps become the terms; the sums are top, total, gap and excess, and grow in place."""
    rescale = logits.new_empty(len(logits))
    _run(_comparison, (logits, gaps), (reference, *sums, rescale))
    return rescale


def kl_slopes(
    logits: Float[Tensor, "batch some"],
    gaps: Float[Tensor, "batch some"],
    teacher_sum: Float[Tensor, " batch"],
    student_sum: Float[Tensor, " batch"],
    shift: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]],
) -> Float[Tensor, "batch some"]:
    """The slopes q - p of the divergence, in the memory of the gaps; the shift is mean - KL in two parts."""
    _run(_kl_slopes, (logits, gaps), (teacher_sum, student_sum, *shift))
    return gaps


def cross_entropy(logits: Float[Tensor, "some batch"], first: int) -> Float[Tensor, " some"]:
    """The excess of each row; its own key is in column `first`, of the next row in the next. Logits become slopes."""
    excess = logits.new_empty(len(logits))
    _run(_cross_entropy, logits, (excess, first))
    return excess


def _run(kernel: Any, blocks: Tensor | tuple[Tensor, ...], of_rows: tuple[Any, ...]) -> None:
    """One program for each row of blocks of equal shape."""
    blocks = blocks if isinstance(blocks, tuple) else (blocks,)
    rows, count = blocks[0].shape
    if not all(block.stride(1) == 1 and block.dtype == torch.float32 for block in blocks):
        raise ValueError("blocks of logits must be float32 and whole in a row")
    columns = min(_COLUMNS, triton.next_power_of_2(count))
    strides = (block.stride(0) for block in blocks)
    with torch.cuda.device_of(blocks[0]):  # Triton runs on the current device, wherever its arguments are
        kernel[(rows,)](*blocks, *of_rows, count, *strides, columns=columns, **OPTIONS)
