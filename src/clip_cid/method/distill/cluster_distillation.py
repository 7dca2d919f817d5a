"""Cluster-level distillation (paper section 3.2): student and teacher share one head of cluster centers."""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clip_cid.method.distill.center_pass import SoftCenters, suitable_block
from clip_cid.method.distill.fused_cluster_loss import (
    ClusterLosses,
    LogQ,
    cluster_losses,
    facts_of_labels,
    refuse_repeated,
    soft_centers,
)
from clip_cid.method.products import LeftRows, at_least_float32
from clip_cid.unit_length import NORM_TOLERANCE, is_unit

_LARGEST_SCALE = 1000.0
_WATCHED_ROWS = 4096  # drift is measured on this many rows: it is not worth a second copy of a million centers


@dataclass(frozen=True)
class Shard:
    """The part of the centers that this rank holds, if they are spread over the ranks of a group."""

    first: int
    """The number of its first center among all."""
    total: int
    """K, over all ranks."""
    group: dist.ProcessGroup

    @staticmethod
    def bounds(total: int, rank: int, world: int) -> tuple[int, int]:
        """First and last (not included) center of a rank; shards differ by one center at most."""
        return rank * total // world, (rank + 1) * total // world


class CenterHead(nn.Module):
    r"""The cluster centers as a linear layer that student and teacher share; `cluster_logits` in docs/method.md.

    .. math:: z = \sigma W v

    The rows of W start as the centers (without this the paper's training collapses) and are read at unit length. The
    logits are never in memory: `forward` gives the losses.

    Args:
        centers: Unit rows from the clustering; with `shard` this rank's.
        scale: sigma. Fixed: on separable labels a learned one grows without bound.
        trainable: Whether the rows move; frozen rows take neither gradient nor optimizer state.
        sparse: Whether the gradient of a step holds only the rows that took part (for `RowAdam`), or all rows.
        shard: Which part of all centers these are; absent if they are all of them.

    Raises:
        ValueError: There are no centers, or a row is not finite or not of unit length.
    """

    watched: Tensor
    start_rows: Tensor

    def __init__(
        self,
        centers: Float[Tensor, "centers dim"],
        *,
        scale: float = 16.0,
        trainable: bool = False,
        sparse: bool = False,
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.scale, self.sparse, self.shard = scale, sparse, shard
        self.weight = nn.Parameter(_unit_centers(centers), requires_grad=trainable)

        # Where the rows started, to tell how far they have moved. Not in a checkpoint: a head is made of the centers
        # before its state is loaded.
        watched = torch.linspace(0, len(centers) - 1, min(len(centers), _WATCHED_ROWS), dtype=torch.float64).long()
        self.register_buffer("watched", watched, persistent=False)
        start = self.weight.detach()[watched].clone() if trainable else None
        self.register_buffer("start_rows", start, persistent=False)

    @property
    def num_centers(self) -> int:
        """K, over all ranks."""
        return len(self.weight) if self.shard is None else self.shard.total

    def rows(self, index: Int[Tensor, " sampled"] | None = None) -> Float[Tensor, "sampled dim"]:
        """The unit rows of the centers in `index`, or of all that are here."""
        if not self.weight.requires_grad:
            return self.weight if index is None else self.weight[index]
        rows = self.weight if index is None else F.embedding(index, self.weight, sparse=self.sparse)
        return F.normalize(rows, dim=1)

    def sample(
        self, labels: Int[Tensor, "batch ..."], *, rate: float, generator: torch.Generator | None = None
    ) -> "SampledCenters":
        """The centers of one step, `sample_centers`; those of them that are here if they are spread over ranks.

        Every rank draws the sample of the whole head and takes its own part, so that it does not depend on how many
        ranks there are.

        Args:
            labels: Center of each image of the batch over all ranks, or several of them.
            rate: Share of the centers that take part.
            generator: Where the negatives come from; in the same state on every rank.

        Raises:
            ValueError: A label is not a center, or `rate` is out of its limits.
        """
        sample = sample_centers(labels, self.num_centers, sample_rate=rate, generator=generator)
        if self.shard is None:
            return sample

        index = sample.index - self.shard.first
        here = (index >= 0) & (index < len(self.weight))
        index = index[here]

        own = labels.long() - self.shard.first
        own = torch.where((own >= 0) & (own < len(self.weight)), torch.searchsorted(index, own), -1)
        return replace(sample, index=index, labels=own, log_inclusion=sample.log_inclusion[here])

    def forward(
        self,
        student: Float[Tensor, "batch dim"],
        sample: "SampledCenters",
        *,
        teacher: Float[Tensor, "batch dim"] | SoftCenters | None = None,
        temperature: float = 1.0,
        logq: LogQ = "kl",
        ignore_near: float | None = None,
        scale: float | None = None,
    ) -> ClusterLosses:
        """Both cluster losses of unit rows against the sampled centers; see `cluster_losses`.

        `scale` is sigma for these rows, if it is not that of the head.
        """
        return cluster_losses(
            student,
            self.rows(None if sample.complete and not self.sparse else sample.index),
            sample.labels,
            teacher=teacher,
            scale=self.scale if scale is None else scale,
            temperature=temperature,
            log_inclusion=None if sample.complete else sample.log_inclusion,
            logq=logq,
            ignore_near=ignore_near,
            group=None if self.shard is None else self.shard.group,
            labels_are_checked=True,
        )

    @torch.no_grad()
    def drift(self) -> float:
        """How far the rows have moved from the centers, as a share of their length; 0 for a frozen head."""
        if not self.weight.requires_grad:
            return 0.0
        moved = torch.linalg.vector_norm(self.weight[self.watched] - self.start_rows)
        return float(moved / torch.linalg.vector_norm(self.start_rows))


@dataclass(frozen=True)
class SampledCenters:
    """The centers that take part in one step, in the order of the columns of the logits."""

    index: Int[Tensor, " sampled"]
    """Rows of the head, ascending."""
    labels: Int[Tensor, "batch ..."]
    """The place of each image's own center, or of each of its centers, in `index`; -1 where another rank has it."""
    log_inclusion: Float[Tensor, " sampled"]
    """Logarithm of the chance to be in `index`: 0 for the batch's own centers."""
    num_negatives: Int[Tensor, ""]
    """How many of `index` are random negatives."""
    complete: bool
    """Whether all centers take part, on every rank."""


def sample_centers(
    labels: Int[Tensor, "batch ..."],
    num_centers: int,
    *,
    sample_rate: float,
    generator: torch.Generator | None = None,
) -> SampledCenters:
    r"""The batch's centers, and random others up to `sample_rate * num_centers`; `sampled_centers` in docs/method.md.

    .. math:: \log \pi_j = 0 \text{ for the batch's own centers, else } \log \frac{n}{K - P}

    P is the number of distinct labels and n what the quota leaves for negatives, drawn uniformly without replacement.
    A batch with more distinct labels than the quota gets no random negatives: its own centers are each other's.

    Args:
        labels: Center of each image of the batch over all ranks, or several of them.
        num_centers: K.
        sample_rate: Share of the centers that take part, in (0, 1].
        generator: Where the negatives come from; equal states give equal samples.

    Raises:
        ValueError: A label is not a center, or `sample_rate` is out of its limits.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be above 0 and at most 1, got {sample_rate}")
    if len(labels) == 0:
        raise ValueError(f"labels must be centers 0 to {num_centers - 1}, got an empty batch")
    labels = labels.long()
    several = labels.reshape(len(labels), -1)
    low, high, has_repeated = facts_of_labels(several)
    if low < 0 or high >= num_centers:
        raise ValueError(f"labels must be centers 0 to {num_centers - 1}, got {low} to {high}")
    if has_repeated:
        refuse_repeated(several)

    # Fewer labels than the quota leave room for negatives, so the host knows the size of the sample. Only of more
    # labels it has to ask how many are distinct.
    quota = round(sample_rate * num_centers)
    if labels.numel() >= quota and (distinct := labels.unique()).numel() >= quota:
        index, log_inclusion = distinct, torch.zeros(len(distinct), device=labels.device)
        negatives = torch.zeros((), dtype=torch.long)
    else:
        index, log_inclusion, negatives = _with_negatives(labels, num_centers, quota, generator)

    places = torch.searchsorted(index, labels)
    return SampledCenters(index, places, log_inclusion, negatives, complete=len(index) == num_centers)


def _with_negatives(
    labels: Int[Tensor, "batch ..."], num_centers: int, quota: int, generator: torch.Generator | None
) -> tuple[Int[Tensor, " quota"], Float[Tensor, " quota"], Int[Tensor, ""]]:
    """The batch's centers and, of the others, those with the highest random scores; with their logarithms of pi."""
    device = labels.device if generator is None else generator.device
    score = torch.rand(num_centers, generator=generator, device=device)
    score[labels.flatten().to(device)] = 2.0  # above every random score, so positives always rank first
    index = score.topk(quota).indices.sort().values

    is_negative = score[index] < 2
    negatives = is_negative.sum()
    log_inclusion = (negatives / (num_centers - quota + negatives).double()).log().float()
    log_inclusions = torch.where(is_negative, log_inclusion, 0.0)
    return index.to(labels.device), log_inclusions.to(labels.device), negatives


@torch.no_grad()
def nearest_labels(
    teacher: Float[Tensor, "rows dim"],
    centers: Float[Tensor, "centers dim"],
    labels: Int[Tensor, " rows"],
    count: int,
) -> Int[Tensor, "rows count"]:
    """Several labels of each row: its cluster, then the nearest other centers; `nearest_labels` in docs/method.md.

    Args:
        teacher: Unit rows.
        centers: Unit rows.
        labels: The cluster of each row.
        count: l, how many labels a row gets.

    Raises:
        ValueError: There are fewer centers than labels.
    """
    if not 1 <= count <= len(centers):
        raise ValueError(f"count must be 1 to the number of centers, {len(centers)}, got {count}")

    vectors = at_least_float32(teacher)
    rows = LeftRows(vectors)
    cosines = vectors.new_full((len(vectors), count), -math.inf)
    nearest = torch.zeros_like(cosines, dtype=torch.long)
    nearest[:, 0], cosines[:, 0] = labels, math.inf  # the cluster comes first, whatever rounding says

    block, own_label = suitable_block(teacher), labels.long()[:, None]
    for start in range(0, len(centers), block):
        found = rows.times(centers[start : start + block].to(cosines.dtype))
        column = (own_label - start).clamp(0, found.shape[1] - 1)
        is_own = (own_label >= start) & (own_label < start + block)
        found.scatter_(1, column, torch.where(is_own, -math.inf, found.gather(1, column)))
        best = found.topk(min(count, found.shape[1]), dim=1)
        cosines, places = torch.cat([cosines, best.values], dim=1).topk(count, dim=1)
        nearest = torch.cat([nearest, best.indices + start], dim=1).gather(1, places)
    return nearest


def calibrated_scale(
    teacher: Float[Tensor, "rows dim"], centers: Float[Tensor, "centers dim"], *, perplexity: float
) -> float:
    r"""The sigma at which the teacher has this perplexity over all centers; `calibrated_scale` in docs/method.md.

    .. math:: \exp\Big(\frac1n \sum_i H_i\Big) = \text{perplexity}, \qquad H_i = -\sum_j p_{ij} \log p_{ij}

    The perplexity falls as sigma grows, so bisection gives sigma to four digits.

    Args:
        teacher: Unit rows, a sample of the data.
        centers: Unit rows.
        perplexity: How many centers the teacher should find likely, above 1 and below the number of centers.

    Raises:
        ValueError: `perplexity` is out of its limits, or no sigma up to 1,000 is sharp enough.
    """
    if not 1 < perplexity < len(centers):
        raise ValueError(f"perplexity must be above 1 and below the {len(centers)} centers, got {perplexity:g}")

    low, high = 0.0, _LARGEST_SCALE
    sharpest = _perplexity(teacher, centers, high)
    if sharpest > perplexity:
        raise ValueError(f"perplexity must be at least {sharpest:.4g} for these centers, got {perplexity:g}")

    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _perplexity(teacher, centers, middle) > perplexity else (low, middle)
    return high


def _perplexity(teacher: Tensor, centers: Tensor, scale: float) -> float:
    return float(soft_centers(teacher, centers, scale=scale).entropy.mean().exp())


def _unit_centers(centers: Tensor) -> Tensor:
    rows = at_least_float32(centers.detach())
    norms = torch.linalg.vector_norm(rows, dim=1)
    wrong = ~is_unit(norms)
    if len(rows) == 0:
        raise ValueError("centers must have at least one row, got none")
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"centers must have unit rows (within {NORM_TOLERANCE}), but row {row} has length {float(norms[row]):.4g}"
        )
    return rows / norms[:, None]
