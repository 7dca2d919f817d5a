"""Whole copies of files elsewhere in the cache, for what cannot be read by range; each version is fetched once.

A copy is never changed: another version lies in another folder. So results may refer to it as to any file.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from clip_cid import log
from clip_cid.addresses import path_of, with_suffix
from clip_cid.remote import files
from clip_cid.remote.contract import AbsentError, RemoteFile
from clip_cid.run_folder import atomic_file

_AT_ONCE = 8 << 20  # bytes of one request
_MEGABYTE = 1 << 20


def of_file(file: RemoteFile, cache: Path) -> Path:
    """A copy of a file.

    Raises:
        DataError: It cannot be read.
        OSError: The cache cannot be written.
    """
    path = _folder([file.state], cache) / _last_part(file.name)
    if not _is_whole(path, file):
        with log.progress("fetch", file.bytes // _MEGABYTE, unit="MB") as bar:
            _fetch(file, path, bar.advance)
    return path


def of_address(address: str, cache: Path, *, beside: Sequence[str] = ()) -> Path:
    """A copy of a file, or of all files below a folder.

    Args:
        address: Of either.
        cache: Where the copy is made.
        beside: Suffixes of files that are copied, too, if they lie beside the file under its name.

    Raises:
        DataError: Nothing is there, or it cannot be read.
    """
    there = files.at(address)
    if isinstance(there, dict):
        return of_all(there, address.rstrip("/"), cache)

    name = _last_part(there.name)
    named = {name: there}
    for suffix in beside:
        with contextlib.suppress(AbsentError):
            other = files.ask(with_suffix(address, suffix))
            named[_last_part(other.name)] = other
    return of_all(named, "files", cache) / name


def of_all(named: Mapping[str, RemoteFile], name: str, cache: Path) -> Path:
    """A folder with copies of several files, by their names in it.

    Args:
        named: The files.
        name: That the folder gets, perhaps the last part of a path or an address; it may say what is in it.
        cache: Where it is made.

    Raises:
        DataError: One cannot be read.
        OSError: The cache cannot be written.
    """
    states = [[inside, *file.state] for inside, file in sorted(named.items())]
    folder = _folder(states, cache) / (_last_part(name) or "files")
    missing = {inside: file for inside, file in named.items() if not _is_whole(folder / inside, file)}
    if not missing:
        return folder

    with log.progress("fetch", sum(file.bytes for file in missing.values()) // _MEGABYTE, unit="MB") as bar:
        for inside, file in sorted(missing.items()):
            copy = _folder([file.state], cache) / _last_part(file.name)
            if not _is_whole(copy, file):
                _fetch(file, copy, bar.advance)
            _link(copy, folder / inside)
    return folder


def _fetch(file: RemoteFile, path: Path, advance: Callable[[int], None]) -> None:
    """Copy a file; it appears when it is whole."""

    def write(blocks: Iterator[bytes]) -> None:
        with open(temporary, "wb") as out:
            for block in blocks:
                out.write(block)
                advance(out.tell() // _MEGABYTE - (out.tell() - len(block)) // _MEGABYTE)

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        if file.by_range:
            starts = range(0, file.bytes, _AT_ONCE)
            write(files.read(file, start, min(start + _AT_ONCE, file.bytes)) for start in starts)
        else:
            log.info(f"{file.name}: the server does not read by range, so the whole file is fetched, once")
            files.stream(file, write)


def _link(copy: Path, path: Path) -> None:
    """The same file under another name; a copy where the file system knows no such thing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        try:
            temporary.unlink()
            os.link(copy, temporary)
        except OSError:
            shutil.copyfile(copy, temporary)


def _folder(states: list[list[object]], cache: Path) -> Path:
    return cache / "copies" / hashlib.sha256(repr(states).encode()).hexdigest()[:20]


def _last_part(name: str) -> str:
    last = PurePosixPath(path_of(name) if "://" in name else name).name.replace("\0", "")
    return "" if last in (".", "..") else last[-200:]


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes
