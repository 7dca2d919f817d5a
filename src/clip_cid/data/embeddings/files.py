"""The files of an embedding store: clip-retrieval's layout, and a manifest that names their sources.

    store.json                            teacher, pairs, width, shards with their digests; written last
    img_emb/img_emb_0000.npy              (rows, dim) unit image embeddings; a shard for each shard of the pairs
    text_emb/text_emb_0000.npy            (rows, dim) of each first caption; a store made elsewhere may have none
    more_text_emb/more_text_emb_0000.npy  of the second, third, ... captions in row order; only if there are any
    view_emb/view_emb_0000.npy            (rows, views, dim) of crops of each image; only if they were asked for
    metadata/metadata_0000.parquet        key, caption, captions, ok, width, height and the kept fields
    skipped.jsonl                         the rows that are not ok, with the reason

A row that could not be embedded keeps its place, all zeros and not ok, so row numbers are the same everywhere.
A store of imported embeddings refers to their files where they are, and holds only the converted ones.
"""

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from jaxtyping import Bool, Float

from clip_cid.data.embeddings.files_behind import STORE_FILE
from clip_cid.data.embeddings.lance_tables import is_lance, lance_rows, lance_schema, read_lance
from clip_cid.data.embeddings.text_tables import is_text_table, read_text_table, text_rows, text_schema
from clip_cid.data.pairs.crops import Views
from clip_cid.errors import DataError
from clip_cid.file_digests import sha256_file
from clip_cid.run_folder import atomic_file, write_json
from clip_cid.unit_length import is_unit

SKIPPED_FILE, PROGRESS_FILE = "skipped.jsonl", "store.part.jsonl"
FOLDERS = {
    "image": "img_emb",
    "text": "text_emb",
    "more_text": "more_text_emb",
    "view": "view_emb",
    "metadata": "metadata",
}
ARROW = (".arrow", ".feather")
AGAIN = "Run the embed stage again, with --force."
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_UNREADABLE = (OSError, zlib.error, zipfile.BadZipFile)  # of the file or of the archive, not of the header
BROKEN_TABLE = (OSError, ValueError, pa.ArrowException)  # names and texts may be no UTF-8
_FORMAT, _VERSION = "clip-cid embedding store", 1


@dataclasses.dataclass(frozen=True)
class StoreFile:
    """A file of a shard."""

    path: str
    """Relative to the store, or absolute if the file was taken over and stays where it is."""
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class StoreShard:
    """The rows of one shard of the pairs."""

    name: str
    rows: int
    ok: int
    """Rows that have an image and (if the store has texts) a text embedding."""
    more: int
    """Embeddings of further captions, those after the first."""
    files: dict[str, StoreFile]
    """By kind: image, metadata and, if there are any, text, more_text and view."""
    contents: str | None = None
    """Digest of the keys, images and captions that were embedded; None if nobody recorded it."""
    contents_with_fields: str | None = None
    """Digest of these and the kept fields."""
    without_text: int = 0
    """Of the ok rows those without a caption, whose text embedding is all zeros."""
    made_on: str | None = None
    """The hardware that embedded it, since another kind may differ in the last bits; None if nobody recorded it."""


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """What a store was made from."""

    teacher: dict[str, Any]
    """As `Teacher.identity`: reference, weights_sha256, model_cfg, preprocessing, precision."""
    pairs: str | None
    """Digest of the contents of the pairs; None for a store made elsewhere."""
    dim: int
    dtype: str
    fields: tuple[str, ...]
    """The kept fields in the metadata."""
    key_column: str
    captions_column: str | None
    """Column with the list of captions, or with the only one; None for embeddings from elsewhere without captions."""
    root: str | None
    """Where the files are, for a store that only refers to another one."""
    shards: tuple[StoreShard, ...]
    views: Views | None = None
    """The crops of each image that are embedded beside it."""


def write_info(path: Path, info: StoreInfo) -> None:
    """Declare the store at `path` finished."""
    rows = sum(shard.rows for shard in info.shards)
    head = {"format": _FORMAT, "version": _VERSION, "finished": True, "rows": rows, "normalized": True}
    values = dataclasses.asdict(info)
    if info.views is None:
        del values["views"]
    for shard in values["shards"]:
        if not shard["without_text"]:  # as earlier versions wrote it
            del shard["without_text"]
    write_json(path / STORE_FILE, {**head, **values})


def read_info(path: Path) -> StoreInfo:
    """The manifest of a finished store.

    Raises:
        DataError: There is none, it is unfinished, or it is not one of this version.
    """
    file = path / STORE_FILE
    if not file.is_file():
        if (path / PROGRESS_FILE).is_file():
            raise DataError(
                f"{path}: this embedding store is unfinished.", fix="Run the embed stage that makes it to its end."
            )
        raise DataError(f"{path}: no {STORE_FILE} here, so this is not an embedding store.", fix=AGAIN)

    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
        if (values["format"], values["version"], values["finished"]) != (_FORMAT, _VERSION, True):
            raise ValueError(f"format {values['format']!r}, version {values['version']}")
        info = pydantic.TypeAdapter(StoreInfo).validate_json(text, strict=True)
        _check_info(info, values["rows"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{file}: not a manifest of this version ({where}: {first['msg']}).", fix=AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: not a manifest of this version ({error}).", fix=AGAIN) from error
    return info


def _check_info(info: StoreInfo, rows: int) -> None:
    """What a manifest says agrees with itself.

    Raises:
        ValueError: It does not.
    """
    in_shards = sum(shard.rows for shard in info.shards)
    if rows != in_shards:
        raise ValueError(f"{rows:,} rows, but {in_shards:,} in its shards")
    if info.dtype not in ("float16", "float32"):
        raise ValueError(f"dtype {info.dtype!r}")
    for shard in info.shards:
        needed = {"image", "metadata"} | ({"more_text"} if shard.more else set()) | ({"view"} if info.views else set())
        if lacking := needed - shard.files.keys():
            raise ValueError(f"shard {shard.name} without {' and '.join(sorted(lacking))}")
        if not 0 <= shard.without_text <= shard.ok <= shard.rows or shard.more < 0:
            raise ValueError(f"shard {shard.name} of {shard.rows} rows, {shard.ok} ok and {shard.more} more")


def shard_from_json(values: dict[str, Any]) -> StoreShard:
    return StoreShard(**{**values, "files": {kind: StoreFile(**file) for kind, file in values["files"].items()}})


def record_file(root: Path, path: str) -> StoreFile:
    return StoreFile(path=path, bytes=(root / path).stat().st_size, sha256=sha256_file(root / path))


def write_array(path: Path, array: Float[np.ndarray, "rows *views dim"]) -> None:
    """As numpy.save, but a full disk raises its own error (numpy loses the reason)."""
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(handle, header)
        handle.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")


def write_array_blocks(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[np.ndarray]) -> None:
    """An array that is made block by block, whole or not at all."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        for block in blocks:
            handle.write(block.astype(dtype).tobytes())


def write_table(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        pq.write_table(table, handle)


def array_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a .npy file, after checking that the file is as long as they say.

    Raises:
        DataError: The file is missing, not a plain .npy, or cut short.
    """
    try:
        with path.open("rb") as handle:
            shape, fortran, dtype = read_array_header(handle)
            offset = handle.tell()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing.", fix=AGAIN) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a .npy array ({error}).", fix=AGAIN) from error
    if fortran or dtype.hasobject:
        raise DataError(f"{path}: rows are not stored one after the other as plain numbers.", fix=AGAIN)

    size, expected = path.stat().st_size, offset + math.prod(shape) * dtype.itemsize
    if size != expected:
        how = "cut short" if size < expected else "longer than it says"
        raise DataError(f"{path}: {size:,} bytes, but {shape} {dtype} needs {expected:,}; it is {how}.", fix=AGAIN)
    return shape, dtype


def check_shard(root: Path, shard: StoreShard, *, dim: int, dtype: str, views: Views | None) -> None:
    """Every file is there, of the recorded size, and of the right shape; contents are not read."""
    middle = {"view": (views.count,)} if views is not None else {}
    for kind, file in shard.files.items():
        path = root / file.path
        rows = shard.more if kind == "more_text" else shard.rows
        if kind == "metadata":
            stored = table_rows(path)
        else:
            shape, stored_as = array_header(path)
            if shape[1:] != (*middle.get(kind, ()), dim) or stored_as != np.dtype(dtype):
                what = f"{middle[kind][0]:,} views of width {dim}" if kind in middle else f"width {dim}"
                raise DataError(f"{path}: {shape} {stored_as}, but the store has {what} in {dtype}.", fix=AGAIN)
            stored = shape[0]

        if stored != rows:
            raise DataError(f"{path}: {stored:,} rows, but {rows:,} were written for shard {shard.name}.", fix=AGAIN)
        if path.stat().st_size != file.bytes:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes, not the {file.bytes:,} that were written.", fix=AGAIN
            )


def table_rows(path: Path) -> int:
    if is_lance(path):
        return lance_rows(path)
    if is_text_table(path):
        return text_rows(path)
    return read_arrow(path).num_rows if is_arrow(path) else _read_foot(path).num_rows


def table_schema(path: Path) -> pa.Schema:
    if is_lance(path):
        return lance_schema(path)
    if is_text_table(path):
        return text_schema(path)
    return read_arrow(path).schema if is_arrow(path) else _read_foot(path).schema.to_arrow_schema()


def is_arrow(path: Path) -> bool:
    """Whether a table is an Arrow file, and not Parquet, by its name."""
    return path.suffix in ARROW


def read_arrow(path: Path) -> pa.Table:
    """An Arrow file or stream, as a map of the file where it is not compressed.

    Raises:
        DataError: It cannot be read.
    """
    try:
        mapped = pa.memory_map(str(path))
        try:
            return pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_stream(mapped).read_all()
    except BROKEN_TABLE as error:
        raise DataError(f"{path}: not a whole Arrow file ({error}).", fix="Fetch or write this file again.") from error


def _read_foot(path: Path) -> pq.FileMetaData:
    try:
        foot = pq.read_metadata(path)
        foot.schema.to_arrow_schema()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing.", fix=AGAIN) from error
    except BROKEN_TABLE as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}).", fix=AGAIN) from error
    return foot


def read_table(path: Path, *, without: Collection[str] = ()) -> pa.Table:
    """A shard's metadata, whole but for some columns.

    Raises:
        DataError: The file cannot be read.
    """
    names = [name for name in table_schema(path).names if name not in without] if without else None
    if is_lance(path):
        return read_lance(path, names)
    if is_text_table(path):
        return read_text_table(path, names)
    try:
        if is_arrow(path):
            return read_arrow(path).select(names) if names is not None else read_arrow(path)
        with pq.ParquetFile(path) as table:
            return table.read(columns=names)
    except BROKEN_TABLE as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix=AGAIN) from error


def check_column(path: Path, schema: pa.Schema, name: str) -> None:
    """A shard's metadata has this column, once.

    Raises:
        DataError: It does not.
    """
    count = schema.names.count(name)
    if count != 1:
        number = "no column" if count == 0 else f"{count:,} columns"
        raise DataError(
            f"{path}: {number} {name!r}; there are {', '.join(schema.names)}.",
            fix="Name it in pairs.keep_fields and run the embed stage again, or use a store that has it.",
        )


def read_column(path: Path, name: str) -> pa.Array:
    """One column of a shard's metadata.

    Raises:
        DataError: The file cannot be read, or has no such column.
    """
    try:
        check_column(path, table_schema(path), name)
        if is_lance(path):
            column = read_lance(path, [name]).column(name)
        elif is_text_table(path):
            column = read_text_table(path, [name]).column(name)
        elif is_arrow(path):
            column = read_arrow(path).column(name)
        else:
            with pq.ParquetFile(path) as table:
                column = table.read(columns=[name]).column(name)
                if len(column) != table.metadata.num_rows:
                    raise pa.ArrowInvalid(f"{len(column):,} values of {name!r} in {table.metadata.num_rows:,} rows")
        column.validate(full=True)  # texts are UTF-8
    except BROKEN_TABLE as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix=AGAIN) from error
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)


def read_texts(path: Path, name: str) -> pa.LargeStringArray:
    """A column of a shard's metadata with one text or number a row, as texts.

    Raises:
        DataError: The file cannot be read, has no such column, or the column holds something else.
    """
    column = read_column(path, name)
    if pa.types.is_nested(column.type):
        raise not_texts(path, name, column.type)
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException as error:
        raise not_texts(path, name, column.type) from error


def not_texts(path: Path, name: str, kind: pa.DataType) -> DataError:
    return DataError(
        f"{path}: column {name!r} holds {kind}, not one text or whole number a row.",
        fix="Write the column anew with one value a row, such as the first of each list, or use another column.",
    )


def read_captions(path: Path, name: str) -> pa.Array:
    """A column of a shard's metadata with one caption a row, or a list of captions.

    Raises:
        DataError: The file cannot be read, has no such column, or the column holds something else.
    """
    column = read_column(path, name)
    try:
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            return column.cast(pa.list_(pa.string()))
        return read_texts(path, name)
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: column {name!r} holds {column.type}, not captions ({error}).",
            fix="Write the column anew with a caption, or a list of captions, in each row.",
        ) from error


def check_unit(
    vectors: Float[np.ndarray, "rows dim"], ok: Bool[np.ndarray, " rows"], *, where: str, first_row: int
) -> None:
    """Every ok row is finite and of length 1 within what float16 can keep.

    Raises:
        DataError: With the first row that is not.
    """
    norms = np.sqrt(np.einsum("rd,rd->r", vectors, vectors, dtype=np.float32))
    wrong = np.flatnonzero(ok & ~is_unit(norms))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{where}: row {first_row + row:,} has length {norms[row]:.4g}, not 1 "
            f"({len(wrong):,} such rows among {len(vectors):,}).",
            fix="The embeddings must be finite and normalized; compute them again, or repair them at their source. "
            "If they are imported and only their length differs, `embed.normalize` scales them: "
            "`clip-cid embed RUN --embeddings PATH --embed.normalize`. Imported rows of zeros or NaN are left out "
            "by --embed.max-bad-share 0.01.",
        )


def read_array_header(handle: IO[bytes] | io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type of the .npy that begins here; its numbers follow.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a whole header of version 1 or 2.
    """
    try:
        version = np.lib.format.read_magic(handle)
        if version not in _HEADER_READERS:
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = _HEADER_READERS[version](handle)
    except _UNREADABLE:
        raise
    except Exception as error:  # the header is parsed as Python, so a damaged one raises nearly anything
        raise ValueError(" ".join(str(error).split())) from error
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    return shape, fortran, dtype
