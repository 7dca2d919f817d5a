"""The symmetric contrastive loss: CLIP's own, and the two crossed ones of the instance-level loss."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clip_cid.method.distill.batch_logits import batch_logits, own_columns
from clip_cid.method.distill.sides import Side


def contrastive_loss(a: Side, b: Side, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""How well row i of `a` finds row i of `b` among all rows, and the other way round; `L_clip` and `I(a, b)` in docs/method.md.

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


def one_way_loss(queries: Side, keys: Side, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """How well each query finds its own key among all: half of `contrastive_loss`.

    Raises:
        ValueError: The sides are not of the same rows of a batch.
    """
    return F.cross_entropy(batch_logits(queries, keys, scale), own_columns(queries))
