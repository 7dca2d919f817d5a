"""Crowds in which most pairs are near: their links without an exact distance of most pairs.

A tree over the crowd, made of real pairs, joins any two rows by a path. A pair that is longer than the longest
step of that path is no link of the minimum spanning forest (the cycle law). Codes of the rows around their mean
give a lower bound of every distance, by integer products. The few pairs that may be shorter are measured exactly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from clip_cid.method.balance.crowds import numbered
from clip_cid.method.balance.forest import Links, join_links, spanning_links
from clip_cid.method.codes import LEVELS, encode
from clip_cid.method.distances import squared_distances
from clip_cid.method.products import int8_product, int8_products_are_right
from clip_cid.method.unit_rows import UnitRows

SAMPLED = 512
_FEWEST_NEIGHBORS, _NEIGHBORS = 6, 0.02  # of a row of the sample; a share of the sample
_WIDER, _BESIDE = 1.25, 2.0  # than the sampled rows of the crowd; so many times as many rows may be there
_DENSE = 0.03  # of the pairs of the sampled rows of a crowd are near
FEWEST_ROWS = 1024
_MOST_NUMBERS = 1 << 26  # of a crowd's codes: 64 MB
_PIVOTS = 1024
_SIDE = 1024
_READ_ROWS = 2048
_FIRST_BATCH, _MOST_PENDING = 1 << 15, 1 << 21
_MOST_LINKS = 1 << 21
_FAR = 1 << 29  # beyond any product of codes
_PAIRS_AT_ONCE, _NUMBERS_AT_ONCE = 1 << 13, 1 << 15
_SPREAD = 3.9  # standard deviations that a code covers; the few numbers beyond are cut off, and that is measured
_ROUNDING = 2.0**-20  # of the rows in float32, of the mean's subtraction, and of the distances in float64


@dataclass(frozen=True, eq=False)
class Ball:
    """Where a crowd is."""

    center: Float32[np.ndarray, " dim"]
    least: float
    """The cosine to the center from which a row belongs to it."""


def find_balls(sample: Float32[np.ndarray, "n dim"], limit: float) -> list[Ball]:
    """Crowds, from an even sample of the rows; most data has none."""
    near = sample @ sample.T >= np.float32(1 - limit / 2)
    popular = np.flatnonzero(near.sum(axis=1) >= max(_FEWEST_NEIGHBORS, _NEIGHBORS * len(sample)))
    if not len(popular) or not int8_products_are_right():
        return []

    near = near[np.ix_(popular, popular)]
    count, name = connected_components(csr_matrix(near), directed=False)
    balls: list[Ball] = []
    for members in (np.flatnonzero(name == one) for one in range(count)):
        rows = sample[popular[members]]
        center = rows.mean(axis=0)
        center /= np.linalg.norm(center)
        least = 1 - _WIDER * (1 - float((rows @ center).min()))  # a row left out is compared with all of them
        compact = np.count_nonzero(sample @ center >= least) <= _BESIDE * len(members)
        if compact and near[np.ix_(members, members)].mean() >= _DENSE:
            balls.append(Ball(center, least))
    return balls


def ball_of(rows: Float32[np.ndarray, "n dim"], balls: Sequence[Ball]) -> Int[np.ndarray, " n"]:
    """The number of the first ball that each row is in, from 1; 0 for none."""
    within = rows @ np.stack([ball.center for ball in balls], axis=1) >= np.array(
        [ball.least for ball in balls], dtype=np.float32
    )
    return np.where(within.any(axis=1), within.argmax(axis=1) + 1, 0)


def find_crowds(images: UnitRows, rows: Int[np.ndarray, " rows"], limit: float) -> list[Int[np.ndarray, " crowd"]]:
    """Disjoint sets of places in `rows` in which many pairs are near."""
    if len(rows) < FEWEST_ROWS:
        return []
    sampled = rows[np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows) // 8)).astype(np.int64)]
    balls = find_balls(images.float32(sampled), limit)
    if not balls:
        return []

    of = np.concatenate([ball_of(images.float32(rows[part]), balls) for part in _slices(len(rows), side=_READ_ROWS)])
    most = _MOST_NUMBERS // images.dim
    crowds = (np.flatnonzero(of == number)[:most] for number in range(1, len(balls) + 1))
    return [crowd for crowd in crowds if len(crowd) >= FEWEST_ROWS]


def crowd_links(
    images: UnitRows, rows: Int[np.ndarray, " crowd"], limit: float, *, first: Bool[np.ndarray, " crowd"] | None = None
) -> Links:
    """Links with the same minimum spanning forest as all pairs of the rows at squared distance `limit` or less.

    `dense_crowd` in docs/method.md.

    Args:
        images: All rows.
        rows: Which of them, each once.
        limit: A squared distance.
        first: Only pairs of one of these with one of the others are wanted; then some other true pairs may come too.
    """
    return _Crowd(images, rows, limit, first).links()


class _Crowd:
    """The rows in the order of the leaves of a tree over them."""

    def __init__(
        self, images: UnitRows, rows: Int[np.ndarray, " crowd"], limit: float, first: Bool[np.ndarray, " crowd"] | None
    ) -> None:
        self._images, self._limit = images, limit
        self._encode(rows)

        left, right = self._tree()
        squared = _measured(images, rows[left], rows[right])
        near = squared <= limit
        self._found = [_links(rows[left[near]], rows[right[near]], squared[near])]

        # From here on in the order of the leaves.
        order, heights = _leaves(len(rows), left, right, squared)
        self._rows, self._codes = rows[order], self._codes[order]
        self._errors, self._squares = self._errors[order], self._squares[order]
        self._first = None if first is None else first[order]
        self._heights = np.minimum(_length(heights), _length(np.array([limit])))
        self._longest = _Maxima(self._heights)
        self._reach = np.maximum.accumulate(np.concatenate([[0.0], self._heights]))  # from each leaf to the first one
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending, self._measured, self._num_links = 0, 0, len(squared)

    def links(self) -> Links:
        """Compare all wanted pairs, block by block."""
        for rows in _slices(len(self._rows)):
            for others in _slices(len(self._rows), rows.start):
                self._compare(rows, others)
        self._measure()
        return spanning_links(join_links(self._found))

    def _encode(self, rows: Int[np.ndarray, " crowd"]) -> None:
        """int8 codes of what the rows are beyond their mean, and how wrong each is."""
        some = self._images.float32(rows[np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(np.int64))])
        mean = some.mean(axis=0)
        deviation = float(np.sqrt(np.square(some - mean, dtype=np.float64).mean()))
        self._step = float(np.float32(max(_SPREAD * deviation, 1e-7) / LEVELS))

        self._codes = np.empty((len(rows), self._images.dim), dtype=np.int8)
        self._errors = np.empty(len(rows))
        self._squares = np.empty(len(rows))
        step = torch.tensor(self._step, dtype=torch.float32)
        for part in _slices(len(rows), side=_READ_ROWS):
            codes, errors = encode(torch.from_numpy(self._images.float32(rows[part]) - mean), step, "int8")
            self._codes[part], self._errors[part] = codes.numpy(), errors.numpy().astype(np.float64) + _ROUNDING
            self._squares[part] = np.square(self._codes[part], dtype=np.int32).sum(axis=1, dtype=np.int64)

    def _tree(self) -> tuple[Int[np.ndarray, " links"], Int[np.ndarray, " links"]]:
        """A spanning tree: some rows by their own tree, every other row to the nearest of them, by the codes."""
        count = len(self._codes)
        pivots = np.unique(np.linspace(0, count - 1, min(_PIVOTS, count)).astype(np.int64))
        apart = self._apart(pivots, pivots)
        apart[np.tril_indices(len(pivots))] = 0
        apart[np.triu_indices(len(pivots), 1)] += 1  # scipy takes 0 for no edge
        tree = minimum_spanning_tree(csr_matrix(apart)).tocoo()

        others = np.setdiff1d(np.arange(count), pivots, assume_unique=True)
        nearest = np.empty(len(others), dtype=np.int64)
        for part in _slices(len(others)):
            nearest[part] = pivots[self._apart(others[part], pivots).argmin(axis=1)]
        return np.concatenate([pivots[tree.row], others]), np.concatenate([pivots[tree.col], nearest])

    def _apart(self, rows: Int[np.ndarray, " n"], others: Int[np.ndarray, " m"]) -> Float[np.ndarray, "n m"]:
        """Squared distances of codes, in steps."""
        products = self._products(self._codes[rows], self._codes[others])
        return self._squares[rows][:, None] + self._squares[others] - 2.0 * products

    def _products(self, codes: np.ndarray, others: np.ndarray) -> np.ndarray:
        return int8_product(torch.from_numpy(codes), torch.from_numpy(others).T).numpy()

    def _compare(self, rows: slice, others: slice) -> None:
        """Note the wanted pairs of two blocks that may be links."""
        ours, theirs = np.arange(rows.start, rows.stop), np.arange(others.start, others.stop)
        if self._first is None:
            self._note(ours, theirs)
            return
        for side in (True, False) if rows != others else (True,):
            some, more = ours[self._first[rows] == side], theirs[self._first[others] != side]
            if len(some) and len(more):
                self._note(some, more)

    def _note(self, ours: Int[np.ndarray, " n"], theirs: Int[np.ndarray, " m"]) -> None:
        products = self._products(self._codes[ours], self._codes[theirs])
        twice = self._first is None and ours[0] == theirs[0]

        # First by floors in whole numbers, then each by what it is.
        places = np.flatnonzero(products >= self._floors(ours, theirs))
        for start in range(0, len(places), 1 << 16):
            part = places[start : start + (1 << 16)]
            i, j = np.divmod(part, len(theirs))
            i, j = ours[i], theirs[j]
            apart = self._squares[i] + self._squares[j] - 2.0 * products.reshape(-1)[part]
            least = self._step * np.sqrt(apart) - self._errors[i] - self._errors[j]  # no distance is below this

            may = least <= np.maximum(self._reach[i], self._reach[j])
            if twice:
                may &= i < j
            i, j = i[may], j[may]
            may = least[may] <= self._longest(np.minimum(i, j), np.maximum(i, j))
            self._pending.append((i[may], j[may]))
            self._num_pending += int(may.sum())
            if self._num_pending >= min(max(_FIRST_BATCH, self._measured // 2), _MOST_PENDING):
                self._measure()

    def _floors(self, ours: Int[np.ndarray, " n"], theirs: Int[np.ndarray, " m"]) -> Int[np.ndarray, "n m"]:
        """No pair whose product of codes is below its floor may be a link: by way of the first leaf, or along the tree."""
        squares, errors, largest = self._squares, self._errors, self._errors[theirs].max()
        one = squares[ours] - self._steps(self._reach[ours] + errors[ours] + largest)
        other = squares[theirs] - self._steps(self._reach[theirs] + errors[theirs] + errors[ours].max())
        floors = np.minimum(
            np.add.outer(_half(one), _half(squares[theirs])), np.add.outer(_half(squares[ours]), _half(other))
        )

        longest = self._heights[min(ours[0], theirs[0]) : max(ours[-1], theirs[-1])].max(initial=0.0)
        along = squares[ours] + squares[theirs].min() - self._steps(longest + errors[ours] + largest)
        return np.maximum(floors, _half(along)[:, None], out=floors)

    def _steps(self, length: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The square of a length, in steps of a code."""
        return np.square(length / self._step)

    def _measure(self) -> None:
        """Measure the noted pairs exactly; they also shorten the ways to the first leaf."""
        if not self._num_pending:
            return
        i, j = (np.concatenate(column) for column in zip(*self._pending, strict=True))
        self._pending, self._num_pending = [], 0
        order = np.argsort(i // _SIDE * len(self._rows) + j)
        i, j = i[order], j[order]

        squared = _measured(self._images, self._rows[i], self._rows[j])
        near = squared <= self._limit
        i, j, squared = i[near], j[near], squared[near]
        lengths = _length(squared)
        np.minimum.at(self._reach, i, np.maximum(lengths, self._reach[j]))
        np.minimum.at(self._reach, j, np.maximum(lengths, self._reach[i]))

        may = lengths <= np.maximum(self._reach[i], self._reach[j])
        self._measured += len(order)
        self._found.append(_links(self._rows[i[may]], self._rows[j[may]], squared[may]))
        self._num_links += int(may.sum())
        if self._num_links > _MOST_LINKS:
            self._found, self._num_links = [spanning_links(join_links(self._found))], 0


class _Maxima:
    """The largest of any stretch of numbers, from the maxima of stretches of 1, 2, 4, ..."""

    def __init__(self, numbers: Float[np.ndarray, " n"]) -> None:
        self._levels = [numbers]
        while (width := 1 << (len(self._levels) - 1)) * 2 <= len(numbers):
            last = self._levels[-1]
            self._levels.append(np.maximum(last[:-width], last[width:]))

    def __call__(self, starts: Int[np.ndarray, " pairs"], stops: Int[np.ndarray, " pairs"]) -> np.ndarray:
        """Of each stretch from a start to before a stop; 0 of an empty one."""
        found = np.zeros(len(starts))
        level = np.frexp(np.maximum(stops - starts, 1).astype(np.float64))[1] - 1
        for number, maxima in enumerate(self._levels):
            at = np.flatnonzero((level == number) & (stops > starts))
            found[at] = np.maximum(maxima[starts[at]], maxima[stops[at] - (1 << number)])
        return found


def _half(squared: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Not above half of it; int32, as products of codes are."""
    return np.clip(np.floor(squared / 2) - 1, -_FAR, _FAR).astype(np.int32)


def _leaves(
    count: int, left: np.ndarray, right: np.ndarray, squared: Float[np.ndarray, " links"]
) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, " steps"]]:
    """The rows so that every step of the tree joins two neighboring stretches, and the step between neighbors."""
    root, last, follower = list(range(count)), list(range(count)), [-1] * count
    size, step = [1] * count, [0.0] * count

    def find(row: int) -> int:
        while root[row] != row:
            root[row] = root[root[row]]
            row = root[row]
        return row

    order = np.argsort(squared, kind="stable")
    for one, other, apart in zip(left[order].tolist(), right[order].tolist(), squared[order].tolist(), strict=True):
        large, small = find(one), find(other)
        if size[large] < size[small]:
            large, small = small, large
        follower[last[large]], step[last[large]] = small, apart  # a root is the first of its stretch
        last[large], root[small] = last[small], large
        size[large] += size[small]

    leaves, row = [], find(0)
    while row >= 0:
        leaves.append(row)
        row = follower[row]
    places = np.array(leaves)
    return places, np.array(step)[places[:-1]]


def _measured(images: UnitRows, left: Int[np.ndarray, " pairs"], right: Int[np.ndarray, " pairs"]) -> np.ndarray:
    """Exact squared distances; rows of neighboring pairs are read once."""
    squared = np.empty(len(left))
    for part in _slices(len(left), side=_PAIRS_AT_ONCE):
        rows, one, other = numbered(left[part], right[part])
        units = images[rows]
        for some in _slices(len(one), side=max(1, _NUMBERS_AT_ONCE // images.dim)):
            squared[part][some] = squared_distances(units[one[some]], units[other[some]])
    return squared


def _links(i: np.ndarray, j: np.ndarray, squared: np.ndarray) -> Links:
    return Links(np.minimum(i, j), np.maximum(i, j), squared)


def _length(squared: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Distances, rounded up."""
    return np.sqrt(squared) * (1 + 2.0**-30)


def _slices(count: int, start: int = 0, *, side: int = _SIDE) -> Iterator[slice]:
    for at in range(start, count, side):
        yield slice(at, min(at + side, count))
