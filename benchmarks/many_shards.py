"""What a row costs in data of many shards, as against few: random rows of a store, random pairs of tars.

The same rows are stored in 200 and in 4,000 files; the two are read in turn, and the least CPU time of all turns
counts, so that other work on the machine does no harm.

    python benchmarks/many_shards.py [--rows 40000] [--dim 1280] [--turns 5]
"""

import argparse
import contextlib
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from clip_cid import open_files
from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.recipe import PairsConfig

FEW, MANY = 200, 4000
GATHERS = (1, 102, 512, 4096)  # rows at a time: one image, a block of the balance, a share of a batch, a large block


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    open_files.raise_limit()
    random = np.random.default_rng(0)

    with tempfile.TemporaryDirectory() as folder:
        stores = {count: make_store(Path(folder, f"{count}"), count, given.rows, given.dim) for count in (FEW, MANY)}
        for rows in GATHERS:
            gathers = [random.integers(0, given.rows, rows) for _ in range(max(1, 8192 // rows))]
            readers = {count: reader_of(store, gathers) for count, store in stores.items()}
            report(f"store, {rows:,} random rows at a time", readers, rows * len(gathers), given.turns)
        readers = {count: (lambda store=store: store[:]) for count, store in stores.items()}
        report("store, all rows in order", readers, given.rows, given.turns)

        readers = {}
        for count in (FEW, MANY):
            make_tars(Path(folder, f"tars-{count}"), count)
            settings = PairsConfig(source=(f"{folder}/tars-{count}/*.tar",))
            with contextlib.redirect_stderr(io.StringIO()):
                pairs = open_pairs(settings, index=Path(folder, f"index-{count}"))
            wanted = random.integers(0, len(pairs), 8192).tolist()
            readers[count] = lambda pairs=pairs, wanted=wanted: [pairs.read(row) for row in wanted]
        report("pairs of tars, one random pair at a time", readers, 8192, given.turns)


def make_store(folder: Path, shards: int, rows: int, dim: int) -> ShardedRows:
    folder.mkdir()
    each, files = rows // shards, [folder / f"{shard}.npy" for shard in range(shards)]
    block = np.random.default_rng(1).normal(size=(each, dim)).astype(np.float16)
    for file in files:
        np.save(file, block)
    return ShardedRows(files, [each] * shards, dim=dim, dtype=block.dtype)


def reader_of(store: ShardedRows, gathers: list[np.ndarray]) -> Callable[[], object]:
    return lambda: [store[rows] for rows in gathers]


def make_tars(folder: Path, shards: int) -> None:
    """8,000 pairs of one small picture."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(picture, "PNG")
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(8000 // shards):
                name = f"{shard:05d}-{number:03d}"
                for suffix, data in ((".png", picture.getvalue()), (".txt", b"a teal square")):
                    member = tarfile.TarInfo(name + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def report(what: str, readers: Mapping[int, Callable[[], object]], rows: int, turns: int) -> None:
    """Print the microseconds a row of each, and how they stand to each other."""
    least = dict.fromkeys(readers, float("inf"))
    for turn in range(turns + 1):
        for count, read in readers.items():
            start = time.process_time()
            read()
            if turn:  # the first opens the files
                least[count] = min(least[count], (time.process_time() - start) / rows * 1e6)
    micro = {f"{count} files": round(value, 2) for count, value in least.items()}
    print(json.dumps({"what": what, "microseconds a row": micro, "ratio": round(least[MANY] / least[FEW], 2)}))


if __name__ == "__main__":
    main()
