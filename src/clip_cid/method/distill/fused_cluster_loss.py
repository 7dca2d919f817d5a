"""Both cluster losses against any number of centers, without the logits of student or teacher in memory.

The centers are read in blocks. If they are frozen, one pass gives losses and gradients: the gradient of a
softmax is a mean of the centers, and a mean can be summed before the weights are final. If the centers
learn, there is a second pass. Blocks run over centers and not over rows, because there are many more
centers than rows.
"""

import math
from typing import Any, Literal, NamedTuple, NoReturn, cast, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from clip_cid.method.distill.arithmetic import arithmetic_of
from clip_cid.method.distill.center_pass import (
    CenterPass,
    PassSettings,
    RowSums,
    SoftCenters,
    SoftmaxMean,
    blocks,
    cosine_slopes,
    near_centers,
    reduce_over,
    suitable_block,
)
from clip_cid.method.products import at_least_float32, autocast_off, product
from clip_cid.method.unit_rows import keep_freed_memory

LogQ = Literal["none", "kl", "both"]


class ClusterLosses(NamedTuple):
    """What one pass over the centers gives."""

    cls: Float[Tensor, ""]
    """L_cls."""
    kl: Float[Tensor, ""] | None
    """L_kl; None without a teacher."""
    own_center: Float[Tensor, ""]
    """Share of the rows to which no negative is nearer than the nearest of their own."""


def fused_cluster_loss(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    centers: Float[Tensor, "centers dim"],
    labels: Integer[Tensor, " batch"],
    *,
    scale: float,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""Cross entropy and KL divergence over the centers, in blocks; `L_cls` and `L_kl` in docs/method.md.

    .. math:: L_{cls} = -\frac1B \sum_i \log softmax(\sigma W v_i)[y_i], \qquad
        L_{kl} = \frac1B \sum_i KL(softmax(\sigma W t_i / \tau) \,\|\, softmax(\sigma W v_i / \tau))

    Gradients reach `student` and, if they require it, `centers` through the student's side; the teacher is
    detached. The customary factor `temperature**2` is left out. Besides inputs and gradients it takes about
    100 MiB on the CPU and up to 2.5 GB on a device, for any number of centers.

    Args:
        student: Unit rows v.
        teacher: Unit rows t.
        centers: Unit rows W.
        labels: The center y of each row.
        scale: sigma, cosine to logit.
        temperature: tau, of the divergence only.

    Returns:
        Two scalars in nats, float32 (float64 for float64 rows). The divergence is never negative and keeps its digits
        however small it is.

    Raises:
        ValueError: Something is no tensor, shapes do not fit, a label is not a center, or a number is out of its
            limits.
    """
    for name, value in (("student", student), ("teacher", teacher), ("centers", centers), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}; torch.as_tensor makes one")
        _check_kind(name, value, student.device)
    losses = cluster_losses(student, centers, labels.long(), teacher=teacher, scale=scale, temperature=temperature)
    return losses.cls, cast(Tensor, losses.kl)


def cluster_losses(
    student: Float[Tensor, "batch dim"],
    centers: Float[Tensor, "centers dim"],
    labels: Int[Tensor, "batch ..."],
    *,
    teacher: Float[Tensor, "batch dim"] | SoftCenters | None = None,
    scale: float,
    temperature: float = 1.0,
    log_inclusion: Float[Tensor, " centers"] | None = None,
    logq: LogQ = "kl",
    ignore_near: float | None = None,
    group: dist.ProcessGroup | None = None,
    block_centers: int | None = None,
    labels_are_checked: bool = False,
) -> ClusterLosses:
    r"""`L_cls` and `L_kl` in docs/method.md, over all centers or a sample, which may be spread over ranks.

    As `fused_cluster_loss`, but it also takes soft centers in place of the teacher, and several labels a row:

    .. math:: L_{cls} = \frac1B \sum_i \log \Big(1 + \sum_{j \in N_i} \sum_{p \in P_i} \exp(z_{ij} - z_{ip})\Big)

    P are the labels of a row and N its negatives: all other centers, without those that `ignore_near` leaves out
    (`near_centers` in docs/method.md). With one label and all other centers this is the cross entropy.

    Against `SoftCenters` a divergence is the difference of two logarithms,

    .. math:: KL_i = \log \sum_j \exp(z_{ij} / \tau) - \frac\sigma\tau \langle v_i, \mu_i \rangle - H_i,

    exact to some 1e-6 nats, for half the products; `soft_centre` in docs/method.md.

    Args:
        student: Unit rows; with `group` the whole batch, the same on every rank, as are `teacher` and the results.
        centers: Unit rows; with `group` this rank's, possibly none.
        labels: The center of each row, or several of them, all different; with `group` -1 where another rank holds it.
        teacher: Unit rows, or what `soft_centers` says of them; without either there is no divergence.
        scale: sigma.
        temperature: tau.
        log_inclusion: Logarithm of each center's chance to be in the sample.
        logq: Which losses subtract it: a center's weight in a sum over a sample is one over its chance to be in it. In
            the divergence that is after the division by the temperature.
        ignore_near: A center whose cosine to a label of a row is above this is no negative of the row. The divergence
            reads all centers.
        group: Ranks whose centers together are the softmax. The gradient of `student` is whole on every rank.
        block_centers: Centers at a time; as many as suit a cache or a device when absent.
        labels_are_checked: By `sample_centers`: the host need not wait for a device to do it again.

    Raises:
        ValueError: Shapes, a label or a number do not fit, or soft centers meet centers that move or are a sample.
    """
    several = labels[:, None] if labels.ndim == 1 else labels
    _check(student, centers, None if labels_are_checked else several, scale, temperature, elsewhere=group is not None)
    _check_options(student, centers, teacher, log_inclusion, scale / temperature, logq, block_centers)

    keep_freed_memory()
    with autocast_off(student):
        rows = at_least_float32(student if torch.is_grad_enabled() else student.detach())  # else a gradient is computed
        gap = _gap(rows, teacher, scale / temperature)

        near = None
        if ignore_near is not None and ignore_near < 1:  # at 1 rounding would decide which centers are equal
            near = near_centers(centers.detach().to(rows.dtype), several.long(), ignore_near, group)

        correction = None if log_inclusion is None or logq == "none" else log_inclusion.to(rows.dtype)
        # What soft centers give is a difference of nearly equal numbers.
        arithmetic = arithmetic_of(rows)
        settings = PassSettings(
            scale=scale,
            temperature=temperature,
            cls_correction=correction if logq == "both" else None,
            kl_correction=correction,
            soft=teacher if isinstance(teacher, SoftCenters) else None,
            group=group,
            block_centers=block_centers or suitable_block(rows, near),
            arithmetic=arithmetic.unrounded if isinstance(teacher, SoftCenters) else arithmetic,
            near=near,
        )
        weights = centers.to(rows.dtype) if centers.requires_grad else centers
        cls, kl, own_center = _FusedLosses.apply(rows, weights, several.long(), gap, settings)

    return ClusterLosses(cls, None if teacher is None else kl, own_center)


def _gap(rows: Tensor, teacher: Tensor | SoftCenters | None, sharpness: float) -> Tensor | None:
    """The teacher's logits less the student's, before the product with the centers.

    It is of the difference of the rows, so nothing cancels afterwards.
    """
    if not isinstance(teacher, Tensor):
        return None
    return sharpness * (teacher.detach().to(rows.dtype) - rows.detach())


def bank_divergence(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "bank dim"],
    *,
    scale: float,
) -> Float[Tensor, ""]:
    r"""`L_kl` over the rows of a bank in place of centers: they learn nothing, and no row has one of its own.

    As `fused_cluster_loss` otherwise.

    Raises:
        ValueError: Shapes do not fit, or the scale is out of its limits.
    """
    any_row = torch.zeros(len(student), dtype=torch.long, device=student.device)  # only `cls` depends on it
    losses = cluster_losses(student, bank.detach(), any_row, teacher=teacher, scale=scale, labels_are_checked=True)
    return cast(Tensor, losses.kl)


def soft_centers(
    teacher: Float[Tensor, "batch dim"],
    centers: Float[Tensor, "centers dim"],
    *,
    scale: float,
    temperature: float = 1.0,
) -> SoftCenters:
    """What to keep of each teacher row; `soft_centre` in docs/method.md.

    Raises:
        ValueError: Shapes do not fit, or a number is out of its limits.
    """
    _check(teacher, centers, None, scale, temperature, elsewhere=False)
    with torch.no_grad(), autocast_off(teacher):
        rows = at_least_float32(teacher)
        arithmetic = arithmetic_of(rows).unrounded
        settings = PassSettings(scale / temperature, 1.0, None, None, None, None, suitable_block(rows), arithmetic)
        no_labels = rows.new_full((len(rows), 1), -1, dtype=torch.long)

        means = SoftmaxMean(rows, arithmetic, with_mean=True)
        for block in blocks(rows, centers, no_labels, None, settings):
            means.add(block.logits, block.centers)
        log_sum = means.finish(None)

        pull = settings.scale * (rows.double() * means.mean.double()).sum(dim=1)
        return SoftCenters(means.mean, (log_sum - pull).clamp_(min=0), settings.scale)


class _FusedLosses(torch.autograd.Function):
    """One pass if the centers are frozen; if they learn, a second one, since their gradient needs the sums."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, centers: Tensor, labels: Tensor, gap: Tensor | None, settings: PassSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        student_learns, centers_learn = ctx.needs_input_grad[:2]
        one_pass = student_learns and not centers_learn

        done = CenterPass(student, centers, labels, gap, settings, with_gradient=one_pass)
        ctx.settings, ctx.sums = settings, done.sums
        ctx.gradients = done.gradients() if one_pass else None
        if centers_learn:
            ctx.save_for_backward(student, centers, labels, gap)

        own_first = done.own_first.mean()
        ctx.mark_non_differentiable(own_first)
        cls = F.softplus(done.sums.excess, threshold=40)
        return cls.mean().to(student.dtype), done.sums.kl.mean().to(student.dtype), own_first

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("the cluster losses have no second derivative here")  # it would come out as 0

        # Frozen centers: the gradients are there, and are weighted.
        if ctx.gradients is not None:
            pairs = zip(grad_outputs, ctx.gradients, strict=False)
            terms = [weight * gradient for weight, gradient in pairs if weight is not None and gradient is not None]
            return torch.stack(terms).sum(dim=0) if terms else None, None, None, None, None

        # Centers that move: the second pass.
        student, centers, labels, gap = ctx.saved_tensors
        settings, sums = cast(PassSettings, ctx.settings), cast(RowSums, ctx.sums)
        of_cls, of_kl = (None if grad is None else grad * settings.scale / len(student) for grad in grad_outputs[:2])
        of_kl = None if gap is None else of_kl
        rounded_to = settings.arithmetic.rounded_to
        to_student, to_centers = torch.zeros_like(student), torch.empty_like(centers)
        with autocast_off(student):  # as in the forward pass, if this is within the same region
            for block in blocks(student, centers, labels, None if of_kl is None else gap, settings):
                slopes = cosine_slopes(block, sums, settings, of_cls, of_kl)
                to_student += product(slopes, block.centers, rounded_to=rounded_to)
                to_centers[block.columns] = product(slopes.T, student, rounded_to=rounded_to)
        reduce_over(settings.group, to_student, dist.ReduceOp.SUM)
        return to_student, to_centers, None, None, None


def _check_kind(name: str, value: Tensor, device: torch.device) -> None:
    """Rows of numbers or a number a row, dense, where the student is."""
    if value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(f"{name} must be dense, got a tensor of {value.layout} on {value.device}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, where student is, got {value.device}")
    if name == "labels":
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"labels must be whole numbers, got {value.dtype}")
    elif value.ndim != 2 or not value.is_floating_point():
        raise ValueError(f"{name} must be rows of real numbers, got {value.dtype} of shape {tuple(value.shape)}")


def _check(
    student: Tensor, centers: Tensor, labels: Tensor | None, scale: float, temperature: float, *, elsewhere: bool
) -> None:
    """Shapes and numbers; with `elsewhere`, centers and the center of a row may be on another rank."""
    if len(student) == 0 or (len(centers) == 0 and not elsewhere):
        raise ValueError(f"there must be rows and centers, got {len(student)} and {len(centers)}")
    if student.shape[1] != centers.shape[1]:
        raise ValueError(f"centers must have the width {student.shape[1]} of student, got {centers.shape[1]}")
    for name, value in (("scale", scale), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {value}")
    if labels is None:
        return

    least = -1 if elsewhere else 0
    low, high, has_repeated = facts_of_labels(labels)
    if len(labels) != len(student) or low < least or high >= len(centers):
        raise ValueError(
            f"labels must be {len(student)} centers of {least} to {len(centers) - 1},"
            f" got {len(labels)} of {low} to {high}"
        )
    if has_repeated:
        refuse_repeated(labels)


def facts_of_labels(labels: Int[Tensor, "batch labels"]) -> tuple[int, int, bool]:
    """The least and the greatest label, and whether a row has one twice; the host waits for a device once."""
    repeated = _repeated(labels).any()
    low, high, has_repeated = torch.stack([labels.min(), labels.max(), repeated.to(labels.dtype)]).tolist()
    return low, high, bool(has_repeated)


def refuse_repeated(labels: Int[Tensor, "batch labels"]) -> NoReturn:
    """Raises: ValueError, with the first row that has a label twice."""
    row = int(_repeated(labels).nonzero()[0, 0])
    raise ValueError(f"labels must be different centers for a row, but those of row {row} are {labels[row].tolist()}")


def _repeated(labels: Int[Tensor, "batch labels"]) -> Bool[Tensor, " batch"]:
    ascending = labels.sort(dim=1).values
    return ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any(dim=1)


def _check_options(
    student: Tensor,
    centers: Tensor,
    teacher: Tensor | SoftCenters | None,
    log_inclusion: Tensor | None,
    sharpness: float,
    logq: LogQ,
    block_centers: int | None,
) -> None:
    """The teacher and the sample fit rows and centers; soft centers are of all centers, frozen, at this sharpness."""
    if logq not in get_args(LogQ):
        raise ValueError(f"logq must be one of {', '.join(get_args(LogQ))}, got {logq!r}")
    if block_centers is not None and block_centers < 1:
        raise ValueError(f"block_centers must be at least 1, got {block_centers}")

    target = teacher.mean if isinstance(teacher, SoftCenters) else teacher
    if target is not None and target.shape != student.shape:
        raise ValueError(f"teacher must have the shape {tuple(student.shape)} of student, got {tuple(target.shape)}")
    if log_inclusion is not None and len(log_inclusion) != len(centers):
        raise ValueError(f"log_inclusion must be of the {len(centers)} centers, got {len(log_inclusion)}")

    if isinstance(teacher, SoftCenters):
        if centers.requires_grad or log_inclusion is not None:
            raise ValueError("teacher must be rows, not soft centers, where centers move or are a sample")
        if not math.isclose(teacher.sharpness, sharpness):
            raise ValueError(
                f"teacher must be soft centers of scale / temperature {sharpness:g}, got {teacher.sharpness:g}"
            )
