"""Decoding in worker processes: batches arrive in order, and what fails in a worker is raised in this process."""

import atexit
import functools
import multiprocessing
import signal
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch.utils.data import DataLoader, Dataset, get_worker_info

from clip_cid import tasks
from clip_cid.errors import RunError

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
        RunError: A worker was killed.
        Exception: The decoder raised it.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(decoder),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=functools.partial(_stack_unless_failed, stack),
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
    )

    decoded: Any = None
    others = set(multiprocessing.active_children())
    try:
        decoded = iter(loader)
        _live.add(decoded)
        for batch in decoded:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise RunError(
            f"A process that decodes images was killed ({' '.join(str(error).split())[:200]}).",
            fix=f"Memory or /dev/shm ran out: lower machine.workers (0 decodes in this process) or {smaller_batch}.",
        ) from error
    finally:
        if decoded is not None:
            _end_workers(decoded)
        else:  # not all could be started, and torch forgets those that were
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()


# By default torch ends the workers when the iterator is freed. The traceback of a kept exception delays that to the exit
# of Python, which sends SIGTERM and waits; these workers ignore SIGTERM. So they are ended here in any case.
_live: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _end_workers(decoded: Any) -> None:
    workers = getattr(decoded, "_workers", ())
    if workers:
        decoded._shutdown_workers()
    for worker in workers:
        if worker.is_alive():  # in a read that does not end
            worker.kill()


@atexit.register
def _end_all() -> None:
    for decoded in list(_live):
        _end_workers(decoded)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: torch would make another one of it, of its message alone."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        sent = tasks.sendable(error)
        if get_worker_info() is not None:  # the traceback itself stays in the worker
            sent.add_note("".join(traceback.format_exception(error)).rstrip())
        return cls(sent)


class _Guarded(Dataset[Any]):
    """A decoder whose errors come back as values."""

    def __init__(self, decoder: Decoder[Any, Any]) -> None:
        self._decoder = decoder

    def __getitem__(self, place: Any) -> Any:
        try:
            return self._decoder[place]
        except Exception as error:
            return _Failure.of(error)


def _stack_unless_failed(stack: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """The items of a batch as one, or the first of its failures."""
    failed = next((item for item in items if isinstance(item, _Failure)), None)
    if failed is not None:
        return failed
    try:
        return stack(items)
    except Exception as error:
        return _Failure.of(error)


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C and SIGTERM may reach every process of the group; the main process ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
