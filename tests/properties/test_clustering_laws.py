"""Laws of the spherical k-means, over rows that hypothesis chooses."""

import itertools

import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.clustering import assign, spherical_kmeans


@st.composite
def points(draw):
    dim = draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3), min_size=dim, max_size=dim).filter(any)
    return np.array(draw(st.lists(row, min_size=1, max_size=20)), dtype=np.float32)


@given(points(), st.data())
def test_labels_are_the_nearest_centers_and_centers_have_unit_length(rows, data):
    found = spherical_kmeans(rows, num_centers=data.draw(st.integers(1, len(rows))), seed=data.draw(st.integers(0, 99)))
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-6)
    assert found.labels.tolist() == oracles.nearest(rows, found.centers)
    assert abs(found.objective - oracles.kmeans_objective(rows, found.centers, found.labels)) < 1e-6


@given(points(), points(), st.integers(1, 21))
def test_the_assignment_does_not_depend_on_the_block_size(rows, centers, block_rows):
    centers = oracles.unit(np.resize(centers, (len(centers), rows.shape[1])) + 0.25)
    labels, cosines = assign(rows, centers, block_rows=block_rows)
    whole_labels, whole_cosines = assign(rows, centers)
    np.testing.assert_array_equal(labels, whole_labels)
    np.testing.assert_array_equal(cosines, whole_cosines)
    assert labels.tolist() == oracles.nearest(rows, centers)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_the_objective_never_gets_worse_while_no_cluster_is_empty(seed, num_centers):
    rows = np.random.default_rng(seed).standard_normal((60, 4))
    history = spherical_kmeans(rows, num_centers=num_centers, seed=seed, iterations=10).history
    for sooner, later in itertools.pairwise(history):
        assert sooner["empty"] or later["objective"] <= sooner["objective"] + 1e-5
