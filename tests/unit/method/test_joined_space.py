"""Laws of the joined space, in float64."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.joined_space import equal_weights, even_rotation, join_rows

dims = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 20, 31, 48, 64])
seeds = st.integers(0, 2**32 - 1)


def cone(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit rows around a direction, spread unevenly over the dimensions."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(count, dim)) * np.exp(1.5 * random.normal(size=dim)) + 3 * random.normal(size=dim)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def covariance(rows: np.ndarray) -> np.ndarray:
    """By the definition, a row at a time."""
    mean = np.sum(rows, axis=0) / len(rows)
    return np.sum([np.outer(row - mean, row - mean) for row in rows], axis=0) / len(rows)


def joined(*teachers: np.ndarray) -> np.ndarray:
    covariances = [covariance(rows) for rows in teachers]
    weights = equal_weights([float(np.trace(one)) for one in covariances])
    return join_rows(teachers, [even_rotation(one) for one in covariances], weights)


@given(dims, seeds)
def test_the_rotation_is_orthogonal_and_makes_the_variance_even(dim: int, seed: int):
    rows = cone(40, dim, seed)
    rotation = even_rotation(covariance(rows))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(dim), atol=1e-12)
    variances = (rows @ rotation.T).var(axis=0)
    np.testing.assert_allclose(variances, np.full(dim, variances.mean()), rtol=1e-9, atol=1e-15)


@given(st.sampled_from([1, 2, 8, 64]), seeds)
def test_for_a_power_of_two_it_is_that_of_phi_s(dim: int, seed: int):
    """H U^T: against the principal axes, by another algorithm, each entry is 1 or -1 over the root of D."""
    rows = cone(4 * dim + 3, dim, seed)
    _, _, axes = np.linalg.svd(rows - rows.mean(axis=0))
    entries = even_rotation(covariance(rows)) @ axes.T
    np.testing.assert_allclose(np.abs(entries), np.full((dim, dim), dim**-0.5), atol=1e-7)


@given(dims.filter(lambda dim: dim > 1), seeds)
def test_one_teacher_alone_keeps_all_cosines(dim: int, seed: int):
    rows = cone(10, dim, seed)
    found = joined(rows)
    np.testing.assert_allclose(found @ found.T, rows @ rows.T, atol=1e-12)


@given(st.lists(dims.filter(lambda dim: dim > 1), min_size=2, max_size=4), seeds)
def test_a_joined_cosine_is_the_weighted_mean_and_each_teacher_varies_as_much(widths: list[int], seed: int):
    teachers = [cone(12, dim, seed + number) for number, dim in enumerate(widths)]
    variances = [1 - float(np.square(rows.mean(axis=0)).sum()) for rows in teachers]  # unit rows: 1 - |mean|^2
    shares = [1 / variance / sum(1 / other for other in variances) for variance in variances]
    found = joined(*teachers)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.ones(12), atol=1e-9)
    expected = sum(share * rows @ rows.T for share, rows in zip(shares, teachers, strict=True))
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-9)

    of_each = [share * np.square(rows - rows.mean(axis=0)).sum() for share, rows in zip(shares, teachers, strict=True)]
    np.testing.assert_allclose(of_each, np.full(len(widths), np.mean(of_each)), rtol=1e-9)
    edges = np.cumsum([0, *widths])
    parts = [found[:, first:last] for first, last in itertools.pairwise(edges)]
    totals = [part.var(axis=0).sum() for part in parts]
    np.testing.assert_allclose(totals, np.full(len(widths), np.mean(totals)), rtol=1e-8)


@given(seeds)
def test_the_order_of_the_teachers_only_permutes_the_numbers_of_a_row(seed: int):
    one, two = cone(9, 6, seed), cone(9, 16, seed + 1)
    forwards, backwards = joined(one, two), joined(two, one)
    np.testing.assert_array_equal(forwards, np.concatenate([backwards[:, 16:], backwards[:, :16]], axis=1))


def test_the_length_of_a_row_does_not_matter():
    one, two = cone(9, 6, 0), cone(9, 5, 1)
    rotations, weights = [np.eye(6), np.eye(5)], equal_weights([0.3, 0.4])
    scaled = one * np.linspace(0.5, 2, 9)[:, None]
    np.testing.assert_allclose(join_rows([scaled, two], rotations, weights), join_rows([one, two], rotations, weights))


@pytest.mark.parametrize("variances", [[0.1, 0.0], [-1.0], [float("nan")]])
def test_a_teacher_without_variance_is_refused(variances: list[float]):
    with pytest.raises(ValueError, match="must be above 0"):
        equal_weights(variances)


@pytest.mark.parametrize("matrix", [[[1.0, 0.5], [0.0, 1.0]], [[np.nan, 0.0], [0.0, 1.0]]])
def test_what_is_no_covariance_is_refused(matrix: list[list[float]]):
    with pytest.raises(ValueError, match="symmetric and finite"):
        even_rotation(np.array(matrix))
