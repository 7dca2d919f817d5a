"""The difference of two models by a paired bootstrap: each draw takes the same images for both."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from clip_cid.data.sets.known_sets import MetricName
from clip_cid.evaluation.metrics import accuracy, bootstrap_draws, bootstrap_ratio, middle_95, shares
from clip_cid.evaluation.results import Answers
from clip_cid.evaluation.scores import MEAN, Difference, Score
from clip_cid.evaluation.tables import Group


def differences(
    scores: Sequence[Score], answers: Callable[[Score], Answers], *, groups: Sequence[Group], seed: int
) -> list[Difference]:
    """Compare every pair of models on every set and metric, and over the sets of every group.

    Intervals are 95 % of a paired percentile bootstrap over images, as in `metrics.bootstrap_draws`. An
    interval that contains 0 means that these images do not separate the two models. The interval of a mean
    redraws the images of every set, not the sets: it says nothing about other sets.

    Args:
        scores: The results of one protocol, all models.
        answers: What a score is made of.
        groups: Sets with a common mean; none for retrieval.
        seed: Of the bootstrap.
    """
    models = list(dict.fromkeys(score.model for score in scores))
    by_model = {model: {(s.set, s.metric): s for s in scores if s.model == model} for model in models}
    pairs: list[Difference] = []
    for model, other in itertools.combinations(models, 2):
        draws: dict[str, np.ndarray] = {}
        changes: dict[str, float] = {}
        for (name, metric), score in by_model[model].items():
            ours, theirs = answers(score), answers(by_model[other][name, metric])
            set_seed = [seed, zlib.crc32(name.encode())]  # sets are redrawn independently of one another
            if metric in ours:
                change, interval = _recall_change(metric, ours, theirs, set_seed)
            else:
                change, draws[name] = _accuracy_change(score.metric, ours, theirs, set_seed)
                changes[name], interval = change, middle_95(draws[name])
            pairs.append(Difference(score.task, name, metric, model, other, change, *interval))

        for title, change, interval in _group_changes(groups, changes, draws):
            pairs.append(Difference(scores[0].task, title, MEAN, model, other, change, *interval))
    return pairs


def _accuracy_change(
    metric: str, ours: Answers, theirs: Answers, seed: Sequence[int]
) -> tuple[float, Float[np.ndarray, " resamples"]]:
    """The difference of two accuracies, and its bootstrap distribution."""
    labels = ours["labels"].astype(np.int64)
    change = shares(ours["predicted"], labels).astype(np.float64) - shares(theirs["predicted"], labels)
    name: MetricName = "top1" if metric == "top1" else "mean_per_class"
    return accuracy(change, labels, metric=name), bootstrap_draws(change, labels, metric=name, seed=seed)


def _recall_change(
    metric: str, ours: Answers, theirs: Answers, seed: Sequence[int]
) -> tuple[float, tuple[float, float]]:
    """The difference of two recalls, and its interval over images with all their captions."""
    counts = ours["captions"].astype(np.float64) if metric.startswith("text_to_image") else np.ones(len(ours[metric]))
    change = ours[metric] - theirs[metric]
    return float(change.sum() / counts.sum()), bootstrap_ratio(change, counts, seed=seed)


def _group_changes(
    groups: Sequence[Group], changes: dict[str, float], draws: dict[str, Float[np.ndarray, " resamples"]]
) -> Iterator[tuple[str, float, tuple[float, float]]]:
    """Title, difference of the means and interval of each group with a measured set."""
    for group in groups:
        measured = [name for name in group.sets if name in changes]
        if measured:
            mean = float(np.mean([changes[name] for name in measured]))
            together = np.mean([draws[name] for name in measured], axis=0)
            yield group.title(len(measured)), mean, middle_95(together)
