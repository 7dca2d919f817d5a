import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.report import galleries
from clip_cid.report.drawing import cluster_strips
from clip_cid.report.thumbnails import Thumbnails


@given(st.lists(st.integers(0, 14), min_size=1, max_size=60))
def test_no_cluster_is_shown_twice_and_none_is_empty(labels: list[int]) -> None:
    random = np.random.default_rng(0)
    kept = np.sort(random.choice(100, size=len(labels), replace=False))
    embeddings = random.standard_normal((100, 4))
    centers = random.standard_normal((15, 4))
    strips = cluster_strips.choose(embeddings, kept, np.array(labels), centers)
    assert len({strip.cluster for strip in strips}) == len(strips)
    assert len(strips) == min(9, len(set(labels)))
    for strip in strips:
        assert strip.size == labels.count(strip.cluster)
        assert set(strip.rows.tolist()) <= set(kept[np.array(labels) == strip.cluster].tolist())
        assert (np.diff(strip.cosines) <= 0).all()


@pytest.mark.parametrize(
    ("clusters", "median", "smallest"),
    [
        (3, [], []),
        (4, [], [1]),
        (6, [], [3, 2, 1]),
        (7, [4], [3, 2, 1]),
        (9, [6, 5, 4], [3, 2, 1]),
        (13, [8, 7, 6], [3, 2, 1]),
    ],
)
def test_the_smallest_of_few_clusters_are_not_called_median(
    clusters: int, median: list[int], smallest: list[int]
) -> None:
    labels = np.repeat(np.arange(clusters), np.arange(clusters, 0, -1))  # of sizes n, n - 1, ..., 1
    rows = np.random.default_rng(0).standard_normal((len(labels), 4))
    strips = cluster_strips.choose(rows, np.arange(len(labels)), labels, rows[:clusters])
    found = {name: [strip.size for strip in strips if strip.stratum == name] for name in cluster_strips.STRATA}
    assert found == {"largest": [clusters, clusters - 1, clusters - 2], "median": median, "smallest": smallest}


def on_a_circle(images: int) -> cluster_strips.ClusterStrip:
    angles = np.deg2rad(np.arange(0, 4 * images, 4))
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.zeros(images, dtype=np.int32)
    (strip,) = cluster_strips.choose(embeddings, np.arange(images), labels, np.array([[1.0, 0.0]]))
    assert strip.cosines == pytest.approx(np.cos(angles[strip.rows]))
    return strip


def test_the_images_nearest_the_center_are_shown_and_the_farthest() -> None:
    strip = on_a_circle(15)
    assert strip.rows.tolist() == strip.places.tolist() == [0, 1, 2, 3, 4, 5, 11, 12, 13, 14]
    assert strip.gap == 6


def test_a_small_cluster_is_shown_whole_without_a_gap() -> None:
    strip = on_a_circle(10)
    assert strip.rows.tolist() == strip.places.tolist() == list(range(10))
    assert strip.gap is None


def test_the_table_says_which_place_an_image_has(tmp_path: Path) -> None:
    words = {row: f"k{row}" for row in range(15)}
    cluster_strips.write_table([on_a_circle(15)], words, words, tmp_path / "clusters.csv")
    with open(tmp_path / "clusters.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [int(line["place"]) for line in lines] == [*range(6), *range(11, 15)]
    (gallery,) = galleries.clusters(tmp_path / "clusters.csv", Thumbnails(None, side=0, budget=0))
    assert [picture.apart for picture in gallery.pictures] == [place == 6 for place in range(10)]
    assert gallery.more == 5


def test_the_most_frequent_class_of_a_cluster_and_its_share_reach_the_page(tmp_path: Path) -> None:
    """Row 3 is not kept, row 4 has no class: of three known ones in cluster 0 two are cats; cluster 1 has a tie."""
    classes = np.array([1, 2, 1, 2, -1, 3, 0, -1]), ["ant", "cat", "dog", "owl"]
    kept = np.array([0, 1, 2, 4, 5, 6, 7])
    strips = cluster_strips.choose(np.ones((8, 2)), kept, np.array([0, 0, 0, 0, 1, 1, 2]), np.ones((3, 2)), classes)
    assert {strip.cluster: strip.common for strip in strips} == {0: ("cat", 2 / 3), 1: ("ant", 0.5), 2: None}
    words = dict.fromkeys(range(8), "w")
    cluster_strips.write_table(strips, words, words, tmp_path / "clusters.csv")
    shown = galleries.clusters(tmp_path / "clusters.csv", Thumbnails(None, side=0, budget=0))
    assert [gallery.common for gallery in shown] == [("cat", pytest.approx(2 / 3)), ("ant", 0.5), None]


def test_largest_and_smallest_are_what_they_say() -> None:
    counts = [5, 1, 9, 2, 8, 3, 7, 4, 6, 10]
    labels = np.repeat(np.arange(10), counts)
    ones = np.ones((len(labels), 2))
    strips = cluster_strips.choose(ones, np.arange(len(labels)), labels, np.ones((10, 2)))
    sizes = {stratum: [s.size for s in strips if s.stratum == stratum] for stratum in cluster_strips.STRATA}
    assert sizes == {"largest": [10, 9, 8], "median": [7, 6, 5], "smallest": [3, 2, 1]}
