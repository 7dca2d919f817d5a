"""Balance of few rows against the plain blocked float32 product, both called again and again in one process.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/balance_few_rows.py

`balance_speed.py` gives each call a process of its own; of so little work the libraries' first calls are then a tenth. Here the two
take turns --rounds times after a first one, in CPU seconds. The plain product is that of `balance_speed.py`, on float32 unit rows made outside the
clock; clip-cid reads, checks and converts the float16 map inside it. Power-law data of balance_data.py.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.csgraph
import tyro
from balance_data import dataset

import clip_cid

_BLOCK = 4096


def plain(rows: np.ndarray, threshold: float) -> np.ndarray:
    """Components of all pairs at cosine >= 1 - threshold."""
    left: list[np.ndarray] = []
    right: list[np.ndarray] = []
    for a in range(0, len(rows), _BLOCK):
        for b in range(a, len(rows), _BLOCK):
            products = rows[a : a + _BLOCK] @ rows[b : b + _BLOCK].T
            some = np.flatnonzero(products.max(axis=1) >= 1 - threshold)
            i, j = np.nonzero(products[some] >= 1 - threshold)
            left.append(a + some[i])
            right.append(b + j)
    i, j = np.concatenate(left), np.concatenate(right)
    graph = scipy.sparse.coo_matrix((np.ones(len(i), dtype=bool), (i, j)), shape=(len(rows), len(rows)))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(
    sizes: tuple[int, ...] = (1000, 2000, 5000),
    dims: tuple[int, ...] = (512, 1280),
    rounds: int = 20,
    work: Path = Path("data/balance-speed"),
    threshold: float = 0.07,
) -> None:
    """Print a table."""
    print("| rows x dim | plain, s | clip-cid, s | faster (least to most) |\n|---|---|---|---|")
    for dim in dims:
        for size in sizes:
            stored = np.load(dataset("pow", size, dim, work), mmap_mode="r")
            rows = stored.astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            calls = (lambda r=rows: plain(r, threshold), lambda s=stored: clip_cid.balance(s, threshold=threshold))
            times = np.array([[seconds(call) for call in calls] for _ in range(rounds + 1)])[1:]
            ratios = times[:, 0] / times[:, 1]
            one, other = (statistics.median(column) for column in times.T.tolist())
            print(
                f"| {size:,} x {dim} | {one:.4f} | {other:.4f} |"
                f" {np.median(ratios):.2f}x ({ratios.min():.2f} to {ratios.max():.2f}) |"
            )


if __name__ == "__main__":
    tyro.cli(main)
