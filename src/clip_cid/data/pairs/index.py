"""The index of all sources: made once for each, kept as memory-mapped Arrow, and searched for rows known to be bad."""

import contextlib
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt64

from clip_cid import log
from clip_cid.addresses import path_of
from clip_cid.data.pairs import sources as fetching
from clip_cid.data.pairs.format import EmptySourceError, PairFormat, Source, SourceFile
from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.pairs.pair import DUPLICATE, NO_CAPTION
from clip_cid.data.pairs.sample_parts import key_hash
from clip_cid.errors import DataError
from clip_cid.open_files import MANY, KeptOpen
from clip_cid.recipe import PairsConfig
from clip_cid.remote import copies
from clip_cid.run_folder import atomic_file

_VERSION = 3  # raise it when the same source would give another index
_CHECKSUM_BYTES = 4
_ROWS_PER_PASS = 1 << 24  # the search for duplicates holds about 50 bytes for each of so many rows
_BAD_SCHEMA = pa.schema([("row", pa.int64()), ("reason", pa.string())])


@dataclass(frozen=True)
class IndexedSource:
    """A source with its index, as Arrow batches in a file or (no index folder) in memory; a batch is one shard."""

    format: PairFormat
    local: SourceFile
    key_prefix: str
    """What stands before each key of the source; the index has it already."""
    rows: tuple[int, ...]
    """Of each batch."""
    index: str | None
    in_memory: tuple[pa.RecordBatch, ...] = ()

    def batch(self, number: int) -> pa.RecordBatch:
        return self.in_memory[number] if self.index is None else _mapped_batch((self.index, number))


def _open(path: str) -> pa.RecordBatchFileReader:
    # No threads of its own, so that a forked process can use it.
    return pa.ipc.open_file(_mapped(path)[:-_CHECKSUM_BYTES], options=pa.ipc.IpcReadOptions(use_threads=False))


def _mapped(path: str) -> pa.Buffer:
    """An index file: Arrow's own, and a checksum of it. The map remains when the file is closed."""
    with pa.memory_map(path) as file:
        return file.read_buffer()


def _read_batch(place: tuple[str, int]) -> pa.RecordBatch:
    path, number = place
    return _open_index(path).get_batch(number)


_open_index = KeptOpen(_open, maps=True)
_mapped_batch = KeptOpen(_read_batch, maps=True)


def index_sources(
    named: Sequence[Source], settings: PairsConfig, *, index: Path | None, cache_dir: Path
) -> tuple[IndexedSource, ...]:
    """Index every source; the index of an unchanged file is taken from the `index` folder.

    Files elsewhere are read by range where their format and server allow it, and else copied into the cache first.

    Raises:
        DataError: A source is broken or cannot be fetched, or all are empty.
    """
    if index is not None:
        index.mkdir(parents=True, exist_ok=True)

    indexed: list[IndexedSource] = []
    empty: list[EmptySourceError] = []
    prefixes = _key_prefixes(named, settings)
    with log.progress("index", len(named), unit="shards") as bar:
        for source, prefix in zip(named, prefixes, strict=True):
            try:
                indexed.append(_index_source(source, prefix, settings, index, cache_dir, bar))
            except EmptySourceError as error:
                empty.append(error)
            bar.advance(1)

    if not indexed:
        raise empty[0]
    if empty:
        log.warn(f"{len(empty):,} of {len(named):,} sources hold no pair and are left out; {empty[0].problem}")
    return tuple(indexed)


def index_some(numbers: range, *, named: Sequence[Source], settings: PairsConfig, index: Path, cache_dir: Path) -> None:
    """Index some of the sources into the folder `index`. What is wrong with one is said by `index_sources`."""
    prefixes = _key_prefixes(named, settings)
    with log.progress("index", len(numbers), unit="shards") as bar:
        for number in numbers:
            with contextlib.suppress(DataError):
                _index_source(named[number], prefixes[number], settings, index, cache_dir, bar)
            bar.advance(1)


def _key_prefixes(named: Sequence[Source], settings: PairsConfig) -> list[str]:
    """What stands before the keys of each source: its name, with as many folders as make it unlike the others."""
    if settings.key_prefix is None:
        return [""] * len(named)

    paths = [source.path_without_suffix.split("/") for source in named]
    names: list[str] = []
    for parts in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-parts:]).strip("/") for path in paths]
        if len(set(names)) == len(names):
            break
    return [f"{name}/".encode(errors="backslashreplace").decode() for name in names]  # a path need not be UTF-8


def _index_source(
    source: Source, prefix: str, settings: PairsConfig, index: Path | None, cache_dir: Path, bar: log.Bar
) -> IndexedSource:
    local = _file_of(source, settings, cache_dir)
    scan = source.format.scan(local, settings)
    batches = _with_progress(_not_empty(_with_prefix(scan.batches, prefix), source), source.name, bar)
    if index is None:
        in_memory = tuple(batches)
        rows = tuple(batch.num_rows for batch in in_memory)
        return IndexedSource(source.format, local, prefix, rows, None, in_memory)

    identity = [_VERSION, source.format.kind, str(local.path), prefix, *scan.identity]
    file = index.absolute() / f"{local.path.name[:40]}-{_digest(identity)}.arrow"
    schema = scan.schema or source.format.schema
    if not _usable(file, schema):
        _write(file, schema, batches)

    numbers = range(_open_index(str(file)).num_record_batches)
    rows = tuple(_mapped_batch((str(file), number)).num_rows for number in numbers)
    return IndexedSource(source.format, local, prefix, rows, str(file))


def _with_prefix(batches: Iterable[pa.RecordBatch], prefix: str) -> Generator[pa.RecordBatch]:
    for batch in batches:
        if prefix:
            keys = [prefix + key for key in batch.column("key").to_pylist()]
            columns = {"key": keys, "key_hash": [key_hash(key) for key in keys]}
            for name, values in columns.items():
                at = batch.schema.get_field_index(name)
                batch = batch.set_column(at, batch.schema.field(at), pa.array(values, batch.schema.field(at).type))
        yield batch


def _not_empty(batches: Iterable[pa.RecordBatch], source: Source) -> Generator[pa.RecordBatch]:
    """The batches that have rows.

    Raises:
        EmptySourceError: None has.
    """
    empty = True
    for batch in batches:
        if batch.num_rows:
            empty = False
            yield batch
    if empty:
        raise EmptySourceError(
            f"{source.name}: an empty {source.format.kind}, without a single pair.",
            fix=f"Give sources that hold images (.{', .'.join(EXTENSIONS)}) with captions.",
        )


def _file_of(source: Source, settings: PairsConfig, cache_dir: Path) -> SourceFile:
    """The file of a source, where it can be read."""
    if source.path is not None:
        return SourceFile.of(source.name, source.path)
    if source.remote is None:
        return SourceFile.of(source.name, _fetched(source, settings, cache_dir))
    if source.remote.by_range and source.format.reads_ranges(path_of(source.name)):
        return SourceFile.elsewhere(source.name, source.remote, cache_dir)
    return SourceFile.of(source.name, copies.of_file(source.remote, cache_dir), remote=source.remote)


def _fetched(source: Source, settings: PairsConfig, cache_dir: Path) -> Path:
    """The local copy of what a command brings; it is kept only when a scan shows that it is whole."""

    def scan_all(part: Path) -> None:
        try:
            for _ in source.format.scan(SourceFile.of(source.name, part), settings).batches:
                pass
        except EmptySourceError as error:
            if not part.stat().st_size:  # nothing came, which is not an empty shard
                raise DataError(error.problem, fix=error.fix) from error

    path = fetching.cached_path(source.name, cache_dir / "shards")
    if not path.exists():
        fetching.fetch(source.name, path, check=scan_all)
    return path


def _with_progress(batches: Iterable[pa.RecordBatch], name: str, bar: log.Bar) -> Generator[pa.RecordBatch]:
    """The batches; a source with many shows a progress bar."""
    rows = 0
    for batch in batches:
        yield batch
        rows += batch.num_rows
        bar.advance(0, note=f"{rows:,} rows of {name}")


def _usable(path: Path, schema: pa.Schema) -> bool:
    if not path.exists():
        return False
    try:
        status = path.stat()
        if _is_whole(str(path), status.st_size, status.st_mtime_ns) and _open_index(str(path)).schema.equals(schema):
            return True
        problem = "its checksum is wrong"
    except (pa.ArrowException, OSError) as error:
        problem = str(error)
    log.warn(f"{path}: this index cannot be read ({problem}); it is made again")
    return False


@lru_cache(maxsize=MANY)
def _is_whole(path: str, bytes: int, mtime_ns: int) -> bool:
    """Whether the checksum at the end of an index file of that size and time is that of the rest."""
    mapped = _mapped(path)
    return bytes > _CHECKSUM_BYTES and _checksum(mapped[:-_CHECKSUM_BYTES]) == mapped[-_CHECKSUM_BYTES:].to_pybytes()


def _checksum(data: pa.Buffer) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES)


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with atomic_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        checksum = _checksum(_mapped(str(temporary)))
        with open(temporary, "ab") as file:
            file.write(checksum)
    for cached in (_open_index, _mapped_batch):
        cached.clear()  # it may hold the file that was there before
    _is_whole.cache_clear()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


class PairIndex:
    """All indexed rows as one sequence; holds no object per row, and pickles small."""

    def __init__(self, indexed: tuple[IndexedSource, ...]) -> None:
        self.sources = indexed
        self.batches = [(number, part) for number, source in enumerate(indexed) for part in range(len(source.rows))]
        """For each shard the number of its source, and of its batch there."""
        rows = [count for source in indexed for count in source.rows]
        self.first_row = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows, dtype=np.int64)])
        """For each shard its first row; then the number of all rows."""

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def source(self, shard: int) -> IndexedSource:
        return self.sources[self.batches[shard][0]]

    def batch(self, shard: int) -> pa.RecordBatch:
        source, number = self.batches[shard]
        return self.sources[source].batch(number)

    def locate(self, row: int) -> tuple[int, int]:
        """The shard of a row, and the row's place in it."""
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return shard, row - int(self.first_row[shard])

    def key(self, row: int) -> str:
        shard, place = self.locate(row)
        return self.batch(shard).column("key")[place].as_py()

    def hashes(self) -> Iterator[UInt64[np.ndarray, " _"]]:
        """The key hashes of shard after shard."""
        for shard in range(len(self.batches)):
            yield self.batch(shard).column("key_hash").to_numpy()

    def may_have_captions(self) -> bool:
        """Whether a row has no problem, and so files or cells with captions, which may still be empty."""
        return any(self.batch(shard).column("problem").null_count for shard in range(len(self.batches)))

    def known_bad(self, index: Path | None, *, captions_are_optional: bool) -> dict[int, str]:
        """Rows that cannot be used, and why, as the index alone shows; the list is kept in the folder `index`."""
        if index is None:
            return self._find_bad(captions_are_optional)

        names = [Path(source.index or "").name for source in self.sources]
        path = index / f"known-bad-{_digest([*names, *['captions: optional'] * captions_are_optional])}.arrow"
        if not _usable(path, _BAD_SCHEMA):
            bad = self._find_bad(captions_are_optional)
            columns = {"row": list(bad), "reason": list(bad.values())}
            _write(path, _BAD_SCHEMA, [pa.RecordBatch.from_pydict(columns, schema=_BAD_SCHEMA)])

        listed = _mapped_batch((str(path), 0))
        return dict(zip(listed.column("row").to_pylist(), listed.column("reason").to_pylist(), strict=True))

    def _find_bad(self, captions_are_optional: bool) -> dict[int, str]:
        bad: dict[int, str] = {}
        for row, first in duplicate_keys(self.hashes, len(self), self.key).items():
            bad[row] = f"{DUPLICATE}, first used by row {first:,}"

        for shard in range(len(self.batches)):
            problems = self.batch(shard).column("problem")
            for place in np.flatnonzero(problems.is_valid().to_numpy(zero_copy_only=False)).tolist():
                problem: str = problems[place].as_py()
                if not (captions_are_optional and problem.startswith(NO_CAPTION)):
                    bad[int(self.first_row[shard]) + place] = problem
        return dict(sorted(bad.items()))


def duplicate_keys(
    hashes: Callable[[], Iterable[UInt64[np.ndarray, " _"]]],
    rows: int,
    key: Callable[[int], str],
) -> dict[int, int]:
    """Each row whose key an earlier row has, with the first such row.

    Hashes say where to look, the keys themselves decide. Each pass takes the hashes of one range of values, so memory
    is bounded however many rows there are.
    """
    passes = max(1, math.ceil(rows / _ROWS_PER_PASS))
    edges = [number * (1 << 64) // passes for number in range(passes + 1)]
    first_of: dict[int, int] = {}

    for low, high in itertools.pairwise(edges):
        values, numbers = _hashes_between(hashes(), low, high - 1)
        order = np.argsort(values, kind="stable")
        values, numbers = values[order], numbers[order]

        # Runs of equal hashes: `again` holds every place of a run but its first.
        again = np.flatnonzero(values[1:] == values[:-1]) + 1
        for group in np.split(again, np.flatnonzero(np.diff(again) > 1) + 1):
            if len(group):
                same_hash = numbers[group[0] - 1 : group[-1] + 1].tolist()
                first_of |= _later_rows(same_hash, key)
    return first_of


def _hashes_between(
    blocks: Iterable[UInt64[np.ndarray, " _"]], low: int, high: int
) -> tuple[UInt64[np.ndarray, " chosen"], Int64[np.ndarray, " chosen"]]:
    """The hashes from `low` to `high`, both included, and their row numbers."""
    values, numbers, first = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for block in blocks:
        chosen = np.flatnonzero((block >= np.uint64(low)) & (block <= np.uint64(high)))
        values.append(block[chosen])
        numbers.append(chosen + first)
        first += len(block)
    return np.concatenate(values), np.concatenate(numbers)


def _later_rows(rows: list[int], key: Callable[[int], str]) -> dict[int, int]:
    first_row: dict[str, int] = {}
    firsts = {row: first_row.setdefault(key(row), row) for row in rows}
    return {row: first for row, first in firsts.items() if row != first}
