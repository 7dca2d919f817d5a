"""How many files a process may have open, and the caches of open files that share this."""

import contextlib
import errno
import functools
import os
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

_ENOUGH = 1 << 20  # files; some programs slow down with the limit itself
_EVERYTHING_ELSE = 192  # files of libraries, pipes of workers, tensors on their way
_EVERYTHING_MAPPED = 4096  # libraries and memory
_USUAL_MAPS = 65_530
_CACHES_OF_FILES = 2  # at one time: tars, and whatever comes
_CACHES_OF_MAPS = 8  # indexes and their batches, embeddings of images, texts and further captions, views
_FEWEST = 4
_CROWDED = 0.75  # of what may be kept
MANY = 16_384
"""More than this are not kept, whatever the system allows: each takes about a kilobyte."""

Key = TypeVar("Key")
Value = TypeVar("Value")
_caches: "weakref.WeakSet[KeptOpen[Any, Any]]" = weakref.WeakSet()


def raise_limit() -> None:
    """Let this process, and those it starts, open as many files as the system ever allows them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class KeptOpen(Generic[Key, Value]):
    """Files that stay open to be read again, the least recently used closed first.

    All caches of a process share what the system allows it. Where that is used up, they give back all they hold before
    a file is refused. A value closes its file when nothing refers to it any more.

    Args:
        open_file: Opens the file of a key.
        most: Keep no more than this.
        maps: The values are maps of files in memory, which are closed: a system allows more of these.
    """

    def __init__(self, open_file: Callable[[Key], Value], *, most: int = MANY, maps: bool = False) -> None:
        self._open_file, self._most, self._maps = open_file, most, maps
        self._kept: dict[Key, Value] = {}
        self._crowded = False  # before, it need not be known what was used when
        _caches.add(self)

    def __call__(self, key: Key) -> Value:
        value = self._kept.get(key)
        if value is not None:
            if self._crowded:
                self._kept[key] = self._kept.pop(key, value)  # at the end: the first is the least recently used
            return value

        value = self._kept[key] = self._opened(key)
        self._close_the_least_used()
        return value

    def clear(self) -> None:
        """Close everything."""
        self._kept.clear()

    def _opened(self, key: Key) -> Value:
        try:
            return self._open_file(key)
        except OSError as error:
            if not _is_exhausted(error):
                raise
        for cache in list(_caches):
            cache.clear()
        return self._open_file(key)

    def _close_the_least_used(self) -> None:
        capacity = self._capacity()
        self._crowded = len(self._kept) > _CROWDED * capacity
        while len(self._kept) > capacity:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread has changed it
                self._kept.pop(next(iter(self._kept)), None)

    def _capacity(self) -> int:
        if self._maps:
            return min(self._most, max(_FEWEST, (_most_maps() - _EVERYTHING_MAPPED) // _CACHES_OF_MAPS))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return self._most
        return min(self._most, max(_FEWEST, (limit - _EVERYTHING_ELSE) // _CACHES_OF_FILES))


class Descriptor:
    """An open file that closes when it is no longer used. It is read by position, so threads and forks share it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@functools.cache
def _most_maps() -> int:
    """How many maps the system allows a process."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):  # not Linux
        return _USUAL_MAPS


def _is_exhausted(error: OSError) -> bool:
    """Whether there are too many open files or maps; pyarrow's errors may have no number."""
    exhausted = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    words = ("Too many open files", "Cannot allocate memory")
    return error.errno in exhausted or any(one in str(error) for one in words)
