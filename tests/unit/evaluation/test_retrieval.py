"""Recall at k, against a version that sorts one query at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.evaluation.retrieval import DEPTHS, retrieval


def slow_recalls(images: np.ndarray, texts: np.ndarray, image_of: np.ndarray) -> dict[str, float]:
    """Sort every query's answers by cosine; no ties are expected."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b) / float(np.sqrt((a @ a) * (b @ b)))

    found = {}
    for depth in DEPTHS:
        hits = []
        for number, image in enumerate(images):
            order = sorted(range(len(texts)), key=lambda t: -cosine(image, texts[t]))
            hits.append(any(image_of[t] == number for t in order[:depth]))
        found[f"image_to_text_R@{depth}"] = float(np.mean(hits))
        hits = []
        for number, text in enumerate(texts):
            order = sorted(range(len(images)), key=lambda i: -cosine(text, images[i]))
            hits.append(image_of[number] in order[:depth])
        found[f"text_to_image_R@{depth}"] = float(np.mean(hits))
    return found


def scores(images: np.ndarray, texts: np.ndarray, image_of: np.ndarray) -> dict[str, float]:
    return {recall.metric: recall.score for recall in retrieval(images, texts, image_of)}


@given(st.integers(0, 10_000), st.lists(st.integers(1, 4), min_size=1, max_size=14))
def test_recalls_are_those_of_sorting_each_query(seed: int, captions: list[int]) -> None:
    random = np.random.default_rng(seed)
    image_of = random.permutation(np.repeat(np.arange(len(captions)), captions))
    images = random.normal(size=(len(captions), 6))
    texts = images[image_of] + random.normal(size=(len(image_of), 6))
    found, expected = scores(images, texts, image_of), slow_recalls(images, texts, image_of)
    assert found == pytest.approx(expected)


def test_an_image_is_found_by_any_of_its_captions_and_each_caption_must_find_its_image() -> None:
    images = np.eye(3)
    texts = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1]])  # the second caption describes the wrong image
    found = scores(images, texts, np.array([0, 0, 1, 2]))
    assert found["image_to_text_R@1"] == pytest.approx(2 / 3)  # the middle image's best caption is not its own
    assert found["text_to_image_R@1"] == pytest.approx(3 / 4)
    assert found["image_to_text_R@5"] == found["text_to_image_R@5"] == 1


@given(st.lists(st.integers(1, 5), min_size=2, max_size=30))
def test_a_model_that_embeds_everything_alike_scores_exactly_chance(captions: list[int]) -> None:
    image_of = np.repeat(np.arange(len(captions)), captions)
    for recall in retrieval(np.ones((len(captions), 3)), np.ones((len(image_of), 3)), image_of):
        assert recall.score == pytest.approx(recall.chance)


def test_chance_is_what_random_embeddings_score() -> None:
    random = np.random.default_rng(0)
    image_of = np.repeat(np.arange(12), [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 1])
    runs = [retrieval(random.normal(size=(12, 9)), random.normal(size=(32, 9)), image_of) for _ in range(60)]
    for recalls in zip(*runs, strict=True):
        assert np.mean([recall.score for recall in recalls]) == pytest.approx(recalls[0].chance, abs=0.05)


def test_a_tie_with_one_wrong_answer_is_half_a_hit() -> None:
    images, texts = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    assert scores(images, texts, np.array([0, 1]))["text_to_image_R@1"] == pytest.approx((0.5 + 1) / 2)


def test_the_interval_holds_the_score_and_the_seed_decides_it() -> None:
    random = np.random.default_rng(0)
    image_of = np.repeat(np.arange(40), 3)
    images = random.normal(size=(40, 5))
    texts = images[image_of] + random.normal(size=(120, 5))
    first = retrieval(images, texts, image_of, seed=1)
    assert first == retrieval(images, texts, image_of, seed=1)
    assert first != retrieval(images, texts, image_of, seed=2)
    assert all(recall.low <= recall.score <= recall.high for recall in first)
    assert [recall.queries for recall in first] == [40, 40, 40, 120, 120, 120]
    for recall in first:
        assert recall.hits.sum() / recall.queries == pytest.approx(recall.score)


@pytest.mark.parametrize(
    ("images", "texts", "image_of", "problem"),
    [
        (np.eye(2), np.eye(2), [0], "must fit"),
        (np.eye(2), np.eye(3), [0, 1, 1], "must fit"),
        (np.eye(2), np.eye(2), [0, 2], r"image_of must lie in 0\.\.1"),
        (np.eye(2), np.eye(2), [1, 1], "1 have none, the first image 0"),
        (np.zeros((2, 2)), np.eye(2), [0, 1], "images must have finite rows that are not zero"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(
    images: np.ndarray, texts: np.ndarray, image_of: list[int], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        retrieval(images, texts, np.array(image_of))
