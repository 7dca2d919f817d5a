"""ONNX graphs in float16 and int8, and the gate on their scores; all need the extra."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_run import finished_run, record, results
from tiny_sets import pair_tar, tar_set

from clip_cid import cli
from clip_cid.errors import ConfigError, RunError
from clip_cid.evaluation.features import Encoder
from clip_cid.evaluation.scores import read_scores
from clip_cid.models.loading import load_clip
from clip_cid.models.student import build_student
from clip_cid.publish import onnx_export, onnx_precision
from clip_cid.publish.onnx_gate import Drop, Drops, measure_drops, refuse_without_sets
from clip_cid.publish.onnx_precision import Precision, _convert
from clip_cid.recipe import Recipe, dump_recipe, parse_recipe
from clip_cid.run_folder import RunFolder, read_json
from clip_cid.stages import evaluate

pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Recipe]:
    """A run with a random student, evaluated on tiny sets."""
    root = tmp_path_factory.mktemp("onnx")
    folder = finished_run(root / "run", evaluated=False)
    sets = {"colors": str(tar_set(root / "colors", each=8)), "gone": str(root / "gone")}
    pairs = pair_tar(root / "pairs.tar", {f"p{number}": (f"caption {number}", "a thing") for number in range(9)})
    recipe = parse_recipe(
        {
            "evaluate": {"sets": sets, "retrieval": {"pairs": [str(pairs)]}},
            "machine": {"device": "cpu", "workers": 0, "embed_batch": 16},
        },
        where="test",
    )
    (folder.path / "recipe.yaml").write_text(dump_recipe(recipe))
    part = folder.begin("evaluate", {"key": "evaluate-1"}, resumable=False).part
    evaluate.run(folder, part, recipe)
    folder.publish(record("evaluate", {}, results(folder, "distill")))
    return folder, recipe


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_of_lower_precision_come_with_the_drop_of_each_score(
    run: tuple[RunFolder, Recipe], tmp_path: Path, precision: Precision, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    flags = ["--onnx", precision, "--max-drop", "100"]
    assert cli.main(["export", str(folder.path), str(tmp_path / "out"), *flags]) == 0
    graphs = tmp_path / "out" / f"onnx-{precision}"
    assert str(graphs) in capsys.readouterr().out
    assert sorted(path.name for path in graphs.iterdir()) == ["README.md", "image.onnx", "onnx.json", "text.onnx"]

    about = read_json(graphs / "onnx.json")
    scores = {(one.task, one.set, one.metric): one.score for one in read_scores(folder.path / "evaluate/results.jsonl")}
    rows = {(row["task"], row["set"], row["metric"]): row for row in about["scores"]}
    assert rows.keys() == {place for place in scores if place[0] in ("zero_shot", "retrieval")}
    for place, row in rows.items():
        assert row["student"] == scores[place]
        assert row["drop"] == pytest.approx(row["student"] - row["graphs"])
        assert row["low"] <= row["drop"] <= row["high"]
    assert about["sets_not_measured"] == ["gone"]
    assert about["bytes"]["text"][precision] < 0.55 * about["bytes"]["text"]["fp32"]

    card = (graphs / "README.md").read_text()
    assert f"| colors | zero shot | top1 | 24 | {100 * scores['zero_shot', 'colors', 'top1']:.1f} |" in card
    assert "Not measured: gone." in card
    assert about["graph_optimization_level"] in card
    assert not [path.name for path in graphs.iterdir() if str(tmp_path).encode() in path.read_bytes()]

    # They answer, in any batch, about as the student does.
    text = onnx_export.session(graphs / "text.onnx", about["graph_optimization_level"])
    (rows_of_one,) = text.run(None, {"tokens": np.ones((1, 9), dtype=np.int64)})
    np.testing.assert_allclose(np.linalg.norm(rows_of_one, axis=1), 1, atol=2e-3)


@pytest.mark.slow
def test_exact_graphs_lose_nothing_and_the_student_is_not_measured_again(
    run: tuple[RunFolder, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = run
    student = folder.path / "distill" / "student"
    sessions: dict[str, Any] = {}
    for tower in onnx_export.towers(load_clip(f"local-dir:{student}")):
        onnx_export.write_graph(tower, tmp_path / tower.file)
        sessions[tower.name] = onnx_export.session(tmp_path / tower.file)

    measured: list[str] = []
    images = Encoder.images
    monkeypatch.setattr(Encoder, "images", lambda self, *a, **k: (measured.append(self.name), images(self, *a, **k))[1])
    drops = measure_drops(folder, student, recipe, sessions, tmp_path / "scratch")
    assert set(measured) == {"onnx"}
    assert [(row.drop, row.low, row.high) for row in drops.rows] == [(0, 0, 0)] * 7
    drops.refuse("int8", allowed=0)

    (folder.path / "evaluate" / "results.jsonl").rename(tmp_path / "results.jsonl")  # damaged: measured anew
    try:
        again = measure_drops(folder, student, recipe, sessions, tmp_path / "scratch")
    finally:
        (tmp_path / "results.jsonl").rename(folder.path / "evaluate" / "results.jsonl")
    assert again == drops
    assert set(measured) == {"onnx", "student"}


def drops(*values: float) -> Drops:
    return Drops([Drop("zero_shot", f"s{n}", "top1", 9, 0.6, 0.6 - d, d, d, d) for n, d in enumerate(values)], [])


def test_more_than_is_allowed_is_refused_with_the_worst_score() -> None:
    drops(0.01, -0.5, 0.0).refuse("int8", allowed=1)
    with pytest.raises(
        RunError, match=r"zero-shot on s1 \(top1\) drops by 2\.3 points, from 60\.0 to 57\.7 %"
    ) as error:
        drops(0.011, 0.023, 0.0).refuse("int8", allowed=1)
    assert "2 of 3 scores drop by more than 1" in error.value.problem
    assert "Use --onnx fp16 or --onnx" in error.value.fix
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("values", [(float("nan"), 0.0), (0.0, float("nan")), (0.5, float("nan"), 0.0)])
def test_a_drop_that_is_no_number_is_refused_wherever_it_stands(values: tuple[float, ...]) -> None:
    with pytest.raises(RunError, match="drops by nan points"):
        drops(*values).refuse("int8", allowed=100)


@pytest.mark.slow
def test_a_refused_export_leaves_nothing(
    run: tuple[RunFolder, Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(onnx_precision, "measure_drops", lambda *_: drops(0.02))
    assert cli.main(["export", str(run[0].path), str(tmp_path / "out"), "--onnx", "fp16"]) == 1
    assert "drops by 2.0 points" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["cid-conv", "resnet"])
def test_other_towers_are_converted_too(tmp_path: Path, precision: Precision, name: str) -> None:
    """Whose products have their weights turned, which the converter's own shapes contradict."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "resnet.json").write_text(json.dumps(config))
    clip = build_student(str(tmp_path / "resnet.json") if name == "resnet" else name, embed_dim=None, seed=1)
    clip.model.eval()
    (tower, _) = onnx_export.towers(clip)
    onnx_export.write_graph(tower, tmp_path / "exact.onnx")
    _convert(tmp_path / "exact.onnx", tmp_path / "less.onnx", precision)
    level = onnx_precision._LEVELS[precision]
    gap = onnx_export.compare(tower, tmp_path / "less.onnx", tolerance=0.1, level=level)
    assert 0 < gap < 0.1


def test_a_run_without_sets_is_refused() -> None:
    for settings in ({"sets": {}}, {"sets": {"a": "b"}, "zero_shot": False}):
        recipe = parse_recipe({"evaluate": {**settings, "student": True}}, where="test")
        with pytest.raises(ConfigError, match="its recipe names none"):
            refuse_without_sets(recipe, "int8")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["export", "R", "O", "--onnx"], ["export", "R", "O", "--onnx", "fp32"]),
        (["export", "--onnx", "R", "O"], ["export", "--onnx", "fp32", "R", "O"]),
        (["export", "R", "O", "--onnx", "--transformers"], ["export", "R", "O", "--onnx", "fp32", "--transformers"]),
        (["export", "R", "O", "--onnx", "int8"], ["export", "R", "O", "--onnx", "int8"]),
    ],
)
def test_the_flag_alone_still_means_float32(given: Sequence[str], meant: Sequence[str]) -> None:
    assert cli._with_precision(given) == meant


@pytest.mark.parametrize(
    ("flags", "limit"),
    [([], "2"), (["--onnx"], "2"), *((["--onnx", "int8"], limit) for limit in ("-1", "101", "inf", "nan"))],
)
def test_a_limit_without_a_precision_or_that_is_no_number_of_points_is_refused(
    run: tuple[RunFolder, Recipe], tmp_path: Path, flags: list[str], limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run[0].path), str(tmp_path / "out"), *flags, f"--max-drop={limit}"]
    assert cli.main(command) == 2
    assert "is the number of points" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
