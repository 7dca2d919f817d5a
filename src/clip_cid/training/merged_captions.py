"""The captions of removed near-duplicates that kept pairs have besides their own (`distill.merged_captions`)."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from clip_cid.data.balance.captions_file import GivenCaptions


@dataclasses.dataclass(frozen=True)
class MergedCaptions:
    """Of each training pair the captions it was given, by their number from 0."""

    given: GivenCaptions
    """To all kept pairs."""
    starts: Int[np.ndarray, " pairs"]
    """Where those of each training pair begin among these."""
    counts: Int[np.ndarray, " pairs"]
    """How many each has."""

    @classmethod
    def of(
        cls,
        given: GivenCaptions,
        store_rows: Int[np.ndarray, " pairs"],
        embedded: Int[np.ndarray, " rows"] | None,
    ) -> "MergedCaptions":
        """Those of the pairs at these rows of the store.

        Args:
            given: As the balance gave them.
            store_rows: Of the training pairs.
            embedded: How many captions of each row of the store have an embedding; others are left out. None where no
                loss reads these.
        """
        if embedded is not None:
            has_one = np.flatnonzero(given.numbers < embedded[given.rows])
            given = GivenCaptions(given.texts.take(pa.array(has_one)), *(part[has_one] for part in given[1:]))
        starts, ends = (np.searchsorted(given.kept, store_rows, side) for side in ("left", "right"))
        return cls(given, starts, (ends - starts).astype(np.int32))

    def take(self, index: Int[np.ndarray, " taken"]) -> "MergedCaptions":
        """Those of some of the pairs."""
        return dataclasses.replace(self, starts=self.starts[index], counts=self.counts[index])

    def text(self, index: int, number: int) -> str:
        """A caption that a pair was given."""
        return self.given.texts[int(self.starts[index]) + number].as_py()

    def embedded_at(
        self,
        index: Int[np.ndarray, " batch"],
        rows: Int[np.ndarray, " batch"],
        captions: Int[np.ndarray, " batch"],
        own: Int[np.ndarray, " batch"],
    ) -> tuple[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]]:
        """The row of the store and the number there of the captions that were read.

        Args:
            index: The pairs.
            rows: Theirs in the store.
            captions: Numbers of the captions; from the number of a pair's own on, of those it was given.
            own: How many captions of its own each pair has.
        """
        places = np.where(captions >= own, self.starts[index] + captions - own, -1)
        is_given = places >= 0
        rows, captions = rows.astype(np.int64), captions.astype(np.int64)
        rows[is_given] = self.given.rows[places[is_given]]
        captions[is_given] = self.given.numbers[places[is_given]]
        return rows, captions

    def add_to(self, digest: Any) -> None:
        """Add to a hashlib digest what decides which caption is read, and its text."""
        for values in (self.given.rows, self.given.numbers, self.starts, self.counts):
            digest.update(np.ascontiguousarray(values).data)
        _, *buffers = self.given.texts.buffers()  # no text is absent, and not every array keeps bits that say so
        for buffer in buffers:
            if buffer is not None:
                digest.update(buffer)
