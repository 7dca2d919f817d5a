import csv
from pathlib import Path

import numpy as np
import pytest

from clip_cid.figures import activation_maps

PICTURE = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def yellow(picture: np.ndarray) -> np.ndarray:
    """How yellow each pixel is: red and green without blue."""
    values = picture.astype(float)
    return values[..., :2].min(axis=2) - values[..., 2]


def test_the_brightest_place_is_the_maximum_of_the_map() -> None:
    found = np.zeros((3, 4))
    found[1, 2] = 0.01
    shown = yellow(activation_maps.overlay(PICTURE, found))
    assert np.unravel_index(shown.argmax(), shown.shape) in [(r, c) for r in range(10, 20) for c in range(20, 30)]
    assert shown.max() > 50


def test_a_map_is_shown_by_its_own_measure() -> None:
    found = np.random.default_rng(1).random((3, 4))
    once = activation_maps.overlay(PICTURE, found)
    assert np.abs(once.astype(int) - activation_maps.overlay(PICTURE, 1000 * found)).max() <= 1


def test_an_empty_map_has_no_yellow() -> None:
    shown = activation_maps.overlay(PICTURE, np.zeros((3, 4)))
    assert shown.shape == PICTURE.shape
    assert yellow(shown).max() < 0


def test_the_csv_holds_every_patch_with_the_prompt_and_the_cosine(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    maps = {"student": random.random((2, 3)), "baseline": random.random((1, 2))}
    cosines = {"student": 0.25, "baseline": 0.5}
    one = activation_maps.PromptedImage(7, "cat & dog", "a <cat>", PICTURE, maps, cosines)
    summary = activation_maps.draw([one, one], tmp_path)
    assert summary == {name: {"mean_cosine": value} for name, value in cosines.items()}
    with open(tmp_path / "activation_maps.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert {(line["image"], line["class"], line["prompt"]) for line in lines} == {("7", "cat & dog", "a <cat>")}
    for name, found in maps.items():
        own = [float(line["activation"]) for line in lines if line["model"] == name]
        assert own == pytest.approx([*found.ravel(), *found.ravel()])
        assert {line["cosine"] for line in lines if line["model"] == name} == {str(cosines[name])}
