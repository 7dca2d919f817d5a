"""Spherical k-means by `clip_cid` in blocks against FAISS's Kmeans: CPU seconds, objective, and memory.

    python benchmarks/cluster_speed.py                                       100,000 x 512, 1,000 centers, soft and cont
    python benchmarks/cluster_speed.py --rows 200000 --centers 10000 --faiss-rounds 6 --block-rounds 6 3 --repeats 1 --kinds pow
    python benchmarks/cluster_speed.py --memory --rows 2000000 --centers 500 --kinds cont --block-rounds 2 --faiss-rounds 2   a file larger than the memory that is allowed

Prints Markdown; the made-up data (see balance_data.py) stay in --work (default data/balance-speed).

What is measured. Each run is a process of its own with one thread; methods take turns, --repeats times. CPU is
time.process_time of that process, without imports and without a warm-up on 500 rows. FAISS gets a float32 array of unit rows
that was made outside the clock, trains on all of them (max_points_per_centroid is raised) and then searches its own index for
the labels. `clip-cid` gets the float16 memory map and reads, checks and converts it inside the clock; its start at two levels
and its last assignment (exact in float64) are inside, too. The objective is Eq. 1 over all rows, from the centers that came
out, in float64, outside the clock. Memory is the peak of RssAnon, sampled every 10 ms, above what it was before the data: pages
of the file do not count.

With --memory a process with imports done may take --allow MiB more of private memory (RLIMIT_DATA), less than the file has. It
must cluster the whole file in blocks, with the training on all rows; FAISS under the same limit must fail.
"""

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_BLOCK = 4096


@dataclass(frozen=True)
class Options:
    """What to run."""

    kinds: tuple[str, ...] = ("soft", "cont")
    """Kinds of data, as in balance_data.py."""
    rows: int = 100_000
    dim: int = 512
    centers: int = 1000
    faiss_rounds: int = 20
    block_rounds: tuple[int, ...] = (20, 8)
    """Each number of rounds is a method."""
    repeats: int = 3
    seed: int = 0
    memory: bool = False
    """Show the memory limit instead."""
    allow: int = 512
    """MiB that --memory allows beyond the imports."""
    work: Path = Path("data/balance-speed")


def main(options: Options) -> None:
    if options.memory:
        show_memory(options)
        return
    import faiss
    import numpy as np
    import torch

    print(f"{processor()}; torch {torch.__version__}, faiss {faiss.__version__}, numpy {np.__version__}; one thread\n")
    print(
        f"{options.rows:,} x {options.dim}, {options.centers:,} centers, {options.repeats} interleaved repeats, median\n"
    )
    print(
        "| data | method | rounds | CPU s | of it start | last assignment | s / round | objective | empty | MiB | times FAISS |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    methods = [("faiss", options.faiss_rounds), *(("blocks", rounds) for rounds in options.block_rounds)]
    for kind in options.kinds:
        path = _data(kind, options.rows, options.dim, options.work)
        found: dict[tuple[str, int], list[dict[str, Any]]] = {method: [] for method in methods}
        for repeat in range(options.repeats):
            for method in methods:
                given = {"path": str(path), "method": method[0], "rounds": method[1], "centers": options.centers}
                found[method].append(_child({**given, "seed": options.seed + repeat}))
        _print_rows(kind, found)


def _print_rows(kind: str, found: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    def median(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    reference = median(next(iter(found.values())), "cpu")
    for (method, rounds), runs in found.items():
        each = (median(runs, "cpu") - median(runs, "start") - median(runs, "assign")) / rounds
        spread = f"{median(runs, 'cpu'):.2f} ({min(r['cpu'] for r in runs):.2f} to {max(r['cpu'] for r in runs):.2f})"
        print(
            f"| {kind} | {method} | {rounds} | {spread} | {median(runs, 'start'):.2f} | {median(runs, 'assign'):.2f} |"
            f" {each:.3f} | {median(runs, 'objective'):.5f} | {median(runs, 'empty'):.0f} | {median(runs, 'memory'):.0f} |"
            f" {reference / median(runs, 'cpu'):.2f} |",
            flush=True,
        )


def show_memory(options: Options) -> None:
    """A file of `rows` rows under the limit, by both."""
    path = _data(options.kinds[0], options.rows, options.dim, options.work)
    size = path.stat().st_size / 2**20
    print(
        f"file of {size:,.0f} MiB ({options.rows:,} x {options.dim} float16); allowed beyond the imports: {options.allow} MiB\n"
    )
    print("| method | outcome | private memory before, MiB | limit, MiB | peak of RssAnon above, MiB | CPU s |")
    print("|---|---|---|---|---|---|")
    for method in ("blocks", "faiss"):
        given = {"path": str(path), "method": method, "rounds": 2, "centers": options.centers, "seed": 0}
        run = _child({**given, "allow": options.allow})
        outcome = f"objective {run['objective']:.5f}" if "objective" in run else run["failed"]
        cpu = f"{run['cpu']:.1f}" if "cpu" in run else "-"
        print(
            f"| {method} | {outcome} | {run['before']:.0f} | {run['limit']:.0f} | {run['memory']:.0f} | {cpu} |",
            flush=True,
        )


def _data(kind: str, rows: int, dim: int, work: Path) -> Path:
    from balance_data import dataset

    return dataset(kind, rows, dim, work)  # pyright: ignore[reportArgumentType]


def _child(given: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    command = [sys.executable, __file__, "--child", json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    """The most anonymous memory so far above what there was at the start, in MiB."""

    def __init__(self) -> None:
        self._before = self._most = _status("RssAnon")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, _status("RssAnon"))
            time.sleep(0.01)

    @property
    def above(self) -> float:
        return self._most - self._before


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def run_child(given: dict[str, Any]) -> dict[str, Any]:
    import faiss
    import numpy as np
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rows = np.load(given["path"], mmap_mode="r")
    work = {"faiss": _faiss, "blocks": _blocks}[given["method"]]
    work(rows[:500], {**given, "centers": 100, "rounds": 1})
    found: dict[str, Any] = {}
    if "allow" in given:
        found["before"] = _status("VmData")
        found["limit"] = found["before"] + given["allow"]
        most = int(found["limit"] * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    for start in range(0, len(rows), _BLOCK):  # nobody waits for the disk
        rows[start : start + _BLOCK].max()
    peak = Peak()
    try:
        measured, centers, labels = work(rows, given)
    except (MemoryError, RuntimeError) as error:
        return {**found, "failed": f"{type(error).__name__}: {str(error)[:60]}", "memory": peak.above}
    found |= {**measured, "memory": peak.above}
    return {**found, "objective": objective(rows, centers, labels), "empty": len(centers) - len(np.unique(labels))}


def _faiss(rows: Any, given: dict[str, Any]) -> tuple[dict[str, float], Any, Any]:
    import faiss
    import numpy as np

    units = np.empty((len(rows), rows.shape[-1]), dtype=np.float32)
    for start in range(0, len(rows), _BLOCK):
        units[start : start + _BLOCK] = rows[start : start + _BLOCK]
    faiss.normalize_L2(units)
    began = time.process_time()
    kmeans = faiss.Kmeans(
        units.shape[1],
        given["centers"],
        niter=given["rounds"],
        spherical=True,
        seed=given["seed"],
        min_points_per_centroid=1,
        max_points_per_centroid=10**9,
    )
    kmeans.train(units)
    trained = time.process_time()
    assert kmeans.index is not None
    _, labels = kmeans.index.search(units, 1)
    ended = time.process_time()
    return {"cpu": ended - began, "start": 0.0, "assign": ended - trained}, kmeans.centroids, labels[:, 0]


def _blocks(rows: Any, given: dict[str, Any]) -> tuple[dict[str, float], Any, Any]:
    from clip_cid import spherical_kmeans

    times: list[float] = []
    began = time.process_time()
    found = spherical_kmeans(
        rows,
        num_centers=given["centers"],
        iterations=given["rounds"],
        seed=given["seed"],
        max_points_per_center=10**6,
        on_state=lambda _: times.append(time.process_time()),
    )
    ended = time.process_time()
    return {"cpu": ended - began, "start": times[0] - began, "assign": ended - times[-1]}, found.centers, found.labels


def objective(rows: Any, centers: Any, labels: Any) -> float:
    import numpy as np

    total = 0.0
    exact = centers.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    for start in range(0, len(rows), _BLOCK):
        unit = rows[start : start + _BLOCK].astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        total += float((unit * exact[labels[start : start + _BLOCK]]).sum())
    return 2 - 2 * total / len(rows)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run_child(json.loads(sys.argv[2]))))
    else:
        import tyro

        main(tyro.cli(Options, description=__doc__))
