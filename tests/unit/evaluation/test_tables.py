"""Rows of results become tables whose means say what they are means of."""

from typing import Any

import pytest

from clip_cid.evaluation.tables import (
    Group,
    difference_lines,
    recall_lines,
    retrieval_table,
    same_class_lines,
    score_lines,
    score_table,
    variant_notes,
)


def row(model: str, name: str, task: str, score: float, **more: Any) -> dict[str, Any]:
    interval = {"low": score - 0.1, "high": score + 0.1}
    return {"model": model, "set": name, "task": task, "metric": "top1", "score": score, **interval, **ABOUT, **more}


ABOUT = {"classes": 4, "chance": 0.25, "n": 100, "variant": ""}
ROWS = [
    *(row(model, name, "zero_shot", score) for model, name, score in (("a", "x", 0.5), ("a", "y", 0.3), ("b", "x", 0.6))),
    *(row("a", "x", "retrieval", score, metric=name) for name, score in (("image_to_text_R@1", 0.2), ("text_to_image_R@1", 0.4))),
]  # fmt: skip


def test_a_mean_says_over_how_many_of_the_sets_it_is() -> None:
    table = score_table(
        ROWS,
        "zero_shot",
        groups=[Group("", ("x", "y", "z"), 3)],
        missing={"z": "not there", "other": "not asked", "x": "of another task"},
    )
    assert table["scores"] == {"a": {"x": 0.5, "y": 0.3}, "b": {"x": 0.6}}
    assert table["mean"] == pytest.approx({"a": 0.4, "b": 0.6})
    assert table["mean_of"] == "2/3"
    assert table["missing"] == {"z": "not there"}
    assert table["sets"]["y"] == {"metric": "top1", "classes": 4, "chance": 0.25, "n": 100, "variant": ""}


def test_sets_of_different_groups_are_never_averaged() -> None:
    groups = [Group("CLIP's sets", ("x",), 14), Group("other sets", ("y", "z"), 2)]
    table = score_table(ROWS, "zero_shot", groups=groups, missing={})
    assert (table["mean"], table["mean_of"]) == ({"a": 0.5, "b": 0.6}, "1/14")
    assert [group["title"] for group in table["groups"]] == ["mean of 1/14 (CLIP's sets)", "mean of 1/2 (other sets)"]
    assert table["groups"][1]["mean"] == {"a": 0.3}
    assert [line[0] for line in score_lines(table, ["a"])[1]] == [
        "x",
        "y",
        *(group["title"] for group in table["groups"]),
    ]


def test_the_mean_that_is_told_is_of_the_first_group_that_was_measured() -> None:
    groups = [Group("CLIP's sets", ("w",), 14), Group("other sets", ("x", "y"), 2)]
    table = score_table(ROWS, "zero_shot", groups=groups, missing={"w": "not there"})
    assert table["mean_of"] == "2/2"
    assert table["mean"] == pytest.approx({"a": 0.4, "b": 0.6})
    nothing = score_table([], "zero_shot", groups=groups, missing={"w": "not there"})
    assert (nothing["mean"], nothing["mean_of"]) == ({}, "0/14")


def test_a_set_that_is_not_as_clip_measured_it_has_a_star_and_a_note() -> None:
    rows = [row("a", "x", "zero_shot", 0.5, variant="half of it"), row("a", "y", "zero_shot", 0.5)]
    table = score_table(rows, "zero_shot", groups=[Group("", ("x", "y"), 2)], missing={})
    assert [line[0] for line in score_lines(table, ["a"])[1]] == ["x *", "y", "mean of 2/2 *"]
    assert variant_notes({"zero_shot": table, "linear_probe": table}) == ["* x: half of it"]


def test_a_shifted_set_stands_above_imagenet_on_the_same_classes() -> None:
    rows = [
        row("a", "imagenet-r", "zero_shot", 0.4, top1=0.4, imagenet_same_classes=0.75),
        row("a", "x", "zero_shot", 0.4, top1=0.4),
    ]
    _, lines = same_class_lines(rows, ["a"])
    assert lines == [["imagenet-r", "this set", "40.0"], ["", "ImageNet, same classes", "75.0"]]


def test_differences_are_printed_from_the_first_model_in_points() -> None:
    pair = {"model": "a", "other": "b", "metric": "top1", "difference": 0.0213, "low": -0.001, "high": 0.04}
    found = [
        {**pair, "set": "x"},
        {**pair, "group": "mean of 1/3", "metric": "mean"},
        {**pair, "set": "x", "model": "b"},
    ]
    columns, lines = difference_lines(found, ["a", "b"])
    assert columns == ["set", "metric", "a - b"]
    assert lines == [["x", "top1", "+2.1 (-0.1 to +4.0)"], ["mean of 1/3", "", "+2.1 (-0.1 to +4.0)"]]


def test_the_mean_recall_of_a_set_is_over_directions_and_depths() -> None:
    table = retrieval_table(ROWS, asked=["x"], missing={})
    assert table["scores"]["a"]["x"]["mean_recall"] == pytest.approx(0.3)
    assert table["mean"] == pytest.approx({"a": 0.3})
    assert table["mean_of"] == "1/1"


def test_the_printed_scores_have_a_cell_for_every_model() -> None:
    table = score_table(ROWS, "zero_shot", groups=[Group("", ("x", "y", "z"), 3)], missing={"z": "gone"})
    columns, lines = score_lines(table, ["a", "b"])
    assert columns == ["set", "metric", "chance", "a", "b"]
    assert lines == [
        ["x", "top1", "25.0", "50.0 (40.0-60.0)", "60.0 (50.0-70.0)"],
        ["y", "top1", "25.0", "30.0 (20.0-40.0)", "-"],
        ["z", "not measured", "-", "-", "-"],
        ["mean of 2/3", "", "", "40.0", "60.0"],
    ]


def test_the_printed_recalls_have_a_line_for_every_direction_and_depth() -> None:
    columns, lines = recall_lines(retrieval_table(ROWS, asked=["x", "z"], missing={"z": "gone"}), ["a"])
    assert columns == ["set", "metric", "chance", "a"]
    assert lines == [
        ["x", "image_to_text_R@1", "25.0", "20.0 (10.0-30.0)"],
        ["x", "text_to_image_R@1", "25.0", "40.0 (30.0-50.0)"],
        ["z", "not measured", "-", "-"],
    ]
