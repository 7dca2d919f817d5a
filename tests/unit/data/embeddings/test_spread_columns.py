"""Embeddings with a column for each dimension, against the arrays they were written from."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.layouts import find_embeddings
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError

DIM = 11


def unit(rows: int, seed: int, dtype: Any = np.float32) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def spread(vectors: np.ndarray, name: str = "emb_{}", first: int = 0) -> dict[str, np.ndarray]:
    return {name.format(number): column for number, column in enumerate(vectors.T, start=first)}


def write(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=3)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(pa.table(columns), path)
    else:
        how = {"delimiter": "\t" if path.suffix == ".tsv" else ",", **how}
        with open(path, "w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
            writer = csv.writer(file, **how)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    return path


def taken(source: Path, out: Path, **options: Any) -> EmbeddingStore:
    import_existing(source, out, **options)
    store = EmbeddingStore.open(out)
    store.check_values()
    return store


@pytest.mark.parametrize("file", ["t.parquet", "t.feather", "t.csv", "t.tsv"])
@pytest.mark.parametrize(("name", "first"), [("{}", 0), ("emb_{}", 0), ("V{}", 1), ("e{}", 0), ("clip.{:04d}", 0)])
def test_columns_of_dimensions_are_one_vector_in_the_order_of_their_numbers(
    tmp_path: Path, file: str, name: str, first: int
) -> None:
    vectors = unit(10, 0)
    columns = spread(vectors, name, first)
    columns = {column: columns[column] for column in sorted(columns)}  # as text: emb_10 before emb_2
    keys = [f'00{row},\n"\u00e9"' for row in range(10)]
    store = taken(
        write(tmp_path / file, {"id": keys, **columns, "year": [f"0{row}" for row in range(10)]}), tmp_path / "o"
    )
    assert np.array_equal(store.images[:], vectors)
    assert list(store.keys) == keys
    assert store.field("year") == [f"0{row}" for row in range(10)]
    assert store.info.fields == ("year",)


@pytest.mark.parametrize(
    ("how", "dtype"), [({"encoding": "utf-8-sig"}, float), ({"delimiter": ";", "lineterminator": "\n"}, np.float16)]
)
def test_text_as_people_have_it_is_read_with_every_digit(tmp_path: Path, how: dict[str, Any], dtype: Any) -> None:
    vectors = unit(5, 1, dtype)
    store = taken(write(tmp_path / "t.csv", {"key": list("abcde"), **spread(vectors)}, **how), tmp_path / "out")
    assert np.array_equal(store.images[:].astype(dtype), vectors if dtype == np.float16 else vectors.astype(np.float32))


def test_blocks_of_a_long_text_table_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_cid.data.embeddings.text_tables._BLOCK_BYTES", 1 << 11)
    vectors = unit(100, 2)
    (tmp_path / "in").mkdir()
    for part in (2, 10):
        keys = [f"{part}-{row}" for row in range(50)]
        half = vectors[:50] if part == 2 else vectors[50:]
        write(tmp_path / "in" / f"part{part}.csv", {"key": keys, **spread(half)})
    store = taken(tmp_path / "in", tmp_path / "out")
    assert np.array_equal(store.images[:], vectors)
    assert (store.keys[0], store.keys[99]) == ("2-0", "10-49")


def test_names_say_which_are_of_images_and_which_of_texts(tmp_path: Path) -> None:
    columns = {**spread(unit(4, 1), "text_emb_{}"), **spread(unit(4, 2), "image_emb_{}")}
    path = write(tmp_path / "t.csv", {"uid": list("abcd"), "caption": list("wxyz"), **columns})
    store = taken(path, tmp_path / "out")
    assert np.array_equal(store.images[:], unit(4, 2))
    assert np.array_equal(store.texts[:], unit(4, 1))
    assert store.captions(3) == ("z",)


@pytest.mark.parametrize("file", ["t.parquet", "t.csv"])
@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (spread(unit(4, 0), "a{}") | spread(unit(4, 1), "b{}"), "not clear which column .* among a0 to a10, b0 to b10"),
        (
            {key: value for key, value in spread(unit(4, 0)).items() if key != "emb_7"},
            "emb_0 to emb_10 some are missing",
        ),
        (spread(unit(4, 0)) | {"emb_07": unit(4, 0)[:, 0]}, "emb_0 to emb_10 some are missing, named twice"),
        (spread(unit(4, 0), first=5), "emb_5 to emb_15 some are missing"),
    ],
)
def test_what_is_not_clear_is_not_guessed(tmp_path: Path, file: str, columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        find_embeddings(write(tmp_path / file, {"key": list("abcd"), **columns}))


def test_a_dimension_of_another_type_is_missing_or_named(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"key": list("abcd"), **spread(unit(4, 0))}
    columns["emb_3"] = ["0.1", "0.2", "x", "0.3"]
    with pytest.raises(DataError, match="some are missing, named twice, or hold no numbers"):
        find_embeddings(write(tmp_path / "t.parquet", columns))
    with pytest.raises(DataError, match=r"t.csv: cannot be read .*column #4: .* invalid value 'x'"):
        import_existing(write(tmp_path / "t.csv", columns), tmp_path / "out")


def test_a_column_of_lists_counts_before_columns_of_numbers(tmp_path: Path) -> None:
    lists = pa.array(unit(4, 0).tolist(), pa.list_(pa.float32()))
    store = taken(
        write(tmp_path / "t.parquet", {"key": list("abcd"), "embedding": lists, **spread(unit(4, 1), "score{}")}),
        tmp_path / "out",
    )
    assert np.array_equal(store.images[:], unit(4, 0))
    assert "score10" in store.info.fields


def test_rows_without_numbers_are_left_out_or_refused(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"key": list("abcde"), **spread(unit(5, 0).astype(object))}
    for column in range(DIM):
        columns[f"emb_{column}"][1] = "" if column == 3 else columns[f"emb_{column}"][1]
        columns[f"emb_{column}"][2] = "nan"
    path = write(tmp_path / "t.csv", columns)
    with pytest.raises(DataError, match="row 1 has length nan"):
        import_existing(path, tmp_path / "refused")
    store = taken(path, tmp_path / "out", max_bad_share=0.5)
    assert store.ok.tolist() == [True, False, False, True, True]


def test_a_row_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {"key": list("abcd"), **spread(unit(4, 0))})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"t.csv: cannot be read .*Expected 12 columns"):
        find_embeddings(path)


def test_files_of_other_widths_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", {"key": list("abcd"), **spread(unit(4, 0))})
    write(tmp_path / "b.csv", {"key": list("efgh"), **spread(unit(4, 0)[:, :9])})
    with pytest.raises(DataError, match=r"b.csv: column 'emb_0 to emb_10' is not there, and a.csv has it"):
        find_embeddings(tmp_path)


def test_text_tables_without_such_columns_say_what_is_needed(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "bare.csv", unit(4, 0), delimiter=",")
    for path in (tmp_path / "bare.csv", write(tmp_path / "t.csv", {"key": list("ab"), "embedding": ["[0.1]", "[1]"]})):
        with pytest.raises(
            DataError, match="has no column for each dimension, named by its number; there are"
        ) as error:
            find_embeddings(path)
        assert "np.loadtxt(FILE" in error.value.fix


def test_columns_that_are_no_keys_are_named_without_those_of_the_vectors(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {"": ["0", "1", "2", "3"], **spread(unit(4, 0), "{}")})  # as pandas writes it
    with pytest.raises(
        DataError, match="no column key, uid, image_path or id, or no caption or text, among ''"
    ) as error:
        import_existing(path, tmp_path / "out")
    assert error.value.fix.endswith("leave the other columns out (pandas: index=False).")
