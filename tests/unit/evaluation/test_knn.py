"""Nearest neighbors, against a slow vote in float64 and numbers worked by hand."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.evaluation import knn as module
from clip_cid.evaluation.knn import knn


def slow_vote(train_x: np.ndarray, train_y: np.ndarray, image: np.ndarray, k: int) -> int:
    """One image at a time, in float64."""
    cosines = [float(image @ row / np.linalg.norm(image) / np.linalg.norm(row)) for row in train_x]
    nearest = sorted(range(len(cosines)), key=lambda row: (-cosines[row], row))[:k]
    votes: dict[int, float] = defaultdict(float)
    for row in nearest:
        votes[int(train_y[row])] += np.exp(cosines[row] / 0.07)
    return max(sorted(votes), key=lambda label: votes[label])


@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 80))
def test_the_vote_is_that_of_a_slow_one(seed: int, images: int, k: int) -> None:
    random = np.random.default_rng(seed)
    train_x, train_y = random.normal(size=(images, 4)), random.integers(0, 3, size=images)
    test_x, test_y = random.normal(size=(20, 4)), random.integers(0, 3, size=20)
    result = knn(train_x, train_y, test_x, test_y, neighbors=(k,))
    expected = np.array([slow_vote(train_x, train_y, image, k) for image in test_x])
    np.testing.assert_array_equal(result.predicted, expected)
    assert result.by_k == {min(k, images): result.score} == {min(k, images): np.mean(expected == test_y)}


def test_a_near_image_outvotes_several_far_ones() -> None:
    """Cosines 1, 0.8 and 0.8: one vote of exp(1 / 0.07) against two of exp(0.8 / 0.07), which are exp(0.2 / 0.07) = 17 times smaller."""
    train_x, train_y = np.array([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]), np.array([1, 0, 0])
    result = knn(train_x, train_y, np.array([[5.0, 0.0]]), np.array([1]), neighbors=(3,))
    assert result.score == 1


def test_the_score_is_that_of_20_neighbors_and_the_others_stand_beside_it() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(150, 3)), random.integers(0, 5, size=150)
    result = knn(x, y, random.normal(size=(40, 3)), random.integers(0, 5, size=40))
    assert list(result.by_k) == [10, 20, 100, 150]  # 200 are more than there are
    assert (result.k, result.score) == (20, result.by_k[20])
    few = knn(x[:8], y[:8], x, y)
    assert (few.k, list(few.by_k)) == (8, [8])


def test_features_count_by_direction_only() -> None:
    random = np.random.default_rng(0)
    x, y, test = random.normal(size=(60, 5)), random.integers(0, 3, size=60), random.normal(size=(30, 5))
    lengths = random.uniform(0.1, 10, size=(60, 1))
    first, second = (knn(features, y, test, y[:30]).predicted for features in (x, lengths * x))
    np.testing.assert_array_equal(first, second)


def test_of_equally_near_images_the_earlier_counts() -> None:
    x = np.ones((6, 2))
    for labels in ([2, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]):
        assert knn(x, np.array(labels), x[:1], np.array([1]), neighbors=(1,)).predicted.tolist() == labels[:1]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 6)), random.integers(0, 4, size=50)
    whole = knn(x, y, x[::2], y[::2])
    monkeypatch.setattr(module, "_CELLS", 50 * 7)
    told: list[int] = []
    np.testing.assert_array_equal(knn(x, y, x[::2], y[::2], on_images=told.append).predicted, whole.predicted)
    assert told == [7, 7, 7, 4]


def test_the_metric_is_the_sets_own() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    test_y = np.array([0, 0, 0, 1])
    test_x = np.array([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1], [1.0, 0.1]])  # all taken for class 0
    assert knn(x, y, test_x, test_y, metric="top1", neighbors=(1,)).score == 0.75
    assert knn(x, y, test_x, test_y, metric="mean_per_class", neighbors=(1,)).score == 0.5


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train_y": [0]}, "train_x and train_y must have one row an image, got 2 and 1"),
        ({"test_y": [0]}, "test_x and test_y must have one row an image, got 2 and 1"),
        ({"test_x": np.eye(2, 3)}, "test_x has width 3, but train_x has width 2"),
        ({"train_x": np.zeros((2, 2))}, "train_x must have finite rows that are not zero"),
        ({"test_x": np.full((2, 2), np.nan)}, "test_x must have finite rows"),
        ({"neighbors": (0, 3)}, r"neighbors must be 1 or more, got \(0, 3\)"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(changes: dict[str, object], problem: str) -> None:
    inputs = {"train_x": np.eye(2), "train_y": [0, 1], "test_x": np.eye(2), "test_y": [0, 1], **changes}
    arrays = {name: np.array(value) if name != "neighbors" else value for name, value in inputs.items()}
    with pytest.raises(ValueError, match=problem):
        knn(**arrays)  # pyright: ignore[reportArgumentType]
