"""K-means as tasks, so that processes and machines share a round: ranges of rows are assigned, ranges of centers added.

A task leaves one array, packed. The sums in it are whole numbers of the rows that moved, so they add up to the same
bits however the rows are cut, in whatever order tasks are done.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32

from clip_cid.method.array_store import ArrayStore
from clip_cid.method.cluster.kmeans_rounds import (
    CENTER_BLOCK,
    WHOLE,
    DirectionSums,
    add_rows,
    assign_and_add,
    lowest,
    own_cosines,
)
from clip_cid.method.cluster.nearest_centers import CenterSearch
from clip_cid.method.jobs import RunJob, SizedTasks, digest_of
from clip_cid.method.packed_arrays import packed, unpacked
from clip_cid.method.unit_rows import UnitRows

LAST_ASSIGNMENT = "assign"
"""The title of the tasks that assign all rows at the end."""
_LEAST_ROWS = 1 << 15  # of a range: a task is worth its handing out
_ROWS_PER_CENTER = 2  # of a range at least: else the sums that it leaves would be larger than all of its rows
_MOST_RANGES = 4096  # where no sums are left

MakeArrays = Callable[[int], Sequence[np.ndarray]]


@dataclass(frozen=True, eq=False)
class RangeJob(SizedTasks):
    """Tasks of one kind, each over a range: a `clip_cid.method.jobs.Job`."""

    title: str
    name: str
    """Of what they leave, before the number of the task."""
    sizes: tuple[int, ...]
    """How much each task is."""
    begin: Callable[[ArrayStore, UnitRows], MakeArrays]
    """Opens what the tasks read; returns the function that makes the arrays of one."""
    device: str = "cpu"
    seconds: float = 0.0

    def array(self, task: int) -> str:
        return f"{self.name}-{task:06d}"

    @property
    def arrays(self) -> list[str]:
        return [self.array(task) for task in self.tasks]

    def open(self, store: ArrayStore, images: UnitRows, texts: UnitRows | None) -> Callable[[int], None]:
        make = self.begin(store, images)
        return lambda task: store.save(self.array(task), packed(make(task)))


@dataclass(frozen=True, eq=False)
class Shared:
    """Who does the tasks of a k-means, and where their arrays are."""

    store: ArrayStore
    run_job: RunJob
    key: str
    """A digest of all that decides the k-means: what other settings or rows have left is not taken for its own."""
    scratch: list[str] = field(default_factory=list[str])
    """Names of arrays that nobody reads once there are first centers."""

    def run(self, job: RangeJob) -> RangeJob:
        """Do what is missing of a job."""
        if missing := [task for task in job.tasks if not self.store.has(job.array(task))]:
            self.run_job(job, missing)
        return job

    def keep(self, what: str, values: np.ndarray) -> str:
        """Store an array for tasks, unless it is there; returns its name, which says its contents."""
        name = f"{what}-{self.key}-{digest_of({what: values})}"
        if not self.store.has(name):
            self.store.save(name, values)
        return name


class Ranges(NamedTuple):
    """Rows that tasks share, and where they are cut."""

    sizes: tuple[int, ...]
    numbers: str | None
    """The name of an array with their numbers; None for all rows."""
    fit_float32: bool
    """As of these rows together, so that the bits of a row do not depend on the cuts."""

    def open(self, store: ArrayStore, images: UnitRows) -> Callable[[int], UnitRows]:
        """What gives the rows of a task."""
        numbers = None if self.numbers is None else store.load(self.numbers)

        def of_task(task: int) -> UnitRows:
            start = self.start(task)
            stop = start + self.sizes[task]
            rows = np.arange(start, stop) if numbers is None else numbers[start:stop]
            return images.part(rows, fit_float32=self.fit_float32)

        return of_task

    def start(self, task: int) -> int:
        """The place of the first row of a task among all."""
        return sum(self.sizes[:task])


def ranges_of(shared: Shared, sample: UnitRows, numbers: Int[np.ndarray, " rows"] | None, num_centers: int) -> Ranges:
    """The ranges of a training sample, whose tasks leave sums."""
    named = None if numbers is None else shared.keep("sample", numbers)
    return Ranges(cut_rows(len(sample), num_centers), named, sample.fit_float32)


def cut_rows(rows: int, centers: int) -> tuple[int, ...]:
    """The sizes of ranges whose tasks leave sums of the centers."""
    return _cut(rows, max(_LEAST_ROWS, _ROWS_PER_CENTER * centers))


def cut_all_rows(rows: int) -> tuple[int, ...]:
    """The sizes of ranges whose tasks leave some bytes a row."""
    return _cut(rows, max(_LEAST_ROWS, rows // _MOST_RANGES))


def _cut(rows: int, most: int) -> tuple[int, ...]:
    edges = [*range(0, rows, most), rows]
    return tuple(stop - start for start, stop in itertools.pairwise(edges))


class SumsOfTasks:
    """What the tasks of a round have added up, as `DirectionSums` has it; mapped."""

    def __init__(self, store: ArrayStore, names: list[str]) -> None:
        self._store, self._names = store, names
        self.sizes: Int[np.ndarray, " centers"] = np.concatenate([unpacked(store.view(name))[0] for name in names])

    def __getitem__(self, clusters: slice) -> Float64[np.ndarray, "n dim"]:
        name = self._names[int(clusters.start) // CENTER_BLOCK]
        return unpacked(self._store.view(name))[1] / WHOLE

    def blocks(self) -> Iterator[slice]:
        """Slices that cover all clusters in order."""
        for start in range(0, len(self.sizes), CENTER_BLOCK):
            yield slice(start, min(start + CENTER_BLOCK, len(self.sizes)))


class _Round(NamedTuple):
    """The names of what a round leaves."""

    key: str
    number: int
    whole: bool
    """Whether its sums begin at zero, as in the first round of a command whose earlier rounds left nothing."""

    @property
    def centers(self) -> str:
        """With which it begins."""
        return f"centers-{self.key}-{self.number:04d}"

    @property
    def moves(self) -> str:
        return f"moves-{self.key}-{self.number:04d}{'-whole' if self.whole else ''}"

    @property
    def sums(self) -> str:
        """After it: the same of all rows, whatever it began with."""
        return f"sums-{self.key}-{self.number:04d}"

    @property
    def farthest(self) -> str:
        return f"farthest-{self.key}-{self.number:04d}"


class RoundsByTasks:
    """The rows of a k-means, assigned and added by tasks: a `clip_cid.method.cluster.kmeans_rounds.RoundWork`.

    What a round leaves stays until the round after the next one, so that one that was stopped goes on with its
    finished tasks, and with the sums of the one before.
    """

    def __init__(self, shared: Shared, ranges: Ranges, dim: int, *, done: int, device: str) -> None:
        self._shared, self._ranges, self._dim, self._device = shared, ranges, dim, device
        self._number = done
        self._last: _Round | None = None

    def assign(self, centers: Float32[np.ndarray, "centers dim"]) -> SumsOfTasks:
        store, number = self._shared.store, self._number
        before = self._last or self._left_by(number - 1, len(centers))
        now = _Round(self._shared.key, number, whole=before is None)
        self._drop(number - 2, len(centers))

        # Rows to centers, by ranges of rows.
        if not (store.has(now.centers) and np.array_equal(store.view(now.centers), centers)):
            self._drop(number, len(centers))  # what others have found of other centers
            store.save(now.centers, centers)
        begin = functools.partial(
            _begin_moves,
            ranges=self._ranges,
            centers=now.centers,
            before=None if before is None else before.moves,
            device=self._device,
        )
        moves = self._shared.run(RangeJob("round", now.moves, self._ranges.sizes, begin, self._device))

        # Sums, by ranges of centers.
        sums = _added(
            self._shared, now.sums, moves, len(centers), self._dim, before=None if before is None else before.sums
        )
        self._last, self._number = now, number + 1
        return SumsOfTasks(store, sums.arrays)

    def farthest(self, centers: Float32[np.ndarray, "centers dim"], count: int) -> Int[np.ndarray, " farthest"]:
        assert self._last is not None, "assign comes first"
        last = self._last
        begin = functools.partial(
            _begin_farthest, ranges=self._ranges, centers=last.centers, moves=last.moves, count=count
        )
        job = self._shared.run(RangeJob("round", last.farthest, self._ranges.sizes, begin))
        found = [unpacked(self._shared.store.load(name)) for name in job.arrays]
        rows, cosines = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self._shared.store.drop(job.arrays)
        return rows[np.argsort(cosines, kind="stable")][:count]

    def _left_by(self, number: int, centers: int) -> _Round | None:
        """What an earlier command has left of a round, if all of it is there."""
        for whole in (False, True):
            found = _Round(self._shared.key, number, whole)
            if number >= 0 and all(map(self._shared.store.has, self._names(found, centers))):
                return found
        return None

    def _drop(self, number: int, centers: int) -> None:
        for whole in (False, True):
            old = _Round(self._shared.key, number, whole)
            self._shared.store.drop([*self._names(old, centers), old.centers])

    def _names(self, of: _Round, centers: int) -> list[str]:
        moves = [f"{of.moves}-{task:06d}" for task in range(len(self._ranges.sizes))]
        return [*moves, *(f"{of.sums}-{task:06d}" for task in range(-(-centers // CENTER_BLOCK)))]


def assign_by_tasks(
    shared: Shared, images: UnitRows, centers: Float32[np.ndarray, "centers dim"], device: str
) -> tuple[Int32[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """The nearest center of each row and the cosine to it, as `CenterSearch.assign`."""
    ranges = Ranges(cut_all_rows(len(images)), None, images.fit_float32)
    last = shared.keep("centers", centers)
    begin = functools.partial(_begin_assigned, ranges=ranges, centers=last, device=device)
    job = shared.run(RangeJob(LAST_ASSIGNMENT, f"labels-by-{last}", ranges.sizes, begin, device))

    labels = np.empty(len(images), dtype=np.int32)
    cosines = np.empty(len(images), dtype=np.float64)
    for task in job.tasks:
        rows = slice(ranges.start(task), ranges.start(task) + ranges.sizes[task])
        labels[rows], cosines[rows] = unpacked(shared.store.load(job.array(task)))
    return labels, cosines


def add_by_tasks(shared: Shared, images: UnitRows, labels: Int[np.ndarray, " rows"], num_centers: int) -> SumsOfTasks:
    """The sums of all rows by their labels."""
    ranges = Ranges(cut_rows(len(images), num_centers), None, images.fit_float32)
    kept = shared.keep("labels", labels)
    begin = functools.partial(_begin_totals, ranges=ranges, labels=kept, num_centers=num_centers)
    totals = shared.run(RangeJob("totals", f"totals-by-{kept}", ranges.sizes, begin))
    sums = _added(shared, f"sums-by-{kept}", totals, num_centers, images.dim, before=None)
    return SumsOfTasks(shared.store, sums.arrays)


def _added(shared: Shared, name: str, moves: RangeJob, num_centers: int, dim: int, *, before: str | None) -> RangeJob:
    sizes = tuple(min(CENTER_BLOCK, num_centers - start) for start in range(0, num_centers, CENTER_BLOCK))
    begin = functools.partial(_begin_adding, sizes=sizes, dim=dim, moves=moves.arrays, before=before)
    return shared.run(RangeJob("add", name, sizes, begin))


# What the processes do; each function opens what the tasks of a job read.


def _begin_moves(
    store: ArrayStore, images: UnitRows, *, ranges: Ranges, centers: str, before: str | None, device: str
) -> MakeArrays:
    """Labels, and the sums of the rows that moved since a round, by centers that have won or lost some."""
    rows_of, search, num_centers = ranges.open(store, images), _search(store, centers, device), len(store.view(centers))

    def make(task: int) -> list[np.ndarray]:
        rows, sums = rows_of(task), DirectionSums(num_centers, images.dim)
        labels = np.full(len(rows), -1, dtype=np.int32)
        if before is not None:
            labels[:] = unpacked(store.load(f"{before}-{task:06d}"))[0]
        assign_and_add(rows, search, labels, sums)
        return [labels, *sums.changes()]

    return make


def _begin_totals(store: ArrayStore, images: UnitRows, *, ranges: Ranges, labels: str, num_centers: int) -> MakeArrays:
    """As above, of rows whose labels are known, and which come from nowhere."""
    rows_of, all_labels = ranges.open(store, images), store.load(labels)

    def make(task: int) -> list[np.ndarray]:
        rows, sums, start = rows_of(task), DirectionSums(num_centers, images.dim), ranges.start(task)
        add_rows(rows, all_labels[start : start + len(rows)], sums)
        return [np.empty(0, dtype=np.int32), *sums.changes()]

    return make


def _begin_adding(
    store: ArrayStore, images: UnitRows, *, sizes: tuple[int, ...], dim: int, moves: Sequence[str], before: str | None
) -> MakeArrays:
    """How many rows each center of a range has, and their sum."""

    def make(task: int) -> list[np.ndarray]:
        start = task * CENTER_BLOCK
        counts, sums = np.zeros(sizes[task], dtype=np.int64), np.zeros((sizes[task], dim), dtype=np.int64)
        if before is not None:
            counts, sums = (np.array(values) for values in unpacked(store.load(f"{before}-{task:06d}")))
        for name in moves:
            _, centers, more, moved = unpacked(store.view(name))
            first, stop = np.searchsorted(centers, [start, start + sizes[task]])
            here = centers[first:stop] - start
            counts[here] += more[first:stop]
            sums[here] += moved[first:stop]
        return [counts, sums]

    return make


def _begin_farthest(
    store: ArrayStore, images: UnitRows, *, ranges: Ranges, centers: str, moves: str, count: int
) -> MakeArrays:
    """The rows farthest from their centers, by their place among all, and the cosines."""
    rows_of = ranges.open(store, images)
    unit_centers = UnitRows(store.load(centers), name="centers", any_length=True)

    def make(task: int) -> list[np.ndarray]:
        cosines = own_cosines(rows_of(task), unit_centers, unpacked(store.load(f"{moves}-{task:06d}"))[0])
        rows = lowest(cosines, count)
        return [ranges.start(task) + rows, cosines[rows]]

    return make


def _begin_assigned(store: ArrayStore, images: UnitRows, *, ranges: Ranges, centers: str, device: str) -> MakeArrays:
    rows_of, search = ranges.open(store, images), _search(store, centers, device)
    return lambda task: search.assign(rows_of(task))


def _search(store: ArrayStore, centers: str, device: str) -> CenterSearch:
    return CenterSearch(UnitRows(store.load(centers), name="centers", any_length=True), device=device)
