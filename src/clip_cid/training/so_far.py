"""A training as its files tell it, also beside the process that still writes them. Reading changes nothing.

Nothing here imports torch, so `clip-cid status` is quick.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid import units
from clip_cid.errors import DataError
from clip_cid.journal import Journal
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import DISTILL

METRICS = "metrics.jsonl"
PAGE = "training.html"
"""Of the run folder: the page that shows a training while it goes on."""
_LINES_OF_SPEED = 10  # the last ones: a speed of hours ago says nothing of the time left


@dataclass(frozen=True)
class TrainingSoFar:
    """The lines that a training has written, and how long it will be."""

    settings: Mapping[str, Any]
    """Those of `distill` that decide the result."""
    lines: tuple[Mapping[str, Any], ...]
    """Of training steps, in order."""
    written: float
    """When its log last changed, in seconds since 1970."""

    @classmethod
    def unfinished(cls, folder: RunFolder) -> "TrainingSoFar | None":
        """The training in the run's work folder; None if none has begun, or if it ends in this moment.

        Raises:
            DataError: Its log is damaged.
        """
        made_from = folder.unfinished(DISTILL)
        if made_from is None:
            return None
        try:
            return cls._read(folder.part(DISTILL), made_from.get("settings", {}))
        except FileNotFoundError:
            return None

    @classmethod
    def finished(cls, folder: RunFolder) -> "TrainingSoFar | None":
        """The training whose student is there; None if there is none.

        Raises:
            DataError: Its log is damaged.
        """
        record = folder.record(DISTILL)
        return None if record is None else cls._read(folder.path / DISTILL, record.settings)

    @classmethod
    def _read(cls, stage: Path, settings: Mapping[str, Any]) -> "TrainingSoFar":
        path = stage / METRICS
        try:
            lines = Journal(path).read()
            written = path.stat().st_mtime if lines else time.time()
        except ValueError as error:
            raise DataError(
                f"{path}: not the log of a training ({error}).",
                fix="The next `clip-cid distill` on this run goes on from its last checkpoint, and says if it cannot.",
            ) from error
        trained = tuple(line for line in lines if isinstance(line, dict) and "loss" in line)
        return cls(settings.get(DISTILL, {}), trained, written)

    @property
    def last(self) -> Mapping[str, Any]:
        return self.lines[-1] if self.lines else {}

    @property
    def step(self) -> int:
        return self.last.get("step", 0)

    @property
    def steps(self) -> int | None:
        """Of the whole training; None before its first line, if the recipe counts epochs."""
        if steps := self.settings.get("steps"):
            return steps
        epochs = self.settings.get("epochs")
        if not self.last.get("epoch") or not isinstance(epochs, int):
            return None
        seen = self.last["pairs_seen"]
        epoch_pairs, batch_size = round(seen / self.last["epoch"]), round(seen / self.step)
        return epochs * epoch_pairs // batch_size

    @property
    def pairs_per_s(self) -> float | None:
        """Over the last lines, without the time of measurements; None if none of them has a speed."""
        speeds = [line["pairs_per_s"] for line in self.lines[-_LINES_OF_SPEED:] if line.get("pairs_per_s")]
        return len(speeds) / sum(1 / speed for speed in speeds) if speeds else None

    @property
    def seconds_left(self) -> float | None:
        """At that speed."""
        if self.steps is None or self.pairs_per_s is None:
            return None
        pairs = (self.steps - self.step) * self.last["pairs_seen"] / self.step
        return max(0.0, pairs / self.pairs_per_s)

    @property
    def collapse(self) -> tuple[int, str] | None:
        """The step whose line warns of a collapse, and the words."""
        return next(((line["step"], line["collapse"]) for line in self.lines if line.get("collapse")), None)

    def __str__(self) -> str:
        if not self.lines:
            return "no step is logged yet"
        of = "" if self.steps is None else f" of {self.steps:,}"
        loss = self.last["loss"]
        left = "" if self.seconds_left is None else f", {units.duration(self.seconds_left)} to go"
        alarm = ", looks like a collapse" if self.collapse else ""
        return f"step {self.step:,}{of}, loss {'not finite' if loss is None else f'{loss:.3f}'}{left}{alarm}"
