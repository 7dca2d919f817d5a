"""K-means by tasks: the bits of one process, for any ranges, in any order, and after any stop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixtures import mixture

from clip_cid.data.array_folder import ArrayFolder
from clip_cid.method.array_store import ArrayStore, MemoryStore
from clip_cid.method.cluster import kmeans_rounds, range_tasks, starting_centers
from clip_cid.method.cluster.cluster_quality import cluster_quality, quality_of_rows
from clip_cid.method.cluster.clustering import Clusters, KMeansState, cluster_rows, spherical_kmeans
from clip_cid.method.cluster.range_tasks import Shared
from clip_cid.method.jobs import Job
from clip_cid.method.packed_arrays import unpacked
from clip_cid.method.unit_rows import UnitRows

SETTINGS: dict[str, Any] = {"num_centers": 70, "iterations": 4, "seed": 1, "max_points_per_center": 9}


class Stop(Exception):
    """In the middle of the work."""


class Tasks:
    """Does the tasks in this process, in an order drawn at random, and stops after some."""

    def __init__(self, rows: np.ndarray, store: ArrayStore, *, stop_after: int = 10**9) -> None:
        self.rows = UnitRows(rows, name="embeddings", any_length=True)
        self.shared, self.left = Shared(store, self.run_job, "key"), stop_after
        self.done: list[str] = []

    def run_job(self, job: Job, missing: Sequence[int]) -> None:
        do = job.open(self.shared.store, self.rows, None)
        for task in np.random.default_rng(len(self.done)).permutation(list(missing)).tolist():
            if not self.left:
                raise Stop
            self.left -= 1
            do(task)
            self.done.append(job.array(task))

    def cluster(self, *, start: KMeansState | None = None, on_state: Callable[[Any], Any] | None = None) -> Clusters:
        return cluster_rows(
            self.rows,
            **SETTINGS,
            device="cpu",
            start=start,
            on_state=on_state,
            on_assigned=None,
            shared=self.shared,
        )


@pytest.fixture
def small(monkeypatch) -> None:
    """Ranges of some rows and centers; a start in groups."""
    monkeypatch.setattr(range_tasks, "_LEAST_ROWS", 50)
    monkeypatch.setattr(range_tasks, "_ROWS_PER_CENTER", 1)
    for module in (kmeans_rounds, range_tasks):
        monkeypatch.setattr(module, "CENTER_BLOCK", 16)
    monkeypatch.setattr(starting_centers, "_POINTS_PER_CENTER", 7)


def rows_of(kind: str) -> np.ndarray:
    rows = mixture(900, 12, clusters=60, noise=0.4)
    if kind == "float16":
        return rows.astype(np.float16)
    if kind == "repeated":  # so that centers are empty
        return np.repeat(rows[:75], 12, axis=0)[np.random.default_rng(0).permutation(900)]
    lengths = np.random.default_rng(0).uniform(0.2, 3, (900, 1)) if kind == "any length" else 1
    return (rows * lengths).astype(np.float32)


def assert_same(found: Clusters, expected: Clusters) -> None:
    assert found.centers.tobytes() == expected.centers.tobytes()
    assert found.labels.tobytes() == expected.labels.tobytes()
    assert (found.objective, found.history) == (expected.objective, expected.history)


@pytest.mark.parametrize("kind", ["float16", "float32", "any length", "repeated"])
@pytest.mark.parametrize("least", [23, 300, 5000])
def test_any_ranges_in_any_order_leave_the_bits_of_one_process(small, kind, least, monkeypatch):
    rows = rows_of(kind)
    expected = spherical_kmeans(rows, **SETTINGS)
    monkeypatch.setattr(range_tasks, "_LEAST_ROWS", least)
    work = Tasks(rows, MemoryStore())
    found = work.cluster()
    assert_same(found, expected)
    assert any(name.startswith("farthest") for name in work.done) == (kind == "repeated")

    alone, shared = (
        cluster_quality(rows, found.centers, found.labels),
        quality_of_rows(work.rows, found.centers, found.labels, work.shared),
    )
    assert (shared.within_cosine, shared.all_pairs_cosine) == (alone.within_cosine, alone.all_pairs_cosine)
    assert shared.margins.tobytes() == alone.margins.tobytes()


@pytest.mark.parametrize("kind", ["float16", "repeated"])
def test_stopped_after_any_task_it_goes_on_with_those_that_are_missing(small, kind):
    rows = rows_of(kind)
    expected, whole = spherical_kmeans(rows, **SETTINGS), Tasks(rows, MemoryStore())
    whole.cluster()
    for after in range(1, len(whole.done), 5):
        states: list[KMeansState] = []
        store = MemoryStore()
        first = Tasks(rows, store, stop_after=after)
        with pytest.raises(Stop):
            first.cluster(on_state=states.append)
        again = Tasks(rows, store)
        assert_same(again.cluster(start=states[-1] if states else None), expected)
        repeated = {name for name in set(first.done) & set(again.done) if not name.startswith("farthest")}
        assert not repeated, after  # what those who look for the farthest rows leave is dropped when it is read
        assert len(again.done) < len(whole.done)


def test_rounds_of_which_nothing_is_left_but_the_state_are_gone_on_with(small):
    """As those of a process that did everything itself, or of a version without tasks."""
    rows = rows_of("float16")
    states: list[KMeansState] = []
    expected = spherical_kmeans(rows, **SETTINGS, on_state=states.append)
    for start in states:
        assert_same(Tasks(rows, MemoryStore()).cluster(start=start), expected)


def test_damaged_files_of_tasks_are_made_again(small, tmp_path):
    rows = rows_of("float16")
    states: list[KMeansState] = []
    expected, store = spherical_kmeans(rows, **SETTINGS), ArrayFolder(tmp_path)
    stopped = Tasks(rows, store, stop_after=45)
    with pytest.raises(Stop):
        stopped.cluster(on_state=states.append)
    assert len(states) > 1
    for path in sorted(tmp_path.glob("*.npy"))[::3]:
        damage(path)
    assert_same(Tasks(rows, store).cluster(start=states[-1]), expected)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1  # of the last number, before the digest
    path.write_bytes(content)


def test_what_other_centers_have_left_under_the_same_name_is_not_taken(small):
    rows, store = rows_of("float16"), MemoryStore()
    with pytest.raises(Stop):
        Tasks(rows, store, stop_after=3).cluster(start=KMeansState(np.eye(12, dtype=np.float32)[np.arange(70) % 12]))
    expected = spherical_kmeans(rows, **SETTINGS)
    states: list[KMeansState] = []
    spherical_kmeans(rows, **SETTINGS, on_state=states.append)
    assert_same(Tasks(rows, store).cluster(start=states[0]), expected)


def test_the_disk_holds_two_rounds_and_no_copies_of_the_start(small, tmp_path):
    rows = rows_of("float16")
    Tasks(rows, ArrayFolder(tmp_path)).cluster()
    names = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in names if name.startswith(("copy", "start", "centers-by"))]
    assert {name.split("-")[2] for name in names if name.startswith("moves")} == {"0002", "0003"}


def test_a_range_leaves_sums_of_the_rows_that_moved_only(small):
    rows = rows_of("float16")
    work = Tasks(rows, MemoryStore())
    work.cluster()
    for task in range(2):
        labels, centers, counts, sums = unpacked(work.shared.store.load(f"moves-key-0003-{task:06d}"))
        before = unpacked(work.shared.store.load(f"moves-key-0002-{task:06d}"))[0]
        moved = labels != before
        assert centers.tolist() == sorted({*labels[moved].tolist(), *before[moved].tolist()})
        assert len(counts) == len(sums) == len(centers)
        assert counts.sum() == 0
    assert range_tasks.cut_rows(10, 3) == (10,)
    assert range_tasks.cut_rows(120, 3) == (50, 50, 20)
    assert range_tasks.cut_rows(120, 60) == (60, 60)
