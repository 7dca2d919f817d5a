import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.figures import cluster_sizes


def test_the_top_percent_is_at_least_one_cluster() -> None:
    assert cluster_sizes.top_share(np.array([6, 2, 2])) == pytest.approx(0.6)
    assert cluster_sizes.top_share(np.r_[50, 30, np.full(198, 1)]) == pytest.approx(80 / 278)


def test_empty_clusters_are_counted() -> None:
    assert cluster_sizes.count(np.array([2, 2, 0]), 4).tolist() == [1, 0, 2, 0]
    assert cluster_sizes.describe(np.array([1, 0, 2, 0]))["empty"] == 2


@given(st.integers(1, 2_000_000))
def test_ranks_run_from_first_to_last_without_repeats(clusters: int) -> None:
    ranks = cluster_sizes.ranks_to_draw(clusters)
    assert (ranks[0], ranks[-1]) == (1, clusters)
    assert (np.diff(ranks) > 0).all()
    assert len(ranks) <= 400


def test_the_csv_holds_the_sorted_sizes_that_are_drawn(tmp_path: Path) -> None:
    before, after = np.array([3, 9, 0, 4]), np.array([3, 2, 0, 1])
    cluster_sizes.draw({"before": before, "after": after}, tmp_path)
    with open(tmp_path / "cluster_sizes.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [int(line["before"]) for line in lines] == [9, 4, 3, 0]
    assert [int(line["after"]) for line in lines] == [3, 2, 1, 0]
    assert [int(line["rank"]) for line in lines] == [1, 2, 3, 4]
    svg = (tmp_path / "cluster_sizes.svg").read_text()
    assert f"before: Gini {_gini([3, 9, 0, 4]):.3f}, 56.2 % in the largest<" in svg
    assert f"after: Gini {_gini([3, 2, 0, 1]):.3f}, 50.0 % in the largest<" in svg
    cluster_sizes.draw({"all": np.array([2] * 98 + [4] * 2)}, tmp_path)  # one of a hundred is 1 %
    assert f"{400 / 204:.1f} % in the largest 1 %" in (tmp_path / "cluster_sizes.svg").read_text()


def _gini(sizes: list[int]) -> float:
    """Mean difference between two clusters, over twice the mean size."""
    differences = [abs(a - b) for a in sizes for b in sizes]
    return sum(differences) / len(differences) / (2 * sum(sizes) / len(sizes))


def test_one_cluster_can_be_drawn(tmp_path: Path) -> None:
    assert cluster_sizes.draw({"all": np.array([7])}, tmp_path)["all"]["gini"] == 0
