"""How far two models are apart, by a paired bootstrap: both answered the same images, so the images are redrawn for both."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from clip_cid.evaluation.metrics import accuracy, bootstrap_draws, bootstrap_ratio, middle_95, shares
from clip_cid.evaluation.results import Answers
from clip_cid.evaluation.tables import Group, Row


def differences(
    rows: Sequence[Row], answers: Callable[[Row], Answers], *, groups: Sequence[Group], seed: int
) -> list[Row]:
    """Every pair of models on every set and metric, and over the sets of every group.

    Intervals are 95 % of a paired percentile bootstrap, of images as in `metrics.bootstrap_draws`; one that holds 0 means that
    these images cannot tell the two models apart. The interval of a mean redraws the images of every set, not the sets: it
    says nothing about other sets.

    Args:
        rows: The results of one task, all models.
        answers: What a line's score is made of.
        groups: Sets with a common mean; none for retrieval.
        seed: Of the bootstrap.

    Returns:
        `set` or `group`, `metric`, `model`, `other`, `difference` (model minus other, a share of 1), `low`, `high`.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    by_model = {model: {(row["set"], row["metric"]): row for row in rows if row["model"] == model} for model in models}
    found: list[Row] = []
    for model, other in itertools.combinations(models, 2):
        draws: dict[str, np.ndarray] = {}
        scores: dict[str, float] = {}
        for (name, metric), row in by_model[model].items():
            ours, theirs = answers(row), answers(by_model[other][name, metric])
            line = {"set": name, "metric": metric, "model": model, "other": other}
            set_seed = [seed, zlib.crc32(name.encode())]  # sets are redrawn independently of one another
            if metric in ours:
                found.append({**line, **_of_recalls(metric, ours, theirs, set_seed)})
                continue
            labels = ours["labels"].astype(np.int64)
            change = shares(ours["predicted"], labels).astype(np.float64) - shares(theirs["predicted"], labels)
            draws[name] = bootstrap_draws(change, labels, metric=row["metric"], seed=set_seed)
            scores[name] = accuracy(change, labels, metric=row["metric"])
            found.append({**line, **_line(scores[name], draws[name])})
        pair = {"model": model, "other": other}
        found += [{**line, **pair} for line in _of_groups(groups, scores, draws)]
    return found


def _of_recalls(metric: str, ours: Answers, theirs: Answers, seed: Sequence[int]) -> Row:
    counts = ours["captions"].astype(np.float64) if metric.startswith("text_to_image") else np.ones(len(ours[metric]))
    change = ours[metric] - theirs[metric]
    low, high = bootstrap_ratio(change, counts, seed=seed)
    return {"difference": float(change.sum() / counts.sum()), "low": low, "high": high}


def _of_groups(
    groups: Sequence[Group], scores: dict[str, float], draws: dict[str, Float[np.ndarray, " resamples"]]
) -> Iterator[Row]:
    for group in groups:
        there = [name for name in group.sets if name in scores]
        if there:
            mean = float(np.mean([scores[name] for name in there]))
            together = np.mean([draws[name] for name in there], axis=0)
            yield {"group": group.title(len(there)), "metric": "mean", **_line(mean, together)}


def _line(difference: float, draws: Float[np.ndarray, " resamples"]) -> Row:
    low, high = middle_95(draws)
    return {"difference": difference, "low": low, "high": high}
