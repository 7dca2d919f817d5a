"""One pass of all rows over blocks of centers: losses and gradients, with one block's logits in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clip_cid.devices import Copies, is_at_hand
from clip_cid.method.distill.arithmetic import Arithmetic
from clip_cid.method.distill.running_sums import Comparison, LogSum
from clip_cid.method.products import LeftRows, product

_CPU_CELLS, _DEVICE_CELLS = 1 << 20, 1 << 26  # logits at a time: what stays in a cache, what keeps a device busy
_LEAST_BLOCK = 256
_SAMPLED_CENTERS = 512
_LARGEST_RATE = 16.0  # for a student far from its teacher the terms are huge and may overflow float32
_LARGEST_CANCELLED = 8.0  # a gradient that is the difference of terms this much larger is computed in a second pass


@dataclass(frozen=True)
class SoftCenters:
    r"""What `L_kl` needs of the teacher if all centers take part and are frozen; `soft_centre` in docs/method.md.

    .. math:: \mu_i = \sum_j p_{ij} w_j, \qquad H_i = -\sum_j p_{ij} \log p_{ij}, \qquad p = softmax(\sigma W t / \tau)
    """

    mean: Float[Tensor, "batch dim"]
    """mu: the mean of the centers as the teacher weighs them."""
    entropy: Float64[Tensor, " batch"]
    """H in nats; exp(H) is the teacher's perplexity."""
    sharpness: float
    """The sigma / tau of both."""

    def to(self, copies: Copies) -> "SoftCenters":
        return SoftCenters(copies(self.mean), copies(self.entropy), self.sharpness)


@dataclass(frozen=True)
class PassSettings:
    """How the losses are computed."""

    scale: float
    temperature: float
    cls_correction: Float[Tensor, " centers"] | None
    kl_correction: Float[Tensor, " centers"] | None
    soft: SoftCenters | None
    group: dist.ProcessGroup | None
    block_centers: int
    arithmetic: Arithmetic
    near: "NearCenters | None" = None
    """Centers that are no negatives."""

    @property
    def one_softmax(self) -> bool:
        """Whether both losses read the same distribution of the student."""
        return self.temperature == 1 and self.cls_correction is self.kl_correction


@dataclass(frozen=True)
class NearCenters:
    """Which centers are nearly equal to a label of a row, and so no negatives of it; `near_centers` in docs/method.md.

    The labels of a batch are much fewer than its rows times the labels of a row, so each is compared once.
    """

    own: Float[Tensor, "distinct dim"]
    """The centers that are a label of some row."""
    place: Int[Tensor, "batch labels"]
    """Where each label of a row is among these."""
    cosine: float
    """Above this two centers are nearly equal."""

    def among(self, centers: Float[Tensor, "some dim"]) -> Bool[Tensor, "batch some"]:
        """Which of these centers are near to which row."""
        close = product(self.own, centers.T) > self.cosine
        near = close[self.place[:, 0]]
        for column in range(1, self.place.shape[1]):
            near |= close[self.place[:, column]]
        return near


@dataclass(frozen=True)
class Block:
    """Some of the centers, and their products with all rows."""

    columns: slice
    """Which centers."""
    centers: Float[Tensor, "some dim"]
    """Rounded as `loss_precision` has it."""
    logits: Float[Tensor, "batch some"]
    """sigma times cosines of the student."""
    gaps: Float[Tensor, "batch some"] | None
    """The teacher's logits less the student's, over tau."""
    own_column: Int[Tensor, "batch labels"]
    """The column of each label of a row; any if the label is not in this block."""
    has_own: Bool[Tensor, "batch labels"]
    """Whether the label is in this block."""
    near: Bool[Tensor, "batch some"] | None
    """Centers that are no negatives; None if all are."""

    def softened(self, settings: PassSettings) -> Float[Tensor, "batch some"]:
        """The student's logits in the divergence; may be the block's own memory."""
        if settings.temperature == 1 and settings.kl_correction is None:
            return self.logits
        logits = self.logits / settings.temperature
        return logits if settings.kl_correction is None else logits.sub_(settings.kl_correction[self.columns])

    def corrected(self, settings: PassSettings) -> Float[Tensor, "batch some"]:
        """The student's logits in the cross entropy; may be the block's own memory."""
        if settings.cls_correction is None:
            return self.logits
        return self.logits.sub_(settings.cls_correction[self.columns])

    def put_own(self, matrix: Float[Tensor, "batch some"], values: Float[Tensor, "batch labels"]) -> None:
        """Write a value for each label of a row at its center, if that is in this block."""
        # Every row writes something: which rows have a label here is known on the device only.
        for label in range(values.shape[1]):
            column, here, value = (each[:, label, None] for each in (self.own_column, self.has_own, values))
            matrix.scatter_(1, column, torch.where(here, value, matrix.gather(1, column)))


def blocks(
    student: Tensor, centers: Tensor, labels: Tensor, gap: Tensor | None, settings: PassSettings
) -> Iterator[Block]:
    """The centers in blocks, each with its logits and, if `gap` is given, its gaps."""
    scaled = settings.scale * student
    both = scaled if gap is None else torch.cat([scaled, gap])  # one product reads the centers once
    rows = LeftRows(both, rounded_to=settings.arithmetic.rounded_to)

    for start in range(0, len(centers), settings.block_centers):
        columns = slice(start, min(start + settings.block_centers, len(centers)))
        block = centers[columns].to(student.dtype)
        near = None if settings.near is None else settings.near.among(block)
        if settings.arithmetic.rounded_to is not None:  # once for all products with this block
            block = block.to(settings.arithmetic.rounded_to)

        products = rows.times(block)
        gaps = None if gap is None else products[len(student) :]

        has_own = (labels >= columns.start) & (labels < columns.stop)
        own_column = (labels - start).clamp_(0, len(block) - 1)
        yield Block(columns, block, products[: len(student)], gaps, own_column, has_own, near)


class SoftmaxMean:
    """The softmax-weighted mean of the centers for each row, and the logarithm of the sum of exp(logit).

    Args:
        like: The rows.
        arithmetic: Of the mean.
        with_mean: Whether the mean is added up too.
    """

    def __init__(self, like: Float[Tensor, "batch dim"], arithmetic: Arithmetic, *, with_mean: bool) -> None:
        self._rounded_to = arithmetic.rounded_to
        self.sums = LogSum.empty(len(like), like.device, by_triton=arithmetic.triton)
        self._total = torch.zeros_like(like) if with_mean else None

    def add(
        self,
        logits: Float[Tensor, "batch some"],
        centers: Float[Tensor, "some dim"],
        largest: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """The logits are overwritten; `largest` as in `LogSum.add`."""
        rescale = self.sums.add(logits, largest)
        if self._total is not None:
            self._total.mul_(rescale).add_(product(logits, centers, rounded_to=self._rounded_to))

    def finish(self, group: dist.ProcessGroup | None) -> Float64[Tensor, " batch"]:
        """The logarithm of the sum of exp(logit) over all ranks."""
        top_here = self.sums.top
        log_sum = self.sums.across(group)
        if self._total is not None:
            share = torch.where(log_sum > -math.inf, (top_here - log_sum).exp(), 0.0)
            self._total.mul_(share[:, None].to(self._total.dtype))
            reduce_over(group, self._total, dist.ReduceOp.SUM)
        return log_sum

    @property
    def mean(self) -> Float[Tensor, "batch dim"]:
        """After `finish`."""
        assert self._total is not None
        return self._total


class _Divergence:
    r"""The teacher's side of the divergence, and its gradient in the same pass.

    .. math:: \sum_j (q_j - p_j) w_j = \sum_j p_j\, expm1(c - g_j)\, w_j - E_p[expm1(c - g)] \sum_j q_j w_j

    for any c. With a c near the mean of the gaps g both terms are small, so nothing cancels where p and q are near.
    """

    def __init__(
        self,
        like: Float[Tensor, "batch dim"],
        reference: Float[Tensor, " batch"],
        arithmetic: Arithmetic,
        *,
        with_gradient: bool,
    ) -> None:
        self.sums, self._rounded_to = Comparison(reference, arithmetic), arithmetic.rounded_to
        self._total = torch.zeros_like(like) if with_gradient else None

    def add(self, logits: Float[Tensor, "batch some"], block: Block) -> None:
        """The teacher's logits of a block; they and the block's gaps are overwritten."""
        excess, rescale = self.sums.add(logits, cast(Tensor, block.gaps))
        if self._total is not None:
            dtype = self._total.dtype
            term = product(excess.to(dtype), block.centers, rounded_to=self._rounded_to)
            self._total.mul_(rescale.to(dtype)).add_(term)

    def finish(self, group: dist.ProcessGroup | None) -> Comparison:
        top_here = self.sums.top
        self.sums.across(group)
        if self._total is not None:
            self._total.mul_((top_here - self.sums.log_total).exp()[:, None].to(self._total.dtype))
            reduce_over(group, self._total, dist.ReduceOp.SUM)
        return self.sums

    def slopes(
        self, student_mean: Float[Tensor, "batch dim"], kl: Float64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch dim"], Bool[Tensor, " batch"]]:
        """Sum over the centers of (q - p) w, after `finish`; and the rows in which too many digits cancel."""
        assert self._total is not None
        rate = self.sums.rate(kl)
        subtracted = rate[:, None].to(self._total.dtype) * student_mean
        slopes = self._total - subtracted

        length, subtracted_length = (torch.linalg.vector_norm(term, dim=1) for term in (slopes, subtracted))
        is_exact = (subtracted_length <= _LARGEST_CANCELLED * length) & (rate <= _LARGEST_RATE)  # false for a NaN
        return slopes, ~is_exact


@dataclass(frozen=True)
class RowSums:
    """The results of the pass over all centers for each row; float64."""

    others: Float64[Tensor, " batch"]
    """Logarithm of the sum over the negatives."""
    excess: Float64[Tensor, " batch"]
    """Logarithm of the sum of exp(negative - positive) over all pairs of these: the loss is log(1 + exp(excess)), which
    keeps the digits of a small one."""
    pull: Float64[Tensor, "batch labels"]
    """The share of each label in the gradient: 1 if it is the only one."""
    student_sum: Float64[Tensor, " batch"]
    """Logarithm of the student's sum in the divergence."""
    kl: Float64[Tensor, " batch"]
    teacher_sum: Float64[Tensor, " batch"]
    """Logarithm of the teacher's sum in the divergence; this and the next are 0 without a teacher."""
    mean_gap: Float64[Tensor, " batch"]
    """The teacher's mean of the gaps."""

    def of(self, rows: Int[Tensor, " some"]) -> "RowSums":
        return RowSums(*(getattr(self, field.name)[rows] for field in fields(self)))


class CenterPass:
    """The pass over all centers: the losses of each row and, with `with_gradient`, the gradient of the student."""

    def __init__(
        self,
        student: Tensor,
        centers: Tensor,
        labels: Tensor,
        gap: Tensor | None,
        settings: PassSettings,
        *,
        with_gradient: bool,
    ) -> None:
        self._inputs = student, centers, labels, gap
        self._settings = settings

        # What is added up: the negatives for the cross entropy, all centers for the divergence if these and the own one
        # are not its softmax, and the teacher's side.
        one_softmax = settings.one_softmax and settings.near is None and labels.shape[1] == 1
        self._others = SoftmaxMean(student, settings.arithmetic, with_mean=with_gradient)
        self._student = None if one_softmax else SoftmaxMean(student, settings.arithmetic, with_mean=with_gradient)
        self._divergence = None
        if gap is not None:
            reference = _mean_gap(student, centers, labels, gap, settings)
            self._divergence = _Divergence(student, reference, settings.arithmetic, with_gradient=with_gradient)

        # The pass.
        best_other = student.new_full((len(student),), -math.inf)
        nothing = student.new_full(labels.shape, -math.inf)
        for block in blocks(student, centers, labels, gap, settings):
            self._add_softened(block)
            block.put_own(block.logits, nothing)
            if block.near is not None:
                block.logits.masked_fill_(block.near, -math.inf)
            best = block.logits.amax(dim=1)
            best_other = torch.maximum(best_other, best)
            largest = best if settings.cls_correction is None else None
            self._others.add(block.corrected(settings), block.centers, largest)
        reduce_over(settings.group, best_other, dist.ReduceOp.MAX)

        # Losses, and whether an own center comes first.
        own, own_corrected = _own_logits(student, centers, labels, settings)
        rounding = 4 * torch.finfo(student.dtype).eps * settings.scale
        self.own_first = (own.amax(dim=1) + rounding >= best_other).to(student.dtype)
        self.sums = self._finish(own_corrected)

    def _add_softened(self, block: Block) -> None:
        """The divergence's part of a block."""
        if self._divergence is None and (self._settings.soft is None or self._student is None):
            return
        softened = block.softened(self._settings)
        if self._divergence is not None:
            self._divergence.add(softened + cast(Tensor, block.gaps), block)
        if self._student is not None:
            self._student.add(softened.clone() if softened is block.logits else softened, block.centers)

    def _finish(self, own: Float64[Tensor, "batch labels"]) -> RowSums:
        settings = self._settings
        others = self._others.finish(settings.group)
        if self._student is not None:
            student_sum = self._student.finish(settings.group)
        else:
            student_sum = torch.logaddexp(others, own[:, 0])

        kl = teacher_sum = mean_gap = torch.zeros_like(others)
        if self._divergence is not None:
            compared = self._divergence.finish(settings.group)
            kl, teacher_sum, mean_gap = compared.divergence(student_sum), compared.log_total, compared.mean
        elif (soft := settings.soft) is not None:
            sharpness = settings.scale / settings.temperature
            pull = (self._inputs[0].double() * soft.mean.double()).sum(dim=1) * sharpness
            kl = (student_sum - pull - soft.entropy).clamp_(min=0)
        against = torch.logsumexp(-own, dim=1)
        pull = (-own - against[:, None]).exp()
        return RowSums(others, others + against, pull, student_sum, kl, teacher_sum, mean_gap)

    def gradients(self) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"] | None]:
        """The student's gradients of the mean cross entropy and of the mean divergence."""
        student, centers, labels, gap = self._inputs
        settings, rows = self._settings, len(student)

        # Cross entropy: from the own center to the mean of the others, by their share of the softmax.
        own = _pulling_center(student, centers, labels, self.sums.pull, settings)
        others_share = torch.sigmoid(self.sums.excess).to(student.dtype)[:, None]
        of_cls = (others_share * settings.scale / rows) * (self._others.mean - own)
        if gap is None and settings.soft is None:
            return of_cls, None

        # Divergence: from the teacher's mean of the centers to the student's.
        whole = own + others_share * (self._others.mean - own)
        student_mean = whole if self._student is None else self._student.mean
        if settings.soft is not None:
            slopes = student_mean - settings.soft.mean.to(student.dtype)
        else:
            slopes = self._divergence_slopes(student_mean)
        return of_cls, slopes.mul_(settings.scale / (settings.temperature * rows))

    def _divergence_slopes(self, student_mean: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Sum over the centers of (q - p) w; rows in which too many digits cancel take a second pass."""
        assert self._divergence is not None
        slopes, inexact = self._divergence.slopes(student_mean, self.sums.kl)

        again = inexact.nonzero()[:, 0]
        if len(again):
            student, centers, labels, gap = self._inputs
            sums, one = self.sums.of(again), student.new_ones(())
            exact = torch.zeros_like(student[again])
            settings = replace(self._settings, near=None)  # the divergence reads all centers
            for block in blocks(student[again], centers, labels[again], cast(Tensor, gap)[again], settings):
                slopes_again = cosine_slopes(block, sums, settings, None, one)
                exact += product(slopes_again, block.centers, rounded_to=settings.arithmetic.rounded_to)
            reduce_over(self._settings.group, exact, dist.ReduceOp.SUM)
            slopes[again] = exact * self._settings.temperature
        return slopes


def cosine_slopes(
    block: Block, sums: RowSums, settings: PassSettings, of_cls: Tensor | None, of_kl: Tensor | None
) -> Float[Tensor, "batch some"]:
    """The derivative of the weighted losses by the cosines of a block, whose logits are overwritten."""
    dtype = block.logits.dtype
    slopes = torch.zeros_like(block.logits) if of_kl is None else _kl_slopes(block, sums, settings)
    if of_kl is not None:
        slopes *= of_kl / settings.temperature

    if of_cls is not None:
        others_share = torch.sigmoid(sums.excess).to(dtype)
        softmax = (block.corrected(settings) - sums.others.to(dtype)[:, None]).exp_().mul_(others_share[:, None])
        if block.near is not None:
            softmax.masked_fill_(block.near, 0.0)
        block.put_own(softmax, -others_share[:, None] * sums.pull.to(dtype))
        slopes.addcmul_(softmax, of_cls.expand_as(softmax))
    return slopes


def _kl_slopes(block: Block, sums: RowSums, settings: PassSettings) -> Float[Tensor, "batch some"]:
    """Slopes q - p as p expm1(-v) with v = gap - mean + KL.

    v keeps its digits where p is nearly 1 and the gap is nearly the mean: the mean is not rounded.
    """
    dtype = block.logits.dtype
    logits, mean = block.softened(settings), sums.mean_gap - sums.kl
    if settings.arithmetic.triton:
        from clip_cid.method.distill import triton_kernels  # not installed everywhere

        shift = mean.to(dtype), (mean - mean.to(dtype).double()).to(dtype)
        of_rows = sums.teacher_sum.to(dtype), sums.student_sum.to(dtype)
        return triton_kernels.kl_slopes(logits, cast(Tensor, block.gaps), *of_rows, shift)

    p = (logits + cast(Tensor, block.gaps)).sub_(sums.teacher_sum.to(dtype)[:, None]).exp_()
    v = _less(cast(Tensor, block.gaps), mean, settings.arithmetic)

    far = v < -1  # a student's share of more than e times the teacher's: nothing cancels, and p may be 0
    near = torch.expm1(v.clamp_(min=-1).neg_()).to(dtype).mul_(p)
    if is_at_hand(far) and not bool(far.any()):
        return near
    return torch.where(far, (logits - sums.student_sum.to(dtype)[:, None]).exp_().sub_(p), near)


def _less(
    values: Float[Tensor, "batch some"], of_rows: Float64[Tensor, " batch"], arithmetic: Arithmetic
) -> Float[Tensor, "batch some"]:
    """The values of each row less a number of the row, which has more digits than they may have; they are overwritten."""
    kind = arithmetic.per_logit
    rounded = of_rows.to(kind)
    left = values.to(kind).sub_(rounded[:, None])
    return left if kind == torch.float64 else left.sub_((of_rows - rounded.double()).to(kind)[:, None])


def _mean_gap(
    student: Tensor, centers: Tensor, labels: Tensor, gap: Tensor, settings: PassSettings
) -> Float[Tensor, " batch"]:
    """An estimate of the teacher's mean of the gaps: from a sample of the centers, and each row's own."""
    # The own center, which may weigh most; only where it is on this rank.
    logits: list[Tensor] = []
    gaps: list[Tensor] = []
    if len(centers):
        here = labels[:, :1] >= 0
        own = _centers_of(labels[:, 0], centers).to(student.dtype)
        of_own = (gap * own).sum(dim=1, keepdim=True)
        own_logit = settings.scale / settings.temperature * (student * own).sum(dim=1, keepdim=True) + of_own
        gaps.append(torch.where(here, of_own, 0.0))
        logits.append(torch.where(here, own_logit, -math.inf))
    else:
        gaps.append(student.new_zeros((len(student), 1)))
        logits.append(student.new_full((len(student), 1), -math.inf))

    # Every so many-th center, which stands for those between.
    if len(centers):
        step = math.ceil(len(centers) / _SAMPLED_CENTERS)
        correction = None if settings.kl_correction is None else settings.kl_correction[::step]
        sampled = replace(settings, kl_correction=correction, block_centers=_SAMPLED_CENTERS, near=None)
        for block in blocks(student, centers[::step], torch.full_like(labels, -1), gap, sampled):
            logits.append(block.softened(sampled) + cast(Tensor, block.gaps) + math.log(step))
            gaps.append(cast(Tensor, block.gaps))

    return _weighted_mean(torch.cat(logits, dim=1), torch.cat(gaps, dim=1), settings.group)


def _weighted_mean(logits: Tensor, values: Tensor, group: dist.ProcessGroup | None) -> Float[Tensor, " batch"]:
    """The mean of the values under the softmax over all ranks."""
    top = reduce_over(group, logits.amax(dim=1, keepdim=True), dist.ReduceOp.MAX)
    weights = (logits - top).exp_()
    sums = torch.stack([weights.sum(dim=1), (weights * values).sum(dim=1)])
    reduce_over(group, sums, dist.ReduceOp.SUM)
    return sums[1] / sums[0]


def _own_logits(
    student: Tensor, centers: Tensor, labels: Tensor, settings: PassSettings
) -> tuple[Float64[Tensor, "batch labels"], Float64[Tensor, "batch labels"]]:
    """Logit of each of a row's labels, as it is and as the cross entropy reads it."""
    sums = student.new_zeros((3, *labels.shape), dtype=torch.float64)  # both logits, and on how many ranks it is
    for label, centers_of_label in enumerate(labels.T) if len(centers) else ():
        here = centers_of_label >= 0
        own = _centers_of(centers_of_label, centers)
        logit = settings.scale * (student.double() * own.double()).sum(dim=1)
        sums[:2, :, label] = torch.where(here, logit, 0.0)
        if settings.cls_correction is not None:
            correction = _centers_of(centers_of_label, settings.cls_correction)
            sums[1, :, label] -= torch.where(here, correction.double(), 0.0)
        sums[2, :, label] = here
    reduce_over(settings.group, sums, dist.ReduceOp.SUM)

    own, own_corrected, ranks = sums
    if settings.group is not None and not bool((ranks == 1).all()):
        row, label = (int(place) for place in (ranks != 1).nonzero()[0])
        raise ValueError(
            f"labels must name a center on exactly one rank, but row {row} has one on {int(ranks[row, label])}"
        )
    return own, own_corrected


def _pulling_center(
    student: Tensor,
    centers: Tensor,
    labels: Tensor,
    pull: Float64[Tensor, "batch labels"],
    settings: PassSettings,
) -> Float[Tensor, "batch dim"]:
    """The mean of the own centers of each row as they pull it, from whichever ranks have them."""
    own = torch.zeros_like(student)
    for label, centers_of_label in enumerate(labels.T) if len(centers) else ():
        share = torch.where(centers_of_label >= 0, pull[:, label].to(student.dtype), 0.0)
        own += share[:, None] * _centers_of(centers_of_label, centers).to(student.dtype)
    return reduce_over(settings.group, own, dist.ReduceOp.SUM)


def _centers_of(labels: Int[Tensor, " batch"], values: Float[Tensor, "centers ..."]) -> Float[Tensor, "batch ..."]:
    """The value of each row's center; any for a label of -1, whose center is on another rank."""
    return values[labels.clamp(min=0)]


def near_centers(
    centers: Float[Tensor, "centers dim"],
    labels: Int[Tensor, "batch labels"],
    cosine: float,
    group: dist.ProcessGroup | None,
) -> NearCenters:
    """The labels of a batch, from whichever ranks have them, to compare all centers with."""
    # A number for each center that no other rank gives: here a label says only which of this rank's centers it is.
    rank = 0 if group is None else dist.get_rank(group)
    numbers = torch.where(labels >= 0, labels + (rank << 40), 0)
    distinct, place = reduce_over(group, numbers, dist.ReduceOp.SUM).unique(return_inverse=True)

    # Those that are elsewhere go into one row too many.
    own = centers.new_zeros((len(distinct) + 1, centers.shape[1]))
    if len(centers):
        here = torch.where(labels >= 0, place, len(distinct))
        own[here.flatten()] = _centers_of(labels.flatten(), centers)
    return NearCenters(reduce_over(group, own[:-1], dist.ReduceOp.SUM), place, cosine)


def reduce_over(group: dist.ProcessGroup | None, values: Tensor, operation: Any) -> Tensor:
    """Sum over the ranks in place; does nothing for one rank."""
    if group is not None:
        dist.all_reduce(values, operation, group=group)
    return values


def suitable_block(rows: Float[Tensor, "batch dim"], near: NearCenters | None = None) -> int:
    cells = _CPU_CELLS if rows.device.type == "cpu" else _DEVICE_CELLS
    return max(_LEAST_BLOCK, cells // max(len(rows), 0 if near is None else len(near.own)))
