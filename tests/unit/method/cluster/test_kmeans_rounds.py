import itertools

import numpy as np
import oracles
import pytest
from mixtures import mixture

from clip_cid.method.cluster import kmeans_rounds, nearest_centers
from clip_cid.method.cluster.kmeans_rounds import DirectionSums
from clip_cid.method.unit_rows import UnitRows


def rounds_of(rows: np.ndarray, centers: np.ndarray, rounds: int) -> list[tuple[np.ndarray, dict[str, float]]]:
    images = UnitRows(rows, name="embeddings", any_length=True)
    return list(kmeans_rounds.kmeans_rounds(images, centers.astype(np.float32), rounds=rounds))


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


@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_the_size_of_blocks_changes_no_bit(block_rows, monkeypatch):
    rows = mixture(300, 10, clusters=150, noise=0.6).astype(np.float16)
    start = np.asarray(rows[:150], dtype=np.float32)
    whole = rounds_of(rows, start, 4)
    monkeypatch.setattr(kmeans_rounds, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(nearest_centers, "_CPU_BLOCK", (block_rows, 2048))
    for one, other in zip(whole, rounds_of(rows, start, 4), strict=True):
        assert one[0].tobytes() == other[0].tobytes()
        assert one[1] == other[1]


def test_rounds_after_convergence_repeat_the_last_one_without_work(monkeypatch):
    rows = mixture(60, 8, clusters=3, noise=0.05)
    calls: list[int] = []
    original = kmeans_rounds.assign_and_add
    monkeypatch.setattr(kmeans_rounds, "assign_and_add", lambda *arguments: (calls.append(1), original(*arguments)))
    rounds = rounds_of(rows, rows[:3], 30)
    assert len(rounds) == 30
    assert len(calls) < 20
    assert all(stats == rounds[-1][1] for _, stats in rounds[len(calls) - 1 :])
    np.testing.assert_array_equal(rounds[-1][0], rounds[len(calls) - 1][0])


def test_empty_centers_move_to_the_rows_farthest_from_their_centers():
    rows = np.eye(5)[[0, 0, 0, 1, 2, 3]] + 0.0
    start = np.eye(5)[[0, 4, 4]]
    (centers, stats), *_ = rounds_of(rows, start, 1)
    assert stats["empty"] == 2  # rows 3, 4 and 5 are equally far from all, so the lowest center has them
    np.testing.assert_array_equal(centers[1:], np.eye(5)[[1, 2]])


def test_sums_are_the_same_in_any_order_and_after_any_moves():
    rng = np.random.default_rng(6)
    unit = oracles.unit(rng.standard_normal((200, 7))).astype(np.float32)
    labels, before = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    straight, roundabout = DirectionSums(5, 7), DirectionSums(5, 7)
    straight.move(unit, np.full(200, -1), labels)
    for part in np.array_split(rng.permutation(200), 9):
        roundabout.move(unit[part], np.full(len(part), -1), before[part])
    roundabout.move(unit, before, labels)
    assert straight[slice(0, 5)].tobytes() == roundabout[slice(0, 5)].tobytes()
    assert straight.sizes.tolist() == roundabout.sizes.tolist() == np.bincount(labels).tolist()
    expected = np.stack([unit[labels == j].astype(np.float64).sum(axis=0) for j in range(5)])
    np.testing.assert_allclose(straight[slice(0, 5)], expected, atol=1e-7)


def test_the_objective_never_gets_worse_even_where_centers_move_to_other_rows():
    rows = np.repeat(mixture(40, 5, clusters=4, noise=0.5), 3, axis=0)
    history = [stats for _, stats in rounds_of(rows, np.repeat(rows[:1], 30, axis=0), 12)]
    assert history[0]["empty"] == 29
    assert all(later["objective"] <= sooner["objective"] + 1e-6 for sooner, later in itertools.pairwise(history))
