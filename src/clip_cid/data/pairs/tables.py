"""Tables (.csv, .tsv, .parquet) of image paths and captions."""

import difflib
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from clip_cid.data.pairs.format import COMMON_COLUMNS, SHARD_ROWS, LocalSource, PairFormat, Scan
from clip_cid.data.pairs.pair import Pair
from clip_cid.data.pairs.sample_parts import clean_captions, field_text, key_hash, read_file, readable_key
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig


class Tables(PairFormat):
    """A pair is a row: the path of an image, relative to the table, and one caption or a list of them."""

    kind = "table"
    examples = "one .csv, .tsv or .parquet table"
    refers_to_files = True
    schema = pa.schema(
        [
            *COMMON_COLUMNS,
            ("image", pa.binary()),
            ("captions", pa.list_(pa.binary())),
            ("fields", pa.list_(pa.string())),
        ]
    )

    def owns(self, path: Path, settings: PairsConfig) -> bool:
        return path.name.lower().endswith((".csv", ".tsv", ".parquet"))

    def scan(self, source: LocalSource, settings: PairsConfig) -> Scan:
        columns = [settings.image_column, settings.caption_column, settings.key_column, settings.keep_fields]
        return Scan([source.bytes, source.mtime_ns, *columns], _scan_table(source.path, source.name, settings))

    def read(self, source: LocalSource, row: dict[str, Any], settings: PairsConfig) -> Pair:
        image = read_file(source.path.parent, row["image"], "image")
        fields = dict(zip(settings.keep_fields, row["fields"], strict=True))
        return Pair(row["key"], image, clean_captions(row["captions"]), fields)

    def files_of(self, source: LocalSource, rows: pa.RecordBatch) -> list[Path]:
        return [source.path.parent / os.fsdecode(image) for image in rows.column("image").to_pylist()]

    def image_name(self, row: dict[str, Any]) -> str:
        return os.fsdecode(row["image"])


def _scan_table(path: Path, name: str, settings: PairsConfig) -> Generator[pa.RecordBatch]:
    """The table's rows in their order, in batches of `SHARD_ROWS`.

    Raises:
        DataError: The table cannot be read, lacks a column, or a column is not of text.
    """
    columns = list(dict.fromkeys([settings.image_column, settings.caption_column, *settings.keep_fields]))
    if settings.key_column is not None and settings.key_column not in columns:
        columns.append(settings.key_column)

    open_table = _open_parquet if path.suffix.lower() == ".parquet" else _open_csv
    try:
        schema, batches = open_table(path, columns)
        _check_columns(name, schema, columns, settings)
        for table in _rebatch(batches):
            yield _index_rows(table, settings)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{name}: this table cannot be read ({' '.join(str(error).split())}).",
            fix="Check that it is whole, and of the kind its name says (.csv: commas, .tsv: tabs, .parquet).",
        ) from error


def _open_csv(path: Path, columns: list[str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Cells are read as bytes: text that is not UTF-8 makes its own row bad, not the table."""
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
        schema = reader.schema
    if any(column not in schema.names for column in columns):
        return schema, iter(())

    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns, column_types={column: pa.binary() for column in columns}, strings_can_be_null=False
    )
    return schema, iter(pyarrow.csv.open_csv(path, parse_options=parse, convert_options=convert))


def _open_parquet(path: Path, columns: list[str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    return file.schema_arrow, file.iter_batches(batch_size=SHARD_ROWS, columns=columns)


def _check_columns(name: str, schema: pa.Schema, columns: list[str], settings: PairsConfig) -> None:
    """Every column is there once; in Parquet, which has types, images and captions are text."""
    for column in columns:
        if schema.names.count(column) == 1:
            continue
        problem = "is there more than once" if column in schema.names else "is not there"
        near = difflib.get_close_matches(column, schema.names, n=1)
        hint = f"did you mean {near[0]}? " if near and near[0] != column else ""
        raise DataError(
            f"{name}: column {column!r} {problem}; the table has {', '.join(schema.names)}.",
            fix=f"{hint}Set pairs.image_column, pairs.caption_column, pairs.key_column and pairs.keep_fields to"
            " columns of it.",
        )

    if not name.lower().endswith(".parquet"):
        return
    image, caption = (schema.field(column).type for column in (settings.image_column, settings.caption_column))
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
    rows = 0  # of those that wait

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


def _index_rows(table: pa.Table, settings: PairsConfig) -> pa.RecordBatch:
    """The rows of the index for some rows of the table."""
    images = table.column(settings.image_column).to_pylist()
    captions = table.column(settings.caption_column).to_pylist()
    keys = images if settings.key_column is None else table.column(settings.key_column).to_pylist()
    fields = [table.column(column).to_pylist() for column in settings.keep_fields]

    columns: dict[str, list[object]] = {column: [] for column in Tables.schema.names}
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
        columns["fields"].append([field_text(values[row]) for values in fields])
    return pa.RecordBatch.from_pydict(columns, schema=Tables.schema)


def _bytes(value: object) -> bytes:
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode()
