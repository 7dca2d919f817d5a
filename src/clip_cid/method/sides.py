"""One side of a comparison within a batch that is spread over ranks."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """Embeddings of one kind: the rows of this rank, and those of all ranks, which they are compared with.

    A loss asks what its own rows say about all of them and is a mean over its own rows. Ranks hold equally many, so
    the mean of the ranks' losses is the loss of the whole batch; no rank ever has the logits of all rows.
    """

    own: Float[Tensor, "rows dim"]
    """Rows `first` to `first + rows` of `all`."""
    all: Float[Tensor, "batch dim"]
    first: int

    @staticmethod
    def whole(rows: Float[Tensor, "rows dim"]) -> "Side":
        """The side of a batch that lies on one rank."""
        return Side(rows, rows, 0)
