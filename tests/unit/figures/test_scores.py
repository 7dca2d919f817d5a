import csv
from pathlib import Path

from clip_cid.evaluation.scores import Difference, Differences, Score, score_rows
from clip_cid.figures import scores

NONE = Differences([])


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


def test_a_mean_needs_every_set() -> None:
    rows = score_rows(FOUND)
    assert scores.mean_score(rows, "student") == 0.5625
    assert scores.mean_score(rows, "baseline") is None
    assert scores.mean_score([], "student") is None


def test_the_csv_is_the_table_with_empty_cells_where_nothing_is_known(tmp_path: Path) -> None:
    paired = Differences([Difference("zero_shot", "a", "top1", "student", "baseline", 0.125, -0.0625, 0.25)])
    scores.draw(FOUND, paired, "zero_shot", tmp_path)
    with open(tmp_path / "scores_zero_shot.csv", newline="") as handle:
        a, b = csv.DictReader(handle)
    assert (float(a["student"]), float(a["student_low"]), float(a["delta_to_baseline"])) == (0.625, 0.615, 0.125)
    assert (float(a["delta_to_baseline_low"]), float(a["delta_to_baseline_high"])) == (-0.0625, 0.25)
    assert (float(a["delta_to_teacher"]), a["delta_to_teacher_low"]) == (-0.125, "")
    assert (b["baseline"], b["delta_to_baseline"], b["student_low"]) == ("", "", "")


def test_names_from_data_are_text_in_the_figure(tmp_path: Path) -> None:
    scores.draw([one("student", "<b>$x^2$</b>", 0.5), one("$m$", "<b>$x^2$</b>", 0.4)], NONE, "zero_shot", tmp_path)
    drawing = (tmp_path / "scores_zero_shot.svg").read_text()
    assert "&lt;b&gt;$x^2$&lt;/b&gt;" in drawing
    assert "<b>" not in drawing
    assert ">$m$<" in drawing


def test_a_delta_of_zero_can_be_drawn(tmp_path: Path) -> None:
    summary = scores.draw([one("student", "a", 0.5), one("baseline", "a", 0.5)], NONE, "zero_shot", tmp_path)
    assert summary == {"student": 0.5, "baseline": 0.5}
