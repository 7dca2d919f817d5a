"""The kept rows and their sets: `kept.npy`, `set_of.npy`, and `kept.parquet`, the balanced list by key."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from clip_cid.data.npy_files import read_npy
from clip_cid.errors import DataError

KEPT_FILE, SET_FILE, KEPT_TABLE = "kept.npy", "set_of.npy", "kept.parquet"

_ROW_GROUP = 1 << 20
_COLUMNS = pa.schema({"key": pa.large_string(), "row": pa.int64(), "set_size": pa.int64()})
_FIX = "It must be a .npy of sorted, different row numbers of the embedding store."


def write_kept(
    out: Path, keys: pa.LargeStringArray, kept: Int[np.ndarray, " kept"], set_of: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " kept"]:
    """Write all three.

    Args:
        out: The folder.
        keys: Of every row of the store.
        kept: Rows of the store, ascending.
        set_of: For each row of the store the place in `kept` of the row kept for it; -1 without an embedding.

    Returns:
        The size of each set.
    """
    np.save(out / KEPT_FILE, kept)
    np.save(out / SET_FILE, set_of)
    sizes = np.bincount(set_of[set_of >= 0], minlength=len(kept))
    with pq.ParquetWriter(out / KEPT_TABLE, _COLUMNS) as writer:
        for start in range(0, max(len(kept), 1), _ROW_GROUP):
            rows = pa.array(kept[start : start + _ROW_GROUP])
            writer.write_table(pa.table([keys.take(rows), rows, sizes[start : start + _ROW_GROUP]], schema=_COLUMNS))
    return sizes


def read_kept_elsewhere(path: Path, ok: Bool[np.ndarray, " rows"]) -> Int[np.ndarray, " kept"]:
    """Kept rows that were made elsewhere.

    Args:
        path: A .npy of row numbers.
        ok: Which rows of the store have an embedding.

    Raises:
        DataError: The rows are not sorted, repeat, are not of this store, or have no embedding.
    """
    try:
        kept = read_npy(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array ({error}).", fix=_FIX) from error
    if kept.ndim != 1 or kept.dtype.kind not in "iu" or len(kept) == 0:
        mask = " A mask becomes row numbers by np.flatnonzero(mask)." if kept.dtype.kind == "b" else ""
        raise DataError(f"{path}: holds {kept.dtype} of shape {kept.shape}, not row numbers.", fix=_FIX + mask)
    if (kept[1:] <= kept[:-1]).any():
        raise DataError(f"{path}: row numbers are not sorted and different.", fix=_FIX)
    if kept[0] < 0 or kept[-1] >= len(ok):
        raise DataError(f"{path}: row {kept[0]:,} or {kept[-1]:,} is outside the store's {len(ok):,} rows.", fix=_FIX)

    kept = kept.astype(np.int64)
    if not ok[kept].all():
        bad = kept[~ok[kept]]
        raise DataError(f"{path}: {len(bad):,} rows have no embedding, the first is row {bad[0]:,}.", fix=_FIX)
    return kept
