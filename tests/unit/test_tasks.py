import errno
import functools
import importlib
import os
import pickle
import pkgutil
import threading
from pathlib import Path

import pytest

import clip_cid
from clip_cid import ray_tasks, tasks
from clip_cid.errors import ClipCidError, DataError, MissingExtraError, RunError


class TwoArguments(ValueError):
    """It pickles, but cannot be made again from its message."""

    def __init__(self, row: int, value: float) -> None:
        super().__init__(f"row {row} has {value}")


class WithHandle(ValueError):
    """It does not pickle."""

    def __init__(self) -> None:
        super().__init__("a file was closed")
        self.lock = threading.Lock()


ERRORS: dict[int, Exception] = {
    20: DataError("5 images but 4 texts.", fix="Embed again."),
    21: MissingExtraError("A graph", "onnx", ("onnxruntime",)),
    22: OSError(errno.ENOSPC, "No space left on device", "/run/x"),
    23: MemoryError("700 GB"),
    24: TwoArguments(3, 0.5),
    25: WithHandle(),
}


def open_work(folder: Path):
    return functools.partial(write, folder)


def write(folder: Path, task: int) -> None:
    if task == 13:
        raise ValueError("task 13")
    if task == 99:
        os._exit(9)
    if task in ERRORS:
        raise ERRORS[task]
    (folder / f"{task}").write_text(str(os.getpid()))


@pytest.mark.parametrize("processes", [1, 2])
def test_every_task_is_done_once_and_told(tmp_path, processes):
    told: list[int] = []
    tasks.run_tasks(range(9), functools.partial(open_work, tmp_path), processes=processes, on_done=told.append)
    assert sorted(told) == list(range(9))
    workers = {path.read_text() for path in tmp_path.iterdir()}
    assert (str(os.getpid()) in workers) == (processes == 1)
    assert len(list(tmp_path.iterdir())) == 9


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_task_comes_back_as_it_is(tmp_path, processes):
    with pytest.raises(ValueError, match="task 13"):
        tasks.run_tasks([1, 13, 2], functools.partial(open_work, tmp_path), processes=processes, on_done=id)


def test_a_worker_that_dies_is_an_error_with_advice(tmp_path):
    with pytest.raises(RunError, match="a worker process died"):
        tasks.run_tasks([1, 99, 2], functools.partial(open_work, tmp_path), processes=2, on_done=id)


def run_two(tmp_path: Path, begin, *numbers: int) -> None:
    tasks.run_tasks([1, 2, *numbers], functools.partial(begin, tmp_path), processes=2, on_done=id)


@pytest.mark.slow
def test_errors_of_ours_and_of_the_system_come_back_from_another_process_as_they_were(tmp_path):
    with pytest.raises(DataError) as ours:
        run_two(tmp_path, open_work, 20)
    assert (ours.value.problem, ours.value.fix) == ("5 images but 4 texts.", "Embed again.")
    with pytest.raises(MissingExtraError) as missing:
        run_two(tmp_path, open_work, 21)
    assert missing.value.fix == 'pip install "clip-cid[onnx]"'
    with pytest.raises(OSError, match="No space left") as full:
        run_two(tmp_path, open_work, 22)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/run/x")
    with pytest.raises(RunError, match="memory ran out in a worker process") as memory:
        run_two(tmp_path, open_work, 23)
    assert "balance_processes" in memory.value.fix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "words"), [(24, "TwoArguments: row 3 has 0.5"), (25, "WithHandle: a file was closed")]
)
def test_an_error_that_cannot_be_sent_is_not_taken_for_the_death_of_a_worker(tmp_path, task, words):
    with pytest.raises(RuntimeError, match=words):
        run_two(tmp_path, open_work, task)


def refuse(folder: Path):
    raise DataError(f"{folder}: changed.", fix="Embed again.")


def test_an_error_before_the_first_task_is_not_taken_for_the_death_of_a_worker(tmp_path):
    with pytest.raises(DataError, match="changed") as error:
        run_two(tmp_path, refuse)
    assert error.value.fix == "Embed again."


@pytest.mark.parametrize("error", ERRORS.values(), ids=lambda error: type(error).__name__)
def test_every_error_is_sendable(error):
    sent = pickle.loads(pickle.dumps(tasks.sendable(error)))
    assert str(error) in str(sent)
    if isinstance(error, ClipCidError):
        assert (type(sent), sent.problem, sent.fix) == (type(error), error.problem, error.fix)


def kinds_of(kind: type[ClipCidError]) -> list[type[ClipCidError]]:
    return [kind, *(deeper for under in kind.__subclasses__() for deeper in kinds_of(under))]


def test_errors_of_every_kind_of_ours_keep_what_they_say_and_what_was_noted_on_the_way():
    for module in pkgutil.walk_packages(clip_cid.__path__, "clip_cid."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    kinds = kinds_of(ClipCidError)
    assert len(kinds) >= 10
    for kind in kinds:
        error = (
            MissingExtraError("A graph", "onnx", ("onnxruntime",))
            if kind is MissingExtraError
            else ray_tasks._UnseenError(Path("run"), "second", fix="Share it.")
            if kind is ray_tasks._UnseenError
            else kind("Row 7 is broken.", fix="Go.")
        )
        error.add_note("in a worker")
        sent = tasks.sendable(pickle.loads(pickle.dumps(error)))
        assert isinstance(sent, ClipCidError)
        assert (type(sent), sent.problem, sent.fix, str(sent)) == (kind, error.problem, error.fix, str(error))
        assert sent.__notes__ == ["in a worker"]


def test_no_tasks_need_no_workers(tmp_path):
    tasks.run_tasks([], functools.partial(open_work, tmp_path), processes=4, on_done=id)
    assert not list(tmp_path.iterdir())


def test_the_available_memory_heeds_the_limit_of_the_process(monkeypatch):
    assert tasks.available_memory() > 1e6
    monkeypatch.setattr(tasks.resource, "getrlimit", lambda which: (12345, 12345))
    assert tasks.available_memory() == 12345
