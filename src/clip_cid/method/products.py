"""Matrix products by oneDNN where PyTorch has it: on AMD processors much faster than the library it uses by default."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class LeftRows:
    """Rows that are to be multiplied with many blocks of others; their layout is changed once.

    Only the library differs from `rows @ others.T`, by the type and the device alone: equal inputs give equal bits for
    a number of threads (docs/decisions.md, D33).
    """

    def __init__(self, rows: Float[Tensor, "rows dim"]) -> None:
        self._rows = rows.to_mkldnn() if _by_onednn(rows) else rows

    def times(self, others: Float[Tensor, "others dim"]) -> Float[Tensor, "rows others"]:
        """Each row with each of the others."""
        if self._rows.is_mkldnn:
            return F.linear(self._rows, others.contiguous()).to_dense()
        return self._rows @ others.T


def product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """`left @ right`."""
    return LeftRows(left).times(right.T)


def _by_onednn(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available()
