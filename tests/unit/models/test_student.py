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
from clip_cid.models.teacher import load_teacher
from clip_cid.recipe import EmbedConfig

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


def tiny_with(**sections: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {**value, **sections.get(name, {})} if isinstance(value, dict) else value for name, value in TINY.items()
    }


@pytest.mark.parametrize(
    ("model_cfg", "numbers"),
    [
        (tiny_with(vision_cfg={"image_size": 8}), ("8 x 8 pixels", "patches of 16")),
        (tiny_with(vision_cfg={"image_size": [32, 8]}), ("32 x 8 pixels", "patches of 16")),
        (tiny_with(vision_cfg={"image_size": 16, "layers": [1, 1, 1, 1], "width": 8}), ("16 x 16 pixels", "1x1")),
        (tiny_with(vision_cfg={"image_size": 0}), ("0 x 0 pixels",)),
        (
            tiny_with(vision_cfg={"timm_model_name": "vit_tiny_patch16_224", "image_size": 192}),
            ("192 x 192 pixels", "224"),
        ),
        (tiny_with(text_cfg={"context_length": 2}), ("context_length is 2", "the least is 3")),
        (tiny_with(text_cfg={"context_length": 0}), ("context_length is 0", "the least is 3")),
        ({**TINY, "embed_dim": 0}, ("embed_dim is 0", "text embedding 8")),
        (tiny_with(vision_cfg={"patch_size": 0}), ("cannot build", "zero")),
    ],
)
def test_sizes_that_do_not_fit_are_named(tmp_path: Path, model_cfg: Any, numbers: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        build_student(write_config(tmp_path, model_cfg), embed_dim=None)
    assert all(number in error.value.problem for number in numbers), error.value.problem


@pytest.mark.parametrize("preprocess", [{"mean": [0.5, 0.5]}, {"std": [0, 0, 0]}])
def test_a_preprocessing_that_does_not_fit_is_named(tmp_path: Path, preprocess: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="preprocess_cfg: it cannot make an image of 32 x 32 pixels"):
        build_student(write_config(tmp_path, preprocess_cfg=preprocess), embed_dim=None)


def test_sizes_of_an_exported_folder_that_do_not_fit_are_named(exported: Path) -> None:
    config = exported / "open_clip_config.json"
    config.write_text(config.read_text().replace('"mean": [', '"mean": [0.5, '))
    with pytest.raises(ConfigError, match="preprocess_cfg: it cannot make an image of 32 x 32 pixels"):
        load_clip(f"local-dir:{exported}")


@pytest.mark.parametrize(("says", "wanted"), [({}, True), ({"hf_model_pretrained": False}, False)])
def test_a_text_tower_of_transformers_starts_from_the_weights_it_names_as_in_open_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: dict[str, Any], wanted: bool
) -> None:
    asked: list[bool] = []

    def record(*_: Any, pretrained_text: bool, **__: Any) -> None:
        asked.append(pretrained_text)
        raise RuntimeError("enough is known")

    monkeypatch.setattr(open_clip, "create_model", record)
    config = tiny_with(text_cfg={"hf_model_name": "some/tower", **says})
    with pytest.raises(ConfigError, match="enough is known"):
        build_student(write_config(tmp_path, config), embed_dim=None)
    assert asked == [wanted]


def test_the_weights_of_a_text_tower_are_those_of_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tower = transformers.BertModel(transformers.BertConfig(**size, vocab_size=49408, max_position_embeddings=32))
    tower.save_pretrained(tmp_path / "bert")
    text_cfg = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "linear", "context_length": 16}
    caplog.set_level("INFO", logger="clip_cid")

    clip = build_student(write_config(tmp_path, {**TINY, "text_cfg": text_cfg}), embed_dim=None)
    model: Any = clip.model
    ours = model.text.transformer.embeddings.word_embeddings.weight
    assert torch.equal(ours, tower.embeddings.word_embeddings.weight)
    assert f"the text tower starts from the weights of {tmp_path / 'bert'}" in caplog.text

    too_long = {**TINY, "text_cfg": {**text_cfg, "context_length": 40}}
    with pytest.raises(ConfigError, match=r"context_length is 40, but .*bert has 32 positions"):
        build_student(write_config(tmp_path, too_long), embed_dim=None)


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
    wider = write_config(tmp_path, {**TINY, "embed_dim": 13}, "wider.json")
    with pytest.raises(ConfigError, match="embed_dim 13 but 12") as error:
        build_student(wider, embed_dim=None, pretrained=str(exported))  # alignment: linear
    assert "linear" not in error.value.fix
    assert "embed_dim 12" in error.value.fix


def as_trained(clip: Clip, path: Path) -> Path:
    """A checkpoint as open_clip's training writes it from several processes."""
    state = {f"module.{name}": value for name, value in clip.model.state_dict().items()}
    optimizer = torch.optim.AdamW(clip.model.parameters()).state_dict()
    torch.save({"epoch": 32, "name": "my-run", "state_dict": state, "optimizer": optimizer}, path)
    return path


def test_a_checkpoint_of_open_clips_training_is_a_teacher_and_a_student_to_start_from(
    tmp_path: Path, tiny: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As open_clip itself loads it, by the name of an architecture or the path of a configuration."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-known", TINY)
    path = as_trained(tiny, tmp_path / "epoch_32.pt")
    theirs = open_clip.create_model("tiny-known", pretrained=str(path)).state_dict()
    for name in ("tiny-known", str(tmp_path / "tiny.json")):
        teacher = load_teacher(EmbedConfig(teacher=name, pretrained=str(path)), device="cpu")
        for clip in (teacher.clip, build_student(name, embed_dim=None, pretrained=str(path), seed=9)):
            assert equal_weights(clip, tiny)
            assert all(torch.equal(value, theirs[key]) for key, value in clip.model.state_dict().items())
    torch.save(tiny.model.state_dict(), tmp_path / "plain.pt")
    assert equal_weights(load_clip(f"tiny-known/{tmp_path / 'plain.pt'}"), tiny)


class _Attack:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.load:UserWarning")
def test_a_file_that_is_no_checkpoint_of_this_architecture_is_refused(tmp_path: Path, tiny: Clip) -> None:
    config, path = str(tmp_path / "tiny.json"), tmp_path / "x.pt"
    wider = build_student(config, embed_dim=20)
    archive = torch.jit.script(torch.nn.Linear(2, 2))
    writers: dict[str, Any] = {
        "size mismatch": lambda: torch.save(wider.model.state_dict(), path),
        "Missing key": lambda: torch.save({"state_dict": {"x": torch.zeros(1)}}, path),
        "StopIteration": lambda: torch.save({}, path),
        "Weights only load failed": lambda: torch.save({"state_dict": _Attack()}, path),
        "TorchScript": lambda: archive.save(str(path)),
        "invalid|Invalid|magic|unpickl|Weights only": lambda: path.write_bytes(b"no checkpoint"),
    }
    for problem, write in writers.items():
        write()
        with pytest.raises(DataError, match=rf"x\.pt: not the weights of a .*tiny\.json \(.*({problem})"):
            build_student(config, embed_dim=None, pretrained=str(path))
    with pytest.raises(DataError, match="no such checkpoint"):
        build_student(config, embed_dim=None, pretrained=str(tmp_path / "gone.pt"))
    with pytest.raises(ConfigError, match="does not say its architecture"):
        load_clip(f"local-dir:{path}")
    with pytest.raises(DataError, match="no NAME/FILE with a checkpoint that is there"):
        load_clip("ViT-B-32/gone.pt")


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
