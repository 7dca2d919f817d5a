import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from clip_cid.data.embeddings import store as store_module
from clip_cid.data.embeddings.files import read_captions
from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.rows_of_pairs import join
from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.errors import ConfigError, DataError

DIM = 6
TEACHER = {"reference": "local-dir:t", "weights_sha256": "ab", "precision": "fp32"}


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def shard(name: str, captions: list[tuple[str, ...]], *, bad: tuple[int, ...] = (), first: int = 0) -> ShardRows:
    """Rows with these captions; embeddings are random, and zeros for the bad rows."""
    count = len(captions)
    ok = np.array([row not in bad for row in range(count)], dtype=bool)
    images, texts = unit(count, first), unit(count, first + 1000)
    images[~ok] = texts[~ok] = 0
    further = sum(len(some) - 1 for some, good in zip(captions, ok, strict=True) if good)
    return ShardRows(
        name=name,
        images=images,
        texts=texts,
        more_texts=unit(further, first + 2000),
        ok=ok,
        keys=[f"k{first + row}" for row in range(count)],
        captions=captions,
        sizes=[(4, 5)] * count,
        fields={"dup": [f"g{row % 2}" for row in range(count)]},
        skipped=[{"row": first + row, "key": f"k{first + row}", "shard": name, "reason": "x"} for row in bad],
    )


def shards() -> list[ShardRows]:
    return [
        shard("a", [("a0",), ("b0", "b1", "b2"), ("c0", "c1"), ("d0",)], bad=(2,)),
        shard("b", [("e0",), ("f0",)], first=4),
        shard("c", [("g0", "g1"), ("h0", "h1", "h2")], first=6),
    ]


def writer(out: Path, **changed: Any) -> StoreWriter:
    options = {"teacher": TEACHER, "dim": DIM, "fields": ("dup",), "num_shards": 3} | changed
    return StoreWriter(out, **options)


def write_store(out: Path) -> EmbeddingStore:
    writing = writer(out)
    for rows in shards():
        writing.add(rows)
    writing.finish()
    return EmbeddingStore.open(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "embed").path


@pytest.fixture
def path(tmp_path: Path, finished: Path) -> Path:
    """A finished store to break."""
    shutil.copytree(finished, tmp_path / "embed")
    return tmp_path / "embed"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_without_a_class_have_the_number_minus_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EmbeddingStore.open(finished)
    shards = len(store.info.shards)
    assert shards > 1
    for columns, numbers, names in (
        ([["b", "", "a", "b"], *[["c", None]] * (shards - 1)], [1, -1, 0, 1] + [2, -1] * (shards - 1), ["a", "b", "c"]),
        ([["", None]] * shards, [-1, -1] * shards, []),
    ):
        stored = iter(columns)
        monkeypatch.setattr(
            "clip_cid.data.embeddings.store.read_texts", lambda path, name, stored=stored: pa.array(next(stored))
        )
        found, of = store.classes("thing")
        assert (found.tolist(), of) == (numbers, names)


def test_what_was_written_is_read_back(finished: Path) -> None:
    store = EmbeddingStore.open(finished)
    written = shards()
    assert (store.rows, store.dim) == (8, DIM)
    assert np.array_equal(store.images[:], np.concatenate([rows.images for rows in written]))
    assert np.array_equal(store.texts[:], np.concatenate([rows.texts for rows in written]))
    assert store.images.dtype == np.float16
    assert store.ok.tolist() == [True, True, False, True, True, True, True, True]
    assert list(store.keys) == [f"k{row}" for row in range(8)] == store.keys[:]
    assert store.keys[5] == store.keys[np.int64(5)] == "k5"
    assert store.captions(1) == ("b0", "b1", "b2")
    assert store.captions(7) == ("h0", "h1", "h2")
    assert store.field("dup") == ["g0", "g1", "g0", "g1", "g0", "g1", "g0", "g1"]
    numbers, names = store.classes("dup")
    assert (numbers.tolist(), names) == ([0, 1, 0, 1, 0, 1, 0, 1], ["g0", "g1"])
    assert store.info.teacher == TEACHER
    store.check_values()
    skipped = (finished / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in skipped] == [2]


def test_a_bad_row_is_all_zeros_and_shifts_nothing(finished: Path) -> None:
    store = EmbeddingStore.open(finished)
    assert not store.images[2:3].any()
    assert not store.texts[2:3].any()
    assert np.array_equal(store.images[3:4], shards()[0].images[3:4])


def test_text_for_gives_each_caption_its_own_embedding(finished: Path) -> None:
    """The bad row 2 has two captions and no embedding, so the further captions of later rows come right after row 1's."""
    store = EmbeddingStore.open(finished)
    a, b, c = shards()
    rows = np.array([7, 1, 0, 1, 6, 7, 1, 4, 7])
    chosen = np.array([2, 0, 0, 2, 1, 1, 1, 0, 0])
    expected = [c.more_texts[2], a.texts[1], a.texts[0], a.more_texts[1], c.more_texts[0], c.more_texts[1]]
    expected += [a.more_texts[0], b.texts[0], c.texts[1]]
    assert np.array_equal(store.text_for(rows, chosen), np.stack(expected))
    assert np.array_equal(store.text_for(np.arange(4, 8), 0), store.texts[4:8])
    assert store.num_captions.tolist() == [1, 3, 0, 1, 1, 1, 2, 3]


@pytest.mark.parametrize(("row", "caption", "has"), [(0, 1, 1), (1, 3, 3), (2, 0, 0), (1, -1, 3)])
def test_a_caption_without_embedding_is_refused(finished: Path, row: int, caption: int, has: int) -> None:
    store = EmbeddingStore.open(finished)
    with pytest.raises(DataError, match=rf"row {row} \('k{row}'\) has embeddings of {has} captions"):
        store.text_for(np.array([4, row]), np.array([0, caption]))


def sharded(folder: Path, counts: list[int]) -> tuple[ShardedRows, np.ndarray]:
    whole = np.arange(sum(counts) * 2, dtype=np.float16).reshape(-1, 2)
    starts = np.cumsum([0, *counts])
    paths: list[Path] = []
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        paths.append(folder / f"{'-'.join(map(str, counts))}_{number}.npy")
        np.save(paths[-1], whole[start:stop])
    return ShardedRows(paths, counts, dim=2, dtype=np.dtype(np.float16)), whole


@given(st.data())
def test_sharded_rows_index_as_one_array_and_so_do_views_of_views(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    rows, whole = sharded(tmp_path_factory.getbasetemp(), counts)
    for _ in range(data.draw(st.integers(1, 3))):
        assert rows.shape == whole.shape
        assert len(rows) == len(whole)
        bounds = st.none() | st.integers(-8, 30)
        index = slice(data.draw(bounds), data.draw(bounds), data.draw(st.none() | st.sampled_from([1, 2, -1, 3])))
        assert np.array_equal(rows[index], whole[index])
        at = st.lists(st.integers(0, len(whole) - 1), max_size=12) if len(whole) else st.just([])
        some = np.array(data.draw(at), dtype=data.draw(st.sampled_from([np.int64, np.int32, np.uint8])))
        assert np.array_equal(rows[some], whole[some])
        rows, whole = rows.select(some), whole[some]


def test_rows_survive_pickling_and_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_cid.open_files._most_maps", lambda: 0)  # the fewest are kept
    rows, whole = sharded(tmp_path, [1] * 10)
    assert np.array_equal(rows[:], whole)
    copy = pickle.loads(pickle.dumps(rows.select(np.arange(9, -1, -1))))
    assert np.array_equal(copy[:], whole[::-1])


def test_the_row_number_of_an_absent_row_is_no_row(tmp_path: Path) -> None:
    rows, _ = sharded(tmp_path, [2, 3])
    for wrong in (np.array([-1]), np.array([5])):
        with pytest.raises(IndexError, match=r"must be in \[0, 5\)"):
            rows[wrong]
        with pytest.raises(IndexError, match=r"must be in \[0, 5\)"):
            rows.select(wrong)


def test_a_read_array_belongs_to_the_reader(path: Path) -> None:
    before = files(path)
    store = EmbeddingStore.open(path)
    store.images[0:2][:] = 7
    store.texts[np.array([0])][:] = 7
    assert files(path) == before


def test_a_store_can_be_sent_to_a_worker(finished: Path) -> None:
    store = EmbeddingStore.open(finished)
    store.text_for(np.array([7]), np.array([2]))
    copy = pickle.loads(pickle.dumps(store))
    assert np.array_equal(copy.images[:], store.images[:])
    assert copy.keys[7] == "k7"


@pytest.mark.resume
@pytest.mark.parametrize("finished_shards", [0, 1, 2, 3])
def test_a_killed_writer_goes_on_and_leaves_the_same_bytes(
    tmp_path: Path, finished: Path, finished_shards: int
) -> None:
    first = writer(tmp_path / "out")
    for rows in shards()[:finished_shards]:
        first.add(rows)
    # The kill came while the next shard and its record were being written.
    (tmp_path / "out" / "img_emb").mkdir(exist_ok=True)
    (tmp_path / "out" / "img_emb" / ".img_emb_0009.npy.tmp-1").write_bytes(b"torn")
    (tmp_path / "out" / "img_emb" / "img_emb_0009.npy").write_bytes(b"torn")
    with (tmp_path / "out" / "store.part.jsonl").open("ab") as record:
        record.write(b'{"shard": {"na')
    with pytest.raises(DataError, match="unfinished"):
        EmbeddingStore.open(tmp_path / "out")
    second = writer(tmp_path / "out", teacher=TEACHER | {"reference": "the same weights elsewhere"})
    assert [done.name for done in second.shards] == ["a", "b", "c"][:finished_shards]
    second = writer(tmp_path / "out")
    for rows in shards()[finished_shards:]:
        second.add(rows)
    second.finish()
    assert files(tmp_path / "out") == files(finished)


def test_a_writer_of_a_finished_store_has_nothing_left_to_do(path: Path) -> None:
    before = files(path)
    again = writer(path)
    assert again.rows == 8
    assert [entry["row"] for entry in again.skipped] == [2]
    again.finish()
    assert files(path) == before


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"teacher": TEACHER | {"weights_sha256": "cd"}}, "weights_sha256"),
        ({"teacher": TEACHER | {"precision": "bf16"}}, "precision"),
        ({"dim": 7}, "dim"),
        ({"fields": ()}, "fields"),
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_stores_are_not_mixed(tmp_path: Path, changed: dict[str, Any], name: str, done: bool) -> None:
    first = writer(tmp_path)
    first.add(shards()[0])
    if done:
        first.finish()
    with pytest.raises(DataError, match=rf"another teacher or other fields \({name} differ"):
        writer(tmp_path, **changed)


def test_the_writer_refuses_embeddings_that_are_not_unit(tmp_path: Path) -> None:
    for broken in (np.nan, 0.0, 3.0):
        rows = shard("a", [("a",), ("b",)])
        rows.texts[1] = broken
        with pytest.raises(DataError, match=r"a \(text\): row 1 has length"):
            writer(tmp_path / str(broken)).add(rows)


def test_the_writer_refuses_rows_that_do_not_belong_together(tmp_path: Path) -> None:
    good = vars(shard("a", [("a",), ("b", "c")]))
    for name, value in (("keys", ["k"]), ("texts", unit(3, 0)), ("more_texts", unit(2, 0)), ("fields", {})):
        with pytest.raises((ValueError, TypeCheckError), match=name):
            writer(tmp_path).add(ShardRows(**{**good, name: value}))


def test_a_kept_field_may_not_hide_a_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs\.keep_fields: width"):
        writer(tmp_path, fields=("width",))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def replace(file: Path, array: np.ndarray) -> None:
    np.save(file, array)


@pytest.mark.parametrize(
    ("name", "broken", "problem"),
    [
        ("img_emb/img_emb_0001.npy", cut, "it is cut short"),
        ("img_emb/img_emb_0001.npy", Path.unlink, "missing"),
        ("more_text_emb/more_text_emb_0002.npy", cut, "it is cut short"),
        ("text_emb/text_emb_0001.npy", lambda file: replace(file, unit(3, 0)), "3 rows, but 2 were written"),
        ("text_emb/text_emb_0001.npy", lambda file: replace(file, unit(2, 0)[:, :5]), "store has width 6"),
        ("text_emb/text_emb_0001.npy", lambda file: replace(file, unit(2, 0).astype(float)), "float64"),
        ("text_emb/text_emb_0001.npy", lambda file: file.write_bytes(b"hello"), "not a .npy array"),
        ("text_emb/text_emb_0001.npy", lambda file: file.write_bytes(b""), "not a .npy array"),
        ("metadata/metadata_0000.parquet", cut, "not a whole Parquet file"),
        ("metadata/metadata_0000.parquet", Path.unlink, "missing"),
        ("store.json", cut, "not a manifest"),
        ("store.json", Path.unlink, "not an embedding store"),
        ("store.json", lambda file: file.write_text('{"format": "x", "version": 1, "finished": true}'), "format 'x'"),
    ],
)
def test_a_broken_file_is_named_when_the_store_is_opened(path: Path, name: str, broken: Any, problem: str) -> None:
    broken(path / name)
    with pytest.raises(DataError, match=problem) as error:
        EmbeddingStore.open(path)
    assert str(path) in error.value.problem
    assert name in error.value.problem or name == "store.json"


def test_a_pickle_inside_an_array_is_never_opened(path: Path) -> None:
    np.save(path / "img_emb" / "img_emb_0001.npy", np.array([object()] * 2), allow_pickle=True)
    with pytest.raises(DataError, match=r"img_emb_0001\.npy"):
        EmbeddingStore.open(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "row"),
    [("img_emb/img_emb_0001.npy", 1), ("text_emb/text_emb_0000.npy", 3), ("more_text_emb/more_text_emb_0002.npy", 2)],
)
def test_a_value_that_is_not_of_a_unit_vector_is_found(path: Path, name: str, row: int, value: float) -> None:
    array = np.load(path / name)
    array[row] = value
    np.save(path / name, array)
    with pytest.raises(DataError, match=rf"{name}: row {row} has length"):
        EmbeddingStore.open(path).check_values()


def rewrite_column(path: Path, name: str, values: list[Any]) -> None:
    table = pq.read_table(path)
    column = pa.array(values, table.schema.field(name).type)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), path)


def change_column(path: Path, name: str, values: list[Any]) -> None:
    """Change the metadata of the second shard and make the manifest believe it."""
    file = path / "metadata" / "metadata_0001.parquet"
    rewrite_column(file, name, values)
    manifest = json.loads((path / "store.json").read_text())
    manifest["shards"][1]["files"]["metadata"]["bytes"] = file.stat().st_size
    (path / "store.json").write_text(json.dumps(manifest))


def test_a_repeated_key_is_refused_unless_its_row_is_bad(path: Path) -> None:
    change_column(path, "key", ["k2", "k5"])  # row 2 is bad
    assert EmbeddingStore.open(path).keys[4] == "k2"
    change_column(path, "key", ["k1", "k5"])
    with pytest.raises(DataError, match="1 rows repeat the key of another, such as 'k1'"):
        _ = EmbeddingStore.open(path).keys


def test_keys_on_the_disk_are_those_in_memory(path: Path, tmp_path: Path) -> None:
    change_column(path, "key", ["ä long key", "k5"])
    in_memory, mapped = EmbeddingStore.open(path), EmbeddingStore.open(path)
    mapped.map_keys(tmp_path / "keys")
    assert mapped.keys.packed.equals(in_memory.keys.packed)
    assert list(mapped.keys) == list(in_memory.keys)
    assert "ä long key" in mapped.keys
    change_column(path, "key", ["k1", "k5"])
    with pytest.raises(DataError, match="1 rows repeat the key of another, such as 'k1'"):
        EmbeddingStore.open(path).map_keys(tmp_path / "keys")


def test_keys_of_some_rows_are_read_from_their_shards_alone(path: Path) -> None:
    store = EmbeddingStore.open(path)
    every = list(EmbeddingStore.open(path).keys)
    (path / "metadata" / "metadata_0001.parquet").unlink()
    assert store.keys_of([0, 3, 3, 6, 7]) == [every[row] for row in (0, 3, 3, 6, 7)]
    assert store.keys_of([]) == []


def test_captions_on_the_disk_are_those_of_each_row_and_each_shard_is_read_once(
    path: Path, clip_retrieval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_column(path, "captions", [["e0", None, "e2"], None])
    import_existing(clip_retrieval, tmp_path / "a caption or none")
    stores = [EmbeddingStore.open(path), EmbeddingStore.open(tmp_path / "a caption or none")]
    expected = [[[text for text in store.captions(row) if text] for row in range(store.rows)] for store in stores]

    reads: list[Path] = []
    monkeypatch.setattr(
        store_module, "read_captions", lambda file, name: reads.append(file) or read_captions(file, name)
    )
    for number, store in enumerate(stores):
        mapped = store.mapped_captions(tmp_path / str(number)).to_pylist()
        assert [[text for text in captions if text] for captions in mapped] == expected[number]
    assert len(reads) == len(set(reads)) == sum(len(store.info.shards) for store in stores)
    assert EmbeddingStore.open(path).mapped_captions(tmp_path / "2")[4].as_py() == ["e0", "", "e2"]


def test_a_column_that_is_not_there_is_named(finished: Path) -> None:
    with pytest.raises(DataError, match="no column 'group'; there are key, caption") as error:
        EmbeddingStore.open(finished).field("group")
    assert "pairs.keep_fields" in error.value.fix


def test_a_path_may_be_a_text(finished: Path) -> None:
    store = EmbeddingStore.open(str(finished))
    assert store.path == finished
    assert np.array_equal(store.images[:], EmbeddingStore.open(finished).images[:])


@pytest.mark.parametrize(("rows", "firsts"), [(1, [0, 4, 6]), (5, [0, 6]), (8, [0]), (100, [0])])
def test_keys_come_in_blocks_of_whole_shards(finished: Path, rows: int, firsts: list[int]) -> None:
    store = EmbeddingStore.open(finished)
    blocks = list(store.key_blocks(rows))
    assert [first for first, _ in blocks] == firsts
    assert [key for _, keys in blocks for key in keys.to_pylist()] == list(store.keys)
    assert store.first_keys(rows).to_pylist() == list(store.keys)[:rows]


def test_join_finds_each_pair_by_its_key(finished: Path) -> None:
    store = EmbeddingStore.open(finished)
    assert join(list(store.keys), store).tolist() == list(range(8))
    assert join(["k7", "k0", "k2"], store).tolist() == [7, 0, 2]
    assert join(["k7", "new", "k0", "k7"], store, max_absent_share=0.5).tolist() == [7, -1, 0, -1]


def test_join_prefers_the_good_row_of_a_repeated_key(path: Path) -> None:
    change_column(path, "key", ["k2", "k5"])
    assert join(["k2", "k5"], EmbeddingStore.open(path)).tolist() == [4, 5]


def test_pairs_of_another_origin_are_refused(finished: Path) -> None:
    store = EmbeddingStore.open(finished)
    with pytest.raises(DataError, match="2 of 3 pairs have no embedding here, such as 'x'; the store's keys look") as e:
        join(["k0", "x", "y"], store, max_absent_share=0.6)
    assert "keys must be equal" in e.value.fix


def test_a_store_of_ours_is_taken_over_without_a_copy(tmp_path: Path, path: Path) -> None:
    import_existing(path, tmp_path / "run" / "embed")
    assert sorted(files(tmp_path / "run" / "embed")) == ["skipped.jsonl", "store.json"]
    store, source = EmbeddingStore.open(tmp_path / "run" / "embed"), EmbeddingStore.open(path)
    assert np.array_equal(store.images[:], source.images[:])
    assert store.info.teacher == TEACHER
    assert np.array_equal(store.text_for(np.array([7]), 2), source.text_for(np.array([7]), 2))
    import_existing(tmp_path / "run" / "embed", tmp_path / "again")
    assert EmbeddingStore.open(tmp_path / "again").keys[7] == "k7"
    shutil.rmtree(path / "text_emb")
    with pytest.raises(DataError, match=r"text_emb_0000\.npy: missing"):
        EmbeddingStore.open(tmp_path / "again")


def test_an_unfinished_store_is_not_taken_over(tmp_path: Path) -> None:
    writer(tmp_path / "part").add(shards()[0])
    with pytest.raises(DataError, match="unfinished"):
        import_existing(tmp_path / "part", tmp_path / "out")


@pytest.fixture
def clip_retrieval(tmp_path: Path) -> Path:
    """Eleven shards, numbered as clip-retrieval numbers them: by the width of the last one."""
    folder = tmp_path / "laion"
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number in range(11):
        np.save(folder / "img_emb" / f"img_emb_{number:02d}.npy", unit(3, number))
        np.save(folder / "text_emb" / f"text_emb_{number:02d}.npy", unit(3, number + 50))
        keys = [f"{number:05d}{row:04d}" for row in range(3)]
        columns = {"image_path": [f"/x/{key}.jpg" for key in keys], "caption": ["a", "b", None], "key": keys}
        pq.write_table(pa.table(columns | {"url": keys}), folder / "metadata" / f"metadata_{number:02d}.parquet")
    return folder


def test_a_clip_retrieval_folder_is_taken_over(tmp_path: Path, clip_retrieval: Path) -> None:
    import_existing(clip_retrieval, tmp_path / "out")
    store = EmbeddingStore.open(tmp_path / "out")
    assert store.images.shape == (33, DIM)
    assert np.array_equal(store.images[30:], unit(3, 10))
    assert np.array_equal(store.text_for(np.array([4]), 0), unit(3, 51)[1:2])
    assert store.keys[31] == "000100001"
    assert store.captions(31) == ("b",)
    assert store.captions(32) == ("",)
    assert store.field("url")[32] == "000100002"
    assert store.ok.all()


def test_a_clip_retrieval_folder_without_keys_is_joined_by_path(tmp_path: Path, clip_retrieval: Path) -> None:
    for file in sorted((clip_retrieval / "metadata").iterdir()):
        pq.write_table(pq.read_table(file).drop_columns(["key"]), file)
    import_existing(clip_retrieval, tmp_path / "out")
    assert EmbeddingStore.open(tmp_path / "out").keys[1] == "/x/000000001.jpg"


@pytest.mark.parametrize(
    ("name", "broken", "problem"),
    [
        ("img_emb/img_emb_03.npy", cut, "it is cut short"),
        ("text_emb/text_emb_03.npy", Path.unlink, r"shard 3 has no text_emb"),
        ("img_emb/img_emb_03.npy", Path.unlink, r"no img_emb file"),
        ("metadata/metadata_03.parquet", Path.unlink, r"shard 3 has no metadata"),
        ("text_emb/text_emb_03.npy", lambda file: replace(file, unit(4, 0)), "4 rows, but 3"),
        ("text_emb/text_emb_03.npy", lambda file: replace(file, unit(3, 0)[:, :4]), "store has width 6"),
        ("text_emb/text_emb_03.npy", lambda file: replace(file, unit(3, 0) * 2), "row 0 has length 2"),
        ("img_emb/img_emb_03.npy", lambda file: replace(file, np.full((3, DIM), np.nan, np.float16)), "length nan"),
        ("metadata/metadata_03.parquet", lambda file: rewrite_column(file, "key", ["000000000", "b", "c"]), "repeat"),
        ("metadata/metadata_03.parquet", lambda file: rewrite_column(file, "key", [None, "b", "c"]), "have no key"),
        (
            "metadata/metadata_00.parquet",
            lambda file: pq.write_table(pa.table({"x": [1, 2, 3]}), file),
            "no column key",
        ),
        ("img_emb/img_emb_3.npy", lambda file: replace(file, unit(3, 0)), "are shard 3"),
    ],
)
def test_a_broken_clip_retrieval_folder_is_refused(
    tmp_path: Path, clip_retrieval: Path, name: str, broken: Any, problem: str
) -> None:
    broken(clip_retrieval / name)
    with pytest.raises(DataError, match=problem):
        import_existing(clip_retrieval, tmp_path / "out")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither an embedding store nor a clip-retrieval folder") as error:
        import_existing(tmp_path, tmp_path / "out")
    assert "img_emb/img_emb_*.npy" in error.value.fix
