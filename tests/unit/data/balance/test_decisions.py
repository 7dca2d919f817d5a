"""The file of decisions: what is wrong with a line is said, a kill costs no confirmed line, rows are found again."""

import json
import os

import numpy as np
import pytest

from clip_cid.data.balance.decisions import (
    Decision,
    Image,
    append_line,
    hash_text,
    parse_decisions,
    read_decisions,
    rows_named,
)
from clip_cid.errors import DataError

A, B, C = (Image(f"{number:016x}{number + 7:016x}", key) for number, key in enumerate("abc", start=1))
HASHES = np.array([[1, 8], [2, 9], [3, 10], [2, 9]], dtype=np.uint64)


def line(kind, *images, id="1"):
    return Decision(id, kind, images).as_json()


def parsed(*entries):
    return parse_decisions("".join(json.dumps(entry) + "\n" for entry in entries).encode(), where="file")


def test_a_digest_of_a_row_is_named_by_its_two_words():
    assert [hash_text(row) for row in HASHES[:3]] == [A.hash, B.hash, C.hash]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"id": "1", "decision": "maybe", "images": []}, "line 1: the decision must be not_duplicates, keep"),
        ({"id": "1", "decision": "keep", "images": [{"hash": "12", "key": "a"}]}, "'12' is not a digest of 32 digits"),
        ({"id": "1", "decision": "keep", "images": [{"key": "a"}]}, "must each have a hash and a key"),
        ({"id": "1", "decision": "keep", "images": "ab"}, "must each have a hash and a key"),
        ({"decision": "keep", "images": [A._asdict()]}, "line 1: 'id' must be a text, got None"),
        ({"id": "1", "decision": "keep", "images": []}, "keep needs 1 or more different images"),
        (line("not_duplicates", A), "not_duplicates needs 2 or more"),
        (line("not_duplicates", A, A), "not_duplicates needs 2 or more"),
        ({"id": "2", "decision": "undo", "of": "7"}, "line 1: undoes '7', which no line says"),
        ([1, 2], "line 1: not a decision, but b'\\[1, 2\\]'"),
    ],
)
def test_what_is_no_decision_is_named_with_its_line(entry, problem):
    with pytest.raises(DataError, match=problem):
        parsed(entry)


@pytest.mark.parametrize("content", [b"notes of mine", b"\xff\xfen\0", b'{"id"\n"n'])
def test_what_never_was_a_line_of_ours_is_refused_and_not_taken_for_a_torn_one(content: bytes):
    with pytest.raises(DataError, match=r"where, line \d: not JSON"):
        parse_decisions(content, where="where")


@pytest.mark.parametrize("torn", [b'{"id": "5f', b"{", b"\0\0\0", b'\0\0{"id"'])
def test_what_a_kill_or_a_power_cut_leaves_of_a_line_does_not_count(torn: bytes):
    assert not parse_decisions(torn, where="where")


def test_a_line_that_is_not_json_is_refused_and_a_torn_last_one_left_out(caplog):
    good = json.dumps(line("keep", A)).encode()
    with pytest.raises(DataError, match="line 1: not JSON"):
        parse_decisions(b'{"id": \n' + good + b"\n", where="file")
    assert parse_decisions(good + b'\n{"id": "2", "deci', where="file").keep == {A}
    assert "its last line was cut short, so it does not count" in caplog.text
    assert parse_decisions(good, where="file").keep == {A}  # whole, by hand and without a line break


def test_two_lines_that_contradict_each_other_are_named_with_what_to_do():
    with pytest.raises(DataError, match=r"'a' is both to be kept and to be removed .* ids 1, 2") as error:
        parsed(line("keep", A), line("remove_all", A, B, id="2"))
    assert "undo" in error.value.fix.lower()
    undone = parsed(line("keep", A), line("remove_all", A, B, id="2"), {"decision": "undo", "of": "1"})
    assert (undone.keep, undone.remove) == (frozenset(), {A, B})
    with pytest.raises(DataError, match="another line with the id '1' says otherwise"):
        parsed(line("keep", A), line("keep", B))


def test_appended_lines_survive_what_a_kill_has_left(tmp_path):
    path = tmp_path / "decisions.jsonl"
    append_line(path, line("keep", A))
    for left in (b'{"id": "9", "dec', b"\xff\xfe", json.dumps(line("keep", C, id="3")).encode()):
        whole = path.read_bytes()
        path.write_bytes(whole + left)
        append_line(path, line("keep", B, id="2"))
        lost = left if left[-1:] != b"}" else b""
        kept = left + b"\n" if not lost else b""
        assert path.read_bytes() == whole + kept + json.dumps(line("keep", B, id="2")).encode() + b"\n"
    assert read_decisions(path).keep == {A, B, C}


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "decisions.jsonl"
    append_line(path, line("keep", A))
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_line(path, line("keep", B, id="2"))
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_decisions(tmp_path / "none.jsonl")


def test_rows_are_found_by_digest_and_equal_ones_by_key():
    second = Image(B.hash, "d")
    named = rows_named(
        parsed(line("not_duplicates", B, second), line("keep", C, A, id="2")), HASHES, "abcd".__getitem__
    )
    assert (named.apart.tolist(), named.keep.tolist(), named.gone) == ([[1, 3]], [0, 2], ())


def test_an_image_under_another_key_is_found_if_only_one_has_its_digest():
    other = Image(A.hash, "was/a")
    named = rows_named(
        parsed(line("keep", other), line("remove_all", Image(B.hash, "was/b"), id="2")), HASHES, "abcd".__getitem__
    )
    assert named.keep.tolist() == [0]
    assert named.gone == (Image(B.hash, "was/b"),)  # two rows have its digest
    both = rows_named(parsed(line("keep", A), line("remove_all", other, id="2")), HASHES, "abcd".__getitem__)
    assert (both.keep.tolist(), both.remove.tolist(), both.gone) == ([0], [], (other,))


def test_a_row_that_is_gone_is_left_out_and_told():
    named = rows_named(
        parsed(line("not_duplicates", A, C), line("remove_all", B, C, id="2")), HASHES[:2], "ab".__getitem__
    )
    assert (named.apart.tolist(), named.remove.tolist(), named.gone) == ([], [1], (C,))


def test_two_names_of_one_row_that_contradict_each_other_are_refused():
    one, other = Image(A.hash, "x"), Image(A.hash, "y")
    with pytest.raises(DataError, match="'a' is both to be kept and to be removed"):
        rows_named(parsed(line("keep", one), line("remove_all", other, id="2")), HASHES, "abcd".__getitem__)
