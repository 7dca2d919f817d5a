"""`decided.parquet`: what the decisions of a person did in a balance, in rows of the store; absent without decisions.

`keep` and `remove` name a row, `not_duplicates` two. `cut` names the two rows of a link of the forest that joins
nothing any more, and its place there.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from clip_cid.data.balance.tables import read_columns
from clip_cid.run_folder import atomic_file

DECIDED_FILE = "decided.parquet"

_CUT, _KEEP, _REMOVE = "cut", "keep", "remove"
_COLUMNS = {
    "decision": pa.string(),
    "row": pa.int64(),
    "key": pa.large_string(),
    "other_row": pa.int64(),
    "other_key": pa.large_string(),
    "link": pa.int64(),
}


def write_decided(
    out: Path,
    keys: pa.LargeStringArray,
    *,
    keep: Int[np.ndarray, " keep"],
    remove: Int[np.ndarray, " remove"],
    apart: Int[np.ndarray, "pairs 2"],
    cut: Int[np.ndarray, " cut"],
    ends: Int[np.ndarray, "cut 2"],
) -> None:
    """Write the table.

    Args:
        out: The folder.
        keys: Of every row of the store.
        keep: Rows of the store, like all that follow.
        remove: Rows that were to be removed.
        apart: Pairs that are not duplicates.
        cut: The links that were cut, by their places in the forest.
        ends: The two rows of each.
    """
    parts = {_KEEP: keep, _REMOVE: remove, "not_duplicates": apart[:, 0], _CUT: ends[:, 0]}
    rows = np.concatenate([*parts.values()])
    others = np.full(len(rows), -1)
    others[len(keep) + len(remove) :] = np.concatenate([apart[:, 1], ends[:, 1]])
    links = np.full(len(rows), -1)
    links[len(rows) - len(cut) :] = cut

    columns = {
        "decision": np.repeat([*parts], [len(part) for part in parts.values()]),
        "row": rows,
        "key": keys.take(pa.array(rows)),
        "other_row": pa.array(others, mask=others < 0),
        "other_key": keys.take(pa.array(others, mask=others < 0)),
        "link": pa.array(links, mask=links < 0),
    }
    with atomic_file(out / DECIDED_FILE) as temporary, temporary.open("wb") as handle:
        pq.write_table(pa.table(columns, schema=pa.schema(_COLUMNS)), handle)


def read_cut(folder: Path) -> Int[np.ndarray, " cut"]:
    """The links of the forest that decisions cut, ascending; none without decisions.

    Raises:
        DataError: The table cannot be read.
    """
    return _numbers(folder, "link", _CUT)


def read_removed(folder: Path) -> Int[np.ndarray, " removed"]:
    """The rows that decisions remove, ascending; none without decisions.

    Raises:
        DataError: The table cannot be read.
    """
    return _numbers(folder, "row", _REMOVE)


def read_decided(folder: Path) -> Int[np.ndarray, " rows"]:
    """The rows that decisions keep or remove, ascending; none without decisions.

    Raises:
        DataError: The table cannot be read.
    """
    return _numbers(folder, "row", _KEEP, _REMOVE)


def _numbers(folder: Path, column: str, *decisions: str) -> Int[np.ndarray, " n"]:
    path = folder / DECIDED_FILE
    if not path.is_file():
        return np.zeros(0, dtype=np.int64)
    table = read_columns(path, [column], filters=[("decision", "in", decisions)])
    return np.sort(table.column(column).to_numpy())
