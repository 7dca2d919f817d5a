"""Keys of a list that are no image's are said, and spaces around a key do not count."""

from pathlib import Path

import pyarrow as pa
import pytest

from clip_cid.data.balance.protected import protected_rows
from clip_cid.errors import DataError

KEYS = pa.array(["a,b", "tab\tkey", "日本", " spaces "], pa.large_string())


def rows(*lists: Path) -> list[int]:
    return protected_rows([], lists, [("source", 4)], KEYS).tolist()


def test_a_list_names_keys_as_they_are_and_the_unknown_ones_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "all.txt").write_bytes("spaces\r\n日本\na,b\ntab\tkey".encode())
    assert rows(tmp_path / "all.txt") == [0, 1, 2, 3]
    assert not caplog.records
    (tmp_path / "some.txt").write_text("nobody's\na,b\nno more\n")
    assert rows(tmp_path / "some.txt") == [0]
    assert f'2 keys of 3 in {tmp_path / "some.txt"} name no image, such as "nobody\'s"' in caplog.text
    with pytest.raises(DataError, match=r"gone\.txt: no such file") as error:
        rows(tmp_path / "gone.txt")
    assert error.value.fix == "Name a file with a text a line in balance.protect."
