"""The known formats of pairs. A new one is added to `FORMATS` here; `format.py` says what it must do."""

from pathlib import Path

from clip_cid.addresses import path_of
from clip_cid.data.pairs.folders import Folders
from clip_cid.data.pairs.format import PairFormat
from clip_cid.data.pairs.tables import Tables
from clip_cid.data.pairs.tars import Tars
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

URL_FORMAT = Tars()
"""The format of what a command brings, and of an address on the web whose name says nothing else."""
FOLDER_FORMAT = Folders()

FORMATS: tuple[PairFormat, ...] = (FOLDER_FORMAT, URL_FORMAT, Tables())
"""The first format here that owns a path is the format of that path."""

_READERS = (
    ((".json",), "a few lines (docs/data.md has those for COCO)"),
    ((".xlsx", ".xls", ".ods"), "pandas.read_excel(FILE).to_parquet('table.parquet')"),
    ((".feather", ".arrow"), "pandas.read_feather(FILE).to_parquet('table.parquet')"),
    ((".csv.gz", ".csv.zip", ".csv.bz2", ".csv.xz"), "pandas.read_csv(FILE).to_parquet('table.parquet')"),
)
"""Endings of other tables, and what makes a known one of them."""


def format_of(path: Path, name: str, settings: PairsConfig) -> PairFormat:
    """The format of a local source.

    Raises:
        DataError: No format owns it.
    """
    for known in FORMATS:
        if known.owns(path, settings):
            return known

    raise unknown_format(name)


def format_by_name(address: str, settings: PairsConfig) -> PairFormat | None:
    """The format of a file elsewhere, by its name alone; None if it says none."""
    path = Path(path_of(address))
    return next((known for known in FORMATS if known is not FOLDER_FORMAT and known.owns(path, settings)), None)


def unknown_format(name: str) -> DataError:
    *most, last = (known.examples for known in FORMATS)
    read = next((reader for endings, reader in _READERS if name.lower().endswith(endings)), None)
    hint = "" if read is None else f" This one becomes a table by {read}."
    return DataError(
        f"{name}: not a known format of pairs.",
        fix=f"Give {', '.join(most)} or {last}; a wildcard leaves others out as *.tar.{hint}",
    )
