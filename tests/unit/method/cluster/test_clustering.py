import itertools
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import oracles
import processes
import pytest
import torch
from mixtures import mixture

from clip_cid.method.cluster import clustering, nearest_centers
from clip_cid.method.cluster.clustering import KMeansState, assign, spherical_kmeans


def by_faiss(rows: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
    """The centers of another implementation, and Eq. 1 with them."""
    rows = rows.astype(np.float32)
    kmeans = faiss.Kmeans(rows.shape[1], len(start), niter=iterations, spherical=True, min_points_per_centroid=1)
    kmeans.train(rows, init_centroids=start.astype(np.float32))
    assert kmeans.centroids is not None
    centers = oracles.unit(kmeans.centroids)
    return centers, oracles.kmeans_objective(rows, centers, (oracles.unit(rows) @ centers.T).argmax(axis=1))


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
    states: list[KMeansState] = []
    found = spherical_kmeans(rows, num_centers=5, iterations=7, on_state=states.append)
    assert (found.centers.dtype, found.labels.dtype) == (np.float32, np.int32)
    assert (found.centers.shape, found.labels.shape) == ((5, 8), (100,))
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-6)
    assert found.objective == pytest.approx(oracles.kmeans_objective(rows, found.centers, found.labels), abs=1e-6)
    assert found.history == states[-1].history
    assert [len(state.history) for state in states] == list(range(8))
    assert found.history[0].keys() == {"objective", "imbalance", "empty"}
    assert found.history[-1]["objective"] == pytest.approx(found.objective, rel=0.01)
    assert all(later["objective"] <= sooner["objective"] + 1e-6 for sooner, later in itertools.pairwise(found.history))


def test_from_the_same_rows_it_comes_to_the_centers_of_faiss():
    rows = mixture(1000, 16, clusters=40, noise=0.2).astype(np.float32)
    found = spherical_kmeans(rows, num_centers=30, iterations=5, start=KMeansState(rows[:30]))
    centers, objective = by_faiss(rows, rows[:30], 5)
    assert found.empty == 0
    np.testing.assert_allclose(found.centers, centers, atol=1e-5)
    assert found.objective == pytest.approx(objective, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.15, 0.5, 100])
@pytest.mark.parametrize("num_centers", [9, 70, 400, 950])
def test_the_objective_is_as_low_as_that_of_faiss(num_centers, noise):
    """Clear clusters, weak ones and none; many rows for a center and few."""
    rows = mixture(1000, 16, clusters=50, noise=noise).astype(np.float32)
    ours, theirs = [], []
    for seed in range(3):
        start = rows[np.random.default_rng(seed).choice(1000, num_centers, replace=False)]
        ours.append(spherical_kmeans(rows, num_centers=num_centers, seed=seed).objective)
        theirs.append(by_faiss(rows, start, 20)[1])
    assert np.mean(ours) <= np.mean(theirs) * 1.02


@pytest.mark.parametrize("num_centers", [10, 70])
def test_the_seed_decides(num_centers):
    rows = mixture(500, 8, clusters=10, noise=0.5)
    one, again, other = (spherical_kmeans(rows, num_centers=num_centers, seed=seed, iterations=3) for seed in (3, 3, 4))
    assert one.centers.tobytes() == again.centers.tobytes()
    assert one.labels.tobytes() == again.labels.tobytes()
    assert one.centers.tobytes() != other.centers.tobytes()
    assert len(spherical_kmeans(rows, num_centers=2, seed=2**40).centers) == 2


def test_the_number_of_threads_changes_no_bit():
    rows = mixture(3000, 32, clusters=50, noise=0.5).astype(np.float16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(spherical_kmeans(rows, num_centers=130, iterations=4))
    finally:
        torch.set_num_threads(before)
    assert found[0].centers.tobytes() == found[1].centers.tobytes()
    assert found[0].labels.tobytes() == found[1].labels.tobytes()
    assert found[0].history == found[1].history


@pytest.mark.parametrize("num_centers", [5, 70])
def test_resumed_after_any_round_it_ends_at_the_same_bits(num_centers):
    rows = mixture(400, 8, clusters=20, noise=0.5).astype(np.float16)
    states: list[KMeansState] = []
    settings: dict[str, Any] = {"num_centers": num_centers, "iterations": 6, "seed": 2}
    whole = spherical_kmeans(rows, **settings, on_state=states.append)
    assert [len(state.history) for state in states] == list(range(7))
    for state in states:
        later: list[KMeansState] = []
        again = spherical_kmeans(rows, **settings, start=state, on_state=later.append)
        assert again.centers.tobytes() == whole.centers.tobytes()
        assert again.labels.tobytes() == whole.labels.tobytes()
        assert again.history == whole.history
        assert [len(each.history) for each in later] == list(range(len(state.history) + 1, 7))


def test_a_start_of_other_sizes_is_refused():
    rows = mixture(50, 8, clusters=3, noise=0.2)
    with pytest.raises(ValueError, match=r"start must have centers of shape \(4, 8\), got \(3, 8\)"):
        spherical_kmeans(rows, num_centers=4, start=KMeansState(np.eye(8, dtype=np.float32)[:3]))
    finished = KMeansState(np.eye(8, dtype=np.float32)[:4], [{"objective": 1.0}] * 3)
    with pytest.raises(ValueError, match="start must have done at most 2 iterations, got 3"):
        spherical_kmeans(rows, num_centers=4, iterations=2, start=finished)


def test_a_sample_trains_the_centers_but_every_row_is_assigned():
    rows, _ = blobs(3, 400, 8, noise=0.1)
    found = spherical_kmeans(rows, num_centers=3, max_points_per_center=20, seed=1)
    assert found.labels.tolist() == oracles.nearest(rows, found.centers)
    assert found.objective == pytest.approx(oracles.kmeans_objective(rows, found.centers, found.labels), abs=1e-6)
    assert not np.array_equal(found.centers, spherical_kmeans(rows, num_centers=3, seed=1).centers)


def test_few_rows_a_center_print_nothing(capfd):
    spherical_kmeans(blobs(3, 4, 8, noise=0.1)[0], num_centers=5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("rows", "dim"), [(6, 8), (80, 5)])
def test_as_many_centers_as_rows_are_the_rows(rows, dim):
    points = oracles.unit(np.random.default_rng(1).standard_normal((rows, dim)))
    found = spherical_kmeans(points, num_centers=rows)
    assert sorted(found.labels.tolist()) == list(range(rows))
    assert found.objective == pytest.approx(0, abs=1e-12)
    assert (found.empty, found.history[-1]["objective"]) == (0, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("num_centers", [60, 90, 100])
def test_heavy_duplicates_with_nearly_as_many_centers_as_rows(num_centers):
    """30 different rows, one of them 71 times: at most 30 clusters have rows, and each row gets its own direction."""
    different = oracles.unit(np.random.default_rng(0).standard_normal((30, 6))).astype(np.float32)
    rows = np.concatenate([different, np.repeat(different[:1], 70, axis=0)])
    found = spherical_kmeans(rows, num_centers=num_centers)
    assert np.isfinite(found.centers).all()
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-6)
    assert found.objective < 1e-6
    assert found.empty == num_centers - 30
    assert found.history[-1]["empty"] == num_centers - 30


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
    found = spherical_kmeans(rows, num_centers=1, iterations=3)
    assert np.abs(found.centers).tolist() == [[1, 0]]
    assert found.objective == 2
    assert [entry["empty"] for entry in found.history] == [1, 1, 1]


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
    monkeypatch.setattr(nearest_centers, "_CPU_BLOCK", (1024, 7))
    monkeypatch.setattr(nearest_centers, "_PAIRS", 5)
    labels, cosines = assign(rows, centers, block_rows=9)
    assert labels.tolist() == oracles.nearest(rows, centers)
    np.testing.assert_allclose(cosines, (rows * centers[labels]).sum(axis=1), atol=1e-14)


def test_of_equally_near_centers_the_lowest_is_taken_across_blocks(monkeypatch):
    rows, _ = blobs(4, 5, 6, noise=0.1)
    centers = np.concatenate([np.eye(6)[:2], rows[::5], rows[::5], rows[::5][::-1]])
    monkeypatch.setattr(nearest_centers, "_CPU_BLOCK", (1024, 3))
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


def test_a_memory_map_of_float16_is_read_in_blocks_only(tmp_path):
    rows = mixture(700, 16, clusters=70, noise=0.3).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)

    class Watched:
        shape = rows.shape
        largest = 0

        def __getitem__(self, index):
            block = np.load(tmp_path / "rows.npy", mmap_mode="r")[index]
            Watched.largest = max(Watched.largest, len(block))
            return block

    found = spherical_kmeans(Watched(), num_centers=70, iterations=2)
    assert Watched.largest <= 4096
    whole = spherical_kmeans(rows, num_centers=70, iterations=2)
    assert found.centers.tobytes() == whole.centers.tobytes()


def anonymous() -> float:
    """Memory of this process that is no file's, in MB."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def memory_taken(path: Path) -> float:
    """At the most, while the rows of a file are clustered."""
    spherical_kmeans(np.eye(64, dtype=np.float32), num_centers=8, iterations=1)
    rows, before = np.load(path, mmap_mode="r"), anonymous()
    peak = before

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    spherical_kmeans(rows, num_centers=40, iterations=2, max_points_per_center=4000)
    return peak - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """140 MB as float16; k-means in memory would hold 280 MB of float32."""
    out = np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.float16, shape=(140_000, 512))
    some = np.random.default_rng(0).standard_normal((10_000, 512), dtype=np.float32)
    for start in range(0, len(out), 10_000):
        out[start : start + 10_000] = some
    out.flush()
    assert processes.result(memory_taken, tmp_path / "rows.npy") < 200
