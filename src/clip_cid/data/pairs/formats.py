"""The known formats of pairs. A new one is added to `FORMATS` here; `format.py` says what it must do."""

from pathlib import Path

from clip_cid.data.pairs.folders import Folders
from clip_cid.data.pairs.format import PairFormat
from clip_cid.data.pairs.tables import Tables
from clip_cid.data.pairs.tars import Tars
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

URL_FORMAT = Tars()
"""The format of a URL, whatever its name; it is fetched before it is scanned."""

FORMATS: tuple[PairFormat, ...] = (Folders(), URL_FORMAT, Tables())
"""The first format here that owns a path is the format of that path."""

_READERS = (
    ((".json",), "a few lines (docs/data.md has those for COCO)"),
    ((".jsonl", ".ndjson"), "pandas.read_json(FILE, lines=True).to_parquet('table.parquet')"),
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

    *most, last = (known.examples for known in FORMATS)
    read = next((reader for endings, reader in _READERS if path.name.lower().endswith(endings)), None)
    hint = "" if read is None else f" This one becomes a table by {read}."
    raise DataError(
        f"{name}: not a known format of pairs.",
        fix=f"Give {', '.join(most)} or {last}; a wildcard leaves others out as *.tar.{hint}",
    )
