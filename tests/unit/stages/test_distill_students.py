"""Students of every kind, from nothing or from weights: what is trained, what is refused, what is left."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from test_distill import CENTERS, DIM, STUDENT, Case
from torch import Tensor

from clip_cid import pipeline
from clip_cid.data.sets.evaluation_sets import open_set
from clip_cid.errors import ConfigError
from clip_cid.made_from import Origins
from clip_cid.models.student import build_student
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import DISTILL
from clip_cid.stages.facts import BY_NAME
from clip_cid.training.assemble import Training, prepare
from clip_cid.training.loop import Trainer
from clip_cid.training.ranks.distributed import ALONE

TIMM = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 32}
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def write_student(case: Case, **vision_cfg: Any) -> str:
    path = case.path / "other.json"
    path.write_text(json.dumps({**STUDENT, "vision_cfg": vision_cfg}))
    return str(path)


def exported(case: Case, out: str = "distill.part") -> Path:
    return case.folder.path / out / "student"


def load(folder: Path) -> Any:
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0]


def prepared(case: Case, out: str = "prepared", **changes: Any) -> Training:
    path = case.folder.path / out
    path.mkdir(exist_ok=True)
    return prepare(case.folder, path, case.recipe(**changes), ALONE)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# Students of the sigmoid kind


@pytest.mark.slow
def test_a_fresh_student_for_the_sigmoid_loss_starts_as_siglip_does_and_keeps_its_bias(case: Case):
    fresh = prepared(case, weights="siglip-only").trainer.model.student
    assert fresh.logit_bias.item() == -10
    assert fresh.logit_scale.item() == pytest.approx(math.log(10))
    summary = case.run(weights="siglip-only", steps=3)
    assert [name for name in summary if name.startswith("loss")] == ["loss", "loss/siglip"]
    loaded, weights = load(exported(case)), load_file(exported(case) / WEIGHTS)
    assert loaded.logit_bias.item() == weights["logit_bias"].item() != -10
    config = json.loads((exported(case) / "open_clip_config.json").read_text())
    assert config["model_cfg"]["init_logit_bias"] == weights["logit_bias"].item()
    again = prepared(case, "warm", weights="siglip-only", pretrained=str(exported(case)))
    assert again.trainer.model.student.logit_bias.item() == weights["logit_bias"].item()


@pytest.mark.slow
def test_the_sigmoid_loss_cannot_start_from_weights_without_a_bias(case: Case):
    case.run(steps=2)
    with pytest.raises(ConfigError, match="has no logit bias, which the sigmoid loss needs"):
        prepared(case, weights="siglip-only", pretrained=str(exported(case)))


# From weights, and towers that stay


@pytest.fixture
def finished(case: Case) -> Case:
    """A run whose distill stage is done."""
    case.run("distill", steps=3)
    (case.folder.path / "distill" / "manifest.json").write_text("{}")
    return case


@pytest.mark.parametrize("how", ["run:{run}", "local-dir:{run}/distill/student", "{run}/distill/student"])
def test_a_training_starts_from_the_weights_it_is_given(finished: Case, how: str):
    reference = how.format(run=finished.folder.path)
    student = prepared(finished, pretrained=reference, seed=5).trainer.model.student
    weights = load_file(finished.folder.path / "distill" / "student" / WEIGHTS)
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert student.training


def test_a_lock_needs_weights(case: Case):
    with pytest.raises(ConfigError, match="lock: image, but no weights are loaded, so the tower would stay random"):
        prepared(case, lock="image")


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["image", "text"])
def test_a_locked_tower_is_left_as_it_was_loaded(finished: Case, lock: str):
    finished.run("warm", pretrained=f"run:{finished.folder.path}", lock=lock, steps=3)
    before, after = (load_file(finished.folder.path / out / "student" / WEIGHTS) for out in ("distill", "warm"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    image = {name for name in before if name.startswith("visual.")}
    assert same == (image if lock == "image" else before.keys() - image - {"logit_scale"})


@pytest.mark.slow
def test_a_text_tower_of_its_own_is_trained_left_and_locked(case: Case):
    """As SigLIP's and those with a Hugging Face text model have it; here it is open_clip's transformer."""
    path = case.path / "custom.json"
    path.write_text(json.dumps({**STUDENT, "custom_text": True}))
    case.run("distill", student=str(path), steps=2, machine={"grad_checkpointing": True})
    (case.folder.path / "distill" / "manifest.json").write_text("{}")
    assert type(load(exported(case, "distill"))).__name__ == "CustomTextCLIP"
    locked = {"pretrained": f"run:{case.folder.path}", "lock": "text", "steps": 2}
    case.run("warm", student=str(path), **locked)
    before, after = (load_file(exported(case, out) / WEIGHTS) for out in ("distill", "warm"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == {name for name in before if name.startswith("text.")}


# Towers of timm, batch normalization


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_a_tower_of_timm_is_trained_and_left(case: Case, name: str):
    student = write_student(case, timm_model_name=name, **TIMM)
    case.run(student=student, steps=2, machine={"micro_batch": 4})
    model = load(exported(case))
    assert type(model.visual).__name__ == "TimmModel"
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, DIM)


@pytest.mark.slow
def test_batch_normalization_is_over_the_whole_batch_or_locked(case: Case):
    student = write_student(case, timm_model_name="test_efficientnet", **TIMM)
    with pytest.raises(ConfigError, match="normalizes over the batch, and would normalize over each micro-batch"):
        prepared(case, student=student, machine={"micro_batch": 4})
    case.run("distill", student=student, steps=2)
    (case.folder.path / "distill" / "manifest.json").write_text("{}")
    locked = {"student": student, "pretrained": f"run:{case.folder.path}", "lock": "image", "steps": 2}
    case.run("locked", **locked, machine={"micro_batch": 4})
    before, after = (load_file(case.folder.path / out / "student" / WEIGHTS) for out in ("distill", "locked"))
    statistics = [name for name in before if "running" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("visual."))


# Memory: activations computed again


def first_gradients(training: Training) -> dict[str, Tensor]:
    trainer: Any = training.trainer
    trainer.learner.joint.train()
    trainer.records = None
    for optimizer in trainer.learner.optimizers:  # they stay away from the weights; the gradients are looked at
        optimizer.step = lambda *_: None
    trainer._train_step(next(trainer.batches.between(0, 1)))
    return {name: value.grad.clone() for name, value in trainer.model.student.named_parameters()}


@pytest.mark.parametrize("tower", ["open_clip", "timm"])
def test_activations_computed_again_give_the_same_gradients(case: Case, tower: str):
    student = str(case.path / "student.json")
    if tower == "timm":
        student = write_student(case, timm_model_name="test_vit", **TIMM)
    plain, fewer = (
        prepared(case, name, student=student, machine={"grad_checkpointing": name == "fewer"})
        for name in ("plain", "fewer")
    )
    assert (tower == "timm") or fewer.trainer.model.student.transformer.grad_checkpointing
    torch.testing.assert_close(first_gradients(fewer), first_gradients(plain), rtol=1e-5, atol=1e-7)


def test_a_tower_that_cannot_compute_again_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch):
    """open_clip's own ResNet says nothing and goes on, a tower of timm logs a line."""
    resnet = write_student(case, layers=[1, 1, 1, 1], width=8, image_size=32, head_width=16)
    with pytest.raises(ConfigError, match="not supported by ModifiedResNet"):
        prepared(case, student=resnet, machine={"grad_checkpointing": True})
    import timm

    vit = write_student(case, timm_model_name="test_vit", **TIMM)

    def cannot(self: Any, enable: bool = True) -> None:
        raise RuntimeError

    monkeypatch.setattr(timm.models.VisionTransformer, "set_grad_checkpointing", cannot)
    with pytest.raises(ConfigError, match=r"other\.json cannot do it .*not supported for this timm image tower"):
        prepared(case, student=vit, machine={"grad_checkpointing": True})


# Compiled


def inductor_is_right(case: Case) -> bool:
    """Whether torch's compiled kernels agree with its others, for the student alone and with no code of ours."""
    model = build_student(str(case.path / "student.json"), embed_dim=None).model.train()
    generator = torch.Generator().manual_seed(0)
    side, context = STUDENT["vision_cfg"]["image_size"], STUDENT["text_cfg"]["context_length"]
    images = torch.randn(6, 3, side, side, generator=generator)
    texts = torch.randint(1, STUDENT["text_cfg"]["vocab_size"], (6, context), generator=generator)

    gradients: list[Tensor] = []
    for module in (model, torch.compile(model)):
        model.zero_grad()
        image, text, scale = module(images, texts)[:3]
        (scale * image @ text.T).log_softmax(dim=1).diagonal().mean().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None]))
    return torch.allclose(*gradients, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_student_trains_as_the_plain_one(case: Case, monkeypatch: pytest.MonkeyPatch, backend: str):
    """With the kernels of PyTorch; and with compiled ones, which take a second each to make where none is cached."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    if backend == "inductor" and not inductor_is_right(case):
        pytest.skip("on this processor torch's own compiled kernels give this student other gradients")
    if backend != "inductor":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    found = [case.run(out, steps=2, machine={"compile": out == "compiled"}) for out in ("plain", "compiled")]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)
    plain, compiled = (load_file(exported(case, out) / WEIGHTS) for out in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3)


# The EMA, held-out pairs, what is measured on the way


@pytest.mark.slow
def test_the_ema_is_what_is_exported(case: Case, monkeypatch: pytest.MonkeyPatch):
    kept: dict[str, dict[str, Tensor]] = {}
    student_state = Trainer.student_state

    def watched(self: Trainer) -> Any:
        assert self.learner.ema is not None
        state: Any = self.learner.ema.state_dict()["mean"]
        kept.update(ema={**state}, last=state_of(self.model.student))
        return student_state(self)

    monkeypatch.setattr(Trainer, "student_state", watched)
    case.run(ema_decay=0.9)
    weights = load_file(exported(case) / WEIGHTS)
    assert all(torch.equal(value, weights[name]) for name, value in kept["ema"].items())
    assert not torch.equal(weights["visual.proj"], kept["last"]["visual.proj"])


@pytest.mark.slow
def test_held_out_pairs_are_never_trained_on(case: Case, monkeypatch: pytest.MonkeyPatch):
    trained, measured = set[int](), set[int]()
    train_step = Trainer._train_step

    def step(self: Trainer, batch: Any) -> Any:
        trained.update(batch.rows.tolist())
        assert self.validation is not None
        assert self.validation.batches is not None
        measured.update(self.validation.batches.training.rows.tolist())
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", step)
    summary = case.run(batch_size=4, validation={"share": 0.4, "keep": "best"})
    assert len(measured) >= 2
    assert not trained & measured
    assert len(trained) == summary["pairs"] <= 16 - len(measured)
    lines = [
        json.loads(line) for line in (case.folder.path / "distill.part" / "metrics.jsonl").read_text().splitlines()
    ]
    assert summary["best_retrieval"] == max(line["val/retrieval"] for line in lines if "val/retrieval" in line)
    assert {name for line in lines for name in line if name.startswith("val/loss/")} == {
        f"val/{name}" for name in summary if name.startswith("loss/")
    }


@pytest.mark.slow
def test_zero_shot_on_the_way_is_that_of_the_student_that_is_left(case: Case):
    """By open_clip and numpy alone, on scikit-learn's digits."""
    case.run(steps=4, validation={"sets": {"digits": "builtin:digits"}, "metric": "zero_shot"})
    text = (case.folder.path / "distill.part" / "metrics.jsonl").read_text()
    line = [found for found in map(json.loads, text.splitlines()) if "val/zero_shot" in found][-1]
    model: Any
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported(case)}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported(case)}")
    digits = open_set("digits", "builtin:digits", max_pixels=10_000)
    transform: Any = preprocess
    with torch.no_grad():
        classes = []
        for label in range(10):
            found: Any = model.eval().encode_text(tokenizer(digits.prompts(label)), normalize=True).mean(dim=0)
            classes.append(found / found.norm())
        test = digits.split("test")
        pixels = torch.stack([transform(test.load(row)) for row in range(len(test))])
        images = model.encode_image(pixels, normalize=True)
    predicted = (images @ torch.stack(classes).T).argmax(dim=1).numpy()
    assert line["step"] == 4
    assert line["val/zero_shot/digits"] == pytest.approx(np.mean(predicted == test.labels), abs=2 / len(test))


# What decides the result, and what does not


def stale(case: Case, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether the change would make the distill stage run again."""
    stage = BY_NAME[DISTILL]
    recipes = [case.recipe(**changes) for changes in (before, after)]
    for need in ("embed", "balance", "cluster"):
        publish(case.folder, need)
    keys = [Origins(case.folder, recipe, pipeline.active_stages(recipe)).of(stage).key for recipe in recipes]
    return keys[0] != keys[1]


def publish(folder: RunFolder, stage: str) -> None:
    record = {"stage": stage, "key": "k", "version": 1, "settings": {}, "inputs": {}, "summary": {}, "versions": {}}
    about = {"device": "cpu", "started": "now", "seconds": 1.0, "files": {}}
    (folder.path / stage / "manifest.json").write_text(json.dumps(record | about))


def test_how_a_machine_does_the_work_makes_nothing_stale(case: Case):
    ways: dict[str, Any] = {
        "micro_batch": 2,
        "grad_checkpointing": True,
        "compile": True,
        "checkpoint_minutes": 1.0,
        "keep_checkpoints": 5,
        "tensorboard": "auto",
        "callbacks": ["json:dumps"],
        "workers": 1,
        "threads": 2,
    }
    assert not stale(case, {}, {"machine": ways})
    assert stale(case, {}, {"ema_decay": 0.9})
    assert stale(case, {}, {"augmentation": {"gray_scale_prob": 0.1}})
    assert stale(case, {}, {"validation": {"share": 0.1}})
    assert not stale(case, {}, {"log_every": 3, "skip_limit": 7})
    assert not stale(case, {"steps": 4}, {"steps": 4, "epochs": 9}), "steps rule over epochs"


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["run:{run}", "local-dir:{run}/distill/student", "{run}/distill/student"])
def test_other_weights_to_start_from_make_the_stage_stale(finished: Case, how: str):
    changes = {"pretrained": how.format(run=finished.folder.path)}
    assert other_inputs(finished, changes, lambda: grow(finished.folder.path / "distill" / "student" / WEIGHTS))


def test_another_set_to_measure_on_makes_the_stage_stale(case: Case):
    folder = case.path / "set"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "cat.jpg").write_bytes(b"cat")
    watched = {"sets": {"own": str(folder)}, "metric": "zero_shot"}
    kept = {"validation": {**watched, "keep": "best"}}
    assert other_inputs(case, kept, lambda: grow(folder / "test" / "cat.jpg"))
    assert not other_inputs(case, {"validation": watched}, lambda: grow(folder / "test" / "cat.jpg")), (
        "the last is kept"
    )


def other_inputs(case: Case, changes: dict[str, Any], action: Callable[[], object]) -> bool:
    def inputs() -> dict[str, str]:
        recipe = case.recipe(**changes)
        return Origins(case.folder, recipe, pipeline.active_stages(recipe)).of(BY_NAME[DISTILL]).inputs

    before = inputs()
    assert inputs() == before
    action()
    return inputs() != before


@pytest.mark.slow
def test_as_many_checkpoints_stay_as_are_asked_for(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "student_state", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.run(machine={"keep_checkpoints": 4, "checkpoint_minutes": 1e-9})
    names = sorted(path.name for path in (case.folder.path / "distill.part" / "checkpoints").iterdir())
    assert names == [f"step-{step:06d}.pt" for step in (5, 6, 7, 8)]
    assert CENTERS > 1
