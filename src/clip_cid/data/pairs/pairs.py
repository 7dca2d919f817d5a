"""Image-text pairs from WebDataset tars, a table of image paths, or a folder: numbered rows, read one at a time.

The order of rows is that of the sources, and within one that of the tar, the table, or the sorted paths. It never
depends on what is broken: a sample that cannot be used keeps its row.
"""

import errno
import json
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from clip_cid.data.pairs.index import IndexedSource, PairIndex, index_sources
from clip_cid.data.pairs.sources import Kind, cache_folder, find_sources
from clip_cid.data.pairs.tables import field_text, list_folder
from clip_cid.data.pairs.tars import samples
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

_OPEN_TARS = 128
_UNREADABLE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}


class BadSample(Exception):
    """One sample cannot be used; it is counted and listed, and keeps its row."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Pair:
    """An image, still encoded, and its captions."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    """At least one; none is empty or has white space around it."""
    fields: dict[str, str]
    """`pairs.keep_fields` as text, empty where the sample has none."""


@dataclass(frozen=True)
class Shard:
    """A run of rows that is embedded at one go: a tar, or 10,000 rows of a table or folder."""

    name: str
    first_row: int
    rows: int
    bytes: int
    """Of the tar or the whole table; of a folder, of this shard's images and captions."""


class Pairs:
    """Every pair by its row number; made by `open_pairs`.

    Nothing per row is held in memory and files are opened when first read, so it can be handed to forked or spawned
    workers at no cost.
    """

    def __init__(self, settings: PairsConfig, index: PairIndex, known_bad: dict[int, str]) -> None:
        self._settings, self._index = settings, index
        self.known_bad = known_bad
        """Rows that the index alone shows to be unusable, and why: no image, no caption, the key of an earlier row."""
        self.shards = tuple(_shard(index, number) for number in range(len(index.batches)))

    def __len__(self) -> int:
        return len(self._index)

    def key(self, row: int) -> str:
        return self._index.key(self._checked(row))

    def keys(self, start: int, stop: int) -> list[str]:
        """The keys of the rows from `start` up to `stop`."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start, stop: want 0 <= start <= stop <= {len(self)}, got {start}, {stop}")
        keys: list[str] = []
        while start < stop:
            shard, place = self._index.locate(start)
            some = self._index.batch(shard).column("key").slice(place, stop - start).to_pylist()
            keys += some
            start += len(some)
        return keys

    def read(self, row: int) -> Pair:
        """The pair of a row.

        Raises:
            BadSample: It cannot be used: no image, no caption, a caption that is no text, a duplicate key.
            DataError: The file it lies in changed or went away since it was indexed.
        """
        if (reason := self.known_bad.get(self._checked(row))) is not None:
            raise BadSample(reason)
        shard, place = self._index.locate(row)
        source = self._index.source(shard)
        sample = {column: values[0] for column, values in self._index.batch(shard).slice(place, 1).to_pydict().items()}
        if source.kind == "tar":
            return _read_from_tar(source, sample, self._settings)
        image = _read_file(source.root, sample["image"], "image")
        if source.kind == "table":
            fields = dict(zip(self._settings.keep_fields, sample["fields"], strict=True))
            return Pair(sample["key"], image, _captions(sample["captions"]), fields)
        lines = _read_file(source.root, sample["caption_file"], "caption file").splitlines()
        return Pair(sample["key"], image, _captions(lines), dict.fromkeys(self._settings.keep_fields, ""))

    @property
    def kind(self) -> Kind:
        """What all sources are: tars, tables or folders."""
        return self._index.sources[0].kind

    def image_name(self, row: int) -> str:
        """The image's path in its table or folder."""
        shard, place = self._index.locate(self._checked(row))
        return os.fsdecode(self._index.batch(shard).column("image")[place].as_py())

    def original_files(self, rows: Int64[np.ndarray, " rows"]) -> Generator[list[tuple[str, bytes]]]:
        """The members of each sample as they lie in the tars, name and bytes, all of them and in their order.

        Args:
            rows: Ascending, of pairs from tars; each tar is walked through once.

        Raises:
            DataError: A tar changed or went away since it was indexed.
        """
        edges = np.searchsorted(rows, self._index.first_row)
        for shard in np.flatnonzero(np.diff(edges)).tolist():
            source, inside = self._index.source(shard), rows[edges[shard] : edges[shard + 1]]
            wanted = iter((inside - self._index.first_row[shard]).tolist())
            tar, next_wanted = _tar(source), next(wanted)
            for place, (_, members) in enumerate(samples(Path(source.root), source.name)):
                if place == next_wanted:
                    yield [
                        (member.name, _read_bytes(tar, member.offset_data, member.size)) for member in members.values()
                    ]
                    if (next_wanted := next(wanted, -1)) < 0:
                        break

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row: want 0 <= row < {len(self)}, got {row}")
        return row


def open_pairs(settings: PairsConfig, *, index: Path | None = None, cache_dir: Path | None = None) -> Pairs:
    """Find and index every source.

    Args:
        settings: Where the pairs are. In a folder, each line of an image's .txt is a caption.
        index: Folder where the index is kept, to be used again while sources have the same name, bytes and time;
            None holds it in memory.
        cache_dir: Folder for shards from URLs; ~/.cache/clip_cid when absent.

    Raises:
        DataError: A source is missing, broken, empty or of another kind than the first; or no pair can be used.
    """
    cache = cache_folder(cache_dir)
    rows = PairIndex(
        index_sources(find_sources(settings.source), settings, index=index, cache_dir=cache.absolute() / "shards")
    )
    known_bad = rows.known_bad(index)
    names = ", ".join(settings.source)
    if len(known_bad) == len(rows):
        row, reason = next(iter(known_bad.items()))
        raise DataError(
            f"{names}: none of the {len(rows):,} samples can be used; the first, {rows.key(row)!r}: {reason}.",
            fix="An image and its caption share their name up to the extension; in a tar they follow each other (tar --sort=name).",
        )
    return Pairs(settings, rows, known_bad)


def fingerprint(settings: PairsConfig) -> list[tuple[str, int]]:
    """Name and bytes of every source file, without reading one; the bytes of a URL are -1, a table's images are left out.

    Raises:
        DataError: A source is missing, of no known kind, or of another kind than the first.
    """
    files: list[tuple[str, int]] = []
    for source in find_sources(settings.source):
        if source.kind == "folder" and source.path is not None:
            files += [(f"{source.name}/{listed.image}", listed.bytes) for listed in list_folder(source.path).images]
        else:
            files.append((source.name, source.bytes))
    return files


def _shard(index: PairIndex, number: int) -> Shard:
    source, (_, part) = index.source(number), index.batches[number]
    first, after = (int(index.first_row[shard]) for shard in (number, number + 1))
    size = source.bytes
    if source.kind == "folder":
        size = int(index.batch(number).column("bytes").to_numpy().sum())
    name = source.name if source.kind == "tar" else f"{source.name}#{part:05d}"
    return Shard(name, first, after - first, size)


def _read_from_tar(source: IndexedSource, sample: dict[str, Any], settings: PairsConfig) -> Pair:
    image, text, described = (_member(source, sample, part) for part in ("image", "text", "json"))
    if image is None:
        raise AssertionError("a sample without image is known to be bad")
    fields: dict[str, Any] = {}
    if described is not None:
        try:
            fields = json.loads(described)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"json cannot be read ({error})") from error
        if not isinstance(fields, dict):
            raise BadSample(f"json holds a {type(fields).__name__}, not an object")
    several = fields.get(settings.captions_field)
    if several is not None and not isinstance(several, str | list):
        raise BadSample(f"json field {settings.captions_field!r} holds a {type(several).__name__}, not captions")
    captions = [several] if isinstance(several, str) else several or ([] if text is None else [text])
    kept = {name: field_text(fields.get(name)) for name in settings.keep_fields}
    return Pair(sample["key"], image, _captions(captions), kept)


def _member(source: IndexedSource, sample: dict[str, Any], part: str) -> bytes | None:
    at, size = sample[f"{part}_at"], sample[f"{part}_size"]
    if at < 0:
        return None
    return _read_bytes(_tar(source), at, size)


def _read_bytes(tar: "_Descriptor", at: int, size: int) -> bytes:
    data = os.pread(tar.number, size, at)
    if len(data) != size:
        raise _changed(tar.name)
    return data


def _tar(source: IndexedSource) -> "_Descriptor":
    return _open_tar(source.root, source.name, source.bytes, source.mtime_ns)


class _Descriptor:
    """An open file that closes when nobody holds it; reading by position, it can be shared by threads and forks."""

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=_OPEN_TARS)
def _open_tar(path: str, name: str, size: int, mtime_ns: int) -> _Descriptor:
    try:
        opened = _Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC), name)
    except FileNotFoundError as error:
        raise _changed(name) from error
    except OSError as error:
        raise DataError(f"{name}: cannot be opened ({error.strerror}).", fix="Check its permissions.") from error
    status = os.fstat(opened.number)
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise _changed(name)
    return opened


def _changed(name: str) -> DataError:
    return DataError(
        f"{name}: changed or went away after it was indexed.",
        fix="Leave the sources alone while they are used; run again.",
    )


def _read_file(root: str, name: bytes, what: str) -> bytes:
    path = os.path.join(root, os.fsdecode(name))
    try:
        with open(path, "rb") as file:
            return file.read()
    except ValueError as error:  # a NUL in the name
        raise BadSample(f"{what} has no possible name: {path!r}") from error
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}).", fix="Check the disk or mount it is on."
            ) from error
        raise BadSample(f"{what} {path!r} cannot be read ({error.strerror})") from error


def reason_kind(reason: str) -> str:
    """Why a sample is bad, without what belongs to it alone (names, numbers, the cause in brackets), so that it can be counted."""
    return re.sub(r"'[^']*'|\d[\d,.]*", "...", reason.partition(" (")[0])


def _captions(texts: list[Any]) -> tuple[str, ...]:
    """The captions that have words; an empty one among others is left out, all empty is a bad sample."""
    captions: list[str] = []
    for number, text in enumerate(texts, start=1):
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadSample(f"caption {number} is not UTF-8 (byte {error.start})") from error
        if not isinstance(text, str):
            raise BadSample(f"caption {number} is a {type(text).__name__}, not text")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # json can spell what UTF-8 cannot hold
            raise BadSample(f"caption {number} is not UTF-8 (half a surrogate pair)")
        captions += [stripped] if (stripped := text.strip()) else []
    if not captions:
        raise BadSample("the caption is empty")
    return tuple(captions)
