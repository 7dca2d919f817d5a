import os
from pathlib import Path

import pytest

from clip_cid.data.pairs import indexed_files
from clip_cid.data.pairs.format import SourceFile
from clip_cid.data.pairs.indexed_files import bytes_at


def test_a_file_stays_open_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may close what is kept open, and open a file of its own, which gets the number that is free."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(b"ours")
    theirs.write_bytes(b"not!")
    read = os.pread

    def read_late(number: int, size: int, at: int) -> bytes:
        indexed_files._open.clear()
        opened = os.open(theirs, os.O_RDONLY)
        try:
            return read(number, size, at)
        finally:
            os.close(opened)

    monkeypatch.setattr(os, "pread", read_late)
    assert bytes_at(SourceFile.of("ours", ours), 0, 4) == b"ours"
