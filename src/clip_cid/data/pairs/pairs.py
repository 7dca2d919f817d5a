"""Image-text pairs from WebDataset tars, a table of image paths, or a folder: numbered rows, read one at a time.

The order of rows is that of the sources, and within one that of the tar, the table, or the sorted paths. It never
depends on what is broken: a sample that cannot be used keeps its row.
"""

import functools
from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from clip_cid.data.pairs.format import Member
from clip_cid.data.pairs.index import IndexedSource, PairIndex, index_some, index_sources
from clip_cid.data.pairs.pair import NO_CAPTION, BadSample, Pair, reason_kind, remedy
from clip_cid.data.pairs.sources import find_sources
from clip_cid.errors import DataError
from clip_cid.file_digests import digest, file_state
from clip_cid.recipe import PairsConfig
from clip_cid.remote.cache import cache_folder
from clip_cid.remote.contract import RemoteFile
from clip_cid.run_folder import atomic_file


@dataclass(frozen=True)
class Shard:
    """Consecutive rows that are embedded together: a tar, or 10,000 rows of a table or folder."""

    name: str
    first_row: int
    rows: int
    bytes: int
    """Bytes of the tar or the whole table; for a folder, of this shard's images and captions."""


class Pairs:
    """Every pair by its row number; made by `open_pairs`.

    It holds nothing per row in memory and opens files at the first read, so it can be passed to forked or
    spawned workers at no cost.
    """

    def __init__(self, settings: PairsConfig, index: PairIndex, known_bad: dict[int, str]) -> None:
        self._settings, self._index = settings, index
        self.known_bad = known_bad
        """Rows that the index alone shows to be unusable, and why: no image, no caption, the key of an earlier row."""
        self.shards = tuple(_shard(index, number) for number in range(len(index.batches)))

    def __len__(self) -> int:
        return len(self._index)

    @property
    def captions_are_optional(self) -> bool:
        """Whether a pair may be an image alone."""
        return self._settings.captions_are_optional

    @property
    def may_have_captions(self) -> bool:
        """Whether the index leaves it open that a pair has a caption."""
        return self._index.may_have_captions()

    def key(self, row: int) -> str:
        return self._index.key(self._checked(row))

    def keys(self, start: int, stop: int) -> list[str]:
        """The keys of the rows from `start` up to `stop`."""
        return self.packed_keys(start, stop).to_pylist()

    def packed_keys(self, start: int, stop: int) -> pa.LargeStringArray:
        """The same without a Python object for each."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start, stop: want 0 <= start <= stop <= {len(self)}, got {start}, {stop}")
        parts = [pa.array([], pa.large_string())]
        while start < stop:
            shard, place = self._index.locate(start)
            parts.append(self._index.batch(shard).column("key").slice(place, stop - start).cast(pa.large_string()))
            start += len(parts[-1])
        return pa.concat_arrays(parts)

    def read(self, row: int) -> Pair:
        """The pair of a row.

        Raises:
            BadSample: It cannot be used: no image, no caption, a caption that is no text, a duplicate key.
            DataError: The file it lies in changed or went away since it was indexed.
        """
        if (reason := self.known_bad.get(self._checked(row))) is not None:
            raise BadSample(reason)
        source, sample = self._sample(row)
        return source.format.read(source.local, sample, self._settings)

    def image_name(self, row: int) -> str:
        """The file name of a row's image; empty if the image has none."""
        source, sample = self._sample(row)
        return source.format.image_name(sample)

    def image_file(self, row: int) -> Path | None:
        """The file of a row's image; None if it lies inside a tar or a table."""
        source, sample = self._sample(row)
        name = source.format.image_name(sample)
        if not (source.format.refers_to_files and name):
            return None
        path = source.local.path
        return (path if path.is_dir() else path.parent) / name

    def shard_state(self, number: int, *, fields: bool = True) -> str:
        """A digest of names, bytes and times of the files behind a shard, and of how they are read.

        Args:
            number: Of the shard.
            fields: Whether the kept fields are read, too.
        """
        shard, source = self.shards[number], self._index.source(number)
        first, after = (bisect_left(self._bad_rows, row) for row in (shard.first_row, shard.first_row + shard.rows))
        bad_rows = self._bad_rows[first:after]
        unusable = [[row - shard.first_row, reason_kind(self.known_bad[row])] for row in bad_rows]
        own = [] if source.local.remote is None and source.local.path.is_dir() else source.local.state
        files = [_state(path) for path in source.format.files_of(source.local, self._index.batch(number))]
        place = [str(source.local.path), shard.first_row - self._first_row_of(number), shard.rows]
        settings = self._settings if fields else self._settings.model_copy(update={"keep_fields": ()})
        return digest([source.format.kind, place, own, files, unusable, settings.reading])

    @functools.cached_property
    def _bad_rows(self) -> list[int]:
        return sorted(self.known_bad)

    def _first_row_of(self, number: int) -> int:
        """The first row of the source that a shard is of."""
        _, part = self._index.batches[number]
        return int(self._index.first_row[number - part])

    @property
    def has_members(self) -> bool:
        """Whether a sample is a group of files named by its key that `original_files` gives, as in a tar."""
        return self._settings.key_field is None and self._index.sources[0].format.has_members

    def original_files(self, rows: Int64[np.ndarray, " rows"]) -> Generator[list[Member]]:
        """The files of each sample as they lie in the source, all of them and in their order; `has_members` only.

        Their names begin with the prefix that the keys have, so that they stay the names of these keys.

        Args:
            rows: Ascending; each shard is read through once.

        Raises:
            DataError: A source changed or went away since it was indexed.
        """
        edges = np.searchsorted(rows, self._index.first_row)
        for shard in np.flatnonzero(np.diff(edges)).tolist():
            source = self._index.source(shard)
            places = rows[edges[shard] : edges[shard + 1]] - self._index.first_row[shard]
            for members in source.format.members(source.local, places.tolist()):
                yield [(source.key_prefix + name, data) for name, data in members]

    @property
    def has_rows(self) -> bool:
        """Whether the pairs are rows of tables that `copy_rows` writes; not those with the images inside."""
        of_tables = self._index.sources[0].format.has_rows
        return of_tables and all(
            "image" in source.batch(0).schema.names for source in self._index.sources if source.rows
        )

    def copy_rows(self, rows: Int64[np.ndarray, " rows"], out: Path) -> list[Path]:
        """Write a table of the rows of these pairs for each source, in its form; `has_rows` only.

        Args:
            rows: Ascending.
            out: The folder, which is there.

        Returns:
            The files, named as the sources are; with the number of the source before it where names repeat.

        Raises:
            DataError: A source changed or went away since it was indexed.
        """
        names = [source.local.path.name for source in self._index.sources]
        files, first = list[Path](), 0
        for number, source in enumerate(self._index.sources):
            after = first + sum(source.rows)
            start, stop = np.searchsorted(rows, [first, after])
            name = names[number] if names.count(names[number]) == 1 else f"{number:05d}-{names[number]}"
            with atomic_file(out / name) as temporary:
                source.format.copy_rows(source.local, (rows[start:stop] - first).tolist(), temporary, self._settings)
            files.append(out / name)
            first = after
        return files

    def _sample(self, row: int) -> tuple[IndexedSource, dict[str, Any]]:
        """The source of a row, and the row of its index."""
        shard, place = self._index.locate(self._checked(row))
        columns = self._index.batch(shard).slice(place, 1).to_pydict()
        return self._index.source(shard), {column: values[0] for column, values in columns.items()}

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
        cache_dir: Folder for what is read of files elsewhere; ~/.cache/clip_cid when absent.

    Raises:
        DataError: A source is missing, broken, empty or of another format than the first; or no pair can be used.
    """
    cache = cache_folder(cache_dir)
    rows = PairIndex(index_sources(find_sources(settings), settings, index=index, cache_dir=cache))

    known_bad = rows.known_bad(index, captions_are_optional=settings.captions_are_optional)
    if len(known_bad) == len(rows):
        row, reason = next(iter(known_bad.items()))
        alone = f"; {remedy(reason)}" if reason.startswith(NO_CAPTION) else ""
        raise DataError(
            f"{', '.join(settings.source)}: none of the {len(rows):,} samples can be used; the first,"
            f" {rows.key(row)!r}: {reason}.",
            fix=f"{rows.source(0).format.sample}{alone}.",
        )
    return Pairs(settings, rows, known_bad)


def open_indexing(settings: PairsConfig, *, index: Path, cache_dir: Path | None) -> Callable[[range], None]:
    """What indexes some of the sources, by number, for `open_pairs` in another process; `index` must exist."""
    shards_cache = cache_folder(cache_dir).absolute() / "shards"
    named = find_sources(settings)
    return functools.partial(index_some, named=named, settings=settings, index=index, cache_dir=shards_cache)


def fingerprint(settings: PairsConfig) -> list[tuple[str, int]]:
    """Name and bytes of every source file, without reading one.

    The bytes of a file elsewhere are -1; the images that a table names are left out.

    Raises:
        DataError: A source is missing, of no known format, or of another format than the first.
    """
    return [file for source in find_sources(settings) for file in source.format.fingerprint(source)]


def _state(path: Path | RemoteFile) -> list[Any]:
    if isinstance(path, RemoteFile):
        return path.state
    try:
        return file_state(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return [str(path)]


def _shard(index: PairIndex, number: int) -> Shard:
    source, (_, part) = index.source(number), index.batches[number]
    first, after = (int(index.first_row[shard]) for shard in (number, number + 1))
    size = source.format.shard_bytes(source.local, index.batch(number))
    return Shard(source.format.shard_name(source.local, part), first, after - first, size)
