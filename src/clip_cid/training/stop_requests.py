"""Ctrl-C and a scheduler's SIGTERM: the current step is finished and saved first."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType

from clip_cid.errors import RunError


class StopRequest:
    """Whether SIGINT or SIGTERM has come; the current step is finished and saved before the stop."""

    def __init__(self) -> None:
        self.number = 0

    def obey(self, step: int) -> None:
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            raise RunError(
                f"Stopped by {signal.Signals(self.number).name} after step {step:,}, which is saved.",
                fix="Run the same command again to resume from there.",
            )


@contextlib.contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Catch the first SIGINT or SIGTERM; a second one ends the process at once, as it would have.

    A signal that is ignored stays ignored: a shell starts background jobs that way, and Ctrl-C must not
    stop them.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        # a plain write: whatever the signal interrupted may be in the middle of logging
        os.write(2, b"\nfinishing this step and saving it; once more ends at once\n")
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
