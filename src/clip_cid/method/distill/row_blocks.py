r"""Losses of a batch's rows against all its rows, a block of rows at a time: no B x B logits in memory.

A block has the logits of some rows with all keys, so the softmax of a row is whole in it, and its gradient is known at
once: the logits are computed once, and used up. What stays in memory is of the size of the rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from clip_cid.method.distill.arithmetic import Arithmetic, arithmetic_of
from clip_cid.method.products import product
from clip_cid.method.unit_rows import keep_freed_memory

_CPU_CELLS, _DEVICE_CELLS = 1 << 22, 1 << 26  # logits at a time
_LEAST_ROWS = 16
_LARGEST_EXPONENT = 60.0  # beyond it a weight of the one distribution is nothing, and that of the other may be all


class RowLoss(ABC):
    """What a loss makes of the logits of some rows with all keys."""

    rounds: ClassVar[bool] = True
    """Whether the rows may be rounded before they are multiplied, as `loss_precision` says."""

    @abstractmethod
    def of(
        self, logits: Float[Tensor, "some batch"], rows: slice, own: slice
    ) -> tuple[Float[Tensor, " some"], Float[Tensor, "some batch"]]:
        """The loss of each row, and its slope by each logit.

        Args:
            logits: Overwritten.
            rows: Which of this rank's rows these are.
            own: The columns in which they meet their own pairs, one each.
        """


def mean_over_rows(
    loss: RowLoss,
    queries: Float[Tensor, "rows dim"],
    keys: Float[Tensor, "batch dim"],
    first: int,
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""] | None = None,
    *,
    block_rows: int | None = None,
) -> Float[Tensor, ""]:
    """The mean of a loss of the logits `scale * queries @ keys.T + bias` over the queries.

    Gradients reach `queries`, `keys`, `scale` and `bias`, as far as they require them; they are computed with the loss.
    Besides inputs and gradients it takes a copy of the queries and some blocks of logits, of 16 MiB each on the CPU and
    256 MiB on a device, for a batch of any size.

    Args:
        loss: Of a row.
        queries: Rows of this rank, in float32 or float64 as all that follow.
        keys: Rows of all ranks.
        first: The key of the first query.
        scale: One number.
        bias: One number.
        block_rows: Queries at a time; as many as suit a cache or a device when absent.
    """
    keep_freed_memory()
    inputs = queries, keys, scale, bias
    if not torch.is_grad_enabled():  # else a gradient is computed
        inputs = tuple(None if value is None else value.detach() for value in inputs)
    return _MeanOverRows.apply(*inputs, loss, first, block_rows or _suitable_rows(keys))


class _MeanOverRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        loss: RowLoss,
        first: int,
        block_rows: int,
    ) -> Tensor:
        of_queries, of_keys, of_scale, of_bias = ctx.needs_input_grad[:4]
        losses = queries.new_empty(len(queries))
        to_queries = torch.empty_like(queries) if of_queries or of_scale else None
        to_keys = None
        to_bias = queries.new_zeros(()) if of_bias else None

        rounded_to = arithmetic_of(queries).rounded_to if loss.rounds else None
        scaled, others = scale * queries, keys if rounded_to is None else keys.to(rounded_to)  # once for all blocks
        for rows in _blocks(len(queries), block_rows):
            logits = product(scaled[rows], others.T, rounded_to=rounded_to)
            own = slice(first + rows.start, first + rows.stop)
            losses[rows], slopes = loss.of(logits if bias is None else logits.add_(bias), rows, own)
            if to_queries is not None:
                to_queries[rows] = product(slopes, others, rounded_to=rounded_to)
            if of_keys:
                term = product(slopes.T, scaled[rows], rounded_to=rounded_to)
                to_keys = term if to_keys is None else to_keys.add_(term)
            if to_bias is not None:
                to_bias += slopes.sum()

        ctx.scale, ctx.count = scale, len(queries)
        ctx.sums = (
            to_queries if of_queries else None,
            to_keys,
            (to_queries * queries).sum() if to_queries is not None and of_scale else None,
            to_bias,
        )
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the losses of a batch have no second derivative here")  # it would come out as 0
        share = grad_outputs[0] / ctx.count  # of a row in the mean
        shares = share * ctx.scale, share, share, share
        gradients = (None if total is None else one * total for one, total in zip(shares, ctx.sums, strict=True))
        return (*gradients, None, None, None)


class CrossEntropy(RowLoss):
    r"""How well a row picks its own key out of all.

    .. math:: \log (1 + \sum_{j \ne i} \exp(z_{ij} - z_{ii}))

    The form keeps the digits of a small loss, where `logsumexp - own` would cancel.
    """

    def of(self, logits: Tensor, rows: slice, own: slice) -> tuple[Tensor, Tensor]:
        """See `RowLoss`."""
        if arithmetic_of(logits).triton:
            from clip_cid.method.distill import triton_kernels  # not installed everywhere

            return _softplus(triton_kernels.cross_entropy(logits, own.start)), logits

        ours = logits[:, own].diagonal()
        own_logits = ours.clone()
        ours.fill_(torch.finfo(logits.dtype).min)  # not -inf: a batch of one has no negatives

        slopes = logits.softmax(dim=1)
        log_sum = logits.amax(dim=1) - slopes.amax(dim=1).log()
        excess = log_sum - own_logits
        lost = torch.sigmoid(excess)

        slopes.mul_(lost[:, None])[:, own].diagonal().copy_(-lost)
        return _softplus(excess), slopes


class Sigmoid(RowLoss):
    r"""Each key by itself, a pair or not: :math:`-\sum_j \log \sigma(y_{ij} z_{ij})`.

    Not the softplus of all logits less those of the pairs: a pair with a high logit would lose its digits.
    """

    def of(self, logits: Tensor, rows: slice, own: slice) -> tuple[Tensor, Tensor]:
        """See `RowLoss`."""
        ours = logits[:, own].diagonal()
        ours.neg_()
        losses = _softplus(logits).sum(dim=1)
        logits.sigmoid_()
        ours.neg_()
        return losses, logits


class Divergence(RowLoss):
    r"""KL of the teacher's distribution p over the keys from the student's, q; the teacher learns nothing.

    With the gaps g, the teacher's logits less the student's, and any c, here E_p[g],

    .. math:: KL(p \| q) = E_p[g - c] + \log(1 + E_p[expm1(c - g)]), \qquad
        q_j - p_j = p_j \frac{expm1(c - g_j) - E_p[expm1(c - g)]}{1 + E_p[expm1(c - g)]}

    In float32 a difference of two log-softmaxes is noise once the divergence is small; here what cancels is of the
    order of the gaps' spread. Sums of a row are in float64 on the CPU. Products are not rounded: two that are nearly
    equal, of rows of different widths, are subtracted.

    Args:
        queries: The teacher's rows, in the order of the student's.
        keys: The teacher's rows of all ranks.
        scale: The teacher's factor from cosines to logits.
    """

    rounds = False

    def __init__(
        self, queries: Float[Tensor, "rows teacher"], keys: Float[Tensor, "batch teacher"], scale: Float[Tensor, ""]
    ) -> None:
        self._queries, self._keys = scale.detach() * queries.detach(), keys.detach()
        self._arithmetic = arithmetic_of(self._keys)

    def of(self, logits: Tensor, rows: slice, own: slice) -> tuple[Tensor, Tensor]:
        """See `RowLoss`."""
        teacher = product(self._queries[rows], self._keys.T)
        row_sums = self._arithmetic.row_sums
        p, log_p = _softmax(teacher, self._arithmetic)
        q, log_q = _softmax(logits, self._arithmetic)

        # The gaps less their mean.
        gaps = teacher.sub_(logits)
        mean = row_sums(p * gaps)
        below = gaps.neg_().add_(mean.to(gaps.dtype)[:, None])
        is_near = below.amax(dim=1) <= _LARGEST_EXPONENT

        # Its terms, which are small where the two are near.
        shift = row_sums(p * below)
        terms = below.clamp_(max=_LARGEST_EXPONENT).expm1_().mul_(p)
        excess = row_sums(terms)

        losses = torch.where(is_near, excess.log1p() - shift, mean + log_q - log_p).clamp_(min=0)
        rate, whole = (value.to(p.dtype)[:, None] for value in (excess, 1 + excess))
        slopes = torch.where(is_near[:, None], terms.addcmul_(p, rate, value=-1).div_(whole), q.sub_(p))
        return losses.to(p.dtype), slopes


def _softmax(
    logits: Float[Tensor, "some batch"], arithmetic: Arithmetic
) -> tuple[Float[Tensor, "some batch"], Float64[Tensor, " some"]]:
    """The distribution of each row, and the logarithm of its sum of exponentials."""
    top = logits.amax(dim=1, keepdim=True)
    weights = (logits - top).exp_()
    total = arithmetic.row_sums(weights)
    return weights.div_(total.to(weights.dtype)[:, None]), top[:, 0].double() + total.log()


def _softplus(values: Tensor) -> Tensor:
    """log(1 + exp(x)), in full precision."""
    return F.softplus(values, threshold=40)


def _suitable_rows(keys: Float[Tensor, "batch dim"]) -> int:
    cells = _CPU_CELLS if keys.device.type == "cpu" else _DEVICE_CELLS
    return max(cells // len(keys), _LEAST_ROWS)


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
