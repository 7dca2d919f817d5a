"""Scores and differences are read in one place, and what is none is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from clip_cid.errors import DataError
from clip_cid.evaluation.scores import (
    RESULTS,
    Difference,
    Differences,
    Score,
    model_order,
    read_scores,
    read_task_summaries,
    reference_model,
    score_rows,
)

GOOD = {"model": "student", "set": "a", "task": "zero_shot", "metric": "top1", "score": 0.5}
TABLE: dict[str, Any] = {"mean": {"student": 0.5}, "mean_of": "1/1", "missing": {}, "differences": []}


def written(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / RESULTS


def test_a_line_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    numbers = {"low": 0.25, "high": 0.75, "n": 9, "classes": 4, "chance": 0.25, "variant": ""}
    details = {"versions": {"numpy": "9"}, "top1": 0.5, "C": 3, "bad_images": []}
    line = {**GOOD, **numbers, **details, "cached": ["x"], "key": "k", "answers": "k.npz"}
    (score,) = read_scores(written(tmp_path, line))
    assert (score.score, score.top1, score.details["C"], score.cached) == (0.5, 0.5, 3, ("x",))
    assert list(score.line().items()) == list(line.items())


def test_a_retrieval_has_no_variant(tmp_path: Path) -> None:
    line = {**GOOD, "task": "retrieval", "low": 0.25, "high": 0.75, "n": 9, "classes": None, "chance": 0.25}
    line |= {"bad_images": [], "cached": [], "key": "k", "answers": "k.npz"}
    (score,) = read_scores(written(tmp_path, line))
    assert list(score.line().items()) == list(line.items())


@pytest.mark.parametrize(
    "change",
    [
        {"score": 50.0},
        {"score": float("nan")},
        {"low": -0.1},
        {"score": "high"},
        {"score": None},
        {"top1": 1.5},
        {"imagenet_same_classes": "half"},
    ],
)
def test_a_score_that_is_no_share_of_one_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = written(tmp_path, GOOD, GOOD | change)
    with pytest.raises(DataError, match=r"results\.jsonl, line 2: not a result with shares of 1"):
        read_scores(path)


@pytest.mark.parametrize("name", ["model", "set", "task", "metric", "score"])
def test_a_result_without_a_model_or_another_of_its_facts_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, {key: value for key, value in GOOD.items() if key != name})
    with pytest.raises(DataError, match=f"line 1: .*{name}"):
        read_scores(path)


def test_a_task_that_no_protocol_measures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: .*task 'guessing'"):
        read_scores(written(tmp_path, GOOD | {"task": "guessing"}))


def test_a_file_that_is_not_json_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no results"):
        read_scores(tmp_path / RESULTS)
    (tmp_path / RESULTS).write_text("nothing\n")
    with pytest.raises(DataError, match=r"results\.jsonl: not a result"):
        read_scores(tmp_path / RESULTS)


@pytest.mark.parametrize("of_group", [False, True])
def test_a_difference_is_read_and_written_as_it_was(tmp_path: Path, of_group: bool) -> None:
    one = Difference("knn", "mean of 1/1" if of_group else "a", "mean" if of_group else "top1", "x", "y", 0.1, 0, 0.2)
    (tmp_path / "knn.json").write_text(json.dumps({**TABLE, "differences": [one.line()]}))
    summaries = read_task_summaries(tmp_path)
    assert list(summaries) == ["knn"]
    assert summaries["knn"].differences == (one,)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "knn.json").write_text(json.dumps({**TABLE, "differences": [{"model": "student", "set": "a"}]}))
    with pytest.raises(DataError, match=r"knn\.json: not a table of scores \(KeyError: 'metric'\)"):
        read_task_summaries(tmp_path)


def test_differences_are_those_of_the_student() -> None:
    one = Difference("knn", "a", "top1", "student", "b", 0.1, 0.0, 0.2)
    between_others = Difference("knn", "a", "top1", "b", "c", 0.1, 0.0, 0.2)
    differences = Differences([one, between_others])
    assert list(differences) == [one]
    assert differences.of("knn", "a", "top1", "b") == one
    assert differences.of("knn", "a", "top1", "c") is None


def one(model: str, name: str, score: float, *, half: float | None = None, task: str = "zero_shot") -> Score:
    low, high = (None, None) if half is None else (score - half, score + half)
    return Score(model, name, task, "top1", score, low, high, n=100, classes=4, chance=0.25)


FOUND = [
    one("teacher", "a", 0.75, half=0.01),
    one("baseline", "a", 0.5, half=0.2),
    one("student", "a", 0.625, half=0.01),
    one("student", "b", 0.5),
    one("teacher", "b", 0.5),
]


def test_the_student_comes_first_and_the_teacher_last() -> None:
    assert model_order(score.model for score in FOUND) == ["student", "baseline", "teacher"]


@pytest.mark.parametrize(
    ("models", "reference"),
    [
        (["student", "other", "baseline", "teacher"], "baseline"),
        (["student", "other", "teacher"], "other"),
        (["student", "teacher"], None),
        (["student"], None),
    ],
)
def test_whom_the_student_is_measured_against(models: list[str], reference: str | None) -> None:
    assert reference_model(models) == reference


def test_deltas_are_student_minus_other_and_none_where_one_is_missing() -> None:
    a, b = score_rows(FOUND)
    assert a.delta("teacher") == -0.125
    assert a.delta("baseline") == 0.125
    assert b.delta("baseline") is None
