"""The headers of plain tars: what is compressed, damaged, cut short or unsafe is refused."""

import re
import tarfile
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from clip_cid.data.pairs.format import EmptySourceError
from clip_cid.errors import DataError

FETCH_AGAIN = "Fetch or write this shard again, then repeat the command."
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_UNSAFE = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|\0")
_BLOCK = 512


def plain_files(path: Path, name: str) -> Generator[tarfile.TarInfo]:
    """The headers of all regular files of a tar, in order; `offset_data` and `size` say where each lies.

    Raises:
        DataError: The tar is compressed, empty, damaged, cut short, or holds links or names that leave the folder.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            yield from plain_files_in(handle, size, name)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error}).", fix="Check its permissions and the disk it is on."
        ) from error


def plain_files_in(handle: BinaryIO, size: int, name: str) -> Generator[tarfile.TarInfo]:
    """As `plain_files`, of an open tar of `size` bytes."""
    _refuse_compressed(handle, name)
    for member in _members(handle, size, name):
        _refuse_unsafe(member, name)
        if not member.isreg():
            continue

        end = member.offset_data + member.size
        if member.size < 0 or end > size:
            raise DataError(
                f"{name}: cut short at byte {size:,}: member {member.name!r} ends at byte {end:,}.", fix=FETCH_AGAIN
            )
        yield member


def _members(handle: BinaryIO, size: int, name: str) -> Generator[tarfile.TarInfo]:
    """Every member; where no more header follows, the tar must end, which tarfile itself does not check."""
    try:
        archive = tarfile.TarFile(fileobj=handle, encoding="utf-8")
        member = archive.next()

        while member is not None:
            yield member
            handle.seek(archive.offset)
            try:
                member = tarfile.TarInfo.fromtarfile(archive)  # unlike next(), keeps no list of all members
            except tarfile.HeaderError:
                member = None
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{name}: no readable tar of {size:,} bytes ({error}).", fix=FETCH_AGAIN) from error
    _check_end(handle, archive.offset, size, name)


def _check_end(handle: BinaryIO, end: int, size: int, name: str) -> None:
    """A whole block of zeros ends a tar; only zeros follow it."""
    handle.seek(end)
    mark = handle.read(_BLOCK)
    if any(mark):
        state = "cut short" if len(mark) < _BLOCK else "damaged or cut short"
        raise DataError(f"{name}: {state} at byte {end:,} of {size:,}: no whole tar header there.", fix=FETCH_AGAIN)
    if len(mark) < _BLOCK:
        raise DataError(
            f"{name}: cut short at byte {size:,}: the mark that ends a tar is missing at byte {end:,}.", fix=FETCH_AGAIN
        )

    at = end + _BLOCK
    while rest := handle.read(1 << 20):
        if any(rest):
            raise DataError(
                f"{name}: more data behind the end of the tar, after byte {at:,} of {size:,}.",
                fix="Tars joined by `cat` hide all but the first; use `tar --concatenate`, or keep them apart.",
            )
        at += len(rest)


def _refuse_compressed(handle: BinaryIO, name: str) -> None:
    start = handle.read(8)
    handle.seek(0)
    if not start:
        raise EmptySourceError(f"{name}: an empty file (0 bytes).", fix=FETCH_AGAIN)

    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{name}: compressed with {method}; single samples cannot be read from it.",
                fix=f"Decompress it once ({method} -d) and name the .tar; images do not shrink further anyway.",
            )


def _refuse_unsafe(member: tarfile.TarInfo, name: str) -> None:
    if _UNSAFE.search(member.name):
        raise DataError(
            f"{name}: member {member.name!r} at byte {member.offset:,} points outside the archive.",
            fix="Write the shard again with plain relative names; ask where this one comes from.",
        )

    if member.issparse() or not (member.isreg() or member.isdir()):
        kind = "a link" if member.islnk() or member.issym() else "no regular file"
        raise DataError(
            f"{name}: member {member.name!r} at byte {member.offset:,} is {kind}.",
            fix="Write the shard again with regular files only (`tar --dereference --hard-dereference`).",
        )
