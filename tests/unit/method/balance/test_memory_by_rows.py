"""What the process that drives the balance holds for each row, step by step: the list in docs/scale.md."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clip_cid.data.array_folder import ArrayFolder
from clip_cid.data.balance import tables as tables_module
from clip_cid.data.balance.forest_file import FOREST_FILE, read_forest, write_forest
from clip_cid.data.balance.tables import BalanceTables, write_tables
from clip_cid.method.balance import forest, set_explanation, union_find
from clip_cid.method.balance.forest import Links, whole_forest
from clip_cid.method.balance.kept_rows import keep_one_of_each
from clip_cid.method.balance.pair_plan import Plan, lay_out
from clip_cid.method.balance.prepared_rows import prepare
from clip_cid.method.balance.set_explanation import explain
from clip_cid.method.jobs import Context
from clip_cid.method.unit_rows import UnitRows
from clip_cid.report.drawing import removed_sets

ROWS = 240_000
SQUARED = 0.5


def bytes_a_row(step: Callable[[], Any]) -> tuple[float, Any]:
    """Of the largest moment, beside what was there before; and what the step gives."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    found = step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak - before) / ROWS, found


@pytest.fixture(scope="module")
def images() -> UnitRows:
    """Ten rows a direction of the circle, three of them bit for bit."""
    angles = np.repeat(np.linspace(0, 6, ROWS // 10), 10) + np.tile([0, 0, 0, *(1e-6 * np.arange(1, 8))], ROWS // 10)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return UnitRows(rows[np.random.default_rng(0).permutation(ROWS)], name="rows", any_length=True)


def sets_of_five() -> Links:
    """Of rows far apart from each other, 44 % are linked to the row before."""
    right = np.flatnonzero(np.arange(ROWS) % 5 > 2)
    return Links(right - 1, right, np.linspace(0.1, 0.4, len(right)))


def page_numbers(folder: Path) -> Any:
    """What the page of a balance holds together."""
    stored = BalanceTables(folder)
    chosen = removed_sets.choose(stored, sets=9, seed=0)
    return stored.distances, chosen, read_forest(folder / FOREST_FILE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in blocks must not hide what grows with the rows."""
    monkeypatch.setattr(forest, "_MERGED", 1 << 11)
    monkeypatch.setattr(union_find, "_EDGES", 1 << 11)
    monkeypatch.setattr(set_explanation, "_CELLS", 1 << 12)
    monkeypatch.setattr(UnitRows, "gathered_rows", 1 << 11)
    monkeypatch.setattr(tables_module, "_ROW_GROUP", 1 << 12)


@pytest.mark.slow
def test_each_step_holds_the_bytes_a_row_that_are_documented(tmp_path, images):
    plan = Plan("int8", 2, chunk_rows=1 << 15)
    context = Context(images, store=ArrayFolder(tmp_path / "work"))
    scan, _ = bytes_a_row(lambda: prepare(context, 1e-12, lay_out(images, plan)))
    assert scan < 47 + 30  # what one part alone has scanned is in memory: 30

    links = sets_of_five()
    merge, joined = bytes_a_row(lambda: whole_forest(ROWS, [links], SQUARED))
    assert merge < 8 + 1 + (24 + 9) * 0.4 + 1
    sets, labels = bytes_a_row(lambda: joined.sets(SQUARED))
    assert sets < 20 + 1
    choice, (kept, set_of) = bytes_a_row(lambda: keep_one_of_each(images, None, labels))
    assert choice < 45
    explanation, found = bytes_a_row(lambda: explain(images, kept, set_of, joined, SQUARED))
    assert explanation < 57
    tables, columns = bytes_a_row(lambda: (found.set_columns("cosine"), found.member_columns("cosine")))
    assert tables < 22 + 8

    keys = pa.array([""] * ROWS, pa.large_string())
    write_tables(tmp_path, keys, *columns, metric="cosine", threshold=SQUARED / 2)
    write_forest(tmp_path / FOREST_FILE, joined)
    page, _ = bytes_a_row(lambda: page_numbers(tmp_path))
    assert page < 40
