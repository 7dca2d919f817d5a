"""Tables of image paths and captions, and folders of images with .txt files, as rows that can be read at random."""

import difflib
import json
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from clip_cid.data.pairs.tars import IMAGE_EXTENSIONS, key_hash, readable_key
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

SHARD_ROWS = 10_000  # tables and folders are cut into shards of so many rows, so that embedding can resume

_COMMON = [("key", pa.string()), ("key_hash", pa.uint64()), ("problem", pa.string()), ("image", pa.binary())]
TABLE_SCHEMA = pa.schema([*_COMMON, ("captions", pa.list_(pa.binary())), ("fields", pa.list_(pa.string()))])
FOLDER_SCHEMA = pa.schema([*_COMMON, ("caption_file", pa.binary()), ("bytes", pa.int64())])


@dataclass(frozen=True)
class ListedImage:
    """An image of a folder, and the .txt of the same name if there is one; paths are relative to the folder."""

    image: str
    caption_file: str | None
    bytes: int
    """Of both files."""
    mtime_ns: int
    """The later of the two."""


@dataclass(frozen=True)
class Listing:
    """What is under a folder."""

    images: list[ListedImage]
    linked_folders: int
    """Not followed, since links can go round in circles."""
    texts_alone: list[str]
    """Files .txt without an image of their name."""


def field_text(value: Any) -> str:
    """A json or table value as the text that is kept of it; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace").decode()  # json can spell half a character, which no file can hold


def scan_table(path: Path, name: str, settings: PairsConfig) -> Generator[pa.RecordBatch]:
    """The table's rows in their order, in batches of `SHARD_ROWS`.

    Raises:
        DataError: The table cannot be read, lacks a column, or a column is not of text.
    """
    columns = list(dict.fromkeys([settings.image_column, settings.caption_column, *settings.keep_fields]))
    if settings.key_column is not None and settings.key_column not in columns:
        columns.append(settings.key_column)
    try:
        found, batches = _open_csv(path, columns) if path.suffix.lower() != ".parquet" else _open_parquet(path, columns)
        _check_columns(name, found, columns, settings)
        for batch in _rebatch(batches):
            yield _table_rows(batch, settings)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{name}: this table cannot be read ({' '.join(str(error).split())}).",
            fix="Check that it is whole, and of the kind its name says (.csv: commas, .tsv: tabs, .parquet).",
        ) from error


def list_folder(path: Path) -> Listing:
    """Every image under `path`, sorted by its path; hidden files and folders are left out.

    Raises:
        DataError: A folder cannot be read.
    """
    images: dict[str, os.stat_result] = {}
    texts: dict[str, os.stat_result] = {}
    try:
        linked = _walk(path, "", images, texts)
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error}).", fix="Check its permissions.") from error
    rows: list[ListedImage] = []
    for image in sorted(images):
        caption_file = os.path.splitext(image)[0] + ".txt"
        stats = [images[image], *([texts[caption_file]] if caption_file in texts else [])]
        rows.append(
            ListedImage(
                image=image,
                caption_file=caption_file if caption_file in texts else None,
                bytes=sum(status.st_size for status in stats),
                mtime_ns=max(status.st_mtime_ns for status in stats),
            )
        )
    used = {row.caption_file for row in rows}
    return Listing(rows, linked, sorted(text for text in texts if text not in used))


def folder_rows(images: list[ListedImage]) -> Generator[pa.RecordBatch]:
    """The index of a listed folder, in batches of `SHARD_ROWS`; a key is the path without its extension."""
    for start in range(0, len(images), SHARD_ROWS):
        columns: dict[str, list[object]] = {column: [] for column in FOLDER_SCHEMA.names}
        for listed in images[start : start + SHARD_ROWS]:
            key, problem = readable_key(os.fsencode(os.path.splitext(listed.image)[0]))
            columns["key"].append(key)
            columns["key_hash"].append(key_hash(key))
            columns["problem"].append(problem if listed.caption_file else "no caption (.txt beside the image)")
            columns["image"].append(os.fsencode(listed.image))
            columns["caption_file"].append(os.fsencode(listed.caption_file) if listed.caption_file else None)
            columns["bytes"].append(listed.bytes)
        yield pa.RecordBatch.from_pydict(columns, schema=FOLDER_SCHEMA)


def _walk(root: Path, below: str, images: dict[str, os.stat_result], texts: dict[str, os.stat_result]) -> int:
    """Collect the files under `root/below`; returns how many linked folders were passed over."""
    linked = 0
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = below + entry.name
            suffix = os.path.splitext(name)[1].lower()
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                linked += _walk(root, name + "/", images, texts)
            elif entry.is_dir():
                linked += 1
            elif suffix.removeprefix(".") in IMAGE_EXTENSIONS and (entry.is_file() or entry.is_symlink()):
                # a link that leads nowhere keeps its row and is counted as a broken image
                images[name] = entry.stat(follow_symlinks=entry.is_file())
            elif suffix == ".txt" and entry.is_file():
                texts[name] = entry.stat()
    return linked


def _open_csv(path: Path, columns: list[str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """As bytes: text that is not UTF-8 costs its own row, not the table."""
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
        found = reader.schema
    if any(column not in found.names for column in columns):
        return found, iter(())
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns, column_types={column: pa.binary() for column in columns}, strings_can_be_null=False
    )
    return found, iter(pyarrow.csv.open_csv(path, parse_options=parse, convert_options=convert))


def _open_parquet(path: Path, columns: list[str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    return file.schema_arrow, file.iter_batches(batch_size=SHARD_ROWS, columns=columns)


def _check_columns(name: str, found: pa.Schema, columns: list[str], settings: PairsConfig) -> None:
    for column in columns:
        if found.names.count(column) == 1:
            continue
        problem = "is there more than once" if column in found.names else "is not there"
        near = difflib.get_close_matches(column, found.names, n=1)
        hint = f"did you mean {near[0]}? " if near and near[0] != column else ""
        raise DataError(
            f"{name}: column {column!r} {problem}; the table has {', '.join(found.names)}.",
            fix=f"{hint}Set pairs.image_column, pairs.caption_column, pairs.key_column and pairs.keep_fields to columns of it.",
        )
    if name.lower().endswith(".parquet"):
        image, caption = (found.field(column).type for column in (settings.image_column, settings.caption_column))
        if not _is_text(image):
            raise DataError(
                f"{name}: column {settings.image_column!r} is of type {image}, not image paths.",
                fix="Set pairs.image_column to the column with the paths of the image files.",
            )
        if not (_is_text(caption) or (_is_list(caption) and _is_text(caption.value_type))):
            raise DataError(
                f"{name}: column {settings.caption_column!r} is of type {caption}, not text or lists of text.",
                fix="Set pairs.caption_column to the column with the captions.",
            )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _rebatch(batches: Iterable[pa.RecordBatch]) -> Generator[pa.Table]:
    """The same rows in tables of `SHARD_ROWS`, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, SHARD_ROWS - rows)
            batch = batch.slice(part.num_rows)
            waiting.append(part)
            rows += part.num_rows
            if rows == SHARD_ROWS:
                yield pa.Table.from_batches(waiting)
                waiting, rows = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def _table_rows(table: pa.Table, settings: PairsConfig) -> pa.RecordBatch:
    images = table.column(settings.image_column).to_pylist()
    captions = table.column(settings.caption_column).to_pylist()
    keys = images if settings.key_column is None else table.column(settings.key_column).to_pylist()
    kept = [table.column(column).to_pylist() for column in settings.keep_fields]
    columns: dict[str, list[object]] = {column: [] for column in TABLE_SCHEMA.names}
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        key, problem = readable_key(_bytes(keys[row]))
        texts = [_bytes(text) for text in (caption if isinstance(caption, list) else [caption]) if text is not None]
        if not image:
            problem = f"no image (empty {settings.image_column})"
        elif not texts:
            problem = f"no caption (empty {settings.caption_column})"
        columns["key"].append(key)
        columns["key_hash"].append(key_hash(key))
        columns["problem"].append(problem)
        columns["image"].append(_bytes(image))
        columns["captions"].append(texts)
        columns["fields"].append([field_text(values[row]) for values in kept])
    return pa.RecordBatch.from_pydict(columns, schema=TABLE_SCHEMA)


def _bytes(value: object) -> bytes:
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode()
