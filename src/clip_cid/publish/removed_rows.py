"""What a balance left out, a row a line: why, how far from the kept image, and which image that is."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from clip_cid.data.balance.against_file import read_dropped
from clip_cid.data.balance.decided_file import read_removed
from clip_cid.data.balance.tables import BalanceTables
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError
from clip_cid.run_folder import RunFolder, atomic_file
from clip_cid.stage_names import BALANCE, EMBED

REMOVED_TABLE = "removed.parquet"
DUPLICATE = "duplicate"
NOT_LISTED = "not in the list of kept rows"
"""Of rows that a list made elsewhere leaves out."""
DECIDED = "decision"
"""Of rows that a person has removed."""
CAPPED, SHARED = "beyond the cap of its cluster", "beyond the share of its cluster"
EVALUATION = "near an image of "
"""Of rows that are within the threshold of an evaluation set; its name follows."""
NO_EMBEDDING = "no embedding"

_ROWS_AT_ONCE = 1 << 17
_NONE = np.empty(0, dtype=np.int64)
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("distance", pa.float64()),
        pa.field("kept_key", pa.large_string()),
        pa.field("kept_row", pa.int64()),
    ]
)


class Removed(NamedTuple):
    """Every row of the store that is not kept, ascending."""

    rows: Int[np.ndarray, " removed"]
    reasons: list[str]
    distances: Float[np.ndarray, " removed"]
    """To the kept row, or to the image of an evaluation set, on the scale of the balance; NaN where there is none."""
    kept: Int[np.ndarray, " removed"]
    """The row that was kept for it; -1 where there is none."""
    head: dict[str, str]
    """Metric and threshold of the balance, as far as there are any."""


def removed_rows(
    folder: RunFolder,
    store: EmbeddingStore,
    kept: Int[np.ndarray, " kept"],
    *,
    capped: Int[np.ndarray, " capped"] = _NONE,
    why: str = CAPPED,
) -> Removed:
    """What the balance of a run removed, what has no embedding, and of the kept rows those left out of their cluster.

    Args:
        folder: The run.
        store: Its embeddings.
        kept: What the balance kept.
        capped: Those of these that are left out.
        why: The reason for it.

    Raises:
        DataError: A table of the balance cannot be read.
    """
    is_kept = np.zeros(store.rows, dtype=bool)
    is_kept[kept] = True
    is_kept[capped] = False
    rows = np.flatnonzero(~is_kept)
    distances, kept_for = np.full(len(rows), np.nan), np.full(len(rows), -1)
    head: dict[str, str] = {}

    balance = folder.stage(BALANCE)
    if BalanceTables.exist(balance):
        tables = BalanceTables(balance)
        members = tables.removed
        places = np.searchsorted(rows, members["row"])
        distances[places] = members["distance"]
        kept_for[places] = tables.sets["kept_row"][np.searchsorted(tables.sets["set"], members["set"])]
        head = {"metric": tables.metric, "threshold": repr(tables.threshold)}

    reasons = np.where(kept_for >= 0, DUPLICATE, NOT_LISTED).astype(object)
    reasons[np.isin(rows, read_removed(balance))] = DECIDED
    dropped = read_dropped(balance)
    places = np.searchsorted(rows, dropped.rows)
    reasons[places] = [f"{EVALUATION}{name}" for name in dropped.sets]
    distances[places], kept_for[places] = dropped.distances, -1
    reasons[np.isin(rows, capped)] = why
    skipped = _skipped(folder.stage(EMBED) / "skipped.jsonl")
    for place in np.flatnonzero(~store.ok[rows]).tolist():
        reasons[place] = skipped.get(int(rows[place]), NO_EMBEDDING)
    return Removed(rows, reasons.tolist(), distances, kept_for, head)


def write_removed(out: Path, removed: Removed, keys: pa.LargeStringArray) -> None:
    """Write `removed.parquet`; keys are looked up a portion at a time."""
    with (
        atomic_file(out / REMOVED_TABLE) as temporary,
        temporary.open("wb") as handle,
        pq.ParquetWriter(handle, _SCHEMA.with_metadata(removed.head)) as writer,
    ):
        for start in range(0, max(len(removed.rows), 1), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            rows = pa.array(removed.rows[part])
            kept = pa.array(removed.kept[part], mask=removed.kept[part] < 0)
            distances = pa.array(removed.distances[part], mask=np.isnan(removed.distances[part]))
            columns = [keys.take(rows), rows, pa.array(removed.reasons[part], pa.string()), distances]
            columns += [keys.take(kept), kept]
            writer.write_table(pa.table(columns, schema=_SCHEMA.with_metadata(removed.head)))


def _skipped(path: Path) -> dict[int, str]:
    """Row -> why it has no embedding, as far as the embed stage knows."""
    if not path.is_file():
        return {}
    try:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {int(line["row"]): f"{NO_EMBEDDING}: {line['reason']}" for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a list of skipped samples ({error}).", fix="Run the embed stage again, with --force."
        ) from error
