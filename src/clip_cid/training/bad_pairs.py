"""The pairs of a training that cannot be read: each is listed once, and too many end it."""

from pathlib import Path

from clip_cid.errors import DataError
from clip_cid.journal import Journal
from clip_cid.training.batches import TrainingPairs
from clip_cid.training.ranks.distributed import Ranks


class BadPairs:
    """What this rank has met; the list is written with every checkpoint, for all ranks by the first one.

    Args:
        training: The pairs to train on.
        path: skipped.jsonl.
        max_share: More than this share of them end the training.
    """

    def __init__(self, training: TrainingPairs, path: Path, *, max_share: float) -> None:
        self._training, self._journal, self._max_share = training, Journal(path), max_share
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def open(self, size: int) -> None:
        """Go on with the list as a checkpoint saw it."""
        self._journal.cut(size)
        self._reasons = {int(line["row"]): line["reason"] for line in self._journal.read()}

    def note(self, bad: list[tuple[int, str]]) -> None:
        """Remember rows, with the reason.

        Raises:
            DataError: There are too many.
        """
        self._reasons.update(bad)
        total = len(self._training) + len(self._training.left_out)
        if len(self) > self._max_share * total:
            self._write()
            raise DataError(
                f"{len(self):,} of {total:,} pairs cannot be read; {self._journal.path} lists them.",
                fix=f"Mend or remove them, or raise pairs.max_bad_share (now {self._max_share:g}).",
            )

    def gather(self, ranks: Ranks) -> None:
        """Take up what the other ranks have met."""
        for found in ranks.all(self._reasons):
            self._reasons |= found

    def sync(self) -> int:
        """Bring the list to the disk for good; returns its size in bytes."""
        self._write()
        return self._journal.sync()

    def _write(self) -> None:
        pairs = self._training.pairs
        known = {int(line["row"]) for line in self._journal.read()}
        for row in sorted(self._reasons.keys() - known):
            shard = next(shard for shard in pairs.shards if row < shard.first_row + shard.rows)
            line = {"row": row, "key": pairs.key(row), "shard": shard.name, "reason": self._reasons[row]}
            self._journal.append(line)
