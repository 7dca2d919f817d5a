"""The set that is shown as a tree, with all that is joined to it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clip_cid.data.balance.forest_file import StoredForest
from clip_cid.data.balance.tables import BalanceTables, write_tables
from clip_cid.report.drawing import linked_set


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
    chosen = linked_set.choose(found, links)
    assert chosen is not None
    assert chosen.rows.tolist() == [5, 6, 8, 9]
    assert chosen.kept.tolist() == [True, False, False, True]
    assert chosen.distances.tolist() == [0, 0.05, 0.06, 0]
    assert chosen.left.tolist() == [0, 0, 1]
    assert chosen.right.tolist() == [2, 1, 3]
    assert chosen.heights == pytest.approx([0.02, 0.05, 0.1])


def test_where_all_sets_are_too_large_none_is_shown(tmp_path: Path) -> None:
    found = tables(tmp_path, sizes={31: 15}, members=[(10, 31, True, 0.0), (11, 31, False, 0.02)])
    assert linked_set.choose(found, forest((10, 11, 0.02))) is None
