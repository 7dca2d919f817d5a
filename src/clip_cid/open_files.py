"""How many files a process may have open, and the caches of open files that share this."""

import contextlib
import errno
import resource
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_ENOUGH = 1 << 20  # files; some programs slow down with the limit itself
_EVERYTHING_ELSE = 192  # files of libraries, pipes of workers, tensors on their way
_CACHES = 8  # at one time: indexes and their batches, tars, embeddings of images, texts and further captions, views
_FEWEST = 4

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
    """

    def __init__(self, open_file: Callable[[Key], Value], *, most: int) -> None:
        self._open_file, self._most = open_file, most
        self._kept: dict[Key, Value] = {}
        _caches.add(self)

    def __call__(self, key: Key) -> Value:
        value = self._kept.pop(key, None)
        if value is None:
            value = self._opened(key)
        self._kept[key] = value  # at the end, so that the first is the least recently used
        while len(self._kept) > self._capacity():
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread has changed it
                self._kept.pop(next(iter(self._kept)), None)
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

    def _capacity(self) -> int:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return self._most
        return min(self._most, max(_FEWEST, (limit - _EVERYTHING_ELSE) // _CACHES))


def _is_exhausted(error: OSError) -> bool:
    """Whether there are too many open files or maps; pyarrow's errors may have no number."""
    exhausted = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return error.errno in exhausted or "Too many open files" in str(error)
