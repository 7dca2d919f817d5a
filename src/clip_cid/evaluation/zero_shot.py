"""Zero-shot classification by CLIP's protocol: the nearest class prompt, prompts averaged in embedding space."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.data.sets.known_sets import MetricName
from clip_cid.evaluation.metrics import accuracy, per_class

_ROWS = 8_192  # images a block of logits holds


@dataclass(frozen=True)
class ZeroShotResult:
    """How often the nearest prompt is the right one."""

    score: float
    """In the set's own metric."""
    metric: MetricName
    top1: float
    top5: float | None
    """None with fewer than five classes, where it says nothing."""
    mean_per_class: float
    per_class: Float[np.ndarray, " classes"]
    """Share of right answers by class; NaN for a class without an image."""
    predicted: Int[np.ndarray, " images"]
    correct: Bool[np.ndarray, " images"]


def prompt_classifier(
    prompts: Float[np.ndarray, "prompts dim"], *, num_classes: int
) -> Float[np.ndarray, "classes dim"]:
    """One unit vector a class from its prompts' embeddings: each normalized, then their mean, normalized again.

    Args:
        prompts: Embeddings class by class, equally many for each.
        num_classes: How many classes they are.
    """
    if num_classes < 1 or len(prompts) == 0 or len(prompts) % num_classes:
        raise ValueError(f"prompts must be equally many for each of {num_classes} classes, got {len(prompts)}")
    vectors = unit_rows(prompts, name="prompts").reshape(num_classes, -1, prompts.shape[1])  # (classes, prompts, dim)
    return unit_rows(vectors.mean(axis=1), name="the means of the prompts")


def zero_shot(
    images: Float[np.ndarray, "images dim"],
    classifier: Float[np.ndarray, "classes width"],
    labels: Int[np.ndarray, " labels"],
    *,
    metric: MetricName,
) -> ZeroShotResult:
    """Score image embeddings (of any length, in the joint space) against `prompt_classifier`'s vectors, in float32.

    Raises:
        ValueError: Lengths differ, a value is not finite, or an embedding is zero and so has no direction.
    """
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(f"images and labels must have one row an image, got {len(images)} and {len(labels)}")
    if images.shape[1] != classifier.shape[1]:
        raise ValueError(f"images has width {images.shape[1]}, but classifier has width {classifier.shape[1]}")
    blocks = list(_answers(images, classifier, labels))
    ranks, predicted = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    correct = ranks == 0
    count = len(classifier)
    return ZeroShotResult(
        score=accuracy(correct, labels, metric=metric),
        metric=metric,
        top1=accuracy(correct, labels, metric="top1"),
        top5=float((ranks < 5).mean()) if count >= 5 else None,
        mean_per_class=accuracy(correct, labels, metric="mean_per_class"),
        per_class=per_class(correct, labels, num_classes=count),
        predicted=predicted,
        correct=correct,
    )


def on_classes(
    images: Float[np.ndarray, "images dim"],
    classifier: Float[np.ndarray, "classes width"],
    labels: Int[np.ndarray, " labels"],
    classes: Int[np.ndarray, " chosen"],
) -> ZeroShotResult:
    """Top-1 on the images of some classes with only these as answers: ImageNet on the classes of -A or -R.

    Columns of other classes are removed before the argmax, so this score differs from that on all classes.

    Args:
        images: Embeddings of all images.
        classifier: `prompt_classifier`'s vectors of all classes.
        labels: Class of each image.
        classes: The positions of the classes to keep.

    Raises:
        ValueError: As `zero_shot`, or no image is of these classes.
    """
    place = np.full(len(classifier), -1)
    place[np.unique(classes)] = np.arange(len(np.unique(classes)))
    rows = np.flatnonzero(place[labels] >= 0)
    if len(rows) == 0:
        raise ValueError(f"labels must have an image of the {len(classes)} classes, got none")
    return zero_shot(images[rows], classifier[np.unique(classes)], place[labels[rows]], metric="top1")


def unit_rows(rows: Float[np.ndarray, "rows dim"], *, name: str) -> Float[np.ndarray, "rows dim"]:
    """Rows at length 1, in float32; a row without a direction is an error, not a NaN."""
    values = rows.astype(np.float32)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise ValueError(f"{name} must have finite rows that are not zero; {len(bad)} are not, the first row {bad[0]}")
    return values / norms


def _answers(
    images: Float[np.ndarray, "images dim"],
    classifier: Float[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " images"],
) -> Iterator[tuple[Int[np.ndarray, " block"], Int[np.ndarray, " block"]]]:
    """How many classes come before the right one, and the answer; of equal logits the lower class is first."""
    classes = np.arange(len(classifier))
    for start in range(0, len(images), _ROWS):
        truth = labels[start : start + _ROWS, None]
        logits = 100 * unit_rows(images[start : start + _ROWS], name="images") @ classifier.astype(np.float32).T
        right = np.take_along_axis(logits, truth, axis=1)
        yield ((logits > right) | ((logits == right) & (classes < truth))).sum(axis=1), logits.argmax(axis=1)
