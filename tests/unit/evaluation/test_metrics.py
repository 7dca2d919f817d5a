"""Scores and their intervals, against hand-worked numbers and a bootstrap that really redraws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.data.sets.known_sets import MetricName
from clip_cid.evaluation.metrics import (
    RESAMPLES,
    accuracy,
    bootstrap_draws,
    bootstrap_interval,
    bootstrap_ratio,
    confusions,
    per_class,
    shares,
)

METRICS: tuple[MetricName, ...] = ("top1", "mean_per_class")


def test_the_mean_per_class_gives_a_small_class_the_weight_of_a_large_one() -> None:
    labels = np.array([0, 0, 0, 0, 2])
    correct = np.array([True, True, True, False, False])
    assert accuracy(correct, labels, metric="top1") == pytest.approx(3 / 5)
    assert accuracy(correct, labels, metric="mean_per_class") == pytest.approx((3 / 4 + 0) / 2)  # class 1 has no image
    np.testing.assert_array_equal(per_class(correct, labels, num_classes=4), [0.75, np.nan, 0, np.nan])


def test_both_metrics_agree_on_classes_of_equal_size() -> None:
    correct = np.random.default_rng(0).random(60) < 0.4
    labels = np.arange(60) % 6
    assert accuracy(correct, labels, metric="top1") == pytest.approx(accuracy(correct, labels, metric="mean_per_class"))


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        accuracy(np.array([True, False]), np.array([0, 1, 1]), metric="top1")


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_is_that_of_a_bootstrap_that_redraws_images(metric: MetricName) -> None:
    random = np.random.default_rng(1)
    labels = np.sort(random.choice(4, size=120, p=[0.5, 0.3, 0.15, 0.05]))
    correct = random.random(120) < np.array([0.9, 0.5, 0.3, 0.2])[labels]
    scores = []
    for _ in range(4000):
        if metric == "top1":
            rows = random.integers(0, 120, size=120)
        else:
            groups = [np.flatnonzero(labels == label) for label in range(4)]
            rows = np.concatenate([random.choice(group, size=len(group)) for group in groups])
        scores.append(accuracy(correct[rows], labels[rows], metric=metric))
    expected = np.quantile(scores, [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_interval(correct, labels, metric=metric, seed=0), expected, atol=0.02)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1), st.sampled_from(METRICS), st.integers(0, 99))
def test_the_interval_holds_the_score_and_equal_seeds_give_it_again(
    answers: list[tuple[bool, int]], metric: MetricName, seed: int
) -> None:
    correct, labels = np.array([right for right, _ in answers]), np.array([label for _, label in answers])
    low, high = bootstrap_interval(correct, labels, metric=metric, seed=seed)
    assert 0 <= low <= accuracy(correct, labels, metric=metric) <= high <= 1
    assert bootstrap_interval(correct, labels, metric=metric, seed=seed) == (low, high)


def test_the_interval_narrows_with_the_root_of_the_images() -> None:
    widths = []
    for count in (100, 1600):
        low, high = bootstrap_interval(np.arange(count) % 2 == 0, np.zeros(count, int), metric="top1", seed=0)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)


def test_a_ratio_redraws_whole_units() -> None:
    """One image whose five captions fail together moves the score five times as far as one caption would."""
    hits, counts = np.array([5.0, 0.0] * 40), np.full(80, 5.0)
    low, high = bootstrap_ratio(hits, counts, seed=0)
    alone = bootstrap_interval(np.arange(400) % 2 == 0, np.zeros(400, int), metric="top1", seed=0)
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(5), rel=0.15)


@pytest.mark.slow
def test_a_ratio_of_many_units_does_not_hold_all_redraws_at_once() -> None:
    units = 10_000_000 // RESAMPLES + 1  # so that the redraws come in two blocks
    low, high = bootstrap_ratio(np.ones(units), np.full(units, 2.0), seed=0)
    assert (low, high) == (0.5, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_the_paired_bootstrap_redraws_images_for_both_models(metric: MetricName) -> None:
    random = np.random.default_rng(2)
    labels = np.repeat([0, 1, 2], [54, 27, 9])
    ours = np.arange(90) % 10 < 7
    theirs = np.where(np.arange(90) % 9 > 0, ours, ~ours)  # mostly the same answers, so the difference is well known
    expected = []
    for _ in range(4000):
        if metric == "top1":
            rows = random.integers(0, 90, size=90)
        else:
            groups = [np.flatnonzero(labels == label) for label in range(3)]
            rows = np.concatenate([random.choice(group, size=len(group)) for group in groups])
        expected.append(
            accuracy(ours[rows], labels[rows], metric=metric) - accuracy(theirs[rows], labels[rows], metric=metric)
        )
    draws = bootstrap_draws(ours.astype(float) - theirs, labels, metric=metric, seed=0)
    quantiles = [0.025, 0.25, 0.5, 0.75, 0.975]
    np.testing.assert_allclose(np.quantile(draws, quantiles), np.quantile(expected, quantiles), atol=0.02)
    alone = bootstrap_interval(ours, labels, metric=metric, seed=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert high - low < alone[1] - alone[0]


def test_the_difference_of_two_scores_is_the_score_of_the_difference() -> None:
    random = np.random.default_rng(3)
    labels = random.choice(4, size=70, p=[0.6, 0.2, 0.1, 0.1])
    ours, theirs = random.random(70) < 0.7, random.random(70) < 0.4
    for metric in METRICS:
        gap = accuracy(ours, labels, metric=metric) - accuracy(theirs, labels, metric=metric)
        assert accuracy(ours.astype(float) - theirs, labels, metric=metric) == pytest.approx(gap)


def test_answers_of_several_folds_count_by_their_share() -> None:
    labels = np.array([0, 1, 1])
    assert shares(np.array([0, 0, 1]), labels).tolist() == [True, False, True]
    assert shares(np.array([[0, 0, 1], [0, 1, 0]]), labels).tolist() == [1.0, 0.5, 0.5]


def test_confusions_are_the_commonest_mistakes() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([0, 2, 2, 0, 0, 1, 0, 2])
    assert confusions(predicted, labels) == [(0, 2, 2), (1, 0, 2), (2, 0, 1), (2, 1, 1)]
    assert confusions(predicted, labels, most=1) == [(0, 2, 2)]
    assert confusions(labels, labels) == []
