import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid.data.balance.tables import BalanceTables, read_numbers, write_tables
from clip_cid.errors import DataError
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.set_explanation import explain
from clip_cid.method.unit_rows import UnitRows

KEYS = pa.array([f"key {row}" for row in range(12)], pa.large_string())
GOOD = np.array([0, 2, 3, 5, 7, 11])


def chord(degrees: float) -> float:
    return 2 - 2 * float(np.cos(np.deg2rad(degrees)))


def written(out: Path, kinds: Any = None) -> BalanceTables:
    """Rows 0, 2 and 3 of the store are a set, 5 and 11 another, 7 is alone; the others have no embedding."""
    angles = np.deg2rad([0, 10, 21, 90, 180, 91])
    images = UnitRows(np.stack([np.cos(angles), np.sin(angles)], axis=1), name="rows", any_length=False)
    squared = [chord(1), chord(10), chord(11)]
    forest = Forest(6, np.array([3, 0, 1]), np.array([5, 1, 2]), np.array(squared), chord(12))
    found = explain(images, np.array([1, 3, 4]), np.array([0, 0, 0, 1, 2, 1]), forest, chord(12)).with_rows(GOOD)
    columns = found.set_columns("cosine"), found.member_columns("cosine")
    write_tables(out, KEYS, *columns, metric="cosine", threshold=chord(12) / 2, kinds=kinds)
    return BalanceTables(out)


def test_the_tables_by_hand(tmp_path: Path) -> None:
    written(tmp_path, np.array([2, 0, 1], dtype=np.int8))
    first, second = pq.read_table(tmp_path / "sets.parquet").to_pylist()
    assert first == {
        "set": 0,
        "kept_row": 2,
        "kept_key": "key 2",
        "size": 3,
        "component": 0,
        "component_size": 3,
        "farthest": pytest.approx(chord(11) / 2),
        "mean": pytest.approx((chord(10) + chord(11)) / 4),
        "widest": pytest.approx(chord(21) / 2),
        "widest_exact": True,
        "weakest_link": pytest.approx(chord(11) / 2),
        "weakest_left": 2,
        "weakest_right": 3,
    }
    assert (second["set"], second["kept_key"], second["size"], second["component"]) == (1, "key 5", 2, 1)
    members = pq.read_table(tmp_path / "members.parquet").to_pylist()
    assert [tuple(line[name] for name in ("row", "key", "set", "kept", "kind")) for line in members] == [
        (0, "key 0", 0, False, "semantic"),
        (2, "key 2", 0, True, ""),
        (3, "key 3", 0, False, ""),
        (5, "key 5", 1, True, ""),
        (11, "key 11", 1, False, "perceptual"),
    ]
    assert members[1]["distance"] == 0
    assert members[2]["distance"] == pytest.approx(chord(11) / 2)


def test_metric_and_threshold_are_in_the_metadata_of_both(tmp_path: Path) -> None:
    tables = written(tmp_path)
    assert (tables.metric, tables.threshold) == ("cosine", chord(12) / 2)
    for name in ("sets", "members"):
        metadata = pq.read_schema(tmp_path / f"{name}.parquet").metadata
        assert metadata == {b"metric": b"cosine", b"threshold": repr(chord(12) / 2).encode()}


def test_a_reader_gets_the_sets_the_distances_and_the_members_it_asks_for(tmp_path: Path) -> None:
    tables = written(tmp_path, np.array([1, 2, 1], dtype=np.int8))
    assert tables.sets["size"].tolist() == [3, 2]
    assert tables.distances == pytest.approx(np.array([chord(10), chord(11), chord(1)]) / 2)
    assert tables.members([1])["row"].tolist() == [5, 11]
    assert tables.members([0])["kept"].tolist() == [False, True, False]
    assert tables.members([])["row"].tolist() == []
    assert tables.of_kind("perceptual")["row"].tolist() == [0, 11]


def test_small_row_groups_change_nothing_but_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    written(whole)
    monkeypatch.setattr("clip_cid.data.balance.tables._ROW_GROUP", 2)
    written(parts)
    assert pq.read_metadata(parts / "members.parquet").num_row_groups == 3
    for name in ("sets.parquet", "members.parquet"):
        assert pq.read_table(parts / name).equals(pq.read_table(whole / name))


def test_the_same_sets_give_the_same_bytes(tmp_path: Path) -> None:
    written(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("sets.parquet", "members.parquet")]
    written(tmp_path)
    assert before == [(tmp_path / name).read_bytes() for name in ("sets.parquet", "members.parquet")]


def test_nothing_removed_gives_empty_tables(tmp_path: Path) -> None:
    images = UnitRows(np.eye(3), name="rows", any_length=False)
    none = np.zeros(0, dtype=np.int64)
    found = explain(images, np.arange(3), np.arange(3), Forest(3, none, none, np.zeros(0), 0.1), 0.1)
    columns = found.set_columns("euclidean"), found.member_columns("euclidean")
    write_tables(tmp_path, KEYS, *columns, metric="euclidean", threshold=0.3)
    tables = BalanceTables(tmp_path)
    assert (len(tables.sets["size"]), len(tables.distances), len(tables.of_kind("semantic")["row"])) == (0, 0, 0)


def test_numbers_that_are_read_take_their_own_bytes_and_a_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, group = 60, 1 << 12
    column = pa.array(np.random.default_rng(0).random(groups * group))
    pq.write_table(pa.table({"a": column, "b": column}), tmp_path / "t", row_group_size=group, use_dictionary=False)
    monkeypatch.setattr("clip_cid.data.balance.tables._ROW_GROUP", group)
    usual, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    tracemalloc.start()
    try:
        found = read_numbers(tmp_path / "t", {"a": np.float64, "b": np.float64})
        peak = tracemalloc.get_traced_memory()[1] + (counted.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert all(np.array_equal(values, column) for values in found.values())
    assert peak < 1.25 * 2 * column.nbytes


def test_broken_tables_are_named_with_their_remedy(tmp_path: Path) -> None:
    assert not BalanceTables.exist(tmp_path)
    written(tmp_path)
    assert BalanceTables.exist(tmp_path)
    sets, members = tmp_path / "sets.parquet", tmp_path / "members.parquet"
    good = sets.read_bytes(), members.read_bytes()

    members.unlink()
    with pytest.raises(DataError, match=r"members\.parquet: missing"):
        BalanceTables(tmp_path)
    members.write_bytes(good[1][:-30])
    with pytest.raises(DataError, match=r"members\.parquet: not a whole Parquet file") as error:
        BalanceTables(tmp_path)
    assert "balance stage again, with --force" in error.value.fix
    members.write_bytes(good[0])
    with pytest.raises(DataError, match=r"columns set, kept_row, .*, not row, key"):
        BalanceTables(tmp_path)
    members.write_bytes(good[1])
    table = pq.read_table(sets)
    pq.write_table(table.replace_schema_metadata({"metric": "cosine"}), sets)
    with pytest.raises(DataError, match="does not name metric and threshold"):
        BalanceTables(tmp_path)
    pq.write_table(table.replace_schema_metadata({"metric": "cosine", "threshold": "1"}), sets)
    with pytest.raises(DataError, match="of another metric or threshold"):
        BalanceTables(tmp_path)
