"""Tables (.csv, .tsv, .txt, .jsonl, .parquet) of captions and image paths; Parquet may hold the images themselves."""

import contextlib
import difflib
import itertools
import os
import re
import textwrap
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Bool

from clip_cid import log, units
from clip_cid.data.pairs.beside import files_beside, read_beside
from clip_cid.data.pairs.delimited import (
    DELIMITERS,
    TableFault,
    copy_rows,
    find_header,
    find_reading,
    looks_like_image,
    records,
)
from clip_cid.data.pairs.format import COMMON_COLUMNS, SHARD_ROWS, PairFormat, Scan, SourceFile
from clip_cid.data.pairs.indexed_files import opened
from clip_cid.data.pairs.json_lines import (
    Odd,
    captions_cell,
    copy_lines,
    is_json_lines,
    json_rows,
    key_cell,
    text_cell,
)
from clip_cid.data.pairs.pair import NO_CAPTION, Pair
from clip_cid.data.pairs.parquet_images import (
    COLUMNS,
    COLUMNS_OF_LISTS,
    PATH,
    Inside,
    holds_images,
    images_inside,
    is_list_of_bytes,
    path_type,
    read_image,
    warn_of_large_pages,
)
from clip_cid.data.pairs.parquet_pages import Page
from clip_cid.data.pairs.sample_parts import clean_captions, field_text, key_hash, readable_key
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig
from clip_cid.remote.contract import RemoteFile

_Cells = dict[str, list[Any]]
"""The cells of some rows, by column: bytes of text, values of Parquet and JSON; `Odd` is one of a type that is no use."""

_UNREADABLE = (pa.ArrowException, OSError, ValueError)
_LONGEST_PATH = 4096  # bytes; Linux has no longer ones
_LONGEST_NAME = 255  # of a file
_COPIED_AT_ONCE = 65_536  # rows
_BASE64_PICTURE = re.compile(rb"data:image/|/9j/|iVBORw0KGgo|UklGR|R0lGOD")  # JPEG, PNG, WebP, GIF
_CELLS = (("captions", pa.list_(pa.binary())), ("fields", pa.list_(pa.string())))
_WITH_IMAGES, _WITH_LISTS = (pa.schema([*COMMON_COLUMNS, *own, *_CELLS]) for own in (COLUMNS, COLUMNS_OF_LISTS))
"""Of the index of a table with the images inside, as bytes and as lists of bytes."""


class Tables(PairFormat):
    """A pair is a row: an image, or its path relative to the table, and one caption or a list of them."""

    kind = "table"
    examples = "a .csv, .tsv, .txt, .jsonl or .parquet table"
    sample = (
        "Each row needs an image, a caption and a key of its own: check pairs.image_column, pairs.caption_column and"
        " pairs.key_column"
    )
    refers_to_files = True
    has_rows = True
    schema = pa.schema([*COMMON_COLUMNS, ("image", pa.binary()), *_CELLS])

    def owns(self, path: Path, settings: PairsConfig) -> bool:
        return is_json_lines(path) or path.name.lower().endswith((".csv", ".tsv", ".txt", ".parquet"))

    def reads_ranges(self, name: str) -> bool:
        return name.lower().endswith(".parquet")  # what quotes mean is found by reading all of a text table

    def scan(self, source: SourceFile, settings: PairsConfig) -> Scan:
        if settings.key_field is not None:
            raise DataError(
                f"pairs.key_field: {settings.key_field!r}, but {source.name} is a table, without json fields.",
                fix="Name the column with the keys in pairs.key_column instead.",
            )
        columns = [settings.image_column, settings.caption_column, settings.key_column, settings.keep_fields]
        columns.append(settings.repeated_rows)
        identity = [*source.identity, *columns]
        if (schema := _schema_of_images_inside(source, settings)) is not None:
            return Scan([*identity, "images inside"], _scan_table(source, settings), schema)
        return Scan(identity, _scan_table(source, settings))

    def read(self, source: SourceFile, row: dict[str, Any], settings: PairsConfig) -> Pair:
        path = row.get("image")
        image = read_image(source, row, settings.image_column) if path is None else read_beside(source, path, "image")
        fields = dict(zip(settings.keep_fields, row["fields"], strict=True))
        captions = clean_captions(row["captions"], optional=settings.captions_are_optional)
        return Pair(row["key"], image, captions, fields)

    def files_of(self, source: SourceFile, rows: pa.RecordBatch) -> list[Path | RemoteFile]:
        if "image" not in rows.schema.names:
            return []
        return files_beside(source, rows.column("image").to_pylist())

    def image_name(self, row: dict[str, Any]) -> str:
        return os.fsdecode(row.get("image", b""))

    def copy_rows(self, source: SourceFile, places: Sequence[int], out: Path, settings: PairsConfig) -> None:
        changed = f"{source.name}: this table is not as it was indexed"
        if not source.is_as_indexed():
            raise DataError(f"{changed}.", fix="Bring it back, or run the embed stage again.")
        kept = np.array(places, dtype=np.int64)
        try:
            places_of_rows = np.fromiter(_places_of_rows(source, settings), dtype=np.int64)
            _copy(source, out, np.isin(places_of_rows, kept), settings)
        except (*_UNREADABLE, TableFault) as error:
            raise DataError(f"{changed} ({error}).", fix="Bring it back, or run the embed stage again.") from error


def _schema_of_images_inside(source: SourceFile, settings: PairsConfig) -> pa.Schema | None:
    """Of the index of a Parquet file that holds the images; None for other tables, and if it cannot be read."""
    if source.path.suffix.lower() != ".parquet":
        return None
    try:
        with _opened_parquet(source) as file:
            column, schema = settings.image_column, file.schema_arrow
            if schema.names.count(column) != 1 or not holds_images(file, column, _is_picture):
                return None
            return _WITH_LISTS if is_list_of_bytes(schema.field(column).type) else _WITH_IMAGES
    except _UNREADABLE:
        return None


def _scan_table(source: SourceFile, settings: PairsConfig) -> Generator[pa.RecordBatch]:
    """The table's rows in their order, in batches of `SHARD_ROWS`.

    Raises:
        DataError: The table cannot be read, lacks a column, or a column is not of text.
    """
    name = source.name
    fix = "Check that it is whole, and of the kind its name says (.csv: commas, .tsv: tabs, .jsonl, .parquet)."
    try:
        parts = _read_table(source, settings)
        parts = _without_pictures(parts, name, settings.image_column)
        for cells in _merged(parts, name, settings) if settings.repeated_rows == "merge" else parts:
            yield _index_rows(cells, source.stem, settings)
    except (*_UNREADABLE, TableFault, OverflowError) as error:
        if isinstance(error, TableFault):
            fix = error.fix or fix
        raise DataError(f"{name}: this table cannot be read ({' '.join(str(error).split())}).", fix=fix) from error


def _places_of_rows(source: SourceFile, settings: PairsConfig) -> Generator[int]:
    """For each row of a table the place of its sample in the index: rows that are merged are one sample."""
    columns, parts = _columns(settings), _read_table(source, settings)
    if settings.repeated_rows != "merge":
        yield from range(sum(len(cells[columns[0]]) for cells in parts))
        return

    samples = 0
    place_of = dict[Any, int]()
    for cells in parts:
        for values in zip(*cells.values(), strict=True):
            key, image = _sample_of(dict(zip(cells, values, strict=True)), settings)
            place = place_of.setdefault((key, image), samples) if image else samples
            samples += place == samples
            yield place


def _copy(source: SourceFile, out: Path, wanted: Bool[np.ndarray, " rows"], settings: PairsConfig) -> None:
    if source.path.suffix.lower() == ".parquet":
        _copy_parquet(source, out, wanted)
        return
    if is_json_lines(source.path):
        copy_lines(source.path, out, wanted.tolist())
        return
    delimiter, names = find_header(source.path, _delimiter(source.path), _columns(settings))
    reading = find_reading(source.path, delimiter, names, settings.image_column)
    copy_rows(source.path, out, reading, len(names), wanted.tolist())


def _copy_parquet(source: SourceFile, out: Path, wanted: Bool[np.ndarray, " rows"]) -> None:
    """With the columns, the metadata and the compression of the file."""
    with _opened_parquet(source) as file:
        codec = "NONE"
        if file.metadata.num_row_groups and file.metadata.num_columns:
            codec = file.metadata.row_group(0).column(0).compression.replace("UNCOMPRESSED", "NONE")
        with pyarrow.parquet.ParquetWriter(out, file.schema_arrow, compression=codec) as writer:
            start = 0
            for batch in file.iter_batches(_COPIED_AT_ONCE):
                own = wanted[start : start + batch.num_rows]
                start += batch.num_rows
                if own.any():
                    writer.write_batch(batch.filter(pa.array(own)))


def _columns(settings: PairsConfig) -> list[str]:
    """The columns that are read, each once."""
    columns = [settings.image_column, settings.caption_column, settings.key_column, *settings.keep_fields]
    return list(dict.fromkeys(column for column in columns if column is not None))


def _delimiter(path: Path) -> str:
    """The one that the name of a text table says."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _read_table(source: SourceFile, settings: PairsConfig) -> Generator[_Cells]:
    """The columns that are read, some rows at a time."""
    columns = _columns(settings)
    if is_json_lines(source.path):
        return _read_json_lines(source, columns, settings)
    read = _read_parquet if source.path.suffix.lower() == ".parquet" else _read_text
    return read(source, columns, settings)


def _read_json_lines(source: SourceFile, columns: list[str], settings: PairsConfig) -> Generator[_Cells]:
    """A field that a row lacks is null; one that no row has is refused at the end."""
    # A column may have two uses; then the stricter one of text comes last.
    reads = {settings.key_column: key_cell, settings.caption_column: captions_cell, settings.image_column: text_cell}
    names, rows = dict[str, None](), json_rows(source.path)
    while some := list(itertools.islice(rows, SHARD_ROWS)):
        for fields in some:
            names.update(dict.fromkeys(fields))
        yield {column: [reads.get(column, _as_it_is)(fields.get(column)) for fields in some] for column in columns}
    if names:
        _check_columns(source.name, list(names), columns, settings)


def _as_it_is(value: Any) -> Any:
    return value


def _read_text(source: SourceFile, columns: list[str], settings: PairsConfig) -> Generator[_Cells]:
    """Cells are bytes: text that is not UTF-8 makes its own row bad, not the table."""
    path, name = source.path, source.name
    delimiter, names = find_header(path, _delimiter(path), columns)
    _check_columns(name, names, columns, settings)
    reading = find_reading(path, delimiter, names, settings.image_column)
    if reading.reason:
        meaning = "letters" if reading.quotes == "letters" else "escaped by backslashes"
        log.info(f"{name}: quotes are read as {meaning}; by the rules of CSV they are broken ({reading.reason})")
    if reading.joined:
        log.info(
            f"{name}: {units.counted(reading.joined, 'quoted value')} with line ends and {DELIMITERS[delimiter]}, the"
            f" first from line {reading.first_joined:,}, each read as one; if a quote is out of place, rows are in it"
        )

    places = {column: names.index(column) for column in columns}
    rows = records(path, reading, len(names))
    while some := list(itertools.islice(rows, SHARD_ROWS)):
        yield {column: [record.cells[at].encode("latin-1") for record in some] for column, at in places.items()}


@contextlib.contextmanager
def _opened_parquet(source: SourceFile) -> Generator[pyarrow.parquet.ParquetFile]:
    """Of a file elsewhere only the footer is read, and later what is wanted of its columns."""
    with contextlib.ExitStack() as stack:
        file = source.path if source.cache is None else stack.enter_context(opened(source, in_order=False))
        yield stack.enter_context(
            pyarrow.parquet.ParquetFile(file, memory_map=True, page_checksum_verification=True)  # maps paths only
        )


def _read_parquet(source: SourceFile, columns: list[str], settings: PairsConfig) -> Generator[_Cells]:
    name = source.name
    with _opened_parquet(source) as file:
        _check_columns(name, file.schema_arrow.names, columns, settings)
        inside = holds_images(file, settings.image_column, _is_picture)
        _check_types(name, file.schema_arrow, settings, inside=inside)
        if inside:
            yield from _read_images(source, columns, settings, file)
            return
        for table in _rebatch(file.iter_batches(batch_size=SHARD_ROWS, columns=columns)):
            yield _cells_of(table, columns)


def _read_images(
    source: SourceFile, columns: list[str], settings: PairsConfig, file: pyarrow.parquet.ParquetFile
) -> Generator[_Cells]:
    """Cells of images say where these lie."""
    others = [column for column in columns if column != settings.image_column]
    images = images_inside(source, file, settings.image_column, digests=settings.repeated_rows == "merge")
    largest = 0
    with _opened_parquet(source) as beside:  # all that reads from one opened file reads as many rows at once
        batches = _rebatch(beside.iter_batches(batch_size=SHARD_ROWS, columns=others)) if others else None
        while some := list(itertools.islice(images, SHARD_ROWS)):
            largest = max(largest, *(image.bytes_read for image in some))
            yield {settings.image_column: some} | ({} if batches is None else _cells_of(next(batches), others))
    warn_of_large_pages(source.name, file, settings.image_column, largest)


def _cells_of(table: pa.Table, columns: list[str]) -> _Cells:
    return {column: _values(table.column(column)) for column in columns}


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; of text the bytes, so that text that is not UTF-8 makes its own row bad.

    Of the Hub's images without bytes they are the paths.
    """
    if path_type(column.type) is not None:
        chunks = [chunk.flatten()[chunk.type.get_field_index(PATH)] for chunk in column.chunks]
        column = pa.chunked_array(chunks, path_type(column.type))
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    elif _is_list(column.type) and _is_text(column.type.value_type):
        column = column.cast(pa.large_list(pa.large_binary()))
    return column.to_pylist()


def _without_pictures(parts: Iterable[_Cells], name: str, column: str) -> Generator[_Cells]:
    """The same parts.

    Raises:
        DataError: The column with the paths holds pictures.
    """
    for cells in parts:
        paths = (image for image in cells[column] if image and not isinstance(image, Inside))
        if pictures := [image for image in paths if _is_picture(image)]:
            raise _pictures_inside(name, column, f"such as one of {len(pictures[0]):,} bytes")
        yield cells


def _merged(parts: Iterable[_Cells], name: str, settings: PairsConfig) -> Generator[_Cells]:
    """One row for all rows of one key and image: the first, with the captions of each. The table is held in memory."""
    rows, merged = 0, list[dict[str, Any]]()
    first_of: dict[tuple[Any, Any], dict[str, Any]] = {}
    for cells in parts:
        for values in zip(*cells.values(), strict=True):
            rows += 1
            row = dict(zip(cells, values, strict=True))
            if settings.caption_column is not None:
                caption = row[settings.caption_column]
                row[settings.caption_column] = list(caption) if isinstance(caption, list) else [caption]

            key, image = _sample_of(row, settings)
            first = first_of.setdefault((key, image), row)
            if first is row or not image:
                merged.append(row)
            elif settings.caption_column is not None:
                first[settings.caption_column] += row[settings.caption_column]

    log.info(f"{name}: {rows:,} rows are {len(merged):,} pairs")
    for start in range(0, len(merged), SHARD_ROWS):
        some = merged[start : start + SHARD_ROWS]
        yield {column: [row[column] for row in some] for column in some[0]}


def _sample_of(row: Mapping[str, Any], settings: PairsConfig) -> tuple[Any, Any]:
    """Key and image of a row: rows in which both are equal are one sample, if they are merged; one without image never."""
    image = row[settings.image_column]
    key = None if settings.key_column is None else row[settings.key_column]
    if isinstance(image, Inside):
        return image.path if settings.key_column is None else key, image.digest
    return key, image


def _check_columns(name: str, names: list[str], columns: list[str], settings: PairsConfig) -> None:
    """Every column is there once."""
    for column in columns:
        if names.count(column) == 1:
            continue
        problem = "is there more than once" if column in names else "is not there"
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"did you mean {near[0]}? " if near and near[0] != column else ""
        if any(looks_like_image(other) for other in names):
            hint = "The first line of a text table names the columns. "
        alone = "; for images alone: pairs.captions: optional and pairs.caption_column: null"
        listed = textwrap.shorten(", ".join(names), 400, placeholder=" ...")
        raise DataError(
            f"{name}: column {column!r} {problem}; the table has {listed}.",
            fix=f"{hint}Set pairs.image_column, pairs.caption_column, pairs.key_column and pairs.keep_fields to"
            f" columns of it{alone if column == settings.caption_column else ''}.",
        )


def _check_types(name: str, schema: pa.Schema, settings: PairsConfig, *, inside: bool) -> None:
    """Images are bytes or paths, captions are text or lists of it, a key is one value."""
    image = schema.field(settings.image_column).type
    if not (inside or _is_text(path_type(image) or image)):
        raise DataError(
            f"{name}: column {settings.image_column!r} is of type {image}, neither images nor their paths.",
            fix="Set pairs.image_column to the column with the image files: their bytes, the Hub's struct of bytes and"
            " path, or their paths as text; one image a row.",
        )
    if settings.caption_column is not None:
        caption = schema.field(settings.caption_column).type
        if not (_is_text(caption) or (_is_list(caption) and _is_text(caption.value_type))):
            raise DataError(
                f"{name}: column {settings.caption_column!r} is of type {caption}, not text or lists of text.",
                fix="Set pairs.caption_column to the column with the captions.",
            )
    if settings.key_column is not None and pa.types.is_nested(key := schema.field(settings.key_column).type):
        raise DataError(
            f"{name}: column {settings.key_column!r} is of type {key}, not one key a row.",
            fix="Set pairs.key_column to a column of text or numbers; without it, the image path is the key.",
        )


def _pictures_inside(name: str, column: str, kind: str) -> DataError:
    return DataError(
        f"{name}: column {column!r} holds pictures ({kind}), not the paths of image files.",
        fix="Write the pictures as a column of bytes in a .parquet (base64 decoded), to files and their paths to a"
        " column, or as WebDataset tars.",
    )


def _is_picture(value: str | bytes) -> bool:
    """Whether a cell holds a picture: every format has zero bytes, which no path has, or a known start in base64."""
    data = value if isinstance(value, bytes) else value.encode(errors="replace")
    return b"\0" in data or (len(data) > _LONGEST_NAME and _BASE64_PICTURE.match(data) is not None)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    of_text = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    of_bytes = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    of_nothing = pa.types.is_null  # pandas writes this where a file has no value
    return any(is_kind(kind) for is_kind in (*of_text, *of_bytes, of_nothing))


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


def _index_rows(cells: _Cells, stem: str, settings: PairsConfig) -> pa.RecordBatch:
    """The rows of the index for some rows of the table of that name."""
    images = cells[settings.image_column]
    captions = [None] * len(images) if settings.caption_column is None else cells[settings.caption_column]
    keys = None if settings.key_column is None else cells[settings.key_column]
    fields = [cells[column] for column in settings.keep_fields]

    inside = next((image for image in images if isinstance(image, Inside)), None)
    schema = Tables.schema
    if inside is not None:
        schema = _WITH_IMAGES if isinstance(inside.part, Page) else _WITH_LISTS
    columns: dict[str, list[object]] = {column: [] for column in schema.names}
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        place = _place(image, settings)
        name = (image.path or f"{stem}/{image.row}") if isinstance(image, Inside) else image
        key, problem = _key(name if keys is None else keys[row])
        texts, odd = _texts(caption if isinstance(caption, list) else [caption])
        if place.problem:
            problem = place.problem
        elif odd is not None:
            problem = problem or f"caption is {odd.what}, not text"
        elif not texts:
            problem = problem or f"{NO_CAPTION} (empty {settings.caption_column})"

        columns["key"].append(key)
        columns["key_hash"].append(key_hash(key))
        columns["problem"].append(problem)
        columns["captions"].append(texts)
        columns["fields"].append([field_text(values[row]) for values in fields])
        for column, value in place.columns.items():
            columns[column].append(value)
    return pa.RecordBatch.from_pydict(columns, schema=schema)


class _Place(NamedTuple):
    """Where the image of a row is, as columns of the index, and what is wrong with that."""

    columns: Mapping[str, object]
    problem: str | None = None


def _key(value: object) -> tuple[str, str | None]:
    """A key, and what is wrong with it."""
    if isinstance(value, Odd):
        return "", f"the key is {value.what}, not text or a whole number"
    return readable_key(_bytes(value)[:_LONGEST_PATH])


def _texts(captions: list[Any]) -> tuple[list[bytes], Odd | None]:
    """The captions of a row that are text, and the first that is of another type."""
    odd = next((caption for caption in captions if isinstance(caption, Odd)), None)
    return [_bytes(text) for text in captions if not isinstance(text, Odd | None)], odd


def _place(image: object, settings: PairsConfig) -> _Place:
    if isinstance(image, Inside):
        return _Place(image.columns)
    if isinstance(image, Odd):
        return _Place({"image": b""}, f"image is {image.what}, not a path")
    path, problem = _bytes(image), None
    if not path:
        problem = f"no image (empty {settings.image_column})"
    elif len(path) > _LONGEST_PATH:
        problem = f"image is no path ({len(path):,} bytes)"
    return _Place({"image": path[:_LONGEST_PATH]}, problem)


def _bytes(value: object) -> bytes:
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode()
