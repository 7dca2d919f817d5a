import functools
import os
from pathlib import Path

import pytest

from clip_cid import tasks
from clip_cid.errors import RunError


def open_work(folder: Path):
    return functools.partial(write, folder)


def write(folder: Path, task: int) -> None:
    if task == 13:
        raise ValueError("task 13")
    if task == 99:
        os._exit(9)
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


def test_no_tasks_need_no_workers(tmp_path):
    tasks.run_tasks([], functools.partial(open_work, tmp_path), processes=4, on_done=id)
    assert not list(tmp_path.iterdir())


def test_the_available_memory_heeds_the_limit_of_the_process(monkeypatch):
    assert tasks.available_memory() > 1e6
    monkeypatch.setattr(tasks.resource, "getrlimit", lambda which: (12345, 12345))
    assert tasks.available_memory() == 12345
