"""Kept rows that were made elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid.data.balance import kept_file
from clip_cid.data.balance.kept_file import read_kept_elsewhere
from clip_cid.errors import DataError

OK = np.array([True, True, False, True, True])


@pytest.mark.parametrize("row_group", [2, 100])
def test_the_table_lists_the_kept_rows_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int) -> None:
    monkeypatch.setattr(kept_file, "_ROW_GROUP", row_group)
    keys = pa.array(list("abcdefg"), pa.large_string())
    sizes = kept_file.write_kept(tmp_path, keys, np.array([1, 3, 6]), np.array([0, 0, -1, 1, 2, 2, 2]))
    table = pq.read_table(tmp_path / "kept.parquet")
    assert sizes.tolist() == [2, 1, 3]
    assert table.to_pydict() == {"key": ["b", "d", "g"], "row": [1, 3, 6], "set_size": [2, 1, 3]}
    assert table.schema.field("key").type == pa.large_string()


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<i4", "u1", ">u2", "<u8"])
def test_row_numbers_of_any_width_and_byte_order_are_the_rows(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "kept.npy", np.array([0, 1, 4], dtype=dtype))
    kept = read_kept_elsewhere(tmp_path / "kept.npy", OK)
    assert kept.tolist() == [0, 1, 4]
    assert kept.dtype == np.int64
    assert kept.dtype.isnative


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([1, 0]), "not sorted and different"),
        (np.array([1, 1]), "not sorted and different"),
        (np.array([2, 1], dtype=np.uint8), "not sorted and different"),
        (np.array([-1, 3]), "row -1 or 3 is outside the store's 5 rows"),
        (np.array([0, 5]), "row 0 or 5 is outside"),
        (np.array([0, 2**63 + 1], dtype=np.uint64), "row 0 or 9,223,372,036,854,775,809 is outside"),
        (np.array([0, 2]), "1 rows have no embedding, the first is row 2"),
        (np.array([0.0, 1.0]), "holds float64"),
        (np.array(["0", "1"]), "holds <U1"),
        (np.array([[0, 1]]), r"of shape \(1, 2\), not row numbers"),
        (np.array(3), r"of shape \(\), not row numbers"),
        (np.array([], dtype=np.int64), r"of shape \(0,\), not row numbers"),
        (np.array([(0, 1)], dtype=[("row", int), ("of", int)]), "not row numbers"),
        (np.array([object()]), "cannot be read as a .npy array"),
    ],
)
def test_what_is_not_rows_of_the_store_is_refused(tmp_path: Path, array: Any, problem: str) -> None:
    np.save(tmp_path / "kept.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=problem):
        read_kept_elsewhere(tmp_path / "kept.npy", OK)


def test_a_mask_is_told_how_to_become_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", OK)
    with pytest.raises(DataError, match="holds bool") as error:
        read_kept_elsewhere(tmp_path / "mask.npy", OK)
    assert "np.flatnonzero(mask)" in error.value.fix


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.npy"
    np.save(path, np.arange(2))
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], whole.replace(b"'descr'", b"(((((((", 1), b"\0" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"kept\.npy: cannot be read as a \.npy array"):
            read_kept_elsewhere(path, OK)
