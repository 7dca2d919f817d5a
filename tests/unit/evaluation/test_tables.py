"""Scores become tables whose means say what they are means of."""

import pytest

from clip_cid.evaluation.scores import Difference, Score
from clip_cid.evaluation.tables import Group, retrieval_table, score_table


def score(model: str, name: str, task: str, value: float, *, metric: str = "top1") -> Score:
    return Score(
        model, name, task, metric, value, low=value - 0.1, high=value + 0.1, n=100, classes=4, chance=0.25, variant=""
    )


SCORES = [
    *(
        score(model, name, "zero_shot", value)
        for model, name, value in (("a", "x", 0.5), ("a", "y", 0.3), ("b", "x", 0.6))
    ),
    *(
        score("a", "x", "retrieval", value, metric=metric)
        for metric, value in (("image_to_text_R@1", 0.2), ("text_to_image_R@1", 0.4))
    ),
]


def test_a_mean_says_over_how_many_of_the_sets_it_is() -> None:
    table = score_table(
        SCORES,
        "zero_shot",
        groups=[Group("", ("x", "y", "z"), 3)],
        missing={"z": "not there", "other": "not in the recipe", "x": "of another task"},
    ).as_json()
    assert table["scores"] == {"a": {"x": 0.5, "y": 0.3}, "b": {"x": 0.6}}
    assert table["mean"] == pytest.approx({"a": 0.4, "b": 0.6})
    assert table["mean_of"] == "2/3"
    assert table["missing"] == {"z": "not there"}
    assert table["sets"]["y"] == {"metric": "top1", "classes": 4, "chance": 0.25, "n": 100, "variant": ""}


def test_sets_of_different_groups_are_never_averaged() -> None:
    groups = [Group("CLIP's sets", ("x",), 14), Group("other sets", ("y", "z"), 2)]
    summary = score_table(SCORES, "zero_shot", groups=groups, missing={}).summary
    assert (summary.mean.by_model, summary.mean.of) == ({"a": 0.5, "b": 0.6}, "1/14")
    assert [group.title for group in summary.groups] == ["mean of 1/14 (CLIP's sets)", "mean of 1/2 (other sets)"]
    assert summary.groups[1].by_model == {"a": 0.3}


def test_the_mean_of_a_table_is_of_the_first_group_that_was_measured() -> None:
    groups = [Group("CLIP's sets", ("w",), 14), Group("other sets", ("x", "y"), 2)]
    mean = score_table(SCORES, "zero_shot", groups=groups, missing={"w": "not there"}).summary.mean
    assert mean.of == "2/2"
    assert mean.by_model == pytest.approx({"a": 0.4, "b": 0.6})
    nothing = score_table([], "zero_shot", groups=groups, missing={"w": "not there"}).summary.mean
    assert (nothing.by_model, nothing.of) == ({}, "0/14")


def test_the_mean_recall_of_a_set_is_over_directions_and_depths() -> None:
    table = retrieval_table(SCORES, sets=["x"], missing={}).as_json()
    assert table["scores"]["a"]["x"]["mean_recall"] == pytest.approx(0.3)
    assert table["mean"] == pytest.approx({"a": 0.3})
    assert table["mean_of"] == "1/1"
    assert "groups" not in table


def test_the_table_holds_its_differences() -> None:
    gaps = [
        Difference("zero_shot", "x", "top1", "a", "b", -0.1, -0.2, 0.0),
        Difference("zero_shot", "mean of 1/1", "mean", "a", "b", -0.1, -0.2, 0.0),
    ]
    table = score_table(SCORES, "zero_shot", groups=[Group("", ("x",), 1)], missing={}, differences=gaps).as_json()
    numbers = {"model": "a", "other": "b", "difference": -0.1, "low": -0.2, "high": 0.0}
    assert table["differences"] == [
        {"set": "x", "metric": "top1", **numbers},
        {"group": "mean of 1/1", "metric": "mean", **numbers},
    ]
