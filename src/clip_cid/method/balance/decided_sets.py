"""Sets and kept rows as a person has decided: some pairs are not duplicates, some rows are kept, others removed."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order

from clip_cid.method.balance.forest import Forest
from clip_cid.method.distances import squared_distances
from clip_cid.method.unit_rows import UnitRows

Choose = Callable[[Int[np.ndarray, " rows"]], tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " rows"]]]
"""The rule that chooses without decisions: for the set of each row, the kept rows and each row's place among them."""


def _no_rows() -> Int[np.ndarray, " 0"]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class DecidedRows:
    """Decisions about rows; `balance_decisions` in docs/method.md. A row is not both kept and removed."""

    apart: Int[np.ndarray, "pairs 2"] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    """Two different rows each, which must not be in one set."""
    keep: Int[np.ndarray, " keep"] = field(default_factory=_no_rows)
    """Rows that are kept: of their sets nothing but these."""
    remove: Int[np.ndarray, " remove"] = field(default_factory=_no_rows)
    """Rows that are removed."""


def cut_links(
    forest: Forest, apart: Int[np.ndarray, "pairs 2"], labels: Int[np.ndarray, " rows"] | None = None
) -> Int[np.ndarray, " cut"]:
    """The places of the links that part each of these pairs, ascending: the weakest one on the way between the two.

    A longer link is a weaker one; of equally long ones the later. Each pair is parted in the forest as it is, so the
    order of the pairs does not count. A pair that no links join needs none.

    Args:
        forest: Whole.
        apart: The pairs.
        labels: The sets of the whole forest, if they are known.
    """
    if not len(apart):
        return _no_rows()

    # Only the sets of these rows, numbered anew.
    labels = forest.sets(forest.limit) if labels is None else labels
    concerned = np.isin(labels, labels[apart])
    places = np.flatnonzero(concerned[forest.left])
    rows, ends = np.unique(
        np.concatenate([apart.ravel(), forest.left[places], forest.right[places]]), return_inverse=True
    )
    one, other = ends[: apart.size].reshape(-1, 2).T
    left, right = ends[apart.size :].reshape(2, -1)

    joined = labels[apart[:, 0]] == labels[apart[:, 1]]
    parent, depth_order = _trees(len(rows), left, right, labels[rows])
    link_above = np.full(len(rows), -1)
    link_above[np.where(parent[left] == right, left, right)] = np.arange(len(places))

    weakest = _weakest_between(one[joined], other[joined], parent, depth_order, link_above)
    return places[np.unique(weakest)]


def keep_decided(
    images: UnitRows,
    labels: Int[np.ndarray, " rows"],
    decided: DecidedRows,
    choose: Choose,
    *,
    squared_radius: float | None = None,
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " rows"]]:
    """Rows kept, ascending, and for each row its place among them; -1 for a removed row of whose set none is kept.

    A set with rows to keep keeps these, and every other row of it belongs to the nearest of them (of equally near ones
    to the lowest); with a radius, rows that are farther choose among themselves. The rule decides all other sets,
    as if the rows to remove were not there.

    Args:
        images: The rows.
        labels: The set of each row.
        decided: What was decided.
        choose: The rule.
        squared_radius: Of the rule, if it has one.
    """
    rows = np.arange(len(labels))
    removed = np.isin(rows, decided.remove)
    kept_for = rows.copy()

    # Rows of sets with rows to keep; those to remove go with the nearest whatever the radius.
    others = rows[np.isin(labels, labels[decided.keep]) & ~np.isin(rows, decided.keep)]
    nearest, squared = _nearest(images, others, decided.keep, labels)
    within = np.ones(len(others), dtype=bool) if squared_radius is None else squared <= squared_radius
    within |= removed[others]
    kept_for[others[within]] = nearest[within]

    # The rule sees each of those, and of the removed ones, alone.
    settled = removed.copy()
    settled[decided.keep] = settled[others[within]] = True
    for_rule = labels.copy()
    for_rule[settled] = labels.max(initial=-1) + 1 + np.arange(settled.sum())
    kept, place = choose(np.unique(for_rule, return_inverse=True)[1])
    kept_for[~settled] = kept[place][~settled]

    # A removed row without a row to keep: for the nearest kept one of its set, if there is one.
    left_over = rows[removed & (kept_for == rows)]
    chosen = np.unique(kept_for[~removed])
    kept_for[left_over] = _nearest(images, left_over, chosen, labels)[0]

    kept = np.unique(kept_for[kept_for >= 0])
    return kept, np.where(kept_for >= 0, np.searchsorted(kept, kept_for), -1)


def _nearest(
    images: UnitRows,
    rows: Int[np.ndarray, " n"],
    targets: Int[np.ndarray, " targets"],
    labels: Int[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """For each row the nearest target of its set and the squared distance; -1 and infinity where there is none."""
    nearest, squared = np.full(len(rows), -1), np.full(len(rows), np.inf)
    by_set = targets[np.lexsort((targets, labels[targets]))]
    starts, ends = (np.searchsorted(labels[by_set], labels[rows], side=side) for side in ("left", "right"))

    for nth in range(int((ends - starts).max(initial=0))):
        with_nth = np.flatnonzero(starts + nth < ends)
        for begin in range(0, len(with_nth), images.cached_rows):
            some = with_nth[begin : begin + images.cached_rows]
            target = by_set[starts[some] + nth]
            distance = squared_distances(images[rows[some]], images[target])
            better = distance < squared[some]
            nearest[some[better]], squared[some[better]] = target[better], distance[better]
    return nearest, squared


def _trees(
    rows: int, left: Int[np.ndarray, " links"], right: Int[np.ndarray, " links"], labels: Int[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """The parent of each row in the tree of its set, and its place in an order in which parents come first."""
    roots = np.unique(labels, return_index=True)[1]
    top = rows  # above all roots
    tails, heads = np.concatenate([left, np.full(len(roots), top)]), np.concatenate([right, roots])
    graph = coo_matrix((np.ones(len(tails), dtype=np.int8), (tails, heads)), shape=(rows + 1, rows + 1)).tocsr()
    order, parent = breadth_first_order(graph, top, directed=False, return_predecessors=True)
    place = np.empty(rows + 1, dtype=np.int64)
    place[order] = np.arange(rows + 1)
    return parent[:rows], place[:rows]


def _weakest_between(
    one: Int[np.ndarray, " pairs"],
    other: Int[np.ndarray, " pairs"],
    parent: Int[np.ndarray, " rows"],
    place: Int[np.ndarray, " rows"],
    link_above: Int[np.ndarray, " rows"],
) -> Int[np.ndarray, " pairs"]:
    """The last link on the way between the two of each pair, both of one tree."""
    one, other = one.copy(), other.copy()
    last = np.full(len(one), -1)
    apart: Bool[np.ndarray, " pairs"] = one != other
    while apart.any():
        # The later of the two is no ancestor of the other one, so the way leads through its parent.
        lower = np.where(place[one] > place[other], one, other)
        last = np.where(apart, np.maximum(last, link_above[lower]), last)
        one, other = (np.where(apart & (lower == end), parent[lower], end) for end in (one, other))
        apart = one != other
    return last
