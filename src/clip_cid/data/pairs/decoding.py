"""Decoding in worker processes: batches arrive in order, and what fails in a worker is raised in this process."""

import functools
import signal
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch.utils.data import DataLoader, Dataset

from clip_cid.errors import DataError, RunError

Place = TypeVar("Place")
PlaceIn = TypeVar("PlaceIn", contravariant=True)
Item = TypeVar("Item")
ItemOut = TypeVar("ItemOut", covariant=True)
Batch = TypeVar("Batch")


@runtime_checkable
class Decoder(Protocol[PlaceIn, ItemOut]):
    """Reads and decodes what is at a place; it is copied to the workers."""

    def __getitem__(self, place: PlaceIn, /) -> ItemOut: ...


def decoded_batches(
    decoder: Decoder[Place, Item],
    batches: Iterable[list[Place]],
    stack: Callable[[list[Item]], Batch],
    *,
    workers: int,
    smaller_batch: str,
    pin: bool = False,
) -> Generator[Batch]:
    """Each of the batches, decoded and stacked, in their order; close the generator where it may not be exhausted.

    Args:
        decoder: A `BadSample` is for it to handle: one broken image must not end the others.
        batches: The places of each batch.
        stack: Makes one batch of its items, in the worker.
        workers: Processes that decode; 0 decodes in this one.
        smaller_batch: The setting that gives smaller batches, for the message when memory runs out.
        pin: Copy tensors into pinned memory, from which a GPU reads faster.

    Raises:
        DataError: The decoder raised it.
        RunError: A worker was killed.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(decoder),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=functools.partial(_stack_unless_failed, stack),
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
    )

    decoded: Any = iter(loader)
    try:
        for batch in decoded:
            if isinstance(batch, _Failure):
                raise DataError(batch.problem, fix=batch.fix)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"A process that decodes images was killed ({' '.join(str(error).split())[:200]}).",
            fix=f"Memory or /dev/shm ran out: lower machine.workers (0 decodes in this process) or {smaller_batch}.",
        ) from error
    finally:
        # By default torch ends the workers when the iterator is freed. The traceback of a kept exception delays
        # that to the exit of Python, which sends SIGTERM and waits; these workers ignore SIGTERM.
        if workers:
            decoded._shutdown_workers()


@dataclass(frozen=True)
class _Failure:
    """A `DataError` on its way from a worker: torch cannot carry our exceptions between processes."""

    problem: str
    fix: str


class _Guarded(Dataset[Any]):
    """A decoder whose `DataError` comes back as a value."""

    def __init__(self, decoder: Decoder[Any, Any]) -> None:
        self._decoder = decoder

    def __getitem__(self, place: Any) -> Any:
        try:
            return self._decoder[place]
        except DataError as error:
            return _Failure(error.problem, error.fix)


def _stack_unless_failed(stack: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """The items of a batch as one, or the first of its failures."""
    return next((item for item in items if isinstance(item, _Failure)), None) or stack(items)


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C and SIGTERM may reach every process of the group; the main process ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
