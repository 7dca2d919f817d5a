"""Compare two chunks on a device: both lie there whole; only pairs above the floor come back to be measured."""

import queue
import threading

import numpy as np
import torch
from jaxtyping import Int

from clip_cid.method.balance.cpu_comparison import blocks
from clip_cid.method.balance.exact_links import ExactLinks
from clip_cid.method.balance.prepared_rows import ChunkPair, PreparedRows
from clip_cid.method.products import float32_sums

_SIDE = 16_384  # rows of a block: half a GB of float16 products, long enough that starting one does not count
_WAITING = 4  # blocks of candidates


def compare_on_device(prepared: PreparedRows, pair: ChunkPair, links: ExactLinks) -> None:
    """Give the candidates of two chunks to `links`, which measures them meanwhile in another thread."""
    first, second = prepared.positions(pair.first), prepared.positions(pair.second)
    least, errors = 1 - prepared.limit / 2, prepared.errors.astype(np.float64)
    one = torch.from_numpy(prepared.codes[first]).to(prepared.device)
    other = one if first == second else torch.from_numpy(prepared.codes[second]).to(prepared.device)

    with float32_sums(), _Background(links) as background:
        for left in blocks(first, _SIDE):
            for right in blocks(second, _SIDE):
                if right.stop <= left.start:
                    continue

                # On the device by the lowest floor of the block, then each pair by its own.
                loosest = (errors[positions].max(keepdims=True) for positions in (left, right))
                floor = float(prepared.coding.floor(least, *loosest)[0])
                products = one[_within(left, first)] @ other[_within(right, second)].T
                i, j, values = above_on_device(products, floor)
                i, j = i + left.start, j + right.start
                near = (i < j) & (values >= prepared.coding.floor(least, errors[i], errors[j]))

                if near.any():
                    background.add(prepared.row_at[i[near]], prepared.row_at[j[near]])


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
