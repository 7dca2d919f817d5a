"""Embeddings in a table: a column with a list of numbers in each row, or a column for each dimension."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from clip_cid.data.embeddings.files import BROKEN_TABLE, is_arrow, read_arrow, table_schema
from clip_cid.data.embeddings.lance_tables import is_lance, lance_batches
from clip_cid.data.embeddings.names import numbered
from clip_cid.data.embeddings.text_tables import is_text_table, text_batches
from clip_cid.errors import DataError

_FLOATS = {pa.float16(): np.float16, pa.float32(): np.float32, pa.float64(): np.float64}


def vector_columns(path: Path) -> list[str]:
    """The columns that hold lists of floating-point numbers.

    Raises:
        DataError: The file cannot be read.
    """
    return [field.name for field in table_schema(path) if _is_vector(field.type)]


def spread_columns(path: Path) -> dict[str, tuple[str, ...]]:
    """The columns that hold a dimension each, by a name for all of one vector: `emb_0 to emb_511`.

    Raises:
        DataError: The file cannot be read, or some of such columns are missing.
    """
    schema = table_schema(path)
    floats = {field.name for field in schema if field.type in _FLOATS}
    numbers = [field.name for field in schema if field.name in floats or pa.types.is_integer(field.type)]
    groups = [group for group in numbered(numbers) if not floats.isdisjoint(group.names)]
    if broken := [str(group) for group in groups if not group.is_whole]:
        raise DataError(
            f"{path}: of the columns {broken[0]} some are missing, named twice, or hold no numbers.",
            fix="Embeddings with a column for each dimension have names with every number from 0 on, such as emb_0,"
            " emb_1 and so on. Leave out other columns that are numbered so.",
        )
    return {str(group): group.names for group in groups}


def vector_type(path: Path, name: str, spread: Sequence[str] = ()) -> tuple[int, np.dtype[Any]]:
    """The width of the vectors in a column, or in the columns of their dimensions, and the type of their numbers.

    Raises:
        DataError: The file cannot be read, or there is no vector.
    """
    if spread:
        kinds = [table_schema(path).field(name).type for name in spread]
        return len(spread), np.result_type(*(_FLOATS.get(kind, np.float16) for kind in kinds))
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


def spread_blocks(
    path: Path, spread: Sequence[str], dtype: np.dtype[Any], *, rows: int
) -> Generator[Float[np.ndarray, "some dim"]]:
    """As `vector_blocks`, of a column for each dimension."""
    for batch in _batches(path, spread, rows=rows):
        columns = [batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in spread]
        yield np.stack(columns, axis=1).astype(dtype)


def _list_of(kind: pa.DataType) -> pa.DataType:
    """The type as which Arrow stores a tensor of one dimension, else the type itself."""
    is_tensor = isinstance(kind, pa.FixedShapeTensorType) and len(kind.shape) == 1
    return kind.storage_type if is_tensor else kind


def _is_vector(kind: pa.DataType) -> bool:
    kind = _list_of(kind)
    is_list = any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
    return is_list and kind.value_type in _FLOATS


def _columns(path: Path, name: str, *, rows: int) -> Generator[pa.Array]:
    yield from (_stored(batch.column(name)) for batch in _batches(path, [name], rows=rows))


def _batches(path: Path, names: Sequence[str], *, rows: int) -> Generator[pa.RecordBatch]:
    """Some columns, at most so many rows at a time."""
    if is_lance(path):
        yield from lance_batches(path, names, rows=rows)
        return
    if is_text_table(path):
        for batch in text_batches(path, names):
            yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))
        return
    try:
        if is_arrow(path):
            yield from read_arrow(path).select(list(names)).to_batches(max_chunksize=rows)
        else:
            with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
                yield from file.iter_batches(rows, columns=list(names))
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
