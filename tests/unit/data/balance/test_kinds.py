import io
import json
import logging
import random
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from clip_cid.data.balance.kinds import KINDS, NEAR_BITS, Kinds, bits_apart, classify, difference_hash, wilson_interval
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.data.sample.drawing import draw_scene
from clip_cid.data.sample.scenes import SceneBook
from clip_cid.data.sample.write import write_sample
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.summaries import KindShare

SIDE = 40
PICTURES = 60


def recipe_of(*source: Path) -> Recipe:
    return parse_recipe({"pairs": {"source": [str(path) for path in source]}}, where="test")


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def data(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[RunFolder, Recipe, list[str]]:
    """Row 0, the same saved again, another picture, and one that is broken."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for row, image in enumerate([data(noise(1), 95), data(noise(1), 50), data(noise(2), 90), b"not a picture"]):
        (folder / f"{row}.jpg").write_bytes(image)
        (folder / f"{row}.txt").write_text("caption")
    return RunFolder(tmp_path / "run"), recipe_of(folder), [f"{row}" for row in range(4)]


def test_each_removed_image_is_compared_with_the_one_kept_for_it(pairs: Any) -> None:
    folder, recipe, keys = pairs
    removed, kept = np.array([1, 2, 3, 0]), np.array([0, 0, 0, 3])
    found = classify(folder, recipe, keys, removed, kept, images=9, seed=0)
    assert found is not None
    assert [KINDS[number] for number in found.number] == ["perceptual", "semantic", "unknown", "unknown"]
    summary = found.summary()
    assert (summary.drawn, summary.unknown) == (4, 2)
    assert summary.perceptual == summary.semantic
    assert (summary.semantic.images, summary.semantic.share) == (1, 0.5)
    assert (summary.semantic.low, summary.semantic.high) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert json.dumps(asdict(summary), allow_nan=False)


def test_in_a_store_made_elsewhere_the_key_decides(pairs: Any) -> None:
    folder, recipe, _ = pairs
    found = classify(
        folder, recipe, ["2", "gone", "1", "0"], np.array([2, 0, 1]), np.array([3, 3, 3]), images=3, seed=0
    )
    assert found is not None
    assert [KINDS[number] for number in found.number] == ["perceptual", "semantic", "unknown"]


def test_only_as_many_are_drawn_as_asked_and_the_same_ones_every_time(pairs: Any) -> None:
    folder, recipe, keys = pairs
    removed, kept = np.full(50, 1), np.zeros(50, dtype=int)
    calls: list[int] = []
    one = classify(folder, recipe, keys, removed, kept, images=20, seed=3, on_progress=calls.append)
    again, other = (classify(folder, recipe, keys, removed, kept, images=20, seed=seed) for seed in (3, 4))
    assert one is not None
    assert again is not None
    assert other is not None
    assert (one.number > 0).sum() == sum(calls) == 20
    assert one.number.tolist() == again.number.tolist() != other.number.tolist()


@pytest.mark.parametrize("images", [0, 5])
def test_nothing_to_draw_is_no_kinds_and_nothing_is_said(images: int, caplog: pytest.LogCaptureFixture) -> None:
    none = np.zeros(0 if images else 3, dtype=int)
    assert classify(RunFolder(Path("x")), Recipe(), [], none, none, images=images, seed=0) is None
    assert caplog.text == ""


def test_without_pairs_there_are_no_kinds_and_one_line_says_so(
    pairs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, keys = pairs
    caplog.set_level(logging.INFO, logger="clip_cid")
    for recipe, reason in ((Recipe(), "the recipe names no pairs"), (recipe_of(tmp_path / "gone"), "cannot be read")):
        caplog.clear()
        assert classify(folder, recipe, keys, np.array([1]), np.array([0]), images=1, seed=0) is None
        (message,) = caplog.messages
        assert "perceptual and semantic duplicates are not distinguished" in message
        assert reason in message


@pytest.mark.slow
def test_the_known_duplicates_of_the_sample_are_told_apart(tmp_path: Path) -> None:
    write_sample(tmp_path / "sample", pairs=600)
    recipe = recipe_of(tmp_path / "sample" / "pairs" / "pairs-0000.tar")
    pairs = open_pairs(recipe.pairs)
    fields = []
    with tarfile.open(recipe.pairs.source[0]) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                described = tar.extractfile(member)
                assert described is not None
                fields.append(json.load(described))
    first = {one["dup"]: row for row, one in enumerate(fields) if one["kind"] == "original"}
    removed = np.array([row for row, one in enumerate(fields) if one["kind"] != "original"])
    kept = np.array([first[fields[row]["dup"]] for row in removed])
    found = classify(RunFolder(tmp_path), recipe, pairs.keys(0, 600), removed, kept, images=600, seed=0)
    assert found is not None
    right = [KINDS[number] == fields[row]["kind"] for number, row in zip(found.number, removed, strict=True)]
    assert np.mean(right) > 0.94


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_interval_holds_the_share_and_solves_the_equation_of_the_score_test(successes: int, more: int) -> None:
    trials = successes + more
    share = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959963984540054 * (end * (1 - end) / trials) ** 0.5, abs=1e-9)


def test_nothing_known_is_no_share() -> None:
    summary = Kinds(np.array([0, 3, 3], dtype=np.int8)).summary()
    assert (summary.drawn, summary.unknown) == (2, 2)
    assert summary.semantic == KindShare(images=0, share=None, low=0.0, high=1.0)


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


@pytest.mark.slow
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
