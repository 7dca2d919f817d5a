"""Contrastive losses of a batch that may be spread over ranks: CLIP's own, and the instance-level one."""

from dataclasses import dataclass, replace

from jaxtyping import Float, Shaped
from torch import Tensor

from clip_cid.method.distill.row_blocks import CrossEntropy, RowLoss, mean_over_rows
from clip_cid.method.products import at_least_float32, autocast_off


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the vectors of one kind, for the rows of this rank and for those of all ranks.

    A loss compares the rows of this rank with all rows and is a mean over the rows of this rank. Ranks hold equally
    many rows, so the mean of the ranks' losses is the loss of the whole batch. No rank ever has the logits of all rows.
    """

    own: Shaped[Tensor, "rows ..."]
    """Rows `first` to `first + rows` of `all`."""
    all: Shaped[Tensor, "batch ..."]
    first: int

    @staticmethod
    def whole(rows: Shaped[Tensor, "rows ..."]) -> "Side":
        """The side of a batch that lies on one rank."""
        return Side(rows, rows, 0)

    def detached(self) -> "Side":
        """The same side without gradient: the teacher's."""
        return replace(self, own=self.own.detach(), all=self.all.detach())


def contrastive_loss(a: Side, b: Side, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""How well row i of `a` picks row i of `b` out of all rows, and back; `L_clip` and `I(a, b)` in docs/method.md.

    .. math:: I(a, b) = \tfrac12 [ CE(s\, a b^T, I) + CE(s\, b a^T, I) ]

    Args:
        a: Unit rows; every other row of the batch is a negative.
        b: Unit rows, in the same order as `a`.
        scale: The factor s itself, one number: `exp(logit_scale)`, not `logit_scale`.

    Returns:
        The mean over this rank's rows, in nats; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.
    """
    return (one_way_loss(a, b, scale) + one_way_loss(b, a, scale)) / 2


def instance_loss(student: Side, teacher_other: Side, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""The student against the teacher's other modality (paper section 3.3); `L_instance` in docs/method.md.

    .. math:: L_{instance} = \beta\, [ I(v_t, u_s) + I(u_t, v_s) ]

    This is one of the two terms. The first, the student's texts among the teacher's images, is the loss
    `instance_text`; the second is `instance_image`. The factor beta is their weight and is not applied here. Gradients
    reach the student and the scale only.

    Args:
        student: Unit rows of one modality, in the teacher's space.
        teacher_other: Unit rows of the other modality.
        scale: The factor s itself.

    Returns:
        The mean over this rank's rows, in nats; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.
    """
    return contrastive_loss(teacher_other.detached(), student, scale)


def one_way_loss(queries: Side, keys: Side, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """How well each query picks its own key out of all: half of `contrastive_loss`.

    Raises:
        ValueError: The sides are not of the same rows of a batch.
    """
    return mean_over_batch(CrossEntropy(), queries, keys, scale)


def mean_over_batch(
    loss: RowLoss, queries: Side, keys: Side, scale: Float[Tensor, ""], bias: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """The mean over this rank's queries of a loss of their logits with all keys.

    The logits are in float32 at least, whatever the precision of autocast, and never in memory as a whole. The type of
    the queries decides.

    Raises:
        ValueError: The sides are not of the same rows of a batch, have no rows, or have different widths.
    """
    check_same_rows(queries, keys)
    if queries.own.shape[1] != keys.all.shape[1]:
        raise ValueError(f"sides must have one width, got {queries.own.shape[1]} and {keys.all.shape[1]}")
    with autocast_off(queries.own):
        rows = at_least_float32(queries.own)
        others = keys.all.to(rows.dtype)
        shift = None if bias is None else bias.to(rows.dtype)
        return mean_over_rows(loss, rows, others, queries.first, scale.to(rows.dtype), shift)


def check_same_rows(*sides: Side) -> None:
    """Row i must be of one pair in all sides; shapes alone would not show it.

    Raises:
        ValueError: The sides are not of the same rows of a batch, or have none: a mean of them would be no number.
    """
    rows = [(side.first, len(side.own), len(side.all)) for side in sides]
    first, own, batch = rows[0]
    if rows.count(rows[0]) != len(rows) or not 0 <= first <= batch - own:
        raise ValueError(f"sides must be of the same rows of a batch, got (first, rows, batch) {rows}")
    if own == 0:
        raise ValueError(f"sides must have rows, got none of a batch of {batch}")
