"""The lines of the device check and their bars; the speed of each is a share of what this device does in the same minute.

Shares of a rate are of large square matrices in the same type (`matrix_rate`), measured before and after the work in
the same process. Data are made up.

- gpu-tests: the tests marked `gpu`.
- products: whether products of each type are right, and their rates.
- balance-rate: all pairs of 1,000,000 x 1280 rows compared, against float16 products; rows in known sets. The number is
  of the comparison with the exact distances; reading, checking and hashing the rows beforehand is in the notes.
- cluster-loss: a forward and a backward pass with K = 1,000,000, B = 4,096, D = 1280, against bf16 products (three of
  B x K x D: the student's logits, the teacher's, the gradient); memory below one B x K matrix, of which the dense form
  holds several.
- parts: a step with all parts of CLIP-CID over one with CLIP's loss alone (ViT-B/32, batch 1,024, K = 20,000 at 0.1).
- plain-step: CLIP's loss alone over open_clip's own training loop.
- embedding: `clip-cid embed` beyond its start against the teacher's two forward passes alone (ViT-L/14).
- kmeans: 10,000,000 x 512 rows into 10,000 centers, two rounds and the assignment of all rows; seconds.
- nccl-1, nccl-2: the ranks' exchange in a group of one; a student of two devices.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import balance_driver
import cluster_loss_speed
import device_check_stages
import embed_speed
import numpy as np
import torch
import train_step_speed
from device_check_parts import DTYPES, Bar, Kind, Line, Outcome, Place, Skipped, matrix_rate

from clip_cid import balance, spherical_kmeans
from clip_cid.method.balance import near_pairs
from clip_cid.method.products import float32_sums, int8_product

_ROOT = Path(__file__).parent.parent
_ROUNDING: dict[Kind, float] = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 0, "int8": 0}
"""Of a product of small whole numbers, relative: twice that of the result's type."""


def gpu_tests(place: Place) -> Outcome:
    """The tests marked gpu."""
    marked = [path for path in sorted((_ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not marked:
        raise RuntimeError(f"no test below {_ROOT / 'tests'} is marked gpu")
    report = place.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "-n", "0"]
    command += ["-o", "addopts=--strict-markers"]  # without the checks of shapes, which take longer than the tests
    command += [f"--junitxml={report}", *map(str, marked)]
    subprocess.run(command, cwd=_ROOT, env=os.environ | {"CLIP_CID_TEST_DEVICE": place.device}, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [f"{case.get('name')}" for case in cases if {part.tag for part in case} & {"failure", "error"}]
    left_out = [f"{case.get('name')}" for case in cases if case.find("skipped") is not None]
    return Outcome(
        float(len(cases) - len(bad) - len(left_out)),
        {f"no test fails{', but ' * bool(bad)}{', '.join(bad)}": not bad},
        not_judged=f"left out: {', '.join(left_out)}" if left_out else "",
        details={"failed": bad, "left out": left_out},
    )


def products(place: Place) -> Outcome:
    """Whether products of each type are right, and how fast they are."""
    device, errors = place.torch_device, dict[str, float]()
    random = np.random.default_rng(0)
    left, right = random.integers(-3, 4, (2, 256, 256))
    exact = torch.from_numpy(left.astype(np.float64) @ right.astype(np.float64).T)
    for kind, allowed in _ROUNDING.items():
        mine, theirs = (torch.from_numpy(one).to(device=device, dtype=DTYPES[kind]) for one in (left, right))
        with float32_sums():
            found = int8_product(mine, theirs.T) if kind == "int8" else mine @ theirs.T
        errors[kind] = float((found.double().cpu() - exact).abs().sub(allowed * exact.abs()).max())
    rates = {kind: matrix_rate(kind, place) for kind in DTYPES}
    notes = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in rates.items()) + " TFLOP/s (int8: TOP/s)"
    return Outcome(max(errors.values()), notes=notes, details={"beyond rounding": errors, "rates": rates})


def balance_rate(place: Place) -> Outcome:
    """All pairs of a million rows."""
    rows, dim = (2000, 64) if place.tiny else (1_000_000, 1280)
    folder = place.work / "balance-rows"
    balance_driver.make_rows(folder, rows, dim)
    (path,) = folder.iterdir()
    stored = np.load(path, mmap_mode="r")
    balance(stored[:1000], device=place.device)  # what is loaded and chosen at first

    rates, began = [matrix_rate("fp16", place)], time.perf_counter()
    with _timed_comparison() as comparing:
        found = balance(stored, device=place.device)
    whole = time.perf_counter() - began
    rates.append(matrix_rate("fp16", place))

    seconds, operations = sum(comparing), rows * (rows - 1) * dim
    three = found.set_of.reshape(-1, 5)[:, 2:]
    same = bool((three == three[:, :1]).all()) and len(np.unique(found.set_of)) == rows // 5 * 3
    shutil.rmtree(folder)
    return Outcome(
        operations / seconds / statistics.mean(rates),
        {"the sets are those that were made": same},
        notes=f"comparison {seconds:.3g} s, the whole call {whole:.3g} s",
        details={"seconds": seconds, "whole": whole, "fp16": rates},
    )


@contextmanager
def _timed_comparison() -> Generator[list[float]]:
    """Seconds of each comparison within."""
    compare, seconds = near_pairs._compare, list[float]()

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        compare(*arguments)
        seconds.append(time.perf_counter() - began)

    with mock.patch.object(near_pairs, "_compare", timed):
        yield seconds


def cluster_loss(place: Place) -> Outcome:
    """Cross entropy and divergence over a million centers."""
    batch, centers, dim = (512, 50_000, 32) if place.tiny else (4096, 1_000_000, 1280)
    device = place.torch_device.type
    work = cluster_loss_speed.Work(batch, centers, dim, device)
    memory = cluster_loss_speed.measure_one(work, "fused", device)
    rates = [matrix_rate("bf16", place)]
    seconds = cluster_loss_speed.timed(work, ["fused"], 2 if place.tiny else 5, device)["fused"]
    rates.append(matrix_rate("bf16", place))

    took, one_matrix = statistics.median(seconds), batch * centers * 4 / 2**20
    return Outcome(
        3 * 2 * batch * centers * dim / took / statistics.mean(rates),
        {f"its {memory:,.0f} MiB are less than one B x K matrix ({one_matrix:,.0f} MiB)": memory < one_matrix},
        notes=f"{took:.3g} s",
        details={"seconds": seconds, "memory_mib": memory, "bf16": rates},
    )


def step_ratio(name: str, base: str, place: Place) -> Outcome:
    """A training step over another, interleaved."""
    options = train_step_speed.Options(device=place.device, batch=16, dim=32, centers=200, steps=1, rounds=2)
    if not place.tiny:
        options = train_step_speed.Options(
            student="ViT-B-32", batch=1024, dim=1280, centers=20_000, device=place.device, precision="bf16", rounds=5
        )
    seconds = train_step_speed.interleaved(options, [name, base])
    each = {which: statistics.median(times) for which, times in seconds.items()}
    return Outcome(
        train_step_speed.ratio(seconds, name, base),
        notes=", ".join(f"{which} {1000 * took:.3g} ms" for which, took in each.items()),
        details={"seconds": seconds},
    )


def embedding(place: Place) -> Outcome:
    """The embed stage beside the forward passes alone."""
    options = embed_speed.Options(
        teacher="cid-tiny",
        pairs=(16, 48),
        rounds=1,
        batch=8,
        workers=0,
        apart=False,
        device=place.device,
        work=place.work / "embed",
    )
    if not place.tiny:
        workers = max((os.cpu_count() or 2) - 1, 1)
        options = embed_speed.Options(
            teacher="ViT-L-14", pairs=(512, 6144), rounds=1, workers=workers, apart=False, device=place.device,
            precision="bf16", work=place.work / "embed",
        )  # fmt: skip
    seconds = embed_speed.measure(options)
    each = {name: embed_speed.beyond_start(runs, options) for name, runs in seconds.items()}
    rates = ", ".join(f"{name} {1 / each_of[0]:.4g} pairs/s" for name, each_of in each.items() if each_of[0] > 0)
    return Outcome(embed_speed.share(each), notes=rates, details={"seconds": seconds})


def kmeans(place: Place) -> Outcome:
    """Ten million rows into ten thousand clusters."""
    rows, dim, centers = (3000, 16, 20) if place.tiny else (10_000_000, 512, 10_000)
    needed = 2 * rows * dim
    if (free := shutil.disk_usage(place.work).free) < 1.05 * needed:
        raise Skipped(
            f"its rows take {needed / 1e9:.3g} GB on the disk of {place.work}, where {free / 1e9:.3g} are free"
        )
    path = place.work / "kmeans.npy"
    _write_normal_rows(path, rows, dim, place)
    began = time.perf_counter()
    found = spherical_kmeans(
        np.load(path, mmap_mode="r"), num_centers=centers, iterations=2, max_points_per_center=64, device=place.device
    )
    seconds = time.perf_counter() - began
    path.unlink()
    objectives = [one["objective"] for one in found.history]
    return Outcome(
        seconds,
        {
            "the objective falls": objectives[1] < objectives[0],
            "at most 1 % of the centers are empty": found.empty <= centers / 100,
        },
        notes=f"objective {found.objective:.4f}",
        details={"history": found.history},
    )


def _write_normal_rows(path: Path, rows: int, dim: int, place: Place) -> None:
    """Made on the device, where numbers are drawn faster than on the CPU."""
    generator = torch.Generator(place.torch_device).manual_seed(0)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))
    for start in range(0, rows, 1 << 18):
        block = out[start : start + (1 << 18)]
        block[:] = torch.randn(block.shape, generator=generator, device=place.torch_device).half().cpu().numpy()


LINES = [
    Line("gpu-tests", "tests marked gpu that pass", Bar(1), 50, gpu_tests),
    Line("products", "products: error beyond rounding", Bar(0, least=False), 15, products),
    *device_check_stages.LINES,
    Line("balance-rate", "balance, 1M x 1280: share of the fp16 rate", Bar(0.70), 60, balance_rate, of_speed=True),
    Line("cluster-loss", "cluster losses, K = 1M: share of the bf16 rate", Bar(0.60), 45, cluster_loss, of_speed=True),
    Line(
        "parts", "step with all parts / plain step", Bar(1.10, least=False), 45,
        partial(step_ratio, "clip-cid", "clip"), of_speed=True,
    ),
    Line(
        "plain-step", "plain step / open_clip's", Bar(1.05, least=False), 45,
        partial(step_ratio, "clip", "open_clip"), of_speed=True,
    ),
    Line("embedding", "embed beyond its start: share of the forwards' rate", Bar(0.95), 90, embedding, of_speed=True),
    Line("kmeans", "k-means, 10M x 512 into 10k", Bar(60, least=False, unit=" s"), 75, kmeans, of_speed=True),
    *device_check_stages.RANKS,
]  # fmt: skip
"""In the order of their run."""
