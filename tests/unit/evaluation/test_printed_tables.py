"""The tables of an evaluation as they are printed."""

from dataclasses import replace

from clip_cid.evaluation.printed_tables import (
    difference_lines,
    same_class_lines,
    table_lines,
    variant_notes,
)
from clip_cid.evaluation.scores import Difference, Score
from clip_cid.evaluation.tables import Group, retrieval_table, score_table


def score(model: str, name: str, value: float, *, task: str = "zero_shot", metric: str = "top1") -> Score:
    return Score(
        model, name, task, metric, value, low=value - 0.1, high=value + 0.1, n=100, classes=4, chance=0.25, variant=""
    )


SCORES = [score("a", "x", 0.5), score("a", "y", 0.3), score("b", "x", 0.6)]
RECALLS = [
    score("a", "x", value, task="retrieval", metric=metric)
    for metric, value in (("image_to_text_R@1", 0.2), ("text_to_image_R@1", 0.4))
]


def test_the_printed_scores_have_a_cell_for_every_model() -> None:
    table = score_table(SCORES, "zero_shot", groups=[Group("", ("x", "y", "z"), 3)], missing={"z": "gone"})
    columns, lines = table_lines(table, ["a", "b"])
    assert columns == ["set", "metric", "chance", "a", "b"]
    assert lines == [
        ["x", "top1", "25.0", "50.0 (40.0-60.0)", "60.0 (50.0-70.0)"],
        ["y", "top1", "25.0", "30.0 (20.0-40.0)", "-"],
        ["z", "not measured", "-", "-", "-"],
        ["mean of 2/3", "", "", "40.0", "60.0"],
    ]


def test_the_means_of_groups_stand_below_the_sets() -> None:
    groups = [Group("CLIP's sets", ("x",), 14), Group("other sets", ("y", "z"), 2)]
    table = score_table(SCORES, "zero_shot", groups=groups, missing={})
    titles = [line[0] for line in table_lines(table, ["a"])[1]]
    assert titles == ["x", "y", *(group.title for group in table.summary.groups)]


def test_a_set_that_is_not_as_clip_measured_it_has_a_star_and_a_note() -> None:
    scores = [replace(score("a", "x", 0.5), variant="half of it"), score("a", "y", 0.5)]
    table = score_table(scores, "zero_shot", groups=[Group("", ("x", "y"), 2)], missing={})
    assert [line[0] for line in table_lines(table, ["a"])[1]] == ["x *", "y", "mean of 2/2 *"]
    assert variant_notes({"zero_shot": table, "linear_probe": table}) == ["* x: half of it"]


def test_a_shifted_set_stands_above_imagenet_on_the_same_classes() -> None:
    scores = [
        replace(score("a", "imagenet-r", 0.4), details={"top1": 0.4, "imagenet_same_classes": 0.75}),
        replace(score("a", "x", 0.4), details={"top1": 0.4}),
    ]
    _, lines = same_class_lines(scores, ["a"])
    assert lines == [["imagenet-r", "this set", "40.0"], ["", "ImageNet, same classes", "75.0"]]


def test_differences_are_printed_from_the_first_model_in_points() -> None:
    one = Difference("zero_shot", "x", "top1", "a", "b", 0.0213, -0.001, 0.04)
    gaps = [one, replace(one, set="mean of 1/3", metric="mean"), replace(one, model="b")]
    columns, lines = difference_lines(gaps, ["a", "b"])
    assert columns == ["set", "metric", "a - b"]
    assert lines == [["x", "top1", "+2.1 (-0.1 to +4.0)"], ["mean of 1/3", "", "+2.1 (-0.1 to +4.0)"]]


def test_the_printed_recalls_have_a_line_for_every_direction_and_depth() -> None:
    columns, lines = table_lines(retrieval_table(RECALLS, sets=["x", "z"], missing={"z": "gone"}), ["a"])
    assert columns == ["set", "metric", "chance", "a"]
    assert lines == [
        ["x", "image_to_text_R@1", "25.0", "20.0 (10.0-30.0)"],
        ["x", "text_to_image_R@1", "25.0", "40.0 (30.0-50.0)"],
        ["z", "not measured", "-", "-"],
    ]
