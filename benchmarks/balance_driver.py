"""Memory of the process that drives the balance, without the comparison of pairs: its slope in bytes a row.

    python benchmarks/balance_driver.py --rows 100000 1000000 4000000 10000000 --dim 64

Made-up rows, a million a file: of every five two are near the third one, and a fifth of these equal it bit for bit.
Everything is `clip-cid balance` on them, from their import to the page of the balance, with tasks in two processes
more, but for one step: the links of near pairs are known from how the rows were made, and are written in the place of
what a comparison would leave. So millions of rows take minutes. Anonymous memory (RssAnon, sampled every 20 ms) is what
the system cannot take back; the slope is that between a number of rows and the one before it.
"""

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from balance_memory import status

from clip_cid import cli
from clip_cid.method.balance import near_pairs
from clip_cid.method.balance.forest import Links
from clip_cid.method.balance.pair_plan import Plan, lay_out
from clip_cid.method.balance.prepared_rows import PreparedRows
from clip_cid.method.distances import squared_distances
from clip_cid.method.jobs import Context
from clip_cid.method.unit_rows import UnitRows

_GROUP, _BLOCK = 5, 1 << 16  # rows; of groups
_FILE = 1_000_000  # rows
_NOISE = 0.02
_MIB = 1 << 20


def make_rows(folder: Path, rows: int, dim: int) -> None:
    """Groups of five rows: the last two are near the third, or equal it in every fifth group."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for start in range(0, rows, _FILE):
        _make_file(folder / f"{start // _FILE:03d}.npy", min(_FILE, rows - start), dim, random)


def _make_file(path: Path, rows: int, dim: int, random: np.random.Generator) -> None:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dim))
    for start in range(0, rows // _GROUP, _BLOCK):
        groups = random.standard_normal((min(_BLOCK, rows // _GROUP - start), _GROUP, dim), dtype=np.float32)
        groups[:, 3:] = groups[:, 2:3] + _NOISE * groups[:, 3:]
        groups[::5, 4] = groups[::5, 2]
        groups /= np.linalg.norm(groups, axis=2, keepdims=True)
        out[start * _GROUP : start * _GROUP + groups.size // dim] = groups.reshape(-1, dim)
    out.flush()


def known_links(context: Context, prepared: PreparedRows, on_progress: Callable[[int], Any] | None) -> None:
    """In the place of the comparison: each tile gets a part of the links."""
    tiles, groups = prepared.tiles(), len(context.images) // _GROUP
    edges = np.linspace(0, groups, len(tiles) + 1).astype(np.int64)
    for tile, (start, stop) in zip(tiles, itertools.pairwise(edges.tolist()), strict=True):
        found = [_links_of(context.images, np.arange(at, min(at + _BLOCK, stop))) for at in range(start, stop, _BLOCK)]
        left, right, squared = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((right, left, squared))
        links = Links(left[order], right[order], squared[order])
        context.store.save(near_pairs.links_name(tile), links.pack())


def _links_of(images: UnitRows, groups: np.ndarray) -> Links:
    left = np.repeat(groups * _GROUP + 2, 2)
    right = left + np.tile([1, 2], len(groups))
    squared = squared_distances(images[left], images[right])
    apart = squared > 0  # the scan finds equal rows
    return Links(left[apart], right[apart], squared[apart])


def drive(run: str, rows: str) -> int:
    """The command, with known links and a given plan."""
    near_pairs._compare = known_links
    near_pairs.make_plan = lambda images, limit, **_: lay_out(images, Plan("int8", 64))  # type: ignore[assignment]
    flags = ["--balance.classify", "0", "--machine.balance-processes", "2"]
    return cli.main(["balance", run, "--embeddings", rows, *flags])


def measure(run: Path, rows: Path) -> tuple[float, float, float, float]:
    """MiB of anonymous and of mapped memory, of anonymous memory in the largest other process, and seconds."""
    shutil.rmtree(run, ignore_errors=True)
    started, anonymous, mapped, others = time.monotonic(), 0.0, 0.0, 0.0
    words = run.with_name("words.txt")
    with words.open("wb") as said:
        process = subprocess.Popen([sys.executable, __file__, "drive", str(run), str(rows)], stderr=said)
    while process.poll() is None:
        now = status(process.pid)
        anonymous = max(anonymous, now.get("RssAnon", 0) / 1024)
        mapped = max(mapped, (now.get("RssFile", 0) + now.get("RssShmem", 0)) / 1024)
        others = max([others, *(status(child).get("RssAnon", 0) / 1024 for child in _children(process.pid))])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(words.read_text())
    return anonymous, mapped, others, time.monotonic() - started


def _children(process: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]
    except OSError:  # it has ended meanwhile
        return []


def main(
    rows: tuple[int, ...] = (100_000, 1_000_000, 4_000_000), dim: int = 64, work: Path = Path("data/balance-driver")
) -> None:
    """Print a table."""
    print("| rows | anonymous, MiB | bytes a row | mapped, MiB | largest task process, MiB | s |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    before: tuple[int, float] | None = None
    for count in rows:
        path = work / f"{count}x{dim}"
        make_rows(path, count, dim)
        anonymous, mapped, others, seconds = measure(work / "run", path.resolve())
        slope = "-" if before is None else f"{_MIB * (anonymous - before[1]) / (count - before[0]):.0f}"
        print(f"| {count:,} | {anonymous:,.0f} | {slope} | {mapped:,.0f} | {others:,.0f} | {seconds:.0f} |", flush=True)
        before = count, anonymous
        shutil.rmtree(path)
    shutil.rmtree(work / "run")


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]:
        sys.exit(drive(*sys.argv[2:]))
    tyro.cli(main)
