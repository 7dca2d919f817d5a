"""Tables as CSV, safe to open in a spreadsheet: a text that it would run as a formula is a text there."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_cid.run_folder import atomic_file

_FORMULA = re.compile(r"'*(?:\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|\t)")  # with quotes that were there before
_MOST_CHARACTERS = 2**31 - 1  # of a cell; the default limit of the csv module is 131,072


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write one named column each; floats keep every digit, None is an empty cell.

    A carriage return in a text becomes a line feed: before Python 3.13 it is not quoted, and would end the
    line for a reader. A text that a spreadsheet would run as a formula gets a quote before it, which `read_csv`
    takes away again; numbers stay as they are.

    Raises:
        ValueError: The columns differ in length.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns: must be equally long, got {lengths}")
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(map(_plain_cell, columns))
        writer.writerows(map(_plain_cell, row) for row in zip(*columns.values(), strict=True))


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a table of `write_csv`, their cells as text."""
    csv.field_size_limit(_MOST_CHARACTERS)
    with open(path, encoding="utf-8", newline="") as handle:
        header, *rows = [[_original(cell) for cell in row] for row in csv.reader(handle)] or [[]]
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def _plain_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def _original(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
