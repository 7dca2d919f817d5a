"""Laws of the image semantic balance, over rows that hypothesis chooses (small whole numbers, so that equal rows abound).

`balance` keeps its arrays in memory. `in_a_folder` goes the way of the stage: arrays on the disk, and tasks that open what
they read; it is interrupted and called again.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clip_cid.data.array_folder import ArrayFolder
from clip_cid.method.balance.known_pairs import EarlierForest, KnownPairs, known_pairs
from clip_cid.method.balance.pair_agreement import agreement
from clip_cid.method.balance.pair_plan import Plan, lay_out
from clip_cid.method.balance.semantic_balance import Balance, BalanceRule, balance, balance_rows
from clip_cid.method.distances import threshold_on
from clip_cid.method.jobs import Job
from clip_cid.method.unit_rows import UnitRows

pytestmark = pytest.mark.filterwarnings("ignore:the threshold .* is a distance")  # drawn at random, not meant otherwise

METRICS = ["cosine", "squared_euclidean", "euclidean"]


@st.composite
def points(draw, max_rows: int = 14):
    dim = draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3), min_size=dim, max_size=dim).filter(any)
    return oracles.unit(np.array(draw(st.lists(row, min_size=1, max_size=max_rows)), dtype=np.float64))


@st.composite
def points_and_threshold(draw):
    """A cosine threshold a hair beside the distance of two of the rows, or anywhere."""
    rows = draw(points())
    threshold = draw(st.floats(1e-4, 1.9))
    if draw(st.booleans()):
        i, j = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows) - 1))
        threshold = oracles.distance(rows[i], rows[j], "cosine") * draw(st.sampled_from([1 - 1e-9, 1 + 1e-9]))
    assume(1e-6 < threshold < 1.999)
    assume(all(abs(oracles.distance(a, b, "cosine") - threshold) > 1e-12 for a in rows for b in rows))
    return rows, threshold


def in_a_folder(
    rows: np.ndarray,
    rule: BalanceRule,
    *,
    texts: np.ndarray | None = None,
    plan: Plan | None = None,
    known: KnownPairs | None = None,
    tasks_before: int = 1,
) -> Balance:
    """Interrupted after some tasks; the second call does the others, the last one first."""
    images = unit_rows(rows)
    done: list[tuple[str, Any]] = []
    with tempfile.TemporaryDirectory() as path:
        store = ArrayFolder(Path(path) / "work")

        def run(job: Job, tasks: Sequence[Any]) -> None:
            do = job.open(ArrayFolder(store.path), unit_rows(rows), None if texts is None else unit_rows(texts))
            for task in tasks:
                assert (job.title, task) not in done
                do(task)
                done.append((job.title, task))

        def interrupted(job: Job, missing: Sequence[Any]) -> None:
            run(job, missing[:tasks_before])
            raise KeyboardInterrupt

        def call(run_job) -> Balance:
            return balance_rows(
                images,
                None if texts is None else unit_rows(texts),
                rule,
                layout=None if plan is None else lay_out(images, plan),
                known=known,
                store=store,
                run_job=run_job,
            )

        try:
            return call(interrupted)  # when every row is known, or a copy of one that is
        except KeyboardInterrupt:
            return call(lambda job, missing: run(job, missing[::-1]))


def unit_rows(rows: np.ndarray) -> UnitRows:
    return UnitRows(rows, name="rows", any_length=False)


def assert_same(one: Balance, other: Balance) -> None:
    for name in ("kept", "set_of", "row_hashes"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    for name in ("left", "right", "squared"):
        assert getattr(one.forest, name).tobytes() == getattr(other.forest, name).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a folder"])
@given(points_and_threshold(), st.sampled_from(METRICS), st.booleans())
def test_the_fast_balance_is_the_slow_one(stored, data, metric, with_texts):
    rows, threshold = data
    texts = rows[::-1].copy() if with_texts else None
    from_squared = threshold_on("cosine", threshold, metric)
    if stored:
        found = in_a_folder(rows, BalanceRule(from_squared, metric), texts=texts, plan=Plan(chunk_rows=5))
    else:
        found = balance(rows, threshold=from_squared, metric=metric, text_embeddings=texts)
    kept, set_of = oracles.balance(rows, from_squared, metric, texts)
    assert (found.kept.tolist(), found.set_of.tolist()) == (kept, set_of)


@st.composite
def plans(draw, dim: int):
    """Any way to look for near pairs."""
    kind = draw(st.sampled_from(["int8", "float32", "float16"]))
    width = draw(st.sampled_from([None, *range(2, dim)]))
    return Plan(
        kind,
        width,
        cells=draw(st.sampled_from([0, 1, 4])),
        chunk_rows=draw(st.integers(1, 15)),
        tile_chunks=draw(st.integers(1, 3)),
    )


@pytest.mark.slow
@given(points_and_threshold(), st.data(), st.sampled_from([np.float16, np.float32, np.float64]))
def test_the_result_does_not_depend_on_the_plan(data, draws, dtype):
    rows, threshold = data
    planned = balance(rows.astype(dtype), threshold=threshold, plan=draws.draw(plans(rows.shape[1])))
    assert_same(planned, balance(rows.astype(dtype), threshold=threshold))


@pytest.mark.slow
@given(points_and_threshold(), st.data(), st.integers(0, 9))
def test_the_result_does_not_depend_on_where_arrays_lie_nor_on_interruptions(data, draws, tasks_before):
    rows, threshold = data
    plan = draws.draw(plans(rows.shape[1]))
    stored = in_a_folder(rows, BalanceRule(threshold), plan=plan, tasks_before=tasks_before)
    assert_same(stored, balance(rows, threshold=threshold))


@pytest.mark.slow
@given(points_and_threshold(), st.data())
def test_what_an_earlier_balance_of_some_rows_knows_changes_nothing(data, draws):
    rows, threshold = data
    was_there = np.array(draws.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    gone = draws.draw(points(max_rows=3))
    gone = gone if gone.shape[1] == rows.shape[1] else rows[:0]
    before = np.concatenate([rows[was_there], gone])
    assume(len(before))
    earlier = balance(before, threshold=threshold)
    rule = BalanceRule(threshold)
    known = known_pairs(unit_rows(rows), [EarlierForest(earlier.forest, earlier.row_hashes)], rule.limit)
    grown = in_a_folder(rows, rule, plan=draws.draw(plans(rows.shape[1])), known=known)
    assert_same(grown, balance(rows, threshold=threshold))


@pytest.mark.slow
@given(points(), st.floats(0.01, 1.9), st.floats(0.001, 1.0))
def test_the_forest_answers_a_smaller_threshold_as_a_run_of_its_own(rows, largest, share):
    forest = balance(rows, threshold=largest).forest
    smaller = largest * share
    own = balance(rows, threshold=smaller)
    assert forest.sets(2 * smaller).tolist() == own.forest.sets(2 * smaller).tolist()
    assert abs(forest.removed_share(2 * smaller) - own.removed_share) < 1e-12


@given(points(), st.floats(0.01, 1.9), st.floats(0.01, 0.99))
def test_the_threshold_for_a_share_is_the_smallest_that_removes_it(rows, largest, share):
    forest = balance(rows, threshold=largest).forest
    needed = math.ceil(round(share * len(rows), 9))
    if needed > len(forest.squared):
        with pytest.raises(ValueError, match="share must be at most"):
            forest.squared_for(share)
        return
    squared = forest.squared_for(share)
    assert forest.links(squared) >= needed
    assert squared == 0 or forest.links(np.nextafter(squared, 0)) < needed


@given(points_and_threshold(), st.floats(0.01, 1.9))
def test_within_a_radius_every_removed_row_is_near_the_one_kept_for_it(data, radius):
    rows, threshold = data
    found = balance(rows, threshold=threshold, max_radius=radius)
    plain = balance(rows, threshold=threshold)
    for row in range(len(rows)):
        assert oracles.distance(rows[row], rows[found.kept[found.set_of[row]]], "cosine") <= radius + 1e-12
    assert set(plain.kept.tolist()) <= set(found.kept.tolist())
    assert (plain.set_of[found.kept[found.set_of]] == plain.set_of).all()  # no set is joined that was not


@given(points(), st.floats(0.001, 1.9))
def test_balancing_twice_removes_nothing_more(rows, threshold):
    kept = rows[balance(rows, threshold=threshold).kept]
    assert len(balance(kept, threshold=threshold).kept) == len(kept)


@given(points(), st.floats(0.001, 1.9), st.floats(0.001, 1.9))
def test_a_larger_threshold_never_keeps_more(rows, one, other):
    fewer = balance(rows, threshold=max(one, other))
    more = balance(rows, threshold=min(one, other))
    assert len(fewer.kept) <= len(more.kept)
    assert all(len(set(fewer.set_of[more.set_of == number])) == 1 for number in range(len(more.kept)))


@given(points(), st.floats(0.001, 1.9))
def test_the_kept_row_is_of_its_set_and_none_is_nearer_the_centroid(rows, threshold):
    found = balance(rows, threshold=threshold)
    assert (np.diff(found.kept) > 0).all()
    for number, row in enumerate(found.kept):
        assert found.set_of[row] == number
        members = rows[found.set_of == number]
        distances = np.linalg.norm(members - members.mean(axis=0), axis=1)
        assert np.linalg.norm(rows[row] - members.mean(axis=0)) <= distances.min() + 1e-9


@given(points_and_threshold())
def test_each_removed_image_reaches_the_kept_one_by_hops_within_the_threshold(data):
    rows, threshold = data
    found = balance(rows, threshold=threshold)
    near = np.array([[oracles.distance(a, b, "cosine") <= threshold for b in rows] for a in rows])
    for row in range(len(rows)):
        reached = {int(found.kept[found.set_of[row]])}
        while len(more := reached | {int(j) for i in reached for j in np.flatnonzero(near[i])}) > len(reached):
            reached = more
        assert row in reached


@given(points(), st.floats(0.001, 1.9), st.randoms(use_true_random=False))
def test_sets_do_not_depend_on_the_order_of_rows(rows, threshold, random):
    order = np.array(random.sample(range(len(rows)), len(rows)))
    first, second = balance(rows, threshold=threshold), balance(rows[order], threshold=threshold)
    both = agreement(first.set_of[order], second.set_of)
    assert (both.precision, both.recall, len(first.kept)) == (1, 1, len(second.kept))


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 4)), max_size=25))
def test_agreement_is_what_listing_all_pairs_gives(rows):
    set_of, truth = (
        (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)) if rows else (np.zeros(0, int),) * 2
    )
    used = [pair for pair in rows if pair[0] != -1]
    pairs = [(a, b) for i, a in enumerate(used) for b in used[i + 1 :]]
    found = agreement(set_of, truth)
    assert found.set_pairs == sum(a[0] == b[0] for a, b in pairs)
    assert found.true_pairs == sum(a[1] == b[1] for a, b in pairs)
    assert found.shared_pairs == sum(a == b for a, b in pairs)


@given(st.sampled_from(METRICS), st.sampled_from(METRICS), st.floats(1e-6, 1.99))
def test_a_threshold_returns_from_any_scale(one, other, threshold):
    there = threshold_on(one, threshold, other)
    assert abs(threshold_on(other, there, one) - threshold) <= 1e-12 * threshold
