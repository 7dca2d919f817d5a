"""How far `clip-cid plan` is from the run it plans, at three sizes, in CPU seconds of one thread.

A plan is made from a small run, the larger runs are then made, and each stage is compared. All clocks of both are the
CPU time of the process, so that other work on the machine does no harm: wall time is longer by the same factor.

    python benchmarks/plan_accuracy.py [--pairs 1000 2000 4000] [--rows 100000 200000 400000]

`--pairs` are pictures of `clip-cid sample`, for index, embed and distill. `--rows` are made-up embeddings, 64 wide in
blobs, for balance and clusters, which of so few pictures would take no time.
"""

import argparse
import os
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"
time.perf_counter = time.monotonic = time.process_time  # before anything takes a clock

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from clip_cid import pipeline  # noqa: E402
from clip_cid.data.pairs.pairs import open_pairs  # noqa: E402
from clip_cid.data.sample.write import write_sample  # noqa: E402
from clip_cid.method.balance.semantic_balance import balance  # noqa: E402
from clip_cid.method.cluster.cluster_quality import cluster_quality  # noqa: E402
from clip_cid.method.cluster.clustering import spherical_kmeans  # noqa: E402
from clip_cid.plan import costs, plan, rates  # noqa: E402
from clip_cid.plan.costs import Scale  # noqa: E402
from clip_cid.plan.rates import Rates  # noqa: E402
from clip_cid.recipe import Recipe, parse_recipe  # noqa: E402
from clip_cid.run_folder import RunFolder  # noqa: E402

SMALL = 100
DIM, BLOBS, CENTERS, ITERATIONS = 64, 400, 1_000, 5
MACHINE = {"device": "cpu", "threads": 1, "workers": 0, "balance_processes": 1, "tensorboard": "off"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, nargs="*", default=[1_000, 2_000, 4_000])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 200_000, 400_000])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'stage':10}{'size':>10}{'planned s':>12}{'measured s':>12}{'off':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        of_pictures(Path(scratch), given.pairs)
    of_rows(given.rows)


def of_pictures(folder: Path, sizes: list[int]) -> None:
    """Index, embed and distill, planned from a run of a hundred pairs."""
    write_sample(folder / "small", pairs=SMALL, seed=0)
    first = parse_recipe(
        {
            "pairs": {"source": [str(folder / "small/pairs/*.tar")]},
            "embed": {"teacher": "none"},
            "distill": {"student": "cid-tiny", "weights": "clip-only", "batch_size": 32, "steps": 2, "warmup_steps": 1},
            "machine": MACHINE,
        },
        where="benchmark",
    )
    pipeline.run(RunFolder(folder / "teacher"), first, only="distill")

    for pairs in sizes:
        write_sample(folder / f"{pairs}", pairs=pairs, seed=0)
        recipe, large = (recipe_of(folder, name) for name in ("small", f"{pairs}"))
        forecast = plan(RunFolder(folder / "plan"), recipe, pairs=pairs, gpus=1)
        planned = {stage.name: stage.seconds for stage in forecast.stages}
        report("index", pairs, planned["index"], lambda large=large: open_pairs(large.pairs))

        run, made = RunFolder(folder / f"run-{pairs}"), dict[str, float]()
        for stage in ("embed", "balance", "cluster", "distill"):
            started = time.process_time()
            pipeline.run(run, large, only=stage)
            made[stage] = time.process_time() - started
        balanced = run.record("balance")
        assert balanced is not None
        planned["distill"] *= balanced.summary["kept"] / forecast.scale.kept  # how many are kept is not compared
        for stage in ("embed", "distill"):
            tell(stage, pairs, planned[stage], made[stage])


def recipe_of(folder: Path, name: str) -> Recipe:
    values: dict[str, Any] = {
        "pairs": {"source": [str(folder / name / "pairs/*.tar")]},
        "embed": {"teacher": f"run:{folder / 'teacher'}"},
        "balance": {"threshold": 0.002},
        "cluster": {"num_centers": 8, "iterations": 3},
        "distill": {"student": "cid-tiny", "batch_size": 32, "epochs": 40, "warmup_steps": 1, "sample_rate": 0.5},
        "machine": MACHINE,
    }
    return parse_recipe(values, where="benchmark")


def of_rows(sizes: list[int]) -> None:
    """Balance and clusters, planned from 65,536 rows of the smallest size."""
    clustering = {"num_centers": CENTERS, "iterations": ITERATIONS}
    recipe = parse_recipe({"cluster": clustering, "machine": MACHINE}, where="benchmark")
    sample, device = blobs(sizes[0])[: rates._ROWS], torch.device("cpu")
    product, (row, center) = rates._product(device), rates._assignment(sample, device)
    measured = Rates(
        device=device,
        index=0.0,
        pair_bytes=0.0,
        captions=1.0,
        teacher=None,
        teacher_how="",
        product=product,
        balance=rates._balance(recipe, sample, device, product),
        assign_row=row,
        assign_center=center,
        rows_how="",
        sha256=1.0,
        write=1.0,
        read=1.0,
        opening=0.0,
    )

    for count in sizes:
        rows, scale = blobs(count), Scale(count, count, 1, DIM, 1.0, "")
        planned = costs._balance(scale, measured, taken_over=False).seconds
        report("balance", count, planned, lambda rows=rows: balance(rows))
        planned = costs._cluster(recipe, scale, measured).seconds
        report("cluster", count, planned, lambda rows=rows: cluster(rows))


def cluster(rows: np.ndarray) -> None:
    """The work of the stage."""
    clusters = spherical_kmeans(rows, num_centers=CENTERS, iterations=ITERATIONS)
    cluster_quality(rows, clusters.centers, clusters.labels)


def blobs(count: int) -> np.ndarray:
    """Unit rows around some centers, as embeddings of pictures of few kinds are."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((BLOBS, DIM))
    rows = centers[random.integers(0, BLOBS, count)] + 0.7 * random.standard_normal((count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def report(stage: str, size: int, planned: float, work: Callable[[], object]) -> None:
    started = time.process_time()
    work()
    tell(stage, size, planned, time.process_time() - started)


def tell(stage: str, size: int, planned: float, measured: float) -> None:
    print(f"{stage:10}{size:>10,}{planned:>12.2f}{measured:>12.2f}{planned / measured - 1:>+8.0%}", flush=True)


if __name__ == "__main__":
    main()
