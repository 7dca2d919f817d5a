"""Two models on the same images: the difference, its interval, and what a pair of intervals alone would not show."""

import numpy as np
import pytest

from clip_cid.evaluation.comparison import differences
from clip_cid.evaluation.metrics import bootstrap_interval
from clip_cid.evaluation.scores import Difference, Score
from clip_cid.evaluation.tables import Group


class Made:
    """Lines of results and the answers behind them, in memory."""

    def __init__(self) -> None:
        self.scores: list[Score] = []
        self._answers: list[dict[str, np.ndarray]] = []

    def add(self, model: str, name: str, predicted: np.ndarray, labels: np.ndarray, metric: str = "top1") -> None:
        self._line(model, name, metric, {"predicted": predicted, "labels": labels.astype(np.int16)})

    def recall(self, model: str, metric: str, hits: list[float], captions: list[int]) -> None:
        self._line(model, "pairs", metric, {metric: np.array(hits, dtype=float), "captions": np.array(captions)})

    def _line(self, model: str, name: str, metric: str, answers: dict[str, np.ndarray]) -> None:
        task = "retrieval" if "captions" in answers else "zero_shot"
        self.scores.append(Score(model, name, task, metric, 0.5, n=len(self.scores)))
        self._answers.append(answers)

    def compared(self, groups: list[Group] | None = None) -> list[Difference]:
        return differences(self.scores, lambda score: self._answers[score.n or 0], groups=groups or [], seed=0)


def test_models_that_answer_alike_do_not_differ() -> None:
    made, labels = Made(), np.arange(40) % 4
    for model in ("a", "b"):
        made.add(model, "x", np.minimum(labels, 2), labels)
    (line,) = made.compared()
    assert (line.difference, line.low, line.high) == (0, 0, 0)


def test_a_small_lead_on_the_same_images_is_certain_where_two_intervals_are_not() -> None:
    """b is wrong wherever a is, and on 30 images of 1,000 more: paired that is beyond doubt, apart it is not."""
    labels = np.zeros(1000, dtype=np.int64)
    ours, theirs = np.repeat([0, 1], [600, 400]), np.repeat([0, 1], [570, 430])
    made = Made()
    made.add("a", "x", ours, labels)
    made.add("b", "x", theirs, labels)
    (line,) = made.compared()
    assert line.difference == pytest.approx(0.03)
    assert 0.015 < line.low < 0.03 < line.high < 0.045
    apart = [bootstrap_interval(answers == labels, labels, metric="top1", seed=0) for answers in (ours, theirs)]
    assert apart[1][1] > apart[0][0]


def test_every_pair_of_models_is_compared_in_the_metric_of_the_set() -> None:
    labels = np.array([0, 0, 0, 1])
    made = Made()
    for model, predicted in (("a", [0, 0, 0, 0]), ("b", [1, 1, 1, 1]), ("c", [0, 0, 0, 1])):
        made.add(model, "x", np.array(predicted), labels, metric="mean_per_class")
    found = {(line.model, line.other): line.difference for line in made.compared()}
    assert found == {("a", "b"): 0.0, ("a", "c"): -0.5, ("b", "c"): -0.5}


def test_the_mean_of_a_group_is_over_its_sets_and_surer_than_each() -> None:
    random, made = np.random.default_rng(0), Made()
    labels = np.zeros(200, dtype=np.int64)
    for name in ("x", "y", "z"):
        made.add("a", name, (random.random(200) > 0.6).astype(int), labels)
    for name in ("x", "y", "z"):
        made.add("b", name, (random.random(200) > 0.5).astype(int), labels)
    found = made.compared([Group("", ("x", "y"), 3), Group("rest", ("gone",), 1)])
    by_set = {line.set: line for line in found if not line.of_group}
    (mean,) = (line for line in found if line.of_group)
    assert mean.set == "mean of 2/3"
    assert mean.difference == pytest.approx((by_set["x"].difference + by_set["y"].difference) / 2)
    width, widths = mean.high - mean.low, [line.high - line.low for line in by_set.values()]
    assert width == pytest.approx(np.hypot(widths[0], widths[1]) / 2, rel=0.1)  # sets are redrawn independently


def test_folds_count_by_the_share_that_was_right() -> None:
    labels = np.array([0, 0])
    made = Made()
    made.add("a", "stl10", np.array([[0, 0], [0, 1]]), labels)
    made.add("b", "stl10", np.array([[1, 0], [1, 1]]), labels)
    (line,) = made.compared()
    assert line.difference == pytest.approx(3 / 4 - 1 / 4)


def test_recalls_are_compared_over_whole_images() -> None:
    made = Made()
    made.recall("a", "text_to_image_R@1", [2, 0], [2, 3])
    made.recall("b", "text_to_image_R@1", [1, 0], [2, 3])
    (line,) = made.compared()
    assert line.difference == pytest.approx(1 / 5)
    assert (line.low, line.high) == (0, pytest.approx(1 / 2))  # the second image twice, the first twice
    made = Made()
    made.recall("a", "image_to_text_R@1", [1, 0], [2, 3])
    made.recall("b", "image_to_text_R@1", [0, 0], [2, 3])
    assert made.compared()[0].difference == pytest.approx(1 / 2)
