import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from clip_cid.data.pairs.crops import Views, crop_box, views_of
from clip_cid.recipe import EmbedConfig

sides = st.integers(1, 3000)


@given(st.text(), st.integers(0, 50), st.tuples(sides, sides), st.floats(0.01, 1.0))
def test_a_crop_lies_in_the_image_and_is_the_same_each_time(key: str, number: int, size: tuple[int, int], scale: float):
    box = crop_box(key, number, size, crop_scale=scale)
    assert 0 <= box.left < box.right <= size[0]
    assert 0 <= box.upper < box.lower <= size[1]
    assert crop_box(key, number, size, crop_scale=scale) == box


@given(st.text(), st.integers(0, 50), st.floats(0.1, 1.0), st.integers(500, 2000))
def test_share_of_the_area_and_aspect_are_within_their_limits(key: str, number: int, scale: float, side: int):
    box = crop_box(key, number, (side, side), crop_scale=scale)
    wide, tall = box.right - box.left, box.lower - box.upper
    assert scale - 0.02 <= wide * tall / side**2 <= 1
    assert 3 / 4 - 0.02 <= wide / tall <= 4 / 3 + 0.02


def test_crops_are_those_of_a_store_that_was_written_before():
    """Stores hold embeddings of these very crops: another law needs another number."""
    boxes = [crop_box(key, number, (640, 480), crop_scale=0.4) for key in ("00000/a", "ключ") for number in (0, 1)]
    assert boxes == [(132, 5, 496, 429), (76, 28, 627, 479), (256, 38, 591, 460), (8, 2, 485, 472)]
    assert crop_box("a", 0, (3, 2), crop_scale=0.1) == (1, 0, 3, 2)


def test_another_process_makes_the_same_crops():
    code = "from clip_cid.data.pairs.crops import crop_box; print(*crop_box('k', 3, (500, 333), crop_scale=0.08))"
    for seed in ("0", "1"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert tuple(map(int, found.stdout.split())) == crop_box("k", 3, (500, 333), crop_scale=0.08)


@pytest.mark.parametrize("size", [(300, 300), (400, 250), (250, 400)])
def test_the_crops_are_distributed_as_those_of_torchvision(size: tuple[int, int]):
    """Kolmogorov and Smirnov's distance of 6,000 crops each, at a level of one in a million (5.4 / sqrt(12,000))."""
    count = 6000
    picture: Any = Image.new("RGB", size)
    ours = np.array([crop_box(str(key), key % 5, size, crop_scale=0.3) for key in range(count)])
    ours = np.stack([ours[:, 0], ours[:, 1], ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]], axis=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(picture, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = np.array([(left, upper, wide, tall) for upper, left, tall, wide in drawn])

    for of_box in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3]):
        grid = np.unique(np.concatenate([of_box(ours), of_box(theirs)]))
        shares = [np.searchsorted(np.sort(of_box(some)), grid, side="right") / count for some in (ours, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 5.4 / (2 * count) ** 0.5


def test_keys_and_views_have_crops_of_their_own():
    boxes = {crop_box(key, number, (1000, 900), crop_scale=0.4) for key in ("a", "b", "c") for number in range(5)}
    assert len(boxes) == 15


@given(st.text(), st.integers(0, 5), sides)
def test_at_scale_one_a_view_of_a_square_is_all_of_it(key: str, number: int, side: int):
    assert crop_box(key, number, (side, side), crop_scale=1.0) == (0, 0, side, side)


@pytest.mark.parametrize(("size", "box"), [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56))])
def test_of_a_narrow_image_the_largest_crop_in_the_middle_is_taken(size: tuple[int, int], box: tuple[int, ...]):
    assert crop_box("a", 0, size, crop_scale=1.0) == box
    picture: Any = Image.new("RGB", size)
    upper, left, tall, wide = RandomResizedCrop.get_params(picture, [1.0, 1.0], [3 / 4, 4 / 3])
    assert (left, upper, left + wide, upper + tall) == box


def test_a_recipe_says_which_views_it_wants():
    assert views_of(EmbedConfig()) is None
    views = views_of(EmbedConfig(views=3, view_crop_scale=0.25))
    assert views == Views(3, 0.25)
    assert views is not None
    pixels = np.arange(60 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(50, 60, 3)
    left, upper, right, lower = crop_box("key", 2, (60, 50), crop_scale=0.25)
    assert np.array_equal(np.asarray(views.crop(Image.fromarray(pixels), "key", 2)), pixels[upper:lower, left:right])
