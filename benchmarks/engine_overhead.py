"""What an engine adds to the tasks: the processes of this machine against a Ray cluster of this machine.

Each task sleeps, so other work on the machine lengthens no task, only what the engine itself does. A start is
the time up to the first finished task; the rest is told as seconds a task and slot. The engines take turns.

    python benchmarks/engine_overhead.py --tasks 60 --seconds 1
"""

import argparse
import functools
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_cid import engine, ray_tasks
from clip_cid.recipe import MachineConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also of a process that is started with this file
from process_costs import machine as this_machine

_SLOTS = 2


def open_tasks(folder: Path, seconds: float) -> Callable[[int], None]:
    return functools.partial(sleep, folder, seconds)


def sleep(folder: Path, seconds: float, task: int) -> None:
    time.sleep(seconds)
    (folder / str(task)).touch()


def measure(machine: MachineConfig, tasks: int, seconds: float) -> tuple[float, float]:
    """Seconds up to the first finished task beyond its own; and of each further one, a slot."""
    tasks_of = importlib.import_module(Path(__file__).stem)  # by a name that workers can import, too
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder, engine.released(machine):
        start = time.perf_counter()
        engine.run_tasks(
            range(tasks),
            functools.partial(tasks_of.open_tasks, Path(folder), seconds),
            machine=machine,
            folder=Path(folder),
            processes=_SLOTS,
            on_done=lambda task: ends.append(time.perf_counter()),
        )
    each = (ends[-1] - ends[_SLOTS - 1]) / (tasks - _SLOTS) * _SLOTS
    return ends[0] - start - seconds, each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a task")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(this_machine())

    os.environ |= {**ray_tasks.SETTINGS, "PYTHONPATH": os.pathsep.join(sys.path)}
    nodes: Any = importlib.import_module("ray.cluster_utils").Cluster()
    try:
        nodes.add_node(num_cpus=_SLOTS, object_store_memory=80 * 2**20, include_dashboard=False)
        engines = {"processes": MachineConfig(), "Ray": MachineConfig(ray=nodes.address)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for _ in range(options.rounds):
            for name, machine in engines.items():
                found[name].append(measure(machine, options.tasks, options.seconds))
    finally:
        nodes.shutdown()

    print(f"{options.tasks} tasks of {options.seconds:g} s, {_SLOTS} at once, {options.rounds} rounds")
    for name, times in found.items():
        starts, each = zip(*times, strict=True)
        print(
            f"{name}: start {statistics.median(starts):.2f} s; a task"
            f" {', '.join(f'{one:.4f}' for one in each)} s, median {statistics.median(each):.4f} s"
        )
    local, ray = (statistics.median(each for _, each in found[name]) for name in engines)
    print(f"Ray / processes: {ray / local:.3f}")


if __name__ == "__main__":
    main()
