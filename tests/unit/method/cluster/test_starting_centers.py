import numpy as np
import oracles
import pytest
from mixtures import mixture

from clip_cid.method.cluster import starting_centers
from clip_cid.method.cluster.starting_centers import two_level_start
from clip_cid.method.unit_rows import UnitRows


def images(rows: np.ndarray) -> UnitRows:
    return UnitRows(rows, name="embeddings", any_length=True)


def test_each_group_gets_its_share_of_the_centers():
    rows = np.concatenate([mixture(900, 6, clusters=1, noise=0.1), -mixture(100, 6, clusters=1, noise=0.1)])
    centers = two_level_start(images(rows), 100, seed=0)
    assert centers.shape == (100, 6)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-6)
    assert 80 <= (oracles.unit(centers) @ rows[0] > 0).sum() <= 95
    assert two_level_start(images(rows), 100, seed=0).tobytes() == centers.tobytes()
    assert two_level_start(images(rows), 100, seed=1).tobytes() != centers.tobytes()


@pytest.mark.parametrize(("rows", "num_centers"), [(300, 10), (300, 100), (300, 290), (20_000, 70)])
def test_every_center_starts_as_a_row_and_no_two_as_the_same(rows, num_centers):
    """A center that is the mean of its rows would hold them fast."""
    points = mixture(rows, 8, clusters=20, noise=0.5).astype(np.float32)
    starts = {row.tobytes() for row in two_level_start(images(points), num_centers, seed=0)}
    assert len(starts) == num_centers
    assert starts <= {row.tobytes() for row in images(points).float32(np.arange(rows))}


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [([5, 3, 2], 10, [5, 3, 2]), ([50, 30, 20], 10, [5, 3, 2]), ([7, 0, 1], 1, [1, 0, 0]), ([3, 3, 3], 4, [2, 1, 1])],
)
def test_shares_add_up_and_no_group_gets_more_centers_than_rows(sizes, total, expected):
    assert starting_centers._shares(np.array(sizes), total).tolist() == expected
