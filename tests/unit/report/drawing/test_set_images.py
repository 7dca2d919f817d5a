from pathlib import Path

import numpy as np
import pytest
from tiny_sets import CLASSES, folder_set, tiny_clip

from clip_cid.data.sets.evaluation_sets import EvaluationSet, open_set
from clip_cid.report.drawing import set_images


@pytest.fixture
def labelled(tmp_path: Path) -> EvaluationSet:
    root = folder_set(tmp_path / "set", each=4)
    (root / "test" / "red_thing" / "2.jpg").write_bytes(b"no picture")
    return open_set("set", str(root), max_pixels=10**6, splits=("test",))


def test_images_of_a_class_are_of_it_and_broken_ones_are_passed_over(labelled: EvaluationSet) -> None:
    found = set_images.choose(labelled, classes=5, each=9, seed=0)
    truth = labelled.split("test").labels
    assert sorted(images[0].label for images in found) == list(range(len(CLASSES)))
    for images in found:
        label = images[0].label
        assert {one.label for one in images} == {label} == set(truth[[one.row for one in images]])
        assert len({one.row for one in images}) == len(images) == (3 if "red" in labelled.class_names[label] else 4)


def test_the_seed_decides_and_fewer_of_each_are_the_first_of_more(labelled: EvaluationSet) -> None:
    def rows(seed: int, classes: int, each: int) -> list[list[int]]:
        chosen = set_images.choose(labelled, classes=classes, each=each, seed=seed)
        return [[one.row for one in images] for images in chosen]

    assert rows(0, 2, 2) == rows(0, 2, 2)
    assert len({str(rows(seed, 2, 2)) for seed in range(10)}) > 1
    assert [images[0] for images in rows(1, 3, 1)] == [images[0] for images in rows(1, 3, 3)]


def test_the_picture_is_what_the_model_was_given(labelled: EvaluationSet, tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    (images,) = set_images.choose(labelled, classes=1, each=1, seed=0)
    picture = set_images.as_seen(clip, set_images.pixels(clip, images)[0])
    side = clip.image_side
    assert picture.shape == (side, side, 3)
    expected = np.asarray(images[0].image.resize((side, side)), dtype=float)  # Pillow's bicubic, as open_clip's
    assert picture.astype(float) == pytest.approx(expected, abs=1.5)
