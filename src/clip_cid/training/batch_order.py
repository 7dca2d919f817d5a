"""The order of the training rows: a seeded permutation for each epoch, cut into batches without a gap.

It is of all rows, or one that a disk can be read in: shards in a random order, rows shuffled in windows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int

from clip_cid.data.embeddings.sharded_rows import row_type

_NOT_PAIRS = 2  # in the seed of an order that is not to be that of the pairs


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a batch finds a pair: the epoch, and the index among the training rows."""

    epoch: int
    index: int


RowsOf = Callable[[int], Int[np.ndarray, " rows"]]
"""The rows of an epoch, ascending, in an array of the caller's own."""
_AT_ONCE = 1 << 22  # rows whose places are computed together


class ClusterTurns:
    r"""The rows of each epoch where a cluster gives at most `per_cluster`; `cluster_turns` in docs/method.md.

    .. math:: \{ \pi_c((e q_c + j) \bmod n_c) : 0 \le j < q_c \}, \quad q_c = \min(n_c, cap)

    The rows of a cluster stand in a circle, in a random order that the seed decides. An epoch takes those behind the
    last epoch's. So no epoch holds a row twice, and after any number of epochs all rows of a cluster were taken equally
    often, or some of them once more. Epochs are as long as each other.

    Args:
        labels: The cluster of each row.
        per_cluster: At most so many rows of a cluster in an epoch.
        seed: Of the orders within the clusters.
    """

    def __init__(self, labels: Int[np.ndarray, " rows"], *, per_cluster: int, seed: int) -> None:
        self._sizes = np.bincount(labels)
        self._quotas = np.minimum(self._sizes, per_cluster)

        # The circles, one behind the other. Three numbers of a seed: no epoch's permutation is drawn from them.
        order = np.arange(len(labels), dtype=row_type(len(labels)))
        np.random.default_rng((seed, 0, 1)).shuffle(order)
        self._circles = order[np.argsort(labels[order], kind="stable")]

    @property
    def epoch_size(self) -> int:
        """How many rows an epoch holds."""
        return int(self._quotas.sum())

    def rows_of(self, epoch: int) -> Int[np.ndarray, " taken"]:
        """The rows of an epoch, ascending; the time is proportional to their number."""
        starts, ends = np.cumsum(self._sizes) - self._sizes, np.cumsum(self._quotas)
        first = epoch * self._quotas % np.maximum(self._sizes, 1)

        rows = np.empty(self.epoch_size, dtype=self._circles.dtype)
        for start in range(0, len(rows), _AT_ONCE):
            places = np.arange(start, min(start + _AT_ONCE, len(rows)))
            cluster = np.searchsorted(ends, places, side="right")
            turn = places - (ends - self._quotas)[cluster]
            rows[places] = self._circles[starts[cluster] + (first[cluster] + turn) % self._sizes[cluster]]
        rows.sort()
        return rows


def epoch_size(labels: Int[np.ndarray, " rows"], per_cluster: int) -> int:
    """How many rows an epoch holds where a cluster gives at most `per_cluster`."""
    return int(np.minimum(np.bincount(labels), per_cluster).sum())


@dataclasses.dataclass(frozen=True)
class Windows:
    """An order in which a disk is read in runs: shards in random order, rows shuffled within windows of this stream.

    A batch then holds rows of few shards, and is in the order in which these lie there.
    """

    edges: Int[np.ndarray, " edges"]
    """Where the rows of each shard begin, ascending; then the number of all rows."""
    rows: int
    """Of a window; the last one of an epoch may have fewer."""

    def shuffle(self, rows: Int[np.ndarray, " rows"], random: np.random.Generator) -> Int[np.ndarray, " rows"]:
        """Ascending rows in the order of an epoch."""
        bounds = np.searchsorted(rows, self.edges)
        shards = random.permutation(len(self.edges) - 1)
        order = np.concatenate([rows[bounds[shard] : bounds[shard + 1]] for shard in shards.tolist()])
        for start in range(0, len(order), self.rows):
            random.shuffle(order[start : start + self.rows])
        return order


def epoch_orders(
    num_rows: int,
    batch_size: int,
    *,
    seed: int,
    first_epoch: int = 0,
    rows_of: RowsOf | None = None,
    windows: Windows | None = None,
) -> Iterator[tuple[int, Int[np.ndarray, " rows"]]]:
    """Each epoch with the order of its rows: a seeded permutation, in which no batch holds a row twice.

    A batch across two epochs begins with the last rows of the first one. If the new permutation repeats one
    of these within that batch, it swaps places with a later row: two copies of one pair must not be
    negatives of each other.

    Args:
        num_rows: Of an epoch.
        batch_size: Rows of a batch.
        seed: Of the permutations.
        first_epoch: Where to start.
        rows_of: Which rows an epoch holds, where there are more; 0, 1, ... when absent.
        windows: How rows are shuffled; all of them together when absent.
    """
    # An exchange reaches at most two batches into an epoch, so from three on it never touches the epoch's last rows,
    # and the epoch before the first is enough to start from.
    start = max(first_epoch - 1, 0) if num_rows >= 3 * batch_size else 0
    last = np.empty(0, dtype=np.int64)
    for epoch in itertools.count(start):
        order = np.arange(num_rows, dtype=row_type(num_rows)) if rows_of is None else rows_of(epoch)
        random = np.random.default_rng((seed, epoch))
        if windows is None:
            random.shuffle(order)
        else:
            order = windows.shuffle(order, random)

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


def endless_order(
    num_rows: int, per_step: int, *, seed: int, first_step: int = 0
) -> Iterator[Int[np.ndarray, " step"]]:
    """The rows of each step from `first_step` on, without end, where equal rows in a step do no harm.

    One seeded permutation follows the other without a gap. A step may hold more rows than there are.

    Raises:
        ValueError: There are no rows.
    """
    if num_rows < 1 or per_step < 1:
        raise ValueError(f"num_rows, per_step: must be at least 1, got {num_rows}, {per_step}")
    epoch, at = divmod(first_step * per_step, num_rows)
    order = _shuffled(num_rows, seed, epoch)
    while True:
        rows = order[at : at + per_step]
        at += per_step
        while at >= num_rows:
            at, epoch = at - num_rows, epoch + 1
            order = _shuffled(num_rows, seed, epoch)
            rows = np.concatenate([rows, order[: per_step - len(rows)]])
        yield rows


def _shuffled(num_rows: int, seed: int, epoch: int) -> Int[np.ndarray, " rows"]:
    return np.random.default_rng((seed, epoch, _NOT_PAIRS)).permutation(num_rows)


def batch_places(
    num_rows: int,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    rows_of: RowsOf | None = None,
    windows: Windows | None = None,
) -> Iterator[list[Place]]:
    """The places of each batch from `first_step` on, without end; the arguments are those of `epoch_orders`.

    Epochs follow each other without a gap: the rows left at the end of one open the first batch of the next, so after
    `step` steps exactly `step * batch_size` pairs were seen and each epoch holds every one of its rows once.

    Raises:
        ValueError: A batch is empty or larger than an epoch.
    """
    if not 0 < batch_size <= num_rows:
        raise ValueError(f"batch_size: must be in [1, {num_rows}] (the rows), got {batch_size}")
    first_epoch, at = divmod(first_step * batch_size, num_rows)
    orders = epoch_orders(num_rows, batch_size, seed=seed, first_epoch=first_epoch, rows_of=rows_of, windows=windows)
    epoch, order = next(orders)
    while True:
        places = [Place(epoch, int(index)) for index in order[at : at + batch_size]]
        at += batch_size
        if at >= num_rows:
            at -= num_rows
            epoch, order = next(orders)
            places += [Place(epoch, int(index)) for index in order[:at]]
        if windows is not None:
            places.sort(key=lambda place: place.index)  # as they lie on the disk; a loss does not see the order
        yield places
