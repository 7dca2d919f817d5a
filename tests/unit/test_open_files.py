"""How many files are kept open, and that files beyond the limit are read all the same."""

import errno
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clip_cid.data.embeddings.sharded_rows import ShardedRows
from clip_cid.open_files import KeptOpen


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


@pytest.mark.parametrize(("files", "kept"), [(20_000, 128), (1024, 104), (256, 8), (64, 4)])
def test_a_cache_takes_an_eighth_of_what_the_system_leaves(limit: None, files: int, kept: int) -> None:
    """Of 1,024 files 192 are left to libraries and pipes: (1,024 - 192) / 8 = 104."""
    set_limit(files)
    opened: list[int] = []

    def open_file(key: int) -> str:
        opened.append(key)
        return str(key)

    cache = KeptOpen(open_file, most=128)
    for key in range(200):
        cache(key)
    opened.clear()
    for key in range(199, -1, -1):
        cache(key)
    assert 200 - len(opened) == kept


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
