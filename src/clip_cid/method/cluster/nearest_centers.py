"""The nearest center of each row: codes nominate centers, float32 narrows them down, float64 decides."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int32

from clip_cid.devices import Begun, Beside, Copies, is_at_hand, one_ahead
from clip_cid.method.codes import LEVELS, ROUNDING, CodeType, Coding, encode
from clip_cid.method.products import float32_sums, int8_product, int8_products_are_right
from clip_cid.method.unit_rows import FLOAT32_ERROR, UnitRows, product_error

TIED = 1e-9  # centers nearer to equal than this are decided by their number, not by rounding
BLOCK_ROWS = 1024
_CPU_BLOCK, _DEVICE_BLOCK = (BLOCK_ROWS, 2048), (16_384, 65_536)  # rows and centers of a product
_KEPT = 8  # products of a row that stay on a device until all centers are read
_PAIRS = 256  # both sides of so many pairs stay in the cache
_LEAST_GAIN = 1.6  # an orthogonal matrix pays for itself where it makes the steps of the codes smaller by this factor
_INT8_FROM = 96  # centers; for fewer the codes of the rows cost more than int8 products save
_WORD = 8  # comparisons that are tested at once
_Pairs = tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]


class CenterSearch:
    r"""Finds the nearest of some centers; `shortlist_bound` in docs/method.md.

    .. math:: | v \cdot c_j - s_v s\, q_v \cdot q_j | \le e_v \|c_j\| + (1 + e_v)\, e_j, \qquad e = \| x - s q \|

    v is a row with code q_v, c_j a center less the mean center (which changes no comparison) with code q_j; each e is
    measured. Where a few columns are much larger than the others, which would leave the codes of the others no levels,
    all are multiplied first by an orthogonal matrix. A center whose product is below the best one by more than twice
    this bound cannot be the nearest. The others are compared in float32, and those that float32 cannot tell apart in
    float64; of those equal within 1e-9 the lowest is taken. So the labels depend neither on the codes nor on blocks,
    threads or device. They are decided on the CPU; the products of the codes are computed on `device`.

    Args:
        centers: (centers, dim), as unit rows.
        device: Of the products.
    """

    def __init__(self, centers: UnitRows, *, device: str = "cpu") -> None:
        self._exact, self._device = centers, torch.device(device)
        self._copies, self._beside = Copies(self._device), Beside(self._device)
        self.block_rows, self._block = _CPU_BLOCK if self._device.type == "cpu" else _DEVICE_BLOCK
        self._kind: CodeType = _fastest(self._device, len(centers))

        self._float32 = np.empty((len(centers), centers.dim), dtype=np.float32)
        total = np.zeros(centers.dim)
        for block in centers.blocks(self._block):
            unit = centers[block]
            self._float32[block] = unit
            total += unit.sum(axis=0)
        self._encode_centers(total / len(centers))

    def assign(
        self, images: UnitRows, block_rows: int | None = None, on_assigned: Callable[[int], Any] | None = None
    ) -> tuple[Int32[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
        """The nearest center of each row and the exact cosine to it; `on_assigned` gets a block's row count."""
        labels = np.empty(len(images), dtype=np.int32)
        cosines = np.empty(len(images), dtype=np.float64)
        for block, nearest, _ in self.over(images, block_rows):
            labels[block] = nearest
            unit = images[block]
            cosines[block] = self._exact_dots(unit, np.arange(len(unit)), labels[block])
            if on_assigned is not None:
                on_assigned(len(unit))
        return labels, cosines

    def nearest(self, images: UnitRows, block: slice) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, "n dim"]]:
        """The nearest center of each row of a block, and the rows in float32."""
        return self._decide(self._begin(images, block))[1:]

    def over(
        self, images: UnitRows, block_rows: int | None = None
    ) -> Iterator[tuple[slice, Int[np.ndarray, " n"], Float32[np.ndarray, "n dim"]]]:
        """Each block of rows, with what `nearest` gives of it; a device compares the next block meanwhile."""
        blocks = images.blocks(block_rows or self.block_rows)
        yield from map(self._decide, one_ahead(blocks, functools.partial(self._begin, images), self._device))

    def _begin(self, images: UnitRows, block: slice) -> "_BegunBlock":
        unit = images.float32(block)
        return _BegunBlock(images, block, unit, self._shortlist(unit))

    def _decide(self, begun: "_BegunBlock") -> tuple[slice, Int[np.ndarray, " n"], Float32[np.ndarray, "n dim"]]:
        images, block, unit = begun.images, begun.block, begun.unit
        rows, columns = begun.shortlist()
        labels = np.empty(len(unit), dtype=np.int64)
        labels[rows] = columns

        # Rows with several centers on their list: compare these in float32.
        rows, columns = _contested(rows, columns)
        if len(rows):
            values = _dots(unit, rows, self._float32, columns)
            left = values >= _best_of_row(values, rows) - np.float32(2 * _float32_error(images.dim) + TIED)
            rows, columns = rows[left], columns[left]
            labels[rows] = columns
            rows, columns = _contested(rows, columns)

        # Rows with several centers that float32 cannot tell apart: compare these in float64.
        if len(rows):
            contested_rows, place = np.unique(rows, return_inverse=True)
            values = self._exact_dots(images[block.start + contested_rows], place, columns)
            left = np.flatnonzero(values >= _best_of_row(values, rows) - TIED)[::-1]
            labels[rows[left]] = columns[left]  # backwards, so that the lowest is written last

        return block, labels, unit

    def _encode_centers(self, mean: Float64[np.ndarray, " dim"]) -> None:
        """Codes of all centers in one step, the largest error of a code, and the greatest length."""
        blocks = list(self._exact.blocks(self._block))
        self._mean, self._rotation = mean, None

        # Rotate where that makes the numbers that the codes have to hold much smaller.
        largest, of_rows = self._largest(blocks)
        if self._kind == "int8":
            self._rotation = _Rotation(len(mean))
            rotated, rotated_of_rows = self._largest(blocks)
            if largest + of_rows < _LEAST_GAIN * (rotated + rotated_of_rows):
                self._rotation = None
            else:
                largest = rotated

        self._step = float(np.float32(largest / LEVELS)) or 1.0
        self._codes: list[torch.Tensor] = []
        self._error = self._length = 0.0
        for block in blocks:
            short = self._less_mean(block)
            codes, errors = encode(short, torch.tensor(self._step), self._kind)
            self._codes.append(self._copies(codes))
            self._error = max(self._error, float(errors.max()))
            self._length = max(self._length, float(torch.linalg.vector_norm(short, dim=1).max()))
        self._product_error = Coding(self._kind, len(mean)).product_error

    def _largest(self, blocks: list[slice]) -> tuple[float, float]:
        """The largest number that a code has to hold: of the centers, and of rows like them on average."""
        of_centers = max(float(self._less_mean(block).abs().max()) for block in blocks)
        like_rows = torch.from_numpy(self._float32[blocks[0]])
        return of_centers, float(self._rotated(like_rows).abs().amax(dim=1).mean())

    def _less_mean(self, block: slice) -> Float32[torch.Tensor, "n dim"]:
        return self._rotated(torch.from_numpy((self._float32[block] - self._mean).astype(np.float32)))

    def _rotated(self, rows: Float32[torch.Tensor, "n dim"]) -> Float32[torch.Tensor, "n dim"]:
        return rows if self._rotation is None else self._rotation(rows)

    def _shortlist(self, unit: Float32[np.ndarray, "n dim"]) -> Callable[[], _Pairs]:
        """Gives rows and centers of all pairs that may be the nearest, in order; each row has one at least."""
        rotated = self._rotated(torch.from_numpy(unit))
        step = rotated.abs().amax(dim=1, keepdim=True) / LEVELS if self._kind == "int8" else torch.ones(1)
        codes, errors = encode(rotated, step, self._kind)
        codes = self._copies(codes)

        # How far a product may be from the cosine, in units of a product.
        error = errors.numpy().astype(np.float64)
        slack = error * self._length + (1 + error) * self._error + self._product_error + 4 * FLOAT32_ERROR + TIED
        slack += 0 if self._rotation is None else 3 * self._rotation.error
        if self._kind == "int8":
            slack /= step[:, 0].numpy().astype(np.float64) * self._step * (1 - ROUNDING)

        if is_at_hand(codes):
            pairs = self._pairs_here(codes, slack)
            return lambda: pairs
        begun = self._beside.begun(self._largest_products(codes))
        return lambda: self._pairs_there(codes, slack, begun)

    def _pairs_here(self, codes: torch.Tensor, slack: Float64[np.ndarray, " n"]) -> _Pairs:
        best = np.full(len(codes), -np.inf)
        of_blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for place, centers in enumerate(self._codes):
            scores = self._product(codes, centers)
            best = np.maximum(best, scores.amax(dim=1).numpy())
            rows, columns, values = _at_least(scores.numpy(), _floor_as(scores.dtype, best - 2 * slack))
            of_blocks.append((rows, columns + place * self._block, values))
        if len(of_blocks) == 1:
            return of_blocks[0][:2]

        # A later block may have raised the best product of a row.
        rows, columns, values = (np.concatenate(parts) for parts in zip(*of_blocks, strict=True))
        left = np.flatnonzero(values >= (best - 2 * slack)[rows])
        left = left[np.argsort(rows[left], kind="stable")]  # blocks are in order, so columns stay so
        return rows[left], columns[left]

    def _largest_products(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest products of each row with all centers, in order, and these centers; nobody waits for them."""
        values = torch.full((len(codes), _KEPT), -torch.inf, dtype=codes.dtype, device=codes.device)
        columns = torch.zeros_like(values, dtype=torch.long)
        for place, centers in enumerate(self._codes):
            top = self._product(codes, centers).topk(min(_KEPT, len(centers)), dim=1)
            values, kept = torch.cat([values, top.values], dim=1).topk(_KEPT, dim=1)
            columns = torch.cat([columns, top.indices + place * self._block], dim=1).gather(1, kept)
        return values, columns

    def _pairs_there(
        self, codes: torch.Tensor, slack: Float64[np.ndarray, " n"], begun: Begun[tuple[torch.Tensor, torch.Tensor]]
    ) -> _Pairs:
        with begun.waited_for() as largest:
            values, columns = (each.cpu().numpy() for each in largest)
        floor = values[:, 0] - 2 * slack
        reaches = values >= floor[:, None]
        of_rows, kept = np.nonzero(reaches)
        found = [(of_rows, columns[of_rows, kept])]

        # Rows of which more products may reach the floor than were kept are compared once more.
        many = np.flatnonzero(reaches[:, -1])
        if len(many):
            again, limit = codes[torch.from_numpy(many).to(codes.device)], _floor_as(codes.dtype, floor[many])
            for place, centers in enumerate(self._codes):
                rows, others = _at_least_there(self._product(again, centers), limit)
                found.append((many[rows], others + place * self._block))

        pairs = np.unique(np.concatenate([np.stack(part, axis=1) for part in found]), axis=0)
        return pairs[:, 0], pairs[:, 1]

    def _product(self, codes: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        if self._kind == "int8":
            return int8_product(codes, centers.T)
        with float32_sums():
            return codes @ centers.T

    def _exact_dots(
        self,
        unit: Float64[np.ndarray, "n dim"],
        place: Int[np.ndarray, " pairs"],
        columns: Int[np.ndarray, " pairs"],
    ) -> Float64[np.ndarray, " pairs"]:
        values = np.empty(len(columns))
        for start in range(0, len(columns), _PAIRS):
            pairs = slice(start, start + _PAIRS)
            values[pairs] = (unit[place[pairs]] * self._exact[columns[pairs]]).sum(axis=1)
        return values


@dataclass(frozen=True)
class _BegunBlock:
    """Rows whose codes are being compared with the centers."""

    images: UnitRows
    block: slice
    unit: Float32[np.ndarray, "n dim"]
    shortlist: Callable[[], _Pairs]


class _Rotation:
    """A random orthogonal matrix, the Kronecker product of two small ones, so that it costs little beside a product.

    Each number of a rotated row is a sum over all numbers of the row, so a large one is spread over all columns.
    """

    def __init__(self, dim: int) -> None:
        left = next(size for size in range(math.isqrt(dim), 0, -1) if dim % size == 0)
        random = np.random.default_rng(0)
        self._left, self._right = (
            torch.from_numpy(np.linalg.qr(random.standard_normal((size, size)))[0].astype(np.float32))
            for size in (left, dim // left)
        )
        # Each factor is rounded and summed in float32; entries taken as positive it is sqrt(size) long at most.
        self.error = 2 * sum(math.sqrt(size) * (product_error(size) + FLOAT32_ERROR) for size in (left, dim // left))

    def __call__(self, rows: Float32[torch.Tensor, "n dim"]) -> Float32[torch.Tensor, "n dim"]:
        left, right = len(self._left), len(self._right)
        half = rows.reshape(-1, right) @ self._right
        return (self._left @ half.view(-1, left, right)).view(-1, left * right)


def _dots(
    left: Float32[np.ndarray, "n dim"],
    rows: Int[np.ndarray, " pairs"],
    right: Float32[np.ndarray, "m dim"],
    columns: Int[np.ndarray, " pairs"],
) -> Float32[np.ndarray, " pairs"]:
    """The product of each named pair of rows."""
    values = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _PAIRS):
        block = slice(start, start + _PAIRS)
        values[block] = np.vecdot(left[rows[block]], right[columns[block]])
    return values


def _fastest(device: torch.device, centers: int) -> CodeType:
    if device.type != "cpu":
        return "float16"
    return "int8" if centers >= _INT8_FROM and _int8_is_right() else "float32"


_int8_is_right = functools.cache(int8_products_are_right)


def _at_least(
    scores: np.ndarray, floor: np.ndarray
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], np.ndarray]:
    """Row, column and value of all scores that reach the floor of their row, in order.

    Eight comparisons are tested as one word: nearly all are false, and one by one they take half the product's time.
    """
    width = -(-scores.shape[1] // _WORD) * _WORD
    flags = np.zeros((len(scores), width), dtype=bool)
    np.greater_equal(scores, floor[:, None], out=flags[:, : scores.shape[1]])
    words = np.flatnonzero(flags.reshape(-1).view(np.uint64))
    inside = np.flatnonzero(flags.reshape(-1, _WORD)[words])
    rows, columns = np.divmod(words[inside // _WORD] * _WORD + inside % _WORD, width)
    return rows, columns, scores[rows, columns]


def _at_least_there(scores: torch.Tensor, floor: np.ndarray) -> _Pairs:
    """The same rows and columns, on the device of the scores."""
    limit = torch.from_numpy(floor).to(scores.device)
    rows, columns = (scores >= limit[:, None]).nonzero(as_tuple=True)
    return rows.cpu().numpy(), columns.cpu().numpy()


def _floor_as(dtype: torch.dtype, floor: Float64[np.ndarray, " n"]) -> np.ndarray:
    """The floor in the type of the scores; no score that reaches the one fails to reach the other."""
    if dtype == torch.int32:
        return np.clip(np.ceil(floor), -(2.0**31), 2.0**31 - 1).astype(np.int32)
    kind = np.float16 if dtype == torch.float16 else np.float32
    return np.nextafter(floor.astype(kind), kind(-np.inf))


def _contested(
    rows: Int[np.ndarray, " pairs"], columns: Int[np.ndarray, " pairs"]
) -> tuple[Int[np.ndarray, " left"], Int[np.ndarray, " left"]]:
    """The pairs of rows that have more than one."""
    same = rows[1:] == rows[:-1]
    several = np.zeros(len(rows), dtype=bool)
    several[1:] = same
    several[:-1] |= same
    return rows[several], columns[several]


def _best_of_row(values: Float[np.ndarray, " pairs"], rows: Int[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
    """For each pair the best value of its row; pairs of a row stand together."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    return np.repeat(np.maximum.reduceat(values, starts), np.diff(starts, append=len(rows)))


def _float32_error(dim: int) -> float:
    """How far the float32 product of two rounded unit rows may be from the exact one."""
    return product_error(dim) + 2 * FLOAT32_ERROR + FLOAT32_ERROR**2
