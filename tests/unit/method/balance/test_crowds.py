import numpy as np
import pytest
from hard_rows import KINDS, kruskal, near_pairs, slow_forest, squared_matrix, unit

from clip_cid.method.balance import crowds
from clip_cid.method.balance.crowds import groups_of_pairs, possible_links

Named = set[tuple[int, int]]


@pytest.fixture
def every_crowd(monkeypatch):
    """No crowd is too small to be looked at together."""
    monkeypatch.setattr(crowds, "_FEW", 1)
    for name in ("_SECONDS_A_CROWD", "_SECONDS_AN_ENTRY", "_SECONDS_A_PRODUCT"):
        monkeypatch.setattr(crowds, name, 0.0)


def crowd_rows(sizes: list[int], dim: int, noise: float = 1e-2, alone: int = 0) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((len(sizes), dim)), sizes, axis=0)
    rows = np.concatenate([rows + noise * rng.standard_normal(rows.shape), rng.standard_normal((alone, dim))])
    return unit(rows)[rng.permutation(len(rows))]


def turned_simplex(rows: int, *, away: float, seed: int = 0) -> np.ndarray:
    """Rows at squared distances of about 1.1, different by about `away`; float32 rounds them by 1e-7."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    return unit((np.eye(rows) + 0.8 / np.sqrt(rows) + away * rng.standard_normal((rows, rows))) @ turn)


def found_in(rows: np.ndarray, limit: float) -> tuple[Named, Named, Named]:
    """The pairs given, those that come back, and the links of the exact forest."""
    squared = squared_matrix(rows)
    i, j, _ = near_pairs(squared, limit)
    left, right, _ = possible_links(rows, i, j, limit)
    assert (left < right).all()
    forest = {(a, b) for _, a, b in slow_forest(squared, limit)}
    return named(i, j), named(left, right), forest


def named(i: np.ndarray, j: np.ndarray) -> Named:
    return set(zip(i.tolist(), j.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("every_crowd")
@pytest.mark.parametrize("dim", [4, 32, 512])
@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1e-1])
def test_every_link_of_the_exact_forest_comes_back(dim, noise):
    rows = crowd_rows([150, 60, 3, 2], dim, noise, alone=20)
    _, found, forest = found_in(rows, 0.14)
    assert forest <= found
    squared = squared_matrix(rows)
    near = [(float(squared[pair]), *pair) for pair in found if squared[pair] <= 0.14]
    assert {(i, j) for _, i, j in kruskal(len(rows), near)} == forest


@pytest.mark.usefixtures("every_crowd")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0.0049, 0.07, 0.14, 0.48, 1.9])
def test_the_links_of_hard_rows_come_back(kind, limit):
    _, found, forest = found_in(unit(KINDS[kind](250, 64)), limit)
    assert forest <= found


def test_of_a_crowd_few_pairs_come_back():
    given, found, forest = found_in(crowd_rows([300], 64, noise=0.1), 0.14)
    assert (len(given), len(forest)) == (300 * 299 / 2, 299)
    assert 299 <= len(found) < 1.1 * 299


def test_every_crowd_is_thinned_by_itself():
    rows = crowd_rows([120, 100, 80], 256, noise=0.1, alone=5)
    given, found, forest = found_in(rows, 0.14)
    assert forest <= found <= given
    assert len(forest) == 297
    assert len(found) < 1.5 * 297


def test_the_rows_of_each_crowd_are_told():
    rows = crowd_rows([150, 100, 2, 2], 256)
    squared = squared_matrix(rows)
    i, j, _ = near_pairs(squared, 0.14)
    _, _, told = possible_links(rows, i, j, 0.14)
    assert sorted(map(len, told)) == [100, 150]
    for crowd in told:
        assert sorted(crowd.tolist()) == np.flatnonzero(squared[crowd[0]] <= 0.14).tolist()


def test_scattered_pairs_come_back_as_they_are():
    rows = crowd_rows([2] * 400, 64)
    i, j, _ = near_pairs(squared_matrix(rows), 0.14)
    assert len(i) == 400
    left, right, _ = possible_links(rows, i, j, 0.14)
    assert (left.tolist(), right.tolist()) == (i.tolist(), j.tolist())


def test_scattered_pairs_beside_a_crowd_come_back():
    rows = crowd_rows([150, *[2] * 100, *[3] * 20], 64)
    given, found, forest = found_in(rows, 0.14)
    squared = squared_matrix(rows)
    assert set((squared <= 0.14).sum(axis=1).tolist()) == {150, 2, 3}
    few = {(i, j) for i, j in given if (squared[i] <= 0.14).sum() <= 3}
    assert len(few) == 100 + 20 * 3
    assert few <= found
    assert forest <= found


def test_few_pairs_are_not_worth_a_look():
    rows = crowd_rows([23], 512)
    i, j, _ = near_pairs(squared_matrix(rows), 0.14)
    assert len(i) == 253 < crowds._FEW
    left, right, _ = possible_links(rows, i, j, 0.14)
    assert left is i
    assert right is j


def test_no_pairs_are_no_error():
    none = np.zeros(0, dtype=np.int64)
    left, right, _ = possible_links(np.eye(3), none, none, 0.14)
    assert len(left) == len(right) == 0


@pytest.mark.usefixtures("every_crowd")
def test_pairs_at_equal_distances_all_come_back():
    given, found, forest = found_in(np.eye(60), 2.0)
    assert len(forest) == 59
    assert found == given


@pytest.mark.usefixtures("every_crowd")
def test_identical_rows_come_back_in_every_pair():
    heaps = unit(np.repeat(np.random.default_rng(0).standard_normal((2, 8)), 40, axis=0))
    given, found, _ = found_in(heaps, 0.14)
    assert len(given) == 40 * 39
    assert found == given


@pytest.mark.usefixtures("every_crowd")
def test_pairs_between_heaps_of_identical_rows_come_back_where_they_are_links():
    """All 1,600 pairs between two heaps are equally near: each may be the link."""
    rows = unit(np.repeat(np.array([[1.0, 0.0], [1.0, 0.1]]), 40, axis=0))
    given, found, _ = found_in(rows, 0.14)
    assert found == given


@pytest.mark.usefixtures("every_crowd")
@pytest.mark.parametrize("away", [1e-6, 1e-8, 1e-10])
def test_distances_that_float32_cannot_tell_apart_are_left_to_float64(away):
    _, found, forest = found_in(turned_simplex(80, away=away), 2.1)
    assert forest <= found


@pytest.mark.usefixtures("every_crowd")
@pytest.mark.parametrize("margin", [0.0, -1e-7])
def test_without_the_margin_such_links_would_be_lost(monkeypatch, margin):
    """`cosine_error` so that the margin of a squared distance, 2 cosine_error + 2^-21, is `margin`."""
    monkeypatch.setattr(crowds, "cosine_error", lambda _: (margin - 2.0**-21) / 2)
    _, found, forest = found_in(turned_simplex(80, away=1e-8), 2.1)
    assert len(forest - found) > 10


@pytest.mark.usefixtures("every_crowd")
@pytest.mark.parametrize("above", [True, False])
def test_pairs_beyond_the_limit_join_no_crowd(above):
    """Two crowds whose nearest rows are a hair within or beyond the limit: float32 cannot say which."""
    rng = np.random.default_rng(0)
    first = unit(np.ones((1, 64)) + 0.2 * rng.standard_normal((60, 64)))
    second = unit(np.ones((1, 64)) + 1.5 * rng.standard_normal((1, 64)) + 0.2 * rng.standard_normal((60, 64)))
    rows = np.concatenate([first, second])
    bridge = float(squared_matrix(rows)[:60, 60:].min())
    limit = float(np.nextafter(bridge, 0 if above else 4))
    _, found, forest = found_in(rows, limit)
    assert forest <= found
    assert len(forest) == (118 if above else 119)


def test_every_pair_is_in_one_group_and_connected_pairs_are_together():
    i, j, _ = near_pairs(squared_matrix(crowd_rows([30, 3, *[2] * 40], 64)), 0.14)
    order = np.random.default_rng(0).permutation(len(i))
    i, j = i[order], j[order]
    groups = [some.tolist() for some in groups_of_pairs(i, j, 16)]
    assert sorted(at for some in groups for at in some) == list(range(len(i)))
    rows = [set(i[some].tolist()) | set(j[some].tolist()) for some in groups]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 30 + 3 + 80  # no row is read for two groups
    assert len(groups) > 4
    assert sorted(map(len, rows))[-1] <= 30 + 16


def test_the_pairs_of_a_very_large_crowd_are_divided_all_the_same(monkeypatch):
    monkeypatch.setattr(crowds, "_WHOLE", 20)
    monkeypatch.setattr(crowds, "_RUN", 50)
    i, j, _ = near_pairs(squared_matrix(crowd_rows([30, 10], 64)), 0.14)
    groups = [some.tolist() for some in groups_of_pairs(i, j, 100)]
    assert sorted(at for some in groups for at in some) == list(range(len(i)))
    assert max(map(len, groups)) <= 50 + 45
    assert len(groups) >= 9
