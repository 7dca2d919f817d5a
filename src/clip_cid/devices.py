"""Work on a device: what the host must not wait for, and copies that neither waits for.

The host gives a device its work long before it is done. Whoever asks for a value (`.item()`, `nonzero`, a copy
back) waits for all work before it, and the device is then idle until the host has given it more.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host can ask for a value without waiting for a device."""
    return tensor.device.type == "cpu"


class Copies:
    """Copies from the host to a device: on CUDA by way of pinned memory, on one stream of their own.

    A copy runs beside the work that the device has already, and only what comes after it waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, values: Tensor) -> Tensor:
        """The values on the device; the same tensor if they are there."""
        if self._stream is None or values.device.type != "cpu":
            return values.to(self._device, non_blocking=True)

        pinned = values if values.is_pinned() else values.pin_memory()
        with torch.cuda.stream(self._stream):
            there = pinned.to(self._device, non_blocking=True)
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._stream)
        there.record_stream(now)  # else its memory is given away on the stream of copies while it is read on this one
        return there


class Returning:
    """A tensor on its way to the host: on CUDA to pinned memory, as soon as it is computed.

    Elsewhere it is copied when it is asked for.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.device.type == "cuda":
            here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = here.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    def here(self) -> Tensor:
        """The values on the host, which waits for them, and not for what the device was told since."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.cpu()


class Begun(Generic[_Result]):
    """A result that a device has been told to compute."""

    def __init__(self, result: _Result, stream: torch.cuda.Stream | None) -> None:
        self._result, self._stream = result, stream
        self._done = None if stream is None else torch.cuda.current_stream(stream.device).record_event()

    @contextlib.contextmanager
    def waited_for(self) -> Generator[_Result]:
        """The result; what the block asks of it waits for the result, and not for what the device was told since."""
        if self._stream is None or self._done is None:
            yield self._result
            return
        self._stream.wait_event(self._done)
        with torch.cuda.stream(self._stream):
            yield self._result
        # Its memory may be used again by work that this stream does not wait for.
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Beside:
    """On CUDA a stream on which the host looks at results, beside the stream of the work."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begun(self, result: _Result) -> Begun[_Result]:
        """To be called when the device has been told to compute it."""
        return Begun(result, self._stream)


def one_ahead(items: Iterable[_Item], begin: Callable[[_Item], _Result], device: torch.device) -> Iterator[_Result]:
    """What `begin` gives for each item in turn; on a device the next item is begun before one is given.

    So the device has work while the host waits for the results of an item, and looks at them.
    """
    if device.type == "cpu":
        yield from map(begin, items)
        return

    waiting: list[_Result] = []
    for item in items:
        waiting.append(begin(item))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
