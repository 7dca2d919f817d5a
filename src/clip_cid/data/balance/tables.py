"""Readable tables of a balance: `sets.parquet`, a line a set; `members.parquet`, a line an image of a set."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from numpy.typing import DTypeLike

from clip_cid.data.balance.kinds import KINDS
from clip_cid.errors import DataError
from clip_cid.run_folder import atomic_file

SETS_FILE, MEMBERS_FILE = "sets.parquet", "members.parquet"

_ROW_GROUP = 1 << 17
_FIX = "Run the balance stage again, with --force."
_SETS = {
    "set": pa.int64(),
    "kept_row": pa.int64(),
    "kept_key": pa.large_string(),
    "size": pa.int64(),
    "component": pa.int64(),
    "component_size": pa.int64(),
    "farthest": pa.float64(),
    "mean": pa.float64(),
    "widest": pa.float64(),
    "widest_exact": pa.bool_(),
    "weakest_link": pa.float64(),
    "weakest_left": pa.int64(),
    "weakest_right": pa.int64(),
}
_MEMBERS = {
    "row": pa.int64(),
    "key": pa.large_string(),
    "set": pa.int64(),
    "kept": pa.bool_(),
    "distance": pa.float64(),
    "kind": pa.string(),
}


def write_tables(
    out: Path,
    keys: pa.LargeStringArray,
    sets: Mapping[str, np.ndarray],
    members: Mapping[str, np.ndarray],
    *,
    metric: str,
    threshold: float,
    kinds: Int[np.ndarray, " removed"] | None = None,
) -> None:
    """Write both tables; keys are looked up a row group at a time, so that few are in memory.

    Args:
        out: The folder.
        keys: Of every row of the store (`store.keys.packed`).
        sets: `Explanation.set_columns(metric)`, with rows of the store.
        members: `Explanation.member_columns(metric)`, likewise.
        metric: The scale of all distances.
        threshold: On that scale.
        kinds: For each removed member, in order, its place in `KINDS`; none is known when absent.
    """
    kind = np.zeros(len(members["row"]), dtype=np.int8)
    if kinds is not None:
        kind[~members["kept"]] = kinds

    head = {"metric": metric, "threshold": repr(float(threshold))}
    _write(out / SETS_FILE, _SETS, sets, {"kept_key": (keys, "kept_row")}, head)

    names = pa.array(KINDS)
    _write(
        out / MEMBERS_FILE,
        _MEMBERS,
        {**members, "kind_number": kind},
        {"key": (keys, "row"), "kind": (names, "kind_number")},
        head,
    )


def read_columns(path: Path, columns: list[str], *, filters: Any = None) -> pa.Table:
    """Some columns of a Parquet table that the stage wrote.

    Raises:
        DataError: The table cannot be read.
    """
    try:
        return pq.read_table(path, columns=columns, filters=filters)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix=_FIX) from error


def read_numbers(path: Path, types: Mapping[str, DTypeLike]) -> dict[str, np.ndarray]:
    """Columns of numbers of a Parquet table that the stage wrote, of these types.

    A row group is read at a time, so that beside the numbers themselves little is in memory.

    Raises:
        DataError: The table cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            columns = {name: np.empty(file.metadata.num_rows, dtype=kind) for name, kind in types.items()}
            start = 0
            for batch in file.iter_batches(_ROW_GROUP, columns=[*columns]):
                for name, values in columns.items():
                    values[start : start + len(batch)] = batch.column(name).to_numpy(zero_copy_only=False)
                start += len(batch)
            return columns
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix=_FIX) from error


class BalanceTables:
    """Both tables of a run; a column is read when it is used.

    Raises:
        DataError: A table is missing or cut short, or has other columns.
    """

    def __init__(self, folder: Path) -> None:
        self._sets, self._members = folder / SETS_FILE, folder / MEMBERS_FILE
        head = _check(self._sets, _SETS)
        if head != _check(self._members, _MEMBERS):
            raise DataError(f"{self._members}: of another metric or threshold than {SETS_FILE}.", fix=_FIX)
        self.metric, self.threshold = head

    @staticmethod
    def exist(folder: Path) -> bool:
        """Not in a run whose kept rows were made elsewhere."""
        return (folder / SETS_FILE).is_file()

    @cached_property
    def sets(self) -> dict[str, np.ndarray]:
        """Every column but the keys, by name."""
        return _numbers(self._sets, _SETS, [name for name in _SETS if name != "kept_key"])

    @cached_property
    def distances(self) -> Float[np.ndarray, " removed"]:
        """From each removed image to the kept one."""
        columns = _numbers(self._members, _MEMBERS, ["kept", "distance"])
        return columns["distance"][~columns["kept"]]

    @property
    def removed(self) -> dict[str, np.ndarray]:
        """Row, set and distance of every removed image."""
        columns = _numbers(self._members, _MEMBERS, ["row", "set", "kept", "distance"])
        return {name: columns[name][~columns["kept"]] for name in ("row", "set", "distance")}

    @cached_property
    def every_member(self) -> dict[str, np.ndarray]:
        """Row, set and kind (its place in `KINDS`) of every image of a set, set by set."""
        table = read_columns(self._members, ["row", "set", "kind"])
        kinds = pc.call_function("index_in", [table["kind"]], pc.SetLookupOptions(value_set=pa.array(KINDS)))
        return {**_columns(table.select(["row", "set"])), "kind": kinds.to_numpy().astype(np.int8)}

    def members(self, sets: Iterable[int]) -> dict[str, np.ndarray]:
        """Row, set, kept, distance and kind of every image of these sets, set by set, ascending rows within each."""
        return self._some(("set", "in", sorted(sets)))

    def of_kind(self, kind: str) -> dict[str, np.ndarray]:
        """The same of the removed images of this kind."""
        return self._some(("kind", "=", kind))

    def _some(self, wanted: tuple[str, str, Any]) -> dict[str, np.ndarray]:
        return _columns(read_columns(self._members, [name for name in _MEMBERS if name != "key"], filters=[wanted]))


def _write(
    path: Path,
    types: Mapping[str, pa.DataType],
    columns: Mapping[str, np.ndarray],
    looked_up: Mapping[str, tuple[pa.Array, str]],
    head: Mapping[str, str],
) -> None:
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()], metadata=dict(head))
    length = len(next(iter(columns.values())))
    with atomic_file(path) as temporary, temporary.open("wb") as handle, pq.ParquetWriter(handle, schema) as writer:
        for start in range(0, max(length, 1), _ROW_GROUP):
            part = {name: pa.array(values[start : start + _ROW_GROUP]) for name, values in columns.items()}
            part |= {name: values.take(part[place]) for name, (values, place) in looked_up.items()}
            writer.write_table(pa.table([part[name] for name in types], schema=schema))


def _check(path: Path, types: Mapping[str, pa.DataType]) -> tuple[str, float]:
    """Metric and threshold of a table, once its columns are the right ones."""
    try:
        schema = pq.read_schema(path)
        if {field.name: field.type for field in schema} != types:
            raise DataError(f"{path}: has the columns {', '.join(schema.names)}, not {', '.join(types)}.", fix=_FIX)
        return schema.metadata[b"metric"].decode(), float(schema.metadata[b"threshold"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing.", fix=_FIX) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}).", fix=_FIX) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its metadata does not name metric and threshold ({error!r}).", fix=_FIX) from error


def _numbers(path: Path, types: Mapping[str, pa.DataType], names: Sequence[str]) -> dict[str, np.ndarray]:
    return read_numbers(path, {name: types[name].to_pandas_dtype() for name in names})


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table.column(name).to_numpy() for name in table.column_names}
