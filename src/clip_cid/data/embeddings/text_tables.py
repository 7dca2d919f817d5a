"""Text tables (.csv, .tsv) of embeddings, with a column for each dimension; all other columns are text.

Only names tell the two apart: what stands in other columns is never taken for numbers, so a key keeps its zeros.
"""

import csv
import functools
from collections.abc import Generator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from clip_cid.data.embeddings.names import numbered
from clip_cid.data.pairs.delimited import DELIMITERS
from clip_cid.errors import DataError

TEXT_TABLES = (".csv", ".tsv")
_LONGEST = 1 << 24  # bytes of the line of names
_BLOCK_BYTES = 16 << 20


def is_text_table(path: Path) -> bool:
    """Whether a table is one of text, by its name."""
    return path.suffix in TEXT_TABLES


def text_schema(path: Path) -> pa.Schema:
    """The columns: numbers where the name is one of many that differ in their number alone."""
    names = _header(path)[1]
    numbers = {name for group in numbered(names) for name in group.names}
    return pa.schema([(name, pa.float32() if name in numbers else pa.large_string()) for name in names])


def text_rows(path: Path) -> int:
    state = path.stat()
    return _rows(path, state.st_size, state.st_mtime_ns)


def read_text_table(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """Some columns, or all."""
    wanted = text_schema(path).names if names is None else list(names)
    return pa.Table.from_batches(text_batches(path, wanted), _selected(path, wanted))


def text_batches(path: Path, names: Sequence[str]) -> Generator[pa.RecordBatch]:
    """Some columns, block by block.

    Raises:
        DataError: The file is damaged, or a column of numbers holds something else.
    """
    delimiter, every = _header(path)
    schema = _selected(path, names)
    try:
        with pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(column_names=every, skip_rows=1, block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=schema, include_columns=list(names), strings_can_be_null=False
            ),
        ) as reader:
            yield from reader
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({' '.join(str(error).split())}).",
            fix="Correct that row; numbers have a point, and each row has as many values as there are names.",
        ) from error


def _selected(path: Path, names: Sequence[str]) -> pa.Schema:
    schema = text_schema(path)
    return pa.schema([schema.field(name) for name in names])


@functools.lru_cache(maxsize=1024)
def _rows(path: Path, bytes: int, mtime_ns: int) -> int:
    """The rows of a file of this size and time."""
    return sum(batch.num_rows for batch in text_batches(path, text_schema(path).names[:1]))


def _header(path: Path) -> tuple[str, list[str]]:
    """The delimiter, which is the one that gives the most names, and the names."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            line = file.readline(_LONGEST)
        rows = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in DELIMITERS}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix="Fetch or write this file again.") from error
    delimiter = max(rows, key=lambda delimiter: len(rows[delimiter]))
    return delimiter, rows[delimiter]
