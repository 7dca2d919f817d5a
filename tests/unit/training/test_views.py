"""With embedded views the student sees exactly a crop that the teacher has seen, and its target is that crop's."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from tiny_training import BATCH, CENTERS, DIM, make_pairs, tokenize, unit_rows
from torch import Tensor
from torchvision.transforms import functional as F

from clip_cid.data.embeddings.rows_of_pairs import join
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.crops import Views, crop_box
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError
from clip_cid.models.clip import Clip, train_transform
from clip_cid.training.batch_order import Place
from clip_cid.training.batches import Batch, Batches, Item, PairDataset, TrainingPairs, view_number
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.training.validation import hold_out

VIEWS = Views(3, 0.3)
CFG: dict[str, Any] = {
    "size": 16,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def teacher(picture: Image.Image) -> np.ndarray:
    """A teacher whose embedding tells every crop from every other: a fixed map of its pixels."""
    pixels = np.asarray(picture.resize((8, 8)), dtype=np.float64).ravel() - 128
    vector = np.random.default_rng(7).normal(size=(DIM, len(pixels))) @ pixels
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def picture_of(pairs: Pairs, row: int) -> Image.Image:
    with Image.open(io.BytesIO(pairs.read(row).image)) as image:
        return image.convert("RGB")


def make_store(
    folder: Path, pairs: Pairs, views: Views | None, shards: Sequence[Sequence[int]], look: Callable[..., Any] = teacher
) -> EmbeddingStore:
    """What the teacher sees of each pair and of its crops, in shards of these rows."""
    writer = StoreWriter(
        folder, teacher={"reference": "pixels"}, dim=DIM, fields=(), num_shards=len(shards), views=views
    )
    for number, rows in enumerate(shards):
        pictures = [picture_of(pairs, row) for row in rows]
        keys = [pairs.key(row) for row in rows]
        crops = views and np.stack(
            [
                [
                    look(picture.crop(crop_box(key, view, picture.size, crop_scale=views.crop_scale)))
                    for view in range(views.count)
                ]
                for picture, key in zip(pictures, keys, strict=True)
            ]
        )
        writer.add(
            ShardRows(
                name=str(number),
                images=np.stack([look(picture) for picture in pictures]),
                texts=unit_rows(len(rows), seed=number),
                more_texts=unit_rows(len(rows), seed=number + 50),
                ok=np.ones(len(rows), dtype=bool),
                keys=keys,
                captions=[pairs.read(row).captions for row in rows],
                sizes=[picture.size for picture in pictures],
                fields={},
                skipped=[],
                views=crops,
            )
        )
    writer.finish()
    return EmbeddingStore.open(folder)


def training_pairs(folder: Path, views: Views | None = VIEWS, *, shards: Sequence[Sequence[int]] = ()) -> TrainingPairs:
    pairs = make_pairs(folder / "pairs")
    store = make_store(folder / f"store{len(shards)}{views}", pairs, views, shards or [range(len(pairs))])
    store_rows = join(pairs.keys(0, len(pairs)), store)
    labels = np.random.default_rng(4).integers(0, CENTERS, len(pairs))
    sizes = store.sizes[store_rows] if views else None
    rows = np.arange(len(pairs))
    return TrainingPairs(pairs, rows, labels, store, store_rows, store.num_captions, views=views, sizes=sizes)


def make_batches(
    training: TrainingPairs,
    *,
    workers: int = 0,
    crop_scale: float | None = None,
    more: dict[str, float] | None = None,
    ranks: Ranks = ALONE,
) -> Batches:
    clip = Clip(torch.nn.Linear(1, 1), {"embed_dim": DIM}, CFG, tokenize, image_transform(16, is_train=False), "tiny")  # pyright: ignore
    transform = train_transform(clip, crop_scale=crop_scale, more=more)
    dataset = PairDataset(training, transform=transform, tokenizer=tokenize, max_pixels=10_000, seed=5)
    return Batches(training, dataset, batch_size=BATCH, seed=5, workers=workers, pin=False, ranks=ranks)


def item(batches: Batches, epoch: int, index: int) -> Item:
    found = batches._dataset[Place(epoch, index)]
    assert isinstance(found, Item)
    return found


def equal(one: Batch, other: Batch) -> bool:
    def same(left: Any, right: Any) -> bool:
        return torch.equal(left, right) if isinstance(left, Tensor) else bool(np.array_equal(left, right))

    return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Batch))


def test_image_and_target_are_of_one_crop(tmp_path: Path):
    training = training_pairs(tmp_path)
    for batch in make_batches(training).between(0, 9):
        assert batch.teacher_image is not None
        for place, row in enumerate(batch.rows.tolist()):
            picture: Any = picture_of(training.pairs, row)
            key = training.pairs.key(row)
            boxes = [crop_box(key, view, picture.size, crop_scale=0.3) for view in range(3)]
            (view,) = [
                view
                for view, box in enumerate(boxes)
                if np.abs(teacher(picture.crop(box)) - batch.teacher_image[place].numpy()).max() < 1e-3
            ]
            left, upper, right, lower = boxes[view]
            size = (lower - upper, right - left)
            resized: Any = F.resized_crop(picture, upper, left, *size, [16, 16], F.InterpolationMode.BICUBIC)
            seen = F.to_tensor(resized)
            assert torch.equal(batch.images[place], seen)


def test_every_view_is_equally_likely_whatever_epoch_row_and_seed():
    numbers = np.array([[view_number(5, 0, epoch, row) for row in range(400)] for epoch in range(50)])
    for step in (1, 2, 5):  # the epochs in which an image comes
        counts = np.bincount(numbers[::step].ravel(), minlength=5)
        total = counts.sum()
        assert (np.abs(counts - total / 5) < 6 * (total * 0.2 * 0.8) ** 0.5).all()
        assert all(len(set(row)) > 1 for row in numbers[::step].T[:50])
    assert len({tuple(view_number(5, seed, 0, row) for row in range(40)) for seed in range(4)}) == 4


@pytest.mark.parametrize("more", [None, {"color_jitter": 0.4, "color_jitter_prob": 0.8, "gray_scale_prob": 0.3}])
def test_workers_the_state_of_torch_and_a_later_start_change_no_batch(tmp_path: Path, more: dict[str, float] | None):
    training = training_pairs(tmp_path)
    alone = list(make_batches(training, more=more).between(0, 6))
    torch.manual_seed(12345)
    helped = list(make_batches(training, workers=2, more=more).between(0, 6))
    resumed = list(make_batches(training, more=more).between(4, 6))
    assert all(equal(one, other) for one, other in zip(alone, helped, strict=True))
    assert all(equal(one, other) for one, other in zip(alone[4:], resumed, strict=True))


def test_ranks_read_the_rows_that_one_process_would(tmp_path: Path):
    training = training_pairs(tmp_path)
    alone = list(make_batches(training).between(0, 4))
    shared = [list(make_batches(training, ranks=Ranks(rank=rank, size=2)).between(0, 4)) for rank in range(2)]
    for whole, *parts in zip(alone, *shared, strict=True):
        for name in ("images", "teacher_image", "teacher_text", "texts", "labels"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_the_order_of_the_shards_changes_no_batch(tmp_path: Path):
    rows = list(range(21))
    one = training_pairs(tmp_path, shards=[rows[:8], rows[8:]])
    other = training_pairs(tmp_path, shards=[rows[16:], rows[3:16], rows[:3]])
    left, right = (make_batches(training).between(0, 6) for training in (one, other))
    for ours, theirs in zip(left, right, strict=True):
        for name in ("images", "teacher_image", "labels", "rows"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_one_view_of_the_whole_image_is_no_view(tmp_path: Path):
    make_pairs(tmp_path / "pairs")
    for path in (tmp_path / "pairs").glob("*.png"):
        with Image.open(path) as image:
            image.resize((20, 20)).save(path)  # else a crop of scale 1 may lose a row to rounding
    whole, plain = (training_pairs(tmp_path, views) for views in (Views(1, 1.0), None))
    left, right = make_batches(whole).between(0, 6), make_batches(plain, crop_scale=1.0).between(0, 6)
    assert all(equal(ours, theirs) for ours, theirs in zip(left, right, strict=True))


def test_colors_change_over_a_view_as_over_any_crop(tmp_path: Path):
    training = training_pairs(tmp_path)
    epochs = [epoch for epoch in range(20) if view_number(3, 5, epoch, 3) == 1][:2]
    colored, plain = (
        make_batches(training, more={"color_jitter": 0.4, "color_jitter_prob": 1.0}),
        make_batches(training),
    )
    for batches, same in ((colored, False), (plain, True)):
        one, other = (item(batches, epoch, 3) for epoch in epochs)
        assert one.view == other.view == 1
        assert torch.equal(one.image, other.image) == same


def test_an_image_of_another_size_is_refused(tmp_path: Path):
    training = training_pairs(tmp_path)
    path = tmp_path / "pairs" / "004.png"
    with Image.open(path) as image:
        image.resize((24, 21)).save(path)
    item(make_batches(training), 0, 3)
    with pytest.raises(DataError, match=r"'004.*' has 24 x 21 pixels, but the views .* were embedded from 24 x 20"):
        item(make_batches(training), 0, 4)


def test_held_out_pairs_are_measured_on_whole_images(tmp_path: Path):
    training = training_pairs(tmp_path)
    rest, held_out = hold_out(training, 0.4, batch_size=4, ranks=1)
    assert held_out.pairs.views is None
    assert rest.views == VIEWS
    assert rest.sizes is not None
    assert training.sizes is not None
    assert np.array_equal(rest.sizes, training.sizes[rest.rows])
    assert training.store is not None
    for batch in make_batches(held_out.pairs, crop_scale=1.0).between(0, 1):
        assert batch.teacher_image is not None
        assert np.abs(batch.teacher_image.numpy() - training.store.images[batch.rows]).max() < 1e-3
