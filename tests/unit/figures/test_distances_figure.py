"""How far removed images are from the one kept: every image in a bar, no bar on both sides of the threshold."""

import csv
from pathlib import Path

import numpy as np
import pytest

from clip_cid.figures import distances


def columns(path: Path) -> dict[str, list[str]]:
    with open(path, newline="") as handle:
        lines = list(csv.DictReader(handle))
    return {name: [line[name] for line in lines] for name in lines[0]}


def test_every_removed_image_is_in_the_histogram(tmp_path: Path) -> None:
    found = np.array([0.0, 0.01, 0.02, 0.07, 0.2])
    summary = distances.draw(found, threshold=0.07, metric="squared_euclidean", out=tmp_path)
    assert sum(int(count) for count in columns(tmp_path / "distances.csv")["removed"]) == 5
    assert summary == {"median": 0.02, "largest": 0.2, "beyond_threshold_share": pytest.approx(0.2)}
    assert "squared euclidean distance" in (tmp_path / "distances.svg").read_text()


@pytest.mark.parametrize("threshold", [0.07, 0.045, 0.3, 0.1 + 0.2, 1 / 3, 0.0123])
@pytest.mark.parametrize("widest", [1.0, 1.001, 5.3])
def test_no_bar_is_on_both_sides_of_the_threshold(tmp_path: Path, threshold: float, widest: float) -> None:
    found = np.append(np.random.default_rng(0).uniform(0, widest * threshold, 500), [0, threshold, widest * threshold])
    summary = distances.draw(found, threshold=threshold, metric="cosine", out=tmp_path)
    bars = {name: np.array(values, dtype=float) for name, values in columns(tmp_path / "distances.csv").items()}
    beyond = bars["from"] >= threshold
    assert bars["removed"].sum() == len(found)
    assert bars["removed"][beyond].sum() / len(found) == pytest.approx(summary["beyond_threshold_share"])
    assert (bars["to"][~beyond] <= threshold).all()
    assert np.ptp(bars["to"] - bars["from"]) == pytest.approx(0, abs=1e-9)


def test_equal_images_at_a_threshold_of_0_are_one_bar(tmp_path: Path) -> None:
    numbers = distances.draw(np.zeros(3), threshold=0.0, metric="cosine", out=tmp_path)
    assert numbers == {"median": 0.0, "largest": 0.0, "beyond_threshold_share": 0.0}
    counts = columns(tmp_path / "distances.csv")["removed"]
    assert [int(count) for count in counts if int(count)] == [3]
