"""Evaluation sets at addresses: copied into the cache once, each version of a file, then read like any other folder.

On an object store or the Hub a set may have any layout. A web server lists no folder, so there it is CLIP_benchmark's,
whose files have known names.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from clip_cid import log
from clip_cid.addresses import OBJECT_STORES, is_remote, scheme_of
from clip_cid.data.pairs.plain_tar import plain_files
from clip_cid.data.pairs.sources import fetch
from clip_cid.data.sets.readers import tars
from clip_cid.errors import DataError
from clip_cid.remote import copies, files
from clip_cid.remote.cache import cache_folder
from clip_cid.remote.contract import AbsentError, RemoteFile

SPLITS = ("train", "val", "test")


def is_url(where: str) -> bool:
    """Whether a set is named by an address and not by a folder."""
    return "://" in where


def files_of_set(where: str, splits: Sequence[str], cache_dir: Path | None) -> dict[str, RemoteFile]:
    """The files of a set at an address by their names in its folder, without the splits that are not wanted.

    Raises:
        DataError: A file that must be there is not, or the server does not answer.
    """
    if scheme_of(where) not in OBJECT_STORES:
        return _files_on_the_web(_base(where), splits, cache_folder(cache_dir))
    there = files.at(where)
    if isinstance(there, RemoteFile):
        raise DataError(f"{there.name}: is a file; a set is a folder.", fix="Name the folder that it lies in.")
    unwanted = {split for split in SPLITS if split not in splits}
    return {name: file for name, file in there.items() if name.partition("/")[0] not in unwanted}


def _base(where: str) -> str:
    """The page of a repository (`.../tree/main`) stands for the address of its files (`.../resolve/main`)."""
    return re.sub(r"/tree/([^/]+)/?$", r"/resolve/\1", where).rstrip("/")


def _files_on_the_web(base: str, splits: Sequence[str], cache: Path) -> dict[str, RemoteFile]:
    """The files of CLIP_benchmark's layout; a split or a list of prompts that is not there counts as absent."""
    named = {tars.CLASSES: files.ask(f"{base}/{tars.CLASSES}")}
    with contextlib.suppress(AbsentError):
        named[tars.TEMPLATES] = files.ask(f"{base}/{tars.TEMPLATES}")

    for split in splits:
        try:
            shards = files.ask(f"{base}/{split}/{tars.SHARDS}")
        except AbsentError:
            if split == "test":
                raise
            continue
        numbers = range(tars.shard_count(copies.of_file(shards, cache).parent))
        asked = files.ask_all([f"{base}/{split}/{number}.tar" for number in numbers])
        named |= {f"{split}/{tars.SHARDS}": shards} | {f"{split}/{number}.tar": asked[number] for number in numbers}
    return named


def fetch_set(url: str, splits: Sequence[str], cache_dir: Path | None) -> Path:
    """The folder in the cache that holds the set's files; it fetches only the missing ones.

    Of schemes that are read by webdataset alone, a split or a list of prompts that cannot be
    fetched counts as absent, with a warning; `test` and the class names must be there.

    Raises:
        DataError: A file that must be there cannot be fetched, or a tar is not whole.
    """
    base = _base(url)
    if is_remote(url):
        return copies.of_all(files_of_set(url, splits, cache_dir), base, cache_folder(cache_dir))
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
