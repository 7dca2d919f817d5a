"""One side of a comparison within a batch that is spread over ranks."""

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """What there is of one kind for each row: of the rows of this rank, and of those of all ranks.

    A loss asks what its own rows say about all of them and is a mean over its own rows. Ranks hold equally many, so
    the mean of the ranks' losses is the loss of the whole batch; no rank ever has the logits of all rows.
    """

    own: Shaped[Tensor, "rows ..."]
    """Rows `first` to `first + rows` of `all`."""
    all: Shaped[Tensor, "batch ..."]
    first: int

    @staticmethod
    def whole(rows: Shaped[Tensor, "rows ..."]) -> "Side":
        """The side of a batch that lies on one rank."""
        return Side(rows, rows, 0)
