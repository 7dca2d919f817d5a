"""A file elsewhere as it was when it was asked for, and what a store of such files can do."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from clip_cid.errors import DataError


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file elsewhere."""

    name: str
    """Its address as the user wrote it, without secrets: fit for messages and records."""
    address: str = field(repr=False)
    """Where it is read; it may hold a password or a signature."""
    bytes: int
    version: str
    """Its ETag, generation or digest; empty where the server gives none, so that only the size tells versions apart."""
    by_range: bool = True
    """Whether parts of it can be read."""

    @property
    def state(self) -> list[Any]:
        """What tells this version from others, as JSON."""
        return [self.name, self.bytes, self.version]


class AbsentError(DataError):
    """There is no such file or folder elsewhere."""


class UnreachableError(DataError):
    """A server does not answer, or lets nobody in."""


class ChangedError(Exception):
    """The file is not the version any more that was asked for."""


@runtime_checkable
class Store(Protocol):
    """Reads files; failures are `FileNotFoundError`, `PermissionError`, `ChangedError`, or others that may pass."""

    def ask(self, address: str) -> RemoteFile:
        """The present version of a file."""
        ...

    def find(self, pattern: str) -> list[RemoteFile]:
        """The files that a pattern with wildcards matches, sorted by name."""
        ...

    def below(self, folder: str) -> dict[str, RemoteFile]:
        """Every file below a folder, by its name there; empty if there is no such folder."""
        ...

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`, of this version."""
        ...

    def stream(self, file: RemoteFile) -> Iterator[bytes]:
        """All bytes in order."""
        ...
