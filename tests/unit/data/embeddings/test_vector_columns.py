"""Embeddings in a column of a table, against the arrays it was written from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError

DIM = 6


def unit(rows: int, seed: int, dtype: Any = np.float32) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def fixed(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def lists(vectors: np.ndarray) -> pa.Array:
    offsets = pa.array(np.arange(len(vectors) + 1) * vectors.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))


def large_lists(vectors: np.ndarray) -> pa.Array:
    return lists(vectors).cast(pa.large_list(pa.from_numpy_dtype(vectors.dtype)))


def tensors(vectors: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)


def write_stream(table: pa.Table, path: Path) -> None:
    """As the cache of Hugging Face's datasets."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[pa.Table, Path], Any]] = {
    "t.parquet": lambda table, path: pq.write_table(table, path, row_group_size=3),
    "t.feather": lambda table, path: pyarrow.feather.write_feather(table, path, compression="lz4"),
    "t.arrow": write_stream,
}


def taken(source: Path, out: Path, **options: Any) -> EmbeddingStore:
    import_existing(source, out, **options)
    store = EmbeddingStore.open(out)
    store.check_values()
    return store


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", [fixed, lists, large_lists, tensors])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_column_of_vectors_is_taken_with_the_keys_beside_it(
    tmp_path: Path, name: str, column: Callable[[np.ndarray], pa.Array], dtype: Any
) -> None:
    vectors = unit(10, 0, dtype)
    table = pa.table({"id": range(10), "embedding": column(vectors), "url": [f"u{row}" for row in range(10)]})
    WRITERS[name](table, tmp_path / name)
    store = taken(tmp_path / name, tmp_path / "out")
    assert np.array_equal(store.images[:], vectors.astype(np.float16 if dtype is np.float16 else np.float32))
    assert list(store.keys) == [str(row) for row in range(10)]
    assert store.field("url") == [f"u{row}" for row in range(10)]
    assert (store.has_texts, store.info.fields) == (False, ("url",))


def test_files_of_a_folder_follow_each_other_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for part in (2, 10):
        table = pa.table({"key": [f"{part}-{row}" for row in range(4)], "embedding": lists(unit(4, part))})
        pq.write_table(table, tmp_path / "in" / f"part{part}.parquet")
    pq.write_table(pa.table({"key": ["x"]}), tmp_path / "in" / "other.parquet")
    store = taken(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(store.images[:], np.concatenate([unit(4, 2), unit(4, 10)]))
    assert list(store.keys) == [f"{part}-{row}" for part in (2, 10) for row in range(4)]
    assert "1 other files and folders are not read, such as 'other.parquet'" in caplog.text


def test_names_of_columns_say_which_are_of_images_and_which_of_texts(tmp_path: Path) -> None:
    columns = {"text_embedding": lists(unit(4, 1)), "image_embedding": lists(unit(4, 2))}
    pq.write_table(pa.table({"uid": list("abcd"), "caption": list("wxyz"), **columns}), tmp_path / "t.parquet")
    store = taken(tmp_path / "t.parquet", tmp_path / "out")
    assert np.array_equal(store.images[:], unit(4, 2))
    assert np.array_equal(store.texts[:], unit(4, 1))
    assert store.captions(3) == ("z",)


@pytest.mark.parametrize("names", [("a", "b"), ("text_embedding",), ("clip_image", "dino_image"), ("image", "other")])
def test_columns_that_do_not_say_what_they_hold_are_not_guessed(tmp_path: Path, names: tuple[str, ...]) -> None:
    columns = {name: lists(unit(4, seed)) for seed, name in enumerate(names)}
    pq.write_table(pa.table({"key": list("abcd"), **columns}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=f"not clear which column .*among {', '.join(names)}"):
        import_existing(tmp_path / "t.parquet", tmp_path / "out")


def test_vectors_alone_have_keys_of_file_and_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"embedding": lists(unit(3, 0))}), tmp_path / "mine.parquet")
    assert list(taken(tmp_path / "mine.parquet", tmp_path / "out").keys) == ["mine/0", "mine/1", "mine/2"]


def test_rows_without_a_vector_are_left_out_or_refused(tmp_path: Path) -> None:
    vectors: list[Any] = [list(map(float, row)) for row in unit(5, 0)]
    vectors[1], vectors[3] = None, [*vectors[3][:-1], None]
    table = pa.table({"key": list("abcde"), "embedding": pa.array(vectors, pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="row 1 has length nan"):
        import_existing(tmp_path / "t.parquet", tmp_path / "refused")
    store = taken(tmp_path / "t.parquet", tmp_path / "out", max_bad_share=0.5)
    assert store.ok.tolist() == [True, False, True, False, True]
    assert np.array_equal(store.images[:][store.ok], unit(5, 0)[store.ok])


def test_rows_of_empty_lists_have_no_vector(tmp_path: Path) -> None:
    vectors = [[], *unit(3, 0).tolist(), []]
    pq.write_table(pa.table({"key": list("abcde"), "embedding": vectors}), tmp_path / "t.parquet")
    store = taken(tmp_path / "t.parquet", tmp_path / "out", max_bad_share=0.5)
    assert store.ok.tolist() == [False, True, True, True, False]
    assert np.array_equal(store.images[1:4], unit(3, 0))

    pq.write_table(
        pa.table({"key": ["a"], "embedding": pa.array([[]], pa.list_(pa.float32()))}), tmp_path / "t.parquet"
    )
    with pytest.raises(DataError, match="column 'embedding' holds no vector"):
        import_existing(tmp_path / "t.parquet", tmp_path / "none")


def test_files_without_rows_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"key": list("abcd"), "embedding": lists(unit(4, 0))})
    for part, rows in enumerate((0, 4, 0)):
        pq.write_table(table.slice(0, rows), tmp_path / "in" / f"part-{part}.parquet")
    store = taken(tmp_path / "in", tmp_path / "out")
    assert (list(store.keys), len(store.info.shards)) == (list("abcd"), 1)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"key": ["x"], "embedding": pa.nulls(1)}, "column 'embedding' is of type null, not vectors"),
        ({"key": ["x"], "embedding": [[1, 2]]}, "column 'embedding' is of type list<.*: int64>, not vectors"),
        ({"key": ["x"], "vector": lists(unit(1, 1))}, "column 'embedding' is not there"),
        ({"embedding": lists(unit(1, 1))}, "nothing but vectors, while 0.parquet has keys beside them"),
    ],
)
def test_files_of_a_folder_that_hold_other_columns_are_named(tmp_path: Path, other: Any, problem: str) -> None:
    first = pa.table({"key": list("abcd"), "embedding": lists(unit(4, 0))})
    for part, table in enumerate((first, pa.table(other))):
        pq.write_table(table, tmp_path / f"{part}.parquet")
    with pytest.raises(DataError, match=rf"1\.parquet: {problem}"):
        import_existing(tmp_path, tmp_path / "out")


def test_a_vector_of_another_length_is_named(tmp_path: Path) -> None:
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0, 0.0]])
    pq.write_table(pa.table({"key": list("abc"), "embedding": vectors}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'embedding', row 2: 3 numbers, not 2 as before"):
        import_existing(tmp_path / "t.parquet", tmp_path / "out")


def test_vectors_are_scaled_on_request(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": list("abc"), "embedding": lists(7 * unit(3, 0))}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"has length 7, not 1"):
        import_existing(tmp_path / "t.parquet", tmp_path / "refused")
    store = taken(tmp_path / "t.parquet", tmp_path / "out", normalize=True)
    assert np.allclose(store.images[:], unit(3, 0), atol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    table = pa.table({"key": list("abc") * 50, "embedding": lists(unit(150, 0))})
    WRITERS[name](table, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}: not a whole") as error:
        import_existing(tmp_path / name, tmp_path / "out")
    assert error.value.fix == "Fetch or write this file again."


def test_a_table_without_vectors_is_no_embeddings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "tags": [["x"]]}), tmp_path / "t.parquet")
    problem = (
        r"nor a table with a column of vectors \(t.parquet has key of type string, tags of type list<.*: string>\)"
    )
    with pytest.raises(DataError, match=problem):
        import_existing(tmp_path / "t.parquet", tmp_path / "out")
