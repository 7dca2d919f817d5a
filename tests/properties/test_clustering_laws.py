"""Laws of the spherical k-means, over rows that hypothesis chooses."""

import itertools
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.cluster.clustering import KMeansState, assign, spherical_kmeans


@st.composite
def points(draw):
    dim = draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3), min_size=dim, max_size=dim).filter(any)
    return np.array(draw(st.lists(row, min_size=1, max_size=20)), dtype=np.float32)


@pytest.mark.slow
@given(points(), st.data())
def test_labels_are_the_nearest_centers_and_centers_have_unit_length(rows, data):
    found = spherical_kmeans(rows, num_centers=data.draw(st.integers(1, len(rows))), seed=data.draw(st.integers(0, 99)))
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-6)
    assert found.labels.tolist() == oracles.nearest(rows, found.centers)
    assert abs(found.objective - oracles.kmeans_objective(rows, found.centers, found.labels)) < 1e-6


@pytest.mark.slow
@given(points(), points(), st.integers(1, 21))
def test_the_assignment_does_not_depend_on_the_block_size(rows, centers, block_rows):
    centers = oracles.unit(np.resize(centers, (len(centers), rows.shape[1])) + 0.25)
    labels, cosines = assign(rows, centers, block_rows=block_rows)
    whole_labels, whole_cosines = assign(rows, centers)
    np.testing.assert_array_equal(labels, whole_labels)
    np.testing.assert_array_equal(cosines, whole_cosines)
    assert labels.tolist() == oracles.nearest(rows, centers)


@given(points(), st.data())
def test_the_objective_never_gets_worse_whatever_centers_move_to_other_rows(rows, data):
    rows = np.repeat(rows, data.draw(st.integers(1, 4)), axis=0)
    num_centers = data.draw(st.integers(1, len(rows)))
    found = spherical_kmeans(rows, num_centers=num_centers, iterations=6)
    assert all(later["objective"] <= sooner["objective"] + 1e-6 for sooner, later in itertools.pairwise(found.history))
    assert found.objective <= found.history[-1]["objective"] + 1e-6


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 6, 64, 90]))
def test_the_objective_never_gets_worse_on_random_rows(seed, num_centers):
    rows = np.random.default_rng(seed).standard_normal((120, 4))
    history = spherical_kmeans(rows, num_centers=num_centers, seed=seed, iterations=10).history
    assert all(later["objective"] <= sooner["objective"] + 1e-6 for sooner, later in itertools.pairwise(history))


@given(points(), st.data())
def test_resumed_after_any_round_it_ends_at_the_same_bits(rows, data):
    states: list[KMeansState] = []
    settings: dict[str, Any] = {"num_centers": data.draw(st.integers(1, len(rows))), "iterations": 4}
    whole = spherical_kmeans(rows, **settings, on_state=states.append)
    again = spherical_kmeans(rows, **settings, start=data.draw(st.sampled_from(states)))
    assert again.centers.tobytes() == whole.centers.tobytes()
    assert again.labels.tobytes() == whole.labels.tobytes()
    assert again.history == whole.history
