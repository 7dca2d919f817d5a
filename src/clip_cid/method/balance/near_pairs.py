"""All pairs of rows within a distance, as their exact minimum spanning forest; a task compares a tile of chunks.

The tasks read what `prepared_rows` makes. A task saves the forest of its tile, whole or not at all; many such
forests are merged by tasks once more, some at a time, until few are left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt64

from clip_cid.method.array_store import ArrayStore, MemoryStore
from clip_cid.method.balance.cpu_comparison import compare_on_cpu
from clip_cid.method.balance.device_comparison import compare_on_device
from clip_cid.method.balance.exact_links import ExactLinks
from clip_cid.method.balance.forest import Forest, Links, join_links, merged_links, whole_forest
from clip_cid.method.balance.known_pairs import KnownPairs, nothing_known
from clip_cid.method.balance.pair_plan import Layout
from clip_cid.method.balance.plan_choice import make_plan
from clip_cid.method.balance.prepared_rows import PreparedRows, Tile, prepare
from clip_cid.method.balance.union_find import UnionFind
from clip_cid.method.jobs import Context, NotPrepared, Progress, RunJob
from clip_cid.method.unit_rows import UnitRows

_MERGED_TOGETHER = 64  # forests


def near_forest(
    images: UnitRows,
    limit: float,
    *,
    layout: Layout | None = None,
    device: str = "cpu",
    known: KnownPairs | None = None,
    store: ArrayStore | None = None,
    run_job: RunJob | None = None,
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
        run_job: Does the tasks that are missing; in this process, one by one, when None.
        on_plan: Called with the layout before the work begins.
        on_progress: Called in this process with the work done since the last call, counted in rows; the sum
            is the number of rows.

    Returns:
        The forest, and the digest of each row.
    """
    known = nothing_known(len(images)) if known is None else known
    if known.hashes is not None and known.rows.all():
        return whole_forest(len(images), [known.links], limit), known.hashes

    context = Context(images, None, MemoryStore() if store is None else store, run_job)
    device = device if layout is None else layout.plan.device
    prepared = _left_prepared(context.store, limit, device, known)
    if prepared is None:
        layout = layout or make_plan(images, limit, device=device, new_rows=int((~known.rows).sum()))
        if on_plan is not None:
            on_plan(layout)
        prepared = prepare(context, limit, layout, known=known.rows)
        prepared.save(context.store)
        prepared = PreparedRows.load(context.store) or prepared  # from the disk, if it is there

    _compare(context, prepared, on_progress)
    names = _merge(context, len(images), [links_name(tile) for tile in prepared.tiles()])
    links = [Links.unpack(context.store.load(name)) for name in names]
    forest = whole_forest(len(images), [known.links, prepared.identical_links(), *links], limit)
    return forest, prepared.hashes


def save_links(store: ArrayStore, prepared: PreparedRows, images: UnitRows, tile: Tile) -> None:
    """A task: compare the chunks of a tile and save their links."""
    store.save(links_name(tile), near_links(prepared, images, tile).pack())


def near_links(prepared: PreparedRows, images: UnitRows, tile: Tile) -> Links:
    """The minimum spanning forest of the near pairs of a tile; the same whenever and wherever it is computed."""
    links = ExactLinks(images, prepared.limit)
    if prepared.device == "cpu":
        for pair in prepared.chunk_pairs(tile):
            compare_on_cpu(prepared, pair, images, links)
    else:
        compare_on_device(prepared, prepared.chunk_pairs(tile), links)
    return links.links()


@dataclass(frozen=True, eq=False)
class Comparison:
    """The tasks that compare: a `clip_cid.method.jobs.Job`."""

    tasks: Sequence[Tile]
    amounts: dict[Tile, float]
    """How much each tile is to compare."""
    rows: int
    seconds: float
    device: str
    title: str = "balance"

    def work(self, task: Tile) -> float:
        return self.amounts[task]

    def array(self, task: Tile) -> str:
        return links_name(task)

    def open(self, store: ArrayStore, images: UnitRows, texts: UnitRows | None) -> Callable[[Tile], None]:
        prepared = PreparedRows.load(store)
        if prepared is None:
            raise NotPrepared
        return lambda tile: save_links(store, prepared, images, tile)


@dataclass(frozen=True)
class Merger:
    """The tasks that merge forests, each some of them: a `clip_cid.method.jobs.Job`."""

    level: int
    names: tuple[str, ...]
    """Of the forests."""
    rows: int
    seconds: float = 0.0
    device: str = "cpu"
    title: str = "merge"

    @property
    def tasks(self) -> Sequence[int]:
        return range(-(-len(self.names) // _MERGED_TOGETHER))

    def work(self, task: int) -> float:
        return 1.0

    def array(self, task: int) -> str:
        return f"links-merged-{_MERGED_TOGETHER}-{self.level}-{task:05d}"

    def open(self, store: ArrayStore, images: UnitRows, texts: UnitRows | None) -> Callable[[int], None]:
        def merge(task: int) -> None:
            names = self.names[task * _MERGED_TOGETHER : (task + 1) * _MERGED_TOGETHER]
            parts = [Links.unpack(store.load(name)) for name in names]
            store.save(self.array(task), join_links(list(merged_links(parts, UnionFind(self.rows)))).pack())

        return merge


def _compare(context: Context, prepared: PreparedRows, on_progress: Callable[[int], Any] | None) -> None:
    """Do what is missing of the comparison."""
    tiles = prepared.tiles()  # none if every new row is identical to a known one
    missing = [tile for tile in tiles if not context.store.has(links_name(tile))]
    if not missing:
        return
    amounts = {tile: prepared.work(tile) for tile in tiles}
    job = Comparison(tiles, amounts, len(prepared.known), prepared.seconds, prepared.device)
    if context.run_job is not None:
        context.run_job(job, missing)
        return

    progress = Progress(job, missing)
    for tile in missing:
        save_links(context.store, prepared, context.images, tile)
        rows = progress.finish(tile)
        if on_progress is not None and rows:
            on_progress(rows)


def _merge(context: Context, rows: int, names: Sequence[str]) -> Sequence[str]:
    """Few forests that join what all of these join, by name."""
    level = 0
    while context.run_job is not None and len(names) > _MERGED_TOGETHER:
        job = Merger(level, tuple(names), rows)
        if missing := [task for task in job.tasks if not context.store.has(job.array(task))]:
            context.run_job(job, missing)
        names, level = [job.array(task) for task in job.tasks], level + 1
    return names


def _left_prepared(store: ArrayStore, limit: float, device: str, known: KnownPairs) -> PreparedRows | None:
    """The arrays that an interrupted call with the same limit, device and known rows left; others are deleted."""
    prepared = PreparedRows.load(store)
    if prepared is None:
        return None
    if (prepared.limit, prepared.device) == (limit, device) and np.array_equal(prepared.known, known.rows):
        return prepared
    store.clear()
    return None


def links_name(tile: Tile) -> str:
    return f"links-{tile.first:05d}-{tile.second:05d}"
