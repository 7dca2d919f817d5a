"""Tables of Lance, a folder each, read by its own library, which is an extra."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from clip_cid import extras
from clip_cid.errors import ClipCidError, DataError

SUFFIX = ".lance"


def is_lance(path: Path) -> bool:
    """Whether a table is one of Lance, by its name."""
    return path.suffix == SUFFIX


def lance_rows(path: Path) -> int:
    with _opened(path) as table:
        return table.count_rows()


def lance_schema(path: Path) -> pa.Schema:
    with _opened(path) as table:
        return table.schema


def read_lance(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """Some columns, or all."""
    with _opened(path) as table:
        return table.to_table(columns=None if names is None else list(names))


def lance_batches(path: Path, names: Sequence[str], *, rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns, at most `rows` at a time, in order."""
    with _opened(path) as table:
        yield from table.to_batches(columns=list(names), batch_size=rows)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A table while it is read.

    Raises:
        DataError: It is damaged, or no table of Lance.
        MissingExtraError: The library is not installed.
    """
    extras.require(f"{path}: a Lance table", extras.LANCE)
    import lance  # pyright: ignore[reportMissingImports]

    try:
        yield lance.dataset(str(path))
    except ClipCidError:
        raise
    except Exception as error:  # the library has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: not a whole Lance table ({reason}).", fix="Copy or write it again, the whole folder."
        ) from error
