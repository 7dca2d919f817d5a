import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from clip_cid.data.pairs.decoding import decoded_batches
from clip_cid.errors import DataError, RunError


class Numbers:
    """Gives ten times the place; some places fail in their own way."""

    def __init__(self, **failures: Any) -> None:
        self.failures = failures

    def __getitem__(self, place: int, /) -> int:
        if place == self.failures.get("data"):
            raise DataError(f"{place}: gone.", fix="Bring it back.")
        if place == self.failures.get("bug"):
            raise ZeroDivisionError(f"at {place}")
        if place in self.failures.get("raised", {}):
            raise self.failures["raised"][place]
        if place == self.failures.get("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if place == self.failures.get("interrupted"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return 10 * place


def decode(numbers: Numbers, *, workers: int) -> list[tuple[int, ...]]:
    batches = ([2 * batch, 2 * batch + 1] for batch in range(5))
    return list(decoded_batches(numbers, batches, tuple, workers=workers, smaller_batch="machine.embed_batch"))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_their_order_whoever_decodes_them(workers: int) -> None:
    assert decode(Numbers(), workers=workers) == [(20 * batch, 20 * batch + 10) for batch in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_keeps_its_problem_and_its_fix(workers: int) -> None:
    with pytest.raises(DataError, match=r"7: gone\.") as error:
        decode(Numbers(data=7), workers=workers)
    assert error.value.fix == "Bring it back."


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_is_not_swallowed(workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="at 7"):
        decode(Numbers(bug=7), workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_error_arrives_as_it_was_raised(workers: int) -> None:
    with pytest.raises(RunError, match="in use") as ours:
        decode(Numbers(raised={3: RunError("in use.", fix="Wait.")}), workers=workers)
    assert ours.value.fix == "Wait."
    with pytest.raises(OSError, match="Input/output") as of_disk:
        decode(Numbers(raised={3: OSError(errno.EIO, "Input/output error", "a.tar")}), workers=workers)
    assert (of_disk.value.errno, of_disk.value.filename) == (errno.EIO, "a.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_is_not_taken_for_a_killed_worker(workers: int) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        decode(Numbers(raised={3: RuntimeError("shapes differ in a DataLoader worker")}), workers=workers)
    with pytest.raises(TypeError, match="3 arguments"):
        list(decoded_batches(Numbers(), [[1], [2]], Unstackable(), workers=workers, smaller_batch="x"))


class Unstackable:
    def __call__(self, items: list[int]) -> tuple[int, ...]:
        raise TypeError("3 arguments")


def test_the_traceback_of_a_worker_is_kept_as_a_note() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        decode(Numbers(bug=7), workers=1)
    assert "in __getitem__" in error.value.__notes__[0]


def test_a_killed_worker_is_an_error_that_names_both_settings() -> None:
    with pytest.raises(RunError, match="decodes images was killed") as error:
        decode(Numbers(killed=7), workers=2)
    assert "machine.workers" in error.value.fix
    assert "machine.embed_batch" in error.value.fix


def test_signals_to_the_group_are_left_to_the_main_process() -> None:
    assert len(decode(Numbers(interrupted=7), workers=2)) == 5


@pytest.mark.slow
def test_a_process_ends_though_an_error_that_it_keeps_holds_its_workers() -> None:
    code = (
        "from test_decoding import Numbers, decode\n"
        "try:\n"
        "    decode(Numbers(bug=3), workers=1)\n"
        "except Exception as error:\n"
        "    kept = error\n"  # its traceback holds the iterator, and with it the worker, to the end
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=120)


@pytest.mark.slow
def test_a_process_ends_though_its_reader_failed_and_is_kept() -> None:
    """The reader's traceback holds the generator, which nobody has closed."""
    code = (
        "from test_decoding import Numbers, decoded_batches\n"
        "batches = decoded_batches(Numbers(), ([n] for n in range(99)), tuple, workers=2, smaller_batch='x')\n"
        "try:\n"
        "    for batch in batches:\n"
        "        raise OSError(24, 'Too many open files')\n"
        "except OSError as error:\n"
        "    kept = error\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=120)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's iterator, half made
def test_workers_are_ended_if_not_all_of_them_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    before, starts = set(multiprocessing.active_children()), []
    start = BaseProcess.start

    def start_one(process: Any) -> None:
        if starts:
            raise OSError(errno.EMFILE, "Too many open files")
        starts.append(process)
        start(process)

    monkeypatch.setattr(BaseProcess, "start", start_one)
    with pytest.raises(OSError, match="Too many open files"):
        decode(Numbers(), workers=2)
    starts[0].join(60)
    assert starts[0].exitcode == -signal.SIGKILL
    assert set(multiprocessing.active_children()) <= before


def test_no_worker_outlives_a_reader_that_stops_early() -> None:
    before = multiprocessing.active_children()
    batches = decoded_batches(
        Numbers(), ([place] for place in range(100)), tuple, workers=2, smaller_batch="machine.embed_batch"
    )
    assert next(batches) == (0,)
    batches.close()
    assert set(multiprocessing.active_children()) <= set(before)
