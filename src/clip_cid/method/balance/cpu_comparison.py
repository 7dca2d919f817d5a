"""Compare two chunks on the CPU: multiply codes block by block; pairs above the floor are candidates.

Crowds of rows near each other come first: most of their pairs would be candidates.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8

from clip_cid.method.balance.dense_crowds import crowd_links, find_crowds
from clip_cid.method.balance.exact_links import ExactLinks
from clip_cid.method.balance.prepared_rows import ChunkPair, PreparedRows
from clip_cid.method.products import int8_product
from clip_cid.method.unit_rows import UnitRows

_SIDE = 1024  # rows of a block: its 4 MB of products stay in the cache until they are compared with the floor
_PRODUCTS = _SIDE * _SIDE
_FOLDS = 16
_PLACES = 1 << 16  # products checked one by one at a time


def compare_on_cpu(prepared: PreparedRows, pair: ChunkPair, images: UnitRows, links: ExactLinks) -> None:
    """Give the candidates of two chunks to `links`."""
    first, second = prepared.positions(pair.first), prepared.positions(pair.second)
    comparison = _Comparison(prepared, links, _link_crowds(prepared, pair, images, links))
    if not len(prepared.visits):
        _compare_all(comparison, first, second)
        return
    _compare_cells(comparison, prepared, first, second, own_cell=True)
    if pair.first != pair.second:
        _compare_cells(comparison, prepared, second, first, own_cell=False)


class _Crowds:
    """The crowd of each position of two chunks; 0 for none."""

    def __init__(self, first: slice, second: slice) -> None:
        self._first, self._second = first, second
        spans = (first,) if first == second else (first, second)
        self.positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        self.number = np.zeros(len(self.positions), dtype=np.int32)

    @property
    def is_first(self) -> Bool[np.ndarray, " positions"] | None:
        """Which positions are in the first of two chunks; None if there is one."""
        return None if self._first == self._second else self.positions < self._first.stop

    def of(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        beyond = self._first.stop - self._first.start - self._second.start
        at = np.where(
            (positions >= self._first.start) & (positions < self._first.stop),
            positions - self._first.start,
            positions + beyond,
        )
        return self.number[at]


def _link_crowds(prepared: PreparedRows, pair: ChunkPair, images: UnitRows, links: ExactLinks) -> _Crowds | None:
    """Give `links` the links of each crowd; None if there is none."""
    crowds = _Crowds(prepared.positions(pair.first), prepared.positions(pair.second))
    rows, is_first = prepared.row_at[crowds.positions], crowds.is_first
    found = find_crowds(images, rows, prepared.limit)
    for number, crowd in enumerate(found, 1):
        crowds.number[crowd] = number
        first = None if is_first is None else is_first[crowd]
        if first is None or (first.any() and not first.all()):
            links.take(crowd_links(images, rows[crowd], prepared.limit, first=first))
    return crowds if found else None


def blocks(positions: slice, side: int) -> Iterator[slice]:
    """Slices of at most `side` positions."""
    for start in range(positions.start, positions.stop, side):
        yield slice(start, min(start + side, positions.stop))


class _Comparison:
    """Compares two lists of positions; its memory for the products is used again and again."""

    def __init__(self, prepared: PreparedRows, links: ExactLinks, crowds: _Crowds | None) -> None:
        self._prepared, self._links, self._crowds = prepared, links, crowds
        self._least = 1 - prepared.limit / 2
        self._space: np.ndarray | None = None

    def __call__(self, left: Int[np.ndarray, " left"], right: slice, *, triangle: bool) -> None:
        """Every pair, or (triangle) every pair whose left position is the lower one; none within a crowd."""
        theirs = np.arange(right.start, right.stop)
        if self._crowds is None:
            self._compare(left, theirs, triangle=triangle)
            return

        ours, others = self._crowds.of(left), self._crowds.of(theirs)
        for crowd in np.unique(ours):
            self._compare(left[ours == crowd], theirs[(others != crowd) | (crowd == 0)], triangle=triangle)

    def _compare(self, left: Int[np.ndarray, " left"], right: Int[np.ndarray, " right"], *, triangle: bool) -> None:
        at_once = max(1, _PRODUCTS // max(len(right), 1))
        for start in range(0, len(left) if len(right) else 0, at_once):
            block = left[start : start + at_once]
            for i, j in self._candidates(block, right):
                i, j = block[i], right[j]
                if triangle:
                    i, j = i[i < j], j[i < j]
                if len(i):
                    self._links.add(self._prepared.row_at[i], self._prepared.row_at[j])

    def _candidates(
        self, left: Int[np.ndarray, " left"], right: Int[np.ndarray, " right"]
    ) -> Iterator[tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]]:
        """Places in `left` and in `right` of the pairs whose cosine may be large enough."""
        prepared = self._prepared
        left_errors = prepared.errors[left].astype(np.float64)
        right_errors = prepared.errors[right].astype(np.float64)

        # First by the floor of the pair with the largest errors, which is the lowest of all.
        loosest = left_errors.max(keepdims=True), right_errors.max(keepdims=True)
        lowest = float(prepared.coding.floor(self._least, *loosest)[0])
        # Not a copy where it can be a view: numpy takes half the time for the product of a matrix with itself.
        products = self._product(prepared.codes[_as_slice(left)], prepared.codes[_as_slice(right)])
        places = _places_above(products, lowest)

        # Then each by its own floor.
        for start in range(0, len(places), _PLACES):
            part = places[start : start + _PLACES]
            i, j = np.divmod(part, products.shape[1])
            above = products.reshape(-1)[part] >= prepared.coding.floor(self._least, left_errors[i], right_errors[j])
            yield i[above], j[above]

    def _product(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Into the same memory each time."""
        shape, integers = (len(one), len(other)), one.dtype == np.int8
        size = shape[0] * shape[1]
        if self._space is None or self._space.size < size:
            self._space = np.empty(max(_PRODUCTS, size), dtype=np.int32 if integers else np.float32)

        out = self._space[:size].reshape(shape)
        if integers:
            int8_product(torch.from_numpy(one), torch.from_numpy(other).T, out=torch.from_numpy(out))
            return out
        return np.matmul(np.asarray(one, np.float32), np.asarray(other, np.float32).T, out=out)


def _places_above(products: np.ndarray, floor: float) -> Int[np.ndarray, " places"]:
    """Flat places of the products that reach the floor; few do, so the maxima of every 16 rows come first."""
    folded = len(products) // _FOLDS * _FOLDS
    if folded:
        largest = products[:folded].reshape(_FOLDS, -1).max(axis=0)
        flat = np.flatnonzero(largest >= floor)
        if len(flat) * _FOLDS < products.size // 8:
            flat = (flat + len(largest) * np.arange(_FOLDS)[:, None]).reshape(-1)
            flat = flat[products.reshape(-1)[flat] >= floor]
            rest = np.flatnonzero(products[folded:] >= floor)
            return np.concatenate([flat, folded * products.shape[1] + rest])
    return np.flatnonzero(products >= floor)


def _compare_all(compare: _Comparison, first: slice, second: slice) -> None:
    for left in blocks(first, _SIDE):
        positions = np.arange(left.start, left.stop)
        for right in blocks(second, _SIDE):
            if right.stop > left.start:
                compare(positions, right, triangle=right.start < left.stop)


def _compare_cells(
    compare: _Comparison, prepared: PreparedRows, visiting: slice, visited: slice, *, own_cell: bool
) -> None:
    """Cell by cell of one chunk: its rows against the rows of another chunk that visit the cell.

    Rows whose own cell it is are compared only with `own_cell`, so that no pair is compared twice.
    """
    cells = prepared.cell_at[visited]
    names, starts = np.unique(cells, return_index=True)
    stops = np.append(starts[1:], len(cells))

    for cell, start, stop in zip(names.tolist(), starts.tolist(), stops.tolist(), strict=True):
        visitors = _visitors(prepared.visits[cell], visiting)
        at_home = prepared.cell_at[visitors] == cell
        guests, residents = visitors[~at_home], visitors[at_home]
        for right in blocks(slice(visited.start + start, visited.start + stop), _SIDE):
            if len(guests):
                compare(guests, right, triangle=False)
            if own_cell and len(residents):
                compare(residents, right, triangle=visiting == visited)


def _visitors(bits: UInt8[np.ndarray, " bytes"], positions: slice) -> Int[np.ndarray, " visitors"]:
    """The positions of a range whose bit is set."""
    first = positions.start // 8
    visitors = np.flatnonzero(np.unpackbits(bits[first : -(-positions.stop // 8)])) + 8 * first
    return visitors[slice(*np.searchsorted(visitors, [positions.start, positions.stop]).tolist())]


def _as_slice(positions: Int[np.ndarray, " positions"]) -> slice | Int[np.ndarray, " positions"]:
    """Ascending positions, as a slice if none is left out."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions
