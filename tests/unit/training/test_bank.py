"""Draws of stored embeddings: decided by seed and step alone, and always of the training pairs."""

import numpy as np
import pytest
import torch
from tiny_training import STORED, make_batches, make_settings, training_pairs

from clip_cid.training.bank import Bank, log_perplexities
from clip_cid.training.batches import TrainingPairs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainingPairs:
    return training_pairs(tmp_path_factory.mktemp("bank"))


def bank_of(training: TrainingPairs, size: int, seed: int = 0) -> Bank:
    return Bank(training, make_settings(weights=STORED, bank_size=size, seed=seed), CPU)


def rows_of(drawn: torch.Tensor, stored: np.ndarray) -> list[int]:
    """Which stored row each drawn one is."""
    cosines = drawn.double().numpy() @ stored.astype(np.float64).T
    assert cosines.max(axis=1) == pytest.approx(1, abs=1e-3)
    return cosines.argmax(axis=1).tolist()


def test_it_holds_different_pairs_each_with_one_of_its_captions(training: TrainingPairs):
    drawn = bank_of(training, 13).at(0)
    store = training.store
    assert store is not None
    assert drawn.texts is not None
    rows = rows_of(drawn.images, store.images[np.arange(21)])
    assert len(set(rows)) == 13
    captions = np.concatenate([store.text_for(np.array(rows), number) for number in (0, 1)])
    found = rows_of(drawn.texts, captions)
    assert [row % 13 for row in found] == list(range(13))
    assert {row // 13 for row in found} == {0, 1}


def test_a_draw_serves_some_steps_and_depends_on_seed_and_step_alone(training: TrainingPairs):
    bank = bank_of(training, 13)
    first, same, later = bank.at(0).images, bank.at(49).images, bank.at(50).images
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first, later)
    torch.testing.assert_close(bank_of(training, 13).at(70).images, later, rtol=0, atol=0)  # as after a resume
    assert not torch.equal(bank_of(training, 13, seed=1).at(0).images, first)


def test_a_bank_larger_than_the_pairs_holds_them_all(training: TrainingPairs):
    bank = bank_of(training, 5_000)
    assert len(bank) == 21
    assert training.store is not None
    assert rows_of(bank.at(0).images, training.store.images[np.arange(21)]) == list(range(21))


def test_every_pair_comes_in_time(training: TrainingPairs):
    bank = bank_of(training, 6)
    assert training.store is not None
    stored = training.store.images[np.arange(21)]
    seen = [row for number in range(40) for row in rows_of(bank.at(50 * number).images, stored)]
    counts = np.bincount(seen, minlength=21)
    assert counts.sum() == 240
    assert counts.min() >= 3  # 11.4 on average


def test_only_held_pairs_are_drawn(training: TrainingPairs):
    """Pairs that validation holds out are no part of the bank."""
    some = training.take(np.array([1, 4, 5, 9]))
    assert training.store is not None
    assert rows_of(bank_of(some, 13).at(0).images, training.store.images[np.arange(21)]) == [1, 4, 5, 9]


def test_a_batch_has_the_draw_of_its_step_and_validation_the_first(training: TrainingPairs):
    settings = make_settings(weights=STORED, bank_size=13)
    bank, batches = bank_of(training, 13), make_batches(training, settings=settings)
    for step, batch in zip((49, 50), batches.between(49, 51), strict=True):
        assert batch.bank is not None
        torch.testing.assert_close(batch.bank.images, bank.at(step).images, rtol=0, atol=0)
    for batch in batches.in_order():
        assert batch.bank is not None
        torch.testing.assert_close(batch.bank.images, bank.at(0).images, rtol=0, atol=0)


def test_the_log_says_how_many_rows_the_teacher_finds_likely(training: TrainingPairs, caplog: pytest.LogCaptureFixture):
    settings = make_settings(weights={**STORED, "clip": 1.0}, bank_size=13, bank_scale=1e-6)
    log_perplexities(Bank(training, settings, CPU), training, settings)
    assert "finds 13 of 13 stored texts likely for one image" in caplog.text
    assert "finds 13 of 13 stored images likely for one text" in caplog.text
