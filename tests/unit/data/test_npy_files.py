"""A .npy that is not whole is refused in words, whatever is wrong with it."""

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from clip_cid.data.npy_files import new_npy, read_array_of_stage, read_npy
from clip_cid.errors import DataError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "balance" / "kept.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.arange(100))
    return path


def test_a_whole_array_is_read_as_it_was_written(written: Path):
    np.testing.assert_array_equal(read_npy(written), np.arange(100), strict=True)
    np.testing.assert_array_equal(read_npy(written, mmap_mode="r"), np.arange(100), strict=True)


@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_every_damaged_header_and_every_cut_is_a_value_error(written: Path, mmap_mode):
    whole = written.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(128):
        for value in (0, 255, ord("("), ord("'"), int(rng.integers(256))):
            damaged = bytearray(whole)
            damaged[place] = value
            written.write_bytes(damaged)
            with contextlib.suppress(ValueError):  # a few are still the header of some array
                read_npy(written, mmap_mode=mmap_mode)
    for cut in (0, 3, 6, 8, 10, 60, 128, 500):
        written.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"it is not a whole .npy|it is empty|does not begin like"):
            read_npy(written, mmap_mode=mmap_mode)


def test_neither_pickles_nor_archives_are_arrays(tmp_path: Path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", one=np.arange(3))
    for name in ("objects.npy", "archive.npz"):
        with pytest.raises(ValueError, match="it"):
            read_npy(tmp_path / name)


def test_an_array_of_a_stage_names_the_command_that_makes_it_again(written: Path):
    written.write_bytes(bytes(928))
    with pytest.raises(DataError, match=r"kept.npy: cannot be read \(it does not begin like a .npy\)") as error:
        read_array_of_stage(written)
    assert f"`clip-cid balance {written.parent.parent} --force`" in error.value.fix
    written.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_array_of_stage(written)


def test_a_new_array_has_room_for_all_of_it_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a write to the map would kill the process, which no error would explain."""
    path = tmp_path / "x.npy"
    new_npy(path, np.float32, (1000, 4))[:] = 1
    assert path.stat().st_blocks * 512 >= 16_000
    assert np.load(path).sum() == 4000

    def fail(_handle: int, _start: int, size: int) -> None:
        assert size == path.stat().st_size
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(OSError, match=os.strerror(code)) as error:
            new_npy(path, np.float64, (10,))
        assert error.value.filename == str(path)
    code = errno.EOPNOTSUPP  # a file system that cannot do it
    assert new_npy(path, np.float64, (10,)).shape == (10,)
