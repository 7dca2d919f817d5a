"""Rules of preference: the laws, and sets worked by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.balance.kept_rows import keep_one_of_each
from clip_cid.method.balance.preferred_rows import Rule, keep_preferred
from clip_cid.method.distances import squared_distances
from clip_cid.method.unit_rows import UnitRows

ROWS = 40


def made(seed: int) -> tuple[UnitRows, UnitRows, np.ndarray]:
    random = np.random.default_rng(seed)
    images, texts = (UnitRows(random.standard_normal((ROWS, 5)), name="rows", any_length=True) for _ in "it")
    return images, texts, np.unique(random.integers(0, 12, ROWS), return_inverse=True)[1]


def of(values: Sequence[float] | np.ndarray) -> Rule:
    return np.asarray(values, dtype=np.float64).__getitem__


@given(st.integers(0, 1000), st.sampled_from([None, 0.5]), st.booleans())
def test_the_papers_rule_alone_keeps_what_it_always_kept(seed: int, radius: float | None, captions: bool) -> None:
    images, texts, labels = made(seed)
    own = texts if captions else None
    expected = keep_one_of_each(images, own, labels, squared_radius=radius)
    given: list[list[Rule]] = [[], ["nearest_centroid"], [of(np.zeros(ROWS))], [of(np.full(ROWS, np.nan))]]
    for rules in given:
        found = keep_preferred(images, own, labels, rules=rules, squared_radius=radius)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@given(st.integers(0, 1000))
def test_the_kept_row_of_each_set_has_the_highest_value_and_the_next_rule_decides_between_equals(seed: int) -> None:
    images, texts, labels = made(seed)
    random = np.random.default_rng(seed + 1)
    first, second = random.integers(0, 3, ROWS).astype(float), random.permutation(ROWS).astype(float)
    kept, set_of = keep_preferred(images, texts, labels, rules=[of(first), of(second)])
    np.testing.assert_array_equal(labels[kept[set_of]], labels)
    for row in kept.tolist():
        own = np.flatnonzero(labels == labels[row])
        assert (first[row], second[row]) == max(zip(first[own].tolist(), second[own].tolist(), strict=True))


@given(st.integers(0, 1000))
def test_with_a_radius_every_removed_row_is_within_it_and_what_is_left_chooses_by_the_same_rule(seed: int) -> None:
    images, texts, labels = made(seed)
    values = np.random.default_rng(seed + 1).permutation(ROWS).astype(float)
    kept, set_of = keep_preferred(images, texts, labels, rules=[of(values)], squared_radius=0.8)
    rows = np.arange(ROWS)
    assert (squared_distances(images[rows], images[kept[set_of]]) <= 0.8).all()
    for one in set(labels.tolist()):
        own = np.flatnonzero(labels == one)
        assert own[values[own].argmax()] in kept


def test_a_pair_is_equally_near_its_centroid_so_the_next_rule_decides() -> None:
    images = UnitRows(np.array([[1.0, 0.0], [0.96, 0.28], [0.0, 1.0]]), name="rows", any_length=True)
    labels = np.array([0, 0, 1])
    kept, set_of = keep_preferred(images, None, labels, rules=["nearest_centroid", of([1.0, 2.0, 0.0])])
    assert (kept.tolist(), set_of.tolist()) == ([1, 2], [0, 0, 1])


def test_a_row_without_a_value_is_kept_only_where_none_has_one() -> None:
    images = UnitRows(np.eye(4), name="rows", any_length=True)
    values = of([np.nan, -np.inf, np.nan, np.nan])
    kept, _ = keep_preferred(images, None, np.array([0, 0, 1, 1]), rules=[values, of([0.0, 1.0, 0.0, 1.0])])
    assert kept.tolist() == [1, 3]


@pytest.mark.parametrize("size", [5000, 9000])
def test_sets_larger_than_a_portion_are_whole(size: int) -> None:
    images = UnitRows(np.tile(np.eye(2), (size // 2 + 1, 1)), name="rows", any_length=True)
    labels = np.r_[np.zeros(size, dtype=np.int64), np.ones(len(images) - size, dtype=np.int64)]
    kept, _ = keep_preferred(images, None, labels, rules=[np.arange(len(images), dtype=np.float64).__getitem__])
    assert kept.tolist() == [size - 1, len(images) - 1]
