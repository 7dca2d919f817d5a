"""The rows of a store that have an embedding, as two tall arrays; other processes open them without reading metadata."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.data.embeddings.store import EmbeddingStore


class OppositeTexts:
    """The texts, with the opposite of its image for a row without a caption.

    No caption fits an image worse, so of equal images one with a caption is kept.
    """

    def __init__(self, images: ShardedRows, texts: ShardedRows, captioned: Bool[np.ndarray, " rows"]) -> None:
        self._images, self._texts, self._captioned = images, texts, captioned
        self.shape = texts.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        numbers = np.arange(*rows.indices(len(self._captioned))) if isinstance(rows, slice) else np.asarray(rows)
        texts, absent = self._texts[numbers], ~self._captioned[numbers]
        texts[absent] = -self._images[numbers[absent]]
        return texts


class OkRows:
    """Images and texts of the rows that have an embedding, in the order of the store."""

    def __init__(self, store: EmbeddingStore, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays
        """What other processes need to open the same rows: small arrays by name."""
        self.images = self._good(store.images)
        self.texts: ShardedRows | OppositeTexts | None = None
        if store.has_texts:
            texts, captioned = self._good(store.texts), arrays.get("captioned")
            self.texts = texts if captioned is None else OppositeTexts(self.images, texts, captioned)

    @classmethod
    def of(cls, store: EmbeddingStore, rows: Int[np.ndarray, " some"] | None = None) -> "OkRows":
        """Of these rows, which have an embedding; of all that have one when None."""
        arrays: dict[str, np.ndarray] = {}
        if rows is not None or not store.ok.all():
            arrays["good"] = np.flatnonzero(store.ok) if rows is None else rows
        if store.has_texts and any(shard.without_text for shard in store.info.shards):
            arrays["captioned"] = store.num_captions[arrays.get("good", slice(None))] > 0
        return cls(store, arrays)

    def __len__(self) -> int:
        return len(self.images)

    def for_all(self, values: np.ndarray, others: Callable[[], np.ndarray]) -> np.ndarray:
        """Values of these rows for all rows of the store, with those that `others` makes for the others."""
        if "good" not in self.arrays:
            return values
        everything = others()
        everything[self.arrays["good"]] = values
        return everything

    def in_store(self, rows: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
        """The numbers that these rows have in the store."""
        return self.arrays["good"][rows] if "good" in self.arrays else rows

    def places(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " places"]:
        """Where these rows of the store are here, those that are; ascending."""
        return np.flatnonzero(np.isin(self.arrays["good"], rows)) if "good" in self.arrays else np.unique(rows)

    def _good(self, rows: ShardedRows) -> ShardedRows:
        return rows.select(self.arrays["good"]) if "good" in self.arrays else rows
