"""Where in a WebDataset tar each sample's image, text and json lie, read from the headers alone.

Nothing is extracted: a sample is later read by its byte range, so the tar must be plain (not compressed) and whole.
"""

import hashlib
import re
import tarfile
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from clip_cid.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")  # in open_clip's order: the first that a sample has is its image
ABSENT = -1

TAR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("key_hash", pa.uint64()),
        ("problem", pa.string()),  # null where the sample can be read
        *((f"{part}_{what}", pa.int64()) for part in ("image", "text", "json") for what in ("at", "size")),
    ]
)

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_UNSAFE = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|\0")
METADATA = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over, such as all of __meta__/
_BLOCK = 512
_AGAIN = "Fetch or write this shard again, then repeat the command."


def key_hash(key: str) -> int:
    """64 bits of a key, the same in every process, so that equal keys are found without holding the keys."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def readable_key(key: bytes) -> tuple[str, str | None]:
    """A key as text, and what is wrong with it."""
    try:
        return key.decode(), None if key else "no key"
    except UnicodeDecodeError:
        return key.decode(errors="backslashreplace"), "the key is not UTF-8"


def scan_tar(path: Path, name: str) -> pa.RecordBatch:
    """One row per sample, in tar order; consecutive members of one key (WebDataset's rule) are one sample.

    A member whose key and extension the sample already has begins another sample, of a then duplicate key.

    Args:
        path: The tar.
        name: How errors call it.

    Raises:
        DataError: The tar is compressed, empty, damaged, cut short, or holds links or names that leave the folder.
    """
    columns: dict[str, list[object]] = {column: [] for column in TAR_SCHEMA.names}
    for key, members in samples(path, name):
        for column, value in _row(key, members).items():
            columns[column].append(value)
    batch = pa.RecordBatch.from_pydict(columns, schema=TAR_SCHEMA)
    if not batch.num_rows:
        raise DataError(f"{name}: an empty shard, {path.stat().st_size:,} bytes without a sample.", fix=_AGAIN)
    return batch


def samples(path: Path, name: str) -> Generator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The key and the members (by extension, in lower case) of each sample, as `scan_tar` numbers them.

    Raises:
        DataError: As `scan_tar`.
    """
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in plain_files(path, name):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or METADATA.match(member.name):
            continue  # hidden, without an extension, or metadata: no part of a sample for webdataset either
        found, extension = folder + slash + stem, extension.lower()
        if key is not None and (found != key or extension in members):
            yield key, members
            members = {}
        key = found
        members[extension] = member
    if key is not None:
        yield key, members


def plain_files(path: Path, name: str) -> Generator[tarfile.TarInfo]:
    """The headers of all regular files of a tar, in order; `offset_data` and `size` say where each lies.

    Raises:
        DataError: The tar is compressed, empty, damaged, cut short, or holds links or names that leave the folder.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            _refuse_what_is_no_plain_tar(handle, name)
            for member in _members(handle, size, name):
                _refuse_unsafe(member, name)
                if not member.isreg():
                    continue
                end = member.offset_data + member.size
                if member.size < 0 or end > size:
                    raise DataError(
                        f"{name}: cut short at byte {size:,}: member {member.name!r} ends at byte {end:,}.", fix=_AGAIN
                    )
                yield member
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error}).", fix="Check its permissions and the disk it is on."
        ) from error


def _row(name: str, members: dict[str, tarfile.TarInfo]) -> dict[str, object]:
    """A sample's row of the index."""
    key, problem = readable_key(name.encode(errors="surrogateescape"))
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    text, json = members.get("txt"), members.get("json")
    if image is None:
        problem = f"no image (.{', .'.join(IMAGE_EXTENSIONS)})"
    elif text is None and json is None:
        problem = "no caption (.txt or .json)"
    row: dict[str, object] = {"key": key, "key_hash": key_hash(key), "problem": problem}
    for part, member in {"image": image, "text": text, "json": json}.items():
        row[f"{part}_at"] = ABSENT if member is None else member.offset_data
        row[f"{part}_size"] = ABSENT if member is None else member.size
    return row


def _members(handle: BinaryIO, size: int, name: str) -> Generator[tarfile.TarInfo]:
    """Every member; where no header follows the tar must end, which tarfile by itself would take on trust."""
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
        raise DataError(f"{name}: no readable tar of {size:,} bytes ({error}).", fix=_AGAIN) from error
    _check_end(handle, archive.offset, size, name)


def _check_end(handle: BinaryIO, end: int, size: int, name: str) -> None:
    handle.seek(end)
    mark = handle.read(_BLOCK)
    if any(mark):
        state = "cut short" if len(mark) < _BLOCK else "damaged or cut short"
        raise DataError(f"{name}: {state} at byte {end:,} of {size:,}: no whole tar header there.", fix=_AGAIN)
    if len(mark) < _BLOCK:
        raise DataError(
            f"{name}: cut short at byte {size:,}: the mark that ends a tar is missing at byte {end:,}.", fix=_AGAIN
        )
    at = end + _BLOCK
    while rest := handle.read(1 << 20):
        if any(rest):
            raise DataError(
                f"{name}: more data behind the end of the tar, after byte {at:,} of {size:,}.",
                fix="Tars joined by `cat` hide all but the first; use `tar --concatenate`, or keep them apart.",
            )
        at += len(rest)


def _refuse_what_is_no_plain_tar(handle: BinaryIO, name: str) -> None:
    start = handle.read(8)
    handle.seek(0)
    if not start:
        raise DataError(f"{name}: an empty file (0 bytes).", fix=_AGAIN)
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{name}: compressed with {method}; samples cannot be read at random from it.",
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
