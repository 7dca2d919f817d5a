import csv
from pathlib import Path

import numpy as np
import oracles
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy

from clip_cid.data.balance.forest_file import StoredForest
from clip_cid.data.balance.tables import BalanceTables, write_tables
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


def tables(folder: Path, *, sizes: dict[int, int], members: list[tuple[int, int, bool, float]]) -> BalanceTables:
    """Sets (number -> size of its connected set, whose number is its tens) and (row, set, kept, distance) of their images."""
    numbers = np.array(list(sizes))
    kept = np.array([next(row for row, number, is_kept, _ in members if number == one and is_kept) for one in sizes])
    zeros = np.zeros(len(sizes))
    columns = {
        "set": numbers,
        "kept_row": kept,
        "size": np.array([sum(number == one for _, number, _, _ in members) for one in sizes]),
        "component": numbers // 10,
        "component_size": np.array(list(sizes.values())),
        **dict.fromkeys(("farthest", "mean", "widest", "weakest_link"), zeros),
        "widest_exact": zeros == 0,
        **dict.fromkeys(("weakest_left", "weakest_right"), numbers),
    }
    row, number, is_kept, distance = (np.array(column) for column in zip(*members, strict=True))
    rows = {"row": row, "set": number, "kept": is_kept, "distance": distance}
    keys = pa.array([f"k{place}" for place in range(100)], type=pa.large_string())
    write_tables(folder, keys, columns, rows, metric="squared_euclidean", threshold=0.1)
    return BalanceTables(folder)


def forest(*links: tuple[int, int, float]) -> StoredForest:
    left, right, squared = (np.array(column) for column in zip(*links, strict=True))
    return StoredForest(100, left, right, squared, 0.2)


def test_the_largest_set_that_fits_is_shown_with_all_that_is_joined_to_it(tmp_path: Path) -> None:
    found = tables(
        tmp_path,
        sizes={11: 2, 21: 4, 31: 15},
        members=[
            *[(1, 11, True, 0.0), (2, 11, False, 0.01)],
            # Row 9 of the same connected set is kept for itself, too far from row 5: it is in no set.
            *[(5, 21, True, 0.0), (6, 21, False, 0.05), (8, 21, False, 0.06)],
            *[(10, 31, True, 0.0), (11, 31, False, 0.02)],
        ],
    )
    links = forest((1, 2, 0.01), (5, 8, 0.02), (10, 11, 0.02), (5, 6, 0.05), (6, 9, 0.1), (2, 9, 0.15))
    chosen = single_linkage.choose(found, links)
    assert chosen is not None
    assert chosen.rows.tolist() == [5, 6, 8, 9]
    assert chosen.kept.tolist() == [True, False, False, True]
    assert chosen.distances.tolist() == [0, 0.05, 0.06, 0]
    assert chosen.left.tolist() == [0, 0, 1]
    assert chosen.right.tolist() == [2, 1, 3]
    assert chosen.heights == pytest.approx([0.02, 0.05, 0.1])


def test_where_all_sets_are_too_large_none_is_shown(tmp_path: Path) -> None:
    found = tables(tmp_path, sizes={31: 15}, members=[(10, 31, True, 0.0), (11, 31, False, 0.02)])
    assert single_linkage.choose(found, forest((10, 11, 0.02))) is None


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
