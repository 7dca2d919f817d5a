import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.pictures import Pictures
from clip_cid.figures import contact_sheet, style
from clip_cid.figures.contact_sheet import Strip
from clip_cid.recipe import PairsConfig
from clip_cid.report.thumbnails import Thumbnails, thumbnail

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    for number, color in enumerate(COLORS):
        Image.new("RGB", (40, 20), color).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    return open_pairs(PairsConfig(source=(str(tmp_path),)))


def test_a_thumbnail_is_webp_of_at_most_that_side_and_is_never_enlarged() -> None:
    small = thumbnail(Image.new("RGB", (400, 200)), 96)
    prefix, _, data = small.src.partition(",")
    assert prefix == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "WEBP"
        assert image.size == (small.width, small.height) == (96, 48)
    assert thumbnail(Image.new("RGB", (10, 20)), 96).height == 20


def test_thumbnails_stop_at_the_budget_and_count_what_is_left_out(pairs: Pairs) -> None:
    keys = pairs.keys(0, 4)
    pictures = Pictures(pairs, {key: row for row, key in enumerate(keys)}, max_pixels=10_000)
    alone = Thumbnails(pictures, side=32, budget=10_000)
    alone.get(keys[0])
    first = alone.bytes_used
    thumbnails = Thumbnails(pictures, side=32, budget=first)
    assert [thumbnails.get(key) is not None for key in (*keys, keys[0])] == [True, False, False, False, True]
    assert thumbnails.over_budget == 3
    assert thumbnails.bytes_used == first


def test_without_pictures_there_are_no_thumbnails_and_none_counts_as_lost() -> None:
    thumbnails = Thumbnails(None, side=32, budget=10_000)
    assert thumbnails.get("any") is None
    assert (thumbnails.unreadable, thumbnails.over_budget) == (0, 0)


def test_the_kept_image_has_a_green_frame_and_a_lost_one_an_empty_place(tmp_path: Path) -> None:
    strips = [Strip("a", ["kept", "gone"], ["kept", "0.1"], framed=(0,)), Strip("b", ["kept"], ["0.2"])]
    found = {"kept": Image.new("RGB", (50, 50), (10, 20, 30))}
    summary = contact_sheet.draw(strips, found.get, tmp_path / "sheet.png")
    assert summary == {"strips": 2, "missing_pictures": 1}
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    green = tuple(int(style.GREEN[place : place + 2], 16) for place in (1, 3, 5))
    framed = (pixels == green).all(axis=2)
    assert framed.sum() == 96 * 96 - 88 * 88
    assert (pixels == (10, 20, 30)).all(axis=2).sum() == 88 * 88 + 96 * 96
