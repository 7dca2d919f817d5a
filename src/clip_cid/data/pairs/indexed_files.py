"""Byte ranges of indexed files, on this machine or elsewhere, which must be as they were when they were indexed."""

import os
from pathlib import Path
from typing import BinaryIO, cast

from clip_cid.data.pairs.format import SourceFile
from clip_cid.errors import DataError
from clip_cid.open_files import Descriptor, KeptOpen
from clip_cid.remote import kept
from clip_cid.remote.contract import RemoteFile


def bytes_at(source: SourceFile, at: int, size: int) -> bytes:
    """A byte range of a source, whose file stays open to be read again.

    Raises:
        DataError: The file changed or went away since it was indexed, or may not be read.
    """
    if source.remote is not None and source.cache is not None:
        data = _kept((source.remote, source.cache)).read(at, size)
        if len(data) != size:
            raise changed(source.name)
        return data

    file = _open(source)  # held until it is read: threads that open others close it, and its number gets another file
    data = os.pread(file.number, size, at)
    if len(data) != size:
        raise changed(source.name)
    return data


def opened(source: SourceFile, *, in_order: bool = True) -> BinaryIO:
    """A source, open for reading.

    Args:
        source: The source.
        in_order: Whether it is read from its start to its end; then many bytes are fetched at once.

    Raises:
        OSError: A file on this machine cannot be opened.
    """
    if source.remote is not None and source.cache is not None:
        return cast(BinaryIO, kept.opened(source.remote, source.cache, in_order=in_order))
    return open(source.path, "rb")


def _open_file(source: SourceFile) -> Descriptor:
    try:
        opened = Descriptor(os.open(source.path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise changed(source.name) from error
    except PermissionError as error:
        raise DataError(f"{source.name}: cannot be opened ({error.strerror}).", fix="Check its permissions.") from error

    status = os.fstat(opened.number)
    if (status.st_size, status.st_mtime_ns) != (source.bytes, source.mtime_ns):
        raise changed(source.name)
    return opened


def _kept_file(key: tuple[RemoteFile, Path]) -> kept.KeptFile:
    return kept.KeptFile(*key)


_open = KeptOpen(_open_file)
_kept = KeptOpen(_kept_file)


def changed(name: str) -> DataError:
    """That a file is not as it was indexed."""
    return DataError(
        f"{name}: changed or went away after it was indexed.",
        fix="Leave the sources alone while they are used; run again.",
    )
