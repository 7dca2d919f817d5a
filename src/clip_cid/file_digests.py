"""Digests of what files hold, each computed once: for the same path, bytes and time of change a file is not read again.

A *state* is a digest of names, bytes and times, which costs no reading; *contents* is a digest of what is inside.
Equal states mean equal contents; other states say nothing, and the contents decide.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SMALL = 1 << 16  # bytes; in a set of a million images the memory of each would cost more than it saves


class FileDigests:
    """Digests kept as JSON lines in `store`; a link counts as the file that it points to.

    The store is only a saving of time: a line that a kill has torn, a damaged one, or a store that cannot be
    written costs another read of the file.
    """

    def __init__(self, store: Path, *, read_only: bool = False) -> None:
        self._store, self._read_only = store, read_only
        self._known: dict[str, str] | None = None

    def of(self, path: Path) -> str:
        """The SHA-256 of a file, in hexadecimal.

        Raises:
            OSError: The file cannot be read.
        """
        state = digest(file_state(path))
        if (sha256 := self.recall(state)) is None:
            sha256 = sha256_file(path)
            self.keep(state, sha256)
        return sha256

    def of_all(self, files: Mapping[str, Path]) -> str:
        """A digest of the names and the contents of several files, wherever they lie.

        Raises:
            OSError: A file cannot be read.
        """
        state = state_of_all(files)
        if (contents := self.recall(state)) is None:
            contents = digest(
                [[name, self._of_any_size(path)] for name, path in sorted(files.items())],
            )
            self.keep(state, contents)
        return contents

    def recall(self, state: str) -> str | None:
        """The contents of what had this state; None if they are not known."""
        return self._lines().get(state)

    def keep(self, state: str, contents: str) -> None:
        """Remember the contents of what has this state."""
        self._keep_all({state: contents})

    def learn_from(self, other: "FileDigests") -> None:
        """Take over what another store knows."""
        self._keep_all(other._lines())

    def _keep_all(self, contents: Mapping[str, str]) -> None:
        known = self._lines()
        new = {state: content for state, content in contents.items() if known.get(state) != content}
        known.update(new)
        if self._read_only or not new:
            return

        # A stage that calls itself finished relies on these lines: without them its inputs are read again.
        lines = b"".join(json.dumps(line).encode() + b"\n" for line in new.items())
        with contextlib.suppress(OSError):
            self._store.parent.mkdir(parents=True, exist_ok=True)
            with open(self._store, "ab") as handle:
                handle.write(lines)
                handle.flush()
                os.fsync(handle.fileno())

    def _of_any_size(self, path: Path) -> str:
        return self.of(path) if path.stat().st_size > _SMALL else sha256_file(path)

    def _lines(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            content = b""
            with contextlib.suppress(OSError):
                content = self._store.read_bytes()
            for line in content.split(b"\n"):
                with contextlib.suppress(ValueError, TypeError):
                    state, contents = json.loads(line)
                    if isinstance(state, str) and isinstance(contents, str):
                        self._known[state] = contents
        return self._known


def file_state(path: Path) -> list[Any]:
    """Real path, bytes and time of change of a file.

    Raises:
        OSError: There is no such file.
    """
    status = path.stat()
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns]


def state_of_all(files: Mapping[str, Path]) -> str:
    """The state of several files by name.

    Raises:
        OSError: A file is missing.
    """
    return digest([[name, *file_state(path)] for name, path in sorted(files.items())])


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
