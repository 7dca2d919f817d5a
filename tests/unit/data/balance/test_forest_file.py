from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid.data.balance.forest_file import read_forest, write_forest
from clip_cid.errors import DataError
from clip_cid.method.balance.forest import Forest


def forest() -> Forest:
    return Forest(9, np.array([1, 0, 3]), np.array([2, 8, 4]), np.array([0.0, 0.1, 0.1 + 2**-52]), 0.14)


def changed(path: Path, **columns: Any) -> None:
    """The file with other values in some columns, and the same metadata."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, pa.field(name, pa.array(values).type, nullable=False), pa.array(values))
    pq.write_table(table, path)


def test_a_forest_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_forest(tmp_path / "forest.parquet", forest())
    found = Forest(*read_forest(tmp_path / "forest.parquet"))
    for name in ("rows", "left", "right", "squared", "limit"):
        np.testing.assert_array_equal(getattr(found, name), getattr(forest(), name))


def test_a_forest_without_links_comes_back(tmp_path: Path) -> None:
    none = np.zeros(0, dtype=np.int64)
    write_forest(tmp_path / "f", Forest(3, none, none, np.zeros(0), 0.1))
    assert Forest(*read_forest(tmp_path / "f")).removed_share(0.1) == 0


def test_equal_forests_give_equal_bytes_that_others_can_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_forest(tmp_path / name, forest())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    table = pq.read_table(tmp_path / "a")
    assert table.column_names == ["left", "right", "squared_distance"]
    assert table.schema.metadata == {b"rows": b"9", b"limit": b"0.14"}


def test_many_links_are_written_in_several_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_cid.data.balance.forest_file._ROW_GROUP", 2)
    write_forest(tmp_path / "f", forest())
    assert pq.read_metadata(tmp_path / "f").num_row_groups == 2
    assert read_forest(tmp_path / "f").left.tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"left": [2, 0, 3]}, "does not join rows 0 <= left < right < 9"),
        ({"left": [-1, 0, 3]}, "does not join rows"),
        ({"right": [2, 9, 4]}, "does not join rows"),
        ({"squared_distance": [0.1, 0.0, 0.1]}, "does not ascend from 0 to the limit 0.14"),
        ({"squared_distance": [-0.1, 0.0, 0.1]}, "does not ascend"),
        ({"squared_distance": [0.0, 0.1, 0.15]}, "does not ascend"),
        ({"squared_distance": [0.0, float("nan"), 0.1]}, "does not ascend"),
        ({"left": np.array([1, 0, 3], dtype=np.int32)}, "columns left int32, .*, not left int64"),
    ],
)
def test_a_file_that_holds_no_forest_is_named_with_its_remedy(columns: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "forest.parquet"
    write_forest(path, forest())
    changed(path, **columns)
    with pytest.raises(DataError, match=message) as error:
        read_forest(path)
    assert str(path) in error.value.problem
    assert "balance stage again, with --force" in error.value.fix


@pytest.mark.parametrize("metadata", [{}, {"rows": "9"}, {"rows": "many", "limit": "1"}, {"rows": "9", "limit": "nan"}])
def test_rows_and_limit_must_be_in_the_metadata(metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_forest(path, forest())
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match="does not name rows and limit"):
        read_forest(path)


def test_other_columns_a_cut_file_and_no_file_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(DataError, match="missing"):
        read_forest(path)
    pq.write_table(pa.table({"left": [1]}), path)
    with pytest.raises(DataError, match="has the columns left int64, not left int64, right int64"):
        read_forest(path)
    write_forest(path, forest())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read_forest(path)
