"""Sets in CLIP_benchmark's layout behind a URL: downloaded into the cache once, then read like any other folder."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from clip_cid import log
from clip_cid.data.pairs.plain_tar import plain_files
from clip_cid.data.pairs.sources import cache_folder, fetch
from clip_cid.data.sets.readers import tars
from clip_cid.errors import DataError


def is_url(where: str) -> bool:
    """Whether a set is named by a URL and not by a folder."""
    return "://" in where


def fetch_set(url: str, splits: Sequence[str], cache_dir: Path | None) -> Path:
    """The folder in the cache that holds the set's files; it fetches only the missing ones.

    The page of a repository (`.../tree/main`) stands for the address of its files
    (`.../resolve/main`). A split or a list of prompts that cannot be fetched counts as absent, with
    a warning; `test` and the class names must be there.

    Raises:
        DataError: A file that must be there cannot be fetched, or a tar is not whole.
    """
    base = re.sub(r"/tree/([^/]+)/?$", r"/resolve/\1", url).rstrip("/")
    folder = cache_folder(cache_dir) / "sets" / hashlib.sha256(base.encode()).hexdigest()[:20]
    _fetch(base, folder, tars.CLASSES, lambda _: None)
    _fetch_if_there(base, folder, tars.TEMPLATES)

    for split in splits:
        if split == "test":
            _fetch(base, folder, f"test/{tars.SHARDS}", lambda _: None)
        elif not _fetch_if_there(base, folder, f"{split}/{tars.SHARDS}"):
            continue

        for number in range(tars.shard_count(folder / split)):
            file = f"{split}/{number}.tar"
            _fetch(base, folder, file, lambda path, file=file: list(plain_files(path, f"{base}/{file}")))
    return folder


def _fetch_if_there(base: str, folder: Path, file: str) -> bool:
    try:
        _fetch(base, folder, file, lambda _: None)
    except DataError as error:
        log.warn(f"{error.problem} Taken for absent.")
        with contextlib.suppress(OSError):  # an empty folder would look like a split whose tars were lost
            (folder / file).parent.rmdir()
        return False
    return True


def _fetch(base: str, folder: Path, file: str, check: Callable[[Path], object]) -> None:
    path = folder / file
    if not path.exists():
        fetch(f"{base}/{file}", path, check)
