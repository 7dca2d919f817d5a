"""Embeddings in Lance tables are those of the same rows in Parquet."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid import extras
from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError, MissingExtraError


@pytest.fixture
def lance() -> Any:
    return pytest.importorskip("lance", reason="needs pylance")


def table(rows: int = 50) -> pa.Table:
    vectors = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 8)
    return pa.table({"id": [f"k{row}" for row in range(rows)], "embedding": column, "note": ["n"] * rows})


def imported(source: Path, out: Path) -> EmbeddingStore:
    import_existing(source, out)
    return EmbeddingStore.open(out)


@pytest.mark.parametrize("several", [False, True])
def test_a_lance_table_is_read_as_the_same_parquet(tmp_path: Path, lance: Any, several: bool) -> None:
    rows, (there, beside) = table(), (tmp_path / kind for kind in ("lance", "parquet"))
    beside.mkdir()
    parts = [rows.slice(0, 30), rows.slice(30)] if several else [rows]
    for number, part in enumerate(parts):
        lance.write_dataset(part, str(there / f"{number}.lance"), max_rows_per_file=8)
        pq.write_table(part, beside / f"{number}.parquet")
    source = there if several else there / "0.lance"

    store, wanted = imported(source, tmp_path / "a"), imported(beside, tmp_path / "b")
    assert list(store.keys) == list(wanted.keys) == rows["id"].to_pylist()
    np.testing.assert_array_equal(store.images[:], wanted.images[:])
    assert store.info.fields == wanted.info.fields


def test_a_damaged_lance_table_is_told_in_two_lines(tmp_path: Path, lance: Any) -> None:
    lance.write_dataset(table(), str(tmp_path / "x.lance"))
    for file in (tmp_path / "x.lance" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"x\.lance: not a whole Lance table") as error:
        imported(tmp_path / "x.lance", tmp_path / "out")
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(DataError, match=r"nothing\.lance: not a whole Lance table"):
        imported(tmp_path / "nothing.lance", tmp_path / "out")


def test_without_its_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.MODULES, "lance", ("no_such_module",))
    (tmp_path / "x.lance").mkdir()
    with pytest.raises(MissingExtraError, match=r"x\.lance: a Lance table needs an optional part") as error:
        imported(tmp_path / "x.lance", tmp_path / "out")
    assert error.value.fix == 'pip install "clip-cid[lance]"'
