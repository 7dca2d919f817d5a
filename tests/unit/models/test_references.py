"""Which files a reference to a model stands for."""

import json
from pathlib import Path
from typing import Any

import pytest

from clip_cid.models.references import files_behind_model, files_beside_weights, split_checkpoint


def exported(folder: Path, **text_cfg: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text_cfg}}))
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    return folder


def names(reference: str) -> list[str]:
    return [path.name for path in files_behind_model(reference)]


def test_weights_configuration_and_tokenizer_decide_and_nothing_else_in_the_folder(tmp_path: Path) -> None:
    folder = exported(tmp_path / "model")
    for name in ("tokenizer.json", "merges.txt", "spiece.model", "README.md", ".gitattributes"):
        (folder / name).write_text("x")
    (folder / "onnx").mkdir()
    expected = ["merges.txt", "open_clip_config.json", "open_clip_model.safetensors", "spiece.model", "tokenizer.json"]
    assert names(f"local-dir:{folder}") == expected


def test_a_run_stands_for_its_student(tmp_path: Path) -> None:
    student = exported(tmp_path / "run" / "distill" / "student")
    assert files_behind_model(f"run:{tmp_path / 'run'}") == files_behind_model(f"local-dir:{student}") != []


def test_a_text_tower_in_a_folder_of_its_own_counts(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    folder = exported(tmp_path / "model", hf_model_name=str(tmp_path / "bert"))
    assert tmp_path / "bert" / "config.json" in files_behind_model(f"local-dir:{folder}")


def test_a_checkpoint_stands_for_itself_and_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, config = tmp_path / "my runs" / "epoch_32.pt", Path("tiny.json")
    path.parent.mkdir()
    path.write_bytes(b"weights")
    config.write_text("{}")
    assert files_behind_model(f"ViT-B/32/{path}") == [path]
    assert split_checkpoint("ViT-B/32/my runs/epoch_32.pt") == ("ViT-B/32", Path("my runs/epoch_32.pt"))
    assert split_checkpoint(f"tiny.json/{path}") == ("tiny.json", path)
    assert files_behind_model(f"tiny.json/{path}") == sorted([path, config])
    assert files_beside_weights(f"tiny.json/{path}") == []
    assert split_checkpoint(str(path)) is split_checkpoint("ViT-B-32/gone.pt") is None


@pytest.mark.parametrize("reference", ["ViT-B-32/openai", "hf-hub:org/name", "local-dir:/gone", "run:/gone", "none"])
def test_a_model_from_elsewhere_or_nowhere_stands_for_no_file(reference: str) -> None:
    assert files_behind_model(reference) == []


@pytest.mark.parametrize("config", ["", "[]", '{"model_cfg": {"text_cfg": {"hf_model_name": 5}}}'])
def test_a_damaged_configuration_is_itself_a_file_behind_the_model(config: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / "model")
    (folder / "open_clip_config.json").write_text(config)
    assert names(f"local-dir:{folder}") == ["open_clip_config.json", "open_clip_model.safetensors"]
