"""A folder of arrays: those made on the disk and those saved are read back alike, and a full disk is an error, not a crash."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from clip_cid.data.balance.array_folder import ArrayFolder


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
