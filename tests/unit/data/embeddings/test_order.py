"""Embeddings without the keys of the pairs: their order says which belongs to which, where a recipe asks for it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.rows_of_pairs import join, rows_in_store
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.deciding_settings import deciding
from clip_cid.errors import ConfigError, DataError
from clip_cid.recipe import PairsConfig, Recipe, parse_recipe


def unit(rows: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def pairs_named(folder: Path, *names: str) -> Pairs:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"image")
    (folder / "t.csv").write_text("image,caption\n" + "".join(f"{name},x\n" for name in names))
    return open_pairs(PairsConfig(source=(str(folder / "t.csv"),)))


def write_parts(folder: Path, vectors: np.ndarray) -> Path:
    folder.mkdir()
    np.save(folder / "part_0.npy", vectors[:2])
    np.save(folder / "part_1.npy", vectors[2:])
    return folder


def test_rows_get_the_keys_of_the_pairs_in_their_order(tmp_path: Path) -> None:
    pairs = pairs_named(tmp_path / "pairs", "b.jpg", "d.jpg", "a.jpg", "c.jpg")
    source = write_parts(tmp_path / "in", unit(4))
    import_existing(source, tmp_path / "by key")
    with pytest.raises(DataError, match="4 of 4 pairs have no embedding here") as error:
        join(pairs.keys(0, 4), EmbeddingStore.open(tmp_path / "by key"))
    assert "embed.match: order" in error.value.fix

    import_existing(source, tmp_path / "out", order_of=pairs)
    store = EmbeddingStore.open(tmp_path / "out")
    assert list(store.keys) == ["b.jpg", "d.jpg", "a.jpg", "c.jpg"]
    assert np.array_equal(store.images[rows_in_store(pairs, store)], unit(4))


def test_keys_of_their_own_are_not_read_and_other_columns_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = pairs_named(tmp_path / "pairs", "b.jpg", "a.jpg")
    np.save(tmp_path / "mine.npy", unit(2))
    table = pa.table({"key": ["x", "x"], "caption": ["one", "two"], "url": ["u", "v"]})
    pq.write_table(table, tmp_path / "mine.parquet")
    import_existing(tmp_path / "mine.npy", tmp_path / "out", order_of=pairs)
    store = EmbeddingStore.open(tmp_path / "out")
    assert list(store.keys) == ["b.jpg", "a.jpg"]
    assert (store.captions(1), store.field("url")) == (("two",), ["u", "v"])
    assert "so its own keys (mine.parquet ...) are not read" in caplog.text


def test_a_table_of_vectors_needs_no_column_of_keys(tmp_path: Path) -> None:
    pairs = pairs_named(tmp_path / "pairs", "b.jpg", "a.jpg")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(unit(2).reshape(-1)), 6)
    pq.write_table(pa.table({"embedding": vectors, "score": [1, 2]}), tmp_path / "t.parquet")
    import_existing(tmp_path / "t.parquet", tmp_path / "out", order_of=pairs)
    store = EmbeddingStore.open(tmp_path / "out")
    assert (list(store.keys), store.field("score")) == (["b.jpg", "a.jpg"], ["1", "2"])


def test_a_pair_that_cannot_be_used_shifts_no_row(tmp_path: Path) -> None:
    pairs = pairs_named(tmp_path / "pairs", "b.jpg", "a.jpg", "b.jpg", "c.jpg")
    import_existing(write_parts(tmp_path / "in", unit(4)), tmp_path / "out", order_of=pairs)
    store = EmbeddingStore.open(tmp_path / "out")
    assert list(store.keys) == ["b.jpg", "a.jpg", "part_1/0", "c.jpg"]
    assert rows_in_store(pairs, store, max_absent_share=0.5).tolist() == [0, 1, -1, 3]


@pytest.mark.parametrize("rows", [3, 5])
def test_more_or_fewer_rows_than_pairs_are_refused(tmp_path: Path, rows: int) -> None:
    pairs = pairs_named(tmp_path / "pairs", "b.jpg", "a.jpg", "d.jpg", "c.jpg")
    with pytest.raises(DataError, match=f"{rows} embeddings, but 4 pairs"):
        import_existing(write_parts(tmp_path / "in", unit(rows)), tmp_path / "out", order_of=pairs)


def test_a_store_of_ours_keeps_its_keys(tmp_path: Path) -> None:
    pairs = pairs_named(tmp_path / "pairs", "b.jpg", "a.jpg", "d.jpg", "c.jpg")
    import_existing(write_parts(tmp_path / "in", unit(4)), tmp_path / "store")
    with pytest.raises(DataError, match="an embedding store of ours") as error:
        import_existing(tmp_path / "store", tmp_path / "out", order_of=pairs)
    assert error.value.fix == "Leave out embed.match: order."


def test_an_order_needs_embeddings_and_pairs_and_changes_nothing_while_it_is_off() -> None:
    for embed, pairs in (({"existing": "x"}, {}), ({}, {"source": ["p"]})):
        with pytest.raises(ConfigError, match=r"embed.match: order gives the rows of embed.existing to the pairs"):
            parse_recipe({"embed": {"match": "order", **embed}, "pairs": pairs}, where="here")
    assert "match" not in deciding(Recipe().model_dump(mode="json"))["embed"]
