"""Memory and time of the balance stage, of one checkout or of several in turn.

    OMP_NUM_THREADS=2 python benchmarks/balance_memory.py --rows 2000000 --dim 256 --checkouts . ../before

Each run is a process of its own: `clip-cid balance` on a float16 .npy (power-law data of balance_data.py) that was read once
before. `anonymous` is the peak of RssAnon, sampled every 20 ms: memory that the system cannot take back; `mapped` that of RssFile
and RssShmem, pages of files that it can. Both are given until the tasks begin (codes, windows: the file `work/arrays.json` is
there) and over all. Results are compared byte for byte between the checkouts.
"""

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from balance_data import dataset

_MIB = 1024
_READY = Path("balance.part") / "work" / "arrays.json"


@dataclass(frozen=True)
class Peaks:
    """MiB and seconds, until the tasks begin and over all."""

    ready_anonymous: float
    anonymous: float
    mapped: float
    ready_seconds: float
    seconds: float


def measure(checkout: Path, rows: Path, run: Path, *, processes: int = 1) -> Peaks:
    """Of the process that the command starts; with two or more the tasks are done by others, which do not count."""
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "clip_cid", "balance", str(run), "--embeddings", str(rows.resolve())]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--balance.classify", "0", "--machine.balance-processes", str(processes)],
        env={**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    ready_anonymous = anonymous = mapped = ready = 0.0
    while process.poll() is None:
        now = status(process.pid)
        anonymous = max(anonymous, now.get("RssAnon", 0) / _MIB)
        mapped = max(mapped, (now.get("RssFile", 0) + now.get("RssShmem", 0)) / _MIB)
        if not ready and (run / _READY).is_file():
            ready, ready_anonymous = time.monotonic() - started, anonymous
        time.sleep(0.02)

    if process.returncode:
        raise SystemExit(process.stderr.read().decode() if process.stderr else "the balance failed")
    return Peaks(ready_anonymous, anonymous, mapped, ready, time.monotonic() - started)


def result(run: Path) -> str:
    """A digest of who is kept, for whom, and of the forest."""
    digest = hashlib.sha256()
    for name in ("kept.npy", "set_of.npy", "forest.parquet"):
        digest.update((run / "balance" / name).read_bytes())
    return digest.hexdigest()


def status(pid: int) -> Mapping[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}


def main(
    checkouts: tuple[Path, ...] = (Path(),),
    rows: int = 1_000_000,
    dim: int = 256,
    rounds: int = 3,
    work: Path = Path("data/balance-memory"),
) -> None:
    """Print a table: medians, and of the seconds the ratio to the first checkout within a round, least to most."""
    given = dataset("pow", rows, dim, work)
    np.load(given).sum(dtype=np.float64)  # into the cache
    found: dict[Path, list[Peaks]] = {checkout: [] for checkout in checkouts}
    digests: set[str] = set()
    for _ in range(rounds):
        for checkout in checkouts:
            found[checkout].append(measure(checkout, given, work / "run"))
            digests.add(result(work / "run"))

    print(f"{rows:,} x {dim}, {rounds} rounds; results are {'equal' if len(digests) == 1 else 'NOT EQUAL'}")
    print(
        "| checkout | anonymous until the tasks, MiB | over all | mapped | s until the tasks | ratio | s over all | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    first = found[checkouts[0]]
    for checkout, peaks in found.items():
        cells = [f"{statistics.median(getattr(one, name) for one in peaks):,.0f}" for name in _NAMES[:3]]
        for name in _NAMES[3:]:
            ratios = [getattr(one, name) / getattr(other, name) for one, other in zip(peaks, first, strict=True)]
            cells.append(f"{statistics.median(getattr(one, name) for one in peaks):.1f}")
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {checkout} | " + " | ".join(cells) + " |")


_NAMES = ("ready_anonymous", "anonymous", "mapped", "ready_seconds", "seconds")

if __name__ == "__main__":
    tyro.cli(main)
