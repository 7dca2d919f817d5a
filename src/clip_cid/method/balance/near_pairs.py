"""All pairs of rows within a distance, as their exact minimum spanning forest; a task compares two chunks.

The tasks read what `prepared_rows` makes. A task is a pure function of its two chunks and of the store. It
saves its links there, whole or not at all. So tasks may run in any order and in any process, and an
interrupted balance repeats no finished task.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt64

from clip_cid.method.balance.array_store import ArrayStore, MemoryStore
from clip_cid.method.balance.cpu_comparison import compare_on_cpu
from clip_cid.method.balance.device_comparison import compare_on_device
from clip_cid.method.balance.exact_links import ExactLinks
from clip_cid.method.balance.forest import Forest, Links, join_links, whole_forest
from clip_cid.method.balance.known_pairs import KnownPairs, nothing_known
from clip_cid.method.balance.pair_plan import Layout
from clip_cid.method.balance.plan_choice import make_plan
from clip_cid.method.balance.prepared_rows import ChunkPair, PreparedRows, prepare
from clip_cid.method.unit_rows import UnitRows

RunTasks = Callable[[PreparedRows, Sequence[ChunkPair]], None]
"""Calls `save_links` for each pair of chunks, anywhere and in any order."""


def near_forest(
    images: UnitRows,
    limit: float,
    *,
    layout: Layout | None = None,
    device: str = "cpu",
    known: KnownPairs | None = None,
    store: ArrayStore | None = None,
    run_tasks: RunTasks | None = None,
    on_plan: Callable[[Layout], Any] | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> tuple[Forest, UInt64[np.ndarray, "rows 2"]]:
    """The minimum spanning forest of all pairs at squared distance `limit` or less; `balance_forest` in docs/method.md.

    Neither `layout` nor any later argument changes the result.

    Args:
        images: The rows.
        limit: Squared Euclidean distance of unit vectors.
        layout: How near pairs are looked for; chosen from a sample when None.
        device: Where products are computed, for torch; `layout` names its own.
        known: Links and rows whose pairs need not be compared; none when None.
        store: Where arrays are kept; in memory when None. What an interrupted call has left there is used.
        run_tasks: Runs the tasks that are missing; in this process, one by one, when None.
        on_plan: Called with the layout before the work begins.
        on_progress: Called in this process with the work done since the last call, counted in rows; the sum
            is the number of rows.

    Returns:
        The forest, and the digest of each row.
    """
    known = nothing_known(len(images)) if known is None else known
    if known.hashes is not None and known.rows.all():
        return whole_forest(len(images), known.links, limit), known.hashes

    store = MemoryStore() if store is None else store
    device = device if layout is None else layout.plan.device
    prepared = _left_prepared(store, limit, device, known)
    if prepared is None:
        layout = layout or make_plan(images, limit, device=device, new_rows=int((~known.rows).sum()))
        if on_plan is not None:
            on_plan(layout)
        prepared = prepare(images, limit, layout, known=known.rows, store=store)
        prepared.save(store)

    # No pair of chunks is left if every new row is identical to a known one.
    pairs = prepared.chunk_pairs()
    missing = [pair for pair in pairs if not store.has(_links_name(pair))]
    if missing and run_tasks is not None:
        run_tasks(prepared, missing)
    elif missing:
        _run_here(prepared, missing, images, store, on_progress)

    links = (Links.unpack(store.load(_links_name(pair))) for pair in pairs)
    return whole_forest(
        len(images), join_links([known.links, prepared.identical_links(), *links]), limit
    ), prepared.hashes


def save_links(store: ArrayStore, prepared: PreparedRows, images: UnitRows, pair: ChunkPair) -> None:
    """A task: compare two chunks and save their links."""
    store.save(_links_name(pair), near_links(prepared, images, pair).pack())


def near_links(prepared: PreparedRows, images: UnitRows, pair: ChunkPair) -> Links:
    """The minimum spanning forest of the near pairs of two chunks; the same whenever and wherever it is computed."""
    links = ExactLinks(images, prepared.limit)
    if prepared.device == "cpu":
        compare_on_cpu(prepared, pair, images, links)
    else:
        compare_on_device(prepared, pair, links)
    return links.links()


class Progress:
    """Counts finished tasks as rows: all tasks together are all rows."""

    def __init__(self, prepared: PreparedRows, missing: Sequence[ChunkPair]) -> None:
        self._prepared, self._rows = prepared, len(prepared.known)
        self._total = sum(map(prepared.work, prepared.chunk_pairs()))
        self._done = self._total - sum(map(prepared.work, missing))

    @property
    def rows(self) -> int:
        """The rows' worth of work that is done."""
        return int(self._rows * self._done / self._total)

    def finish(self, pair: ChunkPair) -> int:
        """The rows' worth that this task adds."""
        before = self.rows
        self._done += self._prepared.work(pair)
        return self.rows - before


def _left_prepared(store: ArrayStore, limit: float, device: str, known: KnownPairs) -> PreparedRows | None:
    """The arrays that an interrupted call with the same limit, device and known rows left; others are deleted."""
    prepared = PreparedRows.load(store)
    if prepared is None:
        return None
    if (prepared.limit, prepared.device) == (limit, device) and np.array_equal(prepared.known, known.rows):
        return prepared
    store.clear()
    return None


def _run_here(
    prepared: PreparedRows,
    missing: Sequence[ChunkPair],
    images: UnitRows,
    store: ArrayStore,
    on_progress: Callable[[int], Any] | None,
) -> None:
    progress = Progress(prepared, missing)
    for pair in missing:
        save_links(store, prepared, images, pair)
        rows = progress.finish(pair)
        if on_progress is not None and rows:
            on_progress(rows)


def _links_name(pair: ChunkPair) -> str:
    return f"links-{pair.first:05d}-{pair.second:05d}"
