"""A teacher's text tower beside a student's image tower: both as they were, or a refusal."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_teacher import TINY

from clip_cid.errors import ConfigError, DataError
from clip_cid.models.clip import Clip
from clip_cid.models.export import export_student
from clip_cid.models.loading import load_clip
from clip_cid.models.student import build_student
from clip_cid.models.text_tower import TextTower, load_text_tower

TEXT = {"context_length": 7, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}
RESNET = {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1], "head_width": 8}
CAPTIONS = ["a red square", "b", "four blue dots above a line, and more words than fit"]
TEACHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a text tower of its own module": {"custom_text": True},
    "quick_gelu": {"quick_gelu": True},
    "pooled at the last token, with a bias": {
        "custom_text": True,
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True, "proj_bias": True},
    },
    "SigLIP's scale and bias": {"init_logit_scale": 4.7, "init_logit_bias": -12.0},
}


def write(folder: Path, name: str, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**TINY, **changes}))
    return str(folder / f"{name}.json")


def teacher(folder: Path, **changes: Any) -> str:
    clip = build_student(
        write(folder, "teacher", embed_dim=20, text_cfg=changes.pop("text_cfg", TEXT), **changes),
        embed_dim=None,
        seed=7,
    )
    with torch.no_grad():
        for value in clip.model.parameters():
            value.add_(0.01)  # so that no bias is zero
    export_student(clip, folder / "teacher", head_state={}, provenance={})
    return f"local-dir:{folder / 'teacher'}"


def texts(clip: Clip, tokenizer: Any = None) -> torch.Tensor:
    model: Any = clip.model.eval()
    with torch.inference_mode():
        return model.encode_text((tokenizer or clip.tokenizer)(CAPTIONS))


def visual(clip: Clip) -> dict[str, torch.Tensor]:
    return {name: value for name, value in clip.model.state_dict().items() if name.startswith("visual.")}


@pytest.mark.parametrize("vision", [TINY["vision_cfg"], RESNET], ids=["ViT", "ResNet"])
@pytest.mark.parametrize("changes", TEACHERS.values(), ids=TEACHERS)
def test_the_texts_are_the_teachers_bit_for_bit_also_when_exported(
    tmp_path: Path, changes: dict[str, Any], vision: dict[str, Any]
) -> None:
    reference = teacher(tmp_path, **changes)
    tower = load_text_tower(reference)
    clip = build_student(write(tmp_path, "student", vision_cfg=vision), embed_dim=20, text_tower=tower, own_scale=False)
    expected = texts(load_clip(reference))
    assert torch.equal(texts(clip), expected)

    export_student(clip, tmp_path / "student", head_state={}, provenance={})
    again = load_clip(f"local-dir:{tmp_path / 'student'}")
    assert torch.equal(texts(again), expected)
    theirs: Any = load_clip(reference).model
    assert torch.equal(again.model.state_dict()["logit_scale"], theirs.logit_scale)
    assert (getattr(again.model, "logit_bias", None) is None) == (theirs.logit_bias is None)


def test_the_image_tower_is_that_of_the_same_seed_and_its_scale_its_own(tmp_path: Path) -> None:
    tower = load_text_tower(teacher(tmp_path, **TEACHERS["SigLIP's scale and bias"]))
    path = write(tmp_path, "student")
    own = build_student(path, embed_dim=20, seed=5)
    kept = build_student(path, embed_dim=20, seed=5, text_tower=tower)
    assert visual(kept).keys() == visual(own).keys()
    assert all(torch.equal(value, visual(own)[name]) for name, value in visual(kept).items())
    model: Any = kept.model
    assert torch.equal(model.logit_scale, own.model.state_dict()["logit_scale"])
    assert model.logit_scale.requires_grad
    assert model.logit_bias is None


def test_weights_to_start_from_give_the_image_tower_whatever_their_text_tower(tmp_path: Path) -> None:
    tower = load_text_tower(teacher(tmp_path))
    path = write(tmp_path, "student")
    start = build_student(path, embed_dim=20, seed=9)
    export_student(start, tmp_path / "start", head_state={}, provenance={})
    clip = build_student(path, embed_dim=20, pretrained=str(tmp_path / "start"), text_tower=tower)
    assert all(torch.equal(value, visual(start)[name]) for name, value in visual(clip).items())
    assert torch.equal(texts(clip), texts(load_clip(tower.reference)))

    # And those of a student with such a text tower.
    export_student(clip, tmp_path / "second", head_state={}, provenance={})
    again = build_student(path, embed_dim=20, pretrained=str(tmp_path / "second"), text_tower=tower)
    assert all(torch.equal(value, visual(start)[name]) for name, value in visual(again).items())


def test_towers_of_two_activations_are_refused_only_where_both_are_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tower = load_text_tower(teacher(tmp_path, quick_gelu=True))
    path = write(tmp_path, "student")
    caplog.set_level("INFO", logger="clip_cid")
    assert build_student(path, embed_dim=20, text_tower=tower).model_cfg["quick_gelu"]
    assert "its image tower has the activation of" in caplog.text

    export_student(build_student(path, embed_dim=20), tmp_path / "start", head_state={}, provenance={})
    with pytest.raises(ConfigError, match=r"trained with quick_gelu True, and .*distill.pretrained with False"):
        build_student(path, embed_dim=20, pretrained=str(tmp_path / "start"), text_tower=tower)


def test_a_tower_without_weights_builds_the_same_model(tmp_path: Path) -> None:
    """As the export at the end of a training, when the teacher may have gone."""
    tower, path = load_text_tower(teacher(tmp_path)), write(tmp_path, "student")
    trained = build_student(path, embed_dim=20, seed=1, text_tower=tower, own_scale=False)
    bare = build_student(path, embed_dim=20, seed=2, text_tower=tower.without_weights(), own_scale=False)
    bare.model.load_state_dict(trained.model.state_dict())
    assert torch.equal(texts(bare), texts(trained))


def test_a_teacher_with_other_weights_than_made_the_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not those that made the embeddings"):
        load_text_tower(teacher(tmp_path), weights_digest="0" * 64)


def test_a_coca_is_refused_by_name(tmp_path: Path) -> None:
    coca = {
        "embed_dim": 20,
        "vision_cfg": {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 8, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 8, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 1},
        "custom_text": True,
    }
    path = write(tmp_path, "coca", **coca)
    clip = build_student(path, embed_dim=None)
    for value in clip.model.parameters():
        value.detach().zero_()  # open_clip leaves some of them as the memory was
    export_student(clip, tmp_path / "coca", head_state={}, provenance={})
    with pytest.raises(ConfigError, match="is a CoCa, whose text tower does not stand beside"):
        load_text_tower(f"local-dir:{tmp_path / 'coca'}")


def test_a_text_tower_of_transformers_is_kept_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(**size, vocab_size=49408, max_position_embeddings=32))
    bert.save_pretrained(tmp_path / "bert")
    text_cfg = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "linear", "context_length": 16}
    reference = teacher(tmp_path, text_cfg=text_cfg)
    clip = build_student(write(tmp_path, "student"), embed_dim=20, text_tower=load_text_tower(reference))
    assert torch.equal(texts(clip), texts(load_clip(reference)))


def test_text_weights_that_are_not_those_of_the_configuration_are_refused(tmp_path: Path) -> None:
    tower = load_text_tower(teacher(tmp_path))
    assert tower.weights is not None
    weights = copy.copy(tower.weights)
    del weights["text_projection"]
    broken = TextTower(tower.reference, tower.model_cfg, tower.tokenizer, weights)
    with pytest.raises(DataError, match=r"other weights than its model_cfg says \(text_projection"):
        build_student(write(tmp_path, "student"), embed_dim=20, text_tower=broken)
