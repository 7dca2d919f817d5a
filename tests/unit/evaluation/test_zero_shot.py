"""Zero-shot classification, against open_clip's own classifier and plain argmax."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_sets import CLASSES, TEMPLATES, tiny_clip

from clip_cid.evaluation.features import Encoder
from clip_cid.evaluation.zero_shot import on_classes, prompt_classifier, zero_shot


def test_the_classifier_is_that_of_open_clip(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    expected = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, CLASSES, [template.replace("{c}", "{}") for template in TEMPLATES]
    )
    encoder = Encoder("tiny", clip, tmp_path / "cache", device=torch.device("cpu"), batch_size=4, workers=0)
    prompts = [template.replace("{c}", name) for name in CLASSES for template in TEMPLATES]
    classifier = prompt_classifier(encoder.texts("colors", prompts), num_classes=len(CLASSES))
    np.testing.assert_allclose(classifier, expected.numpy().T, atol=1e-6)


def test_prompts_are_averaged_as_directions() -> None:
    """A long prompt vector counts no more than a short one, and the mean is a direction again."""
    prompts = np.array([[10.0, 0.0], [0.0, 1.0], [3.0, 4.0], [3.0, 4.0]])
    expected = [[np.sqrt(0.5), np.sqrt(0.5)], [0.6, 0.8]]
    np.testing.assert_allclose(prompt_classifier(prompts, num_classes=2), expected, rtol=1e-6)


def test_prompts_that_are_not_equally_many_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many for each of 2 classes, got 3"):
        prompt_classifier(np.eye(3), num_classes=2)


def test_opposite_prompts_have_no_direction() -> None:
    with pytest.raises(ValueError, match="means of the prompts must have finite rows"):
        prompt_classifier(np.array([[1.0, 0.0], [-1.0, 0.0]]), num_classes=1)


@given(st.integers(0, 1000), st.integers(2, 9), st.floats(0.01, 100))
def test_the_scores_are_those_of_argmax_whatever_the_length_of_the_embeddings(
    seed: int, classes: int, length: float
) -> None:
    random = np.random.default_rng(seed)
    images, labels = random.normal(size=(30, 4)), random.integers(0, classes, size=30)
    classifier = prompt_classifier(random.normal(size=(classes, 4)), num_classes=classes)
    result = zero_shot((length * images).astype(np.float32), classifier, labels, metric="top1")
    order = np.argsort(-images @ classifier.T, axis=1)
    assert result.score == result.top1 == np.mean(order[:, 0] == labels)
    if classes >= 5:
        assert result.top5 == np.mean((order[:, :5] == labels[:, None]).any(axis=1))
    else:
        assert result.top5 is None
    np.testing.assert_array_equal(result.predicted, order[:, 0])
    np.testing.assert_array_equal(result.correct, order[:, 0] == labels)


def test_of_equal_logits_the_lowest_class_is_the_answer() -> None:
    images, classifier = np.ones((3, 2)), np.ones((6, 2))
    result = zero_shot(images, classifier, np.array([0, 4, 5]), metric="mean_per_class")
    assert result.correct.tolist() == [True, False, False]
    assert result.top5 == pytest.approx(2 / 3)
    assert result.score == result.mean_per_class == pytest.approx(1 / 3)
    np.testing.assert_array_equal(result.per_class, [1, np.nan, np.nan, np.nan, 0, 0])


@pytest.mark.parametrize(
    ("images", "labels", "problem"),
    [
        (np.ones((2, 3)), [0], "got 2 and 1"),
        (np.ones((1, 2)), [0], "width 2, but classifier has width 3"),
        (np.zeros((1, 3)), [0], "images must have finite rows that are not zero; 1 are not, the first row 0"),
        (np.full((1, 3), np.nan), [0], "images must have finite rows"),
    ],
)
def test_images_that_cannot_be_scored_are_refused(images: np.ndarray, labels: list[int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        zero_shot(images, np.eye(3), np.array(labels), metric="top1")


def test_on_some_classes_only_these_images_and_answers_count() -> None:
    random = np.random.default_rng(0)
    images, labels = random.normal(size=(200, 6)), random.integers(0, 9, size=200)
    classifier = prompt_classifier(random.normal(size=(9, 6)), num_classes=9)
    classes = [7, 2, 3]
    expected = [
        max(classes, key=lambda column: float(image @ classifier[column])) == label
        for image, label in zip(images, labels, strict=True)
        if label in classes
    ]
    result = on_classes(images, classifier, labels, np.array(classes))
    assert (result.score, len(result.correct)) == (pytest.approx(np.mean(expected)), len(expected))
    whole = zero_shot(images, classifier, labels, metric="top1")
    assert result.score > whole.correct[np.isin(labels, classes)].mean()  # fewer wrong answers to choose from


def test_on_all_classes_it_is_the_usual_score() -> None:
    random = np.random.default_rng(0)
    images, labels = random.normal(size=(50, 6)), random.integers(0, 4, size=50)
    classifier = prompt_classifier(random.normal(size=(4, 6)), num_classes=4)
    expected = zero_shot(images, classifier, labels, metric="top1").score
    assert on_classes(images, classifier, labels, np.arange(4)).score == expected


def test_classes_without_an_image_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must have an image of the 1 classes, got none"):
        on_classes(np.eye(3), np.eye(3), np.array([0, 0, 1]), np.array([2]))
