"""The difference hash on planted copies (saved again, resized, cut, brightened) against different pictures."""

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from clip_cid.data.balance.pixel_hash import NEAR_BITS, bits_apart, difference_hash
from clip_cid.data.sample.drawing import draw_scene
from clip_cid.data.sample.scenes import SceneBook

PICTURES = 60


def photo(seed: int) -> Image.Image:
    """Smooth light and dark with some detail, 320 x 240."""
    noise = np.random.default_rng(seed)
    coarse = Image.fromarray(noise.integers(0, 255, (7, 9, 3), dtype=np.uint8)).resize(
        (320, 240), Image.Resampling.BICUBIC
    )
    fine = noise.normal(0, 6, (240, 320, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8))


def saved_again(image: Image.Image, kind: str, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": lambda image: saved_again(image, "JPEG", 40),
    "webp": lambda image: saved_again(image, "WEBP", 50),
    "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "double": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "squeezed": lambda image: image.resize((image.width, image.width), Image.Resampling.BICUBIC),
    "cut": lambda image: image.crop((4, 3, image.width - 2, image.height - 3)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.08),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_near_its_original(copy: str) -> None:
    originals = [photo(seed) for seed in range(PICTURES)]
    apart = [bits_apart(difference_hash(image), difference_hash(COPIES[copy](image))) for image in originals]
    assert np.mean(np.array(apart) <= NEAR_BITS) >= 0.97


def test_different_pictures_are_far_apart() -> None:
    hashes = [difference_hash(photo(seed)) for seed in range(PICTURES)]
    apart = [bits_apart(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(apart) > NEAR_BITS
    assert np.mean(apart) == pytest.approx(32, abs=2)


def test_scenes_of_the_sample_drawn_again_are_told_from_copies() -> None:
    rng = random.Random(0)
    book = SceneBook()
    copies, drawn_again = [], []
    for place in range(PICTURES):
        scene = book.new(rng)
        first = draw_scene(scene, random.Random(place))
        own = difference_hash(first)
        copies.append(bits_apart(own, difference_hash(saved_again(first.crop((1, 0, 63, 64)), "JPEG", 75))))
        drawn_again.append(bits_apart(own, difference_hash(draw_scene(scene, random.Random(1000 + place)))))
    assert np.mean(np.array(copies) <= NEAR_BITS) >= 0.9
    assert np.mean(np.array(drawn_again) <= NEAR_BITS) <= 0.1


def test_the_bits_of_a_ramp_by_hand() -> None:
    right = Image.fromarray(np.tile(np.arange(0, 180, 20, dtype=np.uint8), (8, 1)))
    assert difference_hash(right).tolist() == [True] * 64
    assert bits_apart(difference_hash(right), difference_hash(right.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) == 64
    step = np.full((8, 9), 100, dtype=np.uint8)
    step[3, 5:] = 102
    assert np.flatnonzero(difference_hash(Image.fromarray(step))).tolist() == [3 * 8 + 4]


def test_a_difference_that_compression_makes_sets_no_bit() -> None:
    faint = np.full((8, 9), 100, dtype=np.uint8)
    faint[:, ::2] = 101
    assert not difference_hash(Image.fromarray(faint)).any()
