"""The texts without images that a training reads beside its pairs: which ones in which step, and their targets."""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from clip_cid.errors import ConfigError
from clip_cid.training.batch_order import endless_order
from clip_cid.training.ranks.distributed import Ranks


@dataclasses.dataclass(frozen=True)
class Line:
    """The place of a text without an image."""

    index: int


@dataclasses.dataclass(frozen=True)
class LineItem:
    """A text without an image, as the student reads it."""

    text: Tensor
    index: int


@dataclasses.dataclass(frozen=True)
class Lines:
    """Texts without images; `text_mean` in docs/method.md is how they take part in a loss."""

    texts: pa.LargeStringArray
    embeddings: Float[np.ndarray, "texts dim"] | None
    """The teacher's; None while a check tries a training without them."""
    per_step: int
    """Of all ranks together."""

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, index: int) -> str:
        return self.texts[index].as_py()

    def refuse_uneven(self, ranks: Ranks) -> None:
        """Each loss is a mean over the rows of a rank, so ranks read equally many.

        Raises:
            ConfigError: The ranks cannot share the lines of a step equally.
        """
        if self.per_step % ranks.size:
            raise ConfigError(
                f"distill.texts_per_step: {self.per_step:,} lines cannot be shared equally by {ranks.size} processes.",
                fix=f"Set distill.texts_per_step to {self.per_step // ranks.size * ranks.size or ranks.size:,}.",
            )

    def between(self, first_step: int, *, seed: int, ranks: Ranks) -> Iterator[list[Line]]:
        """This rank's part of the lines of each step from `first_step` on, without end."""
        share = self.per_step // ranks.size
        for lines in endless_order(len(self), self.per_step, seed=seed, first_step=first_step):
            yield [Line(int(index)) for index in lines[ranks.rank * share :][:share]]

    @property
    def digest(self) -> bytes:
        """Of the texts, in their order."""
        whole = hashlib.sha256()
        for buffer in self.texts.buffers():
            if buffer is not None:
                whole.update(buffer)
        return whole.digest()
