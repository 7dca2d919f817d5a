"""The order of the training rows: a seeded permutation for each epoch, cut into batches without a gap."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a batch finds a pair: the epoch, and the index among the training rows."""

    epoch: int
    index: int


def epoch_orders(
    num_rows: int, batch_size: int, *, seed: int, first_epoch: int = 0
) -> Iterator[tuple[int, Int[np.ndarray, " rows"]]]:
    """Each epoch with the order of its rows: a seeded permutation, in which no batch holds a row twice.

    A batch across two epochs begins with the last rows of the first one. If the new permutation repeats one
    of these within that batch, it swaps places with a later row: two copies of one pair must not be
    negatives of each other.
    """
    # An exchange reaches at most two batches into an epoch, so from three on it never touches the epoch's last rows,
    # and the epoch before the first is enough to start from.
    start = max(first_epoch - 1, 0) if num_rows >= 3 * batch_size else 0
    last = np.empty(0, dtype=np.int64)
    for epoch in itertools.count(start):
        order = np.arange(num_rows, dtype=np.int32 if num_rows < 2**31 else np.int64)
        np.random.default_rng((seed, epoch)).shuffle(order)

        # The batch across the border: a row of the last epoch's end must not come again within it.
        carried = epoch * num_rows % batch_size
        if carried and len(last):
            room = batch_size - carried
            repeated = np.flatnonzero(np.isin(order[:room], last[-carried:]))
            fresh = room + np.flatnonzero(~np.isin(order[room : room + batch_size], last[-carried:]))[: len(repeated)]
            order[repeated], order[fresh] = order[fresh], order[repeated]

        last = order[-batch_size:].copy()
        if epoch >= first_epoch:
            yield epoch, order


def batch_places(num_rows: int, batch_size: int, *, seed: int, first_step: int = 0) -> Iterator[list[Place]]:
    """The places of each batch from `first_step` on, without end.

    Epochs follow each other without a gap: the rows left at the end of one open the first batch of the next, so after
    `step` steps exactly `step * batch_size` pairs were seen and each epoch holds every row once.

    Raises:
        ValueError: A batch is empty or larger than an epoch.
    """
    if not 0 < batch_size <= num_rows:
        raise ValueError(f"batch_size: must be in [1, {num_rows}] (the rows), got {batch_size}")
    first_epoch, at = divmod(first_step * batch_size, num_rows)
    orders = epoch_orders(num_rows, batch_size, seed=seed, first_epoch=first_epoch)
    epoch, order = next(orders)
    while True:
        places = [Place(epoch, int(index)) for index in order[at : at + batch_size]]
        at += batch_size
        if at >= num_rows:
            at -= num_rows
            epoch, order = next(orders)
            places += [Place(epoch, int(index)) for index in order[:at]]
        yield places
