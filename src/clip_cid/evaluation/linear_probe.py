"""CLIP's linear probe (its appendix A.3): logistic regression on frozen features; a search of 15 fits chooses C."""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from clip_cid import units
from clip_cid.data.sets.known_sets import MetricName
from clip_cid.evaluation.metrics import accuracy, per_class
from clip_cid.method.array_likes import ArrayLike, as_array

GRID = 10.0 ** np.linspace(-6, 6, 97)
"""The values of C: 1e-6 to 1e6, eight a decade."""

MOST_FITS = 16
"""15 to choose C, and the final one."""

_FIRST_STEP = 16  # grid points between the first seven values: two decades
_HELD_OUT = 0.1
_MAX_ITERATIONS = 1_000
_TIMED_ROWS = 4_096
_SCIPY_SWITCH = "SCIPY_ARRAY_API"
_WORTH_THREADS = 2e8  # multiplications of one pass over the features: some 20 ms on one core


class _Part(NamedTuple):
    x: Any
    """(images, dim) features in float32: an array, or a tensor if the solver runs on a device."""
    y: Int[np.ndarray, " images"]
    """Class numbers."""


@dataclass(frozen=True)
class ProbeResult:
    """A linear probe's score, and the fits behind it."""

    score: float
    """On the test images, in `metric`."""
    metric: MetricName
    C: float
    """The inverse regularization that did best on the validation images."""
    curve: tuple[tuple[float, float], ...]
    """Every C tried with its validation score, by C."""
    validation: str
    """`given`, or how many images were held out of the training images with which seed."""
    top1: float
    mean_per_class: float
    per_class: Float[np.ndarray, " classes"]
    """Share of right answers by class number; NaN for a class without a test image."""
    predicted: Int[np.ndarray, " images"]
    correct: Bool[np.ndarray, " images"]
    rounds: int
    """Rounds of the solver, all fits together."""
    unconverged: tuple[float, ...]
    """The values of C whose fit stopped before it converged (1,000 rounds, or float32's precision)."""
    final_converged: bool
    n_train: int
    """Images of the final fit, validation included."""

    def __repr__(self) -> str:
        return (
            f"ProbeResult({self.metric} {units.percent(self.score)} of {len(self.correct):,} images; C = {self.C:.3g})"
        )

    def explain(self) -> str:
        """In words how good the probe is, where it is worst, and how C was chosen."""
        worst = int(np.nanargmin(self.per_class))
        stopped = f" {units.counted(len(self.unconverged), 'fit')} stopped early." if self.unconverged else ""
        return (
            f"{units.percent(self.top1)} of {len(self.correct):,} test images are right"
            f" ({units.percent(self.mean_per_class)} a class, on average); class {worst} is worst with"
            f" {units.percent(float(self.per_class[worst]))}. Of {self.fits} values, C = {self.C:.3g} did best on the"
            f" validation images ({self.validation}); the final fit has {self.n_train:,} images.{stopped}"
        )

    @property
    def fits(self) -> int:
        """Fits of the search; the final one comes on top."""
        return len(self.curve)


@dataclass(frozen=True)
class FoldedProbe:
    """A probe on each of several official training subsets, as STL10 has them."""

    score: float
    """The mean over the folds."""
    folds: tuple[ProbeResult, ...]

    @property
    def predicted(self) -> Int[np.ndarray, "folds images"]:
        return np.stack([fold.predicted for fold in self.folds])


def linear_probe(
    train_x: Float[np.ndarray, "train dim"] | ArrayLike,
    train_y: Int[np.ndarray, " train_labels"] | ArrayLike,
    test_x: Float[np.ndarray, "test test_dim"] | ArrayLike,
    test_y: Int[np.ndarray, " test_labels"] | ArrayLike,
    *,
    metric: MetricName = "top1",
    val: tuple[Float[np.ndarray, "val val_dim"] | ArrayLike, Int[np.ndarray, " val_labels"] | ArrayLike] | None = None,
    seed: int = 0,
    threads: int = 1,
    device: torch.device | None = None,
    on_fit: Callable[[], Any] | None = None,
) -> ProbeResult:
    """Fit a linear classifier on frozen features and score it once on the test images.

    C is chosen on `val`, or on a tenth of the training images held out by class; of equal scores the smaller C (more
    regularization) wins; the final fit sees training and validation images. Features are used as they are: CLIP's
    protocol does not normalize them. Class numbers may have gaps, but every class of the test images must be trained.

    Args:
        train_x: Features of the training images, fitted in float32; like all four an array, tensor, data frame or list.
        train_y: Their class numbers.
        test_x: Features of the test images.
        test_y: Their class numbers.
        metric: What selects C, and what `score` is.
        val: Features and class numbers to choose C on.
        seed: Of the hold-out.
        threads: Threads of the matrix products at most; a small set gets one, since waiting for others costs it more.
        device: Where the matrix products run, through scikit-learn's array API (`array_api_supported`); None is the
            plain way on the CPU. The solver's own steps stay on the CPU, so the result differs by rounding only.
        on_fit: Called after each fit, `MOST_FITS` times at most.

    Raises:
        ValueError: Something is not numbers, lengths or widths differ, a feature is not finite, training knows fewer than two classes, the test
            images have a class that training has not, nothing can be held out, or this scikit-learn has no array API.
    """
    train = _checked(train_x, train_y, name="train")
    test = _checked(test_x, test_y, name="test", train=train)

    # The images to fit on, to choose C on, and of the final fit.
    if val is None:
        (fit, choose), whole = _hold_out(train, seed), train
        validation = f"{len(choose.y):,} of {len(train.y):,} held out, seed {seed}"
    else:
        fit, choose = train, _checked(*val, name="val", train=train)
        whole = _Part(np.concatenate([fit.x, choose.x]), np.concatenate([fit.y, choose.y]))
        validation = "given"

    products = train.x.size * len(np.unique(train.y))
    with threadpool_limits(limits=threads if products >= _WORTH_THREADS else 1), _solver_on(device):
        scores, unconverged, rounds = _scores_by_index(_at(fit, device), _at(choose, device), metric, on_fit)
        best = _best(scores)
        model, converged = _fit(_at(whole, device), index=best)
        if on_fit is not None:
            on_fit()
        predicted = _predicted(model, _at(test, device))

    correct = np.equal(predicted, test.y)
    return ProbeResult(
        score=accuracy(correct, test.y, metric=metric),
        metric=metric,
        C=float(GRID[best]),
        curve=tuple((float(GRID[index]), scores[index]) for index in sorted(scores)),
        validation=validation,
        top1=accuracy(correct, test.y, metric="top1"),
        mean_per_class=accuracy(correct, test.y, metric="mean_per_class"),
        per_class=per_class(correct, test.y, num_classes=int(whole.y.max()) + 1),
        predicted=predicted,
        correct=correct,
        rounds=rounds + _rounds(model),
        unconverged=tuple(float(GRID[index]) for index in sorted(unconverged)),
        final_converged=converged,
        n_train=len(whole.y),
    )


def folded_probe(
    train_x: Float[np.ndarray, "train dim"],
    train_y: Int[np.ndarray, " train"],
    test_x: Float[np.ndarray, "test dim"],
    test_y: Int[np.ndarray, " test"],
    folds: Sequence[Int[np.ndarray, " _"]],
    **options: Any,
) -> FoldedProbe:
    """`linear_probe` on each fold of the training images, each with its own choice of C; the score is the mean.

    Args:
        train_x: Features of all training images.
        train_y: Their class numbers.
        test_x: Features of the test images.
        test_y: Their class numbers.
        folds: The rows of each fold.
        options: Of `linear_probe`.

    Raises:
        ValueError: As `linear_probe`, or there is no fold.
    """
    if not folds:
        raise ValueError("folds must not be empty")
    results = tuple(linear_probe(train_x[rows], train_y[rows], test_x, test_y, **options) for rows in folds)
    return FoldedProbe(float(np.mean([result.score for result in results])), results)


def array_api_supported() -> bool:
    """Whether the installed scikit-learn fits logistic regression on tensors (1.9 and later)."""
    tags = getattr(LogisticRegression(), "__sklearn_tags__", None)
    return tags is not None and bool(tags().array_api_support)


def seconds_a_round(
    train_x: Float[np.ndarray, "train dim"], *, classes: int, threads: int, device: torch.device | None = None
) -> float:
    """About how long one round of the solver takes: its two matrix products, timed on some rows."""
    rows = torch.tensor(train_x[:_TIMED_ROWS], dtype=torch.float32, device=device)
    weights = torch.ones(rows.shape[1], classes, device=device)
    products = train_x.size * classes
    with threadpool_limits(limits=threads if products >= _WORTH_THREADS else 1):
        best = min(_timed(rows, weights) for _ in range(3))
    return best * len(train_x) / len(rows)


def _timed(rows: torch.Tensor, weights: torch.Tensor) -> float:
    started = time.perf_counter()
    (rows.T @ (rows @ weights)).sum().item()
    return time.perf_counter() - started


def search(validate: Callable[[int], float]) -> dict[int, float]:
    """CLIP's parametric binary search for C.

    It tries seven values two decades apart, then the neighbors of the best at 8, 4, 2 and 1 grid points.

    Returns:
        Score by grid index: 15 of the 97, fewer if the best lies at an end of the grid.
    """
    scores = {index: validate(index) for index in range(0, len(GRID), _FIRST_STEP)}
    step = _FIRST_STEP // 2
    while step >= 1:
        best = _best(scores)
        for index in (best - step, best + step):
            if 0 <= index < len(GRID):
                scores[index] = validate(index)
        step //= 2
    return scores


def tolerance(images: int) -> float:
    """The gradient at which the solver stops, for a training set of this size.

    Since scikit-learn 1.4 the solver's objective is a mean over images and no longer a sum, so its default
    of 1e-4 stops it much earlier than when CLIP used it. Dividing by the number of images undoes that
    (docs/decisions.md, D18).
    """
    return 1e-4 / images


def _best(scores: dict[int, float]) -> int:
    """The index with the highest score; of equal ones the smallest C."""
    return min(scores, key=lambda index: (-scores[index], index))


def _scores_by_index(
    fit: _Part, choose: _Part, metric: MetricName, on_fit: Callable[[], Any] | None
) -> tuple[dict[int, float], list[int], int]:
    """Validation scores by grid index, the indices whose fit did not converge, and the solver's rounds."""
    unconverged: list[int] = []
    rounds: list[int] = []

    def validate(index: int) -> float:
        model, converged = _fit(fit, index=index)
        rounds.append(_rounds(model))
        if not converged:
            unconverged.append(index)
        if on_fit is not None:
            on_fit()
        return accuracy(np.equal(_predicted(model, choose), choose.y), choose.y, metric=metric)

    return search(validate), unconverged, sum(rounds)


def _fit(part: _Part, *, index: int) -> tuple[LogisticRegression, bool]:
    """One fit, and whether it converged; any other warning stays a warning."""
    model = LogisticRegression(C=float(GRID[index]), max_iter=_MAX_ITERATIONS, tol=tolerance(len(part.y)))
    y = torch.tensor(part.y, device=part.x.device) if isinstance(part.x, torch.Tensor) else part.y
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(part.x, y)
    stopped = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in stopped:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model, not stopped


def _predicted(model: LogisticRegression, part: _Part) -> Int[np.ndarray, " images"]:
    predicted: Any = model.predict(part.x)
    return predicted.cpu().numpy() if isinstance(predicted, torch.Tensor) else predicted


def _rounds(model: LogisticRegression) -> int:
    return int(model.n_iter_[0])


def _at(part: _Part, device: torch.device | None) -> _Part:
    return part if device is None else _Part(torch.tensor(part.x, device=device), part.y)


@contextlib.contextmanager
def _solver_on(device: torch.device | None) -> Iterator[None]:
    """Let scikit-learn take tensors if there is a device."""
    if device is None:
        yield
        return
    if not array_api_supported():
        raise ValueError(f"device must be None with scikit-learn {sklearn.__version__}: tensors need 1.9, got {device}")
    before = os.environ.get(_SCIPY_SWITCH)
    os.environ[_SCIPY_SWITCH] = "1"  # scikit-learn insists on it, though this solver hands SciPy arrays of NumPy only
    try:
        with sklearn.config_context(array_api_dispatch=True):
            yield
    finally:
        if before is None:
            del os.environ[_SCIPY_SWITCH]
        else:
            os.environ[_SCIPY_SWITCH] = before


def _hold_out(train: _Part, seed: int) -> tuple[_Part, _Part]:
    """The images to fit on, and those to choose C on: a tenth of each class, at least one.

    A class of one image is not split.
    """
    random = np.random.default_rng(seed)
    held = np.zeros(len(train.y), dtype=bool)
    for label in np.unique(train.y):
        rows = random.permutation(np.flatnonzero(train.y == label))
        if len(rows) > 1:
            held[rows[: max(1, round(_HELD_OUT * len(rows)))]] = True
    if not held.any():
        raise ValueError(f"train_y must have a class with two images to hold one out, got {len(held)} of one image")
    return _Part(train.x[~held], train.y[~held]), _Part(train.x[held], train.y[held])


def _checked(x: ArrayLike, y: ArrayLike, *, name: str, train: _Part | None = None) -> _Part:
    """The features in float32, after checking them and the class numbers, alone and against `train`."""
    x = np.asarray(as_array(x, name=f"{name}_x"))
    y = np.asarray(as_array(y, name=f"{name}_y"))
    if x.ndim != 2 or x.dtype.kind not in "fiu":
        raise ValueError(f"{name}_x must be real numbers of shape (images, dim), got {x.dtype} of shape {x.shape}")
    if y.ndim != 1 or y.dtype.kind not in "iub":
        raise ValueError(f"{name}_y must be a class number for each image, got {y.dtype} of shape {y.shape}")
    y = y if y.dtype.kind == "i" else y.astype(np.int64)

    # Alone.
    if len(x) != len(y) or len(y) == 0:
        raise ValueError(f"{name}_x and {name}_y must have one row an image, got {len(x)} and {len(y)}")
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name}_x must be finite, row {np.flatnonzero(~finite)[0]} is not")
    if y.min() < 0:
        raise ValueError(f"{name}_y must not be negative, got {y.min()}")
    if train is None and len(np.unique(y)) < 2:
        raise ValueError(f"{name}_y must have at least 2 classes, got only class {y[0]}")

    # Against the training images.
    if train is not None and x.shape[1] != train.x.shape[1]:
        raise ValueError(f"{name}_x has width {x.shape[1]}, but train_x has width {train.x.shape[1]}")
    unknown = np.setdiff1d(y, train.y) if train is not None else []
    if len(unknown):
        raise ValueError(f"{name}_y has {len(unknown)} classes that train_y has not, the first {unknown[0]}")
    return _Part(np.asarray(x, dtype=np.float32), y)
