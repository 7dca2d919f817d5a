"""Which files of a folder are taken for what: names where they are clear, an error where they are not."""

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.layouts import find_embeddings
from clip_cid.data.embeddings.names import Name
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError

ROWS, DIM = 4, 6


def unit(seed: int, rows: int = ROWS) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def write(folder: Path, *names: str, rows: int = ROWS) -> Path:
    """Files whose content is known by their name: arrays by its hash as a seed, keys by the stem."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, unit(seed_of(name), rows))
        elif path.suffix == ".npz":
            np.savez(path, unit(seed_of(name), rows))
        else:
            keys = [f"{path.stem}-{row}" for row in range(rows)]
            pq.write_table(pa.table({"key": keys, "caption": ["c"] * rows}), path)
    return folder


def seed_of(name: str) -> int:
    return int.from_bytes(name.encode(), "big") % 2**32


def expected(names: list[str]) -> np.ndarray:
    return np.concatenate([unit(seed_of(name)) for name in names])


NUMBERS = range(3)
CLEAR = {
    "two files": (["image_embeddings.npy"], ["text_embeddings.npy"], []),
    "with metadata": (["image_embeddings.npy"], ["text_embeddings.npy"], ["metadata.parquet"]),
    "short words": (["img_emb.npy"], ["txt_emb.npy"], ["meta.parquet"]),
    "one word": (["images.npy"], ["captions.npy"], []),
    "camel case": (["clipImageFeatures.npy"], ["clipTextFeatures.npy"], []),
    "glued": (["imgembs.npy"], ["textembeds.npy"], []),
    "vision": (["vision_feats.npy"], ["language_feats.npy"], []),
    "splits": (["img_test.npy", "img_train.npy"], ["caption_test.npy", "caption_train.npy"], []),
    "numbered": (
        [f"image_{n}.npy" for n in NUMBERS],
        [f"text_{n:03d}.npy" for n in NUMBERS],
        [f"metadata_{n:02d}.parquet" for n in NUMBERS],
    ),
    "archives": (["image.npz"], ["text.npz"], []),
    "folders": (
        [f"images/{n}.npy" for n in NUMBERS],
        [f"texts/{n}.npy" for n in NUMBERS],
        [f"metadata/{n}.parquet" for n in NUMBERS],
    ),
    "folder of captions": (["vision_emb/a.npy", "vision_emb/b.npy"], ["captions/a.npy", "captions/b.npy"], []),
    "LAION's folders": (
        [f"img_emb/img_emb_{n:04d}.npy" for n in NUMBERS],
        [],
        [f"laion2B-en-metadata/metadata_{n:04d}.parquet" for n in NUMBERS],
    ),
    "LAION's files in one folder": (
        [f"img_emb_{n:04d}.npy" for n in NUMBERS],
        [f"text_emb_{n:04d}.npy" for n in NUMBERS],
        [f"metadata_{n:04d}.parquet" for n in NUMBERS],
    ),
    "embeddings": (
        [f"embeddings/pd12m.{n:02d}.npy" for n in NUMBERS],
        [],
        [f"metadata/pd12m.{n:02d}.parquet" for n in NUMBERS],
    ),
    "metadata beside images": (["images/0.npy", "images/1.npy"], [], ["images/0.parquet", "images/1.parquet"]),
    "a lone table": (["mine.npy"], [], ["metadata.parquet"]),
    "numbers": ([f"{n}.npy" for n in range(11)], [], []),
    "parts": ([f"part_{n:03d}.npy" for n in range(11)], [], []),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_each_array_is_taken_for_what_its_name_says(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    images, texts, tables = CLEAR[kind]
    write(tmp_path / "in", *images, *texts, *tables)
    import_existing(tmp_path / "in", tmp_path / "out")
    store = EmbeddingStore.open(tmp_path / "out")

    assert np.array_equal(store.images[:], expected(images))
    assert store.has_texts is bool(texts)
    if texts:
        assert np.array_equal(store.texts[:], expected(texts))
    stems = [Path(name).stem for name in tables or images]
    assert list(store.keys) == [f"{stem}{'-' if tables else '/'}{row}" for stem in stems for row in range(ROWS)]

    assert f"images: {images[0]}" in caplog.text
    assert not texts or f"texts: {texts[0]}" in caplog.text
    assert not tables or f"keys: {tables[0]}" in caplog.text


UNCLEAR = {
    "no role": (["a.npy", "b.npy"], "a.npy and b.npy have the same number of rows (4)"),
    "no role, three": (["clip.npy", "dino.npy", "mae.npy"], "have the same number of rows"),
    "no role, numbered": (["x_0.npy", "x_1.npy", "y_0.npy", "y_1.npy"], "x_0.npy and y_0.npy have the same number"),
    "no role, archives": (["a.npz", "b.npz"], "have the same number of rows"),
    "images of two models": (["clip_image.npy", "dino_image.npy"], "or the same images twice (another model, a copy)"),
    "images of two models, with texts": (
        ["b32_img.npy", "b32_txt.npy", "l14_img.npy", "l14_txt.npy"],
        "b32_img.npy and l14_img.npy have the same number of rows",
    ),
    "a copy": (["image_embeddings.npy", "image_embeddings_old.npy"], "have the same number of rows (4)"),
    "one of two": (["image_embeddings.npy", "other.npy"], "images: image_embeddings.npy; unclear: other.npy"),
    "texts and another": (["captions.npy", "x.npy"], "texts: captions.npy; unclear: x.npy"),
    "a stray among the two": (
        ["image_emb.npy", "text_emb.npy", "labels.npy"],
        "images: image_emb.npy; texts: text_emb.npy; unclear: labels.npy",
    ),
    "texts alone": (["text_embeddings.npy"], "named as embeddings of texts (text_embeddings.npy)"),
    "texts alone, numbered": (["txt_0.npy", "txt_1.npy"], "named as embeddings of texts (txt_0.npy, txt_1.npy)"),
    "both in one name": (["image_text_emb.npy"], "unclear: image_text_emb.npy"),
    "other models": (["clip_image.npy", "bert_text.npy"], "shard clip has no text_emb file"),
    "a missing shard": (["image_0.npy", "image_1.npy", "text_0.npy"], "shard 1 has no text_emb file"),
    "a shard too many": (["image_0.npy", "text_0.npy", "text_1.npy"], "shard 1 has no img_emb file"),
    "a shard twice": (["image_1.npy", "image_01.npy", "text_1.npy"], "both image_01.npy and image_1.npy are shard 1"),
    "a stray in the folder": (["img_emb/img_emb_0.npy", "img_emb/all.npy"], "others are not (img_emb/all.npy)"),
    "texts among images": (["images/0.npy", "images/text_1.npy"], "is named as text embeddings, but lies among"),
    "files and folders": (["0.npy", "images/0.npy"], "arrays lie both in it (0.npy) and in its folders (images/0.npy)"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_where_names_are_not_clear_nothing_is_taken(tmp_path: Path, kind: str) -> None:
    names, problem = UNCLEAR[kind]
    write(tmp_path / "in", *names)
    with pytest.raises(DataError, match=re.escape(problem)):
        import_existing(tmp_path / "in", tmp_path / "out")


def test_a_file_or_a_folder_of_texts_is_no_store_of_images(tmp_path: Path) -> None:
    write(tmp_path, "text_emb/0.npy", "captions.npy")
    for source in ("text_emb", "captions.npy"):
        with pytest.raises(DataError, match="named as embeddings of texts"):
            find_embeddings(tmp_path / source)
    write(tmp_path, "text experiments/0.npy")
    assert len(find_embeddings(tmp_path / "text experiments")) == 1


def test_other_names_with_other_rows_or_with_keys_of_their_own_are_shards(tmp_path: Path) -> None:
    write(write(tmp_path / "rows", "a.npy"), "b.npy", rows=ROWS + 1)
    assert [shard.name for shard in find_embeddings(tmp_path / "rows")] == ["a", "b"]
    write(tmp_path / "keys", "a.npy", "a.parquet", "b.npy", "b.parquet")
    assert [shard.name for shard in find_embeddings(tmp_path / "keys")] == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ({"image_embeddings": 0, "text_embeddings": 1}, (0, 1)),
        ({"img": 0, "txt": 1, "ids": 2}, (0, 1)),
        ({"b32_img": 0, "b32_txt": 1, "l14_img": 2, "l14_txt": 3}, (2, 3)),
        ({"vision_features": 0}, (0, None)),
        ({"arr_0": 0}, (0, None)),
    ],
)
def test_members_of_an_archive_are_taken_by_their_names(
    tmp_path: Path, names: dict[str, int], taken: tuple[int, int | None]
) -> None:
    arrays: dict[str, Any] = {name: unit(seed) for name, seed in names.items()}
    for stem in ("0a", "ff"):  # as DataComp's: names that are no numbers, with the same rows
        np.savez(tmp_path / f"{stem}.npz", **arrays)
        pq.write_table(
            pa.table({"uid": [f"{stem}{row}" for row in range(ROWS)], "text": ["c"] * ROWS}),
            tmp_path / f"{stem}.parquet",
        )
    import_existing(tmp_path, tmp_path / "out")
    store = EmbeddingStore.open(tmp_path / "out")
    assert np.array_equal(store.images[:], np.concatenate([unit(taken[0])] * 2))
    assert store.has_texts is (taken[1] is not None)
    if taken[1] is not None:
        assert np.array_equal(store.texts[:], np.concatenate([unit(taken[1])] * 2))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["image", "img", "text"], "2 arrays are named as images of the same model"),
        (["text_embeddings"], "no array named like l14_img"),
        (["x", "y"], "no array named like l14_img among x, y"),
    ],
)
def test_an_archive_whose_names_are_not_clear_is_refused(tmp_path: Path, names: list[str], problem: str) -> None:
    arrays: dict[str, Any] = {name: unit(seed) for seed, name in enumerate(names)}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=problem):
        find_embeddings(tmp_path / "x.npz")


def test_a_stray_file_beside_the_folders_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "img_emb/img_emb_0.npy", "stray.npy", "more/1.npy", "stats/0.parquet")
    (tmp_path / "readme.md").write_text("not data")
    assert [shard.name for shard in find_embeddings(tmp_path)] == ["img_emb_0"]
    assert "3 other files and folders are not read, such as 'stray.npy', 'more', 'stats'" in caplog.text


def test_images_given_without_the_metadata_beside_them_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "laion", "img_emb/img_emb_0.npy", "metadata/metadata_0.parquet")
    find_embeddings(tmp_path / "laion" / "img_emb")
    assert f"the keys in {tmp_path / 'laion' / 'metadata'} are not read" in caplog.text
    assert f"give {tmp_path / 'laion'} to take them" in caplog.text


def test_the_folder_to_give_is_named(tmp_path: Path) -> None:
    write(tmp_path, "run 1/img_emb/img_emb_0.npy")
    with pytest.raises(DataError) as error:
        find_embeddings(tmp_path)
    assert f"Did you mean {tmp_path / 'run 1'}?" in error.value.fix


def test_a_link_to_a_file_without_suffix_is_read_by_the_name_of_the_link(tmp_path: Path) -> None:
    """The cache of the Hub: links to blobs named by their digest."""
    blob = write(tmp_path / "blobs", "x.npy") / "x.npy"
    blob = blob.rename(blob.with_name("0a1b2c"))
    (tmp_path / "mine.npy").symlink_to(blob)
    import_existing(tmp_path / "mine.npy", tmp_path / "out")
    assert np.array_equal(EmbeddingStore.open(tmp_path / "out").images[:], np.load(blob))


def test_a_link_to_itself_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="neither an embedding store"):
        import_existing(tmp_path / "loop", tmp_path / "out")


@given(st.text(max_size=30))
def test_any_name_is_taken_apart(name: str) -> None:
    apart = Name.of(name)
    assert apart.role is None or apart.roles == {apart.role}
    assert Name.of(f"{name}_img").roles == apart.roles | {"image"}
    assert Name.of(f"{name}_img").rest == Name.of(f"{name}_embeddings").rest == apart.rest


@pytest.mark.parametrize("source", ["x.npy", "x.npz"])
def test_every_damaged_header_is_named(tmp_path: Path, source: str) -> None:
    """Each byte of the header replaced by characters that mean something to the parser, and each cut."""
    path = tmp_path / source
    np.save(path, unit(0)) if path.suffix == ".npy" else np.savez(path, l14_img=unit(0))
    whole = path.read_bytes()
    first = whole.index(b"\x93NUMPY")
    damaged = [
        whole[:at] + char + whole[at + 1 :] for at in range(first, first + 80) for char in (b"(", b"'", b"-", b"9")
    ]
    damaged += [whole[:length] for length in range(first, first + 140, 3)]

    for content in damaged:
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            (shard,) = find_embeddings(path)
            assert shard.image.rows * shard.image.dim == ROWS * DIM  # a byte of the padding, say


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.asfortranarray(unit(0)), "not stored one after the other"),
        (np.array([[object()] * DIM]), "not stored one after the other as plain numbers"),
        (unit(0).view(np.uint16), "uint16, not rows of float16"),
        (unit(0).astype(np.complex64), "complex64, not rows of"),
        (np.zeros(3, dtype=[("x", np.float32)]), "not rows of"),
        (unit(0)[0, 0], r"\(\) float16, not rows of"),
        (unit(0)[None], r"\(1, 4, 6\) float16, not rows of"),
    ],
)
def test_what_is_not_rows_of_numbers_is_refused(tmp_path: Path, array: Any, problem: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=problem):
        find_embeddings(tmp_path / "x.npy")
