"""`captions.parquet`: of each set that holds several images, all captions, for the image that was kept."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from numpy import ndarray

from clip_cid.data.balance.tables import read_columns
from clip_cid.run_folder import atomic_file

CAPTIONS_FILE = "captions.parquet"

_AT_ONCE = 1 << 14  # sets
_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("captions", pa.list_(pa.large_string()), nullable=False),
    ]
)


def write_captions(
    out: Path,
    *,
    kept: Int[ndarray, " sets"],
    rows: Int[ndarray, " members"],
    owner: Int[ndarray, " members"],
    key: Callable[[int], str],
    captions: Callable[[int], Sequence[str]],
) -> None:
    """Write the captions of the kept row, then those of the removed ones in their order, each text once.

    Args:
        out: The folder.
        kept: The kept row of each set.
        rows: Of every row of these sets, set by set.
        owner: The place of its set.
        key: Of a row.
        captions: Of a row; empty ones are left out.
    """
    with (
        atomic_file(out / CAPTIONS_FILE) as temporary,
        temporary.open("wb") as handle,
        pq.ParquetWriter(handle, _SCHEMA) as writer,
    ):
        merged = _merged(kept, rows, owner, captions)
        for start in range(0, max(len(kept), 1), _AT_ONCE):
            some = kept[start : start + _AT_ONCE].tolist()
            columns = [some, [key(row) for row in some], [next(merged) for _ in some]]
            writer.write_table(pa.table(columns, schema=_SCHEMA))


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


def _merged(
    kept: Int[ndarray, " sets"],
    rows: Int[ndarray, " members"],
    owner: Int[ndarray, " members"],
    captions: Callable[[int], Sequence[str]],
) -> Iterator[list[str]]:
    """The captions of set after set."""
    at = 0
    for place, first in enumerate(kept.tolist()):
        texts = dict.fromkeys(captions(first))
        while at < len(rows) and owner[at] == place:
            texts |= dict.fromkeys(captions(int(rows[at])))
            at += 1
        yield [text for text in texts if text]
