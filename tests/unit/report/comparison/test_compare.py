"""Several evaluations on one page: the oracle of a paired interval is an evaluation of both models together."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fabricated_run import make_recipe, make_run
from tiny_sets import folder_set, image, pair_tar, tar_set, tiny_clip

from clip_cid import cli
from clip_cid.errors import RunError
from clip_cid.models.export import export_student
from clip_cid.report.comparison import contenders
from clip_cid.report.comparison.page import compare
from clip_cid.run_folder import read_json

COMMON = ["--machine.device", "cpu", "--machine.workers", "0", "--evaluate.no-linear-probe"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models evaluated apart and together on the same sets, and one of them on changed ones."""
    root = tmp_path_factory.mktemp("scores")
    for name, seed in (("a", 0), ("b", 1)):
        export_student(tiny_clip(root, seed=seed), root / name, head_state={}, provenance={})
    colors, shapes = tar_set(root / "colors", each=9), tar_set(root / "shapes", each=5)
    pairs = pair_tar(root / "pairs.tar", {f"p{number}": (f"caption {number}", "a thing") for number in range(9)})
    sets = ["--evaluate.sets", "colors", str(colors), "shapes", str(shapes)]
    retrieval = ["--evaluate.retrieval", "pairs", str(pairs)]

    def evaluate(folder: str, *models: str, sets: list[str]) -> None:
        references = [f"local-dir:{root / model}" for model in models]
        assert cli.main(["evaluate", str(root / folder), "--model", *references, *sets, *COMMON]) == 0

    evaluate("one", "a", sets=[*sets, *retrieval])
    evaluate("two", "b", sets=[*sets, *retrieval])
    evaluate("both", "a", "b", sets=[*sets, *retrieval])
    evaluate("less", "b", sets=sets)
    shutil.copytree(colors, root / "copy" / "colors")
    write = tar_set(root / "other" / "shapes", each=4)
    evaluate("other", "b", sets=["--evaluate.sets", "colors", str(root / "copy" / "colors"), "shapes", str(write)])
    return root


def compared(out: Path, *places: Path, common: bool = False) -> dict[str, Any]:
    compare(places, out, common=common)
    return read_json(out / "compare.json")


@pytest.mark.slow
def test_models_evaluated_apart_get_the_paired_intervals_of_an_evaluation_together(
    scores: Path, tmp_path: Path
) -> None:
    found = compared(tmp_path / "out", scores / "one", scores / "two")
    second = found["models"][1]["name"]
    assert found["first"] == "one: local-dir:a"
    assert (found["unpaired"], found["left_out"]) == ([], {})

    expected: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for task in ("zero_shot", "knn", "retrieval"):
        for line in read_json(scores / "both" / "evaluate" / f"{task}.json")["differences"]:
            if "set" in line:  # a minus b there, b minus a here
                gap = (-line["difference"], -line["high"], -line["low"])
                expected[task, line["set"], line["metric"]] = gap
    leads = {
        (row["task"], row["set"], row["metric"]): tuple(
            row[f"{second} {part}"] for part in ("lead", "lead low", "lead high")
        )
        for row in found["rows"]
    }
    assert leads.keys() == expected.keys()
    for place, gap in expected.items():
        assert leads[place] == pytest.approx(gap, abs=0.02), place  # other draws of the same bootstrap
        assert leads[place][0] == pytest.approx(gap[0])
    assert found["models"][0]["cost"]["image_parameters"] > 0


@pytest.mark.slow
def test_the_page_is_one_file_with_scores_cost_and_means(scores: Path, tmp_path: Path) -> None:
    compare([scores / "one", scores / "two"], tmp_path / "out", common=False)
    text = (tmp_path / "out" / "compare.html").read_text()
    for word in ("Zero-shot", "mean of 2/2", "GFLOPs an image", "Nothing is left out", "compare.csv"):
        assert word in text
    assert "<script" not in text
    assert not re.findall(r"https?://", text)
    assert not [path.name for path in (tmp_path / "out").iterdir() if str(scores) in path.read_text()]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.csv", "compare.html", "compare.json"]


@pytest.mark.slow
def test_a_model_that_is_there_already_is_left_out_by_name(scores: Path, tmp_path: Path) -> None:
    found = compared(tmp_path / "out", scores / "one", scores / "both")
    assert [model["name"] for model in found["models"]] == [
        "one: local-dir:a",
        "both: local-dir:b",
    ]
    assert found["left_out"] == {"both: local-dir:a": "has the weights of one: local-dir:a"}


@pytest.mark.slow
def test_a_model_in_both_shows_that_the_images_are_the_same(scores: Path, tmp_path: Path) -> None:
    """The files behind a set differ, as one evaluation read the training images too; the key of a model does not."""
    command = ["evaluate", str(tmp_path / "untrained"), "--evaluate.no-knn", *COMMON]
    command += ["--model", f"local-dir:{scores / 'a'}", f"local-dir:{scores / 'b'}"]
    assert cli.main([*command, "--evaluate.sets", "colors", str(scores / "colors")]) == 0
    found = compared(tmp_path / "out", scores / "one", tmp_path / "untrained", common=True)
    names = [model["name"] for model in found["models"]]
    assert names == ["one: local-dir:a", "untrained: local-dir:b"]
    assert "untrained: local-dir:a" in found["left_out"]
    assert found["unpaired"] == []
    assert found["rows"][0][f"{names[1]} lead low"] is not None


@pytest.mark.slow
def test_sets_that_differ_are_refused_by_name_or_left_out_by_name(scores: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the sets differ: pairs \(retrieval\) is not in less\.\n.*--common") as error:
        compare([scores / "one", scores / "less"], tmp_path / "out", common=False)
    assert len(str(error.value).splitlines()) == 2
    assert not (tmp_path / "out").exists()
    found = compared(tmp_path / "out", scores / "one", scores / "less", common=True)
    assert found["left_out"] == {"pairs, retrieval": "not in less"}
    assert {row["set"] for row in found["rows"]} == {"colors", "shapes"}

    with pytest.raises(RunError, match="shapes is not the same set in less and other: n 15 and 12"):
        compare([scores / "less", scores / "other"], tmp_path / "out", common=False)


@pytest.mark.slow
def test_images_that_were_exchanged_are_not_paired(scores: Path, tmp_path: Path) -> None:
    """As many images of the same classes in the same order, and still others."""
    sets = {"here": folder_set(tmp_path / "here" / "things"), "there": folder_set(tmp_path / "there" / "things")}
    (sets["there"] / "test" / "red_thing" / "1.jpg").write_bytes(image((200, 10, 10), seed=99))
    for name, model in (("here", "a"), ("there", "b")):
        (sets[name] / "templates.txt").write_text("a {c}")
        command = ["evaluate", str(tmp_path / f"run-{name}"), "--model", f"local-dir:{scores / model}", *COMMON]
        assert cli.main([*command, "--evaluate.sets", "things", str(sets[name])]) == 0
    found = compared(tmp_path / "out", tmp_path / "run-here", tmp_path / "run-there")
    second = found["models"][1]["name"]
    assert found["unpaired"] == [f"{second} on things"]
    assert all(row[f"{second} lead low"] is None for row in found["rows"])
    assert "Only unpaired intervals are possible" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.slow
def test_runs_of_an_older_version_are_compared_with_their_curves(tmp_path: Path) -> None:
    for name in ("old", "older"):
        (tmp_path / name).mkdir()
        folder = make_run(tmp_path / name, make_recipe(tmp_path / name))
        manifest = folder.path / "evaluate" / "manifest.json"
        assert "costs" not in json.loads(manifest.read_text())["summary"]
    places = [tmp_path / name / folder.path.name for name in ("old", "older")]
    found = compared(tmp_path / "out", *places)
    assert [model["name"] for model in found["models"]][:2] == [
        f"{name}/{folder.path.name}" for name in ("old", "older")
    ]
    assert found["models"][0]["cost"] is None
    text = (tmp_path / "out" / "compare.html").read_text()
    assert 'id="curves"' in text
    assert "Not measured when these were evaluated" in text
    header, *lines = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert header == "training,step,loss,value"
    assert {line.partition(",")[0] for line in lines} == {model["name"] for model in found["models"][:2]}


def test_folders_without_scores_say_what_to_do(
    tmp_path: Path, scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, said in (
        (tmp_path / "none", "no such folder"),
        (scores / "a", "is a model, and holds no scores"),
        (tmp_path, "evaluate stage has not finished"),
    ):
        with pytest.raises(RunError, match=said):
            compare([place, scores / "one"], tmp_path / "out", common=False)
    with pytest.raises(RunError, match="is named twice"):
        compare([scores / "one", scores / "one" / ".." / "one"], tmp_path / "out", common=False)
    with pytest.raises(RunError, match="is the only model here"):
        compare([scores / "one"], tmp_path / "out", common=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    assert cli.main(["compare", str(scores / "one"), str(scores / "two"), "--out", str(tmp_path / "mine")]) == 1
    assert "exists and is not a comparison" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("places", "labels"),
    [
        (["/a/x", "/a/y"], ["x", "y"]),
        (["/a/x", "/b/x"], ["a/x", "b/x"]),
        (["/a/n", "/a/y"], ["a/n", "a/y"]),
        (["/a/set", "/b/chance"], ["a/set", "b/chance"]),
        (["/a/x", "/b/x low"], ["a/x", "b/x low"]),
    ],
)
def test_no_name_of_a_folder_is_that_of_another_column(places: list[str], labels: list[str]) -> None:
    assert contenders._labels([Path(place) for place in places]) == labels
    with pytest.raises(RunError, match="two columns of the table would have one name"):
        contenders._labels([Path("/a/x"), Path("/a/x low")])
