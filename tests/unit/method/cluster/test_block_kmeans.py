import itertools
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import processes
import pytest
import torch

from clip_cid.method.cluster import block_kmeans
from clip_cid.method.cluster.block_kmeans import DirectionSums, block_rounds, two_level_start
from clip_cid.method.cluster.clustering import Training, spherical_kmeans
from clip_cid.method.unit_rows import Rows, UnitRows


def mixture(rows: int, dim: int, *, clusters: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middles = oracles.unit(rng.standard_normal((clusters, dim)))
    return oracles.unit(middles[rng.integers(0, clusters, rows)] + noise * rng.standard_normal((rows, dim)))


def images(rows: np.ndarray) -> UnitRows:
    return UnitRows(rows, name="embeddings", any_length=True)


def rounds_of(rows: np.ndarray, centers: np.ndarray, rounds: int, **options: Any) -> list[tuple[np.ndarray, dict]]:
    return list(block_rounds(images(rows), centers.astype(np.float32), rounds=rounds, **options))


def clustered(rows: Rows, num_centers: int, **options: Any):
    return spherical_kmeans(rows, num_centers=num_centers, algorithm="blocks", **options)


def test_rounds_are_those_of_the_textbook():
    rows = mixture(400, 12, clusters=9, noise=0.4)
    start = rows[:9].astype(np.float32)
    for count, (centers, stats) in enumerate(rounds_of(rows, start, 6), start=1):
        textbook, _ = oracles.spherical_kmeans(rows, start, count)
        np.testing.assert_allclose(centers, textbook, atol=1e-6)
        before, labels = oracles.spherical_kmeans(rows, start, count - 1)
        assert stats["objective"] == pytest.approx(oracles.kmeans_objective(rows, before, labels), abs=1e-6)
        sizes = np.bincount(labels, minlength=9)
        assert stats["imbalance"] == pytest.approx(9 * (sizes**2).sum() / 400**2)
        assert stats["empty"] == 0


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_the_size_of_blocks_changes_no_bit(block_rows):
    rows = mixture(300, 10, clusters=150, noise=0.6).astype(np.float16)
    start = np.asarray(rows[:150], dtype=np.float32)
    for one, other in zip(rounds_of(rows, start, 4), rounds_of(rows, start, 4, block_rows=block_rows), strict=True):
        assert one[0].tobytes() == other[0].tobytes()
        assert one[1] == other[1]


def test_the_number_of_threads_changes_no_bit():
    rows = mixture(3000, 32, clusters=50, noise=0.5).astype(np.float16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(clustered(rows, 130, iterations=4))
    finally:
        torch.set_num_threads(before)
    assert found[0].centers.tobytes() == found[1].centers.tobytes()
    assert found[0].labels.tobytes() == found[1].labels.tobytes()
    assert found[0].history == found[1].history


def test_the_seed_decides():
    rows = mixture(500, 8, clusters=10, noise=0.5)
    one, again, other = (clustered(rows, 70, seed=seed, iterations=3) for seed in (3, 3, 4))
    assert one.centers.tobytes() == again.centers.tobytes()
    assert one.labels.tobytes() == again.labels.tobytes()
    assert one.centers.tobytes() != other.centers.tobytes()


@pytest.mark.parametrize("num_centers", [9, 100])
def test_it_comes_out_as_well_as_faiss(num_centers):
    rows = mixture(2000, 16, clusters=100, noise=0.25).astype(np.float32)
    ours = [clustered(rows, num_centers, seed=seed).objective for seed in range(3)]
    theirs = [spherical_kmeans(rows, num_centers=num_centers, seed=seed).objective for seed in range(3)]
    assert np.mean(ours) <= np.mean(theirs) * 1.02


@pytest.mark.parametrize("algorithm", ["faiss", "blocks"])
@pytest.mark.parametrize("num_centers", [5, 70])
def test_going_on_from_any_round_ends_at_the_same_bits(algorithm, num_centers):
    rows = mixture(400, 8, clusters=20, noise=0.5).astype(np.float16)
    states: list[Training] = []
    settings: dict[str, Any] = {"num_centers": num_centers, "iterations": 6, "algorithm": algorithm, "seed": 2}
    whole = spherical_kmeans(rows, **settings, on_state=states.append)
    assert [len(state.history) for state in states] == list(range(0 if algorithm == "blocks" else 1, 7))
    for state in states:
        told: list[dict[str, float]] = []
        again = spherical_kmeans(rows, **settings, start=state, on_iteration=told.append)
        assert again.centers.tobytes() == whole.centers.tobytes()
        assert again.labels.tobytes() == whole.labels.tobytes()
        assert again.history == whole.history
        assert told == whole.history[len(state.history) :]


def test_a_start_of_other_sizes_is_refused():
    rows = mixture(50, 8, clusters=3, noise=0.2)
    with pytest.raises(ValueError, match=r"start must have centers of shape \(4, 8\), got \(3, 8\)"):
        clustered(rows, 4, start=Training(np.eye(8, dtype=np.float32)[:3]))
    done = Training(np.eye(8, dtype=np.float32)[:4], [{"objective": 1.0}] * 3)
    with pytest.raises(ValueError, match="start must have done at most 2 iterations, got 3"):
        clustered(rows, 4, iterations=2, start=done)


def test_rounds_after_nothing_changes_are_the_last_one_again(monkeypatch):
    rows = mixture(60, 8, clusters=3, noise=0.05)
    looked: list[int] = []
    original = block_kmeans._assign_and_add
    monkeypatch.setattr(block_kmeans, "_assign_and_add", lambda *given: (looked.append(1), original(*given)))
    found = rounds_of(rows, rows[:3], 30)
    assert len(found) == 30
    assert len(looked) < 20
    assert all(stats == found[-1][1] for _, stats in found[len(looked) - 1 :])
    np.testing.assert_array_equal(found[-1][0], found[len(looked) - 1][0])


@pytest.mark.parametrize("num_centers", [60, 90, 100])
def test_heavy_duplicates_with_nearly_as_many_centers_as_rows(num_centers):
    """30 different rows, one of them 71 times: at most 30 clusters have rows, and each row gets its own direction."""
    different = oracles.unit(np.random.default_rng(0).standard_normal((30, 6))).astype(np.float32)
    rows = np.concatenate([different, np.repeat(different[:1], 70, axis=0)])
    found = clustered(rows, num_centers)
    assert np.isfinite(found.centers).all()
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-6)
    assert found.objective < 1e-6
    assert found.empty == num_centers - 30
    assert found.history[-1]["empty"] == num_centers - 30


def test_empty_centers_go_to_the_rows_served_worst():
    rows = np.eye(5)[[0, 0, 0, 1, 2, 3]] + 0.0
    start = np.eye(5)[[0, 4, 4]]
    (centers, stats), *_ = rounds_of(rows, start, 1)
    assert stats["empty"] == 2  # rows 3, 4 and 5 are equally far from all, so the lowest center has them
    np.testing.assert_array_equal(centers[1:], np.eye(5)[[1, 2]])


def test_a_center_whose_rows_cancel_out_becomes_a_row():
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = clustered(rows, 1, iterations=3)
    assert np.abs(found.centers).tolist() == [[1, 0]]
    assert found.objective == 2
    assert [entry["empty"] for entry in found.history] == [1, 1, 1]


def test_as_many_centers_as_rows_are_the_rows():
    rows = oracles.unit(np.random.default_rng(1).standard_normal((80, 5)))
    found = clustered(rows, 80)
    assert sorted(found.labels.tolist()) == list(range(80))
    assert found.objective == pytest.approx(0, abs=1e-12)


def test_a_memory_map_of_float16_is_read_in_blocks_only(tmp_path):
    rows = mixture(700, 16, clusters=70, noise=0.3).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)

    class Watched:
        shape = rows.shape
        largest = 0

        def __getitem__(self, index):
            found = np.load(tmp_path / "rows.npy", mmap_mode="r")[index]
            Watched.largest = max(Watched.largest, len(found))
            return found

    found = clustered(Watched(), 70, iterations=2)
    assert Watched.largest <= 4096
    whole = clustered(rows, 70, iterations=2)
    assert found.centers.tobytes() == whole.centers.tobytes()


def anonymous() -> float:
    """Memory of this process that is no file's, in MB."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def memory_taken(path: Path) -> float:
    """At the most, while the rows of a file are clustered."""
    spherical_kmeans(np.eye(64, dtype=np.float32), num_centers=8, algorithm="blocks", iterations=1)
    rows, before = np.load(path, mmap_mode="r"), anonymous()
    peak = before

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    spherical_kmeans(rows, num_centers=40, algorithm="blocks", iterations=2, max_points_per_center=4000)
    return peak - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """140 MB as float16, of which FAISS would hold 280 MB."""
    out = np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.float16, shape=(140_000, 512))
    some = np.random.default_rng(0).standard_normal((10_000, 512), dtype=np.float32)
    for start in range(0, len(out), 10_000):
        out[start : start + 10_000] = some
    out.flush()
    assert processes.result(memory_taken, tmp_path / "rows.npy") < 200


def test_the_start_gives_each_group_its_share_of_the_centers():
    rows = np.concatenate([mixture(900, 6, clusters=1, noise=0.1), -mixture(100, 6, clusters=1, noise=0.1)])
    centers = two_level_start(images(rows), 100, seed=0)
    assert centers.shape == (100, 6)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-6)
    assert 80 <= (oracles.unit(centers) @ rows[0] > 0).sum() <= 95
    assert two_level_start(images(rows), 100, seed=0).tobytes() == centers.tobytes()
    assert two_level_start(images(rows), 100, seed=1).tobytes() != centers.tobytes()


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [([5, 3, 2], 10, [5, 3, 2]), ([50, 30, 20], 10, [5, 3, 2]), ([7, 0, 1], 1, [1, 0, 0]), ([3, 3, 3], 4, [2, 1, 1])],
)
def test_shares_add_up_and_no_group_gets_more_centers_than_rows(sizes, total, expected):
    assert block_kmeans._shares(np.array(sizes), total).tolist() == expected


def test_sums_are_the_same_in_any_order_and_after_any_moves():
    rng = np.random.default_rng(6)
    unit = oracles.unit(rng.standard_normal((200, 7))).astype(np.float32)
    labels, before = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    straight, roundabout = DirectionSums(5, 7), DirectionSums(5, 7)
    straight.move(unit, np.full(200, -1), labels)
    for some in np.array_split(rng.permutation(200), 9):
        roundabout.move(unit[some], np.full(len(some), -1), before[some])
    roundabout.move(unit, before, labels)
    assert straight[slice(0, 5)].tobytes() == roundabout[slice(0, 5)].tobytes()
    assert straight.sizes.tolist() == roundabout.sizes.tolist() == np.bincount(labels).tolist()
    expected = np.stack([unit[labels == j].astype(np.float64).sum(axis=0) for j in range(5)])
    np.testing.assert_allclose(straight[slice(0, 5)], expected, atol=1e-7)


def test_the_objective_never_gets_worse_even_where_centers_are_put_elsewhere():
    rows = np.repeat(mixture(40, 5, clusters=4, noise=0.5), 3, axis=0)
    history = [stats for _, stats in rounds_of(rows, np.repeat(rows[:1], 30, axis=0), 12)]
    assert history[0]["empty"] == 29
    assert all(later["objective"] <= sooner["objective"] + 1e-6 for sooner, later in itertools.pairwise(history))
