"""Files with a text a line."""

import gzip
from pathlib import Path

import pytest

from clip_cid.data import text_files
from clip_cid.data.text_files import read_text_lines
from clip_cid.errors import DataError


def test_each_text_comes_once_in_the_order_of_the_files_and_what_is_left_out_is_counted(tmp_path: Path):
    first, second = tmp_path / "b.txt", tmp_path / "a.txt"
    first.write_bytes("\ufeffa dog \r\n\r\n  \nein Käse\na dog\n".encode())
    second.write_text("the last\na dog\nno line break")
    lines = read_text_lines([first, second], setting="distill.texts")
    assert lines.texts.to_pylist() == ["a dog", "ein Käse", "the last", "no line break"]
    assert (lines.empty, lines.repeated) == (2, 2)


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "words.txt").write_text("".join(f"{number % 7}\n\n" for number in range(20)))
    whole = read_text_lines([tmp_path / "words.txt"], setting="distill.texts")
    monkeypatch.setattr(text_files, "_BLOCK", 3)
    blocks = read_text_lines([tmp_path / "words.txt"], setting="distill.texts")
    assert (blocks.texts, blocks.empty, blocks.repeated) == (whole.texts, whole.empty, whole.repeated)
    assert (len(whole.texts), whole.empty, whole.repeated) == (7, 20, 13)


def test_a_packed_file_is_the_file(tmp_path: Path):
    (tmp_path / "words.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert read_text_lines([tmp_path / "words.txt.gz"], setting="distill.texts").texts.to_pylist() == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "no text, 0 empty lines"),
        (b"\n  \n", "no text, 2 empty lines"),
        (b"good\nbad\0 one\0\n", "line 2 holds 2 zero bytes, so the file is damaged or no text"),
        ("one\ntwo\n".encode("utf-16"), r"line 1 is not UTF-8 \(byte 0\)"),
        (b"good\n\xff\n", r"line 2 is not UTF-8 \(byte 0\)"),
        (b"good\n" + b"x" * 2_000_000, "line 2 has more than 1,048,576 bytes"),
    ],
)
def test_what_is_no_file_with_a_text_a_line_is_refused_in_words(tmp_path: Path, content: bytes | None, words: str):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        read_text_lines([path], setting="distill.texts")
    assert str(path) in error.value.problem


@pytest.mark.parametrize("content", [b"plain text\n", gzip.compress(b"one\ntwo\n" * 1000, mtime=0)[:-12]])
def test_a_packed_file_that_is_not_whole_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "words.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"not a whole \.gz"):
        read_text_lines([tmp_path / "words.gz"], setting="distill.texts")


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        read_text_lines([tmp_path], setting="distill.texts")
