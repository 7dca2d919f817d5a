"""Rows of results become tables whose means say what they are means of."""

from typing import Any

import pytest

from clip_cid.evaluation.tables import percent, recall_lines, retrieval_table, score_lines, score_table


def row(model: str, name: str, task: str, score: float, **more: Any) -> dict[str, Any]:
    return {"model": model, "set": name, "task": task, "metric": "top1", "score": score, **ABOUT, **more}


ABOUT = {"classes": 4, "chance": 0.25, "n": 100}
ROWS = [
    *(row(model, name, "zero_shot", score) for model, name, score in (("a", "x", 0.5), ("a", "y", 0.3), ("b", "x", 0.6))),
    *(row("a", "x", "retrieval", score, metric=name) for name, score in (("image_to_text_R@1", 0.2), ("text_to_image_R@1", 0.4))),
]  # fmt: skip


def test_a_mean_says_over_how_many_of_the_sets_it_is() -> None:
    table = score_table(
        ROWS,
        "zero_shot",
        asked=["x", "y", "z"],
        missing={"z": "not there", "other": "not asked", "x": "of another task"},
    )
    assert table["scores"] == {"a": {"x": 0.5, "y": 0.3}, "b": {"x": 0.6}}
    assert table["mean"] == pytest.approx({"a": 0.4, "b": 0.6})
    assert table["mean_of"] == "2/3"
    assert table["missing"] == {"z": "not there"}
    assert table["sets"]["y"] == {"metric": "top1", "classes": 4, "chance": 0.25, "n": 100}


def test_the_mean_recall_of_a_set_is_over_directions_and_depths() -> None:
    table = retrieval_table(ROWS, asked=["x"], missing={})
    assert table["scores"]["a"]["x"]["mean_recall"] == pytest.approx(0.3)
    assert table["mean"] == pytest.approx({"a": 0.3})
    assert table["mean_of"] == "1/1"


def test_the_printed_scores_have_a_cell_for_every_model() -> None:
    table = score_table(ROWS, "zero_shot", asked=["x", "y", "z"], missing={"z": "gone"})
    columns, lines = score_lines(table, ["a", "b"])
    assert columns == ["set", "metric", "chance", "a", "b"]
    assert lines == [
        ["x", "top1", "25.0", "50.0", "60.0"],
        ["y", "top1", "25.0", "30.0", "-"],
        ["z", "not measured", "-", "-", "-"],
        ["mean of 2/3", "", "", "40.0", "60.0"],
    ]


def test_the_printed_recalls_have_a_line_for_every_direction_and_depth() -> None:
    columns, lines = recall_lines(retrieval_table(ROWS, asked=["x", "z"], missing={"z": "gone"}), ["a"])
    assert columns == ["set", "metric", "chance", "a"]
    assert lines == [
        ["x", "image_to_text_R@1", "25.0", "20.0"],
        ["x", "text_to_image_R@1", "25.0", "40.0"],
        ["z", "not measured", "-", "-"],
    ]


def test_a_share_is_printed_in_percent() -> None:
    assert (percent(0.12345), percent(None)) == ("12.3", "-")
