"""`against.parquet`: the rows that a balance dropped because they are near an image of an evaluation set."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from clip_cid.data.balance.tables import read_columns
from clip_cid.run_folder import atomic_file

AGAINST_FILE = "against.parquet"

_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("set", pa.string(), nullable=False),
        pa.field("match", pa.large_string(), nullable=False),
        pa.field("distance", pa.float64(), nullable=False),
    ]
)


class NearSet(NamedTuple):
    """The rows of the store near a set, and for each the nearest image of it."""

    name: str
    rows: Int[np.ndarray, " near"]
    matches: Sequence[str]
    distances: Float[np.ndarray, " near"]


class Dropped(NamedTuple):
    """A row, the set that it is nearest to, and how near."""

    rows: Int[np.ndarray, " dropped"]
    sets: list[str]
    distances: Float[np.ndarray, " dropped"]


def write_against(out: Path, keys: pa.LargeStringArray, near: Sequence[NearSet], *, metric: str) -> None:
    """Write the table, set by set; `keys` are of every row of the store, distances on the scale of `metric`."""
    rows = np.concatenate([one.rows for one in near])
    columns = [
        rows,
        keys.take(pa.array(rows)),
        [one.name for one in near for _ in one.rows],
        [match for one in near for match in one.matches],
        np.concatenate([one.distances for one in near]),
    ]
    table = pa.table(columns, schema=_SCHEMA.with_metadata({"metric": metric}))
    with atomic_file(out / AGAINST_FILE) as temporary, temporary.open("wb") as handle:
        pq.write_table(table, handle)


def read_dropped(folder: Path) -> Dropped:
    """Every row that was dropped, ascending, with its nearest set; none where nothing was compared.

    Raises:
        DataError: The table cannot be read.
    """
    path = folder / AGAINST_FILE
    if not path.is_file():
        return Dropped(np.zeros(0, dtype=np.int64), [], np.zeros(0))
    table = read_columns(path, ["row", "set", "distance"])
    rows, distances = table.column("row").to_numpy(), table.column("distance").to_numpy()
    order = np.lexsort((distances, rows))
    each, first = np.unique(rows[order], return_index=True)
    chosen = order[first]
    return Dropped(each, table.column("set").take(pa.array(chosen)).to_pylist(), distances[chosen])
