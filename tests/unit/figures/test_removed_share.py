import csv
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from clip_cid.figures import removed_share
from clip_cid.method.balance.forest import Forest
from clip_cid.method.distances import Metric, threshold_on

FOREST = Forest(10, np.array([0, 2, 4, 6]), np.array([1, 3, 5, 7]), np.array([0.0, 0.1, 0.14, 0.2]), 0.24)


def table(out: Path) -> dict[str, np.ndarray]:
    with open(out / "removed_share.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    return {name: np.array([float(line[name]) for line in lines]) for name in lines[0]}


@pytest.mark.slow
@pytest.mark.parametrize("metric", get_args(Metric))
def test_the_curve_is_the_share_that_each_threshold_removes(metric: Metric, tmp_path: Path) -> None:
    threshold = threshold_on("squared_euclidean", 0.14, metric) * (1 + 1e-12)
    numbers = removed_share.draw(FOREST, threshold=threshold, metric=metric, out=tmp_path)
    curve = table(tmp_path)
    assert numbers["share"] == 0.3
    assert numbers["limit"] == pytest.approx(threshold_on("squared_euclidean", 0.24, metric))
    assert curve["removed_share"][0] == 0.1  # exact duplicates go at any threshold
    assert curve["removed_share"][-1] == 0.4
    for squared, share in zip(curve["squared_euclidean"], curve["removed_share"], strict=True):
        assert share == FOREST.removed_share(min(squared, FOREST.limit))
    for name in get_args(Metric):
        at = curve[name][1:]
        others = [threshold_on("squared_euclidean", squared, name) for squared in curve["squared_euclidean"][1:]]
        np.testing.assert_allclose(at, others, rtol=1e-12)


def test_thresholds_nearby_are_told_up_to_the_limit(tmp_path: Path) -> None:
    numbers = removed_share.draw(FOREST, threshold=0.1, metric="cosine", out=tmp_path)
    shares = {round(one["threshold"], 3): one["share"] for one in numbers["nearby"]}
    assert shares == {0.08: 0.3, 0.09: 0.3, 0.1: 0.4, 0.11: 0.4, 0.12: 0.4}
    numbers = removed_share.draw(FOREST, threshold=0.12, metric="cosine", out=tmp_path)
    assert [round(one["threshold"], 3) for one in numbers["nearby"]] == [0.096, 0.108, 0.12]


def test_the_graph_names_the_threshold_and_all_three_scales(tmp_path: Path) -> None:
    removed_share.draw(FOREST, threshold=0.07, metric="cosine", out=tmp_path)
    text = (tmp_path / "removed_share.svg").read_text()
    assert "0.07: 30.0 %" in text
    for words in ("threshold, cosine distance", "squared euclidean distance", "euclidean distance"):
        assert f">{words}<" in text


def test_a_forest_without_links_is_a_flat_line(tmp_path: Path) -> None:
    none = np.zeros(0, dtype=np.int64)
    empty = Forest(5, none, none, np.zeros(0), 0.2)
    numbers = removed_share.draw(empty, threshold=0.07, metric="euclidean", out=tmp_path)
    assert numbers["share"] == 0
    assert not table(tmp_path)["removed"].any()
