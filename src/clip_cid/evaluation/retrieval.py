"""Image-text retrieval: is the right caption among the first k, and the right image?"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from clip_cid.evaluation.metrics import bootstrap_ratio
from clip_cid.evaluation.zero_shot import unit_rows

DEPTHS = (1, 5, 10)
_CELLS = 20_000_000  # similarities held at once


_Counts = tuple[Int[np.ndarray, " queries"], Int[np.ndarray, " queries"], Int[np.ndarray, " queries"]]
"""Per query: wrong answers before the best right one, wrong answers equal to it, right answers equal to it."""


@dataclass(frozen=True)
class Recall:
    """The share of queries whose answer is among the first `depth`."""

    metric: str
    """`image_to_text_R@5`, `text_to_image_R@1`, ..."""
    score: float
    low: float
    high: float
    chance: float
    """The score of a model that knows nothing."""
    queries: int
    hits: Float[np.ndarray, " images"] = field(compare=False)
    """Queries of each image with a right answer among the first: its own, or those of its captions."""


def retrieval(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts width"],
    image_of: Int[np.ndarray, " owners"],
    *,
    seed: int = 0,
) -> list[Recall]:
    """Recall at 1, 5 and 10, both ways; caption `t` describes image `image_of[t]`, and an image may have several.

    An image counts as right if *any* of its captions is among the first k. Equal similarities are in random
    order, and the score is the mean over all such orders, so a model that embeds everything alike scores
    exactly chance. Intervals redraw images together with their captions.

    Raises:
        ValueError: Shapes do not fit, an image has no caption, or an embedding has no direction.
    """
    _check(images, texts, image_of)
    image_rows, text_rows = unit_rows(images, name="images"), unit_rows(texts, name="texts")
    captions = np.bincount(image_of, minlength=len(images))
    ones = np.ones(len(images))
    recalls: list[Recall] = []

    counts = _joined(_image_to_text(image_rows, text_rows, image_of))
    for depth in DEPTHS:
        hits = _chance_of_hit(*counts, depth)
        blind = _chance_of_hit(np.zeros_like(captions), len(texts) - captions, captions, depth)
        recalls.append(_recall(f"image_to_text_R@{depth}", hits, ones, float(blind.mean()), len(images), seed))

    counts = _joined(_text_to_image(image_rows, text_rows, image_of))
    for depth in DEPTHS:
        hits = np.bincount(image_of, weights=_chance_of_hit(*counts, depth), minlength=len(images))
        blind = min(1.0, depth / len(images))
        recalls.append(_recall(f"text_to_image_R@{depth}", hits, captions.astype(float), blind, len(texts), seed))
    return recalls


def _check(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts width"],
    image_of: Int[np.ndarray, " owners"],
) -> None:
    if len(image_of) != len(texts) or images.shape[1] != texts.shape[1]:
        raise ValueError(f"texts {texts.shape} must fit images {images.shape} and image_of {image_of.shape}")
    if len(texts) == 0 or image_of.min() < 0 or image_of.max() >= len(images):
        raise ValueError(f"image_of must lie in 0..{len(images) - 1} and texts must not be empty")
    without = np.flatnonzero(np.bincount(image_of, minlength=len(images)) == 0)
    if len(without):
        raise ValueError(f"images must each have a caption; {len(without)} have none, the first image {without[0]}")


def _recall(
    metric: str,
    hits: Float[np.ndarray, " units"],
    counts: Float[np.ndarray, " units"],
    chance: float,
    queries: int,
    seed: int,
) -> Recall:
    low, high = bootstrap_ratio(hits, counts, seed=seed)
    return Recall(metric, float(hits.sum() / counts.sum()), low, high, chance, queries, hits)


def _joined(blocks: Iterator[_Counts]) -> _Counts:
    ahead, wrong, right = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return ahead, wrong, right


def _image_to_text(
    images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"], image_of: Int[np.ndarray, " texts"]
) -> Iterator[_Counts]:
    for start, similarity in _blocks(images, texts):
        right = image_of[None, :] == np.arange(start, start + len(similarity))[:, None]
        best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
        ahead, equal = similarity > best, similarity == best
        yield (ahead & ~right).sum(axis=1), (equal & ~right).sum(axis=1), (equal & right).sum(axis=1)


def _text_to_image(
    images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"], image_of: Int[np.ndarray, " texts"]
) -> Iterator[_Counts]:
    for start, similarity in _blocks(texts, images):
        owners = image_of[start : start + len(similarity), None]
        right = np.take_along_axis(similarity, owners, axis=1)
        equal = (similarity == right).sum(axis=1) - 1
        yield (similarity > right).sum(axis=1), equal, np.ones_like(equal)


def _blocks(
    queries: Float[np.ndarray, "queries dim"], answers: Float[np.ndarray, "answers dim"]
) -> Iterator[tuple[int, Float[np.ndarray, "block answers"]]]:
    step = max(1, _CELLS // len(answers))
    for start in range(0, len(queries), step):
        yield start, queries[start : start + step] @ answers.T


def _chance_of_hit(
    ahead: Int[np.ndarray, " queries"],
    wrong: Int[np.ndarray, " queries"],
    right: Int[np.ndarray, " queries"],
    depth: int,
) -> Float[np.ndarray, " queries"]:
    """The probability that a right answer is among the first `depth` when equal answers come in random order."""
    room = depth - ahead
    miss = np.ones(len(ahead))
    for place in range(depth):
        another_wrong = np.clip(wrong - place, 0, None) / np.maximum(wrong + right - place, 1)
        miss = np.where(place < room, miss * another_wrong, miss)
    return 1 - miss
