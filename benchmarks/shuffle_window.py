"""What `distill.shuffle_window` spares a disk: the pairs of some batches of an epoch, read with a cold cache.

Tars of made-up bytes; the page cache is told to forget them (posix_fadvise) before each turn. With the window and
without it the same number of pairs is read, in the order in which a training of one process would. Told are the bytes
that the disk gave (/proc/self/io), the time, and of how many tars a batch is. The two take turns.

    python benchmarks/shuffle_window.py [--tars 200] [--pairs 500] [--bytes 20000] [--batch 512] [--turns 3]
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from process_costs import machine as this_machine

from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.recipe import PairsConfig
from clip_cid.training.batch_order import Windows, epoch_orders

_WINDOW = 20  # batches


def make_tars(folder: Path, tars: int, pairs: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(pairs):
                for suffix, data in (("jpg", rng.bytes(size)), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{number:05d}-{row:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def forget(folder: Path) -> None:
    """Have the page cache drop the tars."""
    os.sync()
    for path in folder.glob("*.tar"):
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_of_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def read(pairs: Pairs, batches: list[list[int]]) -> tuple[float, float, float]:
    """Seconds, MB of the disk, and tars of a batch."""
    first_rows = np.array([shard.first_row for shard in pairs.shards])
    of_batch = [len(np.unique(np.searchsorted(first_rows, batch, side="right"))) for batch in batches]
    began, before = time.perf_counter(), bytes_of_disk()
    for row in itertools.chain.from_iterable(batches):
        pairs.read(row)
    return time.perf_counter() - began, (bytes_of_disk() - before) / 1e6, statistics.mean(of_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=500, help="of a tar")
    parser.add_argument("--bytes", type=int, default=20_000, help="of an image")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    print(this_machine())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tars(folder, given.tars, given.pairs, given.bytes)
        with contextlib.redirect_stderr(io.StringIO()):
            pairs = open_pairs(PairsConfig(source=(f"{folder}/*.tar",)), index=folder / "index")
        edges = np.array([*(shard.first_row for shard in pairs.shards), len(pairs)])
        orders = {"all shuffled together": None, "with a window": Windows(edges, _WINDOW * given.batch)}
        batches: dict[str, list[list[int]]] = {}
        for how, windows in orders.items():
            _, order = next(epoch_orders(len(pairs), given.batch, seed=0, windows=windows))
            whole = order[: _WINDOW * given.batch].reshape(_WINDOW, given.batch)
            batches[how] = [sorted(batch) if windows else batch for batch in whole.tolist()]

        found: dict[str, list[tuple[float, float, float]]] = {how: [] for how in orders}
        for _ in range(given.turns):
            for how in orders:
                forget(folder)
                found[how].append(read(pairs, batches[how]))

    wanted = _WINDOW * given.batch * given.bytes / 1e6
    print(f"{given.tars} tars of {given.pairs} pairs; {_WINDOW} batches of {given.batch} pairs have {wanted:.0f} MB")
    for how, turns in found.items():
        seconds, disk, tars = zip(*turns, strict=True)
        print(
            f"{how}: {', '.join(f'{one:.1f}' for one in seconds)} s; the disk gave"
            f" {', '.join(f'{one:.0f}' for one in disk)} MB; a batch is of {tars[0]:.0f} tars"
        )


if __name__ == "__main__":
    main()
