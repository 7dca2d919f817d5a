"""Images without a caption in a training: they take part in the losses of images, and in no other."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_training import (
    BATCH,
    CENTERS,
    DIM,
    STORED,
    exact,
    make_batches,
    make_model,
    make_pairs,
    make_settings,
    make_trainer,
    make_validation,
    training_pairs,
    unit_rows,
    with_lines,
)
from torch import Tensor

from clip_cid.data.embeddings.files import STORE_FILE
from clip_cid.data.embeddings.ok_rows import OkRows
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.joining import join_teachers
from clip_cid.loss_table import LOSSES
from clip_cid.method.distill.objective import weighted_sum
from clip_cid.method.unit_rows import UnitRows
from clip_cid.recipe import PairsConfig
from clip_cid.training.bank import Bank
from clip_cid.training.batches import Batch, TrainingPairs
from clip_cid.training.model import Distillation, backward_in_micro_batches
from clip_cid.training.validation import HeldOut

ALONE = (0, 3, 4, 9, 20)
"""Rows without a caption."""
EVERY = {"siglip": 1.0, "affinity": 1.0, "feature": 20.0, "icl": 1.0, **STORED}
OF_IMAGES = {"cluster_cls", "cluster_kl", "cosine_image", "bank_image"}


def sparse_pairs(folder: Path, alone: tuple[int, ...] = ALONE) -> TrainingPairs:
    """The usual pairs, some without a caption, with their store."""
    make_pairs(folder / "pairs")
    for row in alone:
        (folder / "pairs" / f"{row:03d}.txt").unlink()
    pairs = open_pairs(PairsConfig(source=(str(folder / "pairs"),), captions="optional"))
    count = len(pairs)
    captioned = ~np.isin(np.arange(count), alone)
    writer = StoreWriter(folder / "store", teacher={"reference": "noise"}, dim=DIM, fields=(), num_shards=1)
    writer.add(
        ShardRows(
            name="all",
            images=unit_rows(count, seed=1),
            texts=unit_rows(count, seed=2) * captioned[:, None],
            more_texts=unit_rows(count, seed=3)[captioned],
            ok=np.ones(count, dtype=bool),
            keys=pairs.keys(0, count),
            captions=[pairs.read(row).captions for row in range(count)],
            sizes=[(24, 20)] * count,
            fields={},
            skipped=[],
        )
    )
    writer.finish()
    store = EmbeddingStore.open(folder / "store")
    labels = np.random.default_rng(4).integers(0, CENTERS, count)
    rows = np.arange(count)
    return TrainingPairs(pairs, rows, labels, store, rows, store.num_captions)


# The store


def test_a_store_knows_which_rows_have_no_caption(tmp_path: Path):
    store = sparse_pairs(tmp_path).store
    assert store is not None
    store.check_values()
    assert np.flatnonzero(store.num_captions == 0).tolist() == list(ALONE)
    assert set(store.num_captions[store.num_captions > 0]) == {2}
    assert store.captions(3) == ()
    assert store.captions(1) == ("01 in one way", "no 01, otherwise")
    second = store.text_for(np.array([1, 21 - 2]), 1)
    rows = unit_rows(21, seed=3)
    assert np.allclose(second, rows[[1, 19]], atol=1e-3)


def test_a_store_whose_rows_all_have_a_caption_is_written_as_before(tmp_path: Path):
    training_pairs(tmp_path)
    assert "without_text" not in (tmp_path / "store" / STORE_FILE).read_text()


def test_joined_stores_know_it_too(tmp_path: Path):
    for name in ("a", "b"):
        sparse_pairs(tmp_path / name)
    joined = join_teachers([tmp_path / name / "store" for name in ("a", "b")], tmp_path / "joined")
    joined.check_values()
    assert np.flatnonzero(joined.num_captions == 0).tolist() == list(ALONE)
    assert not joined.texts[np.array(ALONE)].any()


def test_of_equal_images_one_with_a_caption_is_kept(tmp_path: Path):
    store = sparse_pairs(tmp_path).store
    assert store is not None
    stored = OkRows.of(store)
    assert stored.texts is not None
    texts = UnitRows(stored.texts, name="texts", any_length=False)
    images = UnitRows(store.images, name="images", any_length=False)
    rows = np.array([3, 4, 5])
    cosines = (images[rows] * texts[rows]).sum(axis=1)
    assert np.allclose(cosines[:2], -1)
    assert cosines[2] > -0.99
    assert np.array_equal(stored.texts[2:5], stored.texts[np.array([2, 3, 4])])
    some = OkRows.of(store, np.array([1, 3, 4, 5]))
    assert some.texts is not None
    assert np.array_equal(some.texts[1:], stored.texts[rows])


# Batches


def test_a_batch_says_which_images_have_a_caption_and_gives_the_others_no_teacher_text(tmp_path: Path):
    training = sparse_pairs(tmp_path)
    seen = set[int]()
    for batch in make_batches(training).between(0, 5):
        assert batch.captioned is not None
        assert batch.teacher_text is not None
        assert batch.teacher_image is not None
        assert batch.captioned.tolist() == [int(row) not in ALONE for row in batch.rows]
        assert torch.equal(batch.teacher_text.norm(dim=1) > 0.5, batch.captioned)
        assert not batch.teacher_text[~batch.captioned].any()
        seen |= set(batch.rows.tolist())
    assert seen == set(range(21))


def test_where_captions_are_required_a_batch_has_no_mask(tmp_path: Path):
    assert next(make_batches(training_pairs(tmp_path)).between(0, 1)).captioned is None


def test_the_bank_holds_texts_of_images_that_have_one(tmp_path: Path):
    training = sparse_pairs(tmp_path)
    for size, texts in ((13, 13), (21, 16)):
        bank = Bank(training, make_settings(weights=STORED, bank_size=size), torch.device("cpu")).at(0)
        assert bank.texts is not None
        assert (len(bank.images), len(bank.texts)) == (size, texts)
        assert torch.allclose(bank.texts.norm(dim=1), torch.ones(texts))


# Losses


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    settings = make_settings(weights=EVERY, bank_size=13)
    training = with_lines(training_pairs(tmp_path_factory.mktemp("captions")))
    found = exact(next(make_batches(training, settings=settings).between(0, 1)))
    return dataclasses.replace(found, text_labels=None)  # clusters of texts need a caption for every image


def masked(batch: Batch, *alone: int) -> Batch:
    """What is there of a text that is absent must not count."""
    captioned = torch.tensor([row not in alone for row in range(BATCH)])
    texts = torch.where(captioned[:, None], batch.texts, 1)
    assert batch.teacher_text is not None
    teacher = torch.where(captioned[:, None], batch.teacher_text, 0.0)
    return dataclasses.replace(batch, captioned=captioned, texts=texts, teacher_text=teacher)


def of_rows(batch: Batch, rows: Tensor) -> Batch:
    names = ("images", "texts", "teacher_image", "teacher_text", "labels")
    chosen = {name: getattr(batch, name)[rows] for name in names}
    return dataclasses.replace(batch, rows=batch.rows[rows.numpy()], **chosen)


def model_of(**settings: Any) -> Distillation:
    torch.manual_seed(0)
    return make_model(make_settings(**{"head_lr": 0.0, "weights": EVERY, **settings})).double()


def losses_of(model: Distillation, batch: Batch) -> dict[str, Tensor]:
    seen = model(batch.images, batch.texts, precision=torch.float32, lines=batch.lines)
    return model.objective(seen, batch.targets, generator=torch.Generator().manual_seed(5))


def gradients(model: Distillation, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-9)
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-9 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_losses_that_need_no_caption_are_these():
    assert {loss.name for loss in LOSSES if not loss.reads_captions} == {*OF_IMAGES, "cross_cluster_image"}


@pytest.mark.parametrize("alignment", ["native", "linear"])
@pytest.mark.parametrize("alone", [(1,), (0, 3, 4), (0, 1, 2, 3, 5, 7), (0, 1, 2, 3, 4, 5, 6)], ids=str)
def test_a_loss_of_texts_is_that_of_the_captioned_rows_and_one_of_images_that_of_all(
    batch: Batch, alignment: str, alone: tuple[int, ...]
):
    model = model_of(alignment=alignment)
    plain = dataclasses.replace(batch, lines=None, teacher_lines=None)
    one = masked(plain, *alone)
    assert one.captioned is not None
    found, whole = losses_of(model, one), losses_of(model, plain)
    remaining = losses_of(model, of_rows(plain, one.captioned.nonzero().flatten()))
    for name, value in found.items():
        expected = whole[name] if name in OF_IMAGES else remaining[name]
        torch.testing.assert_close(
            value, expected, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )

    texts = [name for name in found if name not in OF_IMAGES]
    weights = dict.fromkeys(texts, 1.0)
    ours = gradients(model, weighted_sum({name: losses_of(model, one)[name] for name in texts}, weights))
    rows = of_rows(plain, one.captioned.nonzero().flatten())
    theirs = gradients(model, weighted_sum({name: losses_of(model, rows)[name] for name in texts}, weights))
    assert_same(ours, theirs)


def test_the_contrastive_loss_by_hand(batch: Batch):
    model, one = model_of(), masked(dataclasses.replace(batch, lines=None, teacher_lines=None), 0, 3, 4)
    rows = [1, 2, 5, 6, 7]
    image = F.normalize(model.student.encode_image(one.images), dim=1)[rows]
    text = F.normalize(model.student.encode_text(one.texts), dim=1)[rows]
    logits = model.student.logit_scale.exp() * image @ text.T
    expected = -(logits.log_softmax(dim=1).diag() + logits.log_softmax(dim=0).diag()).mean() / 2
    torch.testing.assert_close(losses_of(model, one)["clip"], expected, rtol=1e-9, atol=0)


def test_texts_without_images_join_the_captions_that_are_there(batch: Batch):
    model, one = model_of(), masked(batch, 0, 3, 4)
    assert one.captioned is not None
    rows = of_rows(batch, one.captioned.nonzero().flatten())
    for name in ("cosine_text", "bank_text"):
        torch.testing.assert_close(losses_of(model, one)[name], losses_of(model, rows)[name], rtol=1e-10, atol=1e-12)


def test_without_any_caption_the_losses_of_texts_are_zero_and_those_of_images_as_ever(batch: Batch):
    model, plain = model_of(), dataclasses.replace(batch, lines=None, teacher_lines=None)
    found, whole = losses_of(model, masked(plain, *range(BATCH))), losses_of(model, plain)
    for name, value in found.items():
        if name in OF_IMAGES:
            torch.testing.assert_close(value, whole[name])
        else:
            assert value == 0
    weights = dict.fromkeys(found, 1.0)
    found = gradients(model, weighted_sum(losses_of(model, masked(plain, *range(BATCH))), weights))
    expected = gradients(
        model,
        weighted_sum({name: value for name, value in losses_of(model, plain).items() if name in OF_IMAGES}, weights),
    )
    assert_same(found, expected)


@pytest.mark.parametrize("size", [4, 3, 1])
def test_micro_batches_have_the_gradient_of_the_whole(batch: Batch, size: int):
    model, one = model_of(alignment="linear"), masked(batch, 0, 1, 2, 6)
    weights = make_settings(weights=EVERY).weights.model_dump()
    expected = gradients(model, weighted_sum(losses_of(model, one), weights))

    def loss_of(seen: dict[str, Tensor]) -> Tensor:
        return weighted_sum(model.objective(seen, one.targets, generator=torch.Generator().manual_seed(5)), weights)

    model.zero_grad()
    backward_in_micro_batches(model, one, loss_of, micro_batch=size, precision=torch.float32, seed=3)
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert_same(found, expected)


# Training


def test_images_without_a_single_caption_teach_the_image_tower(tmp_path: Path):
    training = sparse_pairs(tmp_path, tuple(range(21)))
    weights = dict.fromkeys(make_settings().weights.model_dump(), 0.0) | {"cluster_cls": 1.0, "cosine_image": 1.0}
    settings = make_settings(weights=weights, log_every=1)
    training = dataclasses.replace(training, num_captions=None)
    trainer = make_trainer(tmp_path, tmp_path / "out", settings=settings, steps=12, training=training)
    before = {name: value.clone() for name, value in trainer.model.student.visual.named_parameters()}
    trainer.run()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.student.visual.named_parameters())
    assert trainer.progress.last_line["captioned"] == 0
    assert trainer.progress.last_line["loss/cosine_image"] < 1


def test_retrieval_is_measured_on_the_pairs_with_a_caption(tmp_path: Path):
    training = sparse_pairs(tmp_path)
    settings = make_settings(weights={"cosine_text": 1.0})
    model = make_model(settings)
    numbers = {}
    for name, held_out in (("some", training.take(np.arange(8))), ("those", training.take(np.array([1, 2, 5, 6, 7])))):
        validation = make_validation(HeldOut(held_out, len(held_out)), settings)
        numbers[name] = validation.measure(model, model, precision=torch.float32, note_bad=lambda bad: None)
    recalls = [name for name in numbers["some"] if name.startswith("val/retrieval")]
    assert recalls
    for name in [*recalls, "val/loss/clip", "val/loss/cosine_text"]:
        assert numbers["some"][name] == pytest.approx(numbers["those"][name], rel=1e-5), name
