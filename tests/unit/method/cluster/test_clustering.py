import itertools
from typing import Any

import numpy as np
import oracles
import pytest

from clip_cid.method.cluster import clustering, nearest_centers
from clip_cid.method.cluster.clustering import assign, spherical_kmeans


def blobs(count: int, per_blob: int, dim: int, *, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(count), per_blob)
    middles = oracles.unit(rng.standard_normal((count, dim)))
    return oracles.unit(middles[truth] + noise * rng.standard_normal((len(truth), dim))), truth


def best_of_seeds(rows: np.ndarray, num_centers: int, seeds: int = 8) -> clustering.Clusters:
    runs = [spherical_kmeans(rows, num_centers=num_centers, seed=seed) for seed in range(seeds)]
    return min(runs, key=lambda run: run.objective)


def test_separable_blobs_are_found_exactly():
    rows, truth = blobs(4, 30, 16, noise=0.03)
    found = best_of_seeds(rows.astype(np.float16), 4)
    assert len({(int(a), int(b)) for a, b in zip(found.labels, truth, strict=True)}) == 4
    means = oracles.unit(np.stack([rows[truth == blob].mean(axis=0) for blob in range(4)]))
    nearest = (found.centers @ means.T).max(axis=1)
    np.testing.assert_allclose(nearest, 1, atol=1e-5)


def test_overlapping_blobs_come_out_as_well_as_from_the_textbook():
    rows, _ = blobs(8, 40, 8, noise=0.3)
    starts = [rows[np.random.default_rng(seed).choice(len(rows), 8, replace=False)] for seed in range(8)]
    textbook = [oracles.spherical_kmeans(rows, start, 20) for start in starts]
    best = min(oracles.kmeans_objective(rows, centers, labels) for centers, labels in textbook)
    assert best_of_seeds(rows, 8).objective == pytest.approx(best, rel=0.03)


def test_a_textbook_round_from_the_result_improves_nothing():
    rows, _ = blobs(5, 40, 8, noise=0.2)
    found = spherical_kmeans(rows, num_centers=5, iterations=60)
    centers, labels = oracles.spherical_kmeans(rows, found.centers, 1)
    assert found.objective == pytest.approx(oracles.kmeans_objective(rows, centers, labels), abs=1e-6)


def test_what_comes_out():
    rows, _ = blobs(5, 20, 8, noise=0.3)
    told: list[dict[str, float]] = []
    found = spherical_kmeans(rows, num_centers=5, iterations=7, on_iteration=told.append)
    assert (found.centers.dtype, found.labels.dtype) == (np.float32, np.int32)
    assert (found.centers.shape, found.labels.shape) == ((5, 8), (100,))
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-6)
    assert found.objective == pytest.approx(oracles.kmeans_objective(rows, found.centers, found.labels), abs=1e-6)
    assert found.history == told
    assert len(told) == 7
    assert told[0].keys() == {"objective", "imbalance", "empty"}
    assert told[-1]["objective"] == pytest.approx(found.objective, rel=0.01)
    assert all(later["objective"] <= sooner["objective"] + 1e-6 for sooner, later in itertools.pairwise(told))


def test_the_seed_decides():
    rows, _ = blobs(10, 30, 8, noise=0.5)
    one, again, other = (spherical_kmeans(rows, num_centers=10, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.centers, again.centers)
    np.testing.assert_array_equal(one.labels, again.labels)
    assert not np.array_equal(one.centers, other.centers)
    assert len(spherical_kmeans(rows, num_centers=2, seed=2**40).centers) == 2


def test_a_sample_trains_the_centers_but_every_row_is_assigned():
    rows, _ = blobs(3, 400, 8, noise=0.1)
    found = spherical_kmeans(rows, num_centers=3, max_points_per_center=20, seed=1)
    assert found.labels.tolist() == oracles.nearest(rows, found.centers)
    assert found.objective == pytest.approx(oracles.kmeans_objective(rows, found.centers, found.labels), abs=1e-6)
    assert not np.array_equal(found.centers, spherical_kmeans(rows, num_centers=3, seed=1).centers)


def test_few_rows_a_center_do_not_make_faiss_talk(capfd):
    spherical_kmeans(blobs(3, 4, 8, noise=0.1)[0], num_centers=5)
    assert capfd.readouterr() == ("", "")


def test_as_many_centers_as_rows_are_the_rows():
    rows, _ = blobs(6, 1, 8, noise=0.1)
    found = spherical_kmeans(rows, num_centers=6)
    assert sorted(found.labels.tolist()) == list(range(6))
    assert found.objective == pytest.approx(0, abs=1e-12)
    assert (found.empty, found.history[-1]["objective"]) == (0, 0)


def test_one_center_is_the_mean_direction():
    rows, _ = blobs(3, 10, 4, noise=0.2)
    found = spherical_kmeans(rows, num_centers=1)
    np.testing.assert_allclose(found.centers, oracles.unit(rows.mean(axis=0)[None]), atol=1e-6)
    assert set(found.labels.tolist()) == {0}


def test_more_centers_than_different_rows_leave_some_empty_and_say_so():
    rows = np.repeat(np.eye(4)[:3], 10, axis=0)
    found = spherical_kmeans(rows, num_centers=8)
    assert np.isfinite(found.centers).all()
    assert found.empty == 8 - len(np.unique(found.labels)) >= 5 - 1
    assert found.objective < 1e-5


def test_a_center_whose_rows_cancel_out_becomes_a_row():
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = spherical_kmeans(rows, num_centers=1)
    assert found.centers.tolist() == [[1, 0]]
    assert found.objective == 2


def test_rows_count_by_direction_only():
    rows, _ = blobs(4, 20, 8, noise=0.2)
    longer = rows * np.random.default_rng(0).uniform(0.1, 9, size=(len(rows), 1))
    np.testing.assert_array_equal(
        spherical_kmeans(rows, num_centers=4).labels, spherical_kmeans(longer, num_centers=4).labels
    )


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_row_without_direction_is_refused(value):
    rows, _ = blobs(2, 5, 4, noise=0.2)
    rows[7] = value
    with pytest.raises(
        ValueError, match="embeddings must have rows that are finite and not zero, but row 7 has length"
    ):
        spherical_kmeans(rows, num_centers=2)
    with pytest.raises(ValueError, match="row 7"):
        assign(rows, np.eye(4)[:2])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_centers", 0, "num_centers must be at least 1, got 0"),
        ("num_centers", 11, "num_centers must be at most the number of rows, 10, got 11"),
        ("iterations", 0, "iterations must be at least 1, got 0"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("max_points_per_center", 0, "max_points_per_center must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_their_limits_are_refused(name, value, message):
    arguments: dict[str, Any] = {"num_centers": 2, name: value}
    with pytest.raises(ValueError, match=message):
        spherical_kmeans(blobs(2, 5, 4, noise=0.2)[0], **arguments)


def test_assignment_over_many_blocks_of_centers_is_the_slow_one(monkeypatch):
    rows, _ = blobs(5, 10, 6, noise=0.8)
    centers, _ = blobs(40, 1, 6, noise=0.8, seed=1)
    monkeypatch.setattr(nearest_centers, "_CENTER_BLOCK", 7)
    monkeypatch.setattr(nearest_centers, "_PAIRS", 5)
    labels, cosines = assign(rows, centers, block_rows=9)
    assert labels.tolist() == oracles.nearest(rows, centers)
    np.testing.assert_allclose(cosines, (rows * centers[labels]).sum(axis=1), atol=1e-14)


def test_of_equally_near_centers_the_lowest_is_taken_across_blocks(monkeypatch):
    rows, _ = blobs(4, 5, 6, noise=0.1)
    centers = np.concatenate([np.eye(6)[:2], rows[::5], rows[::5], rows[::5][::-1]])
    monkeypatch.setattr(nearest_centers, "_CENTER_BLOCK", 3)
    labels, _ = assign(rows, centers)
    assert labels.tolist() == oracles.nearest(rows, centers)
    assert labels.max() < 6


@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_centers_that_float32_cannot_tell_apart_are_told_apart(block_rows):
    dim = 256
    rng = np.random.default_rng(2)
    rows = oracles.unit(rng.standard_normal((64, dim)))
    away = oracles.unit(rng.standard_normal((64, dim)))
    centers = oracles.unit(np.concatenate([rows + 0.1 * away, rows + 0.1 * (1 - 1e-6) * away]))
    labels, _ = assign(rows, centers, block_rows=block_rows)
    assert labels.tolist() == list(range(64, 128))


def test_centers_of_another_width_or_length_are_refused():
    with pytest.raises(ValueError, match="centers must have the width 4 of embeddings, got 3"):
        assign(np.eye(4), np.eye(3))
    with pytest.raises(ValueError, match="centers must have rows that are of length 1"):
        assign(np.eye(4), 2 * np.eye(4))
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        assign(np.eye(4), np.eye(4), block_rows=0)
