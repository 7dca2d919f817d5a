"""The records of a training: metrics.jsonl with its listeners (TensorBoard, callbacks), and unreadable pairs."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from clip_cid import extras, log
from clip_cid.errors import ConfigError, DataError, MissingExtraError
from clip_cid.journal import Journal
from clip_cid.training.batches import TrainingPairs
from clip_cid.training.ranks.distributed import Ranks

Line = dict[str, Any]
Listener = Callable[[Line], object]


EMPTY = {"bytes": 0}
"""The state of a file of lines before the first step."""


class Records:
    """metrics.jsonl. The file is the record: a line is written before the listeners get it.

    Args:
        path: The file.
        listeners: Get every line once it is written.
    """

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        self._journal, self._listeners = Journal(path), listeners

    def append(self, line: Line) -> None:
        self._journal.append(line)
        for listener in self._listeners:
            listener(line)

    def state_dict(self) -> dict[str, int]:
        return {"bytes": self._journal.sync()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Drop the lines behind the checkpoint: their steps will be done again."""
        self._journal.cut(state["bytes"])


class BadPairs:
    """skipped.jsonl, the pairs that cannot be read: each is listed once, and too many end the training.

    Each rank remembers those that it could not read. The main process writes the list for all ranks with
    every checkpoint.

    Args:
        training: The pairs to train on.
        path: The file.
        max_share: More than this share of them end the training.
    """

    def __init__(self, training: TrainingPairs, path: Path, *, max_share: float) -> None:
        self._training, self._journal, self._max_share = training, Journal(path), max_share
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

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
                fix=f"Repair or remove them, or raise pairs.max_bad_share (now {self._max_share:g}).",
            )

    def gather(self, ranks: Ranks) -> None:
        """Add what the other ranks have met."""
        for reasons in ranks.all(self._reasons):
            self._reasons |= reasons

    def state_dict(self) -> dict[str, int]:
        self._write()
        return {"bytes": self._journal.sync()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the list as it was at the checkpoint."""
        self._journal.cut(state["bytes"])
        self._reasons = {int(line["row"]): line["reason"] for line in self._journal.read()}

    def _write(self) -> None:
        pairs = self._training.pairs
        listed = {int(line["row"]) for line in self._journal.read()}
        for row in sorted(self._reasons.keys() - listed):
            shard = next(shard for shard in pairs.shards if row < shard.first_row + shard.rows)
            line = {"row": row, "key": pairs.key(row), "shard": shard.name, "reason": self._reasons[row]}
            self._journal.append(line)


def make_listeners(
    callbacks: Sequence[str], tensorboard: Literal["auto", "on", "off"], folder: Path, *, step: int
) -> list[Listener]:
    """The listeners that the recipe names.

    Args:
        callbacks: `package.module:name` each.
        tensorboard: Whether to write for it.
        folder: Where its files go.
        step: Of the checkpoint that is resumed; what was written for later steps is taken back.

    Raises:
        ConfigError: A callback cannot be imported or called.
        MissingExtraError: `tensorboard` is on, and the package is not installed.
    """
    listeners = [_callback(name) for name in callbacks]
    if tensorboard != "off" and (writer := _tensorboard(folder, step, needed=tensorboard == "on")) is not None:
        listeners.append(writer)
    return listeners


def _callback(name: str) -> Listener:
    module, _, function = name.partition(":")
    try:
        callback: Any = importlib.import_module(module)
        for part in function.split("."):
            callback = getattr(callback, part)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f"machine.callbacks: {name!r} cannot be imported ({error}).",
            fix="Write package.module:function; the folder of a module of your own must be on PYTHONPATH.",
        ) from error
    if not callable(callback):
        raise ConfigError(f"machine.callbacks: {name!r} is not a function.", fix="Name one that takes a dict.")
    return cast(Listener, callback)


def _tensorboard(folder: Path, step: int, *, needed: bool) -> Listener | None:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        if needed:
            raise MissingExtraError("machine.tensorboard: on", extras.TENSORBOARD, ("tensorboard",)) from error
        return None
    writer = SummaryWriter(str(folder), purge_step=step + 1)  # what it names goes, too
    # of the run: the folder of the stage gets another name when it is done
    log.info(f"distill   for TensorBoard: tensorboard --logdir {folder.parent.parent}")

    def write(line: Line) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write
