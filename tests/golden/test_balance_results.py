"""The result files of the balance, by digests that were computed when it chose and explained all sets in one process.

Rows are made of small whole numbers, so that their lengths and quotients are the same on every processor. Of a table
the contents are digested, since another pyarrow writes other bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest
from fabricated_run import publish

from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.method.balance import near_pairs, plan_choice, row_scan
from clip_cid.method.unit_rows import UnitRows
from clip_cid.recipe import parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages import balance

GOLDEN = Path(__file__).with_name("balance_results.json")
DIM = 12
CASES: dict[str, dict[str, Any]] = {
    "nearest to the centroid": {"threshold": 0.07},
    "best caption, farther known": {"threshold": 0.1, "max_threshold": 0.2, "keep": "best_caption"},
    "radius": {"threshold": 0.15, "max_radius": 0.1},
    "share": {"target_removed": 0.3, "max_threshold": 0.2},
    "one giant set": {"threshold": 0.4, "metric": "euclidean"},
}


def rows_of(count: int, *, seed: int, giant: bool) -> np.ndarray:
    """Whole numbers, a third of the rows near another one or equal to it; or nearly all within one crowd."""
    rng = np.random.default_rng(seed)
    found = rng.integers(-9, 10, (count, DIM)).astype(np.float64) * 16
    copies = rng.permutation(count)[: count // 3]
    found[copies] = found[rng.integers(0, count, len(copies))] + rng.integers(-9, 10, (len(copies), DIM))
    equal = copies[: len(copies) // 4]
    found[equal] = found[rng.permutation(equal)]
    if giant:
        found[: count - 40] = found[0] + rng.integers(-9, 10, (count - 40, DIM))
    found[~found.any(axis=1)] = 1
    return oracles.unit(found).astype(np.float16)


def embedded(path: Path, count: int, *, giant: bool) -> RunFolder:
    """A run whose rows lie in shards of 100, one in eleven without an embedding, one in seven without a caption."""
    folder = RunFolder(path / "run")
    folder.path.mkdir()
    part = folder.begin("embed", {"key": "key"}, resumable=False).part
    images, texts = (rows_of(count, seed=seed, giant=giant) for seed in (1, 2))
    ok = np.arange(count) % 11 != 3
    captioned = ok & (np.arange(count) % 7 != 5)
    images[~ok], texts[~captioned] = 0, 0

    starts = range(0, count, 100)
    writer = StoreWriter(part, teacher={}, dim=DIM, fields=(), num_shards=len(starts))
    for start in starts:
        rows = range(start, min(start + 100, count))
        some = slice(rows.start, rows.stop)
        writer.add(
            ShardRows(
                name=f"{start:06d}",
                images=images[some],
                texts=texts[some],
                more_texts=texts[:0],
                ok=ok[some],
                keys=[f"key {row:05d}" for row in rows],
                captions=[("a caption",) if captioned[row] else () for row in rows],
                sizes=[(8, 8)] * len(rows),
                fields={},
                skipped=[
                    {"row": row, "key": f"key {row:05d}", "shard": "", "reason": "broken"}
                    for row in rows
                    if not ok[row]
                ],
            )
        )
    writer.finish()
    publish(folder, "embed", {})
    return folder


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    if path.suffix == ".npy":
        values = np.load(path)
        sha256.update(repr((values.dtype.str, values.shape)).encode() + values.tobytes())
        return sha256.hexdigest()

    table = pq.read_table(path)
    head = {name: value for name, value in (table.schema.metadata or {}).items() if name != b"ARROW:schema"}
    sha256.update(repr((sorted(head.items()), [(field.name, str(field.type)) for field in table.schema])).encode())
    for column in table.columns:
        values = column.to_numpy()
        sha256.update("\n".join(values).encode() if values.dtype == object else values.tobytes())
    return sha256.hexdigest()


def digests(path: Path, settings: dict[str, Any], *, giant: bool) -> Any:
    folder = embedded(path, 5000 if giant else 900, giant=giant)
    out = folder.begin("balance", {"key": "key"}, resumable=True).part
    recipe = parse_recipe({"balance": {"classify": 0, **settings}}, where="test")
    summary = balance.run(folder, out, recipe)
    files = {file.name: digest(file) for file in sorted(out.iterdir()) if file.suffix in (".npy", ".parquet")}
    return files | {"summary": [summary.kept, summary.sets_with_duplicates, summary.largest_set]}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True], ids=["at once", "in many parts"])
@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_the_balance_in_one_process(case, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_choice, "_LEAST_CHUNK", 60)
    if parts:
        monkeypatch.setattr(row_scan, "_PART_BYTES", 4000)
        monkeypatch.setattr(near_pairs, "_MERGED_TOGETHER", 4)
        monkeypatch.setattr(plan_choice, "_FEWEST_GROUPS", 4)  # tiles of several chunks
        monkeypatch.setattr(UnitRows, "gathered_rows", 70)
    found = digests(tmp_path, CASES[case], giant=case == "one giant set")
    assert found == json.loads(GOLDEN.read_text())[case]
