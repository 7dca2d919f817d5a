"""Where the time of a training goes."""

import contextlib
import time
from collections.abc import Generator, Iterator
from typing import TypeVar

_Batch = TypeVar("_Batch")
_SETTLED = 60.0  # seconds at the start are not judged: workers start, and files are read for the first time


class Stopwatch:
    """Time of the training and the part spent waiting for data: over all attempts, and since the last line."""

    def __init__(self) -> None:
        self._before, self.waited = 0.0, 0.0
        self._began = self._saved = time.monotonic()
        self._lap = (0.0, 0.0, 0)
        self._warned = False

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the time of the attempts before this one; what this one took so far does not count."""
        self._before, self.waited = state["seconds"], state["waited"]
        self._began = self._saved = time.monotonic()

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

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """Time outside the training, which does not count."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - began

    def is_slow(self, share: float) -> bool:
        """Whether more than this share of the time was spent waiting; true once at most, after a minute."""
        if self._warned or self.seconds < _SETTLED or self.wait_share <= share:
            return False
        self._warned = True
        return True

    def lap(self, step: int) -> tuple[float, float, int]:
        """Seconds, seconds of waiting, and steps since the last call."""
        before, self._lap = self._lap, (self.seconds, self.waited, step)
        return max(self._lap[0] - before[0], 1e-9), self._lap[1] - before[1], step - before[2]

    def waiting(self, batches: Iterator[_Batch]) -> Generator[_Batch]:
        """The batches, with the time until each is there counted as waiting."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch
