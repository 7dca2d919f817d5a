import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from clip_cid.figures import embedding_map


@given(st.lists(st.integers(0, 20), min_size=1, max_size=200), st.integers(30, 150), st.integers(0, 9))
def test_the_sample_has_its_size_and_half_of_it_is_for_the_largest_clusters(
    labels: list[int], images: int, seed: int
) -> None:
    found = embedding_map.choose(np.array(labels), images=images, seed=seed)
    places = found.places.tolist()
    assert places == sorted(set(places))
    assert len(places) == min(images, len(labels))
    sizes = sorted((labels.count(label) for label in set(labels)), reverse=True)[:6]
    assert list(found.clusters.values()) == sizes
    for cluster, size in found.clusters.items():
        assert labels.count(cluster) == size
        assert sum(labels[place] == cluster for place in places) >= min(size, images // 12)


def test_the_sample_is_drawn_by_the_seed_alone() -> None:
    labels = np.random.default_rng(0).integers(0, 50, 1000)
    first, again, other = (embedding_map.choose(labels, images=100, seed=seed).places for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    return 5 * random.standard_normal((3, 16))[labels] + random.standard_normal((90, 16)), labels


def test_groups_stay_groups_on_the_map(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    embeddings, labels = blobs
    points = embedding_map.lay_out(embeddings.astype(np.float16), seed=0)
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag(np.full(90, np.inf))
    assert (labels[distances.argmin(axis=1)] == labels).all()


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    found = []
    for threads in (1, 3):
        with threadpool_limits(threads):
            found.append(embedding_map.lay_out(blobs[0], seed=3))
    assert (found[0] == found[1]).all()


def test_a_handful_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 30 images, got 29"):
        embedding_map.lay_out(np.ones((29, 4)), seed=0)


def test_the_csv_holds_every_point(tmp_path: Path) -> None:
    points = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)
    labels = np.arange(40) % 8
    summary = embedding_map.draw(points, np.arange(100, 140), labels, {3: 50, 5: 20}, tmp_path)
    assert summary["images"] == 40
    assert summary["clusters"] == [
        {"cluster": 3, "images": 50, "shown": 5},
        {"cluster": 5, "images": 20, "shown": 5},
    ]
    with open(tmp_path / "embedding_map.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [int(line["row"]) for line in lines] == list(range(100, 140))
    assert [[float(line["x"]), float(line["y"])] for line in lines] == points.tolist()
    assert [int(line["cluster"]) for line in lines] == labels.tolist()
