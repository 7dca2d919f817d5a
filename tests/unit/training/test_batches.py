import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import AugmentationCfg, image_transform
from tiny_training import BATCH, make_batches, make_dataset, make_pairs, make_settings, tokenize, training_pairs

from clip_cid.data.pairs.pairs import Shard
from clip_cid.errors import ConfigError, DataError
from clip_cid.training import batch_order
from clip_cid.training.batch_order import ClusterTurns, Place, Windows, batch_places, epoch_orders
from clip_cid.training.batches import Batch, Item, PairDataset, TrainingPairs
from clip_cid.training.ranks.distributed import Ranks

sizes = st.integers(1, 12).flatmap(lambda batch: st.tuples(st.integers(batch, 60), st.just(batch)))


def first_batches(num_rows: int, batch_size: int, count: int, *, seed: int, first_step: int = 0) -> list[list[Place]]:
    places = batch_places(num_rows, batch_size, seed=seed, first_step=first_step)
    return list(itertools.islice(places, count))


@given(sizes, st.integers(0, 5))
def test_each_epoch_holds_every_row_once_and_no_batch_a_row_twice(size: tuple[int, int], seed: int):
    num_rows, batch_size = size
    batches = first_batches(num_rows, batch_size, 5 * num_rows // batch_size + 1, seed=seed)
    assert all(len({place.index for place in batch}) == batch_size for batch in batches)
    flat = [place for batch in batches for place in batch]
    for epoch in range(5):
        assert sorted(place.index for place in flat if place.epoch == epoch) == list(range(num_rows))
    assert [place.epoch for place in flat] == sorted(place.epoch for place in flat)


@given(sizes, st.integers(0, 40))
def test_a_run_that_starts_later_sees_the_same_batches(size: tuple[int, int], first_step: int):
    whole = first_batches(*size, first_step + 6, seed=3)
    assert first_batches(*size, 6, seed=3, first_step=first_step) == whole[first_step:]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(order) for seed in (0, 1) for _, order in itertools.islice(epoch_orders(30, 7, seed=seed), 3)}
    assert len(orders) == 6


def test_a_batch_larger_than_an_epoch_is_refused():
    with pytest.raises(ValueError, match=r"batch_size: must be in \[1, 7\] \(the rows\), got 8"):
        next(batch_places(7, 8, seed=0))


# Clusters that give few pairs to an epoch

labels_of_rows = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(np.array)


@given(labels_of_rows, st.integers(1, 12), st.integers(0, 3))
def test_the_pairs_of_a_cluster_take_turns(labels: np.ndarray, per_cluster: int, seed: int):
    turns = ClusterTurns(labels, per_cluster=per_cluster, seed=seed)
    seen = np.zeros(len(labels), dtype=int)
    for epoch in range(2 * len(labels)):
        rows = turns.rows_of(epoch)
        assert len(rows) == turns.epoch_size == len(set(rows.tolist()))
        assert rows.tolist() == sorted(rows.tolist())
        seen[rows] += 1
        for cluster in set(labels.tolist()):
            members = np.flatnonzero(labels == cluster)
            quota = min(len(members), per_cluster)
            assert np.isin(rows, members).sum() == quota
            # Of (epoch + 1) quota turns every member had its share, rounded down or up.
            share, more = divmod((epoch + 1) * quota, len(members))
            assert sorted(seen[members]) == [share] * (len(members) - more) + [share + 1] * more


@given(labels_of_rows, st.integers(1, 12), st.integers(0, 30), st.integers(0, 5))
def test_turns_are_cut_into_batches_as_whole_epochs_are(
    labels: np.ndarray, per_cluster: int, first_step: int, seed: int
):
    turns = ClusterTurns(labels, per_cluster=per_cluster, seed=seed)
    size, batch_size = turns.epoch_size, min(7, turns.epoch_size)

    def first(count: int, first_step: int = 0) -> list[list[Place]]:
        places = batch_places(size, batch_size, seed=seed, first_step=first_step, rows_of=turns.rows_of)
        return list(itertools.islice(places, count))

    batches = first(first_step + 6)
    assert first(6, first_step) == batches[first_step:]
    assert all(len({place.index for place in batch}) == batch_size for batch in batches)
    flat = [place for batch in batches for place in batch]
    for epoch in range(flat[-1].epoch):
        assert sorted(place.index for place in flat if place.epoch == epoch) == turns.rows_of(epoch).tolist()


@given(labels_of_rows, st.integers(0, 5))
def test_as_many_as_the_largest_cluster_has_are_all(labels: np.ndarray, seed: int):
    turns = ClusterTurns(labels, per_cluster=int(np.bincount(labels).max()), seed=seed)
    batch_size = max(1, len(labels) // 3)
    capped = batch_places(turns.epoch_size, batch_size, seed=seed, rows_of=turns.rows_of)
    assert list(itertools.islice(capped, 9)) == first_batches(len(labels), batch_size, 9, seed=seed)


def test_which_pair_of_a_cluster_comes_first_is_the_seeds_and_no_pair_is_preferred():
    labels = np.array([0] * 5 + [1])
    firsts = [ClusterTurns(labels, per_cluster=1, seed=seed).rows_of(0).tolist() for seed in range(1000)]
    counts = np.bincount([row for row, _ in firsts], minlength=5)
    assert counts.sum() == 1000
    assert np.abs(counts - 200).max() < 5 * (1000 * 0.2 * 0.8) ** 0.5  # five standard errors
    assert all(other == 5 for _, other in firsts)


def test_the_places_of_turns_do_not_depend_on_how_many_are_computed_at_once(monkeypatch: pytest.MonkeyPatch):
    turns = ClusterTurns(np.random.default_rng(0).integers(0, 9, 200), per_cluster=13, seed=1)
    expected = [turns.rows_of(epoch).tolist() for epoch in range(4)]
    monkeypatch.setattr(batch_order, "_AT_ONCE", 7)
    assert [turns.rows_of(epoch).tolist() for epoch in range(4)] == expected


def test_ranks_read_together_what_one_process_reads_of_clusters_that_give_few(tmp_path: Path):
    training = training_pairs(tmp_path)
    assert training.labels is not None
    settings = make_settings(per_cluster=1)
    alone = make_batches(training, settings=settings)
    assert alone.epoch_size == len(set(training.labels.tolist()))
    parts = [list(make_batches(training, settings=settings, ranks=Ranks(rank, 2)).between(2, 7)) for rank in range(2)]
    for whole, *halves in zip(alone.between(2, 7), *parts, strict=True):
        assert np.concatenate([half.rows for half in halves]).tolist() == whole.rows.tolist()
    epochs = np.concatenate([batch.rows for batch in alone.between(0, alone.epoch_size)])
    for rows in epochs.reshape(-1, alone.epoch_size):
        assert len(set(training.labels[rows].tolist())) == alone.epoch_size


# Shards in a random order, and rows shuffled within windows


@st.composite
def windows_of_shards(draw: st.DrawFn) -> tuple[Windows, int]:
    """Windows over some shards, of which one may be empty, and a batch size."""
    shards = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
    rows = sum(shards)
    batch_size = draw(st.integers(1, min(rows, 12)))
    return Windows(np.cumsum([0, *shards]), draw(st.integers(1, rows + 3))), batch_size


@given(windows_of_shards(), st.integers(0, 5), st.integers(0, 30))
def test_in_windows_an_epoch_holds_every_row_once_and_a_run_can_start_anywhere(
    case: tuple[Windows, int], seed: int, first_step: int
):
    windows, batch_size = case
    num_rows = int(windows.edges[-1])

    def first(count: int, first_step: int = 0) -> list[list[Place]]:
        places = batch_places(num_rows, batch_size, seed=seed, first_step=first_step, windows=windows)
        return list(itertools.islice(places, count))

    batches = first(first_step + 5 * num_rows // batch_size + 1)
    assert first(6, first_step) == batches[first_step:][:6]
    assert all(len({place.index for place in batch}) == batch_size for batch in batches)
    flat = [place for batch in batches for place in batch]
    for epoch in range(5):
        assert sorted(place.index for place in flat if place.epoch == epoch) == list(range(num_rows))


@given(windows_of_shards(), st.integers(0, 5))
def test_a_window_holds_the_rows_of_whole_shards_but_its_first_and_last(case: tuple[Windows, int], seed: int):
    windows, _ = case
    num_rows = int(windows.edges[-1])
    _, order = next(epoch_orders(num_rows, 1, seed=seed, windows=windows))
    shard_of = np.searchsorted(windows.edges, order, side="right") - 1
    there = [set(shard_of[start : start + windows.rows].tolist()) for start in range(0, num_rows, windows.rows)]
    for shard in set(shard_of.tolist()):
        # A shard is read in one run of windows, and only at the ends of this run with others.
        holding = [number for number, shards in enumerate(there) if shard in shards]
        assert holding == list(range(holding[0], holding[-1] + 1))
        assert all(there[number] == {shard} for number in holding[1:-1])


def test_a_batch_reads_few_shards_from_front_to_back():
    windows = Windows(np.arange(0, 1001, 10), 40)
    places = batch_places(1000, 20, seed=0, windows=windows)
    for batch in itertools.islice(places, 49):
        rows = [place.index for place in batch]
        assert rows == sorted(rows)
        assert len({row // 10 for row in rows}) <= 4
    by_rows = batch_places(1000, 20, seed=0)
    assert np.mean([len({place.index // 10 for place in batch}) for batch in itertools.islice(by_rows, 49)]) > 15


def test_orders_in_windows_are_the_seeds_and_the_epochs_own():
    windows = Windows(np.arange(0, 31, 5), 10)
    orders = {
        tuple(order)
        for seed in (0, 1)
        for _, order in itertools.islice(epoch_orders(30, 7, seed=seed, windows=windows), 3)
    }
    assert len(orders) == 6


@given(labels_of_rows, st.integers(1, 12), st.integers(1, 20))
def test_turns_of_clusters_are_read_in_windows(labels: np.ndarray, per_cluster: int, window: int):
    turns = ClusterTurns(labels, per_cluster=per_cluster, seed=0)
    windows = Windows(np.unique([0, len(labels) // 2, len(labels)]), window)
    places = batch_places(turns.epoch_size, 1, seed=0, rows_of=turns.rows_of, windows=windows)
    flat = [place for batch in itertools.islice(places, 3 * turns.epoch_size) for place in batch]
    for epoch in range(3):
        assert sorted(place.index for place in flat if place.epoch == epoch) == turns.rows_of(epoch).tolist()


def test_ranks_and_workers_read_together_what_one_process_reads_in_windows(tmp_path: Path):
    training = training_pairs(tmp_path)
    training.pairs.shards = tuple(Shard(f"{first}", first, 3, 0) for first in range(0, 21, 3))
    settings = make_settings(shuffle_window=9)
    alone = list(make_batches(training, settings=settings).between(0, 7))
    helped = list(make_batches(training, settings=settings, workers=2).between(0, 7))
    for ours, theirs in zip(alone, helped, strict=True):
        assert_equal(ours, theirs)
    parts = [list(make_batches(training, settings=settings, ranks=Ranks(rank, 2)).between(2, 7)) for rank in range(2)]
    for whole, *halves in zip(alone[2:], *parts, strict=True):
        assert np.concatenate([half.rows for half in halves]).tolist() == whole.rows.tolist()
        assert whole.rows.tolist() == sorted(whole.rows.tolist())


def test_a_window_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="shuffle_window: 7 pairs are shuffled together, fewer than a batch of 8"):
        make_settings(shuffle_window=7, batch_size=8)


def test_a_window_smaller_than_a_batch_that_was_chosen_later_is_refused(tmp_path: Path):
    settings = make_settings(shuffle_window=BATCH - 1, batch_size="auto")
    with pytest.raises(ConfigError, match="7 pairs are shuffled together, fewer than a batch of 8 holds") as error:
        make_batches(training_pairs(tmp_path), settings=settings)
    assert "twenty batches, 160" in error.value.fix


def assert_equal(ours: Batch, theirs: Batch) -> None:
    for field in dataclasses.fields(Batch):
        left, right = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert np.array_equal(left, right), field.name


def test_workers_and_the_state_of_torch_change_no_batch(tmp_path: Path):
    training = training_pairs(tmp_path)
    alone = list(make_batches(training).between(0, 6))
    torch.manual_seed(12345)
    helped = list(make_batches(training, workers=2).between(0, 6))
    assert len(alone) == len(helped) == 6
    for ours, theirs in zip(alone, helped, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Unused augmentation")
def test_colors_are_drawn_by_the_seed_alone(tmp_path: Path):
    """open_clip draws whether to change them from Python's random numbers, and how from torch's."""
    color: Any = (0.4,) * 4
    aug_cfg = AugmentationCfg(scale=(0.9, 1.0), color_jitter=color, color_jitter_prob=0.5, gray_scale_prob=0.5)
    transform: Any = image_transform(16, is_train=True, aug_cfg=aug_cfg)
    dataset: Any = PairDataset(
        training_pairs(tmp_path), transform=transform, tokenizer=tokenize, max_pixels=10_000, seed=0
    )
    places = [Place(epoch, index) for epoch in range(2) for index in range(10)]
    random.seed(1)
    images = [dataset[place].image for place in places]
    random.seed(2)
    assert all(torch.equal(dataset[place].image, image) for place, image in zip(places, images, strict=True))


def test_a_batch_joins_what_the_teacher_and_the_clusters_say_of_its_rows(tmp_path: Path):
    training = training_pairs(tmp_path)
    store = training.store
    assert store is not None
    chosen: set[int] = set()
    for batch in make_batches(training).between(0, 6):
        images = store.images[batch.rows].astype(np.float32)
        assert batch.teacher_image is not None
        assert batch.teacher_text is not None
        assert torch.allclose(batch.teacher_image, torch.from_numpy(images), atol=1e-3)
        assert torch.allclose(batch.teacher_image.norm(dim=1), torch.ones(BATCH))
        assert training.labels is not None
        assert batch.labels is not None
        assert batch.labels.tolist() == training.labels[batch.rows].tolist()
        for place, row in enumerate(batch.rows):  # the text the student reads is the one the teacher has read
            captions = training.pairs.read(int(row)).captions
            (caption,) = [at for at in (0, 1) if torch.equal(tokenize([captions[at]])[0], batch.texts[place])]
            text = torch.from_numpy(store.text_for(np.array([row]), caption).astype(np.float32))[0]
            assert torch.allclose(batch.teacher_text[place], text, atol=1e-3)
            chosen.add(caption)
    assert chosen == {0, 1}


def test_a_pair_is_cropped_and_captioned_anew_in_each_epoch_and_always_alike_in_one(tmp_path: Path):
    dataset = make_dataset(training_pairs(tmp_path))
    items = [dataset[Place(epoch, 5)] for epoch in (0, 0, 1)]
    images = [item.image for item in items if isinstance(item, Item)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    captions = {item.caption for epoch in range(20) if isinstance(item := dataset[Place(epoch, 5)], Item)}
    assert captions == {0, 1}


def test_drawing_a_pair_leaves_the_state_of_torch_alone(tmp_path: Path):
    dataset = make_dataset(training_pairs(tmp_path))
    before = torch.get_rng_state()
    assert isinstance(dataset[Place(0, 0)], Item)
    assert torch.equal(torch.get_rng_state(), before)


def test_captions_the_teacher_has_not_read_are_not_chosen(tmp_path: Path):
    training = training_pairs(tmp_path)
    limited = dataclasses.replace(training, num_captions=np.ones(len(training), dtype=np.int64))
    dataset = make_dataset(limited)
    assert {item.caption for epoch in range(20) if isinstance(item := dataset[Place(epoch, 5)], Item)} == {0}


def break_images(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / "pairs" / f"{number:03d}.png").write_bytes(b"not a picture")


def test_the_next_readable_pair_stands_in_for_a_broken_one_with_its_own_teacher_vectors(tmp_path: Path):
    training = training_pairs(tmp_path)
    break_images(tmp_path, 19, 20)
    item = make_dataset(training)[Place(2, 19)]
    assert isinstance(item, Item)
    assert item.index == 0  # behind the last pair comes the first
    assert [row for row, _ in item.bad] == [19, 20]
    assert all("image" in reason for _, reason in item.bad)
    stand_in = make_dataset(training)[Place(2, 0)]
    assert isinstance(stand_in, Item)
    assert torch.equal(item.image, stand_in.image)
    for batch in make_batches(training).between(0, 3):
        assert not {19, 20} & set(batch.rows.tolist())
        assert training.store is not None
        expected = torch.from_numpy(training.store.images[batch.rows].astype(np.float32))
        assert batch.teacher_image is not None
        assert torch.allclose(batch.teacher_image, expected, atol=1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_disk_ends_the_run_with_words_even_from_a_worker(tmp_path: Path, workers: int):
    training = training_pairs(tmp_path)
    break_images(tmp_path, *range(21))
    with pytest.raises(DataError, match="21 pairs in succession cannot be read"):
        make_dataset(training)[Place(0, 0)]
    with pytest.raises(DataError, match="21 pairs in succession cannot be read"):
        next(make_batches(training, workers=workers).between(0, 1))


def test_plain_pairs_need_no_teacher(tmp_path: Path):
    training = TrainingPairs(make_pairs(tmp_path / "pairs"), np.arange(3, 19))
    batch = next(make_batches(training).between(0, 1))
    assert set(batch.rows.tolist()) <= set(range(3, 19))
    assert (batch.labels, batch.teacher_image, batch.teacher_text) == (None, None, None)


def test_a_teacher_vector_of_another_length_is_named(tmp_path: Path):
    training = training_pairs(tmp_path)
    path = tmp_path / "store" / "img_emb" / "img_emb_0000.npy"
    vectors = np.load(path)
    vectors[7] = 0
    np.save(path, vectors)
    with pytest.raises(DataError, match="image embedding of row 7 has length 0, not 1"):
        list(make_batches(training).between(0, 3))
