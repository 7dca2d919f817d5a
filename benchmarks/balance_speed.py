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

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro
from balance_data import Kind, dataset, mean_cosine, sha256

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS")

Method = Literal["faiss", "numpy", "clip-cid", "semdedup-n1000", "semdedup-256", "semhash"]
METHODS: tuple[Method, ...] = get_args(Method)
NEEDS: dict[Method, tuple[str, ...]] = {
    "faiss": ("faiss",),
    "numpy": (),
    "clip-cid": ("clip_cid",),
    "semdedup-n1000": ("faiss",),
    "semdedup-256": ("faiss",),
    "semhash": ("semhash", "usearch"),
}
SCALING_SIZES = (20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
BLOCK = 4096
WIDER = 1e-5  # of a cosine: far above float32's error, so that no true pair is missed before float64 decides
_TIED = 1e-9  # docs/method.md, `balance_keep`
_CELLS = 1 << 22


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
    missing = {method: absent for method in options.methods if (absent := _absent(method))}
    for method, absent in missing.items():
        print(f"{method}: left out, {absent} not installed", flush=True)
    methods: list[Method] = [method for method in METHODS if method in options.methods and method not in missing]
    results: dict[str, Any] = {
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "machine": machine(),
        "left_out": [f"{method}: {absent} not installed" for method, absent in missing.items()],
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
            job = _Job(method, str(path), options.threshold, options.seed, options.kmeans_iterations, options.pin)
            run = {"kind": kind, "rows": rows, "dim": dim, "method": method, "round": turn}
            run |= _in_a_process(job, limit=4 * options.budget_seconds + 120)
            results["runs"].append(run)
            line = f"{run['cpu_s']:.2f} CPU s, {run['wall_s']:.2f} s" if "cpu_s" in run else run["failed"]
            print(f"{kind} {rows:,} x {dim} round {turn + 1} {method}: {line}", flush=True)
            _write(results, options)


def _expected(runs: Sequence[dict[str, Any]], kind: str, rows: int, dim: int, method: str) -> float | None:
    """CPU seconds at this size: along the line through the two largest sizes so far, quadratic after only one."""
    seen: dict[int, list[float]] = {}
    for run in runs:
        if (run["kind"], run["dim"], run["method"]) == (kind, dim, method) and run["rows"] < rows:
            seconds = run.get("cpu_s", float("inf"))  # what was skipped or failed smaller is not tried larger
            seen.setdefault(run["rows"], []).append(seconds)
    if not seen:
        return None
    sizes = sorted(seen)
    last = statistics.median(seen[sizes[-1]])
    power = 2.0
    if len(sizes) > 1 and np.isfinite(last):
        before = statistics.median(seen[sizes[-2]])
        power = float(np.clip(np.log(last / before) / np.log(sizes[-1] / sizes[-2]), 1, 2))
    return last * (rows / sizes[-1]) ** power


def _absent(method: Method) -> str:
    return ", ".join(name for name in NEEDS[method] if importlib.util.find_spec(name) is None)


# A run, in a process of its own.


@dataclass(frozen=True)
class _Job:
    method: Method
    path: str
    threshold: float
    seed: int
    kmeans_iterations: int
    pin: bool
    only_memory: bool = False
    limit_mib: int | None = None


def _in_a_process(job: _Job, limit: float) -> dict[str, Any]:
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


def _run_job(job: _Job) -> dict[str, Any]:
    if job.pin:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    method, warm = _PREPARE[job.method](job), _unit32(np.random.default_rng(0).standard_normal((64, 16)))
    method(warm.astype(np.float16) if job.method == "clip-cid" else warm)
    for module, call in (("torch", "set_num_threads"), ("faiss", "omp_set_num_threads")):
        if module in sys.modules:
            getattr(sys.modules[module], call)(1)
    imports = _cpu()

    _read_once(Path(job.path))
    stored = np.load(job.path, mmap_mode="r")
    rows = stored if job.method == "clip-cid" else _unit32(stored)
    if job.limit_mib is not None:
        limit = _status("VmData") * 1024 + job.limit_mib * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with _memory_of() as memory:
        cpu, wall = _cpu(), time.perf_counter()
        found = method(rows)
        cpu, wall = _cpu() - cpu, time.perf_counter() - wall

    result: dict[str, Any] = {"cpu_s": cpu, "wall_s": wall, "cpu_with_imports_s": cpu + imports, **memory}
    result |= _threads()
    if job.only_memory:
        return result | {"removed": found.removed(len(rows)), "kept_digest": _digest(found.kept)}
    truth = _truth(job, found if job.method == "faiss" else None)
    return result | _judge(found, truth, len(rows))


@dataclass
class _Found:
    """What a method says: sets, and what else it has."""

    sets: np.ndarray | None = None
    """The set of each row, numbered in any way."""
    kept: np.ndarray | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    """Pairs, left < right."""
    cell_order: np.ndarray | None = None
    """SemDeDup: the place of each row in the order of its cluster."""
    candidates: tuple[np.ndarray, np.ndarray] | None = None

    def removed(self, rows: int) -> float:
        if self.kept is not None:
            return 1 - len(self.kept) / rows
        assert self.sets is not None
        return 1 - len(np.unique(self.sets)) / rows


def _prepare_clip_cid(job: _Job) -> Callable[[Any], _Found]:
    import clip_cid

    def run(rows: Any) -> _Found:
        found = clip_cid.balance(rows, threshold=job.threshold, metric="cosine")
        return _Found(sets=found.set_of, kept=found.kept)

    return run


def _prepare_faiss(job: _Job) -> Callable[[np.ndarray], _Found]:
    import faiss
    import scipy.sparse.csgraph  # noqa: F401  imported here so that it is outside the clock

    least = np.float32(1 - job.threshold)

    def run(rows: np.ndarray) -> _Found:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        lefts, rights, cosines = [], [], []
        for start in range(0, len(rows), BLOCK):
            limits, value, column = index.range_search(rows[start : start + BLOCK], float(least - WIDER))
            row = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
            above = np.flatnonzero(column > row)
            lefts.append(row[above].astype(np.int32))
            rights.append(column[above].astype(np.int32))
            cosines.append(value[above])
        left, right, cosine = np.concatenate(lefts), np.concatenate(rights), np.concatenate(cosines)
        near = cosine >= least
        sets = _components(len(rows), left[near], right[near])
        return _Found(sets=sets, left=left[near], right=right[near], candidates=(left, right))

    return run


def _prepare_numpy(job: _Job) -> Callable[[np.ndarray], _Found]:
    import scipy.sparse.csgraph  # noqa: F401

    def run(rows: np.ndarray) -> _Found:
        left, right = _near_pairs(rows, np.float32(1 - job.threshold))
        return _Found(sets=_components(len(rows), left, right), left=left, right=right)

    return run


def _prepare_semdedup(job: _Job) -> Callable[[np.ndarray], _Found]:
    import faiss
    import scipy.sparse.csgraph  # noqa: F401

    least = np.float32(1 - job.threshold)

    def run(rows: np.ndarray) -> _Found:
        clusters = min(256 if job.method == "semdedup-256" else max(16, round(len(rows) / 1000)), len(rows) // 2)
        settings = {"niter": job.kmeans_iterations, "spherical": True, "seed": job.seed, "min_points_per_centroid": 1}
        kmeans = faiss.Kmeans(rows.shape[1], clusters, **settings)
        kmeans.train(rows)
        cosine, cluster = (each[:, 0] for each in kmeans.index.search(rows, 1))
        by_cluster = np.lexsort((cosine, cluster))  # "hard": the farthest from the center first, so it is kept
        pairs = [
            tuple(np.sort([members[i], members[j]], axis=0))
            for members in np.split(by_cluster, np.flatnonzero(np.diff(cluster[by_cluster])) + 1)
            for i, j in [_near_pairs(rows[members], least)]
        ]
        left, right = (np.concatenate(side).astype(np.int32) for side in zip(*pairs, strict=True))
        order = np.empty(len(rows), dtype=np.int64)
        order[by_cluster] = np.arange(len(rows))
        return _Found(sets=_components(len(rows), left, right), left=left, right=right, cell_order=order)

    return run


def _prepare_semhash(job: _Job) -> Callable[[np.ndarray], _Found]:
    from semhash import SemHash  # pyright: ignore[reportMissingImports]  not among our dependencies

    class NoEncoder:
        """Semhash wants one, and does not use it where embeddings are given."""

        def encode(self, *_: Any, **__: Any) -> np.ndarray:
            raise NotImplementedError

    def run(rows: np.ndarray) -> _Found:
        records = [{"row": str(row)} for row in range(len(rows))]
        made = SemHash.from_embeddings(rows, records, NoEncoder(), columns=["row"], ann_backend="usearch")
        kept = made.self_deduplicate(threshold=1 - job.threshold).selected
        return _Found(kept=np.sort([int(record["row"]) for record in kept]))

    return run


_PREPARE: dict[Method, Callable[[_Job], Callable[[Any], _Found]]] = {
    "faiss": _prepare_faiss,
    "numpy": _prepare_numpy,
    "clip-cid": _prepare_clip_cid,
    "semdedup-n1000": _prepare_semdedup,
    "semdedup-256": _prepare_semdedup,
    "semhash": _prepare_semhash,
}


def _near_pairs(rows: np.ndarray, least: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """All i < j with a float32 cosine of at least `least`."""
    lefts, rights = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int32)]
    for top in range(0, len(rows), BLOCK):
        for start in range(top, len(rows), BLOCK):
            cosines = rows[top : top + BLOCK] @ rows[start : start + BLOCK].T
            if top == start:
                np.fill_diagonal(cosines, -2)
            hits = np.flatnonzero(cosines.max(axis=1) >= least)
            at, column = np.nonzero(cosines[hits] >= least)
            left, right = (top + hits[at]).astype(np.int32), (start + column).astype(np.int32)
            above = slice(None) if top != start else left < right
            lefts.append(left[above])
            rights.append(right[above])
    return np.concatenate(lefts), np.concatenate(rights)


def _components(rows: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(rows, rows))
    return connected_components(graph, directed=False)[1]


def _unit32(stored: Any) -> np.ndarray:
    rows = np.empty(stored.shape, dtype=np.float32)
    for start in range(0, len(rows), BLOCK):
        exact = stored[start : start + BLOCK].astype(np.float64)
        rows[start : start + BLOCK] = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return rows


def _read_once(path: Path) -> None:
    """Into the system's cache, not into this process."""
    with open(path, "rb") as handle:
        while handle.read(1 << 22):
            pass


# What is true, and how a method compares.


def _truth(job: _Job, found: _Found | None) -> dict[str, np.ndarray] | None:
    """Left and right of every true pair, the set of each row and the kept rows; made once from what FAISS found."""
    path = Path(job.path).with_suffix(f".truth-{job.threshold:g}.npz")
    if path.exists() and path.stat().st_mtime >= Path(job.path).stat().st_mtime:
        return dict(np.load(path))
    if found is None or found.candidates is None:
        return None
    stored = np.load(job.path, mmap_mode="r")
    left, right = found.candidates
    portion = max(1, _CELLS // stored.shape[1])
    near = np.concatenate(
        [
            _half_squared(stored, left[at : at + portion], right[at : at + portion]) <= job.threshold
            for at in range(0, max(len(left), 1), portion)
        ]
    )
    left, right = left[near], right[near]
    sets = _components(len(stored), left, right)
    truth = {"left": left, "right": right, "sets": sets, "kept": _nearest_to_mean(stored, sets)}
    temporary = path.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(temporary, allow_pickle=False, **truth)
    os.replace(temporary, path)
    return truth


def _exact(stored: Any, rows: np.ndarray) -> np.ndarray:
    exact = stored[rows].astype(np.float64)
    return exact / np.sqrt((exact * exact).sum(axis=1, keepdims=True))


def _half_squared(stored: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    difference = _exact(stored, left) - _exact(stored, right)
    return (difference * difference).sum(axis=1) / 2


def _nearest_to_mean(stored: Any, sets: np.ndarray) -> np.ndarray:
    """The rule of docs/method.md (`balance_keep`) without captions, one set at a time."""
    by_set = np.argsort(sets, kind="stable")
    kept = []
    for members in np.split(by_set, np.flatnonzero(np.diff(sets[by_set])) + 1):
        if len(members) > 2:
            vectors = _exact(stored, members)
            distance = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1)
            members = members[distance <= distance.min() + _TIED]
        kept.append(members[0])  # two are equally near their mean: the lower row
    return np.sort(kept)


def _judge(found: _Found, truth: dict[str, np.ndarray] | None, rows: int) -> dict[str, Any]:
    judged: dict[str, Any] = {"removed": found.removed(rows)}
    if found.sets is not None:
        sets = _by_lowest_row(found.sets)
        judged |= {"sets_digest": _digest(sets), "largest_set": int(np.bincount(sets).max())}
    if found.kept is not None:
        judged["kept_digest"] = _digest(found.kept)
    if found.left is not None and found.right is not None:
        judged["pairs"] = len(found.left)
        if found.cell_order is not None:
            later = np.where(found.cell_order[found.left] > found.cell_order[found.right], found.left, found.right)
            judged["removed_by_its_rule"] = len(np.unique(later)) / rows
    if truth is None:
        return judged
    judged |= {"true_pairs": len(truth["left"]), "true_kept_digest": _digest(truth["kept"])}
    if found.sets is not None:
        right_sets = judged["sets_digest"] == _digest(_by_lowest_row(truth["sets"]))
        right_kept = found.kept is None or judged["kept_digest"] == judged["true_kept_digest"]
        judged["exact"] = bool(right_sets and right_kept)
    if found.left is not None and found.right is not None:
        true, listed = (
            np.sort(left.astype(np.int64) * rows + right)
            for left, right in ((truth["left"], truth["right"]), (found.left, found.right))
        )
        shared = len(np.intersect1d(true, listed, assume_unique=True))
        judged |= {"recall": shared / max(len(true), 1), "missed": len(true) - shared, "false": len(listed) - shared}
    elif found.sets is not None:
        joined = found.sets[truth["left"]] == found.sets[truth["right"]]
        judged |= {"recall": float(joined.mean()) if len(joined) else 1.0, "missed": int((~joined).sum())}
    return judged


def _by_lowest_row(sets: np.ndarray) -> np.ndarray:
    _, first, place = np.unique(sets, return_index=True, return_inverse=True)
    return first[place].astype(np.int64)


def _digest(values: np.ndarray | None) -> str:
    return "" if values is None else hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()[:12]


# Clocks and memory.


def _cpu() -> float:
    """User and system seconds of this process and of children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _status(field: str) -> int:
    """Of /proc/self/status, in KiB; 0 where there is none."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as handle:
        for line in handle:
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0


@contextlib.contextmanager
def _memory_of() -> Generator[dict[str, Any]]:
    """Fills in the peak, in MiB, of what runs inside above what there was before."""
    memory: dict[str, Any] = {}
    how = "VmHWM, reset"
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        how = "ru_maxrss, not reset: a lower bound"

    def highest() -> int:
        return _status("VmHWM") if how.startswith("VmHWM") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    rss, anonymous = _status("VmRSS") or highest(), _status("RssAnon")
    start = highest() if how.startswith("ru_maxrss") else rss
    peak, stop = [anonymous], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        memory |= {"rss_before_mib": rss / 1024, "rss_mib": (highest() - start) / 1024, "rss_by": how}
        stop.set()
        watcher.join()
        memory["anonymous_mib"] = (max(peak[0], _status("RssAnon")) - anonymous) / 1024


def _threads() -> dict[str, Any]:
    """What the libraries say of their threads; all should say 1."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return {}
    from threadpoolctl import threadpool_info

    return {
        "libraries": [f"{each['internal_api']} {each['version']}: {each['num_threads']}" for each in threadpool_info()]
    }


def machine() -> dict[str, Any]:
    """What a reader needs to know to doubt the numbers."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next((line.split(":")[1].strip() for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "?")
    versions = {}
    for name in ("clip-cid", "numpy", "scipy", "faiss-cpu", "torch", "numba", "semhash", "vicinity", "usearch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "load": os.getloadavg(),
    }


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").splitlines()
    return []


# The memory mode.


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
        job = _Job(
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


# Tables and figures.


def _write(results: dict[str, Any], options: Options) -> None:
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    (options.out / "table.md").write_text(table(results))
    _draw(results, options.out)


def table(results: dict[str, Any]) -> str:
    """Medians, with the lowest and the highest in brackets; times against FAISS are medians of the ratios within a round."""
    about, runs = results["machine"], results["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    loads = [run["load_before"] for run in runs if "load_before" in run]
    text = [
        f"{about['date'][:10]}, {about['cpu']}, {about['cores']} cores, one thread; commit {about['commit']};"
        f" Python {about['python']}, {versions}. Cosine distance {results['options']['threshold']:g}, best read with"
        f" the load in mind: {min(loads, default=0):.1f} to {max(loads, default=0):.1f} when runs began.",
        *(f"Left out: {line}." for line in results["left_out"]),
    ]
    for data in results["data"]:
        place = {key: data[key] for key in ("kind", "rows", "dim")}
        here = [run for run in runs if all(run[key] == value for key, value in place.items())]
        true = next((run["true_pairs"] for run in here if "true_pairs" in run), None)
        text += [
            "",
            f"**{data['kind']}, {data['rows']:,} x {data['dim']}**: mean cosine {data['mean_cosine']:.2f}"
            + (f", {true:,} true pairs." if true is not None else "."),
            "",
            "| method | CPU s | faster than faiss | than numpy | wall s | CPU s with imports | RSS, MiB | anonymous, MiB"
            " | pairs | recall | removed | by its rule | exact | kept |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(
            run["method"] for run in sorted(here, key=lambda run: METHODS.index(run["method"]))
        ):
            text.append(_line(method, [run for run in here if run["method"] == method], here))
    return "\n".join(text) + "\n"


def _line(method: str, runs: Sequence[dict[str, Any]], here: Sequence[dict[str, Any]]) -> str:
    good = [run for run in runs if "cpu_s" in run]
    if not good:
        why = next(run.get("skipped") or run.get("failed") for run in runs)
        return f"| {method} | {why} |" + " |" * 12
    last = good[-1]
    if any(run.get("sets_digest") != last.get("sets_digest") for run in good):
        last = last | {"exact": "varies"}
    exact = {None: "", True: "yes", False: "no"}.get(last.get("exact"), "varies")
    cells = [
        f"{method}" + (f" ({len(runs) - len(good)} of {len(runs)} runs failed)" if len(good) < len(runs) else ""),
        _spread([run["cpu_s"] for run in good]),
        _spread(_ratios("faiss", good, here), "x"),
        _spread(_ratios("numpy", good, here), "x"),
        _spread([run["wall_s"] for run in good]),
        _spread([run["cpu_with_imports_s"] for run in good]),
        f"{statistics.median(run['rss_mib'] for run in good):,.0f}",
        f"{statistics.median(run['anonymous_mib'] for run in good):,.0f}",
        f"{last['pairs']:,}" if "pairs" in last else "",
        f"{last['recall']:.4f}" if "recall" in last else "",
        f"{100 * last['removed']:.2f} %",
        f"{100 * last['removed_by_its_rule']:.2f} %" if "removed_by_its_rule" in last else "",
        exact,
        last.get("kept_digest", ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _ratios(peer: Method, good: Sequence[dict[str, Any]], here: Sequence[dict[str, Any]]) -> list[float]:
    """How many times the peer's CPU seconds are those of these runs, round by round."""
    seconds = {run["round"]: run["cpu_s"] for run in here if run["method"] == peer and "cpu_s" in run}
    return [seconds[run["round"]] / run["cpu_s"] for run in good if run["round"] in seconds]


def _spread(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return ""
    low, middle, high = (f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in _quantiles(values))
    return f"{middle}{unit}" + (f" ({low}..{high})" if len(values) > 1 else "")


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _draw(results: dict[str, Any], out: Path) -> None:
    """One line a method, CPU seconds against rows, and what a quadratic would be; a panel for each kind and width."""
    from clip_cid.figures import style

    lines: dict[tuple[str, int], dict[str, dict[int, list[float]]]] = {}
    for run in results["runs"]:
        if "cpu_s" in run:
            panel = lines.setdefault((run["kind"], run["dim"]), {})
            panel.setdefault(run["method"], {}).setdefault(run["rows"], []).append(run["cpu_s"])
    if not lines:
        return
    points = [
        (kind, dim, method, rows, *_quantiles(panel[method][rows]))
        for (kind, dim), panel in lines.items()
        for method in METHODS
        if method in panel
        for rows in sorted(panel[method])
    ]
    names = ("kind", "dim", "method", "rows", "cpu_s_low", "cpu_s_median", "cpu_s_high")
    style.write_csv(out / "scaling.csv", {name: [point[at] for point in points] for at, name in enumerate(names)})
    colors: dict[str, str] = dict(
        zip(METHODS, (style.VERMILLION, style.ORANGE, style.BLUE, style.GREEN, style.SKY, style.PURPLE), strict=True)
    )
    across = min(2, len(lines))
    down = -(-len(lines) // across)
    with style.new_figure(0.6 + 3.0 * down, width=style.WIDTH * (1 if across == 1 else 1.5)) as figure:
        panels = figure.subplots(down, across, squeeze=False)
        for axes in panels.flat[len(lines) :]:
            axes.set_visible(False)
        for axes, ((kind, dim), panel) in zip(panels.flat, lines.items(), strict=False):
            for method in (method for method in METHODS if method in panel):
                sizes = sorted(panel[method])
                low, middle, high = zip(*(_quantiles(panel[method][rows]) for rows in sizes), strict=True)
                axes.plot(sizes, middle, color=colors[method], marker="o", markersize=3.5, label=method)
                axes.vlines(sizes, low, high, color=colors[method], linewidth=1)
            sizes = sorted({rows for method in panel.values() for rows in method})
            steep = panel.get("clip-cid") or panel[next(iter(panel))]
            begin = min(steep)
            rows = np.array([sizes[0], sizes[-1]], dtype=np.float64)
            quadratic = statistics.median(steep[begin]) * (rows / begin) ** 2
            axes.plot(rows, quadratic, color=style.MUTED, linewidth=1, linestyle=":", label="quadratic")
            axes.set(xscale="log", yscale="log", xlabel=f"rows ({kind}, {dim} columns)", ylabel="CPU seconds")
            axes.set_xticks(
                sizes, [f"{size / 1000:,.4g}k" if size < 1_000_000 else f"{size / 1e6:g}M" for size in sizes]
            )
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(style.plain_ticks())
        handles = {
            label: handle
            for axes in panels.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
        style.save_svg(figure, out / "scaling.svg")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(_run_job(_Job(**json.loads(sys.argv[2])))))
    else:
        main(tyro.cli(Options, description=__doc__))
