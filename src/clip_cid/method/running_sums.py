"""What is known of each row while its centers pass by in blocks, and how such knowledge is put together; in float64."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor

_LARGEST_POWER = 300.0  # the square of its exponential still fits


@dataclass
class LogSum:
    """The logarithm of a sum of exponentials that is still being added up: `total` times exp(`top`)."""

    top: Float64[Tensor, " batch"]
    total: Float64[Tensor, " batch"]

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "LogSum":
        return cls(_filled(rows, -math.inf, device), _filled(rows, 0.0, device))

    def add(self, logits: Float[Tensor, "batch some"]) -> Float[Tensor, "batch 1"]:
        """Add exp(logits), which become exp(logits - top); returns what older sums relative to `top` are to be times."""
        least = torch.finfo(logits.dtype).min  # a row without any: -inf - -inf would be no number
        highest = torch.maximum(self.top, logits.amax(dim=1).clamp_(min=least).double())
        shrunk = torch.where(self.total > 0, (self.top - highest).exp(), 0.0)
        logits.sub_(highest.to(logits.dtype)[:, None]).exp_()
        self.top, self.total = highest, self.total * shrunk + logits.sum(dim=1).double()
        return shrunk.to(logits.dtype)[:, None]

    def across(self, group: dist.ProcessGroup | None) -> Float64[Tensor, " batch"]:
        """The logarithm; of the sum over all ranks where there are some."""
        if group is not None:
            top = self.top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            self.top, self.total = top, _at(top, self.total, self.top)
            dist.all_reduce(self.total, group=group)
        return self.top + self.total.log()


@dataclass(frozen=True)
class Comparison:
    r"""Two distributions p and q over the centers seen so far, from the logits a of p and the gaps g by which q's are less.

    .. math:: KL(p \| q) = \log(1 + E_p[h(g - E_p[g])]), \qquad h(u) = e^{-u} - 1 + u \ge 0

    Exact, and without the cancellation of two log-softmaxes: in float32 their difference is wrong by 0.6 % to several
    times the value once the divergence is below 1e-3. Here no term is negative, and joining two parts adds none that is.
    """

    top: Float64[Tensor, " batch"]
    """The largest a."""
    total: Float64[Tensor, " batch"]
    """Sum of w = exp(a - top)."""
    mean: Float64[Tensor, " batch"]
    """Mean gap, weighted by w."""
    log_excess: Float64[Tensor, " batch"]
    """Logarithm of the sum of w h(g - mean)."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "Comparison":
        nothing = -math.inf, 0.0, 0.0, -math.inf
        return cls(*(_filled(rows, value, device) for value in nothing))

    @classmethod
    def of(
        cls, logits: Float[Tensor, "batch some"], gaps: Float64[Tensor, "batch some"]
    ) -> tuple["Comparison", Float64[Tensor, "batch some"]]:
        """Of one block, and its w; in float64, because h of a small number has no digits in float32."""
        top = logits.amax(dim=1).double()
        weights = logits.to(torch.float64, copy=True).sub_(top[:, None]).exp_()
        total = weights.sum(dim=1)
        mean = torch.linalg.vecdot(weights, gaps) / total
        apart = gaps - mean[:, None]
        if bool(apart.amin() < -_LARGEST_POWER):  # a center that is nothing to p may be much to q
            log_excess = torch.logsumexp(logits - top[:, None] + _log_h(apart), dim=1)
        else:
            log_excess = torch.linalg.vecdot(weights, torch.expm1(-apart).add_(apart)).clamp_(min=0).log()
        return cls(top, total, mean, log_excess), weights

    def of_rows(self, rows: Int[Tensor, " some"]) -> "Comparison":
        return Comparison(self.top[rows], self.total[rows], self.mean[rows], self.log_excess[rows])

    def joined(self, other: "Comparison") -> "Comparison":
        """Both about their common mean: with d = mean - part.mean, h(u - d) = e^d h(u) + h(-d) + terms that sum to 0."""
        top = torch.maximum(self.top, other.top)
        weights = [_at(top, part.total, part.top) for part in (self, other)]
        total = weights[0] + weights[1]
        mean = self.mean + (other.mean - self.mean) * _share(weights[1], total)
        log_excess = _filled(len(total), -math.inf, total.device)
        for part in (self, other):
            moved = mean - part.mean
            about = torch.logaddexp(part.log_excess + moved, part.total.log() + _log_h(-moved))
            log_excess = torch.where(part.total > 0, torch.logaddexp(log_excess, part.top - top + about), log_excess)
        return Comparison(top, total, mean, log_excess)

    def across(self, group: dist.ProcessGroup | None) -> "Comparison":
        """Over all ranks, joined in their order and so the same on each."""
        if group is None:
            return self
        mine = torch.stack([self.top, self.total, self.mean, self.log_excess])
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group=group)
        found = Comparison(*every[0])
        for other in every[1:]:
            found = found.joined(Comparison(*other))
        return found

    @property
    def log_total(self) -> Float64[Tensor, " batch"]:
        """The logarithm of the sum of exp(a)."""
        return self.top + self.total.log()

    def divergence(self, log_total_q: Float64[Tensor, " batch"]) -> Float64[Tensor, " batch"]:
        """KL(p || q) in nats; a large one from the two logarithms, where sums of exponentials may have overflowed."""
        far = self.mean + log_total_q - self.log_total
        return torch.where(far > 1, far, torch.log1p((self.log_excess - self.total.log()).exp()))


def _filled(rows: int, value: float, device: torch.device) -> Tensor:
    return torch.full((rows,), value, dtype=torch.float64, device=device)


def _at(highest: Tensor, value: Tensor, top: Tensor) -> Tensor:
    """A sum that was relative to `top`, relative to `highest`; an empty one has no top."""
    return torch.where(value > 0, value * (top - highest).exp(), 0.0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part > 0, part / whole, 0.0)


def _log_h(u: Tensor) -> Tensor:
    """log(exp(-u) - 1 + u), also where the exponential is beyond float64."""
    large = torch.log1p((u - 1) * u.clamp(max=0).exp()) - u
    return torch.where(u < -1, large, (torch.expm1(-u.clamp(min=-1)) + u).clamp(min=0).log())
