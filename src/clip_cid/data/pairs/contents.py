"""What pairs hold: a digest of each shard's keys, images, captions and kept fields, wherever the files lie.

The embed stage reads all of it anyway and keeps the digests as it goes. Later, files of the same names, bytes and
times are taken for the same; others are read again, and their digests decide.
"""

import hashlib
from pathlib import Path

from clip_cid import log
from clip_cid.data.pairs.pair import BadSample, Pair
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.file_digests import FileDigests, digest, file_state
from clip_cid.recipe import PairsConfig


def state_of_pairs(settings: PairsConfig, *, index: Path | None, cache_dir: Path | None) -> str:
    """A digest of names, bytes and times of all files behind the pairs. Of a URL it is the address.

    Raises:
        DataError: As `open_pairs`.
    """
    sources = find_sources(settings)
    if any(source.format.refers_to_files for source in sources):
        pairs = open_pairs(settings, index=index, cache_dir=cache_dir)
        return digest([pairs.shard_state(number) for number in range(len(pairs.shards))])
    states = [source.name if source.path is None else file_state(source.path) for source in sources]
    return digest([states, settings.model_dump(mode="json", exclude={"source", "max_bad_share", "max_pixels"})])


def contents_of_pairs(
    settings: PairsConfig, digests: FileDigests, *, index: Path | None, cache_dir: Path | None
) -> str:
    """A digest of every key, image and caption in their order. Only shards that are not known are read.

    Raises:
        DataError: As `open_pairs`.
    """
    state = state_of_pairs(settings, index=index, cache_dir=cache_dir)
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
            shard_contents(pairs, number, digests, bar) if known is None else known
            for number, known in enumerate(contents)
        ]


def shard_contents(pairs: Pairs, number: int, digests: FileDigests, bar: log.Bar | None = None) -> str:
    """The contents of one shard, read if they are not known."""
    state = pairs.shard_state(number)
    if (known := digests.recall(state)) is not None:
        return known

    rows, shard = hashlib.sha256(), pairs.shards[number]
    for row in range(shard.first_row, shard.first_row + shard.rows):
        try:
            rows.update(row_digest(pairs.key(row), pairs.read(row)))
        except BadSample:
            rows.update(row_digest(pairs.key(row), None))
        if bar is not None:
            bar.advance(1)
    digests.keep(state, rows.hexdigest())
    return rows.hexdigest()


def row_digest(key: str, pair: Pair | None) -> bytes:
    """A digest of a row; without a pair, of a row that cannot be read. A shard's is the SHA-256 of its rows'."""
    parts = [key.encode()]
    if pair is not None:
        parts += [pair.image, *(caption.encode() for caption in pair.captions), b""]
        parts += [part.encode() for field in sorted(pair.fields.items()) for part in field]

    row = hashlib.sha256(len(parts).to_bytes(8))
    for part in parts:
        row.update(len(part).to_bytes(8))
        row.update(part)
    return row.digest()
