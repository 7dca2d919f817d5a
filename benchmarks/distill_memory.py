"""What a rank of distill holds of all pairs, in bytes a row: with the order of an epoch, and at the peak of the join.

Two ranks join made-up pairs with a made-up store, once in the order of the pairs and once in another, which needs the
join by key. Embeddings are eight numbers wide: they are mapped, and none of them is read. Memory is RssAnon, what the
process has made itself, less what it had before.

    python benchmarks/distill_memory.py [--rows 1000000]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import process_costs
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.recipe import parse_recipe
from clip_cid.training.batch_order import epoch_orders
from clip_cid.training.join import distilled_pairs
from clip_cid.training.ranks.distributed import join_ranks

DIM, CENTERS, SHARD_ROWS = 8, 100, 10_000
KEPT_SHARE = 0.5625  # the paper's
BATCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rank-of", type=Path, help="be one of the two ranks that work on these data")
    given = parser.parse_args()
    if given.rank_of is not None:
        hold(given.rank_of)
        return

    with tempfile.TemporaryDirectory() as scratch:
        for order in ("same", "other"):
            folder = Path(scratch, order)
            make_data(folder, given.rows, same_order=order == "same")
            print(f"{given.rows:,} rows, a store in {'the' if order == 'same' else 'another'} order", flush=True)
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            subprocess.run([*start, __file__, "--rank-of", str(folder)], check=True)


def hold(folder: Path) -> None:
    recipe = parse_recipe(
        {"pairs": {"source": [str(folder / "pairs.parquet")], "key_column": "key"}}, where="benchmark"
    )
    stages: Any = SimpleNamespace(stage=lambda name: folder / name, path=folder)
    with join_ranks(torch.device("cpu")) as ranks:
        with ranks.main_first():
            pairs = open_pairs(recipe.pairs, index=folder / "index")
        store = EmbeddingStore.open(folder / "embed")
        ranks.wait()

        before, peak = anonymous_bytes(), Peak()
        with peak:
            more = {"ranks": ranks} if "ranks" in distilled_pairs.__annotations__ else {}
            training = distilled_pairs(stages, recipe, pairs, store, **more)
        _, order = next(epoch_orders(len(training), BATCH, seed=0))
        held = anonymous_bytes()

        found = [(value - before) / len(pairs) for value in (held, peak.bytes)]
        for rank, (after, highest) in enumerate(ranks.all(found)):
            if ranks.is_main:
                print(f"  rank {rank}: {after:6.1f} with the order of an epoch, {highest:6.1f} at the peak of the join")
        assert len(order) == len(training)


class Peak:
    """The most anonymous memory of this process while the block lasts, looked at a hundred times a second."""

    def __init__(self) -> None:
        self.bytes, self._over = 0, threading.Event()

    def __enter__(self) -> None:
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.01)


def anonymous_bytes() -> int:
    return process_costs.status_kib("RssAnon") * 1024


def make_data(folder: Path, rows: int, *, same_order: bool) -> None:
    """Pairs in a table, whose images are not there, and what the stages before distill leave of them."""
    for name in ("balance", "cluster"):
        (folder / name).mkdir(parents=True)
    keys = [f"{number:012d}" for number in range(rows)]
    columns = {"image": [f"{key}.jpg" for key in keys], "caption": ["a caption"] * rows, "key": keys}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")

    stored = keys if same_order else keys[::-1]
    writer = StoreWriter(folder / "embed", teacher={}, dim=DIM, fields=(), num_shards=-(-rows // SHARD_ROWS))
    for first in range(0, rows, SHARD_ROWS):
        some = stored[first : first + SHARD_ROWS]
        vectors = np.zeros((len(some), DIM), dtype=np.float16)
        vectors[:, 0] = 1
        ok, captions = np.ones(len(some), dtype=bool), [("a caption",)] * len(some)
        none = np.zeros((0, DIM), dtype=np.float16)
        name = f"{first // SHARD_ROWS:05d}"
        writer.add(ShardRows(name, vectors, vectors, none, ok, some, captions, [(4, 4)] * len(some), {}, []))
    writer.finish()

    kept = np.sort(np.random.default_rng(0).permutation(rows)[: int(rows * KEPT_SHARE)])
    np.save(folder / "balance" / "kept.npy", kept)
    np.save(folder / "cluster" / "labels.npy", (np.arange(len(kept)) % CENTERS).astype(np.int32))
    np.save(folder / "cluster" / "centers.npy", np.eye(CENTERS, DIM, dtype=np.float32))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
