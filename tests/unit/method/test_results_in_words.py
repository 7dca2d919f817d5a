"""What the results of the Python functions say of themselves: a line, and an explanation that is true."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clip_cid
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.method.distances import from_squared


def unit_rows(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(st.integers(2, 40), st.floats(0.01, 1.5), st.integers(0, 20), st.sampled_from([None, 0.3]))
def test_what_is_removed_and_why(rows: int, threshold: float, seed: int, max_radius: float | None):
    embeddings = unit_rows(rows, 3, seed)
    result = clip_cid.balance(embeddings, threshold=threshold, metric="euclidean", max_radius=max_radius)
    assert sorted([*result.kept, *result.removed]) == list(range(rows))
    assert f"{len(result.removed):,} are removed" in result.explain()

    for row in range(rows):
        said = result.explain(row)
        if row in result.kept:
            of_set = int((result.set_of == result.set_of[row]).sum()) - 1
            assert said.startswith(f"Row {row} is kept, and {of_set or 'none'} ")
            continue
        kept = result.kept[result.set_of[row]]
        assert f"row {kept} is kept for it" in said
        way = [(int(a), int(b), float(d)) for a, b, d in re.findall(r"(\d+) and (\d+) at ([\d.e-]+)", said)]
        assert (way[0][0], way[-1][1]) == (row, kept)
        assert all(one[1] == other[0] for one, other in itertools.pairwise(way))
        for left, right, distance in way:
            assert distance <= threshold * 1.001
            assert distance == pytest.approx(np.linalg.norm(embeddings[left] - embeddings[right]), rel=1e-3, abs=1e-7)


def test_a_balance_in_words_by_hand():
    angles = np.deg2rad([0, 3, 6, 90])  # 3 degrees are 0.00137 in 1 - cos, 6 are 0.0055
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    result = clip_cid.balance(rows, threshold=0.002)
    assert repr(result) == "Balance(2 of 4 rows kept, 50.0 % removed; cosine <= 0.002)"
    assert result.removed.tolist() == [0, 2]
    assert result.explain() == (
        "2 of 4 rows are kept; 2 are removed (50.0 %). They were in 1 set of two rows or more, the largest of 3."
        " Rows at a cosine distance of 0.002 or less are joined."
    )
    assert result.explain(0) == (
        "Row 0 is removed, and row 1 is kept for it. What links them: 0 and 1 at 0.00137 (cosine, all at most 0.002)."
    )
    assert result.explain(1) == "Row 1 is kept, and 2 rows removed for it: 0, 2."
    assert result.explain(3) == "Row 3 is kept, and none is removed for it."
    with pytest.raises(ValueError, match=r"row must be in \[0, 4\), got 4"):
        result.explain(4)


def test_equal_rows_are_linked_at_0():
    result = clip_cid.balance(np.eye(3)[[0, 1, 0]], threshold=0.1)
    assert "at 0 (cosine" in result.explain(int(result.removed[0]))
    assert from_squared(np.zeros(1), "cosine")[0] == 0


def test_clusters_in_words_by_hand():
    rows = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    clusters = clip_cid.spherical_kmeans(rows, num_centers=2, iterations=2)
    assert repr(clusters) == "Clusters(2 centers of width 2, 4 rows; objective 0)"
    assert clusters.explain() == (
        "4 rows in 2 clusters of 1 to 3 rows (median 2); 0 are empty. The mean squared distance of a row to its center"
        " is 0, a mean cosine of 1, after 2 rounds."
    )


def test_a_probe_in_words():
    x = np.concatenate([unit_rows(30, 2) + np.array([5, 0]), unit_rows(30, 2) - np.array([5, 0])])
    y = np.repeat([0, 1], 30)
    test_y = y.copy()
    test_y[:3] = 1  # three of 33 of class 1 look like class 0
    probe = clip_cid.linear_probe(x, y, x, test_y)
    assert re.fullmatch(r"ProbeResult\(top1 95\.0 % of 60 images; C = [\d.e+-]+\)", repr(probe))
    said = probe.explain()
    assert said.startswith(
        "95.0 % of 60 test images are right (95.5 % a class, on average); class 1 is worst with 90.9 %."
    )
    assert f"Of {probe.fits} values" in said
    assert "6 of 60 held out, seed 0" in said


def test_a_store_in_a_line(tmp_path: Path):
    rows = unit_rows(2, 4).astype(np.float32)
    writer = StoreWriter(tmp_path / "store", teacher={"reference": "noise"}, dim=4, fields=(), num_shards=1)
    ok, captions = np.ones(2, dtype=bool), [("a",), ("b",)]
    writer.add(ShardRows("all", rows, rows, rows[:0], ok, ["a/0", "a/1"], captions, [(1, 1)] * 2, {}, []))
    writer.finish()
    store = clip_cid.EmbeddingStore.open(tmp_path / "store")
    assert repr(store) == f"EmbeddingStore({str(tmp_path / 'store')!r}: 2 rows of images and captions, 4 wide)"
