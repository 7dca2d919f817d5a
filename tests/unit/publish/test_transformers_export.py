"""Folders for transformers against open_clip; they need the extra, except for the test that it is asked for."""

import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import torch
from finished_run import finished_run
from PIL import Image

from clip_cid import cli
from clip_cid.errors import MissingExtraError, RunError
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.publish import transformers_export
from clip_cid.publish.transformers_export import TOLERANCE, export_transformers, refuse_unmapped

VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}
CLIP: dict[str, Any] = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP_TEXT: dict[str, Any] = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
WORDS = ["a", "an", "photo", "of", "the", "cat", "dog", "is", "in", "red", "two", "square", "isnt", "it", "don't"]


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the transformers extra is not installed")


def exported(folder: Path, model_cfg: dict[str, Any], **preprocess: Any) -> Path:
    """A student as `clip-cid export` writes it, none of its weights or biases as they are at the start."""
    folder.mkdir()
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "config.json").write_text(json.dumps(config))
    clip = build_student(str(folder / "config.json"), embed_dim=None, seed=3)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in clip.model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=noise))
        cast(Any, clip.model).logit_scale.fill_(3.0)
    export_student(clip, folder / "student", head_state={}, provenance={})
    return folder / "student"


def tokenizer(folder: Path, **options: Any) -> str:
    """A small tokenizer of the library `tokenizers`, in a folder; its end is not the highest token."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: place for place, word in enumerate(["<pad>", "<unk>", "<end>", "<begin>", *WORDS, "?"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 3), ("<end>", 2)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "bos_token": "<begin>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options).save_pretrained(folder)
    return str(folder)


def small_siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: dict[str, Any], **vision: Any) -> Path:
    """A student with timm's SigLIP tower, made small."""
    import timm

    real: Any = timm.create_model

    def small(*args: Any, **options: Any) -> Any:
        return real(*args, **options, embed_dim=24, depth=2, num_heads=3, img_size=32, init_values=None)

    monkeypatch.setattr(timm, "create_model", small)
    timm_cfg = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    model_cfg = {
        "embed_dim": 24,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": 32, **timm_cfg, **vision},
        "text_cfg": {**TEXT, **SIGLIP_TEXT, **text},
    }
    return exported(tmp_path / "siglip", model_cfg, resize_mode="squash", interpolation="bicubic")


CLIPS: dict[str, dict[str, Any]] = {
    "as CLIP": {},
    "quick gelu": {"quick_gelu": True},
    "text tower apart": {"custom_text": True},
    "other sizes": {"vision_cfg": {**VISION, "mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-3}, "patch_dropout": 0.5}},
    "tanh in the text tower": {"text_cfg": {**TEXT, "act_kwargs": {"approximate": "tanh"}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CLIPS.values(), ids=CLIPS)
def test_a_vit_with_clips_text_tower_gives_the_same_in_transformers(
    transformers: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = exported(tmp_path / "student", {**CLIP, **change}, mean=[0.2, 0.4, 0.6], interpolation="bilinear")
    assert max(export_transformers(folder).values()) <= TOLERANCE

    captions, picture = ["a dog", "two dogs, it\u2019s late"], noise(40, 70)
    model, preprocess = cast(tuple[Any, Any], open_clip.create_model_from_pretrained(f"local-dir:{folder}"))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    with torch.inference_mode():
        image, text, scale = model.eval()(preprocess(picture)[None], tokens)

    theirs = transformers.CLIPModel.from_pretrained(folder / "transformers").eval()
    processor = transformers.AutoProcessor.from_pretrained(folder / "transformers", backend="pil")
    inputs = processor(text=captions, images=picture, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = theirs(**inputs).logits_per_image
    torch.testing.assert_close(logits, scale * image @ text.T, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
def test_timms_vit_with_siglips_text_tower_gives_the_same_with_a_tokenizer_of_its_own(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: str
) -> None:
    names = {"hf_tokenizer_name": tokenizer(tmp_path / "words"), "tokenizer_kwargs": {"clean": clean}}
    folder = small_siglip(tmp_path, monkeypatch, {**names, "vocab_size": 40})
    assert max(export_transformers(folder).values()) <= TOLERANCE
    model = transformers.SiglipModel.from_pretrained(folder / "transformers")
    assert float(model.logit_bias.detach()) == pytest.approx(-10, abs=1)
    assert float(model.logit_scale.detach()) == 3.0


@pytest.mark.slow
def test_clips_text_tower_with_a_tokenizer_of_transformers_pools_at_its_end(transformers: Any, tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "words")
    text_cfg = {**TEXT, "hf_tokenizer_name": words, "vocab_size": 40, "pool_type": "eos", "eos_id": 2}
    with pytest.raises(RunError, match=r"text_cfg\.eos_id 2"):
        refuse_unmapped(exported(tmp_path / "two", {**CLIP, "text_cfg": text_cfg}))
    folder = exported(tmp_path / "begin", {**CLIP, "text_cfg": {**text_cfg, "eos_id": 3}})  # pools at the begin
    assert max(export_transformers(folder).values()) <= TOLERANCE
    argmax = exported(tmp_path / "argmax", {**CLIP, "text_cfg": {**text_cfg, "pool_type": "argmax"}})
    assert max(export_transformers(argmax).values()) <= TOLERANCE


@pytest.mark.slow
def test_a_tokenizer_that_pads_on_the_left_differs_and_is_refused(transformers: Any, tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "words", padding_side="left")
    text_cfg = {**TEXT, "hf_tokenizer_name": words, "vocab_size": 40, "pool_type": "eos", "eos_id": 3}
    folder = exported(tmp_path / "student", {**CLIP, "text_cfg": text_cfg})
    with pytest.raises(RunError, match="text embeddings of transformers and open_clip differ by up to"):
        export_transformers(folder)
    assert not (folder / "transformers").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_cfg": {**VISION, "layers": [1, 1, 1, 1]}}, "image tower ModifiedResNet"),
        ({"vision_cfg": {"image_size": 32, "timm_model_name": "resnet18"}}, "image tower resnet18 of timm"),
        ({"vision_cfg": {**VISION, "ls_init_value": 0.1}}, "vision_cfg.ls_init_value 0.1"),
        ({"vision_cfg": {**VISION, "pool_type": "avg"}}, "vision_cfg.pool_type avg"),
        ({"vision_cfg": {**VISION, "no_ln_pre": True}}, "vision_cfg.no_ln_pre True"),
        (
            {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}},
            "vision_cfg.attentional_pool True",
        ),
        ({"vision_cfg": {**VISION, "qk_norm": True}}, "vision_cfg.qk_norm True"),
        ({"vision_cfg": {**VISION, "image_size": [32, 48]}}, "images of 32 x 48"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, "text_cfg.no_causal_mask True"),
        ({"text_cfg": {**TEXT, "proj_bias": True}}, "text_cfg.proj_bias True"),
        ({"text_cfg": {**TEXT, "pool_type": "last"}}, "text_cfg.pool_type last"),
        ({"text_cfg": {**TEXT, "ls_init_value": 0.1}}, "text_cfg.ls_init_value 0.1"),
        (
            {
                "text_cfg": {
                    **TEXT,
                    "vocab_size": 49409,
                    "tokenizer_kwargs": {"additional_special_tokens": ["<red>"]},
                }
            },
            "additional_special_tokens",
        ),
        ({"init_logit_bias": -10}, "logit_bias"),
    ],
)
def test_towers_that_do_not_map_are_refused_by_name(
    transformers: Any, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    folder = exported(tmp_path / "student", {**CLIP, **change})
    with pytest.raises(RunError, match="transformers has no model of these parts") as error:
        export_transformers(folder)
    assert named in error.value.problem
    assert len(str(error.value).splitlines()) == 2
    assert not (folder / "transformers").exists()


@pytest.mark.slow
def test_a_text_tower_of_transformers_and_another_resize_are_refused(transformers: Any, tmp_path: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**size, vocab_size=49408, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    text_cfg = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "linear", "context_length": 16}
    with pytest.raises(RunError, match=r"text tower .*bert \(text_cfg.hf_model_name\)"):
        refuse_unmapped(exported(tmp_path / "student", {**CLIP, "text_cfg": text_cfg}))
    with pytest.raises(RunError, match="resize_mode longest"):
        refuse_unmapped(exported(tmp_path / "longest", CLIP, resize_mode="longest"))


@pytest.mark.slow
def test_siglips_image_tower_needs_its_pooling_and_its_text_tower(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_siglip(tmp_path, monkeypatch, {"pool_type": "argmax"}, timm_proj="linear")
    with pytest.raises(RunError, match=r"a projection behind vit_.*text_cfg.pool_type argmax"):
        refuse_unmapped(folder)


def test_other_weights_are_refused_and_nothing_is_written(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tampered(clip: Any, target: Any, folder: Path) -> None:
        target.weights["visual_projection.weight"] = target.weights["visual_projection.weight"] * 1.1
        target.weights["visual_projection.weight"][0] += 0.01
        write(clip, target, folder)

    write: Any = transformers_export._write
    monkeypatch.setattr(transformers_export, "_write", tampered)
    folder = exported(tmp_path / "student", CLIP)
    with pytest.raises(RunError, match="image embeddings of transformers and open_clip differ by up to"):
        export_transformers(folder)
    assert {path.name for path in folder.iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors"}


@pytest.mark.slow
def test_pixels_are_open_clips_but_for_the_half_pixel_of_some_crops(transformers: Any, tmp_path: Path) -> None:
    folder = exported(tmp_path / "student", CLIP)
    export_transformers(folder)
    _, preprocess = cast(tuple[Any, Any], open_clip.create_model_from_pretrained(f"local-dir:{folder}"))
    by_pil = transformers.AutoProcessor.from_pretrained(folder / "transformers", backend="pil")
    for width in range(32, 72):
        picture, moved = noise(32, width), (width - 32) % 4 == 3
        ours, theirs = preprocess(picture), by_pil(images=picture, return_tensors="pt")["pixel_values"][0]
        if moved:  # open_clip's crop begins a pixel later
            ours, theirs = ours[..., :-1], theirs[..., 1:]
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)

    # The default backend rounds a resized picture to other grey levels here and there.
    by_torch = transformers.AutoProcessor.from_pretrained(folder / "transformers")
    picture = noise(203, 203)
    gap = (by_torch(images=picture, return_tensors="pt")["pixel_values"][0] - preprocess(picture)).abs().max()
    assert gap * 0.2613 * 255 <= 1.001


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.slow
def test_the_command_prints_the_lines_that_load_it(
    transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = finished_run(tmp_path / "run"), tmp_path / "out"
    assert cli.main(["export", str(run.path), str(out), "--transformers"]) == 0
    said = capsys.readouterr().out
    lines = said[said.index("# transformers") :].splitlines()
    place: dict[str, Any] = {}
    exec("\n".join(lines[1:4]), place)
    assert type(place["model"]).__name__ == "CLIPModel"
    inputs = place["processor"](text=["a cat"], images=noise(40, 50), return_tensors="pt")
    assert math.isfinite(float(place["model"](**inputs).logits_per_image.detach()))
    assert "largest difference to open_clip: pixels " in said

    files = [path for path in (out / "transformers").iterdir() if path.suffix == ".json"]
    assert not [path.name for path in files if str(tmp_path) in path.read_text()]


def test_a_form_that_is_refused_leaves_the_earlier_export_and_files_of_others_are_kept(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise RunError("transformers: differs.", fix="Nothing.")

    run, out = finished_run(tmp_path / "run"), tmp_path / "out"
    assert cli.main(["export", str(run.path), str(out)]) == 0
    (out / "onnx").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(transformers_export, "_compare", refused)
    assert cli.main(["export", str(run.path), str(out), "--transformers"]) == 1
    assert sorted(tmp_path.rglob("*")) == before

    capsys.readouterr()
    assert cli.main(["export", str(run.path), str(out)]) == 0
    assert "the earlier export is replaced, and its onnx with it" in capsys.readouterr().err

    (out / "NOTES.md").write_text("mine")
    assert cli.main(["export", str(run.path), str(out)]) == 1
    assert "but holds NOTES.md too" in capsys.readouterr().err
    assert (out / "NOTES.md").read_text() == "mine"
    (out / "open_clip_config.json").write_text("{}")
    assert cli.main(["export", str(run.path), str(out)]) == 1
    assert "out: exists and is not an export of clip-cid" in capsys.readouterr().err
    assert cli.main(["export", str(run.path), str(run.path / "distill" / "student")]) == 1
    assert "is in the folder of a stage" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(MissingExtraError):
        transformers_export.require_transformers()
    run = finished_run(tmp_path / "run")
    assert cli.main(["export", str(run.path), str(tmp_path / "out"), "--transformers"]) == 1
    assert 'pip install "clip-cid[transformers]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
