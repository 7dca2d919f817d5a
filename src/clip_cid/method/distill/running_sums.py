"""Sums of exponentials for each row, added up block by block over the centers and joined over ranks; in float64."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64
from torch import Tensor

from clip_cid.method.distill.arithmetic import Arithmetic

_FAR = 30.0  # beyond it -1 is nothing beside the exponential


@dataclass
class LogSum:
    """The logarithm of a sum of exponentials that is still being added up: `total` times exp(`top`)."""

    top: Float64[Tensor, " batch"]
    total: Float64[Tensor, " batch"]
    by_triton: bool = False

    @classmethod
    def empty(cls, rows: int, device: torch.device, *, by_triton: bool = False) -> "LogSum":
        return cls(_filled(rows, -math.inf, device), _filled(rows, 0.0, device), by_triton)

    def add(
        self, logits: Float[Tensor, "batch some"], largest: Float[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch 1"]:
        """Add exp(logits), which become exp(logits - top).

        Args:
            logits: Of a block; overwritten.
            largest: The largest logit of each row, if it is known.

        Returns:
            The factor by which sums relative to the older `top` must be multiplied.
        """
        if self.by_triton:
            from clip_cid.method.distill import triton_kernels  # not installed everywhere

            return triton_kernels.add_to_log_sum(logits, self.top, self.total)[:, None]

        largest = logits.amax(dim=1) if largest is None else largest
        least = torch.finfo(logits.dtype).min  # a row without logits: -inf - -inf would be no number
        highest = torch.maximum(self.top, largest.clamp(min=least).double())
        rescale = torch.where(self.total > 0, (self.top - highest).exp(), 0.0)

        logits.sub_(highest.to(logits.dtype)[:, None]).exp_()
        self.top, self.total = highest, self.total * rescale + logits.sum(dim=1).double()
        return rescale.to(logits.dtype)[:, None]

    def across(self, group: dist.ProcessGroup | None) -> Float64[Tensor, " batch"]:
        """The logarithm; of the sum over all ranks if there are some."""
        if group is not None:
            top = self.top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            self.top, self.total = top, _at(top, self.total, self.top, self.total)
            dist.all_reduce(self.total, group=group)
        return self.top + self.total.log()


class Comparison:
    r"""Two distributions p and q over the centers; the logits of q are those of p, a, less the gaps g.

    .. math:: KL(p \| q) = E_p[g - c] + \log(1 + E_p[expm1(c - g)])

    for any c, here one near the mean gap. In float32 a difference of two log-softmaxes is wrong by 0.6 % to
    several times the value once the divergence is below 1e-3. Here the terms that cancel are of the order of
    the gaps' spread. They come from the same weights on both sides.

    Args:
        reference: c of each row.
        arithmetic: Of each logit; sums over blocks are in float64.
    """

    def __init__(self, reference: Float[Tensor, " batch"], arithmetic: Arithmetic) -> None:
        rows, device = len(reference), reference.device
        self._reference, self._arithmetic = reference, arithmetic
        self.top: Float64[Tensor, " batch"] = _filled(rows, -math.inf, device)
        self.total: Float64[Tensor, " batch"] = _filled(rows, 0.0, device)
        self._gap: Float64[Tensor, " batch"] = _filled(rows, 0.0, device)
        self._excess: Float64[Tensor, " batch"] = _filled(rows, 0.0, device)

    def add(
        self, logits: Float[Tensor, "batch some"], gaps: Float[Tensor, "batch some"]
    ) -> tuple[Float[Tensor, "batch some"], Float[Tensor, "batch 1"]]:
        """Add a block, which is overwritten.

        Returns:
            w expm1(c - g) with w = exp(a - top), and the factor by which older sums of it must be multiplied.
        """
        if self._arithmetic.triton:
            from clip_cid.method.distill import triton_kernels  # not installed everywhere

            sums = self.top, self.total, self._gap, self._excess
            return gaps, triton_kernels.add_to_comparison(logits, gaps, self._reference, sums)[:, None]

        highest = torch.maximum(self.top, logits.amax(dim=1).double())
        rescale = torch.where(self.total > 0, (self.top - highest).exp(), 0.0)

        kind, row_sums = self._arithmetic.per_logit, self._arithmetic.row_sums
        shifted = logits.to(kind).sub_(highest.to(kind)[:, None])
        below = gaps.neg_().add_(self._reference[:, None]).to(kind)  # c - g

        # A center that weighs e^-90 in p, which is nothing in float32, may weigh much in q.
        far = None
        if kind != torch.float64:
            far = torch.where(below > _FAR, (shifted + below).exp_(), 0.0)

        weights = shifted.exp_()
        self.top, self.total = highest, self.total * rescale + row_sums(weights)
        self._gap = self._gap * rescale - torch.linalg.vecdot(weights, below).double()
        if far is None:
            excess = below.expm1_().mul_(weights)
        else:
            excess = torch.where(far > 0, far, below.clamp_(max=_FAR).expm1_().mul_(weights))
        self._excess = self._excess * rescale + row_sums(excess)
        return excess, rescale[:, None]

    def across(self, group: dist.ProcessGroup | None) -> None:
        """Join the sums of all ranks, which have the same `reference`."""
        if group is None:
            return
        top = self.top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        sums = torch.stack([_at(top, value, self.top, self.total) for value in (self.total, self._gap, self._excess)])
        dist.all_reduce(sums, group=group)
        self.top, (self.total, self._gap, self._excess) = top, sums

    @property
    def log_total(self) -> Float64[Tensor, " batch"]:
        """The logarithm of the sum of exp(a)."""
        return self.top + self.total.log()

    @property
    def mean(self) -> Float64[Tensor, " batch"]:
        """E_p[g]."""
        return self._reference + self._gap / self.total

    def rate(self, kl: Float64[Tensor, " batch"]) -> Float64[Tensor, " batch"]:
        """E_p[expm1(c - g)], from the divergence, which is right where the exponentials overflow."""
        return torch.expm1(kl - self._gap / self.total)

    def divergence(self, log_total_q: Float64[Tensor, " batch"]) -> Float64[Tensor, " batch"]:
        """KL(p || q) in nats; a large one, or one whose exponentials overflow, from the two logarithms."""
        near = self._gap / self.total + torch.log1p(self._excess / self.total)
        far = self.mean + log_total_q - self.log_total
        return torch.where((far > 1) | ~near.isfinite(), far, near.clamp(min=0))


def _filled(rows: int, value: float, device: torch.device) -> Tensor:
    return torch.full((rows,), value, dtype=torch.float64, device=device)


def _at(highest: Tensor, value: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """A sum that was relative to `top`, relative to `highest`; an empty one has no top."""
    return torch.where(total > 0, value * (top - highest).exp(), 0.0)
