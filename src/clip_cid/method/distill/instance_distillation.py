"""Instance-level distillation (paper section 3.3): the student finds the teacher's other modality."""

from jaxtyping import Float
from torch import Tensor

from clip_cid.method.distill.batch_logits import detached
from clip_cid.method.distill.contrastive import contrastive_loss
from clip_cid.method.distill.sides import Side


def instance_loss(student: Side, teacher_other: Side, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""Contrast between crossed modalities, in both directions; one of the two terms of `L_instance` in docs/method.md.

    .. math:: L_{instance} = \beta\, [ I(v_t, u_s) + I(u_t, v_s) ]

    The first term, the student's texts among the teacher's images, is the part `instance_text`; the second is
    `instance_image`. The factor beta is the weight of the parts and is not applied here. Gradients reach the student
    and the scale only.

    Args:
        student: Unit rows of one modality, in the teacher's space.
        teacher_other: Unit rows of the other modality.
        scale: The factor s itself.

    Returns:
        The mean over this rank's rows, in nats; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.
    """
    return contrastive_loss(detached(teacher_other), student, scale)
