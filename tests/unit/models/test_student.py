import json
import logging
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from PIL import Image

from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.models.architectures import own_configs
from clip_cid.models.clip import Clip, train_transform
from clip_cid.models.export import export_student
from clip_cid.models.loading import load_clip
from clip_cid.models.student import build_student

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def write_config(folder: Path, model_cfg: Any = TINY, name: str = "tiny.json", **beside: Any) -> str:
    path = folder / name
    path.write_text(json.dumps({"model_cfg": model_cfg, **beside} if beside else model_cfg))
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Clip:
    return build_student(write_config(tmp_path), embed_dim=None, seed=1)


@pytest.fixture
def exported(tmp_path: Path, tiny: Clip) -> Path:
    export_student(tiny, tmp_path / "student", head_state={}, provenance={})
    return tmp_path / "student"


def equal_weights(a: Clip, b: Clip) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_equal_seeds_give_equal_weights_and_leave_the_callers_chance_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    state = torch.get_rng_state()
    first, second, other = (build_student(path, embed_dim=None, seed=seed) for seed in (3, 3, 4))
    assert equal_weights(first, second)
    assert not equal_weights(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_embed_dim_overrides_the_width_of_the_configuration(tmp_path: Path) -> None:
    clip = build_student(write_config(tmp_path), embed_dim=20)
    model: Any = clip.model
    assert clip.dim == clip.model_cfg["embed_dim"] == 20
    assert model.encode_text(clip.tokenizer(["a"])).shape == (1, 20)


def test_tokens_and_pixels_follow_the_configuration(tmp_path: Path) -> None:
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    clip = build_student(write_config(tmp_path, preprocess_cfg=preprocess_cfg), embed_dim=None)
    assert clip.tokenizer(["a dog", "two"]).shape == (2, 9)
    white = clip.preprocess(Image.new("RGB", (50, 20), "white"))
    assert white.shape == (3, 32, 32)
    assert torch.allclose(white, torch.full_like(white, (1 - 0.5) / 0.25))
    assert clip.preprocess_cfg["size"] == [32, 32]


def test_every_configuration_of_our_own_is_known_by_name() -> None:
    assert {"cid-tiny", "cid-small"} <= set(own_configs())
    clip = build_student("cid-tiny", embed_dim=None)
    assert clip.preprocess_cfg["size"] == [48, 48]
    assert clip.tokenizer(["a"]).shape == (1, 24)


@pytest.mark.parametrize(
    ("name", "near"), [("cid-tinny", "cid-tiny"), ("ViT-B32", "ViT-B-32"), ("qqqq", "open_clip has")]
)
def test_an_unknown_model_is_refused_with_near_names(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=name) as error:
        build_student(name, embed_dim=None)
    assert near in error.value.fix


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    small = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 1000}}
    with pytest.raises(ConfigError, match="vocab_size is 1,000"):
        build_student(write_config(tmp_path, small), embed_dim=None)


@pytest.mark.parametrize(
    ("model_cfg", "problem"),
    [
        ({"embed_dim": 4}, "vision_cfg, text_cfg is missing"),
        ([1], "not a model configuration"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "depth": 3}}, "depth"),
    ],
)
def test_a_configuration_open_clip_cannot_build_is_refused(tmp_path: Path, model_cfg: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_student(write_config(tmp_path, model_cfg), embed_dim=None)


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        build_student(str(tmp_path / "x.json"), embed_dim=None)


@pytest.mark.slow
def test_a_student_can_start_from_an_exported_one(tmp_path: Path, tiny: Clip, exported: Path) -> None:
    path = str(tmp_path / "tiny.json")
    clip = build_student(path, embed_dim=None, pretrained=str(exported), seed=99)
    assert equal_weights(clip, tiny)
    assert clip.model.training
    with pytest.raises(ConfigError, match="embed_dim 13 but 12") as error:
        build_student(path, embed_dim=13, pretrained=str(exported))
    assert "alignment: linear" in error.value.fix


@pytest.mark.parametrize("pretrained", ["runs/gone/student", "laion2b"])
def test_weights_to_start_from_that_are_nowhere_are_refused(tmp_path: Path, pretrained: str) -> None:
    with pytest.raises(ConfigError, match=f"{pretrained} is not the folder of an exported student"):
        build_student(write_config(tmp_path), embed_dim=None, pretrained=pretrained)


def test_a_tokenizer_that_needs_another_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "hf_tokenizer_name": "some/tokenizer"}}
    with pytest.raises(ConfigError, match="needs a package that is not installed") as error:
        build_student(write_config(tmp_path, config), embed_dim=None)
    assert error.value.fix == "pip install transformers"


def test_the_training_transform_crops_no_more_than_it_may(tiny: Clip) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    torch.manual_seed(0)
    whole = train_transform(tiny, crop_scale=1.0)(image)
    torch.manual_seed(0)
    small = train_transform(tiny, crop_scale=0.05)(image)
    assert whole.shape == small.shape == (3, 32, 32)
    spread = [float(pixels.amax() - pixels.amin()) for pixels in (small, whole)]
    assert spread[0] < spread[1]  # the image is a gradient: less of it, less contrast


def test_a_folder_loads_with_its_own_weights(tiny: Clip, exported: Path) -> None:
    clip = load_clip(f"local-dir:{exported}")
    assert equal_weights(clip, tiny)
    assert not clip.model.training
    assert clip.preprocess_cfg == tiny.preprocess_cfg


def test_a_run_loads_by_its_students_folder(tmp_path: Path, exported: Path, tiny: Clip) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunError, match="distill stage has not finished"):
        load_clip(f"run:{run}")
    (run / "distill").mkdir(parents=True)
    (run / "distill" / "manifest.json").write_text("{}")
    exported.rename(run / "distill" / "student")
    assert equal_weights(load_clip(f"run:{run}"), tiny)


def test_a_folder_without_weights_is_refused_where_open_clip_only_warns(exported: Path) -> None:
    (exported / "open_clip_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"weights could not be loaded .*no CLIP weights found") as error:
        load_clip(f"local-dir:{exported}")
    assert "open_clip_model.safetensors" in error.value.fix


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an exported model"):
        load_clip(f"local-dir:{tmp_path}")


def test_weights_that_are_cut_short_are_refused(exported: Path) -> None:
    weights = exported / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="could not be loaded"):
        load_clip(f"local-dir:{exported}")


def test_weights_of_another_shape_are_refused(exported: Path) -> None:
    config = json.loads((exported / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 24
    (exported / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="size mismatch"):
        load_clip(f"local-dir:{exported}")


def test_weights_with_nan_are_refused(tmp_path: Path, tiny: Clip, exported: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, exported / "open_clip_model.safetensors")
    with pytest.raises(DataError, match=r"1 of 192 numbers of visual.proj are not finite"):
        load_clip(f"local-dir:{exported}")


@pytest.mark.parametrize(
    ("reference", "problem", "fix"),
    [
        ("ViT-B-32", "architecture, not trained weights", "NAME/TAG"),
        ("cid-tiny", "architecture, not trained weights", "run:PATH"),
        ("ViT-B-32/laion3b", "no weights named 'laion3b'", "laion400m_e32"),
        ("ViT-B-33/openai", "No model is named 'ViT-B-33'", "ViT-B-32"),
    ],
)
def test_a_reference_that_names_no_weights_is_refused(reference: str, problem: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        load_clip(reference)
    assert fix in error.value.fix


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_cache(hub: Path, repo: str, folder: Path) -> None:
    """As a download leaves it: a revision of `repo` with the files of `folder`."""
    root = hub / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots").mkdir()
    folder.rename(root / "snapshots" / ("0" * 40))


def test_a_model_of_the_hub_loads_from_the_cache(offline_hub: Path, exported: Path, tiny: Clip) -> None:
    fill_cache(offline_hub, "me/student", exported)
    clip = load_clip("hf-hub:me/student")
    assert equal_weights(clip, tiny)
    assert clip.tokenizer(["a dog"]).shape == (1, 9)


def test_a_model_of_the_hub_without_weights_is_refused(offline_hub: Path, exported: Path) -> None:
    (exported / "open_clip_model.safetensors").rename(exported / "model.safetensors")
    fill_cache(offline_hub, "me/student", exported)
    with pytest.raises(DataError, match="hf-hub:me/student: its weights could not be loaded"):
        load_clip("hf-hub:me/student")


def test_a_model_that_is_not_on_the_hub_is_refused(offline_hub: Path) -> None:
    with pytest.raises(DataError, match="hf-hub:me/nothing: its configuration could not be fetched") as error:
        load_clip("hf-hub:me/nothing")
    assert "network" in error.value.fix


def test_weights_trained_with_quick_gelu_get_it(
    offline_hub: Path, exported: Path, tiny: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(offline_hub, "me/student", exported)
    name = "tiny-for-this-test"
    tags = {"quick": {"hf_hub": "me/student/", "quick_gelu": True}, "plain": {"hf_hub": "me/student/"}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    quick, plain = load_clip(f"{name}/quick"), load_clip(f"{name}/plain")
    assert quick.model_cfg["quick_gelu"]
    assert not plain.model_cfg["quick_gelu"]
    kinds = [{type(module).__name__ for module in clip.model.modules()} for clip in (quick, plain)]
    assert "QuickGELU" in kinds[0]
    assert "QuickGELU" not in kinds[1]
    started = build_student(name, embed_dim=None, pretrained="quick")
    assert equal_weights(started, quick)


def test_open_clip_leaves_no_handler_and_no_noise_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers, filters = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    build_student(write_config(tmp_path), embed_dim=None)
    assert (logging.getLogger().handlers, logging.getLogger().filters) == (handlers, filters)
    assert "No pretrained weights" not in capfd.readouterr().err
