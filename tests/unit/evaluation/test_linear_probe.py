"""CLIP's linear probe: the search, the tolerance, the choice of C, and what is refused."""

import os
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from clip_cid.evaluation import linear_probe as module
from clip_cid.evaluation.linear_probe import (
    GRID,
    MOST_FITS,
    ProbeResult,
    array_api_supported,
    folded_probe,
    linear_probe,
    search,
    seconds_a_round,
    tolerance,
)


def blobs(images: int, *, dim: int = 24, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features as a network gives them: few strong directions, many weak ones, length 10."""
    random = np.random.default_rng(seed)
    scale = np.arange(1, dim + 1) ** -0.7
    centers = np.random.default_rng(99).normal(size=(classes, dim)) * scale * 0.5
    labels = np.arange(images) % classes
    features = centers[labels] + random.normal(size=(images, dim)) * scale
    return (10 * features / np.linalg.norm(features, axis=1).mean()).astype(np.float32), labels


@given(st.integers(0, 96))
def test_the_search_finds_the_peak_of_a_curve_with_one(peak: int) -> None:
    scores = search(lambda index: -abs(index - peak))
    assert max(scores, key=lambda index: scores[index]) == peak
    assert {0, 16, 32, 48, 64, 80, 96} <= scores.keys()
    assert len(scores) == 15 if 9 <= peak <= 88 else len(scores) <= 15  # beyond an end there is nothing to try


def test_the_search_halves_its_step_around_the_best_so_far() -> None:
    tried: list[int] = []

    def validate(index: int) -> float:
        tried.append(index)
        return -abs(index - 41)

    search(validate)
    assert tried == [*(0, 16, 32, 48, 64, 80, 96), *(40, 56), *(36, 44), *(38, 42), *(39, 41)]


def test_the_grid_is_eight_values_a_decade() -> None:
    assert (len(GRID), GRID[0], GRID[-1]) == (97, 1e-6, 1e6)
    np.testing.assert_allclose(GRID[8:] / GRID[:-8], 10)


def small_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits 5 to 9 at 4 x 4 pixels, in a fixed random order; every value is exact in float32."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(np.flatnonzero(labels >= 5))
    pixels = pixels[order].reshape(-1, 4, 2, 4, 2).sum(axis=(2, 4)).reshape(-1, 16) / 4
    return pixels, labels[order]


@pytest.mark.slow
def test_fifteen_fits_lose_at_most_two_images_against_all_ninety_seven() -> None:
    """On exact minima (Newton's method in float64), so that the accuracy of each C is the same on every processor."""
    pixels, labels = small_digits()
    (x, val_x), (y, val_y) = np.split(pixels, [60]), np.split(labels, [60])
    with threadpool_limits(limits=1):
        models = [LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8).fit(x, y) for C in GRID]
    right = [int((model.predict(val_x) == val_y).sum()) for model in models]

    tried = search(lambda index: right[index])

    assert len(tried) == 15
    assert max(tried.values()) >= max(right) - 2
    assert min(right) < 0.95 * max(right)  # the choice matters


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[LogisticRegression]:
    """The models of every fit of a probe, in their order; the last one is the final fit."""
    models: list[LogisticRegression] = []
    fit = LogisticRegression.fit

    def spy(self: LogisticRegression, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
        models.append(fit(self, x, y))
        return models[-1]

    monkeypatch.setattr(LogisticRegression, "fit", spy)
    return models


@pytest.mark.slow
def test_the_curve_holds_the_validation_accuracy_of_each_c(fitted: list[LogisticRegression]) -> None:
    pixels, labels = small_digits()
    (x, val_x), (y, val_y) = np.split(pixels.astype(np.float32), [60]), np.split(labels, [60])
    result = linear_probe(x, y, val_x, val_y, val=(val_x, val_y))
    assert result.fits == len(fitted) - 1 == 15
    assert 0.02 < result.C < 20  # the ends of the grid are far worse
    scores = {model.C: model.score(val_x, val_y) for model in fitted[:-1]}
    assert [C for C, _ in result.curve] == sorted(scores)
    for C, score in result.curve:
        assert score == pytest.approx(
            scores[C], abs=1.5 / len(val_y)
        )  # an image at the border of two classes may round


Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Weights (class by class) and biases in one vector -> the value and its gradient."""


def objective(x: np.ndarray, y: np.ndarray, C: float) -> Objective:
    """Logistic regression's *sum* of the losses with its penalty, in float64."""
    classes, dim = int(y.max()) + 1, x.shape[1]
    truth = np.eye(classes)[y]

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[:-classes].reshape(classes, dim), flat[-classes:]
        logs = log_softmax(x @ weights.T + bias, axis=1)
        error = np.exp(logs) - truth
        gradient = np.concatenate([(error.T @ x + weights / C).ravel(), error.sum(axis=0)])
        return float(-logs[truth == 1].sum() + (weights**2).sum() / (2 * C)), gradient

    return value_and_gradient


def minimum(of: Objective, size: int, **options: float) -> np.ndarray:
    return minimize(of, np.zeros(size), jac=True, method="L-BFGS-B", options=options).x


def clip_era_solution(x: np.ndarray, y: np.ndarray, C: float) -> Callable[[np.ndarray], np.ndarray]:
    """scikit-learn's solver as it was when CLIP used it: the sum of the losses, stopped at a gradient of 1e-4."""
    classes, dim = int(y.max()) + 1, x.shape[1]
    size = classes * (dim + 1)
    flat = minimum(objective(x, y, C), size, maxiter=1000, gtol=1e-4, ftol=64 * np.finfo(float).eps)
    return lambda test: (test @ flat[:-classes].reshape(classes, dim).T + flat[-classes:]).argmax(axis=1)


@pytest.mark.slow
def test_the_tolerance_gives_the_classifier_of_clips_time_and_the_default_does_not() -> None:
    (x, y), (test_x, _) = (blobs(count, dim=64, classes=10, seed=count) for count in (600, 2000))
    C = 1000.0
    expected = clip_era_solution(x.astype(np.float64), y, C)(test_x)
    agreement = {
        tol: np.mean(LogisticRegression(C=C, max_iter=1000, tol=tol).fit(x, y).predict(test_x) == expected)
        for tol in (1e-4, tolerance(len(y)))
    }
    assert agreement[tolerance(len(y))] > 0.99
    assert agreement[1e-4] < 0.95


def test_the_probe_fits_with_that_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int, np.dtype]] = []
    fit = LogisticRegression.fit

    def spy(self: LogisticRegression, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
        seen.append((self.tol, len(y), x.dtype))
        return fit(self, x, y)

    monkeypatch.setattr(LogisticRegression, "fit", spy)
    x, y = blobs(60, dim=4)
    linear_probe(x.astype(np.float64), y, x.astype(np.float64), y)
    assert [entry for entry in seen if entry != (1e-4 / 54, 54, np.float32)] == [(1e-4 / 60, 60, np.float32)]


def test_features_are_not_normalized(fitted: list[LogisticRegression]) -> None:
    """Every fit reaches the minimum of the objective on the features as they are, not on unit features.

    On few features the solver converges to it in float32, whatever its path; the minimum itself is found in float64.
    """
    (x, y), (val_x, val_y) = blobs(120, dim=6, classes=3), blobs(300, dim=6, classes=3, seed=1)
    linear_probe(x, y, val_x, val_y, val=(val_x, val_y))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    exactly = {"maxiter": 10_000, "maxfun": 100_000, "gtol": 1e-9, "ftol": 1e-15}
    for model in fitted[:-1]:  # the final fit sees the validation images too
        reached = np.concatenate([model.coef_.ravel(), model.intercept_]).astype(np.float64)
        as_they_are, of_unit = (objective(rows.astype(np.float64), y, model.C) for rows in (x, unit))
        least, least_of_unit = (of(minimum(of, len(reached), **exactly))[0] for of in (as_they_are, of_unit))
        assert as_they_are(reached)[0] == pytest.approx(least, rel=1e-5)
        if model.C >= 0.1:  # a smaller C leaves hardly a weight to tell the two by
            assert of_unit(reached)[0] > 1.05 * least_of_unit


def test_classes_that_differ_in_length_alone_are_told_apart() -> None:
    x = np.array([[1.0, 0.1], [1.1, 0.1], [5.0, 0.5], [5.5, 0.5]] * 5)
    y = np.array([0, 0, 1, 1] * 5)
    result = linear_probe(x, y, x, y, val=(x, y))
    assert max(score for _, score in result.curve) == 1


def test_of_equal_scores_the_smaller_c_wins() -> None:
    x = np.array([[-1.0], [-1.1], [1.0], [1.1]] * 5)
    y = np.array([0, 0, 1, 1] * 5)
    result = linear_probe(x, y, x, y)
    assert result.score == 1
    best = [C for C, score in result.curve if score == 1]
    assert best[0] == result.C
    assert best == sorted(best)


def test_the_final_fit_sees_training_and_validation_images() -> None:
    """Validation images that contradict the training images change what the final classifier says."""
    x, y = np.array([[-1.0], [1.0]] * 10), np.array([0, 1] * 10)
    given = linear_probe(x, y, x, y, val=(np.repeat(x, 9, axis=0), np.repeat(1 - y, 9)))
    assert (given.validation, given.n_train) == ("given", 20 + 180)
    assert given.score == 0
    held = linear_probe(x, y, x, y, seed=5)
    assert (held.validation, held.n_train) == ("2 of 20 held out, seed 5", 20)
    assert held.score == 1


@pytest.mark.slow
def test_the_metric_chooses_c() -> None:
    """A rare class hardly counts in top-1 but fully in the mean per class, so it asks for less regularization."""
    x, y = blobs(600, classes=3)
    keep = (y != 2) | (np.arange(600) % 20 == 2)
    val_x, val_y = blobs(900, classes=3, seed=1)
    chosen = {
        metric: linear_probe(x[keep], y[keep], val_x, val_y, metric=metric, val=(val_x, val_y))
        for metric in ("top1", "mean_per_class")
    }
    for metric, result in chosen.items():
        assert result.metric == metric
        assert result.score == (result.top1 if metric == "top1" else result.mean_per_class)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.integers(0, 50))
def test_the_hold_out_is_a_tenth_of_each_class(labels: list[int], seed: int) -> None:
    y = np.array(labels)
    counts = np.bincount(y)
    part = module._Part(np.arange(len(y), dtype=np.float32)[:, None], y)
    if counts.max() < 2:
        with pytest.raises(ValueError, match="class with two images"):
            module._hold_out(part, seed)
        return
    fit, val = module._hold_out(part, seed)
    assert sorted([*fit.x[:, 0], *val.x[:, 0]]) == list(range(len(y)))
    assert set(fit.y) == set(y)  # no class is held out whole
    for label, count in enumerate(counts):
        expected = 0 if count < 2 else max(1, round(count / 10))
        assert (val.y == label).sum() == expected
    again, _ = module._hold_out(part, seed)
    np.testing.assert_array_equal(again.x, fit.x)


def test_equal_inputs_give_equal_results() -> None:
    x, y = blobs(90, dim=8)
    first, second = (linear_probe(x, y, x, y, seed=3) for _ in range(2))
    assert (first.score, first.C, first.curve) == (second.score, second.C, second.curve)


def test_class_numbers_may_have_gaps() -> None:
    x, y = blobs(120, dim=8, classes=3)
    result, spread = linear_probe(x, y, x, y), linear_probe(x, 5 * y, x, 5 * y)
    assert (result.score, result.C) == (spread.score, spread.C)
    assert np.flatnonzero(~np.isnan(spread.per_class)).tolist() == [0, 5, 10]


def test_fits_that_stop_early_are_reported_and_not_shouted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(60, dim=6)
    easy = linear_probe(x, y, x, y)
    monkeypatch.setattr(module, "_MAX_ITERATIONS", 2)
    stopped = linear_probe(x, y, x, y)
    assert easy.final_converged
    assert not stopped.final_converged
    assert len(stopped.unconverged) > len(easy.unconverged)


def test_other_warnings_of_a_fit_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = LogisticRegression.fit

    def complain(self: LogisticRegression, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
        warnings.warn("something else", UserWarning, stacklevel=1)
        return fit(self, x, y)

    monkeypatch.setattr(LogisticRegression, "fit", complain)
    x, y = blobs(60, dim=4)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="something else"):
            linear_probe(x, y, x, y)


GOOD_X, GOOD_Y = blobs(12, dim=3, classes=2)


def probe(**changes: object) -> ProbeResult:
    inputs = {"train_x": GOOD_X, "train_y": GOOD_Y, "test_x": GOOD_X, "test_y": GOOD_Y, **changes}
    return linear_probe(**inputs)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train_y": GOOD_Y[:-1]}, "train_x and train_y must have one row an image, got 12 and 11"),
        ({"test_y": GOOD_Y[:-1]}, "test_x and test_y must have one row an image, got 12 and 11"),
        ({"test_x": GOOD_X[:0], "test_y": GOOD_Y[:0]}, "got 0 and 0"),
        ({"train_x": np.where(np.arange(12)[:, None] == 7, np.nan, GOOD_X)}, "train_x must be finite, row 7 is not"),
        ({"test_x": np.where(np.arange(12)[:, None] == 2, np.inf, GOOD_X)}, "test_x must be finite, row 2 is not"),
        ({"train_y": np.zeros(12, int)}, "train_y must have at least 2 classes, got only class 0"),
        ({"test_y": GOOD_Y + 1}, "test_y has 1 classes that train_y has not, the first 2"),
        ({"val": (GOOD_X, GOOD_Y + 5)}, "val_y has 2 classes that train_y has not, the first 5"),
        ({"test_x": GOOD_X[:, :2]}, "test_x has width 2, but train_x has width 3"),
        ({"train_y": GOOD_Y - 1}, "train_y must not be negative, got -1"),
        ({"train_x": GOOD_X[:2], "train_y": GOOD_Y[:2]}, "class with two images to hold one out, got 2 of one image"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        probe(**changes)


def test_every_fit_is_told_so_that_a_long_probe_shows_how_far_it_is() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 3)).astype(np.float32), np.arange(40) % 2
    told: list[None] = []
    result = linear_probe(x, y, x, y, on_fit=lambda: told.append(None))
    assert len(told) == len(result.curve) + 1 <= MOST_FITS


@pytest.mark.slow
@pytest.mark.skipif(not array_api_supported(), reason="scikit-learn 1.9 and later fit on tensors")
def test_a_probe_on_a_device_gives_what_the_plain_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type] = []
    fit = LogisticRegression.fit

    def spy(self: LogisticRegression, x: object, y: object) -> LogisticRegression:
        seen.append(type(x))
        return fit(self, x, y)

    (x, y), (test_x, test_y) = blobs(240, dim=12, classes=4), blobs(400, dim=12, classes=4, seed=1)
    plain = linear_probe(x, y, test_x, test_y, val=(test_x, test_y))
    monkeypatch.setattr(LogisticRegression, "fit", spy)
    monkeypatch.delenv("SCIPY_ARRAY_API", raising=False)
    there = linear_probe(x, y, test_x, test_y, val=(test_x, test_y), device=torch.device("cpu"))
    assert set(seen) == {torch.Tensor}
    assert "SCIPY_ARRAY_API" not in os.environ
    scores = [dict(result.curve) for result in (plain, there)]
    for C in scores[0].keys() & scores[1].keys():
        assert scores[0][C] == pytest.approx(scores[1][C], abs=0.01)  # how the products round, at 400 images
    assert np.mean(plain.predicted == there.predicted) > 0.98
    assert isinstance(there.predicted, np.ndarray)


@pytest.mark.slow
@pytest.mark.skipif(not array_api_supported(), reason="scikit-learn 1.9 and later fit on tensors")
def test_one_fit_on_a_device_ends_at_the_same_minimum() -> None:
    """The same C, so that no choice is in between. The loss is strictly convex: equal minima are equal weights."""
    x, y = blobs(240, dim=12, classes=4)
    part = module._Part(x, y)
    with module._solver_on(torch.device("cpu")):
        there, _ = module._fit(module._at(part, torch.device("cpu")), index=48)
        reached = [np.concatenate([np.asarray(there.coef_).ravel(), np.asarray(there.intercept_)])]
    plain, _ = module._fit(part, index=48)
    reached.append(np.concatenate([plain.coef_.ravel(), plain.intercept_]))

    loss = objective(x.astype(np.float64), y, plain.C)
    least, _ = loss(minimum(loss, len(reached[0]), gtol=1e-9, ftol=0))
    assert [loss(weights.astype(np.float64))[0] for weights in reached] == pytest.approx([least, least], rel=1e-5)


def test_a_device_without_array_api_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "array_api_supported", lambda: False)
    with pytest.raises(ValueError, match=r"device must be None with scikit-learn .*, got cpu"):
        linear_probe(GOOD_X, GOOD_Y, GOOD_X, GOOD_Y, device=torch.device("cpu"))


def test_read_only_features_are_no_trouble() -> None:
    """Features come from a file mapped read-only."""
    x, y = blobs(60, dim=4, classes=3)
    x.flags.writeable = False
    device = torch.device("cpu") if array_api_supported() else None
    assert linear_probe(x, y, x, y, device=device).n_train == 60


@pytest.mark.slow
def test_the_score_of_folds_is_the_mean_of_probes_on_each() -> None:
    (x, y), (test_x, test_y) = blobs(300), blobs(200, seed=1)
    folds = [np.arange(0, 300, 5), np.arange(1, 300, 5), np.arange(90)]
    result = folded_probe(x, y, test_x, test_y, folds, seed=3)
    alone = [linear_probe(x[rows], y[rows], test_x, test_y, seed=3) for rows in folds]
    assert [fold.score for fold in result.folds] == [probe.score for probe in alone]
    assert result.score == pytest.approx(sum(probe.score for probe in alone) / 3)
    assert result.score == pytest.approx((result.predicted == test_y).mean())
    assert [fold.n_train for fold in result.folds] == [60, 60, 90]
    with pytest.raises(ValueError, match="folds must not be empty"):
        folded_probe(x, y, test_x, test_y, [])


def test_the_time_of_a_round_grows_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_timed", lambda rows, weights: 1e-3 * len(rows) * weights.shape[1])
    monkeypatch.setattr(module, "_TIMED_ROWS", 50)
    times = [seconds_a_round(np.ones((count, 3), np.float32), classes=7, threads=1) for count in (10, 50, 400)]
    assert times == pytest.approx([0.07, 0.35, 2.8])


def test_rounds_are_those_of_all_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    fit = LogisticRegression.fit

    def spy(self: LogisticRegression, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
        fitted = fit(self, x, y)
        rounds.append(int(fitted.n_iter_[0]))
        return fitted

    monkeypatch.setattr(LogisticRegression, "fit", spy)
    assert probe().rounds == sum(rounds) > 16
