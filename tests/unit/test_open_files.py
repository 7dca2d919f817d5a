"""How many files are kept open, and that files beyond the limit are read all the same."""

import errno
import io
import resource
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clip_cid import open_files
from clip_cid.data.embeddings import sharded_rows
from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.data.pairs import index, indexed_files
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.open_files import KeptOpen
from clip_cid.recipe import PairsConfig

_PICTURE = io.BytesIO()
Image.new("RGB", (16, 16), "teal").save(_PICTURE, "PNG")
PICTURE = _PICTURE.getvalue()


@pytest.fixture
def limit() -> Iterator[None]:
    """The limit of this process, put back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def set_limit(files: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_the_least_recently_used_is_opened_again() -> None:
    opened: list[str] = []

    def open_file(key: str) -> str:
        opened.append(key)
        return key

    kept = KeptOpen(open_file, most=2)
    assert [kept(key) for key in "abacab"] == list("abacab")
    assert opened == ["a", "b", "c", "b"]
    kept.clear()
    kept("b")
    assert opened[-1] == "b"


@pytest.mark.parametrize(("files", "kept"), [(20_000, 500), (1024, 416), (256, 32), (64, 4)])
def test_a_cache_of_files_takes_half_of_what_the_system_leaves(limit: None, files: int, kept: int) -> None:
    """Of 1,024 files 192 are left to libraries and pipes: (1,024 - 192) / 2 = 416."""
    set_limit(files)
    assert kept_of(KeptOpen[int, str], most=500) == kept


@pytest.mark.parametrize(("maps", "kept"), [(65_530, 500), (4096 + 8 * 30, 30), (4096, 4)])
def test_a_cache_of_maps_takes_an_eighth_of_those_that_libraries_leave(
    limit: None, monkeypatch: pytest.MonkeyPatch, maps: int, kept: int
) -> None:
    monkeypatch.setattr(open_files, "_most_maps", lambda: maps)
    set_limit(256)  # of files, which count for nothing here
    assert kept_of(KeptOpen[int, str], most=500, maps=True) == kept


def kept_of(kind: Any, **how: Any) -> int:
    """How many of 1,000 values are kept."""
    opened: list[int] = []

    def open_file(key: int) -> str:
        opened.append(key)
        return str(key)

    cache = kind(open_file, **how)
    for key in range(1000):
        cache(key)
    opened.clear()
    for key in range(999, -1, -1):
        cache(key)
    return 1000 - len(opened)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), OSError("Failed to open: Too many open files")])
def test_at_the_limit_all_caches_give_back_what_they_hold(error: OSError) -> None:
    first = KeptOpen(lambda key: key, most=8)
    first("held")

    def open_file(key: str) -> str:
        if first._kept:
            raise error
        return key

    assert KeptOpen(open_file, most=8)("new") == "new"


def test_another_error_is_raised_and_nothing_is_given_back() -> None:
    kept = KeptOpen(lambda key: key, most=8)
    kept("held")

    def fail(key: str) -> str:
        raise FileNotFoundError(errno.ENOENT, "gone", key)

    with pytest.raises(FileNotFoundError):
        KeptOpen(fail, most=8)("x")
    assert kept._kept


def test_a_store_of_more_shards_than_files_may_be_open_is_read(limit: None, tmp_path: Path) -> None:
    """Three kinds of rows at once, as in a training on several captions."""
    rows = np.arange(300 * 2 * 4, dtype=np.float16).reshape(-1, 4)
    for shard in range(300):
        np.save(tmp_path / f"{shard}.npy", rows[2 * shard : 2 * shard + 2])
    files = [tmp_path / f"{shard}.npy" for shard in range(300)]
    stores = [ShardedRows(files, [2] * 300, dim=4, dtype=rows.dtype) for _ in range(3)]
    open_now = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 200
    set_limit(open_now + 20)
    for _ in range(2):
        for store in stores:
            np.testing.assert_array_equal(store[np.arange(len(rows))], rows)


def test_a_row_of_many_shards_opens_no_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, each row of a store of more than 256 shards did, and cost thirty times as much."""
    rows = np.arange(4000 * 4, dtype=np.float16).reshape(-1, 4)
    files = [tmp_path / f"{shard}.npy" for shard in range(4000)]
    for file, row in zip(files, rows, strict=True):
        np.save(file, row[None])
    store = ShardedRows(files, [1] * 4000, dim=4, dtype=rows.dtype)

    opened: list[str] = []
    memory_map = pa.memory_map

    def counting(path: str) -> pa.MemoryMappedFile:
        opened.append(path)
        return memory_map(path)

    monkeypatch.setattr(pa, "memory_map", counting)
    random = np.random.default_rng(0)
    for _ in range(40):
        chosen = random.integers(0, 4000, 512)
        np.testing.assert_array_equal(store[chosen], rows[chosen])
    np.testing.assert_array_equal(store[:], rows)
    assert len(opened) == 4000
    if Path("/proc/self/fd").exists():  # a map needs no open file
        assert not any(path.resolve().is_relative_to(tmp_path) for path in Path("/proc/self/fd").iterdir())


def test_the_header_of_a_shard_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is mapped again, in a store beyond all limits, costs little."""
    monkeypatch.setattr(open_files, "_most_maps", lambda: 0)
    files = [tmp_path / f"{shard}.npy" for shard in range(9)]
    for shard, file in enumerate(files):
        np.save(file, np.full((1, 2), shard, np.float32))
    store = ShardedRows(files, [1] * 9, dim=2, dtype=np.dtype(np.float32))
    headers: list[object] = []
    read = np.lib.format.read_magic
    monkeypatch.setattr(np.lib.format, "read_magic", lambda file: (headers.append(file), read(file))[1])
    for _ in range(3):
        np.testing.assert_array_equal(store[:][:, 0], range(9))
    assert len(headers) == 9


def test_shards_of_every_order_and_version_of_the_format_are_read(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(6, 4)
    np.save(tmp_path / "0.npy", np.asfortranarray(rows))
    with open(tmp_path / "1.npy", "wb") as file:
        np.lib.format.write_array(file, rows.astype(">f4"), version=(2, 0))
    with open(tmp_path / "2.npy", "wb") as file:
        np.lib.format.write_array(file, rows.reshape(3, 2, 4))  # two for each image
        file.write(b"more")
    np.save(tmp_path / "3.npy", rows[:0])
    files = [tmp_path / f"{shard}.npy" for shard in range(4)]
    store = ShardedRows(files, [6, 6, 6, 0], dim=4, dtype=rows.dtype)
    np.testing.assert_array_equal(store[:], np.concatenate([rows] * 3))
    np.testing.assert_array_equal(store[np.array([17, 0, 7])], rows[[5, 0, 1]])


def test_pairs_of_many_tars_open_no_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(300):
        with tarfile.open(tmp_path / f"{shard:03d}.tar", "w") as tar:
            for suffix, data in ((".png", PICTURE), (".txt", b"a teal square")):
                member = tarfile.TarInfo(f"{shard:03d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pairs = open_pairs(PairsConfig(source=(str(tmp_path / "*.tar"),)), index=tmp_path / "index")

    def read_all() -> list[str]:
        return [pairs.read(row).key for row in range(len(pairs))]

    assert len(read_all()) == 300
    for module in (index, indexed_files):
        for cache in vars(module).values():
            if isinstance(cache, KeptOpen):
                monkeypatch.setattr(cache, "_open_file", lambda key: pytest.fail(f"{key} is opened again"))
    assert len(read_all()) == 300


def test_the_command_line_raises_the_limit_to_what_the_system_allows() -> None:
    code = (
        "import resource, sys\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "from clip_cid import cli\n"
        "cli.main(['status', 'no-such-run'])\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 1 << 20), hard)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_rows_in_order_are_those_of_the_shards_wherever_they_begin_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(sharded_rows, "_AT_ONCE", at_once)
    counts = [0, 2, 0, 3, 1, 0, 0, 4, 0]
    rows, files = np.arange(20, dtype=np.float16).reshape(10, 2), []
    for shard, part in enumerate(np.split(rows, np.cumsum(counts)[:-1])):
        files.append(tmp_path / f"{shard}.npy")
        np.save(files[-1], part)
    store = ShardedRows(files, counts, dim=2, dtype=rows.dtype)
    for start in range(11):
        for stop in range(11):
            np.testing.assert_array_equal(store[start:stop], rows[start:stop])
