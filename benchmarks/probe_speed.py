"""The linear probe against scikit-learn's way of before: CPU time, the chosen C, and the answers.

Three solvers on the features a run has cached: ours (float32, tolerance 1e-4 / n), the same in float64 (what NumPy features
become by default), and scikit-learn's default tolerance in float64. One thread, CPU time, the solvers in turn, the least of
several rounds.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from clip_cid import log
from clip_cid.data.sets.evaluation_sets import open_set
from clip_cid.data.sets.labelled_images import LabelledImages
from clip_cid.evaluation.features import Encoder
from clip_cid.evaluation.linear_probe import linear_probe, tolerance
from clip_cid.models.loading import load_clip
from clip_cid.recipe import read_recipe

CHOICES = (0.01, 1.0, 100.0)


@dataclasses.dataclass
class Fit:
    """One solver's least CPU time, and what it answered."""

    seconds: float = float("inf")
    predicted: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    rounds: int = 0


def speed(
    run: tyro.conf.Positional[Path],
    model: Annotated[str | None, tyro.conf.arg(help="which of the recipe's compare; the student when absent")] = None,
    rounds: int = 3,
) -> None:
    """Fit at three values of C, and the whole probe, on every set of a run."""
    log.setup()
    recipe = read_recipe(run / "recipe.yaml")
    reference = recipe.evaluate.compare[model] if model else f"local-dir:{run / 'distill' / 'student'}"
    encoder = Encoder(
        "m", load_clip(reference), run / "features", device=torch.device("cpu"), batch_size=256, workers=0
    )
    print(
        "| set | images x features, classes | C | float32 | float64 | ratio | same answers | default tolerance: answers "
        "that differ, rounds |\n|---|---|---|---|---|---|---|---|"
    )
    for name, where in recipe.evaluate.sets.items():
        if where.startswith("builtin:") or Path(where).is_dir():
            _one_set(name, where, encoder, rounds, recipe.pairs.max_pixels)
    _compare("drawn", _drawn(20_000, 0), _drawn(5_000, 1), (0.1, 1.0, 10.0), rounds)


def _one_set(name: str, where: str, encoder: Encoder, rounds: int, max_pixels: int) -> None:
    opened = open_set(name, where, max_pixels=max_pixels)
    train, test = (_features(encoder, opened.split(split)) for split in ("train", "test"))
    _compare(name, train, test, CHOICES, rounds)
    started = time.process_time()
    probe = linear_probe(*train, *test, metric=opened.metric)
    seconds = time.process_time() - started
    print(
        f"| {name} | whole probe | {probe.fits + 1} fits | {seconds:.1f} s | | | | {probe.rounds:,} rounds |",
        flush=True,
    )


def _compare(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
    choices: Sequence[float],
    rounds: int,
) -> None:
    (x, y), (test, test_y) = train, held
    about = f"{name} | {len(x):,} x {x.shape[1]}, {len(np.unique(y))}"
    wide, wide_test = x.astype(np.float64), test.astype(np.float64)
    for C in choices:
        small, wide_fit, default = Fit(), Fit(), Fit()
        for _ in range(rounds):
            _timed(small, lambda C=C: _fit(x, y, test, C, tolerance(len(y))))
            _timed(wide_fit, lambda C=C: _fit(wide, y, wide_test, C, tolerance(len(y))))
            _timed(default, lambda C=C: _fit(wide, y, wide_test, C, 1e-4))
        differ = np.mean(default.predicted != small.predicted)
        same = np.mean(wide_fit.predicted == small.predicted)
        scores = [100 * np.mean(fit.predicted == test_y) for fit in (small, default)]
        print(
            f"| {about} | {C:g} | {small.seconds:.2f} s | {wide_fit.seconds:.2f} s | {wide_fit.seconds / small.seconds:.2f} "
            f"| {same:.2%} | {differ:.2%} (score {scores[1]:.1f}, ours {scores[0]:.1f}), {default.rounds} of {small.rounds} |"
        )


def _drawn(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as wide as a ViT-B's embeddings, length about 10, few strong directions; 100 classes."""
    random = np.random.default_rng(seed)
    scale = np.arange(1, 513) ** -0.5
    centers = np.random.default_rng(99).normal(size=(100, 512)) * scale * 0.2
    labels = np.arange(images) % 100
    features = centers[labels] + random.normal(size=(images, 512)) * scale
    return (10 * features / np.linalg.norm(features, axis=1).mean()).astype(np.float32), labels


def _features(encoder: Encoder, split: LabelledImages) -> tuple[np.ndarray, np.ndarray]:
    found = encoder.images(split, before=True)
    assert found.before is not None
    return np.array(found.before), split.labels[found.rows]


def _fit(x: np.ndarray, y: np.ndarray, test: np.ndarray, C: float, tol: float) -> tuple[int, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the rounds are printed
        model = LogisticRegression(C=C, tol=tol, max_iter=1_000).fit(x, y)
    return int(model.n_iter_[0]), model.predict(test)


def _timed(fit: Fit, work: Callable[[], tuple[int, np.ndarray]]) -> None:
    started = time.process_time()
    with threadpool_limits(limits=1):
        fit.rounds, fit.predicted = work()
    fit.seconds = min(fit.seconds, time.process_time() - started)


if __name__ == "__main__":
    tyro.cli(speed)
