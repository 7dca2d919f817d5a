"""The minimum spanning forest of near pairs: one pass over the data answers every smaller threshold."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from clip_cid.method.balance.union_find import UnionFind

_MERGED = 1 << 18  # links in memory while parts are merged: some 150 bytes each


class ShareOutOfReach(ValueError):
    """No threshold up to the forest's limit removes so large a share."""

    def __init__(self, share: float, largest: float) -> None:
        super().__init__(f"share must be at most {largest:.4f}, which the largest distance removes, got {share}")
        self.largest = largest


class Links(NamedTuple):
    """Pairs of rows, left < right, with their squared Euclidean distances; the same pair may come more than once."""

    left: np.ndarray
    right: np.ndarray
    squared: np.ndarray

    def pack(self) -> UInt64[np.ndarray, "3 links"]:
        """As one array, to be stored."""
        return np.stack([column.view(np.uint64) for column in self])

    @classmethod
    def unpack(cls, packed: UInt64[np.ndarray, "3 links"]) -> "Links":
        """What `pack` packed, bit for bit."""
        left, right, squared = packed
        return cls(left.view(np.int64), right.view(np.int64), squared.view(np.float64))


@dataclass(frozen=True, eq=False)
class Forest:
    """The links to keep of all pairs of rows at `limit` or nearer; `balance_forest` in docs/method.md.

    For every threshold up to `limit`, the rows joined by links at or below it are the sets that all pairs would give.
    Links are ordered by distance, then by their rows, so the forest is unique.
    """

    rows: int
    left: Int[np.ndarray, " links"]
    """The lower row of each link, int64."""
    right: Int[np.ndarray, " links"]
    """The higher one, int64."""
    squared: Float[np.ndarray, " links"]
    """Squared Euclidean distances of the unit vectors, ascending, float64."""
    limit: float
    """The squared distance up to which pairs are known."""

    def __post_init__(self) -> None:
        if not len(self.left) == len(self.right) == len(self.squared):
            raise ValueError(
                f"left, right and squared must have one length, got {len(self.left)}, {len(self.right)} and"
                f" {len(self.squared)}"
            )
        if not len(self.left):
            return
        if self.left.min() < 0 or self.right.max() >= self.rows or (self.left >= self.right).any():
            raise ValueError(f"links must join rows 0 <= left < right < {self.rows}")
        if not ((np.diff(self.squared) >= 0).all() and 0 <= self.squared[0] <= self.squared[-1] <= self.limit):
            raise ValueError(f"squared must ascend from 0 to the limit {self.limit}")

    def sets(self, squared: float) -> Int[np.ndarray, " rows"]:
        """The set of each row at this squared threshold, int64; sets are numbered by their smallest rows.

        Raises:
            ValueError: The threshold is beyond `limit`.
        """
        joined = UnionFind(self.rows)
        links = self.links(squared)
        joined.union(self.left[:links], self.right[:links])
        return joined.labels()

    def links(self, squared: float) -> int:
        """How many links hold at this squared threshold: each of them removes one row.

        Raises:
            ValueError: The threshold is beyond `limit`.
        """
        if squared > self.limit:
            raise ValueError(f"squared must be at most the forest's limit {self.limit:.6g}, got {squared:.6g}")
        return int(np.searchsorted(self.squared, squared, side="right"))

    def without(self, links: Int[np.ndarray, " some"]) -> "Forest":
        """The forest without these links, given by their places."""
        if not len(links):
            return self
        left, right, squared = (np.delete(column, links) for column in (self.left, self.right, self.squared))
        return Forest(self.rows, left, right, squared, self.limit)

    def removed_share(self, squared: float) -> float:
        """The share of rows that balance removes at this squared threshold, exactly."""
        return self.links(squared) / self.rows

    def squared_for(self, share: float) -> float:
        """The smallest squared threshold that removes at least this share of the rows.

        Raises:
            ShareOutOfReach: No threshold up to `limit` removes so much.
            ValueError: `share` is not above 0 and below 1.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must be above 0 and below 1, got {share}")
        needed = max(1, int(np.ceil(share * self.rows - 1e-9)))
        if needed > len(self.squared):
            raise ShareOutOfReach(share, len(self.squared) / self.rows)
        return float(self.squared[needed - 1])


def whole_forest(rows: int, parts: Sequence[Links], limit: float) -> Forest:
    """The forest of all near pairs; beside it the memory is some ten bytes a row.

    Args:
        rows: How many there are.
        parts: Links of the spanning forest, in parts or whole, each as `spanning_links` orders them. Equal rows may be
            joined in any way.
        limit: The squared distance up to which pairs are known.
    """
    joined = UnionFind(rows)
    equal = [int(np.searchsorted(part.squared, 0.0, side="right")) for part in parts]
    same = _links_of_equal([_some(part, 0, stop) for part, stop in zip(parts, equal, strict=True)], joined)
    apart = [_some(part, stop, len(part.left)) for part, stop in zip(parts, equal, strict=True)]

    # What is reserved but not filled takes no memory.
    most = len(same.left) + min(sum(len(part.left) for part in apart), rows)
    links, count = Links(np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most)), 0
    for more in itertools.chain([same], merged_links(apart, joined)):
        for column, values in zip(links, more, strict=True):
            column[count : count + len(values)] = values
        count += len(more.left)
    return Forest(rows, *_some(links, 0, count), limit)


def merged_links(parts: Sequence[Links], joined: UnionFind) -> Iterator[Links]:
    """The links of the minimum spanning forest of all parts, in order, some at a time: Kruskal's way.

    The forest of the parts' forests is that of all pairs, in whatever order and grouping they are merged.

    Args:
        parts: Each as `spanning_links` orders its links; one pair may be in several.
        joined: Rows that are joined already; the links are added to it.
    """
    reached = [0] * len(parts)
    while unfinished := [number for number, part in enumerate(parts) if reached[number] < len(part.left)]:
        # All links up to the nearest of the last ones in reach are in reach.
        each = max(1, _MERGED // len(unfinished))
        ends = [min(reached[number] + each, len(parts[number].left)) for number in unfinished]
        bound = min(_order_of(parts[number], end - 1) for number, end in zip(unfinished, ends, strict=True))

        some: list[Links] = []
        for number, end in zip(unfinished, ends, strict=True):
            part = _some(parts[number], reached[number], end)
            some.append(_some(part, 0, _place_after(part, bound)))
            reached[number] += len(some[-1].left)

        yield _new_links(join_links(some), joined)


def spanning_links(links: Links) -> Links:
    """The links of the minimum spanning forest under the order (squared, left, right), in that order."""
    left, right, squared = links
    order = np.lexsort((right, left, squared))

    again = np.zeros(len(order), dtype=bool)  # one pair has one distance, so repeats are adjacent
    again[1:] = (left[order[1:]] == left[order[:-1]]) & (right[order[1:]] == right[order[:-1]])
    order = order[~again]

    order = order[_tree_edges(left[order], right[order])]
    return Links(left[order], right[order], squared[order])


def equal_links(firsts: Int[np.ndarray, " repeats"], repeats: Int[np.ndarray, " repeats"]) -> Links:
    """Links at distance 0, ordered as `spanning_links` does."""
    order = np.lexsort((repeats, firsts))
    return Links(firsts[order], repeats[order], np.zeros(len(order)))


def join_links(parts: Sequence[Links]) -> Links:
    """All links of the parts."""
    return Links(*(np.concatenate(column) for column in zip(no_links(), *parts, strict=True)))


def no_links() -> Links:
    return Links(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))


def _some(links: Links, start: int, stop: int) -> Links:
    return Links(*(column[start:stop] for column in links))


def _order_of(links: Links, at: int) -> tuple[float, int, int]:
    """By what links are ordered."""
    return float(links.squared[at]), int(links.left[at]), int(links.right[at])


def _place_after(links: Links, bound: tuple[float, int, int]) -> int:
    """How many links come up to this one, or are it."""
    first, stop = 0, len(links.left)
    for column, value in zip((links.squared, links.left, links.right), bound, strict=True):
        equal = column[first:stop]
        stop = first + int(np.searchsorted(equal, value, side="right"))
        first += int(np.searchsorted(equal, value, side="left"))
    return stop


def _new_links(links: Links, joined: UnionFind) -> Links:
    """The links of these that join what is apart, nearest first; they are added to `joined`."""
    order = np.lexsort((links.right, links.left, links.squared))
    tails, heads = joined.find(links.left[order]), joined.find(links.right[order])
    apart = tails != heads
    order, ends = order[apart], np.sort(np.stack([tails[apart], heads[apart]]).astype(np.int64), axis=0)

    # Of several links between two sets the nearest.
    _, nearest = np.unique(ends[0] * len(joined) + ends[1], return_index=True)
    nearest.sort()
    chosen = order[nearest[_tree_edges(*ends[:, nearest])]]
    joined.union(links.left[chosen], links.right[chosen])
    return Links(*(column[chosen] for column in links))


def _links_of_equal(parts: Sequence[Links], joined: UnionFind) -> Links:
    """Equal rows are all at 0 from each other, so the forest joins each of them to the lowest."""
    for part in parts:
        joined.union(part.left, part.right)
    is_equal = np.zeros(len(joined), dtype=bool)
    for rows in (column for part in parts for column in part[:2]):
        is_equal[rows] = True

    # The rows of one set after the other, each in ascending order.
    rows = np.flatnonzero(is_equal)
    roots = joined.find(rows)
    order = np.argsort(roots, kind="stable")
    begins = np.flatnonzero(np.diff(roots[order], prepend=-1))
    lowest = np.repeat(rows[order[begins]], np.diff(begins, append=len(rows)))

    others = np.ones(len(rows), dtype=bool)
    others[begins] = False
    return equal_links(lowest[others], rows[order[others]])


def _tree_edges(left: Int[np.ndarray, " pairs"], right: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, " links"]:
    """Which of the pairs, given in ascending order of weight, a minimum spanning forest keeps."""
    nodes, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
    tails, heads = ends.reshape(2, -1)

    # Ranks from 1, not distances: scipy takes a weight of 0 for no edge, which would lose every exact duplicate.
    ranks = np.arange(1, len(left) + 1, dtype=np.float64)
    graph = coo_matrix((ranks, (tails, heads)), shape=(len(nodes), len(nodes))).tocsr()
    return np.sort(minimum_spanning_tree(graph, overwrite=True).data).astype(np.int64) - 1
