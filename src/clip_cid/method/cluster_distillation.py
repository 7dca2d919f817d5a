"""Cluster-level distillation (paper section 3.2): one head of cluster centers, read by student and teacher alike."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clip_cid.method.precision import at_least_float32, autocast_off

_WATCHED_ROWS = 4096  # drift is measured on this many rows: a second copy of a million centers would not be worth it


class CenterHead(nn.Module):
    r"""Cosines against the cluster centers, times sigma; `cluster_logits` in docs/method.md.

    .. math:: z = \sigma W v

    The rows of W start as the centers (without this the paper's training collapses) and are read with unit length.

    Args:
        centers: Unit rows from the clustering.
        scale: sigma. Fixed: on separable labels a learned one grows without bound.
        trainable: Whether the rows move; if not they take neither gradient nor optimizer state.

    Raises:
        ValueError: There are no centers, or a row is not finite or not of unit length.
    """

    watched: Tensor
    start_rows: Tensor

    def __init__(self, centers: Float[Tensor, "centers dim"], *, scale: float = 16.0, trainable: bool = False) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.scale = scale
        self.weight = nn.Parameter(_unit_centers(centers), requires_grad=trainable)
        watched = torch.linspace(0, len(centers) - 1, min(len(centers), _WATCHED_ROWS), dtype=torch.float64).long()
        self.register_buffer("watched", watched, persistent=False)
        self.register_buffer("start_rows", self.weight.detach()[watched].clone() if trainable else None)

    @property
    def num_centers(self) -> int:
        return len(self.weight)

    def rows(self, index: Int[Tensor, " sampled"] | None = None) -> Float[Tensor, "sampled dim"]:
        """The unit rows of the centers in `index`, or of all."""
        rows = self.weight if index is None else self.weight[index]
        return F.normalize(rows, dim=1) if self.weight.requires_grad else rows

    def forward(
        self, embedding: Float[Tensor, "batch dim"], rows: Float[Tensor, "sampled dim"] | None = None
    ) -> Float[Tensor, "batch sampled"]:
        """Logits of unit rows against `rows` (as `self.rows` gives them), or against all centers."""
        with autocast_off(embedding):
            rows = self.rows() if rows is None else rows
            return self.scale * (at_least_float32(embedding) @ rows.T)

    @torch.no_grad()
    def drift(self) -> float:
        """How far the rows have moved from the centers, as a share of their length; 0 for a frozen head."""
        if not self.weight.requires_grad:
            return 0.0
        moved = torch.linalg.vector_norm(self.weight[self.watched] - self.start_rows)
        return float(moved / torch.linalg.vector_norm(self.start_rows))


@dataclass(frozen=True)
class SampledCenters:
    """The centers that take part in one step; columns of the logits are in this order."""

    index: Int[Tensor, " sampled"]
    """Rows of the head, ascending."""
    labels: Int[Tensor, " batch"]
    """Where each image's own center stands in `index`."""
    log_inclusion: Float[Tensor, " sampled"]
    """Logarithm of the chance to be in `index`: 0 for the batch's own centers."""
    num_negatives: int
    """How many of `index` are random negatives."""


def sample_centers(
    labels: Int[Tensor, " batch"], num_centers: int, *, sample_rate: float, generator: torch.Generator | None = None
) -> SampledCenters:
    r"""All centers of the batch, and random others up to `sample_rate * num_centers`; `sampled_centers` in docs/method.md.

    .. math:: \log \pi_j = 0 \text{ for the batch's own centers, else } \log \frac{n}{K - P}

    P is the number of distinct labels and n what the quota leaves for negatives, drawn uniformly without replacement.
    A batch with more distinct labels than the quota gets no random negatives: its own centers are each other's.

    Args:
        labels: Center of each image of the batch over all ranks.
        num_centers: K.
        sample_rate: Share of the centers that take part, in (0, 1].
        generator: Where the negatives come from; equal states give equal samples.

    Raises:
        ValueError: A label is not a center, or `sample_rate` is out of its limits.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be above 0 and at most 1, got {sample_rate}")
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= num_centers:
        raise ValueError(f"labels must be centers 0 to {num_centers - 1}, got {_extent(labels)}")
    labels = labels.long()
    positive = labels.unique()
    others = num_centers - len(positive)
    negatives = min(max(round(sample_rate * num_centers) - len(positive), 0), others)
    index = positive
    if negatives > 0:
        device = labels.device if generator is None else generator.device
        score = torch.rand(num_centers, generator=generator, device=device)
        score[positive.to(device)] = 2.0  # above every random score, so the batch's own centers always rank first
        index = score.topk(len(positive) + negatives).indices.sort().values.to(labels.device)
    log_inclusion = torch.full((len(index),), math.log(negatives / others) if negatives else 0.0, device=labels.device)
    log_inclusion[torch.searchsorted(index, positive)] = 0.0
    return SampledCenters(index, torch.searchsorted(index, labels), log_inclusion, negatives)


def cluster_ce(
    student_logits: Float[Tensor, "batch sampled"],
    labels: Int[Tensor, " batch"],
    log_inclusion: Float[Tensor, " sampled"] | None = None,
) -> Float[Tensor, ""]:
    r"""Cross entropy of the student against each image's own center; `L_cls` in docs/method.md.

    .. math:: L_{cls} = -\frac1B \sum_i \log softmax_S(z_{s,i})[y_i]

    Args:
        student_logits: sigma times cosines.
        labels: The column of each image's own center.
        log_inclusion: Subtracted where given, so that the sampled softmax stands for the one over all centers.
    """
    with autocast_off(student_logits):
        logits = at_least_float32(student_logits)
        if log_inclusion is not None:
            logits = logits - log_inclusion
        return F.cross_entropy(logits, labels.long())


def cluster_kl(
    student_logits: Float[Tensor, "batch sampled"],
    teacher_logits: Float[Tensor, "batch sampled"],
    *,
    temperature: float = 1.0,
    log_inclusion: Float[Tensor, " sampled"] | None = None,
) -> Float[Tensor, ""]:
    r"""How far the student's distribution over the centers is from the teacher's; `L_kl` in docs/method.md.

    .. math:: L_{kl} = \frac1B \sum_i KL(softmax_S(z_{t,i} / \tau) \,\|\, softmax_S(z_{s,i} / \tau))

    Column j is one center in both. Gradients reach the student only, and the customary factor `temperature**2` is left
    out. `log_inclusion` is subtracted after the division by the temperature: a center's weight in a sum over a
    sample is one over its chance to be in it, at any temperature.

    Returns:
        A scalar in nats: 0 when the distributions agree, correct to four digits even at 1e-8.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with autocast_off(student_logits):
        student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
        return _RowwiseKL.apply(student, teacher, temperature, log_inclusion).mean()


class _RowwiseKL(torch.autograd.Function):
    """KL(teacher || student) of each row, and its gradient, without the cancellation of two log-softmaxes.

    With p the teacher's distribution, D = teacher - student and D' = D - E_p[D],
        KL = E_p[D'] + log E_p[exp(-D')] = E_p[D'] + log1p(E_p[expm1(-D')]),
        q - p = p expm1(-D' - log E_p[exp(-D')]).
    A difference of log-softmaxes in float32 is wrong by 0.6 % to several times the value once KL is below 1e-3. The
    weights of a sampled softmax are the same on both sides, so they enter p only.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, log_inclusion: Tensor | None
    ) -> Float[Tensor, " batch"]:
        shift = 0.0 if log_inclusion is None else log_inclusion
        log_p = F.log_softmax(teacher / temperature - shift, dim=1)
        log_q = F.log_softmax(student / temperature - shift, dim=1)
        p = log_p.exp()
        gap = (teacher - student) / temperature
        gap = gap - (p * gap).sum(dim=1, keepdim=True)
        small = gap.clamp(min=-1)  # where the student's share is far above the teacher's nothing cancels
        excess = torch.where(gap > -1, p * torch.expm1(-small), (log_p - gap).clamp(max=60).exp() - p)
        log_mean = torch.log1p(excess.sum(dim=1, keepdim=True))
        near = (p * gap).sum(dim=1) + log_mean[:, 0]
        far = (p * (log_p - log_q)).sum(dim=1)
        # Nothing cancels in a large KL either; and up to 1 nat no column reaches the clamp at exp(60).
        is_far = far > 1
        plain = log_q.exp() - p
        difference = torch.where(is_far[:, None] | (gap <= -1), plain, p * torch.expm1(-small - log_mean))
        ctx.save_for_backward(difference / temperature)
        return torch.where(is_far, far, near.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("L_kl has no second derivative here")  # it would come out as 0
        (difference,) = ctx.saved_tensors
        return grad_outputs[0][:, None] * difference, None, None, None


def _unit_centers(centers: Tensor) -> Tensor:
    rows = at_least_float32(centers.detach())
    norms = torch.linalg.vector_norm(rows, dim=1)
    wrong = ~((norms - 1).abs() <= 1e-2)  # a NaN is wrong too
    if len(rows) == 0:
        raise ValueError("centers must have at least one row, got none")
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"centers must have unit rows (within 0.01), but row {row} has length {float(norms[row]):.4g}")
    return rows / norms[:, None]


def _extent(labels: Tensor) -> str:
    return f"{int(labels.min())} to {int(labels.max())}" if len(labels) else "an empty batch"
