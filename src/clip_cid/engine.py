"""Where the tasks of a stage run: in processes of this machine, or on the nodes of a Ray cluster (`machine.ray`).

A task is a pure function of its name and of files, and leaves one file, whole or not at all. So an engine may do it
anywhere, again or twice, and the results are the same bytes.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from clip_cid import tasks as on_this_machine
from clip_cid.recipe import MachineConfig
from clip_cid.tasks import DoTask, Task


def run_tasks(
    tasks: Sequence[Task],
    begin: Callable[[], DoTask],
    *,
    machine: MachineConfig,
    folder: Path,
    processes: int,
    on_done: Callable[[Task], Any],
    leaves: Callable[[Task], Path] | None = None,
    gpus: int = 0,
    stay: bool = False,
) -> None:
    """Do every task, in any order. The first error stops those that have not begun, and is raised unchanged.

    Args:
        tasks: Values that name the tasks; they must be picklable.
        begin: Opens what the tasks read and returns the function that does one; it must be picklable, and is called
            once in each process.
        machine: Where the work is done.
        folder: Where the tasks write: it must be a shared one for a cluster.
        processes: Of this machine, without a cluster. With 1 the tasks are done in this process.
        on_done: Called in this process with each finished task.
        leaves: The file or folder that a task leaves. On a cluster a task counts as done when this host sees it: a
            host that has looked for a file before may remember for a minute that it is not there.
        gpus: That a task needs, on a cluster; without any it takes one core.
        stay: Of this machine, the processes wait for the next such call, until `released`: for many short calls. Those
            of a cluster always do.

    Raises:
        ClipCidError: As a task raised it; or processes died, or the cluster cannot be used.
    """
    if machine.ray is None:
        on_this_machine.run_tasks(tasks, begin, processes=processes, on_done=on_done, stay=stay)
        return
    from clip_cid import ray_tasks

    ray_tasks.run_tasks(tasks, begin, address=machine.ray, folder=folder, on_done=on_done, leaves=leaves, gpus=gpus)


@contextlib.contextmanager
def released(machine: MachineConfig) -> Generator[None]:
    """Around a stage: when it ends, the processes that worked for it end, too."""
    try:
        yield
    finally:
        on_this_machine.end_workers()
        if machine.ray is not None:
            from clip_cid import ray_tasks

            ray_tasks.disconnect()
