r"""The distillation losses of peers, for comparison with `L_cluster` and `L_instance` on equal terms.

Most peers differ in scales and weights only, so there are four functions. s is the student's own learned scale, S the
teacher's, c the learned scale of the losses that cross the modalities. The contrastive loss is `L_clip`.

=========================== ========================= ====================== =======================================
peer                        function                  scales                 default weight (beside the contrastive)
=========================== ========================= ====================== =======================================
SigLIP (not a distillation) `siglip_loss`             s, at first 10;        1 (0: it stands in its place)
                                                      bias, at first -10
open_clip, distillation     `affinity_loss`           s; S of the teacher    1 (1)
CLIP-KD, CRD                `affinity_loss`           s; S of the teacher    1 (1)
TinyCLIP                    `affinity_loss`           50 for both, fixed     1 (0)
MobileCLIP, pure            `affinity_loss`           s; S 100, or 60 to 70  1 (0)
MobileCLIP, mixed           `affinity_loss`           the same               0.75 (0.25)
CLIP-KD, FD                 `feature_loss`            none                   2000 (1)
CLIP-KD, ICL                `one_way_instance_loss`   c, at first 1/0.07     1 (1)
=========================== ========================= ====================== =======================================

open_clip's distillation and CLIP-KD's CRD are the same function with the same scales: they have the same gradients.

What differs here on purpose:

- Soft targets give the divergence. All but CLIP-KD take the cross entropy, which is larger by the teacher's entropy.
  That is a constant, so the gradient is the same, but it hides how near the student is.
- A scale is the factor itself, `exp` taken. CLIP-KD's ICL multiplies by the logarithm instead, 2.66 for 14.3.
- MobileCLIP averages the probabilities of several teachers; here there is one.
- Over ranks a loss compares the rows of one rank with all rows. CLIP-KD computes the teacher's logits of all rows on
  each rank.
- Where widths differ, the student is read through the trainer's `alignment`. CLIP-KD maps vectors that are not yet of
  unit length, and with a bias.
- The weight 2000 undoes the mean over the width, so it fits one width only. The squared distance of two vectors has
  the weight 2000 / D, which is 3.9 at a width D of 512 and 1.6 at 1280.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clip_cid.method.distill.contrastive import Side, check_same_rows, mean_over_batch, one_way_loss
from clip_cid.method.distill.row_blocks import Divergence, Sigmoid
from clip_cid.method.products import at_least_float32


def siglip_loss(image: Side, text: Side, scale: Float[Tensor, ""], bias: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""Each image with each text by itself: a pair or not; `L_siglip` in docs/method.md.

    .. math:: L_{siglip} = -\frac1B \sum_{ij} \log \sigma(y_{ij} (s\, v_i \cdot u_j + b)), \quad y = 2I - 1

    Args:
        image: Unit rows v.
        text: Unit rows u, in the same order.
        scale: The factor s itself.
        bias: b.

    Returns:
        The sum over all texts, the mean over this rank's images; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (arXiv 2303.15343).
    """
    return mean_over_batch(Sigmoid(), image, text, scale, bias)


def affinity_loss(
    student_image: Side,
    student_text: Side,
    scale: Float[Tensor, ""],
    teacher_image: Side,
    teacher_text: Side,
    teacher_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""The divergence of the student's distribution over the batch from the teacher's; `L_affinity` in docs/method.md.

    .. math:: L_{affinity} = \tfrac12 [ KL(softmax(S\, v_t u_t^T) \,\|\, softmax(s\, v_s u_s^T))
        + KL(softmax(S\, u_t v_t^T) \,\|\, softmax(s\, u_s v_s^T)) ]

    Student and teacher may have different widths: only their logits are compared. Gradients reach the
    student and its scale only.

    Args:
        student_image: Unit rows v_s.
        student_text: Unit rows u_s, in the same order; likewise the teacher's.
        scale: The student's factor s itself; a constant if the peer fixes it.
        teacher_image: Unit rows v_t.
        teacher_text: Unit rows u_t.
        teacher_scale: The teacher's factor S.

    Returns:
        The mean over this rank's rows, in nats: 0 when both distributions agree, never negative; it keeps its digits
        down to the rounding of the logits. The mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.

    Source: the distillation losses of open_clip, CLIP-KD (arXiv 2307.12732), TinyCLIP (arXiv 2309.12314) and MobileCLIP
    (arXiv 2311.17049).
    """
    check_same_rows(student_image, student_text, teacher_image, teacher_text)

    to_texts = _divergence(teacher_image, teacher_text, teacher_scale)
    to_images = _divergence(teacher_text, teacher_image, teacher_scale)
    from_images = mean_over_batch(to_texts, student_image, student_text, scale)
    return (from_images + mean_over_batch(to_images, student_text, student_image, scale)) / 2


def feature_loss(student_image: Side, student_text: Side, teacher_image: Side, teacher_text: Side) -> Float[Tensor, ""]:
    r"""Mean squared difference from the teacher's vectors, summed over both modalities; `L_feature` in docs/method.md.

    .. math:: L_{feature} = \frac1{BD} (\|\hat v_s - v_t\|^2 + \|\hat u_s - u_t\|^2)

    Gradients reach the student only.

    Args:
        student_image: Unit rows, in the teacher's space; likewise the text's.
        student_text: Unit rows, in the same order; likewise the teacher's.
        teacher_image: Unit rows.
        teacher_text: Unit rows.

    Returns:
        The mean over this rank's rows and their D elements; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.

    Source: FD of CLIP-KD (arXiv 2307.12732).
    """
    check_same_rows(student_image, student_text, teacher_image, teacher_text)
    return _mean_square(student_image, teacher_image) + _mean_square(student_text, teacher_text)


def one_way_instance_loss(
    student_image: Side,
    student_text: Side,
    teacher_image: Side,
    teacher_text: Side,
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""The instance loss with the student as query only, never the teacher; `L_icl` in docs/method.md.

    .. math:: L_{icl} = \tfrac12 [ CE(c\, \hat v_s u_t^T, I) + CE(c\, \hat u_s v_t^T, I) ]

    These are two of the four terms of `L_instance`. Gradients reach the student and the scale only.

    Args:
        student_image: Unit rows, in the teacher's space; likewise the text's.
        student_text: Unit rows, in the same order; likewise the teacher's.
        teacher_image: Unit rows.
        teacher_text: Unit rows.
        scale: The factor c itself.

    Returns:
        The mean over this rank's rows, in nats; the mean of the ranks' is that of the batch.

    Raises:
        ValueError: The sides are not of the same rows of a batch.

    Source: ICL of CLIP-KD (arXiv 2307.12732).
    """
    from_images = one_way_loss(student_image, teacher_text.detached(), scale)
    return (from_images + one_way_loss(student_text, teacher_image.detached(), scale)) / 2


def _mean_square(student: Side, teacher: Side) -> Float[Tensor, ""]:
    return F.mse_loss(at_least_float32(student.own), at_least_float32(teacher.own.detach()))


def _divergence(queries: Side, keys: Side, scale: Tensor) -> Divergence:
    """From the teacher's distribution."""
    rows = at_least_float32(queries.own)
    return Divergence(rows, keys.all.to(rows.dtype), scale.to(rows.dtype))
