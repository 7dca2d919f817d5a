"""JSON lines (.jsonl, .ndjson, also packed as .gz): a row is the object on a line of its own.

Unlike in a column of other tables, a field may be of another type in each row. A value that cannot be what it is needed
for makes its own row bad; a line that is no object refuses the file.
"""

import contextlib
import gzip
import itertools
import json
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid.data.pairs.delimited import TableFault

_PACKED = ".gz"
_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_LONGEST = 1 << 26  # bytes of a line; memory is bounded
_MARK, _BLANK = b"\xef\xbb\xbf", b" \t\r\n"
_FIX = 'Each line is one JSON object, such as {"image": "1.jpg", "caption": "a cat"}: mend or remove that line.'
_FIX_TWICE = "Which of the two counts is not known: keep one; a list holds several captions."


@dataclass(frozen=True)
class Odd:
    """A value that can be no path, caption or key; false, as one that is not there."""

    what: str

    def __bool__(self) -> bool:
        return False


class _Object(dict[str, Any]):
    """A JSON object that remembers a field it was given twice, of which a dictionary keeps the last."""

    twice: str | None = None


_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", _Object: "an object"}


def is_json_lines(path: Path) -> bool:
    """Whether a file is one of JSON lines, by its name."""
    return path.name.lower().endswith(_ENDINGS)


def json_rows(path: Path) -> Generator[dict[str, Any]]:
    """The fields of each row, in order; blank lines are none.

    Raises:
        TableFault: A line is no object, or the file is damaged.
    """
    for number, line in _lines(path):
        text = line.removeprefix(_MARK).decode(errors="surrogateescape")
        try:
            fields = _parsed(text)
        except json.JSONDecodeError as error:
            problem = f"no JSON object ({error.msg} at character {error.pos + 1:,})"
            raise TableFault(number, problem, fix=_FIX) from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, or too deep
            raise TableFault(number, f"no JSON object ({error})", fix=_FIX) from error
        if not isinstance(fields, _Object):
            raise TableFault(number, f"{_KINDS.get(type(fields), 'a text')}, not a JSON object", fix=_FIX)
        if fields.twice is not None:
            raise TableFault(number, f"the field {fields.twice!r} is there twice", fix=_FIX_TWICE)
        yield fields


def text_cell(value: Any) -> bytes | Odd | None:
    """A value that should be text, in UTF-8; what was no UTF-8 is none here."""
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    return None if value is None else Odd(_KINDS[type(value)])


def captions_cell(value: Any) -> bytes | Odd | list[bytes | Odd | None] | None:
    """A value that should be a caption, or a list of captions."""
    return [text_cell(one) for one in value] if isinstance(value, list) else text_cell(value)


def key_cell(value: Any) -> bytes | Odd | None:
    """A value that should be text or a whole number."""
    return text_cell(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def copy_lines(path: Path, out: Path, wanted: Sequence[bool]) -> None:
    """Write some rows of a file byte for byte, and packed if it is.

    Args:
        path: The file.
        out: The file to write.
        wanted: For each row whether it is copied.

    Raises:
        TableFault: The file is damaged.
        ValueError: It has more or fewer rows.
    """
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(open(out, "wb"))
        if _is_packed(path):
            target = stack.enter_context(gzip.GzipFile("", "wb", fileobj=target, mtime=0))
        for (_, line), is_wanted in zip(_lines(path), wanted, strict=True):
            if is_wanted:
                target.write(line if line.endswith(b"\n") else line + b"\n")


def _parsed(text: str) -> Any:
    return json.loads(
        text,
        object_pairs_hook=_object,
        parse_constant=lambda name: None,  # NaN, as pandas has it for no value
    )


def _object(fields: list[tuple[str, Any]]) -> _Object:
    found = _Object(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        found.twice = next(name for name in names if names.count(name) > 1)
    return found


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(_PACKED)


def _lines(path: Path) -> Generator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank."""
    try:
        with gzip.open(path, "rb") if _is_packed(path) else open(path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(_LONGEST)
                if not line:
                    return
                if len(line) >= _LONGEST:
                    raise TableFault(number, f"more than {_LONGEST:,} bytes on one line", fix=_FIX)
                if line.removeprefix(_MARK).strip(_BLANK):
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise OSError(f"not a whole .gz: {error}") from error
