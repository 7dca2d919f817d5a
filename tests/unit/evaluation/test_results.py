"""Results that survive a kill at any instant, and are taken over instead of measured again."""

import json
from pathlib import Path

import numpy as np
import pytest

from clip_cid.evaluation import results
from clip_cid.evaluation.results import ANSWERS, Results
from clip_cid.evaluation.scores import RESULTS, Score


def score(name: str = "x", task: str = "zero_shot", metric: str = "top1") -> Score:
    return Score("a", name, task, metric, 0.5)


PREDICTED = {"predicted": np.array([0, 1, 1]), "labels": np.array([0, 1, 0])}


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_what_was_measured_is_found_again_by_its_key(tmp_path: Path) -> None:
    out = folder(tmp_path / "out")
    Results(out, None).add("k1", [score()], PREDICTED)
    again = Results(out, None)
    assert again.take_over("k2", model="a") is None
    (line,) = again.take_over("k1", model="renamed") or []
    assert (line.model, line.score) == ("renamed", 0.5)
    np.testing.assert_array_equal(again.answers(line)["predicted"], [0, 1, 1])


@pytest.mark.resume
def test_a_torn_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    out = folder(tmp_path / "out")
    Results(out, None).add("k1", [score()], PREDICTED)
    with open(out / RESULTS, "a") as handle:
        handle.write('{"model": "a", "sc')
    again = Results(out, None)
    again.add("k2", [score("y")], PREDICTED)
    assert [json.loads(line)["set"] for line in (out / RESULTS).read_text().splitlines()] == ["x", "y"]


@pytest.mark.resume
@pytest.mark.parametrize("damage", [b"\0" * 40, b"\xff{}\n", b"[]\n", b'{"model": 3}\n'])
def test_lines_that_do_not_load_are_measured_again(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = folder(tmp_path / "out")
    Results(out, None).add("k1", [score()], PREDICTED)
    content = (out / RESULTS).read_bytes()
    (out / RESULTS).write_bytes(damage + content)
    again = Results(out, None)
    assert "is measured again" in caplog.text
    assert again.take_over("k1", model="a") is None
    again.add("k1", [score()], PREDICTED)
    assert (out / RESULTS).read_bytes() == content
    assert Results(out, None).take_over("k1", model="a") is not None


@pytest.mark.resume
@pytest.mark.parametrize("damage", ["empty", "zeros", "cut", "one byte"])
def test_answers_that_do_not_load_are_measured_again(damage: str, tmp_path: Path) -> None:
    out = folder(tmp_path / "out")
    Results(out, None).add("k1", [score()], {"predicted": np.arange(500), "labels": np.arange(500)})
    (answers,) = (out / ANSWERS).iterdir()
    content = bytearray(answers.read_bytes())
    content[len(content) // 3] ^= 255
    whole = answers.read_bytes()
    answers.write_bytes(
        {"empty": b"", "zeros": bytes(len(whole)), "cut": whole[:-30], "one byte": bytes(content)}[damage]
    )
    assert Results(out, None).take_over("k1", model="a") is None


@pytest.mark.parametrize(
    ("task", "metric", "lost"),
    [("zero_shot", "top1", "labels"), ("retrieval", "R@1", "R@1"), ("retrieval", "R@1", "captions")],
)
def test_answers_that_have_lost_an_array_are_measured_again(tmp_path: Path, task: str, metric: str, lost: str) -> None:
    out = folder(tmp_path / "out")
    answers = {"R@1": np.ones(3), "captions": np.ones(3), **PREDICTED}
    Results(out, None).add("k1", [score(task=task, metric=metric)], answers)
    assert Results(out, None).take_over("k1", model="a") is not None
    (path,) = (out / ANSWERS).iterdir()
    np.savez(path, **{name: values for name, values in answers.items() if name != lost})
    assert Results(out, None).take_over("k1", model="a") is None


def test_lines_without_their_answers_are_measured_again_and_not_doubled(tmp_path: Path) -> None:
    """As after a kill between the lines and the answers, twice."""
    out = folder(tmp_path / "out")
    recalls = [score(task="retrieval", metric=metric) for metric in ("R@1", "R@5")]
    names: list[str] = []
    for _ in range(2):
        Results(out, None).add("k1", recalls, dict.fromkeys(("R@1", "R@5", "captions"), np.ones(3)))
        names = [path.name for path in (out / ANSWERS).iterdir()]
        (out / ANSWERS / names[0]).rename(tmp_path / names[0])
        assert Results(out, None).take_over("k1", model="a") is None
    (tmp_path / names[0]).rename(out / ANSWERS / names[0])
    found = Results(out, None).take_over("k1", model="a") or []
    assert [line.metric for line in found] == ["R@1", "R@5"]


def test_an_earlier_evaluation_is_taken_over_with_its_answers(tmp_path: Path) -> None:
    earlier, out = folder(tmp_path / "earlier"), folder(tmp_path / "out")
    first = Results(earlier, None)
    first.add("k1", [score()], PREDICTED)
    first.add("k2", [score("gone")], PREDICTED)
    second = Results(out, earlier)
    assert second.take_over("k1", model="a") is not None
    second.add("k3", [score("new")], PREDICTED)
    second.close()
    assert [json.loads(line)["set"] for line in (out / RESULTS).read_text().splitlines()] == ["x", "new"]
    assert len(list((out / ANSWERS).iterdir())) == 2
    for line in second.scores:
        np.testing.assert_array_equal(second.answers(line)["labels"], [0, 1, 0])


def test_closing_leaves_what_this_evaluation_is_made_of(tmp_path: Path) -> None:
    out = folder(tmp_path / "out")
    first = Results(out, None)
    first.add("old", [score("y")], PREDICTED)
    first.add("k1", [score()], PREDICTED)
    second = Results(out, None)
    second.add("k2", [score("z")], PREDICTED)
    second.take_over("k1", model="a")
    second.close()
    assert [json.loads(line)["set"] for line in (out / RESULTS).read_text().splitlines()] == ["z", "x"]
    assert {path.name for path in (out / ANSWERS).iterdir()} == {line.answers for line in second.scores}


def test_results_of_a_version_without_answers_are_not_taken_over(tmp_path: Path) -> None:
    earlier = folder(tmp_path / "earlier")
    (earlier / RESULTS).write_text(
        json.dumps({"model": "a", "set": "x", "task": "zero_shot", "metric": "top1", "score": 0.5}) + "\n"
    )
    assert Results(folder(tmp_path / "out"), earlier).take_over("k1", model="a") is None


@pytest.mark.parametrize(("classes", "kind"), [(1000, np.int16), (2**15 + 1, np.int64)])
def test_class_numbers_take_two_bytes_where_they_fit(tmp_path: Path, classes: int, kind: type) -> None:
    results = Results(folder(tmp_path / "out"), None)
    results.add("k", [score()], {"predicted": np.array([0, classes - 1])})
    found = results.answers(results.scores[0])["predicted"]
    assert found.dtype == kind
    assert found.tolist() == [0, classes - 1]


@pytest.mark.resume
def test_of_a_measurement_all_numbers_are_taken_over_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that failed for a moment left one of two recalls behind, and the comparison of models ended."""
    out = folder(tmp_path / "out")
    recalls = [score("x", "retrieval", metric) for metric in ("image_to_text_R@1", "text_to_image_R@1")]
    hits = {recall.metric: np.array([1, 0]) for recall in recalls}
    Results(out, None).add("k1", recalls, {"captions": np.array([1, 1]), **hits})
    assert len(Results(out, None).take_over("k1", model="a") or []) == 2
    monkeypatch.setattr(results, "_can_be_read", lambda _, line: line.metric != "image_to_text_R@1")
    assert Results(out, None).take_over("k1", model="a") is None
