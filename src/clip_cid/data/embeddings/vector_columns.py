"""Embeddings in a column of a Parquet or Arrow file: a list of numbers in each row."""

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from clip_cid.data.embeddings.files import BROKEN_TABLE, is_arrow, read_arrow, table_schema
from clip_cid.data.embeddings.lance_tables import is_lance, lance_batches
from clip_cid.errors import DataError

_FLOATS = {pa.float16(): np.float16, pa.float32(): np.float32, pa.float64(): np.float64}


def vector_columns(path: Path) -> list[str]:
    """The columns that hold lists of floating-point numbers.

    Raises:
        DataError: The file cannot be read.
    """
    return [field.name for field in table_schema(path) if _is_vector(field.type)]


def vector_type(path: Path, name: str) -> tuple[int, np.dtype[Any]]:
    """The width of the vectors in a column, and the type of their numbers.

    Raises:
        DataError: The file cannot be read, or there is no vector.
    """
    kind = _list_of(table_schema(path).field(name).type)
    dtype = np.dtype(_FLOATS[kind.value_type])
    if pa.types.is_fixed_size_list(kind) and kind.list_size:
        return kind.list_size, dtype
    for column in _columns(path, name, rows=1024):
        lengths = _lengths(column)
        if lengths.any():
            return int(lengths[lengths > 0][0]), dtype
    raise DataError(f"{path}: column {name!r} holds no vector.", fix="Write a list of numbers into each row.")


def vector_blocks(path: Path, name: str, *, dim: int, rows: int) -> Generator[Float[np.ndarray, "some dim"]]:
    """All rows of a column, at most `rows` at a time; a number that is null is NaN, and so is a row without numbers.

    Raises:
        DataError: The file is damaged, or a vector has another length.
    """
    first = 0
    for column in _columns(path, name, rows=rows):
        yield _matrix(column, dim, path, name, first)
        first += len(column)


def _list_of(kind: pa.DataType) -> pa.DataType:
    """The type as which Arrow stores a tensor of one dimension, else the type itself."""
    is_tensor = isinstance(kind, pa.FixedShapeTensorType) and len(kind.shape) == 1
    return kind.storage_type if is_tensor else kind


def _is_vector(kind: pa.DataType) -> bool:
    kind = _list_of(kind)
    is_list = any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
    return is_list and kind.value_type in _FLOATS


def _columns(path: Path, name: str, *, rows: int) -> Generator[pa.Array]:
    if is_lance(path):
        yield from (_stored(batch.column(name)) for batch in lance_batches(path, name, rows=rows))
        return
    try:
        if is_arrow(path):
            batches: Iterable[pa.RecordBatch] = read_arrow(path).select([name]).to_batches(max_chunksize=rows)
            yield from (_stored(batch.column(name)) for batch in batches)
        else:
            with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
                yield from (_stored(batch.column(name)) for batch in file.iter_batches(rows, columns=[name]))
    except BROKEN_TABLE as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix="Fetch or write this file again.") from error


def _stored(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _lengths(column: pa.Array) -> Int[np.ndarray, " rows"]:
    """How many numbers each row has; 0 where it is null."""
    return pc.call_function("list_value_length", [column]).fill_null(0).to_numpy(zero_copy_only=False)


def _matrix(column: pa.Array, dim: int, path: Path, name: str, first_row: int) -> np.ndarray:
    lengths = _lengths(column)
    there = lengths > 0
    if len(other := np.flatnonzero(there & (lengths != dim))):
        row = int(other[0])
        raise DataError(
            f"{path}: column {name!r}, row {first_row + row:,}: {int(lengths[row]):,} numbers, not {dim:,} as before.",
            fix="All embeddings of a store come from one model; write those of others apart.",
        )

    values = column.flatten()  # without the rows that have none
    numbers = values.to_numpy(zero_copy_only=False) if not values.null_count else _with_nan(values)
    matrix = np.full((len(column), dim), np.nan, dtype=_FLOATS[column.type.value_type])
    matrix[there] = numbers.reshape(-1, dim)
    return matrix


def _with_nan(values: pa.Array) -> np.ndarray:
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers.astype(_FLOATS[values.type])
