"""One pass of all rows over the centers in blocks: losses and gradients, and never more logits than those of a block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clip_cid.method.distill.running_sums import Comparison, LogSum
from clip_cid.method.products import LeftRows, product

_CPU_CELLS, _DEVICE_CELLS = 1 << 20, 1 << 26  # logits at a time: what stays in a cache, what keeps a device busy
_LEAST_BLOCK = 256
_SAMPLED_CENTERS = 512
_LARGEST_RATE = 16.0  # of a student further from its teacher the terms are huge, and may not fit float32
_LOST = 8.0  # the gradient in one pass may be a difference of terms this much larger; else it takes a second one


@dataclass(frozen=True)
class SoftCenters:
    r"""All that `L_kl` needs of the teacher where the centers are frozen and all take part; `soft_centre` in docs/method.md.

    .. math:: \mu_i = \sum_j p_{ij} w_j, \qquad H_i = -\sum_j p_{ij} \log p_{ij}, \qquad p = softmax(\sigma W t / \tau)
    """

    mean: Float[Tensor, "batch dim"]
    """mu: the mean of the centers as the teacher weighs them."""
    entropy: Float64[Tensor, " batch"]
    """H in nats; exp(H) is the teacher's perplexity."""
    sharpness: float
    """sigma / tau, for which these are."""

    def to(self, device: torch.device) -> "SoftCenters":
        mean, entropy = (value.to(device, non_blocking=True) for value in (self.mean, self.entropy))
        return SoftCenters(mean, entropy, self.sharpness)


@dataclass(frozen=True)
class Work:
    """How the losses are to be computed."""

    scale: float
    temperature: float
    cls_correction: Float[Tensor, " centers"] | None
    kl_correction: Float[Tensor, " centers"] | None
    soft: SoftCenters | None
    group: dist.ProcessGroup | None
    block_centers: int

    @property
    def one_softmax(self) -> bool:
        """Whether both losses read the same distribution of the student."""
        return self.temperature == 1 and self.cls_correction is self.kl_correction


@dataclass(frozen=True)
class Block:
    """Some centers, and what the rows have to do with them."""

    columns: slice
    centers: Float[Tensor, "some dim"]
    logits: Float[Tensor, "batch some"]
    """sigma times cosines of the student."""
    gaps: Float[Tensor, "batch some"] | None
    """The teacher's logits less the student's, over tau."""
    own: tuple[Int[Tensor, " here"], Int[Tensor, " here"]]
    """Rows whose own center is here, and its column."""

    def softened(self, work: Work) -> Float[Tensor, "batch some"]:
        """The student's logits in the divergence; may be the block's own memory."""
        if work.temperature == 1 and work.kl_correction is None:
            return self.logits
        logits = self.logits / work.temperature
        return logits if work.kl_correction is None else logits.sub_(work.kl_correction[self.columns])

    def corrected(self, work: Work) -> Float[Tensor, "batch some"]:
        """The student's logits in the cross entropy; may be the block's own memory."""
        return self.logits if work.cls_correction is None else self.logits.sub_(work.cls_correction[self.columns])


def blocks(student: Tensor, centers: Tensor, labels: Tensor, gap: Tensor | None, work: Work) -> Iterator[Block]:
    scaled = work.scale * student
    both = LeftRows(scaled if gap is None else torch.cat([scaled, gap]))  # one product reads the centers once
    for start in range(0, len(centers), work.block_centers):
        columns = slice(start, min(start + work.block_centers, len(centers)))
        some = centers[columns].to(student.dtype)
        rows = ((labels >= columns.start) & (labels < columns.stop)).nonzero()[:, 0]
        products = both.times(some)
        gaps = None if gap is None else products[len(student) :]
        yield Block(columns, some, products[: len(student)], gaps, (rows, labels[rows] - start))


class Means:
    """Sums over all blocks of exp(logit) times the center: with their logarithms, softmax-weighted means of the centers."""

    def __init__(self, like: Float[Tensor, "batch dim"], *, wanted: bool) -> None:
        self.sums = LogSum.empty(len(like), like.device)
        self._total = torch.zeros_like(like) if wanted else None

    def add(
        self,
        logits: Float[Tensor, "batch some"],
        centers: Float[Tensor, "some dim"],
        largest: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """The logits are overwritten; `largest` as in `LogSum.add`."""
        shrunk = self.sums.add(logits, largest)
        if self._total is not None:
            self._total.mul_(shrunk).add_(product(logits, centers))

    def finish(self, group: dist.ProcessGroup | None) -> Float64[Tensor, " batch"]:
        """The logarithm of the sum of exp(logit) over all ranks."""
        before = self.sums.top
        log_sum = self.sums.across(group)
        if self._total is not None:
            share = torch.where(log_sum > -math.inf, (before - log_sum).exp(), 0.0)
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

    for any c; with a c near the mean of the gaps g both terms are small, and so nothing cancels where p and q are near.
    """

    def __init__(self, like: Float[Tensor, "batch dim"], reference: Float[Tensor, " batch"], *, wanted: bool) -> None:
        self.found = Comparison(reference)
        self._total = torch.zeros_like(like) if wanted else None

    def add(self, logits: Float[Tensor, "batch some"], block: "Block") -> None:
        """The teacher's logits of a block; they and its gaps are overwritten."""
        excess, shrunk = self.found.add(logits, cast(Tensor, block.gaps))
        if self._total is not None:
            kind = self._total.dtype
            self._total.mul_(shrunk.to(kind)).add_(product(excess.to(kind), block.centers))

    def finish(self, group: dist.ProcessGroup | None) -> Comparison:
        before = self.found.top
        self.found.across(group)
        if self._total is not None:
            self._total.mul_((before - self.found.log_total).exp()[:, None].to(self._total.dtype))
            reduce_over(group, self._total, dist.ReduceOp.SUM)
        return self.found

    def slopes(
        self, student_mean: Float[Tensor, "batch dim"], kl: Float64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch dim"], Bool[Tensor, " batch"]]:
        """Sum over the centers of (q - p) w, after `finish`; and the rows for which too many digits were lost."""
        assert self._total is not None
        rate = self.found.rate(kl)
        lost = rate[:, None].to(self._total.dtype) * student_mean
        found = self._total - lost
        kept = torch.linalg.vector_norm(lost, dim=1) <= _LOST * torch.linalg.vector_norm(found, dim=1)
        return found, ~(kept & (rate <= _LARGEST_RATE))  # a NaN is not kept either


@dataclass(frozen=True)
class Found:
    """What is known of each row when all centers have been seen; float64."""

    others: Float64[Tensor, " batch"]
    """Logarithm of the sum over all centers but the own one."""
    excess: Float64[Tensor, " batch"]
    """`others` less the own logit: the cross entropy is log(1 + exp(excess)), which keeps the digits of a small one."""
    student_sum: Float64[Tensor, " batch"]
    """Logarithm of the student's sum in the divergence."""
    kl: Float64[Tensor, " batch"]
    teacher_sum: Float64[Tensor, " batch"]
    """Logarithm of the teacher's sum in the divergence; this and the next are 0 without a teacher."""
    mean_gap: Float64[Tensor, " batch"]
    """The teacher's mean of the gaps."""

    def of(self, rows: Int[Tensor, " some"]) -> "Found":
        return Found(*(getattr(self, part.name)[rows] for part in fields(self)))


class Pass:
    """The pass over all centers: the losses of each row, and if wanted the gradient of the student with them."""

    def __init__(
        self, student: Tensor, centers: Tensor, labels: Tensor, gap: Tensor | None, work: Work, *, wanted: bool
    ):
        self._inputs = student, centers, labels, gap
        self._work = work
        self._others = Means(student, wanted=wanted)
        self._student = None if work.one_softmax else Means(student, wanted=wanted)
        self._divergence = None
        if gap is not None:
            reference = _mean_gap(student, centers, labels, gap, work)
            self._divergence = _Divergence(student, reference, wanted=wanted)
        best_other = student.new_full((len(student),), -math.inf)
        for block in blocks(student, centers, labels, gap, work):
            self._add_softened(block)
            block.logits[block.own] = -math.inf
            best = block.logits.amax(dim=1)
            best_other = torch.maximum(best_other, best)
            largest = best if work.cls_correction is None else None
            self._others.add(block.corrected(work), block.centers, largest)
        reduce_over(work.group, best_other, dist.ReduceOp.MAX)
        own, own_corrected = _own_logits(student, centers, labels, work)
        rounding = 4 * torch.finfo(student.dtype).eps * work.scale
        self.own_first = (own + rounding >= best_other).to(student.dtype)
        self.found = self._finish(own_corrected)

    def _add_softened(self, block: Block) -> None:
        """The divergence's part of a block."""
        if self._divergence is None and (self._work.soft is None or self._student is None):
            return
        softened = block.softened(self._work)
        if self._divergence is not None:
            self._divergence.add(softened + cast(Tensor, block.gaps), block)
        if self._student is not None:
            self._student.add(softened.clone() if softened is block.logits else softened, block.centers)

    def _finish(self, own: Float64[Tensor, " batch"]) -> Found:
        work = self._work
        others = self._others.finish(work.group)
        student_sum = torch.logaddexp(others, own) if self._student is None else self._student.finish(work.group)
        kl = teacher_sum = mean_gap = torch.zeros_like(others)
        if self._divergence is not None:
            compared = self._divergence.finish(work.group)
            kl, teacher_sum, mean_gap = compared.divergence(student_sum), compared.log_total, compared.mean
        elif work.soft is not None:
            pull = (self._inputs[0].double() * work.soft.mean.double()).sum(dim=1) * (work.scale / work.temperature)
            kl = (student_sum - pull - work.soft.entropy).clamp_(min=0)
        return Found(others, others - own, student_sum, kl, teacher_sum, mean_gap)

    def gradients(self) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"] | None]:
        """By the student, of the mean cross entropy and of the mean divergence."""
        student, centers, labels, gap = self._inputs
        work, rows = self._work, len(self._inputs[0])
        own = _own_centers(student, centers, labels, work)
        share = torch.sigmoid(self.found.excess).to(student.dtype)[:, None]  # of all centers but the own one
        to_cls = (share * work.scale / rows) * (self._others.mean - own)
        if gap is None and work.soft is None:
            return to_cls, None
        whole = own + share * (self._others.mean - own)
        student_mean = whole if self._student is None else self._student.mean
        if work.soft is not None:
            slopes = student_mean - work.soft.mean.to(student.dtype)
        else:
            slopes = self._slopes(student_mean)
        return to_cls, slopes.mul_(work.scale / (work.temperature * rows))

    def _slopes(self, student_mean: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        assert self._divergence is not None
        slopes, poor = self._divergence.slopes(student_mean, self.found.kl)
        again = poor.nonzero()[:, 0]
        if len(again):
            student, centers, labels, gap = self._inputs
            found, one = self.found.of(again), student.new_ones(())
            better = torch.zeros_like(student[again])
            for block in blocks(student[again], centers, labels[again], cast(Tensor, gap)[again], self._work):
                better += product(slopes_of(block, found, self._work, None, one), block.centers)
            reduce_over(self._work.group, better, dist.ReduceOp.SUM)
            slopes[again] = better * self._work.temperature
        return slopes


def slopes_of(
    block: Block, found: Found, work: Work, to_cls: Tensor | None, to_kl: Tensor | None
) -> Float[Tensor, "batch some"]:
    """The derivative of the weighted losses by the cosines of a block, whose logits are overwritten."""
    kind = block.logits.dtype
    slopes = torch.zeros_like(block.logits) if to_kl is None else _kl_slopes(block, found, work)
    if to_kl is not None:
        slopes *= to_kl / work.temperature
    if to_cls is not None:
        share = torch.sigmoid(found.excess).to(kind)  # of all centers but the own one
        softmax = (block.corrected(work) - found.others.to(kind)[:, None]).exp_().mul_(share[:, None])
        softmax[block.own] = -share[block.own[0]]
        slopes.addcmul_(softmax, to_cls.expand_as(softmax))
    return slopes


def _kl_slopes(block: Block, found: Found, work: Work) -> Float[Tensor, "batch some"]:
    """Slopes q - p as p expm1(-v), v = gap - mean + KL; float64, for where p is nearly 1 the gap is nearly the mean."""
    kind = block.logits.dtype
    logits = block.softened(work)
    p = (logits + cast(Tensor, block.gaps)).sub_(found.teacher_sum.to(kind)[:, None]).exp_()
    v = cast(Tensor, block.gaps).double().sub_((found.mean_gap - found.kl)[:, None])
    far = v < -1  # a student's share of more than e times the teacher's: nothing cancels, and p may be 0
    near = torch.expm1(v.clamp_(min=-1).neg_()).to(kind).mul_(p)
    if not bool(far.any()):
        return near
    return torch.where(far, (logits - found.student_sum.to(kind)[:, None]).exp_().sub_(p), near)


def _mean_gap(student: Tensor, centers: Tensor, labels: Tensor, gap: Tensor, work: Work) -> Float[Tensor, " batch"]:
    """About what the teacher's mean of the gaps will be: from some centers, and each row's own, which may weigh most."""
    logits = [student.new_full((len(student), 1), -math.inf)]
    gaps = [student.new_zeros((len(student), 1))]
    here = (labels >= 0).nonzero()[:, 0]
    if len(here):
        own = centers[labels[here]].to(student.dtype)
        gaps[0][here, 0] = (gap[here] * own).sum(dim=1)
        logits[0][here, 0] = work.scale / work.temperature * (student[here] * own).sum(dim=1) + gaps[0][here, 0]
    if len(centers):
        step = math.ceil(len(centers) / _SAMPLED_CENTERS)
        correction = None if work.kl_correction is None else work.kl_correction[::step]
        some = replace(work, kl_correction=correction, block_centers=_SAMPLED_CENTERS)
        for block in blocks(student, centers[::step], torch.full_like(labels, -1), gap, some):
            logits.append(block.softened(some) + cast(Tensor, block.gaps) + math.log(step))
            gaps.append(cast(Tensor, block.gaps))
    return _weighted_mean(torch.cat(logits, dim=1), torch.cat(gaps, dim=1), work.group)


def _weighted_mean(logits: Tensor, values: Tensor, group: dist.ProcessGroup | None) -> Float[Tensor, " batch"]:
    """The mean of the values under the softmax over all ranks."""
    top = reduce_over(group, logits.amax(dim=1, keepdim=True), dist.ReduceOp.MAX)
    weights = (logits - top).exp_()
    sums = torch.stack([weights.sum(dim=1), (weights * values).sum(dim=1)])
    reduce_over(group, sums, dist.ReduceOp.SUM)
    return sums[1] / sums[0]


def _own_logits(
    student: Tensor, centers: Tensor, labels: Tensor, work: Work
) -> tuple[Float64[Tensor, " batch"], Float64[Tensor, " batch"]]:
    """Logit of each row's own center, as it is and as the cross entropy sees it."""
    found = student.new_zeros((3, len(student)), dtype=torch.float64)
    here = (labels >= 0).nonzero()[:, 0]
    found[:2, here] = work.scale * (student[here].double() * centers[labels[here]].double()).sum(dim=1)
    if work.cls_correction is not None:
        found[1, here] -= work.cls_correction[labels[here]].double()
    found[2, here] = 1
    reduce_over(work.group, found, dist.ReduceOp.SUM)
    if not bool((found[2] == 1).all()):
        row = int((found[2] != 1).nonzero()[0, 0])
        raise ValueError(
            f"labels must name a center on exactly one rank, but row {row} has one on {int(found[2, row])}"
        )
    return found[0], found[1]


def _own_centers(student: Tensor, centers: Tensor, labels: Tensor, work: Work) -> Float[Tensor, "batch dim"]:
    """The own center of each row, from whichever rank has it."""
    here = (labels >= 0).nonzero()[:, 0]
    found = torch.zeros_like(student)
    found[here] = centers[labels[here]].to(student.dtype)
    return reduce_over(work.group, found, dist.ReduceOp.SUM)


def reduce_over(group: dist.ProcessGroup | None, values: Tensor, how: Any) -> Tensor:
    """In place, over the ranks if there are some."""
    if group is not None:
        dist.all_reduce(values, how, group=group)
    return values


def suitable_block(rows: Float[Tensor, "batch dim"]) -> int:
    cells = _CPU_CELLS if rows.device.type == "cpu" else _DEVICE_CELLS
    return max(_LEAST_BLOCK, cells // len(rows))
