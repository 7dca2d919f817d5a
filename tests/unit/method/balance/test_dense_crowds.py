"""Rows that are nearly all near each other: their forest is the exact one, though few distances are measured."""

import numpy as np
import pytest
from hard_rows import unit

from clip_cid.method.balance import dense_crowds, exact_links, plan_choice
from clip_cid.method.balance.dense_crowds import ball_of, crowd_links, find_balls, find_crowds
from clip_cid.method.balance.forest import Forest, Links, spanning_links, whole_forest
from clip_cid.method.balance.near_pairs import near_forest
from clip_cid.method.balance.pair_plan import Plan, lay_out
from clip_cid.method.distances import squared_distances
from clip_cid.method.unit_rows import UnitRows

LIMIT = 0.14


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowds and blocks of a few rows, and batches of a few pairs."""
    for name, value in {"FEWEST_ROWS": 40, "_PIVOTS": 12, "_SIDE": 32, "_FIRST_BATCH": 50, "_MOST_LINKS": 300}.items():
        monkeypatch.setattr(dense_crowds, name, value)


def crowd(kind: str, rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit rows, nearly all within the limit of each other, in some random order."""
    rng = np.random.default_rng(seed)
    center = unit(rng.standard_normal((1, dim)))
    noise = rng.standard_normal((rows, dim))
    if kind == "one radius":
        found = center + 0.12 * unit(noise)
    elif kind == "many radii":
        found = center + rng.uniform(0.01, 0.2, (rows, 1)) * unit(noise)
    elif kind == "lumps":
        lumps = unit(rng.standard_normal((5, dim)))
        found = center + 0.15 * lumps[rng.integers(0, 5, rows)] + 0.01 * noise / dim**0.5
    elif kind == "copies":  # equal to within float16
        found = center + 1e-4 * noise / dim**0.5
    elif kind == "chain":
        found = center + np.cumsum(0.02 * unit(noise), axis=0) / 3
    else:
        found = center + rng.uniform(0.05, 0.6, (rows, 1)) * unit(noise)  # half of the pairs are too far
    return unit(found[rng.permutation(rows)]).astype(np.float16)


KINDS = ("one radius", "many radii", "lumps", "copies", "chain", "half")


def of(rows: np.ndarray) -> UnitRows:
    return UnitRows(rows.astype(np.float32), name="rows", any_length=True)


def slow(images: UnitRows, pairs: np.ndarray | None = None) -> Forest:
    """Every distance, in float64; or only those of some pairs."""
    units = images[np.arange(len(images))]
    i, j = np.triu_indices(len(units), 1)
    squared = np.concatenate(
        [squared_distances(units[i[at : at + 5000]], units[j[at : at + 5000]]) for at in range(0, len(i), 5000)]
    )
    near = squared <= LIMIT
    if pairs is not None:
        near &= pairs[i, j]
    return whole_forest(len(units), [spanning_links(Links(i[near], j[near], squared[near]))], LIMIT)


def assert_same(found: Forest, expected: Forest) -> None:
    for name in ("left", "right", "squared"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dim", [3, 16, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_the_links_have_the_forest_of_all_pairs(kind: str, dim: int):
    images = of(crowd(kind, 230, dim))
    rows = np.random.default_rng(1).permutation(len(images))
    assert_same(whole_forest(len(images), [crowd_links(images, rows, LIMIT)], LIMIT), slow(images))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
def test_between_two_chunks_every_pair_counts_and_only_true_ones_come(kind: str):
    images = of(crowd(kind, 200, 24))
    first = np.random.default_rng(2).random(200) < 0.3
    links = crowd_links(images, np.arange(200), LIMIT, first=first)
    units = images[np.arange(200)]
    np.testing.assert_array_equal(links.squared, squared_distances(units[links.left], units[links.right]))

    # With the pairs within each side they give the forest of all pairs.
    within = slow(images, first[:, None] == first)
    both = [np.concatenate(column) for column in zip(links, (within.left, within.right, within.squared), strict=True)]
    assert_same(whole_forest(200, [spanning_links(Links(*both))], LIMIT), slow(images))


def near_clique(alone: int = 60) -> np.ndarray:
    rng = np.random.default_rng(3)
    rows = np.concatenate([crowd("many radii", 500, 48), unit(rng.standard_normal((alone, 48))).astype(np.float16)])
    return rows[rng.permutation(len(rows))]


@pytest.mark.usefixtures("small")
def test_a_crowd_is_found_whole_and_ordinary_rows_have_none():
    rows = near_clique()
    (found,) = find_crowds(of(rows), np.arange(len(rows)), LIMIT)
    center = rows.astype(np.float64).mean(axis=0)
    near = rows.astype(np.float64) @ center / np.linalg.norm(center) > 0.9
    assert near.sum() == 500
    np.testing.assert_array_equal(found, np.flatnonzero(near))
    ordinary = unit(np.random.default_rng(4).standard_normal((3000, 32)))
    assert find_crowds(of(ordinary), np.arange(3000), LIMIT) == []


def test_a_row_of_no_ball_has_number_0():
    balls = find_balls(crowd("copies", 100, 8).astype(np.float32), LIMIT)
    rows = np.concatenate([crowd("copies", 4, 8), -crowd("copies", 4, 8)]).astype(np.float32)
    assert ball_of(rows, balls).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "plan", [Plan("float32"), Plan("int8", 16), Plan("int8", 16, cells=4), Plan("float32", chunk_rows=150)]
)
def test_no_plan_changes_the_forest_of_rows_in_a_crowd_and_out_of_it(plan: Plan):
    images = of(near_clique())
    found, _ = near_forest(images, LIMIT, layout=lay_out(images, plan))
    assert_same(found, slow(images))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_few_pairs_of_a_crowd_are_measured_or_listed(monkeypatch: pytest.MonkeyPatch):
    images, measured, listed = of(near_clique()), [], []
    exactly, add = dense_crowds.squared_distances, exact_links.ExactLinks.add
    monkeypatch.setattr(dense_crowds, "squared_distances", lambda i, j: (measured.append(len(i)), exactly(i, j))[1])
    monkeypatch.setattr(exact_links.ExactLinks, "add", lambda self, i, j: (listed.append(len(i)), add(self, i, j))[1])
    near_forest(images, LIMIT, layout=lay_out(images, Plan("float32")))
    pairs = 500 * 499 / 2
    assert sum(measured) < 0.2 * pairs
    assert sum(listed) < 0.02 * pairs


def test_the_plan_does_not_count_the_pairs_of_a_crowd(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_choice, "_SMALL_WORK", 0)
    rows = np.concatenate(
        [crowd("one radius", 3000, 32), unit(np.random.default_rng(5).standard_normal((300, 32))).astype(np.float16)]
    )
    layout = plan_choice.make_plan(of(rows), LIMIT)
    assert layout.estimate is not None
    assert layout.estimate.candidates < 0.1 * 3300**2 / 2
