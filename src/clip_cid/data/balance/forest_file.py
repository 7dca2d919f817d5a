"""The minimum spanning forest of a balance as a Parquet file: one link a line, nearest first.

Beside it lie the digests of the rows. A later balance recognizes rows by them, and takes over their links.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt64

from clip_cid.data.array_folder import save_array
from clip_cid.data.balance.tables import read_numbers
from clip_cid.data.npy_files import read_npy
from clip_cid.errors import DataError
from clip_cid.file_digests import sha256_file
from clip_cid.run_folder import MANIFEST, atomic_file, read_json

FOREST_FILE, HASHES_FILE = "forest.parquet", "row_hashes.npy"

_ROW_GROUP = 1 << 20
_FIX = "Run the balance stage again, with --force."
_FIELDS = [pa.field("left", pa.int64()), pa.field("right", pa.int64()), pa.field("squared_distance", pa.float64())]
_COLUMNS = [field.with_nullable(False) for field in _FIELDS]


@runtime_checkable
class ForestArrays(Protocol):
    """A forest, whoever made it."""

    @property
    def rows(self) -> int: ...
    @property
    def left(self) -> np.ndarray: ...
    @property
    def right(self) -> np.ndarray: ...
    @property
    def squared(self) -> np.ndarray: ...
    @property
    def limit(self) -> float: ...


class StoredForest(NamedTuple):
    """The checked arrays of a forest's file, in the order of `clip_cid.method.balance.forest.Forest`'s arguments."""

    rows: int
    left: Int[np.ndarray, " links"]
    right: Int[np.ndarray, " links"]
    squared: Float[np.ndarray, " links"]
    limit: float


def write_forest(path: Path, forest: ForestArrays) -> None:
    """Write the links, and in the schema's metadata `rows` and `limit`; equal forests give equal bytes."""
    schema = pa.schema(_COLUMNS, metadata={"rows": str(forest.rows), "limit": repr(float(forest.limit))})
    table = pa.table([forest.left, forest.right, forest.squared], schema=schema)
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        pq.write_table(table, handle, row_group_size=_ROW_GROUP, use_dictionary=False)


def read_forest(path: Path) -> StoredForest:
    """A forest that `write_forest` wrote: `Forest(*read_forest(path))`.

    Raises:
        DataError: The file is missing or cut short, or does not hold a forest.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if schema.remove_metadata() != pa.schema(_COLUMNS):
                raise DataError(f"{path}: has the columns {_described(schema)}, not {_described(_COLUMNS)}.", fix=_FIX)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing.", fix=_FIX) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}).", fix=_FIX) from error

    rows, limit = _head(schema.metadata or {}, path)
    columns = read_numbers(path, {field.name: field.type.to_pandas_dtype() for field in _COLUMNS})
    left, right, squared = columns.values()
    if len(left) and not (left.min() >= 0 and right.max() < rows and (left < right).all()):
        raise DataError(f"{path}: a link does not join rows 0 <= left < right < {rows:,}.", fix=_FIX)
    if len(left) and not ((squared[1:] >= squared[:-1]).all() and squared[0] >= 0 and squared[-1] <= limit):
        raise DataError(f"{path}: squared_distance does not ascend from 0 to the limit {limit:g}.", fix=_FIX)
    return StoredForest(rows, left, right, squared, limit)


def write_row_hashes(folder: Path, hashes: UInt64[np.ndarray, "rows 2"]) -> None:
    """The digest of every row of the store; zeros for a row without an embedding."""
    save_array(folder / HASHES_FILE, hashes)


def read_earlier(folder: Path) -> tuple[StoredForest, UInt64[np.ndarray, "rows 2"]]:
    """The forest of a finished balance stage and the digests of its rows, numbered over the rows with an embedding.

    Raises:
        DataError: A file is missing, is not as the stage wrote it, or cannot be read.
    """
    written = _digests(folder / MANIFEST)
    for path in (folder / FOREST_FILE, folder / HASHES_FILE):
        if not path.is_file() or sha256_file(path) != written.get(path.name):
            raise DataError(
                f"{path}: missing, or changed since a balance stage wrote it.",
                fix="balance.grow_from is the folder RUN/balance of a finished run.",
            )

    stored = read_forest(folder / FOREST_FILE)
    again = "Run that balance again."
    try:
        hashes = read_npy(folder / HASHES_FILE)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / HASHES_FILE}: cannot be read ({error}).", fix=again) from error
    if hashes.dtype != np.uint64 or hashes.shape != (stored.rows, 2):
        raise DataError(f"{folder / HASHES_FILE}: not of the forest's {stored.rows:,} rows.", fix=again)

    good = np.flatnonzero(hashes.any(axis=1))
    left, right = np.searchsorted(good, stored.left), np.searchsorted(good, stored.right)
    return StoredForest(len(good), left, right, stored.squared, stored.limit), hashes[good]


def _digests(manifest: Path) -> dict[str, str]:
    """The digest of each file that the stage wrote; empty without a record."""
    if not manifest.is_file():
        return {}
    try:
        return {name: file["sha256"] for name, file in read_json(manifest)["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{manifest}: not the record of a stage ({error!r}).",
            fix="balance.grow_from is the folder RUN/balance of a finished run.",
        ) from error


def _head(metadata: dict[bytes, bytes], path: Path) -> tuple[int, float]:
    try:
        rows, limit = int(metadata[b"rows"]), float(metadata[b"limit"])
        if rows < 0 or not 0 <= limit < float("inf"):
            raise ValueError(f"rows {rows}, limit {limit}")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: its metadata does not name rows and limit ({error!r}).", fix=_FIX) from error
    return rows, limit


def _described(fields: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in fields)
