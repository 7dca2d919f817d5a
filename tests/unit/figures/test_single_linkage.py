import csv
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy

from clip_cid.figures import single_linkage


@given(st.integers(2, 20), st.integers(0, 2**20))
def test_the_tree_is_that_of_single_linkage_over_all_pairs(images: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((images, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    links, squared = oracles.spanning_forest(rows, 4.0)
    ends = np.array(links)
    found = single_linkage.linkage(ends[:, 0], ends[:, 1], np.sqrt(squared))
    assert hierarchy.is_valid_linkage(found)
    expected = hierarchy.linkage(rows, "single")
    assert hierarchy.cophenet(found) == pytest.approx(hierarchy.cophenet(expected), abs=1e-6)


def test_links_that_are_no_tree_are_refused() -> None:
    left, right = np.array([0, 1, 0]), np.array([1, 2, 2])
    with pytest.raises(ValueError, match="link 2 joins images 0 and 2, which are joined already"):
        single_linkage.linkage(left, right, np.array([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="ascend"):
        single_linkage.linkage(left[:2], right[:2], np.array([2.0, 1.0]))


def test_the_csv_holds_the_links_and_the_picture_a_leaf(tmp_path: Path) -> None:
    linked = single_linkage.LinkedSet(
        rows=np.array([5, 6, 8]),
        kept=np.array([True, False, False]),
        distances=np.array([0.0, 0.05, 0.12]),
        left=np.array([0, 1]),
        right=np.array([2, 2]),
        heights=np.array([0.03, 0.07]),
    )
    pictures = {row: np.full((8, 8, 3), row, dtype=np.uint8) for row in (5, 6)}
    summary = single_linkage.draw(linked, pictures, threshold=0.1, metric="cosine", out=tmp_path)
    assert summary == {"images": 3, "longest_link": 0.07, "farthest": 0.12}
    with open(tmp_path / "single_linkage.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [(line["left_row"], line["right_row"], line["link"]) for line in lines] == [
        ("5", "8", "0.03"),
        ("6", "8", "0.07"),
    ]
    svg = (tmp_path / "single_linkage.svg").read_text()
    assert svg.count("<image") == 2
    for words in ("kept", "0.050", "0.120", "threshold 0.1", "cosine distance"):
        assert f">{words}<" in svg
