"""The embeddings of all captions of some rows of a store, as rows of their own."""

import numpy as np
from jaxtyping import Float, Int, Integer

from clip_cid.data.embeddings.sharded_rows import checked_rows
from clip_cid.data.embeddings.store import EmbeddingStore


class CaptionRows:
    """(captions, dim): row by row of those chosen, each with its captions in their order; read as they are used.

    Args:
        store: With text embeddings.
        rows: Of the store.

    Raises:
        DataError: The store has images only.
    """

    def __init__(self, store: EmbeddingStore, rows: Int[np.ndarray, " rows"]) -> None:
        self._store, self._rows, self._dim = store, rows, store.texts.shape[1]
        self.starts: Int[np.ndarray, " rows"] = np.zeros(len(rows) + 1, dtype=np.int64)
        """Where the captions of each row begin, and the number of all."""
        np.cumsum(store.num_captions[rows], out=self.starts[1:])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._dim

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: slice | Integer[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        places = np.arange(*index.indices(len(self))) if isinstance(index, slice) else checked_rows(index, len(self))
        row = np.searchsorted(self.starts, places, side="right") - 1
        return self._store.text_for(self._rows[row], places - self.starts[row])
