"""A file of JSON lines that grows during the work and stays usable after a kill at any instant.

A kill can tear only the last line. A torn line has no line break at its end: `read` leaves it out, and `drop_torn_line`
removes it before anything is appended.
"""

import json
import os
from pathlib import Path
from typing import Any

from clip_cid.errors import RunError
from clip_cid.run_folder import atomic_file


class Journal:
    """The lines of one file, each a JSON value in UTF-8. NaN and infinity are refused, since JSON has none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Any]:
        """Every whole line; none if there is no file.

        Raises:
            ValueError: A whole line is not JSON.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole, _, _ = content.rpartition(b"\n")
        return [json.loads(line) for line in whole.split(b"\n") if line.strip()]

    def append(self, *lines: Any) -> None:
        """Add lines with a single write; `sync` brings them to the disk for good."""
        with open(self.path, "ab") as handle:
            handle.write(_encoded(lines))

    def sync(self) -> int:
        """Bring all lines to the disk for good; returns the size of the file in bytes."""
        with open(self.path, "ab") as handle:
            os.fsync(handle.fileno())
            return handle.tell()

    def replace(self, *lines: Any) -> None:
        """Write the whole file anew, at once."""
        with atomic_file(self.path) as temporary:
            temporary.write_bytes(_encoded(lines))

    def drop_torn_line(self) -> None:
        """Remove what a kill has left of a line, so that the next one begins on a line of its own."""
        if self.path.is_file():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes: the lines behind a checkpoint are of steps that will be done again.

        Raises:
            RunError: The file is shorter than that.
        """
        actual = self.path.stat().st_size if self.path.exists() else 0
        if actual < size:
            raise RunError(
                f"{self.path}: {actual:,} bytes, but the checkpoint was made when it had {size:,}.",
                fix=f"Something cut this file; delete {self.path.parent} to train from the start.",
            )
        with open(self.path, "ab") as handle:
            handle.truncate(size)


def _encoded(lines: tuple[Any, ...]) -> bytes:
    """Bytes of a file name that are not UTF-8 come through as JSON's own escapes."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    return text.encode(errors="backslashreplace")
