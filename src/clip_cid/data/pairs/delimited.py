"""Text tables (.csv, .tsv, .txt): one row a record, with every line of the file accounted for.

A value in quotes may hold line ends and delimiters, so one quote out of place can swallow rows. Whether the quotes of a
file quote is therefore decided from the whole file, before the first row is given: `find_reading` says how.
"""

import csv
import itertools
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from clip_cid.data.pairs.images import EXTENSIONS

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

_QUOTE = '"'
_BODY = {"doubled": re.compile(r'(?:[^"]|"")*'), "escaped": re.compile(r'(?:[^"\\]|\\.|\\\Z)*')}
"""What may follow an opening quote on a line, up to the closing quote or the end of the line."""

_LONGEST = 1 << 24  # characters of a line or a quoted value: no caption is as long, and memory is bounded
_IMAGE_NAME = re.compile(rf"\.({'|'.join(EXTENSIONS)})\Z", re.IGNORECASE)
_DIGITS = re.compile(r"\d+")
_UTF8_MARK = "\xef\xbb\xbf"  # in Latin-1, in which lines are held
_UTF16_MARKS = ("\xff\xfe", "\xfe\xff")


_FIX_QUOTES = (
    "Correct that line: a quote inside a quoted value is doubled. In a .tsv without quoted values, quotes are letters."
)


class TableFault(Exception):
    """A text table that cannot be read without losing or making up rows."""

    def __init__(self, line: int, problem: str, *, of_quotes: bool = False, fix: str = "") -> None:
        super().__init__(f"line {line:,}: {problem}")
        self.of_quotes = of_quotes
        self.fix = _FIX_QUOTES if of_quotes else fix
        """What to do about it; empty where the file may be damaged."""


@dataclass(frozen=True)
class Reading:
    """How a text table is written."""

    delimiter: str
    quotes: Literal["doubled", "escaped", "letters"]
    """A quote inside a quoted value is doubled (`""`) or escaped (`\\"`); or no value is quoted."""
    reason: str = ""
    """Why quotes that are there are not read by the rules of CSV; empty where they are."""
    joined: int = 0
    """Values that hold line ends and delimiters, as rows that a quote out of place joins would."""
    first_joined: int = 0
    """The line on which the first of them begins."""


class Record(NamedTuple):
    """A row of the table, or its header. Cells are bytes, held as Latin-1."""

    line: int
    """Of the file, from 1, on which it begins."""
    cells: list[str]
    long: Sequence[int] = ()
    """The cells that span several lines."""


def find_header(path: Path, delimiter: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter and the column names: those of the first delimiter that gives all wanted columns.

    Spaces around a name count only if the columns are not found otherwise. If no delimiter gives them, it is the one
    that gives the most columns.

    Args:
        path: The table.
        delimiter: The one that the name of the file says; others are tried when it does not give the columns.
        wanted: Columns.

    Raises:
        TableFault: The file is empty, not text, or its first line never ends.
    """
    headers = {other: _header(path, other) for other in dict.fromkeys((delimiter, *DELIMITERS))}
    stripped = {other: [name.strip() for name in names] for other, names in headers.items()}
    for candidates in (headers, stripped):
        for other, names in candidates.items():
            if all(column in names for column in wanted):
                return other, names
    most = max(headers, key=lambda other: len(headers[other]))
    return most, headers[most]


def find_reading(path: Path, delimiter: str, names: Sequence[str], image_column: str) -> Reading:
    """How the table is quoted.

    Its quotes quote if the whole file can be read so: each value that begins with a quote also ends with one, every
    row has the columns of the header, and no value hides lines that look like rows. Otherwise, where tabs separate the
    values, quotes are letters, unless most rows are quoted rightly, so that only some are damaged.

    Raises:
        TableFault: Neither holds.
    """
    if not _has_quotes(path):
        return Reading(delimiter, "letters")

    image_at, faults = names.index(image_column), list[TableFault]()
    for quotes in ("doubled", "escaped"):
        reading, joined, first_joined = Reading(delimiter, quotes, str(faults[0]) if faults else ""), 0, 0
        try:
            for record in _checked_records(path, reading, len(names)):
                if record.long:
                    _refuse_hidden_rows(record, delimiter, len(names), image_at, path.parent)
                    joined += sum(delimiter in record.cells[at] for at in record.long)
                    first_joined = first_joined or (record.line if joined else 0)
            return replace(reading, joined=joined, first_joined=first_joined)
        except TableFault as fault:
            faults.append(fault)

    if delimiter == "\t" and _all_letters(path, len(names)):
        return Reading(delimiter, "letters", str(faults[0]))
    raise faults[0]


def records(path: Path, reading: Reading, columns: int) -> Iterator[Record]:
    """The rows below the header, in order; blank lines are none.

    Raises:
        TableFault: A row has another number of cells than `columns`, is too long, holds zero bytes, or its quotes are
            out of place.
    """
    rows = _checked_records(path, reading, columns)
    next(rows, None)  # the header
    return rows


def copy_rows(path: Path, out: Path, reading: Reading, columns: int, wanted: Sequence[bool]) -> None:
    """Write the header and some rows of a table as they are, byte for byte; blank lines are left out.

    Args:
        path: The table.
        out: The file to write.
        reading: How the table is written.
        columns: How many it has.
        wanted: For each row below the header whether it is copied.

    Raises:
        TableFault: As `records`; also if there are not so many rows.
    """
    firsts = (record.line for record in _checked_records(path, reading, columns))
    following = itertools.chain(itertools.islice(firsts, 1, None), [None])
    with (
        open(path, encoding="latin-1", newline=_line_end(path)) as lines,
        open(out, "w", encoding="latin-1", newline="") as target,
    ):
        number = 1  # of the line that is read next
        for is_wanted, after in zip(itertools.chain([True], wanted), following, strict=True):
            count = None if after is None else after - number
            own = [line for line in itertools.islice(lines, count) if line.rstrip("\r\n")]
            target.writelines(own if is_wanted else ())
            number = number if count is None else number + count


def _header(path: Path, delimiter: str) -> list[str]:
    """The names of the columns, read with quotes if that is possible."""
    first = None
    for quotes in ("doubled", "letters"):
        try:
            first = next(_records(path, Reading(delimiter, quotes)), None)
            break
        except TableFault as fault:
            if not fault.of_quotes:
                raise
    if first is None:
        raise TableFault(1, "Empty CSV file")
    return [cell.encode("latin-1").decode(errors="backslashreplace") for cell in first.cells]


def _has_quotes(path: Path) -> bool:
    with open(path, "rb") as file:
        return any(b'"' in block for block in iter(lambda: file.read(1 << 20), b""))


def _all_letters(path: Path, columns: int) -> bool:
    """Whether the table can be read with quotes as letters, and few of its rows look quoted."""
    rows = quoted = 0
    try:
        for record in _checked_records(path, Reading("\t", "letters"), columns):
            looks_quoted = any(len(cell) > 1 and cell[0] == cell[-1] == _QUOTE for cell in record.cells)
            if rows == 0 and looks_quoted:
                return False  # the names of the columns
            rows += 1
            quoted += looks_quoted
    except TableFault:
        return False
    return 2 * quoted <= rows


def _checked_records(path: Path, reading: Reading, columns: int) -> Generator[Record]:
    for record in _records(path, reading):
        if len(record.cells) != columns:
            raise TableFault(
                record.line,
                f"Expected {columns} columns, got {len(record.cells)}",
                fix=f"Correct that line: a value that holds {DELIMITERS[reading.delimiter]} stands in quotes, and each"
                " row has as many values as there are columns.",
            )
        yield record


def _refuse_hidden_rows(record: Record, delimiter: str, columns: int, image_at: int, folder: Path) -> None:
    """A quote out of place that meets another joins the rows between them to one value, which then holds such rows."""
    for at in record.long:
        if at == image_at:
            raise TableFault(record.line, "the name of the image continues on the next line", of_quotes=True)

        lines = re.split("\r\n|\r|\n", record.cells[at])
        for number, line in enumerate(lines):
            cells = line.split(delimiter)
            if delimiter == "\t":
                is_row = len(cells) > 1  # captions have no tabs
            else:
                # The value begins within one row, and ends within another.
                first, last = number == 0, number == len(lines) - 1
                place = image_at - at if first else image_at
                whole = len(cells) >= (columns - at if first else at + 1 if last else columns)
                known = 0 <= place < len(cells) and not (last and image_at > at)
                is_row = whole and known and _looks_like_image(cells[place], record.cells[image_at], folder)
            if is_row:
                problem = "the quoted value that begins here seems to hold other rows"
                raise TableFault(record.line, f"{problem}, such as line {record.line + number:,}", of_quotes=True)


def looks_like_image(cell: str) -> bool:
    """Whether a cell names an image by its ending."""
    return _IMAGE_NAME.search(cell.strip().partition("#")[0]) is not None


def _looks_like_image(cell: str, own: str, folder: Path) -> bool:
    """Whether a cell could name an image: by its ending, by its likeness to the row's `own` image, or by being there."""
    name = cell.strip().strip(_QUOTE)
    if _DIGITS.search(own) and _DIGITS.sub("0", name) == _DIGITS.sub("0", own):
        return True
    return bool(_IMAGE_NAME.search(name)) or os.path.isfile(folder / os.fsdecode(name.encode("latin-1")))


def _records(path: Path, reading: Reading) -> Generator[Record]:
    """Every record with its line; a blank line is none."""
    with open(path, encoding="latin-1", newline=_line_end(path)) as file:
        lines = _Lines(lambda: file.readline(_LONGEST))
        while (text := lines.next()) is not None:
            if reading.quotes != "letters" and _QUOTE in text:
                yield _quoted_record(text, lines, reading)
            elif text:
                yield Record(lines.number, text.split(reading.delimiter))


def _line_end(path: Path) -> str:
    """The end of the first line; other ends are letters, which pandas leaves without quotes."""
    with open(path, "rb") as file:
        first = re.search(rb"\r\n|\r|\n", file.read(1 << 20))
    return "\r" if first is not None and first[0] == b"\r" else "\n"


class _Lines:
    """The lines of a file, without their ends."""

    def __init__(self, read_line: Callable[[], str]) -> None:
        self._read_line = read_line
        self.number = 0
        """Of the last line, from 1."""
        self.end = ""
        """The end that the last line had."""

    def next(self) -> str | None:
        """The next line; None at the end of the file."""
        line = self._read_line()
        if not line:
            return None
        self.number += 1
        text = line.rstrip("\r\n")
        self.end = line[len(text) :]

        if self.number == 1:
            if text.startswith(_UTF16_MARKS):
                raise TableFault(1, "the text is UTF-16, not UTF-8", fix="Save the table as UTF-8.")
            text = text.removeprefix(_UTF8_MARK)
        if "\0" in text:
            raise TableFault(self.number, f"{text.count(chr(0)):,} zero bytes, so the file is damaged or no text")
        if len(line) >= _LONGEST:
            raise TableFault(self.number, f"more than {_LONGEST:,} bytes on one line")
        return text


def _quoted_record(text: str, lines: _Lines, reading: Reading) -> Record:
    """The record that begins on a line with quotes; further lines of it are taken from `lines`."""
    if reading.quotes == "doubled":
        try:
            return Record(lines.number, next(csv.reader((text,), delimiter=reading.delimiter, strict=True)))
        except csv.Error:
            pass  # out of place, or a value of several lines: both are for what follows

    first, cells, long, at = lines.number, list[str](), list[int](), 0
    while True:
        if text.startswith(_QUOTE, at):
            began = lines.number
            cell, text, at = _quoted_cell(text, at + 1, lines, reading)
            if lines.number > began:
                long.append(len(cells))
            if at < len(text) and text[at] != reading.delimiter:
                since = f" (from line {began:,})" if lines.number > began else ""
                problem = f"text follows the closing quote of a value{since}: {text[at : at + 20]!r}"
                raise TableFault(lines.number, problem, of_quotes=True)
        else:
            end = text.find(reading.delimiter, at)
            cell = text[at:] if end < 0 else text[at:end]
            at += len(cell)

        cells.append(cell)
        if at == len(text):
            return Record(first, cells, long)
        at += 1


def _quoted_cell(text: str, at: int, lines: _Lines, reading: Reading) -> tuple[str, str, int]:
    """The value behind an opening quote, the line on which it ends, and the place behind its closing quote."""
    first, size, parts, body = lines.number, 0, list[str](), _BODY[reading.quotes]
    while True:
        match = body.match(text, at)
        assert match is not None  # it may be empty
        parts.append(match[0])
        if match.end() < len(text):
            break

        parts.append(lines.end)
        size += len(text)
        following = lines.next()
        if following is None:
            raise TableFault(first, "the quote that opens a value here is never closed", of_quotes=True)
        if size > _LONGEST:
            raise TableFault(first, f"a quoted value has more than {_LONGEST:,} bytes", of_quotes=True)
        text, at = following, 0

    value = "".join(parts)
    value = value.replace('""', _QUOTE) if reading.quotes == "doubled" else re.sub(r'\\(["\\])', r"\1", value)
    return value, text, match.end() + 1
