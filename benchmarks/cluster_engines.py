"""Which k-means engine is better at equal rounds on equal rows: `clip_cid.spherical_kmeans` or FAISS's Kmeans.

    python benchmarks/cluster_engines.py                                  all sizes (about an hour of one core)
    python benchmarks/cluster_engines.py --sizes small                    up to 20,000 rows (some minutes)
    python benchmarks/cluster_engines.py --sizes "" --run runs/demo       the image embeddings of a run

Prints a Markdown table, a line for each kind of data and size. Three methods take turns, seed by seed:

- faiss: `faiss.Kmeans(spherical=True)` from rows drawn at random, FAISS's own rule. It splits a large cluster where one
  is empty. It gets float32 unit rows that were made outside the clock.
- same start: ours from the very rows that FAISS starts from.
- clip-cid: ours from its own start at two levels. It reads, checks and converts the float16 file inside the clock.

All train on the same sample (256 rows a center, drawn by the seed), take the same number of rounds, and then assign all
rows. The objective is Eq. 1 over all rows, computed in float64 outside the clock from the centers that came out: the
mean over the seeds and their standard deviation. Differences are relative to FAISS with the same seed, so a negative
one is better: the mean and its standard error. CPU is user and system time of a process with one thread: the medians
of clip-cid and FAISS. Memory is the peak of private memory above what the process had before (see cluster_speed.py);
of FAISS it includes its float32 rows. "empty" counts centers that are no row's nearest.

The kinds of data are those of balance_data.py, and `uniform`: rows uniform on the sphere.
"""

import multiprocessing
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from balance_data import KINDS, dataset
from cluster_speed import Peak, objective, processor
from threadpoolctl import threadpool_limits

from clip_cid import spherical_kmeans
from clip_cid.method.cluster.clustering import KMeansState

_POINTS = 256  # training rows of a center, as in the recipe
_METHODS = ("faiss", "same start", "clip-cid")
_BLOCK = 4096


@dataclass(frozen=True)
class Size:
    """A size of the problem, and the data it is tried on."""

    rows: int
    dim: int
    centers: int
    rounds: int
    kinds: tuple[str, ...]
    seeds: int = 3


_SIZES = {
    "small": (
        Size(2_000, 64, 16, 20, ("pow", "uniform", "heavy", "cont"), seeds=20),
        Size(2_000, 64, 1_900, 20, ("pow", "uniform", "heavy"), seeds=10),
        Size(6_000, 128, 128, 20, ("pow", "uniform", "heavy", "cont"), seeds=10),
        Size(20_000, 512, 32, 20, ("pow", "uniform"), seeds=5),
        Size(20_000, 512, 256, 20, ("pow", "uniform", "heavy", "cont")),
    ),
    "large": (
        Size(50_000, 256, 5_000, 10, ("pow", "uniform"), seeds=2),
        Size(100_000, 512, 1_000, 20, ("pow", "uniform"), seeds=2),
        Size(200_000, 256, 10_000, 5, ("pow",), seeds=1),
    ),
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    sizes: tuple[Literal["small", "large"], ...] = ("small", "large")
    """Groups of sizes of made-up data."""
    run: Path | None = None
    """Also cluster the image embeddings of this run, with 128 centers."""
    work: Path = Path("data/balance-speed")
    """Where the made-up data stay."""


def main(options: Options) -> None:
    print(f"{processor()}; torch {torch.__version__}, faiss {faiss.__version__}, numpy {np.__version__}; one thread\n")
    print("| data | rows x width | K | rounds | FAISS | same start, % | clip-cid, % | CPU s | MiB | empty |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for group in options.sizes:
        for size in _SIZES[group]:
            for kind in size.kinds:
                _compare(kind, size, _data(kind, size, options.work))

    if options.run is not None:
        shards = sorted((options.run / "embed" / "img_emb").glob("*.npy"))
        rows = np.concatenate([np.load(path) for path in shards])
        path = options.work / "run.npy"
        np.save(path, rows)
        _compare(options.run.name, Size(len(rows), rows.shape[1], 128, 20, (), seeds=10), path)


def _compare(kind: str, size: Size, path: Path) -> None:
    """Run the methods in turn, each in a process of its own, and print a line."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in _METHODS}
    for seed in range(size.seeds):
        for method in _METHODS:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                runs[method].append(pool.apply(_measure, (method, path, size, seed)))

    def differences(method: str) -> str:
        pairs = zip(runs[method], runs["faiss"], strict=True)
        percent = [100 * (ours["objective"] / theirs["objective"] - 1) for ours, theirs in pairs]
        return _mean(percent, "+.2f", len(percent) ** 0.5)

    cpu = " / ".join(f"{statistics.median(run['cpu'] for run in runs[method]):.3g}" for method in ("clip-cid", "faiss"))
    memory = " / ".join(f"{max(run['memory'] for run in runs[method]):.0f}" for method in ("clip-cid", "faiss"))
    empty = " / ".join(
        f"{statistics.mean(run['empty'] for run in runs[method]):.0f}" for method in ("clip-cid", "faiss")
    )
    print(
        f"| {kind} | {size.rows:,} x {size.dim} | {size.centers:,} | {size.rounds}"
        f" | {_mean([run['objective'] for run in runs['faiss']], '.4f')}"
        f" | {differences('same start')} | {differences('clip-cid')} | {cpu} | {memory} | {empty} |",
        flush=True,
    )


def _mean(values: list[float], form: str, divide_by: float = 1) -> str:
    """The mean and the standard deviation, which is divided by the root of the number of values for a standard error."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values) / divide_by:{form.lstrip('+')}}"


def _data(kind: str, size: Size, work: Path) -> Path:
    if kind in KINDS:
        return dataset(kind, size.rows, size.dim, work)
    path = work / f"{kind}-{size.rows}x{size.dim}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = np.random.default_rng(0).standard_normal((size.rows, size.dim), dtype=np.float32)
        np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    return path


def _measure(method: str, path: Path, size: Size, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    threadpool_limits(1)
    rows = np.load(path, mmap_mode="r")
    for start in range(0, len(rows), _BLOCK):  # the file is in the page cache before the clock starts
        rows[start : start + _BLOCK].max()
    spherical_kmeans(rows[:500], num_centers=100, iterations=1)  # loads kernels

    sample = np.arange(len(rows))
    if len(rows) > _POINTS * size.centers:  # the draw of `spherical_kmeans`
        sample = np.sort(np.random.default_rng(seed).choice(len(rows), _POINTS * size.centers, replace=False))
    first = np.sort(np.random.default_rng([seed, 7]).choice(sample, size.centers, replace=False))

    peak = Peak()
    if method == "faiss":
        cpu, centers, labels = _by_faiss(rows, sample, first, size, seed)
    else:
        cpu, centers, labels = _by_ours(rows, first if method == "same start" else None, size, seed)
    return {
        "cpu": cpu,
        "memory": peak.above,
        "objective": objective(rows, centers, labels),
        "empty": size.centers - len(np.unique(labels)),
    }


def _by_ours(rows: np.ndarray, first: np.ndarray | None, size: Size, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    began = time.process_time()
    clusters = spherical_kmeans(
        rows,
        num_centers=size.centers,
        iterations=size.rounds,
        seed=seed,
        max_points_per_center=_POINTS,
        start=None if first is None else KMeansState(_units(rows, first)),
    )
    return time.process_time() - began, clusters.centers, clusters.labels


def _by_faiss(
    rows: np.ndarray, sample: np.ndarray, first: np.ndarray, size: Size, seed: int
) -> tuple[float, np.ndarray, np.ndarray]:
    units = _units(rows, np.arange(len(rows)))
    training = units if len(sample) == len(rows) else units[sample]
    kmeans = faiss.Kmeans(
        size.dim,
        size.centers,
        niter=size.rounds,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=10**9,
    )

    began = time.process_time()
    kmeans.train(training, init_centroids=units[first])
    assert kmeans.index is not None
    assert kmeans.centroids is not None
    _, labels = kmeans.index.search(units, 1)
    return time.process_time() - began, kmeans.centroids, labels[:, 0]


def _units(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    units = rows[chosen].astype(np.float32)
    return units / np.linalg.norm(units, axis=1, keepdims=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
