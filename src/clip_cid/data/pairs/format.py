"""The interface of a format of pairs: tars, tables and folders are one class each.

To add a format:

1. Write a subclass of `PairFormat` in a file of its own; `folders.py` is a short example. It says which paths it owns,
   scans a source into the rows of the index, and reads one row.
2. Add it to `FORMATS` in `formats.py`. The first format there that owns a path is the format of that path.

The index, the stages and `clip-cid subset` need no change.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from clip_cid.addresses import path_of
from clip_cid.data.pairs.pair import Pair
from clip_cid.errors import DataError
from clip_cid.file_digests import file_state
from clip_cid.recipe import PairsConfig
from clip_cid.remote.contract import RemoteFile

SHARD_ROWS = 10_000
"""A source that has no shards of its own is cut into shards of this many rows, so that embedding can resume."""

COMMON_COLUMNS = (
    ("key", pa.string()),
    ("key_hash", pa.uint64()),
    ("problem", pa.string()),  # why the row cannot be used; null for most rows
)
"""The columns that every index begins with."""

Member = tuple[str, bytes]
"""A file of a sample: name and contents."""


class EmptySourceError(DataError):
    """A source without a single pair: left out if others have pairs."""


@dataclass(frozen=True)
class Source:
    """A source as the user named it: one shard, table or folder."""

    format: "PairFormat"
    name: str
    """As the user wrote it, ranges and wildcards expanded, without secrets."""
    path: Path | None
    """None for what is not on this machine."""
    remote: RemoteFile | None = None
    """A file elsewhere; None also for what a shell command brings."""

    @property
    def bytes(self) -> int:
        """Bytes of the file; -1 for one that is not on this machine, as earlier versions have it."""
        return -1 if self.path is None else self.path.stat().st_size

    @property
    def identity(self) -> str:
        """What no other source has."""
        return self.name if self.remote is None and self.path is None else str(self.path or self.remote)

    @property
    def state(self) -> Any:
        """What changes when the file does, unread; of a shell command the command itself."""
        if self.remote is not None:
            return self.remote.state
        return self.name if self.path is None else file_state(self.path)

    @property
    def path_without_suffix(self) -> str:
        """The absolute path, or that of the address, up to the suffix of its last part."""
        path = path_of(self.name) if self.path is None else str(self.path)
        folder, slash, last = path.strip().rpartition("/")
        is_folder = self.path is not None and self.path.is_dir()
        return folder + slash + (last if is_folder else last.rpartition(".")[0] or last)


@dataclass(frozen=True)
class SourceFile:
    """A source as it was when it was indexed: a file or folder on this machine, or a file elsewhere."""

    name: str
    """As `Source.name`."""
    path: Path
    """On this machine; of a file elsewhere that is read by range only its name counts."""
    bytes: int
    mtime_ns: int
    remote: RemoteFile | None = None
    """The file elsewhere that it is, or that `path` is a copy of."""
    cache: Path | None = None
    """Of what is read by range; None where `path` is read."""

    @classmethod
    def of(cls, name: str, path: Path, *, remote: RemoteFile | None = None) -> "SourceFile":
        """A file or folder on this machine, perhaps a copy of one elsewhere."""
        status = path.stat()
        return cls(name, path, status.st_size, status.st_mtime_ns, remote)

    @classmethod
    def elsewhere(cls, name: str, remote: RemoteFile, cache: Path) -> "SourceFile":
        """A file that is read by range."""
        return cls(name, Path(path_of(remote.name)), remote.bytes, 0, remote, cache)

    def is_as_indexed(self) -> bool:
        """Whether a file on this machine has still its size and time; one elsewhere is refused when it is read."""
        return self.cache is not None or SourceFile.of(self.name, self.path, remote=self.remote) == self

    @property
    def stem(self) -> str:
        """The name of the file without its suffix."""
        return (self.path if self.remote is None else Path(path_of(self.remote.name))).stem

    @property
    def identity(self) -> list[Any]:
        """What tells this version of the file from others, beside its path."""
        return [self.bytes, self.mtime_ns] if self.remote is None else self.remote.state

    @property
    def state(self) -> list[Any]:
        """As `Source.state`."""
        return file_state(self.path) if self.remote is None else self.remote.state


@dataclass(frozen=True)
class Scan:
    """The index of a source, not computed yet."""

    identity: list[Any]
    """The facts beside the path that decide the index, as JSON; equal facts mean that the index is reused."""
    batches: Iterator[pa.RecordBatch]
    """The rows in their order; each batch is one shard. The source is read only when these are."""
    schema: pa.Schema | None = None
    """Of the index, where it is not the format's own."""


class PairFormat(ABC):
    """A format of pairs; instances hold no state."""

    kind: ClassVar[str]
    """The noun for a source in messages, such as "table"."""
    examples: ClassVar[str]
    """What the user can give, such as ".tar shards"."""
    schema: ClassVar[pa.Schema]
    """Columns of the index: `COMMON_COLUMNS`, then whatever `read` needs."""
    sample: ClassVar[str] = (
        "An image and its caption share their name up to the extension; in a tar they follow each other"
        " (tar --sort=name)"
    )
    """How a sample must be written, for messages."""
    has_members: ClassVar[bool] = False
    """Whether a sample is a group of files that `members` gives and `clip-cid subset` copies byte for byte."""

    has_rows: ClassVar[bool] = False
    """Whether a source is a table, some rows of which `copy_rows` writes in the form they came in."""

    refers_to_files: ClassVar[bool] = False
    """Whether images or captions lie in files of their own, which `files_of` gives."""

    @abstractmethod
    def owns(self, path: Path, settings: PairsConfig) -> bool:
        """Whether the file or folder at `path` is of this format."""

    def fingerprint(self, source: Source) -> list[tuple[str, int]]:
        """Name and bytes of the files whose change makes the pairs other pairs; none of them is read."""
        return [(source.name, source.bytes)]

    def reads_ranges(self, name: str) -> bool:
        """Whether a source elsewhere of that name is read by `bytes_at` and `opened`; others are copied whole first."""
        return False

    @abstractmethod
    def scan(self, source: SourceFile, settings: PairsConfig) -> Scan:
        """The index of a source.

        Raises:
            DataError: The source is broken; also while the batches are read.
        """

    @abstractmethod
    def read(self, source: SourceFile, row: dict[str, Any], settings: PairsConfig) -> Pair:
        """The pair of a row of the index that has no problem.

        Raises:
            BadSample: This pair cannot be used.
            DataError: The source changed or cannot be read any more.
        """

    def shard_name(self, source: SourceFile, number: int) -> str:
        """The name of a shard, given its number within the source."""
        return f"{source.name}#{number:05d}"

    def shard_bytes(self, source: SourceFile, rows: pa.RecordBatch) -> int:
        """The bytes of a shard, or of the whole source if they are not known shard by shard."""
        return source.bytes

    def files_of(self, source: SourceFile, rows: pa.RecordBatch) -> list[Path | RemoteFile]:
        """The files that rows of the index refer to; only for formats with `refers_to_files`."""
        return []

    def image_name(self, row: dict[str, Any]) -> str:
        """The file name of a row's image; empty if the image has none."""
        return ""

    def members(self, source: SourceFile, places: Sequence[int]) -> Generator[list[Member]]:
        """The files of some samples of a source, all of them and in their order; only for formats with `has_members`.

        Args:
            source: Where they are.
            places: Places of the samples in the source, ascending.

        Raises:
            DataError: The source changed or cannot be read any more.
        """
        raise NotImplementedError

    def copy_rows(self, source: SourceFile, places: Sequence[int], out: Path, settings: PairsConfig) -> None:
        """Write a table of the rows of some samples, in the form of the source; only for formats with `has_rows`.

        Args:
            source: Where they are.
            places: Places of the samples in the source, ascending.
            out: The file to write.
            settings: How the source is read.

        Raises:
            DataError: The source changed or cannot be read any more.
        """
        raise NotImplementedError
