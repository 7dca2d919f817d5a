"""Computations over all rows as tasks: each leaves one array, so that processes and machines can share them.

A task is a pure function of its name, of arrays in the store, and of the rows. So tasks may be done in any order,
anywhere and twice, and an interrupted balance repeats no finished one.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from clip_cid.method.array_store import ArrayStore, MemoryStore
from clip_cid.method.unit_rows import UnitRows


class NotPrepared(Exception):
    """What the tasks of a job read is not there, or not whole."""


@runtime_checkable
class Job(Protocol):
    """Tasks of one kind. Other processes get a copy, so it holds little and opens the rest."""

    @property
    def title(self) -> str:
        """What is done, in a word."""
        ...

    @property
    def tasks(self) -> Sequence[Any]: ...

    @property
    def rows(self) -> int:
        """As how many rows all tasks together count."""
        ...

    @property
    def seconds(self) -> float:
        """How long one core (or the device) will take, as far as is known."""
        ...

    @property
    def device(self) -> str: ...

    def work(self, task: Any) -> float:
        """How much a task is, as against the others."""
        ...

    def array(self, task: Any) -> str:
        """The name of the array that a task leaves."""
        ...

    def open(self, store: ArrayStore, images: UnitRows, texts: UnitRows | None) -> Callable[[Any], None]:
        """Open what the tasks read; returns the function that does one and saves its array.

        Raises:
            NotPrepared: It is not there any more.
        """
        ...


RunJob = Callable[[Job, Sequence[Any]], None]
"""Does these tasks of a job, anywhere and in any order."""


@dataclass(frozen=True, eq=False)
class Context:
    """What is computed on, and who does it."""

    images: UnitRows
    texts: UnitRows | None = None
    store: ArrayStore = field(default_factory=MemoryStore)
    """Where arrays are kept."""
    run_job: RunJob | None = None
    """Does the tasks; in this process, one by one, when None."""


class Progress:
    """Counts finished tasks as rows: all tasks together are all rows."""

    def __init__(self, job: Job, missing: Sequence[Any]) -> None:
        self._job = job
        self._total = sum(map(job.work, job.tasks))
        self._done = self._total - sum(map(job.work, missing))

    @property
    def rows(self) -> int:
        """The rows' worth of work that is done."""
        return int(self._job.rows * self._done / self._total)

    def finish(self, task: Any) -> int:
        """The rows' worth that this task adds."""
        before = self.rows
        self._done += self._job.work(task)
        return self.rows - before


MakePart = Callable[[Mapping[str, np.ndarray], UnitRows, UnitRows | None, int], np.ndarray]
"""Makes the array of a part from arrays by name, the rows, and the number of the part; it must be picklable."""


class SizedTasks:
    """The part of a `Job` that follows from the size of each task."""

    sizes: tuple[int, ...]

    @property
    def tasks(self) -> Sequence[int]:
        return range(len(self.sizes))

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def work(self, task: int) -> float:
        return float(self.sizes[task])


@dataclass(frozen=True, eq=False)
class Parts(SizedTasks):
    """A computation in parts, each of which makes one array."""

    title: str
    make: MakePart
    names: tuple[str, ...]
    """Of the arrays that it reads."""
    key: str
    """A digest of all that decides the parts: what other arrays have made is not taken for theirs."""
    sizes: tuple[int, ...]
    """The rows of each part."""
    seconds: float
    device: str = "cpu"

    def array(self, task: int) -> str:
        return f"{self.title}-{self.key}-{task:06d}"

    def read(self, name: str) -> str:
        """The name under which an array that all parts read is stored."""
        return f"{self.title}-{self.key}-{name}"

    def open(self, store: ArrayStore, images: UnitRows, texts: UnitRows | None) -> Callable[[int], None]:
        arrays = {name: store.load(self.read(name)) for name in self.names}
        return lambda task: store.save(self.array(task), self.make(arrays, images, texts, task))


def in_parts(
    context: Context,
    title: str,
    make: MakePart,
    arrays: Mapping[str, np.ndarray],
    sizes: Sequence[int],
    *,
    decided_by: object = None,
    row_seconds: float = 0.0,
) -> Iterator[np.ndarray]:
    """The array of each part, in order; one part alone is made in this process, and nothing is stored.

    Args:
        context: Where.
        title: What is done, in a word.
        make: Makes the array of a part.
        arrays: What it reads beside the rows.
        sizes: The rows of each part.
        decided_by: What else `make` depends on, with a `repr` that says all.
        row_seconds: About how long a row takes.
    """
    if context.run_job is None or len(sizes) <= 1:
        for part in range(len(sizes)):
            yield make(arrays, context.images, context.texts, part)
        return

    store, key = context.store, digest_of(arrays, decided_by, tuple(sizes))
    job = Parts(title, make, tuple(arrays), key, tuple(sizes), row_seconds * sum(sizes))
    for name, values in arrays.items():
        if not store.has(job.read(name)):
            store.save(job.read(name), values)
    if missing := [task for task in job.tasks if not store.has(job.array(task))]:
        context.run_job(job, missing)
    for task in job.tasks:
        yield store.load(job.array(task))


def cut(sizes: Int[np.ndarray, " n"], most: int) -> Int[np.ndarray, " edges"]:
    """Where to cut things of these sizes into parts of about `most` in all, both ends included."""
    if not len(sizes):
        return np.zeros(1, dtype=np.int64)
    portion = np.cumsum(sizes) // most
    return np.concatenate([[0], np.flatnonzero(np.diff(portion)) + 1, [len(sizes)]])


def counted_from(starts: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " all"]:
    """start, start + 1, ... of each size, one after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def digest_of(arrays: Mapping[str, np.ndarray], *decided_by: object) -> str:
    """A digest of arrays by name and of what else decides a job, with a `repr` that says all."""
    sha256 = hashlib.sha256(repr(decided_by).encode())
    for name, values in arrays.items():
        sha256.update(repr((name, values.dtype.str, values.shape)).encode())
        sha256.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()[:16]
