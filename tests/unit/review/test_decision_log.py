"""Decisions while people decide: on the disk before they are confirmed, one after the other, none against another."""

import json
import threading
from pathlib import Path

import pytest

from clip_cid.data.balance import decisions
from clip_cid.data.balance.decisions import Image, read_decisions
from clip_cid.errors import DataError
from clip_cid.review.decision_log import ContradictionError, DecisionLog

A, B, C = (Image(f"{number:032x}", key) for number, key in enumerate("abc"))


def test_a_decision_is_in_the_file_when_it_is_confirmed_and_undone_by_a_line_more(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    first = log.decide("not_duplicates", [A, B])
    second = log.decide("keep", [C])
    assert read_decisions(log.path).lines == (first, second)
    assert log.undo() == second
    assert log.undo(first.id) == first
    assert log.undo() is None
    assert len(log.path.read_text().splitlines()) == 4
    assert not read_decisions(log.path)


def test_the_first_decision_brings_the_name_of_its_file_to_the_disk_too(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(decisions, "sync", synced.append)
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.decide("keep", [A])
    log.decide("keep", [B])
    assert synced == [tmp_path]


def test_a_decision_against_an_earlier_one_is_refused_and_nothing_is_written(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    earlier = log.decide("keep", [A])
    before = log.path.read_bytes()
    with pytest.raises(ContradictionError, match="'a' is to be kept") as error:
        log.decide("remove_all", [A, B])
    assert error.value.earlier == earlier
    assert log.path.read_bytes() == before
    log.undo(earlier.id)
    log.decide("remove_all", [A, B])


@pytest.mark.parametrize("images", [[], [A], [A, A]])
def test_not_duplicates_needs_two_different_images(tmp_path, images):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    with pytest.raises(ValueError, match="needs 2 or more different"):
        log.decide("not_duplicates", images)
    assert not log.path.exists()


def test_lines_of_another_process_count_at_once(tmp_path):
    one, other = DecisionLog(tmp_path / "decisions.jsonl"), DecisionLog(tmp_path / "decisions.jsonl")
    line = one.decide("keep", [A])
    assert other.read().lines == (line,)
    with pytest.raises(ContradictionError):
        other.decide("remove_all", [A])


def test_many_at_once_leave_whole_lines(tmp_path):
    logs = [DecisionLog(tmp_path / "decisions.jsonl") for _ in range(4)]

    def decide(number: int) -> None:
        for place in range(8):
            logs[number].decide("keep", [Image(f"{8 * number + place:032x}", "key")])

    threads = [threading.Thread(target=decide, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({json.loads(line)["id"] for line in logs[0].path.read_text().splitlines()}) == 32


def test_a_file_that_is_something_else_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "decisions.jsonl").write_text("key,row\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        DecisionLog(tmp_path / "decisions.jsonl")
