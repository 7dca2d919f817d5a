"""The SHA-256 of files, each read once: a file of the same path, bytes and time of change is not read again."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

_Known = dict[str, tuple[int, int, str]]  # path -> bytes, mtime in nanoseconds, SHA-256


class FileDigests:
    """Digests by path, kept as JSON lines in `store`; a link counts as the file that it points to.

    The store is only a saving of time: a line that a kill has torn, a damaged one, or a store that cannot be
    written costs another read of the file.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._known: _Known | None = None

    def of(self, path: Path) -> str:
        """The SHA-256 of a file, in hexadecimal.

        Raises:
            OSError: The file cannot be read.
        """
        real, status = os.path.realpath(path), path.stat()
        known = self._lines().get(real)
        if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
            return known[2]
        sha256 = sha256_file(path)
        self.remember(path, status, sha256)
        return sha256

    def remember(self, path: Path, status: os.stat_result, sha256: str) -> None:
        """Keep the digest of a file that was read anyway; `status` is from before it was read."""
        real = os.path.realpath(path)
        known = (status.st_size, status.st_mtime_ns, sha256)
        self._lines()[real] = known
        line = json.dumps([real, *known]).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._store.parent.mkdir(parents=True, exist_ok=True)
            with open(self._store, "ab") as handle:
                handle.write(line)

    def _lines(self) -> _Known:
        if self._known is None:
            self._known = {}
            content = b""
            with contextlib.suppress(OSError):
                content = self._store.read_bytes()
            for line in content.split(b"\n"):
                with contextlib.suppress(ValueError, TypeError):
                    path, size, mtime, sha256 = json.loads(line)
                    self._known[path] = (size, mtime, sha256)
        return self._known


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
