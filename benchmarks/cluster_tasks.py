"""What the tasks of k-means cost: one process, processes of this machine, and a Ray cluster of this machine.

Each clusters the same made-up rows; they take turns. Told is a round: the time and the processor time of all processes,
those of Ray's node among them, from the second round to the last, by the number of rounds. Processor time does not
depend on what else the machine does. The results are compared byte for byte.

With --seconds each task waits until so much time has gone by since it began. The time of a round then tells what an
engine adds, whatever else the machine does, as long as the work of a task is shorter.

    python benchmarks/cluster_tasks.py --rows 150000 --centers 3000
    python benchmarks/cluster_tasks.py --rows 262144 --dim 64 --centers 200 --seconds 1 --engines processes Ray
"""

import argparse
import contextlib
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
from unittest import mock

import numpy as np

from clip_cid import cli, engine, ray_tasks
from clip_cid.file_digests import sha256_file
from clip_cid.stages import cluster

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also of a process that is started with this file
from process_costs import machine as this_machine

_CORES = 2


def make_rows(rows: int, dim: int, centers: int, folder: Path) -> list[str]:
    """Flags that name rows around some middles, all of them kept."""
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((centers, dim), dtype=np.float32)
    given = middles[rng.integers(0, centers, rows)] + rng.standard_normal((rows, dim), dtype=np.float32)
    np.save(folder / "rows.npy", (given / np.linalg.norm(given, axis=1, keepdims=True)).astype(np.float16))
    np.save(folder / "kept.npy", np.arange(rows))
    return ["--embeddings", str(folder / "rows.npy"), "--kept", str(folder / "kept.npy")]


def processor_seconds() -> float:
    """Of this process and all below it, ended ones included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15]))

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return sum(ticks[process] for process in parents if is_ours(process)) / os.sysconf("SC_CLK_TCK")


def open_filled(begin: Callable[[], Callable[[Any], None]], seconds: float) -> Callable[[Any], None]:
    """Opens tasks that take at least so long."""
    do_task = begin()

    def do(task: Any) -> None:
        began = time.perf_counter()
        do_task(task)
        time.sleep(max(0.0, seconds - (time.perf_counter() - began)))

    return do


def fill_tasks(seconds: float) -> None:
    tasks_of = importlib.import_module(Path(__file__).stem)  # by a name that workers can import, too
    original = engine.run_tasks

    def run_tasks(tasks: Any, begin: Any, **rest: Any) -> None:
        original(tasks, functools.partial(tasks_of.open_filled, begin, seconds), **rest)

    engine.run_tasks = run_tasks


def measure(run: Path, flags: list[str]) -> tuple[float, float, tuple[str, ...]]:
    """Seconds and processor seconds of a round, and the digests of the results."""
    moments: list[tuple[float, float]] = []
    write = cluster._StateFile.write

    def noting(file: Any, state: Any) -> None:
        write(file, state)
        moments.append((time.perf_counter(), processor_seconds()))

    with mock.patch.object(cluster._StateFile, "write", noting):
        if code := cli.main(["cluster", str(run), *flags]):
            sys.exit(code)
    (began, spent), (ended, spent_then) = moments[1], moments[-1]  # the first is the start
    rounds = len(moments) - 2
    results = tuple(sha256_file(run / "cluster" / name) for name in ("centers.npy", "labels.npy"))
    return (ended - began) / rounds, (spent_then - spent) / rounds, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--centers", type=int, default=2_000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, help="that a task takes at least")
    parser.add_argument("--engines", nargs="+", default=["one process", "processes", "Ray"])
    options = parser.parse_args()
    if options.seconds:
        fill_tasks(options.seconds)

    os.environ |= {**ray_tasks.SETTINGS, "PYTHONPATH": os.pathsep.join(sys.path)}
    nodes: Any = importlib.import_module("ray.cluster_utils").Cluster()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in options.engines}
    results: set[tuple[str, ...]] = set()
    try:
        nodes.add_node(num_cpus=_CORES, object_store_memory=80 * 2**20, include_dashboard=False)
        with tempfile.TemporaryDirectory() as folder:
            flags = make_rows(options.rows, options.dim, options.centers, Path(folder))
            flags += ["--cluster.num-centers", str(options.centers), "--cluster.iterations", str(options.iterations)]
            flags += ["--machine.threads", "1"]
            own = {
                "one process": ["--machine.balance-processes", "1"],
                "processes": ["--machine.balance-processes", str(_CORES)],
                "Ray": ["--ray", nodes.address],
            }
            for turn in range(options.rounds):
                for name in options.engines:
                    *times, result = measure(Path(folder) / f"{name}-{turn}", [*flags, *own[name]])
                    found[name].append((times[0], times[1]))
                    results.add(result)
    finally:
        nodes.shutdown()

    print(this_machine())
    print(
        f"{options.rows:,} x {options.dim}, {options.centers:,} centers, {options.iterations} rounds; one thread, {_CORES} processes, a node of {_CORES} cores"
    )
    first = options.engines[0]
    for name, times in found.items():
        print(
            f"{name}: a round {', '.join(f'{wall:.3f}' for wall, _ in times)} s,"
            f" of processors {', '.join(f'{cpu:.3f}' for _, cpu in times)} s"
        )
        for what, which in (("time", 0), ("processor time", 1)):
            ratios = [own[which] / other[which] for own, other in zip(times, found[first], strict=True)]
            print(
                f"  {what}, as against {first} in its turn: {', '.join(f'{one:.3f}' for one in ratios)},"
                f" median {statistics.median(ratios):.3f}"
            )
    print(f"equal bytes: {'yes' if len(results) == 1 else 'NO'}")


if __name__ == "__main__":
    main()
