"""The whole evaluation of a tiny random student on tiny sets: numbers that must come out, and sets that are not there."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import torch
from tiny_sets import COLORS, folder_set, image, pair_tar, samples, tar_set, tiny_clip, write_tar

from clip_cid import pipeline
from clip_cid.data.sets.evaluation_sets import EvaluationSet, open_set
from clip_cid.data.sets.labelled_images import LabelledImages
from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.evaluation import measure
from clip_cid.evaluation.features import Encoder
from clip_cid.evaluation.measurements import measurements_of
from clip_cid.models.export import export_student
from clip_cid.models.loading import load_clip
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder, StageRecord, read_json, write_json
from clip_cid.stages import evaluate
from clip_cid.summaries import as_json, costs_in


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose distill stage left a random student; another one lies beside it."""
    root = tmp_path_factory.mktemp("run")
    for name, seed in (("distill/student", 0), ("other", 1)):
        (root / name).parent.mkdir(exist_ok=True)
        export_student(tiny_clip(root, seed=seed), root / name, head_state={}, provenance={})
    (root / "distill" / "manifest.json").write_text("{}")
    return root


def recipe(**evaluate: Any) -> Recipe:
    machine = {"device": "cpu", "workers": 0, "embed_batch": 16}
    return parse_recipe({"evaluate": evaluate, "machine": machine}, where="test")


def run(folder: Path, out: Path, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out.mkdir()
    summary = without_times(evaluate.run(RunFolder(folder), out, recipe(**settings)))
    json.dumps(summary, allow_nan=False)
    return summary, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_times(summary: evaluate.EvaluateSummary) -> dict[str, Any]:
    """As in the manifest, but for what no two measurements share."""
    values = as_json(summary)
    for cost in values["costs"]:
        del cost["latency"]
    return values


@pytest.mark.slow
def test_every_model_is_measured_on_every_set_by_every_task(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"colors": str(tar_set(tmp_path / "colors", each=8)), "shapes": str(folder_set(tmp_path / "c", each=5))}
    (tmp_path / "c" / "templates.txt").write_text("a {c}")
    pairs = pair_tar(tmp_path / "pairs.tar", {f"p{number}": (f"caption {number}", "a thing") for number in range(9)})
    summary, rows = run(
        run_folder,
        tmp_path / "out",
        sets=sets,
        retrieval={"pairs": [str(pairs)]},
        compare={"other": f"local-dir:{run_folder / 'other'}"},
    )

    found = [(row["model"], row["set"], row["task"]) for row in rows if row["task"] != "retrieval"]
    tasks = ("zero_shot", "linear_probe", "knn")
    assert found == [(model, name, task) for model in ("student", "other") for name in sets for task in tasks]
    for row in rows:
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1
        if row["task"] in ("linear_probe", "knn"):
            assert row["score"] == 1  # one color a class
            assert (row["n_train"], row["features"]) == (
                {"colors": 24, "shapes": 15}[row["set"]],
                "before_projection",
            )
        if row["task"] != "retrieval":
            assert row["metric"] == "top1"
            assert row["chance"] == pytest.approx(1 / 3)
        if row["task"] in ("zero_shot", "linear_probe"):
            assert len(row["per_class"]) == 3
        assert row["versions"]["scikit-learn"]
    recalls = [row for row in rows if row["task"] == "retrieval" and row["model"] == "student"]
    assert [row["n"] for row in recalls] == [9, 9, 9, 18, 18, 18]
    assert recalls[2]["score"] >= recalls[1]["score"] >= recalls[0]["score"]

    zero_shot = {row["set"]: row["score"] for row in rows if row["model"] == "student" and row["task"] == "zero_shot"}
    table = read_json(tmp_path / "out" / "zero_shot.json")
    assert table["scores"]["student"] == zero_shot
    means = summary["models"]["student"]
    assert means["zero_shot_mean"] == pytest.approx(sum(zero_shot.values()) / 2)
    assert means["linear_probe_mean"] == 1
    assert means["retrieval"] == pytest.approx(sum(row["score"] for row in recalls) / 6)
    assert re.fullmatch(
        r"student: zero-shot [\d.]+ % \(mean of 2/2\), linear probe 100\.0 % \(mean of 2/2\), "
        r"neighbors 100\.0 % \(mean of 2/2\), retrieval [\d.]+ % \(mean of 1/1\)",
        summary["headline"],
    )
    printed = capsys.readouterr().out
    assert "mean of 2/2" in printed
    assert "image_to_text_R@5" in printed


@pytest.mark.slow
def test_a_second_evaluation_embeds_nothing_and_says_the_same(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sets": {"colors": str(tar_set(tmp_path / "colors"))}}
    first = run(run_folder, tmp_path / "a", **settings)

    def refuse(*_args: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Encoder, "_compute", refuse)
    monkeypatch.setattr(Encoder, "_encode", refuse)
    assert run(run_folder, tmp_path / "b", **settings) == first


@pytest.mark.slow
def test_cached_features_of_sets_no_longer_asked_for_are_deleted(run_folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run(run_folder, tmp_path / name, sets={name: str(tar_set(tmp_path / f"{name}-set"))})
    cached = {path.name.rpartition("-")[0] for path in (run_folder / "features").iterdir()}
    assert cached == {"second-train", "second-test", "second-prompts"}


@pytest.mark.slow
def test_the_cost_of_each_model_stands_beside_its_scores_and_is_measured_once(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "sets": {"colors": str(tar_set(tmp_path / "colors"))},
        "compare": {"other": f"local-dir:{run_folder / 'other'}"},
    }
    for folder in (out := tmp_path / "out", again := tmp_path / "again"):
        folder.mkdir()
    costs = evaluate.run(RunFolder(run_folder), out, recipe(**settings)).costs
    printed = capsys.readouterr().out

    clip = load_clip(f"local-dir:{run_folder / 'distill' / 'student'}")
    parameters = sum(value.numel() for value in clip.model.parameters())
    assert costs is not None
    assert [cost.model for cost in costs] == ["student", "other"]
    for cost in costs:
        assert cost.image_parameters + cost.text_parameters == parameters
        assert [one.batch for one in cost.latency] == [1, 64]
        assert all(one.image_ms > 0 and one.text_ms > 0 for one in cost.latency)
    assert f"{costs[0].image_parameters:,}" in printed
    assert costs[0].machine in printed

    summary = as_json(evaluate.EvaluateSummary(models={}, mean_of={}, missing={}, headline="", costs=costs))
    record = StageRecord("evaluate", "k", 2, {}, {}, summary, {}, "cpu", "", 0.0)
    folder = RunFolder(run_folder)
    monkeypatch.setattr(folder, "record", lambda stage: record)
    monkeypatch.setattr(evaluate, "measure_cost", None)  # cannot be called
    assert evaluate.run(folder, again, recipe(**settings)).costs == costs
    assert costs_in({"models": {}}) == []  # as an older version wrote it


@pytest.mark.slow
def test_the_probe_sees_the_features_the_recipe_names(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    probe = measure.linear_probe

    def spy(train_x: Any, *args: Any, **options: Any) -> Any:
        widths.append(train_x.shape[1])
        return probe(train_x, *args, **options)

    monkeypatch.setattr(measure, "linear_probe", spy)
    sets = {"colors": str(tar_set(tmp_path / "colors", splits=("train", "val", "test")))}
    for features in ("before_projection", "after_projection"):
        _, rows = run(run_folder, tmp_path / features, sets=sets, features=features, zero_shot=False, knn=False)
        assert [(row["task"], row["validation"], row["n_train"]) for row in rows] == [("linear_probe", "given", 12)]
    assert widths == [32, 12]


def test_a_missing_set_is_left_out_and_named(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"birds": str(tmp_path / "gone"), "colors": str(tar_set(tmp_path / "colors"))}
    summary, rows = run(run_folder, tmp_path / "out", sets=sets, retrieval={"coco": [str(tmp_path / "none.tar")]})
    assert {row["set"] for row in rows} == {"colors"}
    assert summary["missing"].keys() == {"birds", "coco"}
    assert summary["mean_of"] == {"zero_shot": "1/2", "linear_probe": "1/2", "knn": "1/2", "retrieval": "0/1"}
    assert f"Put the set there: {tmp_path / 'gone'}" in caplog.text
    assert "none.tar" in caplog.text
    printed = capsys.readouterr().out
    assert f"birds was not measured: evaluate.sets.birds: nothing at {tmp_path / 'gone'}. Put the set there:" in printed
    assert "mean of 1/2" in printed
    assert "not measured" in printed
    assert read_json(tmp_path / "out" / "linear_probe.json")["missing"].keys() == {"birds"}


@pytest.mark.slow
def test_scores_of_a_set_that_is_out_of_reach_now_are_not_replaced(own_run: Path, tmp_path: Path) -> None:
    sets = {"colors": str(tar_set(tmp_path / "colors")), "digits": "builtin:digits"}
    settings: dict[str, Any] = {"linear_probe": False, "knn": False}
    run(own_run, tmp_path / "first", sets=sets, **settings)
    folder = finished(own_run, tmp_path / "first")
    (tmp_path / "colors").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="colors was measured before and is not there now") as error:
        run(own_run, tmp_path / "second", sets=sets, **settings)
    assert f"paths are taken from {Path.cwd()}" in error.value.fix

    folder.forget("evaluate")
    (tmp_path / "third").mkdir()
    assert evaluate.run(folder, tmp_path / "third", recipe(sets=sets, **settings)).missing.keys() == {"colors"}
    _, rows = run(own_run, tmp_path / "fourth", sets={"digits": "builtin:digits"}, **settings)
    assert [row["set"] for row in rows] == ["digits"]


def test_a_retrieval_folder_of_clip_benchmark_is_named_with_its_tars(run_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "wds_flickr"
    pair_tar(root / "test" / "0.tar", {"a": ("a thing",)})
    (root / "test" / "nshards.txt").write_text("1")
    with pytest.raises(DataError, match=r"evaluate\.retrieval\.flickr: .* is a folder of CLIP_benchmark's") as error:
        run(run_folder, tmp_path / "out", retrieval={"flickr": [str(root)]})
    assert error.value.fix == f"Name them: {root}/test/*.tar"


def test_all_sets_missing_is_an_error(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 sets exists \(evaluate\.sets\.a: nothing at"):
        run(run_folder, tmp_path / "out", sets={"a": str(tmp_path / "gone")})


def test_a_set_without_training_images_is_measured_zero_shot_only(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = {"colors": str(tar_set(tmp_path / "colors", splits=("test",)))}
    summary, rows = run(run_folder, tmp_path / "out", sets=sets)
    assert [row["task"] for row in rows] == ["zero_shot"]
    assert summary["mean_of"] == {"zero_shot": "1/1", "linear_probe": "0/1", "knn": "0/1"}
    assert summary["models"]["student"]["linear_probe_mean"] is None
    assert "no linear probe and no neighbors on it" in caplog.text


def test_zero_shot_without_prompts_stops_before_any_model_is_loaded(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_clip", None)
    with pytest.raises(DataError, match=r"has no prompts, which zero-shot needs"):
        run(run_folder, tmp_path / "out", sets={"colors": str(folder_set(tmp_path / "colors"))})


@pytest.mark.slow
def test_a_bad_image_is_left_out_of_images_and_labels_alike(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tar_set(tmp_path / "colors")
    for split in ("train", "test"):
        (_, _), *others = samples(40)  # classes in turn, so that a label off by one row is always wrong
        write_tar(root / split / "0.tar", [("s0000.jpg", b"no image"), *others])
    _, rows = run(run_folder, tmp_path / "out", sets={"colors": str(root)})
    assert [row["n_train"] for row in rows[1:]] == [row["n"] for row in rows[1:]] == [119, 119]
    assert rows[1]["score"] == 1
    assert rows[1]["bad_images"] == rows[0]["bad_images"]
    assert len(rows[0]["bad_images"]) == 1
    assert caplog.text.count("colors/train: 1 of 120 images cannot be used") == 1
    assert caplog.text.count("colors/test: 1 of 120 images cannot be used") == 1


def test_a_model_cannot_take_the_students_name(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model is named 'student'"):
        run(run_folder, tmp_path / "out", sets={"d": "builtin:digits"}, compare={"student": "local-dir:x"})


def test_without_a_student_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="distill stage has not finished"):
        run(tmp_path, tmp_path / "out", sets={"d": "builtin:digits"})


def finished(folder: Path, out: Path) -> RunFolder:
    """A run whose evaluate stage left what is in `out`."""
    target = folder / "evaluate"
    shutil.copytree(out, target)
    record = StageRecord("evaluate", "k", 2, {}, {}, {}, {}, "cpu", "", 0.0)
    write_json(target / "manifest.json", dataclasses.asdict(record))
    return RunFolder(folder)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The model and set of every task that is really measured from now on."""
    measured: list[tuple[str, str]] = []
    add = evaluate.Results.add

    def spy(self: Any, key: str, scores: Any, answers: Any) -> None:
        measured.append((scores[0].model, f"{scores[0].set} {scores[0].task}"))
        add(self, key, scores, answers)

    monkeypatch.setattr(evaluate.Results, "add", spy)
    return measured


@pytest.mark.slow
@pytest.mark.resume
def test_a_killed_evaluation_goes_on_and_ends_as_one_that_was_not(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pair_tar(tmp_path / "pairs.tar", {f"p{number}": (f"caption {number}",) for number in range(6)})
    settings: dict[str, Any] = {
        "sets": {"colors": str(tar_set(tmp_path / "colors", each=4))},
        "retrieval": {"pairs": [str(pairs)]},
        "compare": {"other": f"local-dir:{run_folder / 'other'}"},
    }
    whole = run(run_folder, tmp_path / "whole", **settings)

    out = tmp_path / "out"
    out.mkdir()
    measured = counted(monkeypatch)
    spy = evaluate.Results.add

    def killed(self: Any, key: str, rows: Any, answers: Any) -> None:
        if len(measured) == 5:
            raise KeyboardInterrupt
        spy(self, key, rows, answers)

    monkeypatch.setattr(evaluate.Results, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(RunFolder(run_folder), out, recipe(**settings))
    first = list(measured)
    measured.clear()
    monkeypatch.setattr(evaluate.Results, "add", spy)
    again = evaluate.run(RunFolder(run_folder), out, recipe(**settings))
    assert [*first, *measured] == [
        (model, name) for model in ("student", "other") for name in TASKS_OF_COLORS_AND_PAIRS
    ]
    assert without_times(again) == whole[0]
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, content in files.items():
        assert (tmp_path / "whole" / name).read_bytes() == content
    assert len(files) == len([path for path in (tmp_path / "whole").rglob("*") if path.is_file()])


TASKS_OF_COLORS_AND_PAIRS = ("colors zero_shot", "colors linear_probe", "colors knn", "pairs retrieval")


@pytest.mark.slow
def test_only_what_is_new_is_measured_when_a_model_or_a_set_is_added(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder / "distill", folder / "distill")
    settings: dict[str, Any] = {"sets": {"colors": str(tar_set(tmp_path / "colors"))}, "linear_probe": False}
    run(folder, tmp_path / "first", **settings)
    finished(folder, tmp_path / "first")
    measured = counted(monkeypatch)
    settings["compare"] = {"other": f"local-dir:{run_folder / 'other'}"}
    settings["sets"]["shapes"] = str(tar_set(tmp_path / "shapes"))
    _, rows = run(folder, tmp_path / "second", **settings)
    new = [("student", "shapes"), ("other", "colors"), ("other", "shapes")]
    assert measured == [(model, f"{name} {task}") for model, name in new for task in ("zero_shot", "knn")]
    assert len(rows) == 8
    assert {path.name for path in (folder / "features").iterdir()} == {name for row in rows for name in row["cached"]}


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["image", "template", "seed"])
def test_what_a_result_depends_on_makes_it_stale(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder / "distill", folder / "distill")
    root = tar_set(tmp_path / "colors", splits=("test",))
    settings: dict[str, Any] = {"sets": {"colors": str(root)}}
    run(folder, tmp_path / "first", **settings)
    finished(folder, tmp_path / "first")
    measured = counted(monkeypatch)
    run(folder, tmp_path / "same", **settings)
    assert measured == []
    if changed == "image":
        write_tar(root / "test" / "0.tar", samples(3, seed=5))
    elif changed == "template":
        (root / "zeroshot_classification_templates.txt").write_text("{c}")
    else:
        settings["seed"] = 1
    run(folder, tmp_path / "changed", **settings)
    assert measured == [("student", "colors zero_shot")]


# --- One set that cannot be measured does not end the others ---


def spoilt(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).write_bytes(b"no image")
    return root


def prompted(root: Path) -> Path:
    (root / "templates.txt").write_text("a {c}")
    return root


@pytest.mark.slow
def test_one_unreadable_image_of_twenty_is_left_out_counted_and_named(run_folder: Path, tmp_path: Path) -> None:
    root = prompted(folder_set(tmp_path / "shapes", each=7, splits=("test",)))
    (root / "test" / "red_thing" / "0.jpg").unlink()
    spoilt(root, "test/red_thing/1.jpg")
    _, rows = run(run_folder, tmp_path / "out", sets={"shapes": str(root)})
    assert rows[0]["n"] == 19
    assert len(rows[0]["bad_images"]) == 1
    assert str(root / "test" / "red_thing" / "1.jpg") in rows[0]["bad_images"][0]


@pytest.mark.slow
def test_a_set_of_too_many_unreadable_images_is_named_and_the_others_are_measured(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = prompted(folder_set(tmp_path / "bad", each=7))
    spoilt(bad, "test/red_thing/0.jpg", "test/blue_thing/0.jpg")
    half = prompted(folder_set(tmp_path / "half", each=7))
    spoilt(half, "train/red_thing/0.jpg", "train/blue_thing/0.jpg")
    tar = pair_tar(tmp_path / "pairs.tar", {f"p{number}": (f"caption {number}",) for number in range(6)})
    pictures = [(f"{key}.jpg", b"no image") for key in "ab"] + [(f"{key}.txt", b"a thing") for key in "ab"]
    write_tar(tmp_path / "broken.tar", sorted(pictures))
    summary, rows = run(
        run_folder,
        tmp_path / "out",
        sets={"bad": str(bad), "half": str(half), "good": str(tar_set(tmp_path / "good"))},
        retrieval={"broken": [str(tmp_path / "broken.tar")], "pairs": [str(tar)]},
        compare={"other": f"local-dir:{run_folder / 'other'}"},
    )

    measured = {(row["model"], row["set"], row["task"]) for row in rows}
    of_good = {("good", task) for task in ("zero_shot", "linear_probe", "knn")}
    expected = {*of_good, ("half", "zero_shot"), ("pairs", "retrieval")}
    assert measured == {(model, *one) for model in ("student", "other") for one in expected}
    assert summary["missing"].keys() == {"bad", "half", "broken"}
    assert summary["mean_of"] == {"zero_shot": "2/3", "linear_probe": "1/3", "knn": "1/3", "retrieval": "1/2"}
    printed = capsys.readouterr().out
    assert "bad: no zero-shot, no linear probe, no neighbors: bad/test: 2 images so far cannot be decoded" in printed
    assert "half: no linear probe, no neighbors: half/train: 2 images so far cannot be decoded" in printed
    assert "broken: no retrieval: broken/pairs: 2 images so far cannot be decoded" in printed
    assert read_json(tmp_path / "out" / "linear_probe.json")["missing"].keys() == {"bad", "half"}
    assert read_json(tmp_path / "out" / "zero_shot.json")["missing"].keys() == {"bad"}


def test_if_no_set_can_be_measured_the_stage_fails(run_folder: Path, tmp_path: Path) -> None:
    root = prompted(folder_set(tmp_path / "bad", each=1, splits=("test",)))
    spoilt(root, "test/red_thing/0.jpg", "test/blue_thing/0.jpg")
    with pytest.raises(DataError, match="nothing could be measured: bad/test: 2 images so far cannot be decoded"):
        run(run_folder, tmp_path / "out", sets={"bad": str(root)})


@pytest.mark.slow
def test_a_mended_set_is_measured(run_folder: Path, tmp_path: Path) -> None:
    root = prompted(folder_set(tmp_path / "set", each=2, splits=("test",)))
    whole = (root / "test" / "red_thing" / "0.jpg").read_bytes()
    spoilt(root, "test/red_thing/0.jpg", "test/blue_thing/0.jpg")
    sets = {"set": str(root), "digits": "builtin:digits"}
    settings: dict[str, Any] = {"linear_probe": False, "knn": False}
    assert run(run_folder, tmp_path / "a", sets=sets, **settings)[0]["missing"].keys() == {"set"}
    (root / "test" / "red_thing" / "0.jpg").write_bytes(whole)
    assert run(run_folder, tmp_path / "b", sets=sets, **settings)[0]["missing"] == {}


@pytest.mark.slow
def test_a_set_with_one_training_image_a_class_has_no_probe_and_says_so(run_folder: Path, tmp_path: Path) -> None:
    root = prompted(folder_set(tmp_path / "set", each=1))
    summary, rows = run(run_folder, tmp_path / "out", sets={"set": str(root)})
    assert [row["task"] for row in rows] == ["zero_shot", "knn"]
    assert "no linear probe: set: every class has a single training image" in summary["missing"]["set"]


@pytest.mark.slow
def test_a_class_whose_training_images_are_all_unreadable_is_named(run_folder: Path, tmp_path: Path) -> None:
    root = prompted(folder_set(tmp_path / "set", each=5))
    for copy in range(1, 5):
        (root / "train" / "red_thing" / f"{copy}.jpg").unlink()
    spoilt(root, "train/red_thing/0.jpg")
    summary, rows = run(run_folder, tmp_path / "out", sets={"set": str(root)})
    assert [row["task"] for row in rows] == ["zero_shot"]
    assert "1 of 3 classes have no training image that can be decoded, the first red thing" in summary["missing"]["set"]


# --- What a result is of is its content ---


def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is really embedded from now on: titles of images and texts."""
    titles: list[str] = []
    compute, encode = Encoder._compute, Encoder._encode

    def images(self: Encoder, source: Any, *args: Any, **options: Any) -> Any:
        titles.append(source.title)
        return compute(self, source, *args, **options)

    def texts(self: Encoder, title: str, values: Any) -> Any:
        titles.append(f"{title} texts")
        return encode(self, title, values)

    monkeypatch.setattr(Encoder, "_compute", images)
    monkeypatch.setattr(Encoder, "_encode", texts)
    return titles


def pairs_of_one_size(path: Path, order: list[int]) -> Path:
    """Three pairs, whose pictures come in this order: every order gives a tar of the same size."""
    captions = ["a red thing", "a green thing", "a blue thing"]
    pictures = [image(color, 3).ljust(3_000, b"\0") for color in COLORS.values()]
    members = [
        member
        for key, (caption, picture) in enumerate(zip(captions, order, strict=True))
        for member in ((f"{key}.jpg", pictures[picture]), (f"{key}.txt", caption.encode()))
    ]
    write_tar(path, members)
    return path


@pytest.fixture
def own_run(run_folder: Path, tmp_path: Path) -> Path:
    """A run folder whose evaluation and features no other test sees."""
    shutil.copytree(run_folder / "distill", tmp_path / "run" / "distill")
    return tmp_path / "run"


@pytest.mark.slow
def test_pictures_exchanged_in_a_tar_of_equal_size_are_measured_as_they_are_now(own_run: Path, tmp_path: Path) -> None:
    tar = pairs_of_one_size(tmp_path / "pairs.tar", [0, 1, 2])
    settings: dict[str, Any] = {"retrieval": {"pairs": [str(tar)]}}
    size = tar.stat().st_size
    _, before = run(own_run, tmp_path / "before", **settings)
    assert pairs_of_one_size(tar, [1, 2, 0]).stat().st_size == size
    _, after = run(own_run, tmp_path / "after", **settings)

    fresh = tmp_path / "fresh"
    shutil.copytree(own_run / "distill", fresh / "distill")
    _, expected = run(fresh, tmp_path / "expected", **settings)
    assert after == expected
    assert {row["key"] for row in before}.isdisjoint(row["key"] for row in after)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [tar_set, folder_set])
def test_a_set_that_was_touched_or_copied_is_not_measured_again(
    layout: Any, own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = layout(tmp_path / "here" / "colors")
    (root / "templates.txt").write_text("a {c}")
    pairs = pairs_of_one_size(tmp_path / "pairs.tar", [0, 1, 2])
    settings: dict[str, Any] = {"sets": {"colors": str(root)}, "retrieval": {"pairs": [str(pairs)]}}
    _, before = run(own_run, tmp_path / "first", **settings)
    finished(own_run, tmp_path / "first")
    measured, titles = counted(monkeypatch), embedded(monkeypatch)

    for path in [pairs, *root.rglob("*")]:
        os.utime(path, (1, 1))
    assert run(own_run, tmp_path / "touched", **settings)[1] == before
    settings["sets"]["colors"] = str(shutil.copytree(root, tmp_path / "there"))
    settings["retrieval"]["pairs"] = [str(shutil.copy(pairs, tmp_path / "copy.tar"))]
    assert run(own_run, tmp_path / "copied", **settings)[1] == before
    assert measured == titles == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", [tar_set, folder_set])
def test_an_image_exchanged_for_one_of_equal_size_is_measured_again(
    layout: Any, own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = layout(tmp_path / "colors", splits=("test",))
    (root / "templates.txt").write_text("a {c}")
    settings: dict[str, Any] = {"sets": {"colors": str(root)}}
    run(own_run, tmp_path / "first", **settings)
    finished(own_run, tmp_path / "first")
    titles = embedded(monkeypatch)
    changed = next(path for path in root.rglob("*") if path.suffix in (".tar", ".jpg"))
    content = bytearray(changed.read_bytes())
    middle = content.index(b"\xff\xda") + 100  # inside the first picture's pixels
    content[middle] ^= 1
    changed.write_bytes(content)
    run(own_run, tmp_path / "second", **settings)
    assert titles == ["colors/test"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("preprocess_cfg", {"mean": [0.1, 0.2, 0.3]}),
        ("preprocess_cfg", {"std": [0.1, 0.2, 0.3]}),
        ("preprocess_cfg", {"interpolation": "bilinear"}),
        ("model_cfg", {"quick_gelu": True}),
    ],
)
def test_a_model_whose_configuration_changed_is_measured_again(
    section: str, values: dict[str, Any], own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"sets": {"colors": str(tar_set(tmp_path / "colors", splits=("test",)))}}
    run(own_run, tmp_path / "first", **settings)
    finished(own_run, tmp_path / "first")
    titles = embedded(monkeypatch)
    config = own_run / "distill" / "student" / "open_clip_config.json"
    written = read_json(config)
    written[section] |= values
    write_json(config, written)
    run(own_run, tmp_path / "second", **settings)
    assert "colors/test" in titles


@pytest.mark.slow
def test_force_measures_everything_again(own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of_one_size(tmp_path / "pairs.tar", [0, 1, 2])
    settings: dict[str, Any] = {
        "sets": {"colors": str(tar_set(tmp_path / "colors"))},
        "retrieval": {"pairs": [str(pairs)]},
    }
    _, before = run(own_run, tmp_path / "first", **settings)
    measured, titles = counted(monkeypatch), embedded(monkeypatch)
    folder = finished(own_run, tmp_path / "first")
    folder.forget("evaluate")
    (tmp_path / "out").mkdir()
    evaluate.run(folder, tmp_path / "out", recipe(**settings))
    assert measured == [("student", name) for name in TASKS_OF_COLORS_AND_PAIRS]
    assert sorted(titles) == ["colors/prompts texts", "colors/test", "colors/train", "pairs/pairs", "pairs/pairs texts"]
    assert [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()] == before


@pytest.mark.resume
def test_what_a_kill_left_among_the_features_is_deleted(own_run: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sets": {"colors": str(tar_set(tmp_path / "colors", splits=("test",)))}}
    run(own_run, tmp_path / "first", **settings)
    features = own_run / "features"
    whole = {path for path in features.rglob("*") if path.is_file()}
    for entry in [*features.iterdir(), features / "other-0123456789abcdef"]:
        entry.mkdir(exist_ok=True)
        (entry / ".after.npy.tmp-host-123-0badcafe").write_bytes(b"half")
    run(own_run, tmp_path / "second", **settings)
    assert {path for path in features.rglob("*") if path.is_file()} == whole


def test_models_are_compared_without_any_student(run_folder: Path, tmp_path: Path) -> None:
    compare = dict.fromkeys(("one", "two"), f"local-dir:{run_folder / 'other'}")
    sets = {"colors": str(tar_set(tmp_path / "colors"))}
    summary, rows = run(tmp_path, tmp_path / "out", sets=sets, compare=compare, student=False)
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["one", "two"]
    assert summary["headline"].startswith("one: zero-shot")
    (line, mean) = read_json(tmp_path / "out" / "linear_probe.json")["differences"]
    assert (line["model"], line["other"], line["difference"], line["low"], line["high"]) == ("one", "two", 0, 0, 0)
    assert mean["group"] == "mean of 1/1"


def test_a_recipe_without_a_student_has_no_other_stage() -> None:
    compare = {"one": "local-dir:x"}
    alone = recipe(sets={"d": "builtin:digits"}, compare=compare, student=False)
    assert [stage.name for stage in pipeline.active_stages(alone)] == ["evaluate"]
    with pytest.raises(ConfigError, match=r"evaluate\.student: false, and evaluate\.compare names no model"):
        recipe(sets={"d": "builtin:digits"}, student=False)


@pytest.mark.slow
def test_our_zero_shot_is_open_clips_own_to_the_last_image(tmp_path: Path) -> None:
    """Everything by open_clip: model, preprocessing, tokenizer, prompts and classifier, image after image."""
    root, clip, out = tar_set(tmp_path / "colors", each=20), tiny_clip(tmp_path), tmp_path / "out"
    with torch.no_grad():  # so that what a random model answers depends on the image
        clip.model.get_parameter("visual.class_embedding").zero_()
        for name, weight in clip.model.named_parameters():
            weight.mul_(10 if "attn" in name else 1)
    export_student(clip, tmp_path / "varied", head_state={}, provenance={})
    source = f"local-dir:{tmp_path / 'varied'}"
    settings: dict[str, Any] = {"linear_probe": False, "knn": False, "student": False, "compare": {"varied": source}}
    _, rows = run(tmp_path, out, sets={"colors": str(root)}, **settings)
    model, preprocess = cast(tuple[Any, Any], open_clip.create_model_from_pretrained(source))
    templates = (root / "zeroshot_classification_templates.txt").read_text().splitlines()
    classes = (root / "classnames.txt").read_text().splitlines()
    classifier = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(source), classes, [text.replace("{c}", "{}") for text in templates]
    )
    split = open_set("colors", str(root), max_pixels=10**6).split("test")
    answers = []
    with torch.inference_mode():
        for row in range(len(split)):
            image = model.encode_image(preprocess(split.load(row)).unsqueeze(0), normalize=True)
            answers.append(int((100 * image @ classifier).argmax()))
    with np.load(out / "answers" / rows[0]["answers"]) as ours:
        assert ours["predicted"].tolist() == answers
    assert len(set(answers)) > 1  # or the comparison would say little


def test_confusions_name_the_classes(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, rows = run(run_folder, out, sets={"colors": str(tar_set(tmp_path / "colors", each=10))}, linear_probe=False)
    wrong = 30 - round(30 * rows[0]["top1"])
    assert sum(count for _, _, count in rows[0]["confusions"]) == wrong > 0
    for truth, answer, _ in rows[0]["confusions"]:
        assert {truth, answer} < {"red thing", "green thing", "blue thing"}
        assert truth != answer


def encoder(run_folder: Path, cache: Path) -> Encoder:
    clip = load_clip(f"local-dir:{run_folder / 'distill' / 'student'}")
    return Encoder("student", clip, cache, device=torch.device("cpu"), batch_size=16, workers=0)


def measured_rows(labelled: EvaluationSet, encoder: Encoder, imagenet: EvaluationSet | None = None) -> dict[str, Any]:
    page = recipe(sets={"x": "y"})
    measurements = measurements_of(labelled, page.evaluate, page.machine, imagenet=imagenet)
    return {measurement.task: measurement.measure(encoder)[0][0].line() for measurement in measurements}


def test_a_shifted_set_has_imagenets_accuracy_on_the_same_classes_beside_it(run_folder: Path, tmp_path: Path) -> None:
    imagenet = open_set("colors", str(tar_set(tmp_path / "colors", each=20, splits=("test",))), max_pixels=10**6)
    two = dataclasses.replace(imagenet, class_names=imagenet.class_names[1:])
    labels = imagenet.split("test").labels
    part = dataclasses.replace(imagenet.split("test"), labels=np.maximum(labels - 1, 0), title="shifted/test")
    shifted = dataclasses.replace(two, name="shifted", splits={"test": part}, superset_classes=np.array([1, 2]))
    there = encoder(run_folder, tmp_path / "cache")
    row = measured_rows(shifted, there, imagenet)["zero_shot"]
    of_these = dataclasses.replace(two, splits={"test": part_of(imagenet, [1, 2])})
    alone = measured_rows(of_these, there)["zero_shot"]
    assert row["imagenet_same_classes_n"] == 40
    assert row["imagenet_same_classes"] == alone["score"]
    assert "imagenet_same_classes" not in measured_rows(shifted, there, None)["zero_shot"]
    assert "imagenet_same_classes" not in measured_rows(imagenet, there, imagenet)["zero_shot"]
    sketch = dataclasses.replace(imagenet, name="sketch", known_key="imagenet_sketch")
    whole = measured_rows(sketch, there, imagenet)["zero_shot"]
    assert (whole["imagenet_same_classes"], whole["imagenet_same_classes_n"]) == (whole["score"], 60)


def part_of(labelled: EvaluationSet, classes: list[int]) -> LabelledImages:
    """The images of some classes, numbered from 0, as a split of their own."""
    test = labelled.split("test")
    rows = np.flatnonzero(np.isin(test.labels, classes))

    class Some:
        def name(self, row: int) -> str:
            return test.name(int(rows[row]))

        def load(self, row: int) -> Any:
            return test.load(int(rows[row]))

    labels = np.searchsorted(classes, test.labels[rows])
    contents = dataclasses.replace(test.contents, reading="some")
    return dataclasses.replace(test, labels=labels, images=Some(), title="some/test", contents=contents)


@pytest.mark.slow
def test_the_probe_of_a_set_with_folds_is_the_mean_over_them(run_folder: Path, tmp_path: Path) -> None:
    root = tar_set(tmp_path / "colors", each=40)
    (_, _), *others = samples(40)
    write_tar(root / "train" / "0.tar", [("s0000.jpg", b"no image"), *others])
    whole = open_set("colors", str(root), max_pixels=10**6)
    folds = (np.arange(15), np.arange(15, 30))  # row 0 cannot be decoded
    row = measured_rows(dataclasses.replace(whole, folds=folds), encoder(run_folder, tmp_path / "cache"))[
        "linear_probe"
    ]
    assert [fold["n_train"] for fold in row["folds"]] == [14, 15]
    assert row["score"] == row["top1"] == pytest.approx(sum(fold["score"] for fold in row["folds"]) / 2)
    assert row["low"] <= row["score"] <= row["high"]
    assert "C" not in row


def test_nothing_stays_of_a_late_task_that_a_cluster_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = tmp_path / "features" / "colors-test-0123"
    entry.mkdir(parents=True)

    def leave_one(*args: Any, **settings: Any) -> None:
        (entry / "after.npy").write_bytes(b"whole")
        (entry / ".after.npy.tmp-other-7-0123abcd").touch()

    monkeypatch.setattr(evaluate.engine, "run_tasks", leave_one)
    evaluate._compute_on_cluster("student", "run:a", [], RunFolder(tmp_path), recipe(), gpu=False)
    assert [path.name for path in entry.iterdir()] == ["after.npy"]
