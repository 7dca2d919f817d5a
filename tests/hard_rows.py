"""Rows that are hard on a search for near pairs, and the slow, obvious forest to check one against."""

from collections.abc import Callable, Iterable

import numpy as np

from clip_cid.method.balance import forest

Links = list[tuple[float, int, int]]


def unit(rows: np.ndarray) -> np.ndarray:
    """As the definition says: float64, divided by the length."""
    rows = np.ascontiguousarray(rows, dtype=np.float64)
    return rows / np.sqrt((rows * rows).sum(axis=1))[:, None]


def squared_matrix(rows: np.ndarray) -> np.ndarray:
    """The squared distance of each pair of unit rows, from the differences."""
    rows = unit(rows)
    return np.stack([((row - rows) ** 2).sum(axis=1) for row in rows])


def near_pairs(squared: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair i < j at `limit` or nearer."""
    i, j = np.nonzero(np.triu(squared <= limit, 1))
    return i, j, squared[i, j]


def kruskal(rows: int, pairs: Links) -> Links:
    """Shortest pair first, of equals the one with the lower rows; a pair within one set is passed over."""
    return _joined(rows, sorted(pairs))


def slow_forest(squared: np.ndarray, limit: float) -> Links:
    """Of every pair at `limit` or nearer."""
    i, j, distances = near_pairs(squared, limit)
    order = np.lexsort((j, i, distances))
    return _joined(len(squared), zip(distances[order].tolist(), i[order].tolist(), j[order].tolist(), strict=True))


def _joined(rows: int, ascending: Iterable[tuple[float, int, int]]) -> Links:
    set_of, members = list(range(rows)), {row: [row] for row in range(rows)}
    chosen = []
    for squared, i, j in ascending:
        if set_of[i] != set_of[j]:
            small, large = sorted((set_of[i], set_of[j]), key=lambda name: len(members[name]))
            for row in members[small]:
                set_of[row] = large
            members[large] += members.pop(small)
            chosen.append((squared, i, j))
    return chosen


def links_of(forest) -> Links:
    """Of a `Forest` or `Links`, to be compared bit for bit."""
    return list(zip(forest.squared.tolist(), forest.left.tolist(), forest.right.tolist(), strict=True))


def with_near_copies(base: np.ndarray, rows: int, seed: int = 1) -> np.ndarray:
    """Rows of `base` with a little of another added: distances of every size from 1e-4 up, and the same structure."""
    rng = np.random.default_rng(seed)
    some, others = rng.integers(0, len(base), (2, rows))
    share = 10.0 ** rng.uniform(-4, 0.3, (rows, 1))
    mixed = base[some] + share * base[others]
    return unit(np.where((mixed == 0).all(axis=1, keepdims=True), base[some], mixed))


def _gaussian(dim: int, scales: np.ndarray | float = 1.0) -> np.ndarray:
    return unit(np.random.default_rng(dim).standard_normal((dim, dim)) * scales)


def _low_rank(dim: int) -> np.ndarray:
    rng = np.random.default_rng(8)
    return unit(rng.standard_normal((dim, 8)) @ rng.standard_normal((8, dim)))


def _giant(dim: int) -> np.ndarray:
    rows = _gaussian(dim)
    rows[:, 3] += 30
    return unit(rows)


def _sparse(dim: int) -> np.ndarray:
    rng = np.random.default_rng(9)
    rows = np.where(rng.random((dim, dim)) < 0.06, rng.standard_normal((dim, dim)), 0)
    rows[np.arange(dim), rng.permutation(dim)] += 1  # none is zero
    return unit(rows)


KINDS: dict[str, Callable[[int, int], np.ndarray]] = {
    "power law": lambda rows, dim: with_near_copies(_gaussian(dim, np.arange(1, dim + 1) ** -0.7), rows),
    "flat": lambda rows, dim: with_near_copies(_gaussian(dim), rows),
    "outlier dimensions": lambda rows, dim: with_near_copies(
        _gaussian(dim, np.where(np.arange(dim) % 20 == 7, 12.0, 1.0)), rows
    ),
    "one giant dimension": lambda rows, dim: with_near_copies(_giant(dim), rows),
    "rank 8": lambda rows, dim: with_near_copies(_low_rank(dim), rows),
    "sparse": lambda rows, dim: with_near_copies(_sparse(dim), rows),
    "identical": lambda rows, dim: np.repeat(with_near_copies(_gaussian(dim), -(-rows // 5)), 5, axis=0)[:rows],
    "float16": lambda rows, dim: with_near_copies(_gaussian(dim), rows).astype(np.float16),
}


def spanning_forest(rows: int, left: np.ndarray, right: np.ndarray, squared: np.ndarray, limit: float) -> forest.Forest:
    """The links of these pairs as a forest."""
    return forest.Forest(rows, *forest.spanning_links(forest.Links(left, right, squared)), limit)
