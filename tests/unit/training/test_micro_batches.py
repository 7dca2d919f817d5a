"""The gradient of a batch in micro-batches is that of the batch as a whole, for every loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    BATCH,
    EVERY_PART,
    exact,
    loss_of,
    make_batches,
    make_model,
    make_settings,
    make_trainer,
    training_pairs,
    with_labels,
)

from clip_cid.training.batches import Batch
from clip_cid.training.model import Distillation, Outputs, backward_in_micro_batches


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("micro")
    with_bank = make_settings(**EVERY_PART["those of stored vectors"])
    return exact(next(make_batches(training_pairs(folder), settings=with_bank).between(0, 1)))


def model_of(settings: dict[str, Any], *, patch_dropout: float = 0.0) -> Distillation:
    return make_model(make_settings(**{"head_lr": 0.0, **settings}), patch_dropout=patch_dropout).double()


def gradients(model: Distillation) -> dict[str, torch.Tensor]:
    learned = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.to_dense()
        for name, value in learned.items()
    }


def in_micro_batches(model: Distillation, batch: Batch, size: int | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    backward_in_micro_batches(
        model,
        batch,
        lambda seen: loss_of(model, batch, seen),
        micro_batch=size,
        precision=torch.float32,
        seed=3,
    )
    return gradients(model)


@pytest.mark.parametrize("size", [None, 4, 3, 1])
@pytest.mark.parametrize("name", EVERY_PART)
def test_micro_batches_have_the_gradient_of_the_whole(batch: Batch, name: str, size: int | None):
    """The learned scales included: with k micro-batches another trainer gives them k times their gradient."""
    model, batch = model_of(EVERY_PART[name]), with_labels(batch, make_settings(**EVERY_PART[name]))
    loss_of(model, batch, model(batch.images, batch.texts, precision=torch.float32)).backward()
    expected = gradients(model)
    found = in_micro_batches(model, batch, size)
    assert found.keys() == expected.keys()
    assert "student.logit_scale" in found
    for key, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-12)
        torch.testing.assert_close(
            found[key], gradient, rtol=0, atol=1e-10 * scale, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_what_a_micro_batch_draws_at_random_is_the_same_in_both_passes(batch: Batch):
    """Patches dropped at random: one graph over all micro-batches, each drawn as the two passes draw it, has the same gradient."""
    model = model_of({}, patch_dropout=0.5)
    outputs: list[Outputs] = []
    seeds: list[int] = []
    manual_seed = torch.manual_seed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), manual_seed(seed))[1])
        found = in_micro_batches(model, batch, 4)
    first, second, *again = seeds
    assert again == [first, second]
    assert first != second
    for seed, rows in ((first, slice(0, 4)), (second, slice(4, 8))):
        manual_seed(seed)
        outputs.append(model(batch.images[rows], batch.texts[rows], precision=torch.float32))
    joined = {
        key: torch.cat([seen[key] for seen in outputs]) if value.ndim else value for key, value in outputs[0].items()
    }
    model.zero_grad()
    loss_of(model, batch, joined).backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_training_in_micro_batches_is_the_training(tmp_path: Path):
    settings = make_settings(log_every=1)
    whole = make_trainer(tmp_path, tmp_path / "whole", settings=settings, steps=6, patch_dropout=0.0)
    split = make_trainer(tmp_path, tmp_path / "split", settings=settings, steps=6, patch_dropout=0.0, micro_batch=3)
    for trainer in (whole, split):
        trainer.run()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert split.progress.last_line["loss"] == pytest.approx(whole.progress.last_line["loss"], rel=1e-4)
    assert split.progress.last_line["grad_norm"] == pytest.approx(whole.progress.last_line["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("lock", ["image", "text"])
def test_a_locked_tower_keeps_its_weights_and_its_dropout_off(tmp_path: Path, lock: str):
    settings = make_settings(lock=lock)
    trainer = make_trainer(tmp_path, tmp_path / "out", settings=settings, steps=3)
    before = {name: value.clone() for name, value in trainer.model.student.named_parameters()}
    trainer.run()
    moved = {name for name, value in trainer.model.student.named_parameters() if not torch.equal(value, before[name])}
    free = {name for name in before if name.startswith("visual.") == (lock == "text")} | {"logit_scale"}
    if lock == "image":
        assert moved == {name for name in free if not name.startswith("visual.")}
        assert not trainer.model.student.visual.training
        assert trainer.model.student.transformer.training
    else:
        assert moved == free
        assert trainer.model.student.visual.training
        assert not trainer.model.student.transformer.training


def test_the_batch_divides_as_told(batch: Batch):
    sizes: list[int] = []
    model = model_of({})
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    in_micro_batches(model, batch, 3)
    assert sizes == [3, 3, 2, 3, 3, 2]
    assert sum(sizes) == 2 * BATCH
    sizes.clear()
    in_micro_batches(model, batch, None)
    assert sizes == [BATCH]
