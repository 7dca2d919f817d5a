import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_cid.errors import RunError
from clip_cid.journal import Journal

pytestmark = pytest.mark.resume

texts = st.text(st.characters(codec="utf-8") | st.just("\udcff"))  # a file name need not be UTF-8
values = st.dictionaries(texts, texts | st.integers() | st.none() | st.lists(st.booleans()), max_size=3)


@given(st.lists(values, max_size=6), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_journal_cut_at_any_byte_has_the_lines_before_it_and_goes_on(
    tmp_path: Path, lines: list[dict], data: st.DataObject
):
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    for line in lines:
        Journal(path).append(line)
    if path.exists():
        os.truncate(path, data.draw(st.integers(0, path.stat().st_size)))
    journal = Journal(path)
    kept = journal.read()
    assert kept == lines[: len(kept)]
    assert len(kept) == (path.read_bytes().count(b"\n") if path.exists() else 0)
    journal.drop_torn_line()
    journal.append({"next": 1}, {"next": 2})
    assert journal.read() == [*kept, {"next": 1}, {"next": 2}]


def test_lines_behind_the_checkpoint_are_dropped_and_the_file_goes_on(tmp_path: Path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1})
    size = journal.sync()
    journal.append({"step": 2})
    with journal.path.open("ab") as handle:
        handle.write(b'{"torn')
    journal.cut(size)
    assert journal.sync() == size
    journal.append({"step": 2, "text": "größer"})
    assert journal.read() == [{"step": 1}, {"step": 2, "text": "größer"}]
    assert [json.loads(line)["step"] for line in journal.path.read_text().splitlines()] == [1, 2]


def test_a_cut_to_nothing_makes_an_empty_file(tmp_path: Path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.cut(0)
    assert journal.path.read_bytes() == b""
    journal.append({"step": 1})
    journal.cut(0)
    assert journal.read() == []


def test_a_file_shorter_than_the_checkpoint_saw_it_is_an_error(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b"{}\n")
    with pytest.raises(RunError, match="3 bytes, but the checkpoint was made when it had 10"):
        Journal(tmp_path / "metrics.jsonl").cut(10)


def test_a_journal_is_replaced_whole_or_not_at_all(tmp_path: Path):
    journal = Journal(tmp_path / "results.jsonl")
    journal.append({"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        journal.replace({"a": 2}, {"a": math.nan})
    assert journal.read() == [{"a": 1}]
    journal.replace({"a": 2}, {"a": 3})
    assert journal.read() == [{"a": 2}, {"a": 3}]
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_number_that_json_does_not_have_is_refused_before_anything_is_written(tmp_path: Path):
    journal = Journal(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="Out of range float"):
        journal.append({"a": 1}, {"a": math.inf})
    assert journal.read() == []


def test_a_whole_line_that_is_not_json_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\nno json\n')
    with pytest.raises(ValueError, match="Expecting value"):
        Journal(tmp_path / "metrics.jsonl").read()
