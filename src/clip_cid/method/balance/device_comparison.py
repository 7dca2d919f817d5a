"""Compare chunks on a device: they lie there whole; only pairs above the floor come back to be measured."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from clip_cid.devices import Begun, Beside, Copies, one_ahead
from clip_cid.method.balance.cpu_comparison import blocks
from clip_cid.method.balance.exact_links import ExactLinks
from clip_cid.method.balance.prepared_rows import ChunkPair, PreparedRows
from clip_cid.method.products import float32_sums

_SIDE = 16_384  # rows of a block: half a GB of float16 products, long enough that starting one does not count
_WAITING = 4  # blocks of candidates


def compare_on_device(prepared: PreparedRows, pairs: Sequence[ChunkPair], links: ExactLinks) -> None:
    """Give the candidates of pairs of chunks to `links`, which measures them meanwhile in another thread.

    The first chunks of all pairs stay on the device. So pairs in the order of their second chunks need one read a chunk.
    """
    device = torch.device(prepared.device)
    beside = Beside(device)

    def multiply(tile: _Tile) -> tuple[_Tile, Begun[torch.Tensor]]:
        return tile, beside.begun(tile.left_codes @ tile.right_codes.T)

    # The device multiplies the next tile while the host looks at one.
    with float32_sums(), _Background(links) as background:
        for tile, products in one_ahead(_tiles(prepared, pairs, Copies(device)), multiply, device):
            _collect(prepared, tile, products, background)


@dataclass(frozen=True)
class _Tile:
    """Two runs of positions, and their codes on the device."""

    left: slice
    right: slice
    left_codes: torch.Tensor
    right_codes: torch.Tensor


def _tiles(prepared: PreparedRows, pairs: Sequence[ChunkPair], copies: Copies) -> Iterator[_Tile]:
    def on_device(chunk: int) -> torch.Tensor:
        return copies(torch.from_numpy(prepared.codes[prepared.positions(chunk)]))

    resident = {chunk: on_device(chunk) for chunk in sorted({pair.first for pair in pairs})}
    number, other = -1, None
    for pair in pairs:
        if pair.second != number:
            number, other = pair.second, resident.get(pair.second)
            other = on_device(number) if other is None else other
        assert other is not None

        first, second = prepared.positions(pair.first), prepared.positions(pair.second)
        for left in blocks(first, _SIDE):
            for right in blocks(second, _SIDE):
                if right.stop > left.start:
                    codes = resident[pair.first][_within(left, first)], other[_within(right, second)]
                    yield _Tile(left, right, *codes)


def _collect(prepared: PreparedRows, tile: _Tile, products: "Begun[torch.Tensor]", background: "_Background") -> None:
    """Hand the pairs of a tile that may be near to those who measure."""
    least = 1 - prepared.limit / 2

    # On the device by the lowest floor of the tile, then each pair by its own.
    loosest = (_errors(prepared, positions).max(keepdims=True) for positions in (tile.left, tile.right))
    floor = float(prepared.coding.floor(least, *loosest)[0])
    with products.waited_for() as values:
        i, j, values = above_on_device(values, floor)
    i, j = i + tile.left.start, j + tile.right.start
    floors = prepared.coding.floor(least, _errors(prepared, i), _errors(prepared, j))
    near = (i < j) & (values >= floors)

    if near.any():
        background.add(prepared.row_at[i[near]], prepared.row_at[j[near]])


def _errors(prepared: PreparedRows, positions: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return prepared.errors[positions].astype(np.float64)


def above_on_device(products: torch.Tensor, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places and values of the products that reach the floor; rows without one are skipped on the device."""
    hits = torch.nonzero(products.amax(dim=1) >= floor).squeeze(1)
    hit_rows = products[hits]
    at, j = torch.nonzero(hit_rows >= floor, as_tuple=True)
    return hits[at].cpu().numpy(), j.cpu().numpy(), hit_rows[at, j].double().cpu().numpy()


class _Background:
    """Measures candidates in another thread, so that the device does not wait for the CPU; only a few blocks wait."""

    def __init__(self, links: ExactLinks) -> None:
        self._links = links
        self._queue: queue.Queue[tuple[np.ndarray, np.ndarray] | None] = queue.Queue(maxsize=_WAITING)
        self._thread = threading.Thread(target=self._measure, daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> "_Background":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def add(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> None:
        self._queue.put((i, j))

    def _measure(self) -> None:
        while (candidates := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._links.add(*candidates)
            except (
                BaseException
            ) as error:  # empty the queue in any case, so that the other thread does not wait forever
                self._error = error


def _within(positions: slice, chunk: slice) -> slice:
    return slice(positions.start - chunk.start, positions.stop - chunk.start)
