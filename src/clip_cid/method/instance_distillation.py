"""Instance-level distillation (paper section 3.3): the student finds the teacher's other modality."""

from jaxtyping import Float
from torch import Tensor

from clip_cid.method.contrastive import contrastive_loss


def instance_loss(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Contrast between crossed modalities, in both directions; the bracket of `L_instance` in docs/method.md.

    .. math:: L_{instance} = \beta\, [ I(v_t, u_s) + I(u_t, v_s) ]

    The factor beta is the weight of this part (`weights.instance`) and is not applied here. All rows are unit vectors
    of the teacher's space; gradients reach the student and the scale only.
    """
    to_text = contrastive_loss(teacher_image.detach(), student_text, scale)
    to_image = contrastive_loss(teacher_text.detach(), student_image, scale)
    return to_text + to_image
