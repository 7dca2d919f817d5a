"""WebDataset tars: where each sample's image, text and JSON lie, read from the headers alone.

Nothing is extracted: a sample is read by its byte range, so the tar must be plain (not compressed) and whole.
"""

import re
import tarfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from clip_cid.data.pairs.format import COMMON_COLUMNS, EmptySourceError, Member, PairFormat, Scan, SourceFile
from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.pairs.indexed_files import bytes_at, opened
from clip_cid.data.pairs.pair import NO_CAPTION, BadSample, Pair
from clip_cid.data.pairs.plain_tar import FETCH_AGAIN, plain_files, plain_files_in
from clip_cid.data.pairs.sample_parts import (
    clean_captions,
    field_text,
    json_object,
    key_hash,
    key_in_json,
    readable_key,
)
from clip_cid.recipe import PairsConfig

METADATA = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset skips, such as all of __meta__/."""

_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ABSENT = -1
_MOST_NAMED = 8  # fields of a .json in a message


class Tars(PairFormat):
    """A pair is a run of members of one key: an image, and a .txt or .json with its captions."""

    kind = "tar"
    examples = ".tar shards"
    sample = (
        "An image and its caption share their name up to its first dot, and follow each other in the tar"
        " (tar --sort=name)"
    )
    schema = pa.schema(
        [
            *COMMON_COLUMNS,
            *((f"{part}_{what}", pa.int64()) for part in ("image", "text", "json") for what in ("at", "size")),
        ]
    )
    has_members = True

    def owns(self, path: Path, settings: PairsConfig) -> bool:
        return path.name.lower().endswith(_SUFFIXES)  # compressed ones too, which `plain_files` refuses with a reason

    def reads_ranges(self, name: str) -> bool:
        return True

    def scan(self, source: SourceFile, settings: PairsConfig) -> Scan:
        field = settings.key_field
        whole = (scan_tar(tar, key_field=field) for tar in [source])  # lazy; a tar is one shard
        return Scan([*source.identity, *([] if field is None else [field])], whole)

    def read(self, source: SourceFile, row: dict[str, Any], settings: PairsConfig) -> Pair:
        image, text, described = (_part(source, row, part) for part in ("image", "text", "json"))
        if image is None:
            raise AssertionError("a sample without image is known to be bad")

        fields, captions, remark = dict[str, Any](), tuple[str, ...](), ""
        try:
            if described is not None:
                fields = json_object(described)
                optional = settings.captions_are_optional and text is None
                captions = _json_captions(fields, settings.captions_field, optional=optional)
        except BadSample as error:
            if text is None:
                raise
            remark = f"the .txt is used alone: {error.reason}"

        if not captions and not (text is None and settings.captions_are_optional):
            if text is None:
                there = f"; it has {', '.join(list(fields)[:_MOST_NAMED])}" if fields else ""
                raise BadSample(f"{NO_CAPTION} (no .txt, and no json field {settings.captions_field!r}{there})")
            captions = _text_captions(text, fields, optional=settings.captions_are_optional)
            remark = remark or ("each line of the .txt is a caption" if len(captions) > 1 else "")
        kept = {name: field_text(fields.get(name)) for name in settings.keep_fields}
        return Pair(row["key"], image, captions, kept, remark)

    def shard_name(self, source: SourceFile, number: int) -> str:
        return source.name

    def members(self, source: SourceFile, places: Sequence[int]) -> Generator[list[Member]]:
        wanted = iter(places)
        next_wanted = next(wanted)
        for place, (_, members) in enumerate(_samples(source)):
            if place == next_wanted:
                yield [(member.name, bytes_at(source, member.offset_data, member.size)) for member in members.values()]
                if (next_wanted := next(wanted, None)) is None:
                    break


def scan_tar(source: SourceFile, *, key_field: str | None = None) -> pa.RecordBatch:
    """One row per sample, in tar order; consecutive members of one key (WebDataset's rule) are one sample.

    A member whose key and extension the sample already has begins another sample, of a then duplicate key.

    Args:
        source: The tar.
        key_field: The json field with the key, where it is not the name of the members.

    Raises:
        DataError: The tar is compressed, empty, damaged, cut short, or holds links or names that leave the folder.
    """
    columns: dict[str, list[object]] = {column: [] for column in Tars.schema.names}
    for stem, members in _samples(source):
        key, problem = readable_key(stem.encode(errors="surrogateescape"))
        if key_field is not None:
            described = members.get("json")
            data = None if described is None else bytes_at(source, described.offset_data, described.size)
            key, problem = key_in_json(data, key_field)
        for column, value in _row(key, problem, members).items():
            columns[column].append(value)

    batch = pa.RecordBatch.from_pydict(columns, schema=Tars.schema)
    if not batch.num_rows:
        raise EmptySourceError(
            f"{source.name}: an empty shard, {source.bytes:,} bytes without a sample.", fix=FETCH_AGAIN
        )
    return batch


def _samples(source: SourceFile) -> Generator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The key and the members (by extension, in lower case) of each sample.

    Raises:
        DataError: As `scan_tar`.
    """
    sample_key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in _plain_files(source):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or METADATA.match(member.name):
            continue  # hidden, without an extension, or metadata: no part of a sample for webdataset either

        key, extension = folder + slash + stem, extension.lower()
        if sample_key is not None and (key != sample_key or extension in members):
            yield sample_key, members
            members = {}
        sample_key = key
        members[extension] = member

    if sample_key is not None:
        yield sample_key, members


def _plain_files(source: SourceFile) -> Generator[tarfile.TarInfo]:
    """Elsewhere, too, a tar is read from its start to its end: its headers lie between the images."""
    if source.cache is None:
        yield from plain_files(source.path, source.name)
    else:
        with opened(source) as tar:
            yield from plain_files_in(tar, source.bytes, source.name)


def _row(key: str, problem: str | None, members: dict[str, tarfile.TarInfo]) -> dict[str, object]:
    """A sample's row of the index."""
    image = next((members[extension] for extension in EXTENSIONS if extension in members), None)
    text, described = members.get("txt"), members.get("json")
    if image is None:
        holds = ", ".join(f".{extension}" for extension in members)
        problem = f"no image (holds {holds}; images are .{', .'.join(EXTENSIONS)})"
    elif text is None and described is None:
        problem = problem or f"{NO_CAPTION} (.txt or .json)"

    row: dict[str, object] = {"key": key, "key_hash": key_hash(key), "problem": problem}
    for part, member in {"image": image, "text": text, "json": described}.items():
        row[f"{part}_at"] = _ABSENT if member is None else member.offset_data
        row[f"{part}_size"] = _ABSENT if member is None else member.size
    return row


def _json_captions(fields: dict[str, Any], captions_field: str, *, optional: bool) -> tuple[str, ...]:
    """The captions of the json; none where it does not have the field."""
    captions = fields.get(captions_field)
    if captions is not None and not isinstance(captions, str | list):
        raise BadSample(f"json field {captions_field!r} holds a {type(captions).__name__}, not captions")
    texts = [captions] if isinstance(captions, str) else captions
    return clean_captions(texts, optional=optional) if texts else ()


def _text_captions(text: bytes, fields: dict[str, Any], *, optional: bool) -> tuple[str, ...]:
    """A caption a line, as in CLIP_benchmark's retrieval sets; one in all where a json field holds the same text.

    The latter is how img2dataset writes a caption with line ends.
    """
    lines = text.splitlines()
    if len(lines) > 1:
        words = text.decode("utf-8-sig", errors="replace").split()
        if any(isinstance(value, str) and value.split() == words for value in fields.values()):
            lines = [text]
    return clean_captions(lines, optional=optional)


def _part(source: SourceFile, row: dict[str, Any], part: str) -> bytes | None:
    at, size = row[f"{part}_at"], row[f"{part}_size"]
    return None if at == _ABSENT else bytes_at(source, at, size)
