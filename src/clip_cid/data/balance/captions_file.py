"""`captions.parquet`: of each set that holds several images, all captions, for the image that was kept."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int
from numpy import ndarray

from clip_cid.data.balance.tables import read_columns
from clip_cid.errors import DataError
from clip_cid.run_folder import atomic_file

CAPTIONS_FILE = "captions.parquet"

_AT_ONCE = 1 << 14  # sets
_ROWS_AT_ONCE = 1 << 17  # whose captions are read together, in the order of the store
_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("captions", pa.list_(pa.large_string()), nullable=False),
        pa.field("from_rows", pa.list_(pa.int64()), nullable=False),  # of each caption: whose it is
        pa.field("numbers", pa.list_(pa.int32()), nullable=False),  # and which of its captions, from 0
    ]
)


class GivenCaptions(NamedTuple):
    """The captions of removed rows, one after the other, by the row they were given to."""

    texts: pa.LargeStringArray
    kept: Int[ndarray, " captions"]
    """The row that each was given to, ascending."""
    rows: Int[ndarray, " captions"]
    """The row that each is of."""
    numbers: Int[ndarray, " captions"]
    """Which caption of that row."""


def write_captions(
    out: Path,
    *,
    kept: Int[ndarray, " sets"],
    rows: Int[ndarray, " members"],
    owner: Int[ndarray, " members"],
    keys: pa.LargeStringArray,
    captions: pa.LargeListArray,
) -> None:
    """Write the captions of the kept row, then those of the removed ones in their order, each text once.

    Args:
        out: The folder.
        kept: The kept row of each set.
        rows: Of every row of these sets, set by set.
        owner: The place of its set.
        keys: Of every row of the store.
        captions: Likewise; empty ones are left out.
    """
    with (
        atomic_file(out / CAPTIONS_FILE) as temporary,
        temporary.open("wb") as handle,
        pq.ParquetWriter(handle, _SCHEMA) as writer,
    ):
        for start in range(0, max(len(kept), 1), _AT_ONCE):
            some = kept[start : start + _AT_ONCE]
            members = slice(*np.searchsorted(owner, [start, start + len(some)]))
            sizes = np.bincount(owner[members] - start, minlength=len(some))
            merged = list(_merged(some, rows[members], sizes, captions))

            texts = [list(of_set) for of_set in merged]
            origins = ([[origin[part] for origin in of_set.values()] for of_set in merged] for part in (0, 1))
            numbers = pa.array(some)
            writer.write_table(pa.table([numbers, keys.take(numbers), texts, *origins], schema=_SCHEMA))


def read_captions(folder: Path) -> dict[int, list[str]]:
    """Kept row -> the captions of its set; empty where they were not merged.

    Raises:
        DataError: The table cannot be read.
    """
    path = folder / CAPTIONS_FILE
    if not path.is_file():
        return {}
    table = read_columns(path, ["row", "captions"])
    return dict(zip(table.column("row").to_pylist(), table.column("captions").to_pylist(), strict=True))


def read_given_captions(folder: Path) -> GivenCaptions:
    """The captions that rows were given besides their own; without spaces around them, and empty ones left out.

    Raises:
        DataError: The table cannot be read, or an older version wrote it, which did not say whose each caption is.
    """
    path = folder / CAPTIONS_FILE
    if "from_rows" not in pq.read_schema(path).names:
        raise DataError(
            f"{path}: an older version wrote it, without the row that each caption is of.",
            fix=f"Run `clip-cid balance {folder.parent} --force`; it compares no pair anew.",
        )
    table = read_columns(path, ["row", "captions", "from_rows", "numbers"])
    texts = pc.call_function("utf8_trim_whitespace", [_values(table, "captions")])
    kept = table.column("row").to_numpy().repeat(pc.call_function("list_value_length", [table.column("captions")]))
    rows, numbers = (_values(table, name).to_numpy() for name in ("from_rows", "numbers"))
    given = np.flatnonzero((kept != rows) & (pc.call_function("binary_length", [texts]).to_numpy() > 0))
    given = given[np.argsort(kept[given], kind="stable")]
    return GivenCaptions(texts.take(pa.array(given)), kept[given], rows[given], numbers[given])


def _values(table: pa.Table, name: str) -> pa.Array:
    """The entries of a column of lists, in their order."""
    values = pc.call_function("list_flatten", [table.column(name)])
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)


def _merged(
    kept: Int[ndarray, " sets"],
    rows: Int[ndarray, " members"],
    sizes: Int[ndarray, " sets"],
    captions: pa.LargeListArray,
) -> Iterator[dict[str, tuple[int, int]]]:
    """The captions of set after set, each with its row and its number there."""
    kept_first = np.insert(rows, np.cumsum(sizes) - sizes, kept)
    of_rows = _captions_of(kept_first, captions)
    for size in sizes.tolist():
        texts: dict[str, tuple[int, int]] = {}
        for row, own in itertools.islice(of_rows, size + 1):
            for number, text in enumerate(own):
                if text:
                    texts.setdefault(text, (row, number))
        yield texts


def _captions_of(rows: Int[ndarray, " n"], captions: pa.LargeListArray) -> Iterator[tuple[int, list[str]]]:
    """Row after row with its captions; a portion of them is read in the order of the store."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        each, places = np.unique(some, return_inverse=True)
        texts = captions.take(pa.array(each)).to_pylist()
        yield from ((row, texts[place]) for row, place in zip(some.tolist(), places.tolist(), strict=True))
