r"""The losses of one tower against the teacher's stored vectors: its own vector, and a bank of the other modality's.

They compare nothing within the batch, so a batch of any size gives the same mean.
"""

from jaxtyping import Float
from torch import Tensor

from clip_cid.method.distill.contrastive import Side, check_same_rows
from clip_cid.method.distill.fused_cluster_loss import bank_divergence
from clip_cid.method.products import at_least_float32


def cosine_loss(student: Side, teacher: Side) -> Float[Tensor, ""]:
    r"""How far the student's vectors are turned from the teacher's of the same rows; `L_cosine` in docs/method.md.

    .. math:: L_{cosine} = \frac1B \sum_i (1 - \hat v_i \cdot t_i)

    It is half the squared distance, whatever the width: CLIP-KD's `feature_loss` is 2 / D of it per modality. Gradients
    reach the student only.

    Args:
        student: Unit rows of one modality, in the teacher's space.
        teacher: Unit rows of the same modality, in the same order.

    Returns:
        The mean over this rank's rows, 0 to 2; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.
    """
    check_same_rows(student, teacher)
    # Not 1 - cos, whose digits cancel where the two are near.
    apart = at_least_float32(student.own) - at_least_float32(teacher.own.detach())
    return apart.square().sum(dim=1).mean() / 2


def bank_loss(student: Side, teacher: Side, bank: Float[Tensor, "bank dim"], scale: float) -> Float[Tensor, ""]:
    r"""The divergence from the teacher's distribution over stored vectors of the other modality; `L_bank`.

    .. math:: L_{bank} = \frac1B \sum_i KL( softmax(S\, A t_i) \,\|\, softmax(S\, A \hat v_i) )

    It is the affinity loss with the rows of A in place of the batch, on both sides: what a batch as large as the bank
    would say of these rows. The logits are never in memory. Gradients reach the student only.

    Args:
        student: Unit rows of one modality, in the teacher's space.
        teacher: Unit rows t of the same modality, in the same order.
        bank: Unit rows A: the teacher's vectors of the other modality.
        scale: The factor S itself, the same for both.

    Returns:
        The mean over this rank's rows, in nats, never negative; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch, or widths differ.
    """
    check_same_rows(student, teacher)
    return bank_divergence(student.own, teacher.own, bank, scale=scale)
