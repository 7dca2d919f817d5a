"""DataComp's list: 38 sets, each with the way it is measured here or the reason why it is not."""

from collections import Counter
from pathlib import Path

import pytest

from clip_cid import cli
from clip_cid.data.sets.groups import DATACOMP, members
from clip_cid.data.sets.known_sets import find_known_set, known_sets


def test_datacomps_list_has_38_sets_and_says_of_each_how_it_is_measured() -> None:
    listed = members(DATACOMP)
    assert Counter(one.read for one in listed) == {"known": 18, "own": 13, "retrieval": 2, "missing": 5}
    assert len({one.task for one in listed}) == len({one.title for one in listed}) == 38
    for one in listed:
        assert (one.known is not None) == (one.read == "known")
        assert (one.lacks is not None) == (one.read == "missing")


def test_a_known_set_has_datacomps_metric_and_is_found_by_its_name_there() -> None:
    metrics = {"acc1": "top1", "mean_per_class_recall": "mean_per_class"}
    for one in members(DATACOMP):
        if one.known is not None:
            assert known_sets()[one.known].metric == metrics[one.metric]
            known = find_known_set(one.task)
            assert known is not None
            assert known.key == one.known
        elif one.read != "retrieval":
            assert find_known_set(one.task) is None


@pytest.mark.parametrize(
    ("name", "title"), [("CIFAR-10", "CIFAR-10"), ("wds/vtab/svhn", "SVHN"), ("svhn", "SVHN"), ("mine", None)]
)
def test_a_set_of_a_recipe_is_recognized(name: str, title: str | None) -> None:
    assert [one.title for one in members(DATACOMP) if one.is_named(name)] == ([title] if title else [])


def test_the_command_names_what_is_supported_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sets", "datacomp"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for one in members(DATACOMP):
        assert one.title in said
    assert "not measured: its metric, the macro F1" in said
    assert cli.main(["sets"]) == 0
    assert "fgvc_aircraft" in capsys.readouterr().out


def test_the_docs_have_the_same_list() -> None:
    page = (Path(__file__).parents[4] / "docs" / "evaluation_sets.md").read_text(encoding="utf-8")
    for one in members(DATACOMP):
        name = "-" if one.read == "missing" else f"`{one.name}`"
        assert f"| {one.title} | {name} | {one.metric} | {one.how} |" in page
