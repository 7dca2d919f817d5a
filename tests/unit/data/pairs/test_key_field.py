"""Keys in a json field, for tars and folders whose names are not those of the embeddings."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

Described = dict[str, bytes | None]
UIDS: Described = {"000": b'{"uid": "x1", "caption": "a"}', "001": b'{"uid": "x0"}', "002": b'{"uid": 17}'}


def write_tar(path: Path, described: Described) -> Path:
    path = path.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for stem, content in described.items():
            for extension, data in (("jpg", f"image {stem}".encode()), ("txt", b"caption"), ("json", content)):
                if data is not None:
                    member = tarfile.TarInfo(f"{stem}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def write_folder(path: Path, described: Described) -> Path:
    path.mkdir(exist_ok=True)
    for stem, content in described.items():
        (path / f"{stem}.jpg").write_bytes(f"image {stem}".encode())
        (path / f"{stem}.txt").write_bytes(b"caption")
        if content is not None:
            (path / f"{stem}.json").write_bytes(content)
    return path


WRITERS = {"tar": write_tar, "folder": write_folder}


def opened(source: Path, index: Path | None = None, **settings: Any) -> Pairs:
    named: dict[str, Any] = {"key_field": "uid", **settings}
    return open_pairs(PairsConfig(source=(str(source),), **named), index=index)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("with_index", [True, False])
def test_the_field_is_the_key_and_rows_keep_their_order(tmp_path: Path, kind: str, with_index: bool) -> None:
    source = WRITERS[kind](tmp_path / "pairs", UIDS)
    index = tmp_path / "index" if with_index else None
    assert opened(source, index, key_field=None).keys(0, 3) == ["000", "001", "002"]
    pairs = opened(source, index)
    assert pairs.keys(0, 3) == ["x1", "x0", "17"]
    assert [pairs.read(row).image for row in range(3)] == [b"image 000", b"image 001", b"image 002"]
    assert opened(source, index, key_prefix="shard").keys(0, 1) == ["pairs/x1"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_key_that_is_not_there_is_a_bad_sample_of_its_own_row(tmp_path: Path, kind: str) -> None:
    described: Described = {
        "a": b'{"uid": "good"}',
        "b": None,
        "c": b'{"other": 1}',
        "d": b'{"uid": null}',
        "e": b'{"uid": ["x"]}',
        "f": b'{"uid": true}',
        "g": b"{",
        "h": b"[1]",
        "i": b'{"uid": "good"}',
        "j": b'{"uid": "\\ud800"}',
    }
    known_bad = opened(WRITERS[kind](tmp_path / "pairs", described)).known_bad
    reasons = [known_bad.get(row, "") for row in range(len(described))]
    absent = "no key (json field 'uid')"
    assert reasons[:4] == ["", absent, absent, absent]
    assert reasons[4] == "no key: json field 'uid' holds a list, not text or a whole number"
    assert reasons[5] == "no key: json field 'uid' holds a bool, not text or a whole number"
    assert reasons[6].startswith("no key: json cannot be read")
    assert reasons[7] == "no key: json holds a list, not an object"
    assert reasons[8:] == ["duplicate key, first used by row 0", "the key is not UTF-8"]


def test_a_changed_json_of_a_folder_changes_the_keys_and_the_state(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pairs", UIDS)
    before = opened(folder, tmp_path / "index")
    state = before.shard_state(0)
    (folder / "001.json").write_text(json.dumps({"uid": "other"}))
    after = opened(folder, tmp_path / "index")
    assert after.keys(0, 3) == ["x1", "other", "17"]
    assert after.shard_state(0) != state


def test_samples_are_not_copied_under_names_that_are_not_their_keys(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "pairs", UIDS)
    assert opened(source, key_field=None).has_members
    assert not opened(source).has_members


def test_a_table_has_no_json_fields(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x\n")
    with pytest.raises(DataError, match=r"pairs.key_field: 'uid', but .*t.csv is a table") as error:
        opened(tmp_path / "t.csv")
    assert "pairs.key_column" in error.value.fix


def test_the_state_of_pairs_without_the_field_is_as_before_there_was_one() -> None:
    """Digests that a run remembers stay valid."""
    assert "key_field" not in PairsConfig(source=("x",)).reading
    assert PairsConfig(source=("x",), key_field="uid").reading["key_field"] == "uid"
