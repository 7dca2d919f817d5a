"""ONNX graphs against PyTorch; they need the extra, except for the test that it is asked for."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from finished_run import finished_run
from PIL import Image

from clip_cid import cli
from clip_cid.errors import DataError, MissingExtraError, RunError
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.publish import onnx_export
from clip_cid.publish.onnx_export import export_onnx


def exported(folder: Path) -> Path:
    """A `cid-tiny` student as `clip-cid export` writes it, its scale moved away from where students start."""
    clip = build_student("cid-tiny", embed_dim=None, seed=3)
    model: Any = clip.model
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    export_student(clip, folder, head_state={}, provenance={})
    return folder


@pytest.fixture
def onnx() -> Any:
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    return pytest.importorskip("onnx", reason="the onnx extra is not installed")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported once, its graphs made by whoever needs them first."""
    return exported(tmp_path_factory.mktemp("onnx") / "student")


@pytest.fixture
def graphs(onnx: Any, student: Path) -> Path:
    if not (student / "onnx").exists():
        gaps = export_onnx(student)
        assert gaps.keys() == {"image", "text"}
        assert all(0 <= gap <= 1e-6 for gap in gaps.values())
    return student / "onnx"


def answers(graph: Path, **inputs: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (output,) = session.run([f"{graph.stem}_embeddings"], inputs)
    return np.asarray(output)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_graphs_answer_as_open_clip_does_for_pictures_and_captions(graphs: Path, student: Path, rows: int) -> None:
    source = f"local-dir:{student}"
    model, preprocess = cast(tuple[Any, Any], open_clip.create_model_from_pretrained(source))
    noise = np.random.default_rng(rows).integers(0, 256, (rows, 40, 70, 3), dtype=np.uint8)
    pixels = torch.stack([preprocess(Image.fromarray(picture)) for picture in noise])
    tokens = open_clip.get_tokenizer(source)(["a dog" * row for row in range(rows)])
    model.eval()
    with torch.inference_mode():
        image, text = F.normalize(model.encode_image(pixels)), F.normalize(model.encode_text(tokens))
    np.testing.assert_allclose(answers(graphs / "image.onnx", pixels=pixels.numpy()), image.numpy(), atol=1e-6)
    np.testing.assert_allclose(answers(graphs / "text.onnx", tokens=tokens.numpy()), text.numpy(), atol=1e-6)


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_a_graph(graphs: Path) -> None:
    for path in graphs.iterdir():
        data = path.read_bytes()
        assert not [here for here in (open_clip.__file__, onnx_export.__file__, str(graphs)) if here.encode() in data]


def test_embeddings_have_length_one(graphs: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((4, 3, 48, 48)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(answers(graphs / "image.onnx", pixels=pixels), axis=1), 1, rtol=1e-6)


@pytest.mark.slow
def test_the_file_beside_them_says_how_to_feed_them(graphs: Path, student: Path, onnx: Any) -> None:
    about = json.loads((graphs / "onnx.json").read_text())
    config = json.loads((student / "open_clip_config.json").read_text())
    assert about["preprocess"] == config["preprocess_cfg"]
    assert about["logit_scale"] == pytest.approx(np.exp(3.0))
    for name, tower in about["towers"].items():
        graph = onnx.load(graphs / tower["file"])
        (given,), (answer,) = graph.graph.input, graph.graph.output
        assert (given.name, answer.name) == (tower["input"]["name"], tower["output"]["name"])
        dims = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
        assert dims == tower["input"]["shape"]
        assert onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type) == tower["input"]["type"]
        assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [about["opset"]]
        assert tower["largest_difference_to_pytorch"] <= about["compared"]["tolerance"], name
    assert sorted(path.name for path in graphs.iterdir()) == ["image.onnx", "onnx.json", "text.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower", "change", "said"),
    [
        ("text", 1e-3, "text.onnx: onnxruntime and PyTorch differ by up to"),
        ("image", 1e-3, "image.onnx: onnxruntime and PyTorch differ by up to"),
        ("image", float("nan"), "differ by up to nan"),
    ],
)
def test_a_graph_with_other_weights_is_refused_and_nothing_is_written(
    onnx: Any, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: str, change: float, said: str
) -> None:
    def tampered(of: Any, path: Path) -> None:
        shutil.copy(graphs / path.name, path)  # the graph of an equal student
        if of.name == tower:
            _change_weights(onnx, path, change)

    monkeypatch.setattr(onnx_export, "write_graph", tampered)
    folder = exported(tmp_path / "student")
    with pytest.raises(RunError, match=said):
        export_onnx(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["open_clip_config.json", "open_clip_model.safetensors"]


def _change_weights(onnx: Any, path: Path, change: float) -> None:
    """One number of the last matrix, the projection to the embedding."""
    graph = onnx.load(path)
    matrix = [tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2 and tensor.dims[1] == 64][-1]
    values = onnx.numpy_helper.to_array(matrix).copy()
    values[:, 0] += change
    matrix.CopyFrom(onnx.numpy_helper.from_array(values, matrix.name))
    onnx.save(graph, path)


@pytest.mark.slow
def test_a_graph_for_one_batch_size_only_is_refused(onnx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(module: Any, example: Any, **options: Any) -> Any:
        return real(module, example, **(options | {"dynamic_shapes": None}))

    real: Any = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(RunError, match=r"image\.onnx: onnxruntime cannot run 7 rows"):
        export_onnx(exported(tmp_path / "student"))


def test_a_folder_that_is_no_export_is_refused(onnx: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no open_clip_config\.json here"):
        export_onnx(tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_the_command_says_what_to_install_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(MissingExtraError):
        onnx_export.require_onnx()
    run = finished_run(tmp_path / "run")
    assert cli.main(["export", str(run.path), str(tmp_path / "out"), "--onnx"]) == 1
    assert 'pip install "clip-cid[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_writes_them_beside_the_student_and_tells_the_difference(
    onnx: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "run")
    assert cli.main(["export", str(run.path), str(tmp_path / "out"), "--onnx"]) == 0
    assert "largest difference to PyTorch: image " in capsys.readouterr().out
    assert answers(tmp_path / "out/onnx/text.onnx", tokens=np.ones((5, 9), dtype=np.int64)).shape == (5, 12)
