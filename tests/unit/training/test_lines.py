"""Texts without images beside the pairs: their order, their part in the losses, and the gradient of it."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import (
    BATCH,
    EVERY_PART,
    exact,
    make_batches,
    make_model,
    make_settings,
    make_trainer,
    tokenize,
    training_pairs,
    with_lines,
)
from torch import Tensor

from clip_cid.loss_table import LOSSES
from clip_cid.method.distill.objective import weighted_sum
from clip_cid.recipe import DistillConfig
from clip_cid.training.batch_order import endless_order
from clip_cid.training.batches import Batch
from clip_cid.training.loop import Trainer
from clip_cid.training.model import Distillation, backward_in_micro_batches
from clip_cid.training.ranks.distributed import Ranks
from clip_cid.training.step import Measured

STORED = EVERY_PART["those of stored vectors"]
TEXT_ALONE = ("cosine_text", "bank_text")


# Order


@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 5))
def test_each_pass_over_the_lines_holds_every_line_once(count: int, per_step: int, seed: int):
    steps = list(itertools.islice(endless_order(count, per_step, seed=seed), 4 * count // per_step + 1))
    assert all(len(rows) == per_step for rows in steps)
    flat = np.concatenate(steps).tolist()
    for epoch in range(len(flat) // count):
        assert sorted(flat[epoch * count :][:count]) == list(range(count))


@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 40))
def test_a_run_that_starts_later_reads_the_same_lines(count: int, per_step: int, first_step: int):
    whole = list(itertools.islice(endless_order(count, per_step, seed=3), first_step + 4))
    later = list(itertools.islice(endless_order(count, per_step, seed=3, first_step=first_step), 4))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(later, whole[first_step:], strict=True))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = {tuple(rows) for seed in (0, 1) for rows in itertools.islice(endless_order(20, 20, seed=seed), 3)}
    assert len(orders) == 6


def test_no_lines_have_no_order():
    with pytest.raises(ValueError, match="must be at least 1, got 0, 4"):
        next(endless_order(0, 4, seed=0))


# Batches


def test_a_batch_has_the_lines_of_its_step_with_the_teachers_embeddings_whatever_the_workers(tmp_path: Path):
    training = with_lines(training_pairs(tmp_path))
    lines = training.lines
    assert lines is not None
    assert lines.embeddings is not None
    batches = list(make_batches(training).between(0, 6))
    read = Counter[int]()
    tokens = tokenize([lines.text(number) for number in range(len(lines))])
    for batch, helped in zip(batches, make_batches(training, workers=2).between(0, 6), strict=True):
        assert batch.lines is not None
        assert batch.teacher_lines is not None
        assert helped.lines is not None
        assert torch.equal(batch.lines, helped.lines)
        for row, vector in zip(batch.lines, batch.teacher_lines, strict=True):
            (number,) = [number for number in range(len(lines)) if torch.equal(tokens[number], row)]
            expected = torch.from_numpy(lines.embeddings[number].astype(np.float32))
            assert torch.allclose(vector, expected, atol=1e-3)
            read[number] += 1
    assert sum(read.values()) == 24
    assert set(read.values()) == {2, 3}  # 11 lines in two whole passes and two more


def test_lines_change_nothing_of_the_pairs(tmp_path: Path):
    training = training_pairs(tmp_path)
    plain = make_batches(training).between(0, 4)
    for batch, beside in zip(plain, make_batches(with_lines(training)).between(0, 4), strict=True):
        for field in dataclasses.fields(Batch):
            ours, theirs = getattr(batch, field.name), getattr(beside, field.name)
            if isinstance(ours, Tensor):
                assert torch.equal(ours, theirs), field.name
        assert batch.lines is None
        assert np.array_equal(batch.rows, beside.rows)


def test_ranks_read_the_lines_of_one_process_between_them(tmp_path: Path):
    training = with_lines(training_pairs(tmp_path))
    alone = make_batches(training).between(0, 4)
    parts = [make_batches(training, ranks=Ranks(rank, 2)).between(0, 4) for rank in range(2)]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert whole.lines is not None
        assert torch.equal(whole.lines, torch.cat([share.lines for share in shares if share.lines is not None]))


# Losses


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    training = with_lines(training_pairs(tmp_path_factory.mktemp("lines")))
    return exact(next(make_batches(training, settings=make_settings(**STORED)).between(0, 1)))


def model_of(**settings: Any) -> Distillation:
    return make_model(make_settings(**{"head_lr": 0.0, **STORED, **settings})).double()


def losses_of(model: Distillation, batch: Batch) -> dict[str, Tensor]:
    seen = model(batch.images, batch.texts, precision=torch.float32, lines=batch.lines)
    return model.objective(seen, batch.targets, generator=torch.Generator().manual_seed(5))


def gradients(model: Distillation) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.to_dense().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def test_the_losses_that_read_a_text_alone_are_these():
    assert tuple(loss.name for loss in LOSSES if loss.learns_from_texts) == TEXT_ALONE


@pytest.mark.parametrize("alignment", ["native", "linear"])
def test_a_text_loss_is_the_mean_over_captions_and_lines_and_no_other_loss_changes(batch: Batch, alignment: str):
    model = model_of(alignment=alignment)
    seen = losses_of(model, batch)
    without = losses_of(model, dataclasses.replace(batch, lines=None, teacher_lines=None))
    assert {name for name in seen if not torch.equal(seen[name], without[name])} == set(TEXT_ALONE)

    # From the model's own embeddings, by hand.
    assert batch.lines is not None
    texts = F.normalize(model.student.encode_text(torch.cat([batch.texts, batch.lines])), dim=1)
    if model.objective.text_map is not None:
        texts = F.normalize(texts @ model.objective.text_map.weight.T, dim=1)
    assert batch.teacher_text is not None
    assert batch.teacher_lines is not None
    teacher = F.normalize(torch.cat([batch.teacher_text, batch.teacher_lines]), dim=1)
    cosine = sum(1 - texts[row] @ teacher[row] for row in range(BATCH + 4)) / (BATCH + 4)
    torch.testing.assert_close(seen["cosine_text"], cosine, rtol=1e-9, atol=0)

    assert batch.bank is not None
    bank = F.normalize(batch.bank.images.double(), dim=1)
    scale = model.objective.bank_scale
    p, q = ((scale * rows @ bank.T).softmax(dim=1) for rows in (teacher, texts))
    divergence = (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(seen["bank_text"], divergence, rtol=1e-7, atol=0)


@pytest.mark.parametrize("copies", [1, 2])
def test_lines_that_are_the_captions_weigh_as_these_captions_again(batch: Batch, copies: int):
    """The batch's own captions as lines leave the mean and its gradient as they are; twice as well."""
    model = model_of()
    assert batch.teacher_text is not None
    again = dataclasses.replace(
        batch, lines=batch.texts.repeat(copies, 1), teacher_lines=batch.teacher_text.repeat(copies, 1)
    )
    plain = dataclasses.replace(batch, lines=None, teacher_lines=None)
    found: list[dict[str, Tensor]] = []
    for one in (plain, again):
        model.zero_grad()
        losses = losses_of(model, one)
        weighted_sum({name: losses[name] for name in TEXT_ALONE}, dict.fromkeys(TEXT_ALONE, 2.0)).backward()
        found.append({**gradients(model), **{name: losses[name].detach() for name in TEXT_ALONE}})
    assert any(value.any() for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", [None, 4, 3, 1])
@pytest.mark.parametrize("alignment", ["native", "linear"])
def test_micro_batches_have_the_gradient_of_the_whole_with_lines(batch: Batch, alignment: str, size: int | None):
    """Also where a micro-batch has no line: 8 of them share 4."""
    model, weights = model_of(alignment=alignment), make_settings(**STORED).weights.model_dump()
    weighted_sum(losses_of(model, batch), weights).backward()
    expected = gradients(model)

    def loss_of(seen: dict[str, Tensor]) -> Tensor:
        losses = model.objective(seen, batch.targets, generator=torch.Generator().manual_seed(5))
        return weighted_sum(losses, weights)

    model.zero_grad()
    backward_in_micro_batches(model, batch, loss_of, micro_batch=size, precision=torch.float32, seed=3)
    for name, gradient in gradients(model).items():
        scale = max(float(expected[name].abs().max()), 1e-12)
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=1e-10 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


# Training


def settings_with_texts() -> DistillConfig:
    return make_settings(log_every=1, **STORED)


@pytest.mark.resume
def test_a_training_with_lines_resumes_exactly_and_counts_them(tmp_path: Path):
    training = with_lines(training_pairs(tmp_path), per_step=5)

    class Killed(BaseException):
        pass

    def make(out: str, **more: Any) -> Trainer:
        torch.manual_seed(0)  # for the maps of `alignment: linear`
        return make_trainer(
            tmp_path, tmp_path / out, settings=settings_with_texts(), steps=6, training=training, **more
        )

    straight, killed = make("straight"), make("killed", minutes=1e-9)
    summary = straight.run()
    train_step = killed._train_step

    def stop_at_four(batch: Batch) -> Measured:
        if killed.step == 4:
            raise Killed
        return train_step(batch)

    killed._train_step = stop_at_four
    with pytest.raises(Killed):
        killed.run()
    resumed = make("killed")
    assert resumed.run()["texts_seen"] == summary["texts_seen"] == 30
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["texts_seen"] for line in lines] == [5, 10, 15, 20, 25, 30]


def test_a_training_without_lines_says_nothing_of_them(tmp_path: Path):
    trainer = make_trainer(tmp_path, tmp_path / "out", settings=settings_with_texts(), steps=3)
    assert "texts_seen" not in trainer.run()
    assert "texts_seen" not in trainer.progress.last_line
