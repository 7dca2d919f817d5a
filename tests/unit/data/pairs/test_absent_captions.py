"""Images without a caption: broken pairs by default, images alone where captions are optional."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clip_cid.data.pairs.contents import digest_of_pair
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

Texts = dict[str, bytes | None]
TEXTS: Texts = {"a": b"one\n", "b": None, "c": b" \n\n", "d": b"four\nfour again\n", "e": b"no\0text"}
READ = {"a": ("one",), "b": (), "c": (), "d": ("four", "four again")}


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(path: Path, texts: Texts) -> str:
    path.mkdir()
    for key, text in texts.items():
        (path / f"{key}.png").write_bytes(picture())
        if text is not None:
            (path / f"{key}.txt").write_bytes(text)
    return str(path)


def write_tar(path: Path, texts: Texts) -> str:
    path = path.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for key, text in texts.items():
            for extension, content in (("png", picture()), ("txt", text)):
                if content is not None:
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(path)


def write_table(path: Path, texts: Texts) -> str:
    folder = path.parent
    (folder / "x.png").write_bytes(picture())
    import pyarrow as pa
    import pyarrow.parquet as pq

    captions = [None if text is None else text.decode().splitlines() for text in texts.values()]
    table = {"image": ["x.png"] * len(texts), "caption": captions, "key": list(texts)}
    pq.write_table(
        pa.table(
            table, schema=pa.schema([("image", pa.string()), ("caption", pa.list_(pa.string())), ("key", pa.string())])
        ),
        path.with_suffix(".parquet"),
    )
    return str(path.with_suffix(".parquet"))


WRITERS = {"folder": write_folder, "tar": write_tar, "table": write_table}


def opened(source: str, *, optional: bool, index: Path | None = None) -> Pairs:
    key = "key" if source.endswith(".parquet") else None
    captions = "optional" if optional else "required"
    return open_pairs(PairsConfig(source=(source,), key_column=key, captions=captions), index=index)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_image_without_a_caption_is_a_pair_where_captions_are_optional(tmp_path: Path, kind: str):
    source, index = WRITERS[kind](tmp_path / "pairs", TEXTS), tmp_path / "index"
    for optional in (False, True):  # made here, and below taken from the folder of the index
        opened(source, optional=optional, index=index)
    for strict in (opened(source, optional=False), opened(source, optional=False, index=index)):
        assert list(strict.known_bad) == [1]
        assert strict.known_bad[1].startswith("no caption")
    strict, free = opened(source, optional=False, index=index), opened(source, optional=True, index=index)
    assert free.known_bad == opened(source, optional=True).known_bad == {}
    assert free.captions_are_optional
    assert not strict.captions_are_optional
    assert {free.key(row): free.read(row).captions for row in range(4)} == READ
    assert free.read(1).image == picture()

    # What is no text is refused in both, and so is what is empty where captions are required.
    for pairs in (strict, free):
        with pytest.raises(BadSample, match="zero bytes"):
            pairs.read(4)
    with pytest.raises(BadSample, match="the caption is empty"):
        strict.read(2)


@pytest.mark.parametrize("kind", ["tar", "table"])
def test_a_duplicate_key_is_one_also_without_a_caption(tmp_path: Path, kind: str):
    texts: Texts = {"a": None, "b": b"two"}
    sources = tuple(WRITERS[kind](tmp_path / name, texts) for name in ("x", "y"))
    settings = PairsConfig(source=sources, key_column="key" if kind == "table" else None, captions="optional")
    assert {row: reason[:13] for row, reason in open_pairs(settings).known_bad.items()} == {
        2: "duplicate key",
        3: "duplicate key",
    }


def test_a_json_without_captions_is_none(tmp_path: Path):
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for key, described in (("a", {"captions": ["  "]}), ("b", {"other": 1}), ("c", {"captions": ["yes"]})):
            for extension, content in (("png", picture()), ("json", json.dumps(described).encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    free = opened(str(tmp_path / "pairs.tar"), optional=True)
    assert [free.read(row).captions for row in range(3)] == [(), (), ("yes",)]
    strict = opened(str(tmp_path / "pairs.tar"), optional=False)
    for row in (0, 1):
        with pytest.raises(BadSample, match="caption"):
            strict.read(row)


def test_images_alone_are_pairs(tmp_path: Path):
    source = write_folder(tmp_path / "pairs", dict.fromkeys("abc"))
    with pytest.raises(DataError, match="none of the 3 samples can be used") as error:
        opened(source, optional=False)
    assert "set pairs.captions: optional if images alone are enough" in error.value.fix
    assert len(opened(source, optional=True)) == 3


def test_the_state_of_pairs_is_as_before_there_was_the_choice_and_another_with_it(tmp_path: Path):
    """Digests that a run remembers stay valid."""
    source = write_folder(tmp_path / "pairs", {"a": b"one"})
    strict, free = (PairsConfig(source=(source,), captions=value) for value in ("required", "optional"))
    assert "captions" not in strict.reading
    assert "captions_field" in strict.reading
    assert open_pairs(strict).shard_state(0) != open_pairs(free).shard_state(0)


def test_an_image_alone_is_not_the_image_that_cannot_be_read(tmp_path: Path):
    pairs = opened(write_folder(tmp_path / "pairs", {"a": None, "b": b"two"}), optional=True)
    assert digest_of_pair("a", pairs.read(0)) != digest_of_pair("a", None)
