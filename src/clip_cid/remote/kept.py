"""What was read of files elsewhere stays in the cache, block by block, so that nothing is fetched twice.

A file of the cache is as sparse as what was read of the other. Behind the place of its last byte it has a checksum of
each block that is there: a block that a kill or the loss of power left damaged is fetched again. While the disk of the
cache is nearly full nothing is added, and ranges are read as they are asked for.
"""

import contextlib
import functools
import hashlib
import io
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from clip_cid import log
from clip_cid.open_files import Descriptor, KeptOpen
from clip_cid.remote import files
from clip_cid.remote.contract import RemoteFile

_BLOCK = 1 << 18
_AT_ONCE = 1 << 23  # bytes of one request
_ROOM = 5 << 30  # bytes of the disk that the cache leaves free
_SUM = struct.Struct("<Q")
_THERE = 1 << 32  # beside the checksum of a block that is there; its size stands above


class KeptFile:
    """A file elsewhere that is read by range, through the cache."""

    def __init__(self, file: RemoteFile, cache: Path) -> None:
        self._file, self._cache = file, cache
        self._kept = _Blocks(file, _place(file, cache))

    def read(self, at: int, size: int) -> bytes:
        """A range of bytes, shorter at the end of the file.

        Raises:
            DataError: As `files.read`.
        """
        stop = min(at + size, self._file.bytes)
        if at >= stop:
            return b""
        first, last = at // _BLOCK, (stop - 1) // _BLOCK
        blocks = {number: self._kept.read(number) for number in range(first, last + 1)}
        missing = [number for number, block in blocks.items() if block is None]
        if missing and not _has_room(self._cache):
            return files.read(self._file, at, stop)

        for start, end in _runs(missing):
            data = files.read(self._file, start * _BLOCK, min(end * _BLOCK, self._file.bytes))
            for number in range(start, end):
                begins = (number - start) * _BLOCK
                blocks[number] = data[begins : begins + _BLOCK]
                self._kept.write(number, data[begins : begins + _BLOCK])
        whole = b"".join(block for block in blocks.values() if block is not None)
        return whole[at - first * _BLOCK : stop - first * _BLOCK]


class Reader(io.RawIOBase):
    """A file elsewhere as a file that is open for reading."""

    mode = "rb"

    def __init__(self, file: RemoteFile, cache: Path) -> None:
        self.name = file.name
        self._kept, self._size, self._at = KeptFile(file, cache), file.bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: "memoryview | bytearray", /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._kept.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def opened(file: RemoteFile, cache: Path, *, in_order: bool) -> io.BufferedReader:
    """A file elsewhere, to be read `in_order`, many bytes at once, or here and there."""
    return io.BufferedReader(Reader(file, cache), _AT_ONCE if in_order else io.DEFAULT_BUFFER_SIZE)


class _Blocks:
    """The blocks of one version of a file that are in the cache."""

    def __init__(self, file: RemoteFile, path: Path) -> None:
        self._path, self._sums = path, -(-file.bytes // _BLOCK) * _BLOCK

    def read(self, number: int) -> bytes | None:
        """A block; None if it is not there, or damaged."""
        if (opened := self._opened(for_writing=False)) is None:
            return None
        stored = os.pread(opened.number, _SUM.size, self._sums + number * _SUM.size)
        if len(stored) < _SUM.size or not (check := _SUM.unpack(stored)[0]):
            return None
        size = int.from_bytes(stored[5:8], "little")
        block = os.pread(opened.number, size, number * _BLOCK)
        return block if check == _check(block) else None

    def write(self, number: int, block: bytes) -> None:
        """Keep a block, if that can be."""
        if (opened := self._opened(for_writing=True)) is None:
            return
        with contextlib.suppress(OSError):  # a disk that is full after all
            os.pwrite(opened.number, block, number * _BLOCK)
            os.pwrite(opened.number, _SUM.pack(_check(block)), self._sums + number * _SUM.size)

    def _opened(self, *, for_writing: bool) -> Descriptor | None:
        try:
            return _open(self._path)
        except FileNotFoundError:
            if not for_writing:
                return None
        except OSError:
            return None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
            return _open(self._path)
        except OSError as error:
            _warn_of_cache(self._path.parent.parent, error.strerror or "")
            return None


def _check(block: bytes) -> int:
    """The checksum of a block, a mark that it is there, and its size."""
    return zlib.crc32(block) | _THERE | len(block) << 40


def _place(file: RemoteFile, cache: Path) -> Path:
    name = hashlib.sha256(repr(file.state).encode()).hexdigest()[:32]
    return cache / "remote" / name[:2] / name


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as (first, after the last), each run of one request."""
    longest = _AT_ONCE // _BLOCK
    start = end = -1
    for number in numbers:
        if number != end or end - start == longest:
            if end > start:
                yield start, end
            start = end = number
        end += 1
    if end > start:
        yield start, end


def _has_room(cache: Path) -> bool:
    folder = cache
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free > _ROOM:
            return True
    _warn_of_cache(cache, "the disk is nearly full")
    return False


@functools.cache
def _warn_of_cache(cache: Path, reason: str) -> None:
    log.warn(
        f"{cache}: nothing more is kept there ({reason}), so files elsewhere are read again when they are needed again;"
        " machine.cache_dir names another folder"
    )


def _open_file(path: Path) -> Descriptor:
    return Descriptor(os.open(path, os.O_RDWR | os.O_CLOEXEC))


_open = KeptOpen(_open_file)
