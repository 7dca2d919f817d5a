"""The symmetric contrastive loss: CLIP's own, and the two crossed ones of the instance-level loss."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clip_cid.method.precision import at_least_float32, autocast_off


def contrastive_loss(
    a: Float[Tensor, "batch dim"], b: Float[Tensor, "batch dim"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    r"""How well row i of `a` finds row i of `b` among all rows, and the other way round; `L_clip` and `I(a, b)` in docs/method.md.

    .. math:: I(a, b) = \tfrac12 [ CE(s\, a b^T, I) + CE(s\, b a^T, I) ]

    Args:
        a: Unit rows; the batch over all ranks, because every other row is a negative.
        b: Unit rows, in the same order as `a`.
        scale: The factor s itself, one number: `exp(logit_scale)`, not `logit_scale`.
    """
    with autocast_off(a):
        a, b = at_least_float32(a), at_least_float32(b)
        logits = at_least_float32(scale) * (a @ b.T)
        own = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
