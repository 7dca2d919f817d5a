"""Files with a text a line: vocabularies, class names in prompts, captions alone; keys of images."""

import gzip
import itertools
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from clip_cid.errors import DataError

_LONGEST = 1 << 20  # bytes: a longer line is no text
_BLOCK = 1 << 16  # lines that are Python strings at once


@dataclass(frozen=True)
class TextLines:
    """The texts of some files."""

    texts: pa.LargeStringArray
    """Each once, in the order of the files, without white space around it."""
    empty: int
    """Lines with nothing but white space."""
    repeated: int
    """Lines whose text an earlier one has."""


def read_text_lines(paths: Sequence[Path], *, setting: str) -> TextLines:
    """Read UTF-8 files, one text a line; those that end in `.gz` are unpacked.

    Args:
        paths: The files.
        setting: The one that names them.

    Raises:
        DataError: A file is missing, unreadable or no such file, or there is no text in any.
    """
    blocks: list[pa.Array] = []
    empty = filled = 0
    for path in paths:
        lines = _texts(path, setting)
        while block := list(itertools.islice(lines, _BLOCK)):
            texts = [text for text in block if text]
            empty += len(block) - len(texts)
            filled += len(texts)
            blocks.append(pa.array(texts, pa.large_string()))

    if not filled:
        raise DataError(
            f"{', '.join(map(str, paths))}: no text, {empty:,} empty lines.",
            fix=f"Give files with a text a line in {setting}.",
        )
    texts = pa.chunked_array(blocks).unique()
    return TextLines(texts, empty, filled - len(texts))


def _texts(path: Path, setting: str) -> Generator[str]:
    """The text of every line, which may be empty."""
    for number, line in enumerate(_lines(path, setting), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: line {number:,} is not UTF-8 (byte {error.start}).", fix="Save the file as UTF-8."
            ) from error
        if "\0" in text:
            raise DataError(
                f"{path}: line {number:,} holds {text.count(chr(0)):,} zero bytes, so the file is damaged or no text.",
                fix="Mend or remove the line; a file in UTF-16 must be saved as UTF-8.",
            )
        yield text.strip()


def _lines(path: Path, setting: str) -> Generator[bytes]:
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            for number in itertools.count(1):
                line = handle.readline(_LONGEST + 1)
                if len(line) > _LONGEST:
                    raise DataError(
                        f"{path}: line {number:,} has more than {_LONGEST:,} bytes, so this is no file with a text a"
                        " line.",
                        fix="Give one with line breaks.",
                    )
                if not line:
                    return
                yield line

    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.", fix=f"Name a file with a text a line in {setting}.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole .gz ({error}).", fix="Fetch or pack it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).", fix="Check its permissions.") from error
