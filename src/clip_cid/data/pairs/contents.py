"""What pairs hold: a digest of each shard's keys, images, captions and kept fields, wherever the files lie.

The embed stage reads all of it anyway and keeps the digests as it goes. Later, files of the same names, bytes and
times are taken for the same; others are read again, and their digests decide.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from clip_cid import log
from clip_cid.data.pairs.pair import BadSample, Pair
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.file_digests import FileDigests, digest
from clip_cid.recipe import PairsConfig


class RowDigest(NamedTuple):
    """Two digests of a row, as bytes."""

    row: bytes
    with_fields: bytes


def state_of_pairs(settings: PairsConfig, *, index: Path | None, cache_dir: Path | None) -> str:
    """A digest of names, bytes and times (elsewhere versions) of all files behind the pairs.

    Of what a command brings it is the command.

    Raises:
        DataError: As `open_pairs`.
    """
    sources = find_sources(settings)
    if any(source.format.refers_to_files for source in sources):
        pairs = open_pairs(settings, index=index, cache_dir=cache_dir)
        return digest([pairs.shard_state(number) for number in range(len(pairs.shards))])
    return digest([[source.state for source in sources], settings.reading])


def addresses_of_pairs(settings: PairsConfig) -> str:
    """What earlier versions took for the contents of pairs that lie elsewhere."""
    return digest([[source.name for source in find_sources(settings)], settings.reading])


def contents_of_pairs(
    settings: PairsConfig, digests: FileDigests, *, index: Path | None, cache_dir: Path | None
) -> str:
    """A digest of every key, image and caption in their order. Only shards that are not known are read.

    Of what a command brings, the commands stand for the contents.

    Raises:
        DataError: As `open_pairs`.
    """
    state = state_of_pairs(settings, index=index, cache_dir=cache_dir)
    if any(source.path is None and source.remote is None for source in find_sources(settings)):
        return state
    if (contents := digests.recall(state)) is None:
        pairs = open_pairs(settings, index=index, cache_dir=cache_dir)
        contents = contents_of_shards(read_contents(pairs, digests))
        digests.keep(state, contents)
    return contents


def contents_of_shards(contents: list[str]) -> str:
    """The contents of pairs, given those of their shards in order."""
    return digest(contents)


def read_contents(pairs: Pairs, digests: FileDigests) -> list[str]:
    """The contents of each shard; those that are not known are read, with a progress bar."""
    contents = [digests.recall(pairs.shard_state(number)) for number in range(len(pairs.shards))]
    unknown = sum(shard.rows for shard, known in zip(pairs.shards, contents, strict=True) if known is None)
    with log.progress("read", unknown, unit="pairs") as bar:
        return [
            shard_contents(pairs, number, digests, bar).with_fields if known is None else known
            for number, known in enumerate(contents)
        ]


class ShardContents(NamedTuple):
    """Two digests of a shard."""

    rows: str
    """Of keys, images and captions: all that decides the embeddings."""
    with_fields: str
    """Of these and the kept fields."""


def shard_contents(pairs: Pairs, number: int, digests: FileDigests, bar: log.Bar | None = None) -> ShardContents:
    """The contents of one shard, read if they are not known."""
    if (known := recall_contents(pairs, number, digests)) is not None:
        return known

    reading, shard = ContentsInProgress(), pairs.shards[number]
    for row in range(shard.first_row, shard.first_row + shard.rows):
        reading.add(row_digest(pairs, row))
        if bar is not None:
            bar.advance(1)
    return reading.keep(pairs, number, digests)


def recall_contents(pairs: Pairs, number: int, digests: FileDigests) -> ShardContents | None:
    """The contents of one shard, if they are known."""
    rows, with_fields = (digests.recall(state) for state in _states(pairs, number))
    return None if rows is None or with_fields is None else ShardContents(rows, with_fields)


class ContentsInProgress:
    """The contents of a shard whose rows are read one after the other."""

    def __init__(self) -> None:
        self._rows, self._with_fields = hashlib.sha256(), hashlib.sha256()

    def add(self, row: RowDigest) -> None:
        self._rows.update(row.row)
        self._with_fields.update(row.with_fields)

    @property
    def of_rows(self) -> str:
        """The digest of keys, images and captions so far."""
        return self._rows.hexdigest()

    @property
    def of_shard(self) -> ShardContents:
        """The contents of a shard, all of whose rows were added."""
        return ShardContents(self._rows.hexdigest(), self._with_fields.hexdigest())

    def keep(self, pairs: Pairs, number: int, digests: FileDigests) -> ShardContents:
        """Remember the contents of a shard, all of whose rows were added."""
        keep_contents(pairs, number, self.of_shard, digests)
        return self.of_shard


def keep_contents(pairs: Pairs, number: int, contents: ShardContents, digests: FileDigests) -> None:
    """Remember the contents of a shard that were read elsewhere."""
    for state, digest_of_all in zip(_states(pairs, number), contents, strict=True):
        digests.keep(state, digest_of_all)


def _states(pairs: Pairs, number: int) -> tuple[str, str]:
    return pairs.shard_state(number, fields=False), pairs.shard_state(number)


def row_digest(pairs: Pairs, row: int) -> RowDigest:
    """The digests of a row, which is read for it."""
    try:
        return digest_of_pair(pairs.key(row), pairs.read(row))
    except BadSample:
        return digest_of_pair(pairs.key(row), None)


def digest_of_pair(key: str, pair: Pair | None) -> RowDigest:
    """The digests of a row; without a pair, of one that cannot be read."""
    if pair is None:
        alone = _digest_of([key.encode()])
        return RowDigest(alone, alone)
    row = _digest_of([key.encode(), pair.image, *(caption.encode() for caption in pair.captions)])
    fields = [part.encode() for field in sorted(pair.fields.items()) for part in field]
    return RowDigest(row, _digest_of([row, *fields]) if fields else row)


def _digest_of(parts: list[bytes]) -> bytes:
    whole = hashlib.sha256(len(parts).to_bytes(8))
    for part in parts:
        whole.update(len(part).to_bytes(8))
        whole.update(part)
    return whole.digest()
