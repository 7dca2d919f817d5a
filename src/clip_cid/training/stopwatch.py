"""Where the time of a training goes."""

import time
from collections.abc import Iterator
from typing import TypeVar

_Batch = TypeVar("_Batch")


class Stopwatch:
    """Time of the training and how much of it was spent waiting for data: over all attempts, and since the last line."""

    def __init__(self, *, seconds: float = 0.0, waited: float = 0.0, step: int = 0) -> None:
        self._before, self.waited = seconds, waited
        self._began = self._saved = time.monotonic()
        self._lap = (seconds, waited, step)

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    @property
    def wait_share(self) -> float:
        return self.waited / max(self.seconds, 1e-9)

    @property
    def since_save(self) -> float:
        return time.monotonic() - self._saved

    def saved(self) -> None:
        self._saved = time.monotonic()

    def lap(self, step: int) -> tuple[float, float, int]:
        """Seconds, seconds of waiting, and steps since the last call."""
        before, self._lap = self._lap, (self.seconds, self.waited, step)
        return max(self._lap[0] - before[0], 1e-9), self._lap[1] - before[1], step - before[2]

    def waiting(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The batches, with the time until each is there counted as waiting."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch
