import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.pictures import Pictures
from clip_cid.recipe import PairsConfig

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    for number, color in enumerate(COLORS):
        Image.new("RGB", (40, 20), color).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    return open_pairs(PairsConfig(source=(str(tmp_path),)))


def color_of(image: Image.Image | None) -> tuple[int, ...]:
    assert image is not None
    pixel = image.convert("RGB").getpixel((5, 5))
    assert isinstance(pixel, tuple)
    return pixel


def test_a_row_of_the_store_is_a_row_of_the_pairs_it_was_made_from(pairs: Pairs) -> None:
    pictures = Pictures(pairs, {pairs.key(row): row for row in range(4)}, max_pixels=10_000)
    assert [color_of(pictures.get(pairs.key(row))) for row in range(4)] == COLORS


def test_in_a_store_made_elsewhere_the_key_decides(pairs: Pairs) -> None:
    pictures = Pictures(pairs, {pairs.key(0): 3, pairs.key(2): 777, "unknown": 1}, max_pixels=10_000)
    assert color_of(pictures.get(pairs.key(0))) == COLORS[0]
    assert color_of(pictures.get(pairs.key(2))) == COLORS[2]
    assert pictures.get("unknown") is None


def test_a_picture_that_cannot_be_used_is_none(pairs: Pairs) -> None:
    assert Pictures(pairs, {pairs.key(0): 0}, max_pixels=10).get(pairs.key(0)) is None


def test_a_sample_is_of_different_pairs_and_the_same_every_time(pairs: Pairs) -> None:
    pictures = Pictures(pairs, {}, max_pixels=10_000)
    sample = pictures.sample(3, seed=1)
    assert len(sample) == 3
    assert sample == pictures.sample(3, seed=1)
    assert all(pictures.get(key) is not None for key in sample)
    assert set(pictures.sample(9, seed=0).values()) == {f"caption {number}" for number in range(4)}


def test_pictures_whose_source_went_away_are_none(tmp_path: Path) -> None:
    """A tar that was indexed and is deleted, or exchanged, before it is read."""
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        for number, color in enumerate(COLORS):
            Image.new("RGB", (40, 20), color).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text("a caption")
            for name in (f"{number}.png", f"{number}.txt"):
                file.add(tmp_path / name, name)
    pairs = open_pairs(PairsConfig(source=(str(tar),)))
    pictures = Pictures(pairs, {pairs.key(0): 0}, max_pixels=10_000)
    tar.unlink()
    assert pictures.get(pairs.key(0)) is None
    assert pictures.sample(3, seed=0) == {}
