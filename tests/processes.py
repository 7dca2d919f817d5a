"""Real processes without seconds of imports: each is forked from a server that has loaded the libraries once.

They see the environment that the server was started with, and no import hook that checks types.
"""

import multiprocessing
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import other_seeds  # noqa: F401  # a process makes the same data as the test that has started it

PATIENCE = 120  # seconds until a process that hangs is ended
CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "open_clip",
        "faiss",
        "pytest",
        "hypothesis",
        "clip_cid.cli",
        "clip_cid.stages.cluster",
        "clip_cid.stages.distill",
    ]
)


def start(work: Callable[..., object], *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=_do, args=(work, *arguments))
    process.start()
    return process


def _do(work: Callable[..., Any], *arguments: Any) -> Any:
    multiprocessing.set_start_method(None, force=True)  # what it starts itself is started as in any other process
    return work(*arguments)


def exit_code(work: Callable[..., object], *arguments: Any) -> int | None:
    """Of a process that does `work`; negative if a signal ended it."""
    process = start(work, *arguments)
    process.join(PATIENCE)
    process.kill()
    process.join()
    return process.exitcode


def result(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a process of its own."""
    with CONTEXT.Pool(1) as pool:
        return pool.apply_async(_do, (work, *arguments)).get(PATIENCE)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(count: int, work: Callable[..., object], *arguments: Any) -> None:
    """`work(rank, *arguments)` in `count` processes at once; when one fails, the others are ended."""
    errors = CONTEXT.SimpleQueue()
    ranks = [start(_rank, errors, work, rank, *arguments) for rank in range(count)]
    deadline = time.monotonic() + PATIENCE
    try:
        while any(rank.is_alive() for rank in ranks) and errors.empty():
            assert time.monotonic() < deadline, "the ranks hang"
            wait([rank.sentinel for rank in ranks if rank.is_alive()], timeout=1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert errors.empty(), errors.get()
    assert [rank.exitcode for rank in ranks] == [0] * count


def _rank(errors: Any, work: Callable[..., object], rank: int, *arguments: Any) -> None:
    try:
        work(rank, *arguments)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
