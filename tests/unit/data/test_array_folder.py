"""A folder of arrays: those made on the disk and those saved are read back alike, and a full disk is an error, not a crash."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from clip_cid.data import array_folder
from clip_cid.data.array_folder import ArrayFolder
from clip_cid.errors import DataError


def test_arrays_made_on_the_disk_and_arrays_saved_are_read_back(tmp_path: Path) -> None:
    store = ArrayFolder(tmp_path / "new")
    made = store.new("made", (3, 5), np.dtype(np.int8))
    store.new("scratch", (3, 5), np.dtype(np.int8))
    assert store.load_all() is None
    made[:] = np.arange(15).reshape(3, 5)
    empty = store.new("empty", (0, 3), np.dtype(np.uint8))
    store.save_all({"made": made, "empty": empty, "saved": np.arange(4)}, {"word": "yes"})
    arrays, facts = pickle.loads(pickle.dumps(store)).load_all()
    assert facts == {"word": "yes"}
    assert not store.has("scratch")
    np.testing.assert_array_equal(arrays["made"], np.arange(15, dtype=np.int8).reshape(3, 5), strict=True)
    np.testing.assert_array_equal(arrays["saved"], np.arange(4), strict=True)
    assert arrays["empty"].shape == (0, 3)


def test_an_array_made_under_another_name_is_saved_under_its_new_one(tmp_path: Path) -> None:
    store = ArrayFolder(tmp_path)
    made = store.new("one", (4,), np.dtype(np.float32))
    made[:] = 2
    store.save_all({"other": made}, {})
    saved = store.load_all()
    assert saved is not None
    assert saved[0]["other"].tolist() == [2, 2, 2, 2]


def test_a_cleared_folder_has_nothing(tmp_path: Path) -> None:
    store = ArrayFolder(tmp_path / "work")
    store.save_all({"one": np.arange(3)}, {})
    store.save("more", np.arange(5))
    assert (store.has("more"), store.load("more").tolist()) == (True, [0, 1, 2, 3, 4])
    store.clear()
    assert store.load_all() is None
    assert not store.has("more")
    store.clear()


def test_want_of_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, length: int) -> None:
        assert length > 800
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        ArrayFolder(tmp_path).new("large", (100,), np.dtype(np.float64))


def test_a_file_system_that_cannot_reserve_room_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert ArrayFolder(tmp_path).new("any", (2, 2), np.dtype(np.int16)).shape == (2, 2)


def test_what_is_not_as_it_was_written_is_not_there(tmp_path: Path) -> None:
    store = ArrayFolder(tmp_path)
    made = store.new("made", (3, 50), np.dtype(np.int8))
    made[:] = 7
    store.save_all({"made": made, "saved": np.arange(40.0)}, {"limit": 0.25})
    store.save("task", np.arange(30, dtype=np.uint64).reshape(3, 10))
    assert store.is_whole()
    assert store.has("task")

    for name, is_there in (("made", store.is_whole), ("saved", store.is_whole), ("task", lambda: store.has("task"))):
        path = tmp_path / f"{name}.npy"
        whole = path.read_bytes()
        for place in (7, 9, 60, 128, len(whole) - 40, len(whole) - 1):  # magic, header, numbers, digest
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert not is_there(), (name, place)
        for cut in (0, 5, 100, len(whole) - 33, len(whole) - 1):
            path.write_bytes(whole[:cut])
            assert not is_there(), (name, cut)
        path.write_bytes(whole)
        assert is_there()
    (tmp_path / "task.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"task.npy: changed since it was written"):
        store.load("task")


@pytest.mark.parametrize("facts", ["", "[]", "3", "{}", '{"arrays": ["one"], "limit": 0.25}', '{"arrays": 3}', "\0\0"])
def test_damaged_facts_are_none(tmp_path: Path, facts: str) -> None:
    store = ArrayFolder(tmp_path)
    store.save_all({"one": np.arange(3)}, {"limit": 0.5})
    written = (tmp_path / "arrays.json").read_text()
    (tmp_path / "arrays.json").write_text(facts)
    assert store.load_all() is None
    (tmp_path / "arrays.json").write_text(written.replace("0.5", "0.6"))
    assert store.load_all() is None
    (tmp_path / "arrays.json").write_text(written)
    assert store.load_all() is not None


def test_what_other_facts_left_is_gone_before_the_new_facts_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two must not leave tasks of another limit beside facts that they seem to belong to."""
    store = ArrayFolder(tmp_path)
    store.save("links-00000-00001", np.arange(3))

    def killed(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(array_folder, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save_all({"one": np.arange(3)}, {})
    assert not store.has("links-00000-00001")
