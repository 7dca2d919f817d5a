"""Where the numbers of a training go: metrics.jsonl first of all, then TensorBoard and whoever else listens."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from clip_cid import log
from clip_cid.errors import ConfigError, MissingExtraError
from clip_cid.journal import Journal

Line = dict[str, Any]
Listener = Callable[[Line], object]


class Records:
    """The lines of a training. The file is the record: it is cut to what a checkpoint saw, and written before others hear.

    Args:
        path: metrics.jsonl.
        size: Bytes of it that are to stay.
        listeners: Get every line once it is written.
    """

    def __init__(self, path: Path, *, size: int, listeners: Sequence[Listener] = ()) -> None:
        self._journal, self._listeners = Journal(path), listeners
        self._journal.cut(size)

    def append(self, line: Line) -> None:
        self._journal.append(line)
        for listener in self._listeners:
            listener(line)

    def sync(self) -> int:
        return self._journal.sync()


def make_listeners(
    callbacks: Sequence[str], tensorboard: Literal["auto", "on", "off"], folder: Path, *, step: int
) -> list[Listener]:
    """Those that the recipe names.

    Args:
        callbacks: `package.module:name` each.
        tensorboard: Whether to write for it.
        folder: Where its files go.
        step: Of the checkpoint that is gone on from; what was written for later steps is taken back.

    Raises:
        ConfigError: A callback cannot be imported or called.
        MissingExtraError: TensorBoard is asked for and not installed.
    """
    found = [_callback(name) for name in callbacks]
    if tensorboard != "off" and (writer := _tensorboard(folder, step, needed=tensorboard == "on")) is not None:
        found.append(writer)
    return found


def _callback(name: str) -> Listener:
    module, _, function = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"machine.callbacks: {name!r} cannot be imported ({error}).",
            fix="Write package.module:function; the folder of a module of your own must be on PYTHONPATH.",
        ) from error
    if not callable(found):
        raise ConfigError(f"machine.callbacks: {name!r} is not a function.", fix="Name one that takes a dict.")
    return cast(Listener, found)


def _tensorboard(folder: Path, step: int, *, needed: bool) -> Listener | None:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        if needed:
            raise MissingExtraError("machine.tensorboard: on", "tensorboard") from error
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
