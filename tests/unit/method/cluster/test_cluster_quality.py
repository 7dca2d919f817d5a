from collections import Counter

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.cluster import cluster_quality as quality
from clip_cid.method.cluster.cluster_quality import cluster_quality, gini, margin_quantiles, purity, size_quantiles


def data(rows: int = 60, num_centers: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    embeddings = oracles.unit(rng.standard_normal((rows, 5)))
    centers = oracles.unit(rng.standard_normal((num_centers, 5)))
    return embeddings, centers, np.array(oracles.nearest(embeddings, centers))


def test_the_mean_cosines_are_those_over_all_pairs():
    embeddings, centers, labels = data()
    found = cluster_quality(embeddings, centers, labels)
    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    cosines = {pair: float(embeddings[pair[0]] @ embeddings[pair[1]]) for pair in pairs}
    assert found.all_pairs_cosine == pytest.approx(np.mean(list(cosines.values())), abs=1e-7)
    within = [value for (i, j), value in cosines.items() if labels[i] == labels[j]]
    assert found.within_cosine == pytest.approx(np.mean(within), abs=1e-7)


def test_the_margin_is_over_the_second_nearest_center(monkeypatch):
    embeddings, centers, labels = data()
    monkeypatch.setattr(quality, "_BLOCK", 3)
    found = cluster_quality(embeddings, centers, labels)
    ordered = np.sort(embeddings @ centers.T, axis=1)
    np.testing.assert_allclose(found.margins, ordered[:, -1] - ordered[:, -2], atol=1e-6)


def test_one_direction_in_each_cluster_is_pure_and_rows_at_random_are_not():
    embeddings = np.eye(4)[[0, 0, 1, 1, 2, 2]]
    pure = cluster_quality(embeddings, np.eye(4)[:3], np.array([0, 0, 1, 1, 2, 2]))
    mixed = cluster_quality(embeddings, np.eye(4)[:3], np.array([0, 1, 0, 2, 1, 2]))
    assert (pure.within_cosine, mixed.within_cosine) == (pytest.approx(1), pytest.approx(0))
    assert pure.all_pairs_cosine == mixed.all_pairs_cosine == pytest.approx(0.2)
    assert pure.margins.tolist() == [1] * 6


def test_singletons_have_no_pairs_and_one_center_has_no_margin():
    embeddings = np.eye(3)
    assert cluster_quality(embeddings, embeddings, np.arange(3)).within_cosine is None
    alone = cluster_quality(embeddings[:1], embeddings[:1], np.zeros(1, dtype=int))
    assert (alone.within_cosine, alone.all_pairs_cosine, len(alone.margins)) == (None, None, 0)
    assert margin_quantiles(alone.margins) == {}


def test_a_sample_stands_for_many_rows(monkeypatch):
    embeddings, centers, labels = data()
    monkeypatch.setattr(quality, "_SAMPLE", 10)
    one, again = (cluster_quality(embeddings, centers, labels).margins for _ in range(2))
    assert len(one) == 10
    np.testing.assert_array_equal(one, again)


def test_quantiles_are_sizes_that_occur():
    assert size_quantiles(np.array([4, 0, 1, 9])) == {
        "0": 0, "0.05": 0, "0.25": 0, "0.5": 1, "0.75": 4, "0.95": 9, "1": 9,
    }  # fmt: skip
    assert margin_quantiles(np.array([0.25, 0.75]))["0.5"] == 0.5


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 7], [0, -1, 1]])
def test_labels_of_other_rows_or_centers_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be of 3 rows and 3 centers"):
        cluster_quality(np.eye(3), np.eye(3), np.array(labels))


def test_purity_is_the_share_of_the_most_frequent_class_and_unknown_classes_count_nowhere():
    """By hand: of cluster 0 two of three are of class 5, of cluster 2 one of two, cluster 7 is one row."""
    found = purity(np.array([0, 0, 2, 7, 2, 0, 2]), np.array([5, 5, 0, 1, 3, 0, -1]))
    assert found.share == pytest.approx(4 / 6)
    assert (found.rows, found.classes) == (6, 4)


def test_purity_agrees_with_a_count_by_hand_over_all_clusters():
    rng = np.random.default_rng(1)
    labels, classes = rng.integers(9, size=400), rng.integers(-1, 6, size=400)
    found = purity(labels, classes)
    best = [Counter(classes[(labels == j) & (classes >= 0)].tolist()).most_common(1)[0][1] for j in range(9)]
    assert found.share == pytest.approx(sum(best) / (classes >= 0).sum())


def test_classes_dealt_at_random_tell_what_small_clusters_give_for_nothing():
    """Two classes, half and half, in clusters of two: of four pairs of classes two are pure, so 3/4 without any meaning."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4000), 2)
    meant = purity(labels, labels % 2)
    by_chance = purity(labels, rng.permutation(labels % 2))
    assert meant.share == 1
    assert meant.shuffled == pytest.approx(0.75, abs=0.02)
    assert by_chance.share == pytest.approx(0.75, abs=0.02)
    assert purity(labels, labels).shuffled == pytest.approx(0.5, abs=0.002)  # few meet their twin


def test_purity_without_classes_or_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="known of some row"):
        purity(np.zeros(2, dtype=int), np.full(2, -1))
    with pytest.raises(ValueError, match="shape"):
        purity(np.zeros(3, dtype=int), np.zeros(2, dtype=int))


def test_gini_of_hand_worked_sizes() -> None:
    assert gini(np.array([5, 5, 5, 5])) == 0
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(3 / 4)
    assert gini(np.array([1, 3])) == pytest.approx(1 / 4)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50).filter(any).map(np.array))
def test_gini_is_half_the_mean_difference_over_the_mean(values: np.ndarray) -> None:
    differences = np.abs(values[:, None] - values[None, :]).mean()
    assert gini(values) == pytest.approx(differences / (2 * values.mean()), abs=1e-12)


def test_gini_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="all clusters are empty"):
        gini(np.zeros(3, dtype=np.int64))
