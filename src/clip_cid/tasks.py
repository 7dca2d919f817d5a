"""Run tasks in this process or in several; and the rank of this process under torchrun.

A task is small and pure, and leaves a file of its own: whole, or not at all.
"""

import functools
import itertools
import multiprocessing
import os
import pickle
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import threadpoolctl

from clip_cid.errors import RunError

Task = TypeVar("Task")
"""One task: a value that names it, such as two numbers of blocks. It must be picklable."""
DoTask = Callable[[Any], None]
"""Does a task and leaves its file."""

_calls = itertools.count()
_waiting: tuple[int, ProcessPoolExecutor] | None = None  # how many processes, and those that wait for the next call
_opened: tuple[int, DoTask] | None = None  # of a worker process: the call, and what `begin` returned


def run_tasks(
    tasks: Sequence[Task],
    begin: Callable[[], DoTask],
    *,
    processes: int,
    on_done: Callable[[Task], Any],
    stay: bool = False,
) -> None:
    """Do every task, in any order, on this machine.

    Args:
        tasks: The tasks to do.
        begin: Opens what the tasks read and returns the function that does one; it must be picklable.
        processes: With 1 the tasks are done in this process; with more, each process has one thread.
        on_done: Called in this process with each finished task.
        stay: The processes wait for the next such call, until `end_workers`: for many short calls.

    Raises:
        RunError: Memory ran out in a process, or it died, most often for the same reason.
    """
    if processes <= 1 or len(tasks) <= 1:
        do_task = begin()
        for task in tasks:
            do_task(task)
            on_done(task)
        return

    pool = _pool(processes) if stay else _new_pool(min(processes, len(tasks)))
    done = False
    try:
        _drain(pool, functools.partial(_do, next(_calls), pickle.dumps(begin)), list(tasks), 2 * processes, on_done)
        done = True
    except (BrokenProcessPool, MemoryError) as error:
        died = "a worker process died, probably because memory ran out."
        raise RunError(
            "memory ran out in a worker process." if isinstance(error, MemoryError) else died,
            fix="Run the same command again (finished tasks are kept), with a smaller machine.balance_processes.",
        ) from error
    finally:
        if not stay:
            pool.shutdown(wait=True, cancel_futures=True)
        elif not done:
            end_workers()


def end_workers() -> None:
    """End the processes that wait for the next call, if there are any."""
    global _waiting
    if _waiting is not None:
        _, pool = _waiting
        _waiting = None
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    """So many processes that stay: those of an earlier call, or new ones."""
    global _waiting
    if _waiting is not None and _waiting[0] != processes:
        end_workers()
    if _waiting is None:
        _waiting = processes, _new_pool(processes)
    return _waiting[1]


def _new_pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> float:
    """Bytes that this process may still take: of the machine, its control group, and its own limits."""
    limits = [float("inf")]

    # The machine.
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(float(lines["MemAvailable"].split()[0]) * 1024)

    # Its control group, whose file cache is given back when memory is short.
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        limits.append(float(limit) - float((group / "memory.current").read_text()) + float(cached))

    # The process.
    own, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if own != resource.RLIM_INFINITY:
        limits.append(float(own))
    return min(limits)


def peak_memory(whose: int = resource.RUSAGE_SELF) -> float:
    """The most bytes that this process has held so far; with `RUSAGE_CHILDREN`, that one of its ended children has."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(whose).ru_maxrss * unit


def _drain(
    pool: ProcessPoolExecutor,
    do: Callable[[Any], None],
    tasks: list[Any],
    ahead: int,
    on_done: Callable[[Any], Any],
) -> None:
    """Hand out a few tasks at a time, so that an error or an interrupt stops the rest."""
    tasks.reverse()
    running: dict[Future[None], Any] = {}
    while tasks or running:
        while tasks and len(running) < ahead:
            task = tasks.pop()
            running[pool.submit(do, task)] = task
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            future.result()
            on_done(running.pop(future))


def sendable(error: Exception) -> Exception:
    """The error itself, or one of the same words if it would not arrive in another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threadpoolctl.threadpool_limits(1)


def _do(call: int, begin: bytes, task: Any) -> None:
    """Do a task of a call; what its tasks read is opened with the first one."""
    global _opened
    try:
        if _opened is None or _opened[0] != call:
            _opened = None
            _opened = call, pickle.loads(begin)()
        _opened[1](task)
    except Exception as error:
        if (known := sendable(error)) is error:
            raise
        raise known from None


def _end_with_parent() -> None:
    """End this worker when its parent is gone; a killed parent cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class Place(NamedTuple):
    """The place of this process among those of torchrun."""

    rank: int
    size: int


def torchrun_place() -> Place:
    """The rank that torchrun has given this process; without torchrun, the only one."""
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
