"""A folder of arrays: those made on the disk and those saved are read back alike, and a full disk is an error, not a crash."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from clip_cid.data.balance.array_folder import has_arrays, load_arrays, new_array, save_arrays


def test_arrays_made_on_the_disk_and_arrays_saved_are_read_back(tmp_path: Path) -> None:
    made = new_array(tmp_path / "new", "made", (3, 5), np.dtype(np.int8))
    assert not has_arrays(tmp_path / "new")
    made[:] = np.arange(15).reshape(3, 5)
    empty = new_array(tmp_path / "new", "empty", (0, 3), np.dtype(np.uint8))
    save_arrays(tmp_path / "new", {"made": made, "empty": empty, "saved": np.arange(4)}, {"word": "yes"})
    arrays, words = load_arrays(tmp_path / "new")
    assert words == {"word": "yes"}
    np.testing.assert_array_equal(arrays["made"], np.arange(15, dtype=np.int8).reshape(3, 5), strict=True)
    np.testing.assert_array_equal(arrays["saved"], np.arange(4), strict=True)
    assert arrays["empty"].shape == (0, 3)


def test_an_array_made_under_another_name_is_saved_under_its_new_one(tmp_path: Path) -> None:
    made = new_array(tmp_path, "one", (4,), np.dtype(np.float32))
    made[:] = 2
    save_arrays(tmp_path, {"other": made}, {})
    assert load_arrays(tmp_path)[0]["other"].tolist() == [2, 2, 2, 2]


def test_want_of_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, length: int) -> None:
        assert length > 800
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        new_array(tmp_path, "large", (100,), np.dtype(np.float64))


def test_a_file_system_that_cannot_reserve_room_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert new_array(tmp_path, "any", (2, 2), np.dtype(np.int16)).shape == (2, 2)
