import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_cid.errors import ConfigError, DataError
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.models.teacher import Teacher, load_teacher, weights_sha256
from clip_cid.recipe import EmbedConfig

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def exported_teacher(folder: Path, *, seed: int = 0) -> str:
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY))
    export_student(
        build_student(str(folder / "tiny.json"), embed_dim=None, seed=seed),
        folder / "teacher",
        head_state={},
        provenance={},
    )
    return f"local-dir:{folder / 'teacher'}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported_teacher(tmp_path_factory.mktemp("teacher") / "a")


@pytest.fixture(scope="module")
def teacher(reference: str) -> Teacher:
    return load_teacher(EmbedConfig(teacher=reference), device="cpu")


def test_embeddings_are_open_clips_own_as_unit_float32(teacher: Teacher) -> None:
    images, captions = torch.randn(3, 3, 32, 32), ["a red square", "b", "c d"]
    model: Any = teacher.clip.model
    with torch.inference_mode():
        expected = (
            model.encode_image(images, normalize=True),
            model.encode_text(teacher.clip.tokenizer(captions), normalize=True),
        )
    found = teacher.encode_images(images), teacher.encode_texts(captions)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.norm(dim=1), torch.ones(3))
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_changes_little_and_still_gives_unit_float32(reference: str, precision: Any) -> None:
    full = load_teacher(EmbedConfig(teacher=reference, precision="fp32"), device="cpu")
    half = load_teacher(EmbedConfig(teacher=reference, precision=precision), device="cpu")
    images = torch.randn(4, 3, 32, 32)
    a, b = full.encode_images(images), half.encode_images(images)
    assert b.dtype == torch.float32
    assert torch.allclose(b.norm(dim=1), torch.ones(4), atol=1e-6)
    assert not torch.equal(a, b)
    assert ((a * b).sum(dim=1) > 0.999).all()
    assert half.identity["precision"] == precision


def test_auto_precision_is_fp32_on_the_cpu(teacher: Teacher) -> None:
    assert teacher.identity["precision"] == "fp32"


def test_the_identity_names_weights_and_preprocessing(teacher: Teacher, reference: str) -> None:
    assert teacher.identity["reference"] == reference
    assert teacher.identity["preprocessing"]["size"] == [32, 32]
    assert teacher.identity["logit_scale"] == pytest.approx(1 / 0.07)
    assert teacher.dim == 12
    assert json.loads(json.dumps(teacher.identity)) == teacher.identity


def test_the_digest_of_the_weights_changes_with_any_of_them(teacher: Teacher) -> None:
    model = teacher.clip.model
    before = weights_sha256(model)
    assert before == teacher.identity["weights_sha256"] == weights_sha256(model)
    weight = next(iter(model.parameters()))
    with torch.no_grad():
        old = weight.view(-1)[0].item()
        weight.view(-1)[0] = old + 1
        assert weights_sha256(model) != before
        weight.view(-1)[0] = old
    assert weights_sha256(model) == before


def test_a_teacher_does_not_learn(teacher: Teacher) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.clip.model.parameters())
    assert not teacher.clip.model.training


@pytest.mark.parametrize(
    ("embed", "problem"),
    [
        (EmbedConfig(teacher="none"), "nothing to embed with"),
        (EmbedConfig(teacher="ViT-B-32", pretrained=None), "architecture without weights"),
        (EmbedConfig(teacher="ViT-B-32", pretrained="nope"), "no weights named 'nope'"),
        (EmbedConfig(teacher="ViT-giant-99"), "No model is named 'ViT-giant-99'"),
        (EmbedConfig(teacher="runs/epoch_32.pt"), "does not say its architecture"),
    ],
)
def test_a_teacher_that_cannot_be_found_is_refused(embed: EmbedConfig, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_teacher(embed, device="cpu")


def test_an_embedding_that_is_not_finite_stops_at_once(tmp_path: Path) -> None:
    broken = load_teacher(EmbedConfig(teacher=exported_teacher(tmp_path / "b")), device="cpu")
    with torch.no_grad():
        dict(broken.clip.model.named_parameters())["visual.proj"].fill_(float("inf"))
    with pytest.raises(DataError, match="2 of 2 image embeddings are zero or not finite"):
        broken.encode_images(torch.randn(2, 3, 32, 32))
