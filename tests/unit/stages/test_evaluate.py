"""The whole evaluation of a tiny random student on tiny sets: numbers that must come out, and sets that are not there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import folder_set, pair_tar, samples, tar_set, tiny_clip, write_tar

from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.evaluation.features import Encoder
from clip_cid.models.export import export_student
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder, read_json
from clip_cid.stages import evaluate


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
    summary = evaluate.run(RunFolder(folder), out, recipe(**settings))
    json.dumps(summary, allow_nan=False)
    return summary, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


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
    tasks = ("zero_shot", "linear_probe")
    assert found == [(model, name, task) for model in ("student", "other") for name in sets for task in tasks]
    for row in rows:
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1
        if row["task"] == "linear_probe":
            assert row["score"] == 1  # one color a class
            assert (row["n_train"], row["features"]) == (
                {"colors": 24, "shapes": 15}[row["set"]],
                "before_projection",
            )
        if row["task"] != "retrieval":
            assert row["metric"] == "top1"
            assert row["chance"] == pytest.approx(1 / 3)
            assert len(row["per_class"]) == 3
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
        r"retrieval [\d.]+ % \(mean of 1/1\)",
        summary["headline"],
    )
    printed = capsys.readouterr().out
    assert "mean of 2/2" in printed
    assert "image_to_text_R@5" in printed


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


def test_cached_features_of_sets_no_longer_asked_for_are_deleted(run_folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run(run_folder, tmp_path / name, sets={name: str(tar_set(tmp_path / f"{name}-set"))})
    cached = {path.name.rpartition("-")[0] for path in (run_folder / "features").iterdir()}
    assert cached == {"second-train", "second-test", "second-prompts"}


def test_the_probe_sees_the_features_the_recipe_names(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    probe = evaluate.linear_probe

    def spy(train_x: Any, *args: Any, **options: Any) -> Any:
        widths.append(train_x.shape[1])
        return probe(train_x, *args, **options)

    monkeypatch.setattr(evaluate, "linear_probe", spy)
    sets = {"colors": str(tar_set(tmp_path / "colors", splits=("train", "val", "test")))}
    for features in ("before_projection", "after_projection"):
        _, rows = run(run_folder, tmp_path / features, sets=sets, features=features, zero_shot=False)
        assert [(row["task"], row["validation"], row["n_train"]) for row in rows] == [("linear_probe", "given", 12)]
    assert widths == [32, 12]


def test_a_missing_set_is_left_out_and_named(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"birds": str(tmp_path / "gone"), "colors": str(tar_set(tmp_path / "colors"))}
    summary, rows = run(run_folder, tmp_path / "out", sets=sets, retrieval={"coco": [str(tmp_path / "none.tar")]})
    assert {row["set"] for row in rows} == {"colors"}
    assert summary["missing"].keys() == {"birds", "coco"}
    assert summary["mean_of"] == {"zero_shot": "1/2", "linear_probe": "1/2", "retrieval": "0/1"}
    assert f"Put the set there: {tmp_path / 'gone'}" in caplog.text
    assert "none.tar" in caplog.text
    printed = capsys.readouterr().out
    assert "mean of 1/2" in printed
    assert "not measured" in printed
    assert read_json(tmp_path / "out" / "linear_probe.json")["missing"].keys() == {"birds"}


def test_all_sets_missing_is_an_error(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 sets is there \(evaluate\.sets\.a: nothing at"):
        run(run_folder, tmp_path / "out", sets={"a": str(tmp_path / "gone")})


def test_a_set_without_training_images_is_measured_zero_shot_only(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = {"colors": str(tar_set(tmp_path / "colors", splits=("test",)))}
    summary, rows = run(run_folder, tmp_path / "out", sets=sets)
    assert [row["task"] for row in rows] == ["zero_shot"]
    assert summary["mean_of"] == {"zero_shot": "1/1", "linear_probe": "0/1"}
    assert summary["models"]["student"]["linear_probe_mean"] is None
    assert "no linear probe on it" in caplog.text


def test_zero_shot_without_prompts_stops_before_any_model_is_loaded(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_clip", None)
    with pytest.raises(DataError, match=r"has no prompts, which zero-shot needs"):
        run(run_folder, tmp_path / "out", sets={"colors": str(folder_set(tmp_path / "colors"))})


def test_a_bad_image_is_left_out_of_images_and_labels_alike(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tar_set(tmp_path / "colors")
    for split in ("train", "test"):
        (_, _), *others = samples(40)  # classes in turn, so that a label off by one row is always wrong
        write_tar(root / split / "0.tar", [("s0000.jpg", b"no image"), *others])
    _, rows = run(run_folder, tmp_path / "out", sets={"colors": str(root)})
    assert (rows[1]["n_train"], rows[1]["n"]) == (119, 119)
    assert rows[1]["score"] == 1
    assert rows[1]["bad_images"] == rows[0]["bad_images"]
    assert len(rows[0]["bad_images"]) == 1
    assert "colors/train: 1 of 120 images cannot be used" in caplog.text


def test_a_model_cannot_take_the_students_name(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model is named 'student'"):
        run(run_folder, tmp_path / "out", sets={"d": "builtin:digits"}, compare={"student": "local-dir:x"})


def test_without_a_student_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="distill stage has not finished"):
        run(tmp_path, tmp_path / "out", sets={"d": "builtin:digits"})
