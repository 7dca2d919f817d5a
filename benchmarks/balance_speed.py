"""How long exact semantic balance takes, how much memory, and what approximate routes to the same question miss.

    python benchmarks/balance_speed.py --sizes 20000 50000 100000 --dims 512 1280    every method, three rounds
    python benchmarks/balance_speed.py --kinds pow flat soft cont outlier heavy drift --sizes 50000
    python benchmarks/balance_speed.py --methods numpy clip-cid --sizes 2000 5000 10000 20000 --dims 512 1280    few rows
    python benchmarks/balance_speed.py --scaling                                     clip_cid alone, 20,000 to 1,000,000 rows
    python benchmarks/balance_speed.py --memory 1000000x512                          memory beyond the mapped file

Writes results.json, table.md, scaling.svg and scaling.csv to --out (default runs/balance-speed); the made-up data (see
balance_data.py) and the true pairs stay in --work (default data/balance-speed).

What is measured. Each run is a process of its own, one thread, pinned to one core (--no-pin); methods take turns within a
round. CPU is user + system of the process from the call to its answer: imports, a warm-up call on 64 rows (which
takes lazy imports out of the figure) and loading are outside; "with imports" adds imports and warm-up. `clip-cid` gets the float16
memory map and reads, converts and checks it inside the clock; the others get a float32 array of unit rows made outside of it.
`clip-cid` also picks the row to keep and verifies pairs in float64, which the others do not. The file is read once beforehand, so
nobody waits for the disk. Memory is the peak during the work above what the process had when it began: `RSS` from VmHWM, reset
through /proc/self/clear_refs (pages of the map count), `anonymous` from RssAnon sampled every 50 ms (they do not).

Methods. Pairs at cosine >= 1 - threshold, then connected components:
- clip-cid: clip_cid.balance(array, threshold=...).
- faiss: IndexFlatIP.range_search, which computes both halves of the square, in blocks of 4,096 queries; scipy's components.
- numpy: float32 products of the upper triangle in blocks of 4,096, the maximum of each row first; scipy's components.
- semdedup-n1000 and semdedup-256: FAISS spherical k-means (--kmeans-iterations; FAISS's own limit of 256 training points a
  center) with max(16, rows / 1000) or 256 clusters, then all pairs within a cluster as in numpy. "By its rule" is SemDeDup's own:
  an image goes if an earlier one of its cluster is near, farthest from the center first (its default, "hard").
- semhash: SemHash.from_embeddings with its default (approximate) usearch index, then self_deduplicate; not components.

True pairs are those of FAISS at a slightly wider radius, verified in float64; recall is of them. "exact" says whether the sets
(or, for clip-cid, also the kept rows) are those that the true pairs give; faiss and numpy can miss that by a pair within float32's rounding of the threshold.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from balance_data import Kind, dataset, mean_cosine, sha256
from balance_methods import METHODS, PREPARE, Job, Method, missing_packages, unit32
from balance_tables import draw, table
from balance_truth import digest, judge, true_pairs
from process_costs import cpu_seconds, machine, peak_memory, status_kib, thread_counts

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS")
SCALING_SIZES = (20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)


@dataclass(frozen=True)
class Options:
    """Which data, which methods, how often."""

    kinds: tuple[Kind, ...] = ("pow",)
    """Kinds of data, see balance_data.py."""
    sizes: tuple[int, ...] = (20_000, 50_000, 100_000)
    """Rows."""
    dims: tuple[int, ...] = (512,)
    """Columns."""
    methods: tuple[Method, ...] = METHODS
    """One that is not installed is left out, and the table says so."""
    rounds: int = 3
    """Runs of each method; the methods take turns, in another order each round."""
    work: Path = Path("data/balance-speed")
    """Where made data and true pairs are kept."""
    out: Path = Path("runs/balance-speed")
    """Where the results go."""
    budget_seconds: float = 900
    """CPU seconds: leave out a method that, by its time at smaller sizes, would need more for one run."""
    threshold: float = 0.07
    """Cosine distance."""
    seed: int = 0
    """Of the data and of k-means."""
    kmeans_iterations: int = 20
    """Of semdedup-*."""
    pin: bool = True
    """Give each run one core only; some libraries start threads whatever they are told."""
    scaling: bool = False
    """Measure clip-cid alone, at 20,000 to 1,000,000 rows of 512 (`--kinds` and `--rounds` still count)."""
    memory: Annotated[str | None, tyro.conf.arg(metavar="ROWSxDIM")] = None
    """Only this: memory of one clip-cid run beyond the mapped file, for each of `--kinds`."""
    memory_limit_mib: int | None = None
    """With --memory: refuse the process more private memory than this beyond what it has when the work begins (RLIMIT_DATA)."""


def main(options: Options) -> None:
    if options.memory is not None:
        return _memory(options)
    if options.scaling:
        options = dataclasses.replace(options, sizes=SCALING_SIZES, dims=(512,), methods=("clip-cid",))
    options.out.mkdir(parents=True, exist_ok=True)

    missing = {method: names for method in options.methods if (names := missing_packages(method))}
    for method, names in missing.items():
        print(f"{method}: left out, {names} not installed", flush=True)
    methods: list[Method] = [method for method in METHODS if method in options.methods and method not in missing]

    results: dict[str, Any] = {
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "machine": machine(),
        "left_out": [f"{method}: {names} not installed" for method, names in missing.items()],
        "data": [],
        "runs": [],
    }

    for kind in options.kinds:
        for dim in options.dims:
            for rows in sorted(options.sizes):
                _measure(kind, rows, dim, methods, results, options)
                _write(results, options)
    print((options.out / "table.md").read_text())


def _measure(
    kind: Kind, rows: int, dim: int, methods: Sequence[Method], results: dict[str, Any], options: Options
) -> None:
    # Methods that would take too long are left out.
    within = []
    for method in methods:
        expected = _expected(results["runs"], kind, rows, dim, method)
        if expected is not None and expected > options.budget_seconds:
            why = f"skipped: about {expected:,.0f} CPU s expected, the budget is {options.budget_seconds:,.0f}"
            if not np.isfinite(expected):
                why = "skipped: it did not finish, or was skipped, at a smaller size"
            results["runs"].append({"kind": kind, "rows": rows, "dim": dim, "method": method, "skipped": why})
            print(f"{kind} {rows:,} x {dim} {method}: {why}", flush=True)
        else:
            within.append(method)

    path = dataset(kind, rows, dim, options.work, seed=options.seed)
    described = {"kind": kind, "rows": rows, "dim": dim, "sha256": sha256(path), "mean_cosine": mean_cosine(path)}
    results["data"].append(described)

    for turn in range(options.rounds):
        shift = turn % max(len(within), 1)  # the first round starts with FAISS, which finds the true pairs
        for method in [*within[shift:], *within[:shift]]:
            job = Job(method, str(path), options.threshold, options.seed, options.kmeans_iterations, options.pin)
            run = {"kind": kind, "rows": rows, "dim": dim, "method": method, "round": turn}
            run |= _in_a_process(job, limit=4 * options.budget_seconds + 120)
            results["runs"].append(run)
            line = f"{run['cpu_s']:.2f} CPU s, {run['wall_s']:.2f} s" if "cpu_s" in run else run["failed"]
            print(f"{kind} {rows:,} x {dim} round {turn + 1} {method}: {line}", flush=True)
            _write(results, options)


def _expected(runs: Sequence[dict[str, Any]], kind: str, rows: int, dim: int, method: str) -> float | None:
    """CPU seconds at this size: along the line through the two largest sizes so far, quadratic after only one."""
    smaller: dict[int, list[float]] = {}
    for run in runs:
        if (run["kind"], run["dim"], run["method"]) == (kind, dim, method) and run["rows"] < rows:
            seconds = run.get("cpu_s", float("inf"))  # what was skipped or failed smaller is not tried larger
            smaller.setdefault(run["rows"], []).append(seconds)
    if not smaller:
        return None

    sizes = sorted(smaller)
    last = statistics.median(smaller[sizes[-1]])
    power = 2.0
    if len(sizes) > 1 and np.isfinite(last):
        before = statistics.median(smaller[sizes[-2]])
        power = float(np.clip(np.log(last / before) / np.log(sizes[-1] / sizes[-2]), 1, 2))
    return last * (rows / sizes[-1]) ** power


def _in_a_process(job: Job, limit: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(job))]
    load, environment = os.getloadavg()[0], os.environ | dict.fromkeys(ONE_THREAD, "1")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {limit:,.0f} s"}
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": f"failed: {said}", "stderr": done.stderr}
    return json.loads(done.stdout.splitlines()[-1]) | {"load_before": load}


def _run_job(job: Job) -> dict[str, Any]:
    if job.pin:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    # Imports and a warm-up, outside the clock.
    method, warm = PREPARE[job.method](job), unit32(np.random.default_rng(0).standard_normal((64, 16)))
    method(warm.astype(np.float16) if job.method == "clip-cid" else warm)
    for module, call in (("torch", "set_num_threads"), ("faiss", "omp_set_num_threads")):
        if module in sys.modules:
            getattr(sys.modules[module], call)(1)
    imports = cpu_seconds()

    _read_once(Path(job.path))
    stored = np.load(job.path, mmap_mode="r")
    rows = stored if job.method == "clip-cid" else unit32(stored)
    if job.limit_mib is not None:
        limit = status_kib("VmData") * 1024 + job.limit_mib * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with peak_memory() as memory:
        cpu, wall = cpu_seconds(), time.perf_counter()
        found = method(rows)
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall

    result: dict[str, Any] = {"cpu_s": cpu, "wall_s": wall, "cpu_with_imports_s": cpu + imports, **memory}
    result |= thread_counts()
    if job.only_memory:
        return result | {"removed": found.removed(len(rows)), "kept_digest": digest(found.kept)}
    truth = true_pairs(job, found if job.method == "faiss" else None)
    return result | judge(found, truth, len(rows))


def _read_once(path: Path) -> None:
    """Into the system's cache, not into this process."""
    with open(path, "rb") as handle:
        while handle.read(1 << 22):
            pass


def _memory(options: Options) -> None:
    assert options.memory is not None
    rows, dim = (int(number.replace(",", "").replace("_", "")) for number in options.memory.lower().split("x"))
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "memory": []}
    print(
        "| data | rows | columns | file, MiB | memory beyond it, MiB | per row, B | peak RSS above start, MiB | removed | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")

    for kind in options.kinds:
        path = dataset(kind, rows, dim, options.work, seed=options.seed)
        job = Job(
            "clip-cid", str(path), options.threshold, options.seed, 0, options.pin, True, options.memory_limit_mib
        )
        run = {"kind": kind, "rows": rows, "dim": dim, "limit_mib": options.memory_limit_mib}
        run |= _in_a_process(job, limit=10 * options.budget_seconds + 120)
        results["memory"].append(run)
        (options.out / "memory.json").write_text(json.dumps(results, indent=1))

        cells = [run.get("failed", ""), *[""] * 4]
        if "failed" not in run:
            cells = [f"{run['anonymous_mib']:,.0f}", f"{run['anonymous_mib'] * 2**20 / rows:,.0f}"]
            cells += [f"{run['rss_mib']:,.0f}", f"{run['removed']:.4f}", f"{run['cpu_s']:.1f}"]
        print(f"| {kind} | {rows:,} | {dim} | {path.stat().st_size / 2**20:,.0f} | {' | '.join(cells)} |", flush=True)


def _write(results: dict[str, Any], options: Options) -> None:
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    (options.out / "table.md").write_text(table(results))
    draw(results, options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(_run_job(Job(**json.loads(sys.argv[2])))))
    else:
        main(tyro.cli(Options, description=__doc__))
