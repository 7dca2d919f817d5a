import dataclasses
import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hard_rows import KINDS, links_of, slow_forest, spanning_forest, squared_matrix, unit

from clip_cid.data.array_folder import ArrayFolder
from clip_cid.devices import one_ahead
from clip_cid.method.balance import (
    cpu_comparison,
    dense_crowds,
    device_comparison,
    exact_links,
    near_pairs,
    prepared_rows,
    row_scan,
)
from clip_cid.method.balance.forest import Forest, Links, join_links
from clip_cid.method.balance.known_pairs import KnownPairs
from clip_cid.method.balance.near_pairs import near_forest, near_links, save_links
from clip_cid.method.balance.pair_plan import Plan, lay_out
from clip_cid.method.balance.prepared_rows import PreparedRows, Tile, prepare
from clip_cid.method.jobs import Context
from clip_cid.method.unit_rows import UnitRows

PLANS = [
    Plan("float32"),
    Plan("float32", chunk_rows=7),
    Plan("float32", 16, chunk_rows=25),
    Plan("float32", 32, cells=9),
    Plan("float32", cells=70, chunk_rows=25),  # more cells than rows
    Plan("int8"),
    Plan("int8", 8, chunk_rows=25),
    Plan("int8", 32, cells=9, chunk_rows=16),
    Plan("int8", 2, cells=70),
    Plan("float16"),
    Plan("float16", 16, cells=1, chunk_rows=25),
    Plan("float16", 1, cells=30),
    Plan("float32", chunk_rows=7, tile_chunks=3),
    Plan("int8", 32, cells=9, chunk_rows=16, tile_chunks=2),
]
LIMITS = {"euclidean 0.07": 0.07**2, "squared 0.07": 0.07, "cosine 0.07": 0.14, "cosine 0.24": 0.48}


def images_of(rows: np.ndarray) -> UnitRows:
    return UnitRows(rows, name="rows", any_length=True)


def forest_by(rows: np.ndarray, limit: float, plan: Plan | None = None) -> Forest:
    images = images_of(rows)
    return near_forest(images, limit, layout=lay_out(images, plan or Plan()))[0]


def prepared_by(images: UnitRows, limit: float, plan: Plan, *, known: np.ndarray | None = None) -> PreparedRows:
    return prepare(Context(images), limit, lay_out(images, plan), known=known)


def links_by_task(prepared: PreparedRows, images: UnitRows) -> list[Links]:
    return [near_links(prepared, images, tile) for tile in prepared.tiles()]


def in_bytes(forest: Forest | Links) -> tuple[bytes, bytes, bytes]:
    return forest.left.tobytes(), forest.right.tobytes(), forest.squared.tobytes()


def crowd(crowded: int, rows: int, dim: int) -> np.ndarray:
    """Near-identical rows among others, in any order."""
    rng = np.random.default_rng(3)
    found = rng.standard_normal((rows, dim))
    found[:crowded] = found[0] + 1e-2 * rng.standard_normal((crowded, dim))
    return unit(found)[rng.permutation(rows)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_every_plan_finds_the_forest_of_all_pairs_bit_for_bit(kind, limit):
    rows = KINDS[kind](60, 48)
    expected = slow_forest(squared_matrix(rows), limit)
    assert 5 < len(expected) < 60
    for plan in PLANS:
        assert links_of(forest_by(rows, limit, plan)) == expected, plan


def test_the_forest_says_what_it_is_of():
    found = forest_by(KINDS["flat"](120, 48), 0.14)
    assert (found.rows, found.limit) == (120, 0.14)
    assert (found.left.dtype, found.right.dtype, found.squared.dtype) == (np.int64, np.int64, np.float64)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("rows", [np.ones((1, 3)), np.ones((2, 3)), np.ones((9, 3)), np.eye(3)[:2]])
def test_a_handful_of_rows_is_no_special_case(plan, rows):
    assert links_of(forest_by(rows, 0.14, plan)) == slow_forest(squared_matrix(rows), 0.14)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_tasks_cover_every_pair_once(plan):
    images = images_of(KINDS["identical"](60, 48))
    prepared = prepared_by(images, 0.14, plan)
    starts, covered = prepared.chunk_starts, np.zeros((60, 60), dtype=int)
    for a, b in itertools.chain.from_iterable(map(prepared.chunk_pairs, prepared.tiles())):
        one, other = np.meshgrid(*(np.arange(starts[chunk], starts[chunk + 1]) for chunk in (a, b)), indexing="ij")
        covered[one[one < other], other[one < other]] += 1
    positions = len(prepared.row_at)
    assert positions + len(prepared.repeats) == 60
    assert (covered[:positions, :positions] == np.triu(np.ones((positions, positions)), 1)).all()
    assert np.diff(starts).max() <= plan.chunk_rows
    assert sum(map(prepared.work, prepared.tiles())) == positions**2 / 2


@pytest.mark.parametrize("plan", [Plan(chunk_rows=20), Plan("int8", 16, cells=9), Plan("int8", 8, cells=70)], ids=str)
@pytest.mark.parametrize("window_bytes", [1, 300, 10**6])
def test_codes_and_windows_on_the_disk_and_in_parts_are_those_in_memory(tmp_path, monkeypatch, plan, window_bytes):
    monkeypatch.setattr(prepared_rows, "_TURNED", 8)
    images = images_of(KINDS["identical"](120, 48))
    known = np.arange(120) % 5 == 0
    monkeypatch.setattr(ArrayFolder, "window_bytes", window_bytes)
    one = prepared_by(images, 0.14, plan, known=known)
    context = Context(images, store=ArrayFolder(tmp_path / "work"))
    other = prepare(context, 0.14, lay_out(images, plan), known=known)
    for field in dataclasses.fields(PreparedRows):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), strict=True)
    assert isinstance(other.codes, np.memmap)
    assert isinstance(other.visits, np.memmap)


@pytest.mark.parametrize("plan", [Plan(chunk_rows=20), Plan("int8", 16, cells=9, chunk_rows=20)], ids=str)
def test_a_task_gives_the_same_whenever_it_is_done_and_their_order_does_not_matter(plan):
    images = images_of(KINDS["power law"](120, 48))
    prepared = prepared_by(images, 0.14, plan)
    tasks = prepared.tiles()
    assert len(tasks) == 21
    one = {task: near_links(prepared, images, task) for task in tasks}
    other = {task: near_links(prepared, images, task) for task in reversed(tasks)}
    assert all(in_bytes(one[task]) == in_bytes(other[task]) for task in tasks)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(tasks))
        parts = [*(one[tasks[at]] for at in order), prepared.identical_links()]
        found = spanning_forest(120, *join_links(parts), 0.14)
        assert in_bytes(found) == in_bytes(forest_by(KINDS["power law"](120, 48), 0.14))


@pytest.mark.parametrize("plan", [Plan(chunk_rows=9), Plan("int8", 16, cells=9, chunk_rows=9, tile_chunks=3)], ids=str)
@pytest.mark.parametrize("kind", ["power law", "identical"])
def test_every_step_in_tasks_gives_what_one_process_gives(plan, kind, tmp_path, monkeypatch):
    """Each task anew from files alone, the last one first, and the first one twice."""
    rows, limit = KINDS[kind](120, 48), 0.48
    expected = in_bytes(forest_by(rows, limit))
    images, store, titles = images_of(rows), ArrayFolder(tmp_path / "work"), []

    def run_job(job, missing):
        titles.append(job.title)
        for task in [*reversed(missing), missing[0]]:
            copy = pickle.loads(pickle.dumps(job))
            copy.open(ArrayFolder(store.path), images_of(rows), None)(task)

    monkeypatch.setattr(row_scan, "_PART_BYTES", 3000)
    monkeypatch.setattr(near_pairs, "_MERGED_TOGETHER", 4)
    monkeypatch.setattr(UnitRows, "gathered_rows", 10)
    found, _ = near_forest(images, limit, layout=lay_out(images, plan), store=store, run_job=run_job)
    assert in_bytes(found) == expected
    assert {"scan", "balance", "identical" if kind == "identical" else "merge"} <= set(titles)


SPLITS = {
    "the last ones": np.arange(120) >= 100,
    "the first ones": np.arange(120) < 30,
    "every third": np.arange(120) % 3 == 0,
    "one": np.arange(120) == 77,
    "all": np.ones(120, dtype=bool),
    "none": np.zeros(120, dtype=bool),
}


@pytest.mark.parametrize("kind", ["power law", "identical"])
@pytest.mark.parametrize("plan", [Plan(chunk_rows=25), Plan("int8", 16, cells=9, chunk_rows=25), Plan()], ids=str)
@pytest.mark.parametrize("new", SPLITS.values(), ids=SPLITS)
def test_the_old_forest_and_the_pairs_of_new_rows_are_the_forest_of_all(kind, plan, new):
    rows, limit = KINDS[kind](120, 48), 0.48
    images, old = images_of(rows), np.flatnonzero(~new)
    parts = []
    if len(old):
        before = forest_by(rows[old], limit)
        parts.append(Links(old[before.left], old[before.right], before.squared))
    prepared = prepared_by(images, limit, plan, known=~new)
    found = links_by_task(prepared, images)
    for links in found:
        assert (new[links.left] | new[links.right]).all()  # pairs of two old rows are known, and left out
    together = spanning_forest(120, *join_links([*parts, prepared.identical_links(), *found]), limit)
    assert links_of(together) == slow_forest(squared_matrix(rows), limit)


def test_pairs_of_old_rows_are_not_even_looked_at():
    images = images_of(KINDS["flat"](120, 48))
    new = np.arange(120) >= 110
    prepared = prepared_by(images, 0.48, Plan(chunk_rows=20), known=~new)
    assert sum(map(prepared.work, prepared.tiles())) == 10 * 110 + 10**2 / 2
    assert not prepared_by(images, 0.48, Plan(), known=np.ones(120, dtype=bool)).tiles()


def test_a_crowd_of_old_and_new_rows_is_exact_as_well():
    rows, limit = crowd(400, 500, 32), 0.14
    images, new = images_of(rows), np.arange(500) % 5 == 0
    old = np.flatnonzero(~new)
    before = forest_by(rows[old], limit)
    parts = [Links(old[before.left], old[before.right], before.squared)]
    found = links_by_task(prepared_by(images, limit, Plan(chunk_rows=150), known=~new), images)
    together = spanning_forest(500, *join_links([*parts, *found]), limit)
    assert links_of(together) == slow_forest(squared_matrix(rows), limit)


def with_many_repeats() -> np.ndarray:
    rows = KINDS["flat"](40, 12)[np.random.default_rng(0).integers(0, 40, 150)]
    return rows.astype(np.float32)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_identical_rows_are_linked_without_a_comparison(plan):
    rows = with_many_repeats()
    images = images_of(rows)
    prepared = prepared_by(images, 0.14, plan)
    assert len(prepared.row_at) == len({row.tobytes() for row in rows})
    assert links_of(forest_by(rows, 0.14, plan)) == slow_forest(squared_matrix(rows), 0.14)


@pytest.mark.parametrize("value", [0, 1])
def test_rows_of_one_digest_are_told_apart_by_their_bytes(monkeypatch, value):
    rows = with_many_repeats()
    expected = in_bytes(forest_by(rows, 0.14))
    monkeypatch.setattr(row_scan, "row_hashes", lambda rows: np.full((len(rows), 2), value, dtype=np.uint64))
    assert in_bytes(forest_by(rows, 0.14)) == expected


@pytest.mark.parametrize("plan", [Plan(), Plan("int8", 4, cells=3, chunk_rows=4)], ids=str)
def test_rows_that_are_equal_but_for_the_sign_of_a_zero_are_at_distance_zero(plan):
    rows = np.array([[0.0, 1.0], [-0.0, 1.0], [-0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, -0.0]])
    found = forest_by(rows, 0.14, plan)
    assert found.sets(0.0).tolist() == [0, 0, 0, 0, 1, 1]
    assert links_of(found) == [(0.0, 0, 1), (0.0, 0, 2), (0.0, 0, 3), (0.0, 4, 5)]


@pytest.mark.parametrize("factor", [2.0, 0.5, 4.0])
def test_rows_of_one_direction_and_two_lengths_are_at_distance_zero(factor):
    rows = np.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [5.0, 0.0]])
    rows[[1, 2]] *= factor
    assert links_of(forest_by(rows, 0.14)) == [(0.0, 0, 1), (0.0, 0, 2), (0.0, 0, 3)]


def counted_distances(monkeypatch) -> list[int]:
    """Of how many pairs the exact distances were computed, in crowds and elsewhere."""
    counts: list[int] = []
    distances, within_crowds = exact_links._distances, dense_crowds.squared_distances

    def counted(units, i, j):
        counts.append(len(i))
        return distances(units, i, j)

    def counted_within(one, other):
        counts.append(len(one))
        return within_crowds(one, other)

    monkeypatch.setattr(exact_links, "_distances", counted)
    monkeypatch.setattr(dense_crowds, "squared_distances", counted_within)
    return counts


@pytest.mark.slow
def test_a_crowd_is_exact_and_most_of_its_pairs_are_never_computed_exactly(monkeypatch):
    rows = crowd(1500, 2000, 64)
    expected = slow_forest(squared_matrix(rows), 0.14)
    assert len(expected) == 1499
    for plan in (Plan(), Plan("int8", 16, chunk_rows=700)):
        counts = counted_distances(monkeypatch)
        assert links_of(forest_by(rows, 0.14, plan)) == expected
        assert 1499 <= sum(counts) < 0.1 * 1500 * 1499 / 2
        monkeypatch.undo()


def test_a_crowd_that_lies_in_many_cells_is_exact():
    rows = crowd(500, 700, 64)
    found = forest_by(rows, 0.14, Plan("int8", 16, cells=20, chunk_rows=300))
    assert links_of(found) == slow_forest(squared_matrix(rows), 0.14)


@pytest.mark.parametrize("rows", [12, 40])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_of_rows_at_equal_distances_each_is_linked_to_the_first(rows, plan):
    found = forest_by(np.eye(rows), 2.0, plan)
    assert links_of(found) == [(2.0, 0, i) for i in range(1, rows)]
    assert not len(forest_by(np.eye(rows), np.nextafter(2.0, 0), plan).squared)


def test_a_crowd_at_equal_distances_is_linked_to_its_first():
    assert links_of(forest_by(np.eye(300), 2.0)) == [(2.0, 0, i) for i in range(1, 300)]


@pytest.mark.parametrize("plan", [Plan(), Plan("float32", 2, cells=64, chunk_rows=1000)], ids=str)
def test_a_chain_of_three_thousand_steps_is_one_set(plan):
    angles = np.cumsum(np.random.default_rng(0).uniform(1.0, 2.0, 3001)) * 1e-3  # of at most 2e-3, along 4.5
    order = np.random.default_rng(1).permutation(3001)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)[order]
    found = forest_by(rows, (2e-3) ** 2, plan)
    place = np.argsort(order)
    expected = {(min(a, b), max(a, b)) for a, b in zip(place[:-1].tolist(), place[1:].tolist(), strict=True)}
    assert set(zip(found.left.tolist(), found.right.tolist(), strict=True)) == expected
    assert found.sets(found.limit).max() == 0
    # A step is 2 sin(angle / 2); without the longest of them there are two sets.
    assert found.squared[-1] == pytest.approx(4 * np.sin(np.diff(angles).max() / 2) ** 2, rel=1e-9)
    assert found.sets(found.squared[-2]).max() == 1


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("data", KINDS)
@pytest.mark.parametrize("limit", [0.005, 0.14])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_way_of_devices_finds_what_the_processor_finds(monkeypatch, kind, data, limit, ahead):
    """`cpu:0` is a device like any other: chunks are put on it, and pairs come back to a thread that measures."""
    monkeypatch.setattr(device_comparison, "_SIDE", 30)
    if ahead:
        on_a_device = torch.device("meta")
        monkeypatch.setattr(device_comparison, "one_ahead", lambda do, begin, _: one_ahead(do, begin, on_a_device))
    rows = KINDS[data](200, 48)
    expected = in_bytes(forest_by(rows, limit, Plan("float32", chunk_rows=70)))
    assert in_bytes(forest_by(rows, limit, Plan(kind, chunk_rows=70, device="cpu:0"))) == expected


def test_an_error_in_the_measuring_thread_comes_back(monkeypatch):
    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(exact_links, "_distances", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        forest_by(KINDS["power law"](200, 48), 0.14, Plan("float32", chunk_rows=70, device="cpu:0"))


def test_the_way_of_devices_by_hand():
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    i, j, products = device_comparison.above_on_device(one @ other.T, 0.79)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0), (2, 0), (2, 2)]
    assert products == pytest.approx([1, 0.8, 1, 0.8, 0.96])
    assert products.dtype == np.float64
    assert [len(each) for each in device_comparison.above_on_device(one @ other.T, 1.1)] == [0, 0, 0]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_places_above_a_floor_are_all_found(rows, share):
    products = np.random.default_rng(rows).random((rows, 33)).astype(np.float32)
    floor = 1.0 - share if share else 2.0
    found = cpu_comparison._places_above(products, floor)
    assert sorted(found.tolist()) == [at for at, value in enumerate(products.ravel().tolist()) if value >= floor]


def peak_of(rows: np.ndarray) -> tuple[int, tuple[bytes, bytes, bytes]]:
    """Bytes of the largest moment, and the links."""
    images = images_of(rows)
    prepared = prepared_by(images, 0.14, Plan())
    tracemalloc.start()
    found = in_bytes(near_links(prepared, images, Tile(0, 0)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, found


@pytest.mark.slow
def test_the_links_of_a_clique_are_never_all_in_memory(monkeypatch):
    """1,124,250 links are 27 MB; they are reduced to 1,499 whenever more than 50,000 have come on top."""
    rows = crowd(1500, 1500, 4)
    monkeypatch.setattr(cpu_comparison, "find_crowds", lambda images, rows, limit: [])  # all come as candidates
    monkeypatch.setattr(cpu_comparison, "_SIDE", 128)  # so that no comparison gives many of them at once
    monkeypatch.setattr(cpu_comparison, "_PRODUCTS", 128 * 200)
    monkeypatch.setattr(exact_links, "_PENDING_CANDIDATES", 10_000)
    monkeypatch.setattr(exact_links, "possible_links", lambda units, i, j, limit: (i, j, []))
    without, expected = peak_of(rows)
    monkeypatch.setattr(exact_links, "_PENDING_LINKS", 50_000)
    within, found = peak_of(rows)
    assert found == expected
    assert without > 40e6
    assert within < 16e6


def test_progress_comes_as_the_work_is_done():
    images = images_of(KINDS["flat"](100, 48))
    told: list[int] = []
    near_forest(images, 0.14, layout=lay_out(images, Plan(chunk_rows=20)), on_progress=told.append)
    # The 15 tasks of 5 chunks: 5 of 200 pairs and 10 of 400, of 5,000; the first one is 4 of 100 rows.
    assert told == [4, 8, 8, 8, 8, 4, 8, 8, 8, 4, 8, 8, 4, 8, 4]


class Interrupted(Exception):
    pass


def test_what_an_interrupted_call_left_is_used_only_where_as_much_is_known(tmp_path):
    """Its tasks leave out pairs that were known then: known no longer, they would be lost."""
    rows, limit = KINDS["power law"](120, 48), 0.48
    images, old = images_of(rows), np.arange(90)
    before = forest_by(rows[old], limit)
    known = KnownPairs(Links(before.left, before.right, before.squared), np.arange(120) < 90, None)
    store = ArrayFolder(tmp_path / "work")

    def interrupted(job, missing):
        do = job.open(store, images, None)
        for tile in missing:
            do(tile)
        raise Interrupted

    with pytest.raises(Interrupted):
        near_forest(images, limit, known=known, store=store, run_job=interrupted)
    left = PreparedRows.load(store)
    resumed, _ = near_forest(images, limit, known=known, store=store)
    assert left is not None
    assert left.known.sum() == 90
    anew, _ = near_forest(images, limit, store=store)
    farther, _ = near_forest(images, 2 * limit, store=store)
    assert in_bytes(resumed) == in_bytes(anew) == in_bytes(forest_by(rows, limit))
    assert in_bytes(farther) == in_bytes(forest_by(rows, 2 * limit))


def test_tasks_that_were_done_before_there_were_tiles_are_not_done_again(tmp_path):
    rows, limit = KINDS["power law"](120, 48), 0.48
    images, store = images_of(rows), ArrayFolder(tmp_path / "work")
    prepare(Context(images, store=store), limit, lay_out(images, Plan(chunk_rows=20))).save(store)
    saved = store.load_all()
    assert saved is not None
    arrays, facts = saved
    assert facts.pop("tile_chunks") == 1
    store.save_all({**arrays, "lengths": images.lengths}, facts)

    prepared, asked = PreparedRows.load(store), []
    assert prepared is not None
    done, missing = prepared.tiles()[:4], prepared.tiles()[4:]
    for tile in done:
        save_links(store, prepared, images, tile)

    def rest(job, tiles):
        asked.extend(tiles)
        do = job.open(store, images, None)
        for tile in tiles:
            do(tile)

    resumed, _ = near_forest(images, limit, store=store, run_job=rest)
    assert asked == missing
    assert in_bytes(resumed) == in_bytes(forest_by(rows, limit))
