import numpy as np
import oracles
import pytest

from clip_cid.method import semantic_balance
from clip_cid.method.semantic_balance import Balance, agreement, balance, threshold_on
from clip_cid.method.union_find import UnionFind


def on_circle(degrees: list[float]) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def planted(sets: int, per_set: int, dim: int, *, noise: float, seed: int = 0) -> np.ndarray:
    """Shuffled near-duplicates; the set of row i is its value in `truth`."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(oracles.unit(rng.standard_normal((sets, dim))), per_set, axis=0)
    return oracles.unit(rows + noise * rng.standard_normal(rows.shape))[rng.permutation(len(rows))]


def test_near_images_join_and_far_ones_do_not():
    found = balance(on_circle([0, 1, 90, 91, 180]), threshold=2e-4)  # 1 - cos(1 degree) = 1.52e-4
    assert found.set_of.tolist() == [0, 0, 1, 1, 2]
    assert found.kept.tolist() == [0, 2, 4]
    assert found.removed_share == pytest.approx(0.4)
    assert (found.kept.dtype, found.set_of.dtype) == (np.int64, np.int64)
    assert (found.threshold, found.metric) == (2e-4, "cosine")


def test_a_chain_of_near_images_is_one_set_that_keeps_its_middle():
    found = balance(on_circle([0, 1, 2, 3, 4]), threshold=2e-4)
    assert found.kept.tolist() == [2]
    assert found.set_of.tolist() == [0] * 5


@pytest.mark.parametrize("metric", ["cosine", "squared_euclidean", "euclidean"])
def test_the_threshold_is_on_the_scale_of_its_metric(metric):
    rows = on_circle([0, 20, 45])
    near = oracles.distance(rows[0], rows[1], metric)
    assert len(balance(rows, threshold=near * 0.999, metric=metric).kept) == 3
    assert len(balance(rows, threshold=near * 1.001, metric=metric).kept) == 2


def test_two_equally_near_images_are_decided_by_their_caption_then_by_their_row():
    images = on_circle([0, 2, 90, 92])
    texts = on_circle([1, 1, 89, 92])
    assert balance(images, threshold=1e-3).kept.tolist() == [0, 2]
    assert balance(images, threshold=1e-3, text_embeddings=texts).kept.tolist() == [0, 3]


def test_a_better_caption_does_not_beat_a_nearer_image():
    images = on_circle([0, 1, 2])
    texts = on_circle([0, 60, 60])
    assert balance(images, threshold=1e-3, text_embeddings=texts).kept.tolist() == [1]


def test_a_tie_within_rounding_is_a_tie():
    rng = np.random.default_rng(3)
    pair = oracles.unit(rng.standard_normal((1, 50)) + 0.01 * rng.standard_normal((2, 50)))
    for rows in (pair, pair[::-1]):
        assert balance(rows, threshold=0.07).kept.tolist() == [0]


@pytest.mark.parametrize("with_texts", [False, True])
def test_planted_sets_are_found_as_the_slow_version_finds_them(with_texts):
    rows = planted(30, 4, 24, noise=0.02).astype(np.float16)
    texts = planted(30, 4, 24, noise=0.5, seed=1).astype(np.float16) if with_texts else None
    found = balance(rows, threshold=0.07, text_embeddings=texts, block_rows=17)
    kept, set_of = oracles.balance(rows, 0.07, "cosine", texts)
    assert found.kept.tolist() == kept
    assert found.set_of.tolist() == set_of
    assert len(kept) == 30


@pytest.mark.parametrize("block_rows", [1, 3, 20, 4096])
@pytest.mark.parametrize("threshold", [1e-6, 0.07, 0.5])
@pytest.mark.parametrize("dim", [2, 512])
def test_pairs_a_hair_on_either_side_of_the_threshold_are_told_apart(block_rows, threshold, dim):
    """One pair in two is nearer by 1e-9 of the threshold, the other further: float32 alone cannot see it."""
    rows, expected = on_either_side(threshold, dim)
    found = balance(rows, threshold=threshold, block_rows=block_rows)
    pairs = len(rows) // 2
    assert (found.set_of[:pairs] == found.set_of[pairs:]).tolist() == expected


def test_without_the_margin_such_pairs_would_be_lost(monkeypatch):
    rows, expected = on_either_side(0.07, 512)
    monkeypatch.setattr(semantic_balance, "cosine_error", lambda _: 0.0)
    found = balance(rows, threshold=0.07)
    assert (found.set_of[: len(rows) // 2] == found.set_of[len(rows) // 2 :]).tolist() != expected


def on_either_side(threshold: float, dim: int) -> tuple[np.ndarray, list[bool]]:
    rng = np.random.default_rng(7)
    first = np.linalg.qr(rng.standard_normal((dim, min(dim // 2, 20))))[0].T
    away = rng.standard_normal(first.shape)
    away -= (away @ first.T) @ first
    away = oracles.unit(away)
    near = [i % 2 == 0 for i in range(len(first))]
    cosines = 1 - threshold * np.where(near, 1 - 1e-9, 1 + 1e-9)[:, None]
    return np.concatenate([first, cosines * first + np.sqrt(1 - cosines**2) * away]), near


def test_a_clique_neither_keeps_nor_verifies_all_its_pairs(monkeypatch):
    edges = 0
    union = UnionFind.union

    def counted(self, left, right):
        nonlocal edges
        edges += len(left)
        union(self, left, right)

    monkeypatch.setattr(UnionFind, "union", counted)
    rows = planted(1, 2000, 8, noise=1e-3)
    assert len(balance(rows, threshold=0.07, block_rows=500).kept) == 1
    assert edges < 100_000  # of 1,999,000 pairs


def test_a_set_larger_than_a_portion_keeps_the_row_nearest_its_centroid(monkeypatch):
    rows = planted(2, 150, 8, noise=0.02)
    expected = balance(rows, threshold=0.2)
    monkeypatch.setattr(semantic_balance, "BLOCK_ROWS", 7)
    found = balance(rows, threshold=0.2, text_embeddings=rows)
    kept, set_of = oracles.balance(rows, 0.2, "cosine")
    assert found.kept.tolist() == expected.kept.tolist() == kept
    assert found.set_of.tolist() == set_of


def test_many_sets_are_kept_portion_by_portion(monkeypatch):
    rows = np.concatenate([planted(40, 2, 16, noise=0.01), planted(20, 3, 16, noise=0.01, seed=5)])
    kept, _ = oracles.balance(rows, 0.02, "cosine")
    monkeypatch.setattr(semantic_balance, "BLOCK_ROWS", 9)
    assert balance(rows, threshold=0.02).kept.tolist() == kept


class ShardsOnDisk:
    """What an embedding store offers: a shape, slices and row numbers, nothing more."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        self.shape = rows.shape

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        assert isinstance(rows, slice | np.ndarray)
        return self._rows[rows]


def test_anything_with_a_shape_and_rows_will_do():
    rows = planted(5, 3, 8, noise=0.01)
    found = balance(ShardsOnDisk(rows), text_embeddings=ShardsOnDisk(rows), threshold=0.07)
    assert isinstance(found, Balance)
    assert len(found.kept) == 5


@pytest.mark.parametrize("block_rows", [1, 4, 100])
def test_progress_adds_up_to_the_rows(block_rows):
    told: list[int] = []
    balance(planted(5, 3, 8, noise=0.01), threshold=0.07, block_rows=block_rows, on_progress=told.append)
    assert sum(told) == 15
    assert min(told) > 0


def test_one_image_is_its_own_set():
    found = balance(on_circle([10]), threshold=0.07)
    assert (found.kept.tolist(), found.set_of.tolist(), found.removed_share) == ([0], [0], 0)


def test_rows_of_any_length_are_balanced_by_direction_when_asked():
    rows = on_circle([0, 1, 90]) * np.array([[3.0], [0.2], [1.0]])
    with pytest.raises(ValueError, match=r"embeddings must have rows that are of length 1 .* row 0 has length 3"):
        balance(rows, threshold=2e-4)
    assert balance(rows, threshold=2e-4, normalize=True).set_of.tolist() == [0, 0, 1]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["embeddings", "text_embeddings"])
def test_a_row_without_direction_is_always_refused(normalize, value, name):
    arrays = {"embeddings": on_circle([0, 1]), "text_embeddings": on_circle([0, 1])}
    arrays[name][1] = value
    with pytest.raises(ValueError, match=f"^{name} must have rows .* row 1"):
        balance(arrays["embeddings"], text_embeddings=arrays["text_embeddings"], threshold=0.07, normalize=normalize)


@pytest.mark.parametrize(
    ("metric", "threshold", "largest"),
    [
        ("cosine", 0.0, 2),
        ("cosine", -1.0, 2),
        ("cosine", 2.0, 2),
        ("squared_euclidean", 4.0, 4),
        ("euclidean", 2.0, 2),
        ("cosine", float("nan"), 2),
        ("cosine", float("inf"), 2),
    ],
)
def test_a_threshold_nobody_can_mean_is_refused(metric, threshold, largest):
    with pytest.raises(ValueError, match=f"threshold must be above 0 and below {largest} for metric {metric}, got"):
        balance(on_circle([0]), threshold=threshold, metric=metric)


def test_texts_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"text_embeddings must match embeddings of shape \(2, 2\), got \(1, 2\)"):
        balance(on_circle([0, 1]), text_embeddings=on_circle([0]))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        balance(on_circle([0, 1]), text_embeddings=np.eye(3)[:2])


def test_a_block_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        balance(on_circle([0]), block_rows=0)


def test_thresholds_on_all_three_scales():
    assert threshold_on("cosine", 0.07, "squared_euclidean") == pytest.approx(0.14)
    assert threshold_on("cosine", 0.07, "euclidean") == pytest.approx(0.14**0.5)
    assert threshold_on("euclidean", 0.07, "cosine") == pytest.approx(0.00245)
    assert threshold_on("squared_euclidean", 0.07, "cosine") == pytest.approx(0.035)
    assert threshold_on("cosine", 0.07, "cosine") == 0.07


def test_agreement_counts_pairs():
    found = agreement(np.array([0, 0, 0, 1, 1, 2]), np.array(["a", "a", "b", "b", "b", "c"]))
    assert (found.set_pairs, found.true_pairs, found.shared_pairs, found.rows) == (4, 4, 2, 6)
    assert (found.precision, found.recall) == (0.5, 0.5)


def test_agreement_leaves_rows_without_a_set_out():
    found = agreement(np.array([0, 0, -1, -1]), np.array([1, 1, 1, 2]))
    assert (found.rows, found.precision, found.recall) == (2, 1, 1)


def test_agreement_without_pairs_is_no_error():
    found = agreement(np.array([-1, -1]), np.array([1, 1]))
    assert (found.rows, found.precision, found.recall) == (0, 1, 1)
    assert agreement(np.array([0, 1]), np.array([1, 1])).recall == 0
    assert agreement(np.array([0, 0]), np.array([1, 2])).precision == 0
    with pytest.raises(ValueError, match=r"truth must have the shape \(2,\) of set_of, got \(1,\)"):
        agreement(np.array([0, 1]), np.array([1]))
