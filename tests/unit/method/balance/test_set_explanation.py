from collections.abc import Sequence

import numpy as np
import oracles
import pytest

from clip_cid.method.array_store import MemoryStore
from clip_cid.method.balance import set_explanation
from clip_cid.method.balance.chaining import chain_summary, giant_warning
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.set_explanation import Explanation, explain
from clip_cid.method.distances import from_squared
from clip_cid.method.jobs import Job, Progress
from clip_cid.method.unit_rows import UnitRows
from clip_cid.summaries import Chains


def circle(degrees: list[float]) -> np.ndarray:
    """Points on a circle: distances can be worked out by hand."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def chord(degrees: float) -> float:
    """Squared distance of two points of the circle this far apart."""
    return 2 - 2 * float(np.cos(np.deg2rad(degrees)))


def forest_of(rows: np.ndarray, limit: float) -> Forest:
    links, squared = oracles.spanning_forest(rows, limit)
    ends = np.array(links, dtype=np.int64).reshape(-1, 2)
    return Forest(len(rows), ends[:, 0], ends[:, 1], np.array(squared), limit)


def explained(rows: np.ndarray, squared: float) -> Explanation:
    kept, set_of = oracles.balance(rows, squared, "squared_euclidean")
    images = UnitRows(rows, name="rows", any_length=False)
    return explain(images, np.array(kept), np.array(set_of), forest_of(rows, squared), squared)


def test_a_chain_of_five_is_explained_by_hand() -> None:
    found = explained(circle([0, 10, 20, 31, 40, 180]), chord(11.5))
    assert (found.kept.tolist(), found.size.tolist(), found.component_size.tolist()) == ([2], [5], [5])
    assert found.farthest == pytest.approx([chord(20)])
    assert found.widest == pytest.approx([chord(40)])
    assert found.weakest == pytest.approx([chord(11)])
    assert (found.weakest_left.tolist(), found.weakest_right.tolist()) == ([2], [3])
    assert found.row.tolist() == [0, 1, 2, 3, 4]
    assert found.removed.tolist() == [True, True, False, True, True]
    assert found.to_kept == pytest.approx([chord(20), chord(10), 0, chord(11), chord(20)])


def test_a_set_divided_among_two_kept_rows_has_two_groups_and_one_weakest_link() -> None:
    rows = circle([0, 10, 21, 31, 90])
    images = UnitRows(rows, name="rows", any_length=False)
    limit = chord(12)
    found = explain(images, np.array([0, 3, 4]), np.array([0, 0, 1, 1, 2]), forest_of(rows, limit), limit)
    assert (found.group.tolist(), found.kept.tolist(), found.size.tolist()) == ([0, 1], [0, 3], [2, 2])
    assert (found.component.tolist(), found.component_size.tolist()) == ([0, 0], [4, 4])
    assert found.widest == pytest.approx([chord(10), chord(10)])
    assert found.weakest == pytest.approx([chord(11), chord(11)])
    assert (found.weakest_left.tolist(), found.weakest_right.tolist()) == ([1, 1], [2, 2])


def test_links_above_the_threshold_are_not_part_of_the_set() -> None:
    rows = circle([0, 5, 20, 25])
    images = UnitRows(rows, name="rows", any_length=False)
    forest = forest_of(rows, chord(90))
    found = explain(images, np.array([0, 2]), np.array([0, 0, 1, 1]), forest, chord(6))
    assert found.weakest == pytest.approx([chord(5), chord(5)])


def test_equal_rows_are_at_exactly_nothing() -> None:
    rows = np.random.default_rng(0).standard_normal((1, 60)).astype(np.float16).repeat(5, axis=0)
    images = UnitRows(rows, name="rows", any_length=True)
    forest = Forest(5, np.arange(4), np.arange(1, 5), np.zeros(4), 0.1)
    found = explain(images, np.array([0]), np.zeros(5, dtype=int), forest, 0.1)
    assert (found.farthest.tolist(), found.widest.tolist(), found.weakest.tolist()) == ([0], [0], [0])


@pytest.mark.parametrize("seed", range(8))
def test_rows_all_equally_far_apart_are_never_wider_than_far_by_rounding(seed: int) -> None:
    corners = np.eye(9) + 0.4
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((9, 9)))
    rows = corners @ turn / np.linalg.norm(corners[0])
    found = explained(rows, 1.5)
    assert found.size.tolist() == [9]
    assert found.farthest[0] <= found.widest[0] == pytest.approx(found.farthest[0])


def test_nothing_removed_is_nothing_to_explain() -> None:
    found = explained(circle([0, 90]), chord(1))
    assert (len(found.group), len(found.row), len(found.farthest)) == (0, 0, 0)
    assert chain_summary(found, rows=2, squared=chord(1), metric="cosine") == Chains(
        beyond_threshold_share=0.0, distance={}, largest=1, top_sizes=[], giants=[]
    )
    assert {len(column) for column in found.set_columns("cosine").values()} == {0}


@pytest.mark.slow
def test_small_batches_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = circle(np.random.default_rng(3).uniform(0, 360, 300).tolist())
    whole = explained(rows, chord(0.8))
    monkeypatch.setattr(set_explanation, "_CELLS", 12)
    parts = explained(rows, chord(0.8))
    assert len(set(whole.size.tolist())) > 3
    for name in Explanation.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)


def test_a_group_too_large_to_compare_gets_a_bound_that_is_no_wider_than_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(4)
    rows = np.eye(6)[0] + 0.2 * random.standard_normal((80, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    exact = explained(rows, 0.3)
    monkeypatch.setattr(set_explanation, "EXACT_SIZE", 10)
    bound = explained(rows, 0.3)
    large = exact.size > 10
    assert large.any()
    assert exact.widest_exact.all()
    assert bound.widest_exact.tolist() == (~large).tolist()
    assert (bound.widest <= exact.widest).all()
    assert (bound.widest >= exact.widest / 4).all()  # squared: at least half of the distance
    assert (bound.widest >= bound.farthest).all()
    np.testing.assert_allclose(bound.to_kept, exact.to_kept, rtol=1e-12)


def test_on_an_arc_one_sweep_finds_the_widest_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_explanation, "EXACT_SIZE", 10)
    (widest,) = explained(circle(list(range(0, 60, 2))), chord(2.5)).widest
    assert widest == pytest.approx(chord(58))


def test_two_large_groups_of_one_size_are_each_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_explanation, "EXACT_SIZE", 3)
    found = explained(circle([0, 1, 2, 3, 90, 92, 94, 96]), chord(2.5))
    assert found.widest == pytest.approx([chord(3), chord(6)])
    assert not found.widest_exact.any()


def test_rows_of_a_store_take_the_place_of_rows_balanced() -> None:
    found = explained(circle([0, 10, 90]), chord(11)).with_rows(np.array([7, 5, 9]))
    assert (found.kept.tolist(), found.row.tolist()) == ([7], [7, 5])
    assert (found.weakest_left.tolist(), found.weakest_right.tolist()) == ([7], [5])
    assert found.removed.tolist() == [False, True]


@pytest.mark.parametrize(("metric", "of"), [("cosine", lambda d: d / 2), ("euclidean", np.sqrt)])
def test_the_mean_is_taken_on_the_scale_it_is_told_on(metric: str, of) -> None:
    found = explained(circle([0, 10, 16]), chord(11))
    columns = found.set_columns(metric)
    assert columns["mean"] == pytest.approx([(of(chord(10)) + of(chord(6))) / 2])
    assert columns["weakest_link"] == pytest.approx([of(chord(10))])
    assert found.member_columns(metric)["distance"] == pytest.approx([of(chord(10)), 0, of(chord(6))])


@pytest.mark.parametrize("at_once", [1, 7, 40])
def test_parts_in_tasks_change_nothing_and_their_progress_adds_up(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = circle(np.random.default_rng(3).uniform(0, 360, 100).tolist())
    kept, set_of = (np.array(values) for values in oracles.balance(rows, chord(2), "squared_euclidean"))
    images, forest = UnitRows(rows, name="rows", any_length=False), forest_of(rows, 0.1)
    whole = explain(images, kept, set_of, forest, chord(2))
    store, done = MemoryStore(), []

    def run_job(job: Job, missing: Sequence[int]) -> None:
        do, progress = job.open(store, images, None), Progress(job, missing)
        for task in reversed(missing):
            do(task)
            done.append(progress.finish(task))
        assert sum(done) == job.rows == whole.size.sum()

    monkeypatch.setattr(set_explanation, "_CELLS", 12)
    monkeypatch.setattr(UnitRows, "gathered_rows", at_once)
    parts = explain(images, kept, set_of, forest, chord(2), store=store, run_job=run_job)
    assert len(done) > 1
    for name in Explanation.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)


@pytest.mark.parametrize(
    ("kept", "set_of", "links", "message"),
    [
        ([0], [0, 0], 1, "must be of 3 rows, got 2 and 3"),
        ([0, 1], [0, 2, 1], 1, "set_of must be -1 to 1, got 0 to 2"),
        ([0, 1], [0, -2, 1], 1, "set_of must be -1 to 1, got -2 to 1"),
        ([0, 1], [1, 0, 0], 1, "kept must hold one row of each set"),
        ([0, 9], [0, 1, 1], 1, "kept must hold one row of each set"),
        ([0], [0, 0, 0], 1, "must join each row to the one kept for it at squared 0.04, not so row 2"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(kept, set_of, links, message) -> None:
    rows = circle([0, 5, 10])
    forest = Forest(3, np.arange(2)[:links], np.arange(1, 3)[:links], np.full(links, chord(5)), 0.04)
    images = UnitRows(rows, name="rows", any_length=False)
    with pytest.raises(ValueError, match=message):
        explain(images, np.array(kept), np.array(set_of), forest, 0.04)


def test_a_drift_is_a_giant_and_a_tight_set_of_the_same_size_is_not() -> None:
    tight, drift = np.linspace(180, 181, 150), np.linspace(0, 90, 120)
    found = explained(circle([*tight, *drift]), chord(1))
    summary = chain_summary(found, rows=270, squared=chord(1), metric="cosine")
    assert (summary.largest, summary.top_sizes) == (150, [150, 120])
    (giant,) = summary.giants
    assert (giant.size, giant.share_of_rows) == (120, pytest.approx(120 / 270))
    assert giant.beyond_threshold_share == pytest.approx(117 / 119)  # only the neighbours of the kept one are near
    assert giant.widest == pytest.approx(1)
    beyond = found.to_kept[found.removed] > chord(1)
    assert summary.beyond_threshold_share == pytest.approx(beyond.mean())
    assert summary.distance["max"] == pytest.approx(giant.farthest)
    warning = giant_warning(summary, metric="cosine", threshold=0.00015)
    assert warning is not None
    assert (
        "1 set of chained images: the largest has 120 images (44.4 % of all), and 98 % of its removed images" in warning
    )


@pytest.mark.parametrize(
    ("chained", "rows", "giant"),
    [
        (92, 657, True),  # 14 % of all
        (12, 1200, True),  # 1 % exactly
        (12, 1201, False),
        (9, 90, False),  # too few to be called so
        (100, 100_000, True),  # a thousandth exactly
        (100, 100_001, False),
        (99, 100_000, False),
    ],
)
def test_a_chain_is_a_giant_from_a_hundredth_of_the_rows_or_from_a_hundred_images_and_a_thousandth(
    chained: int, rows: int, giant: bool
) -> None:
    found = explained(circle(list(range(chained))), chord(1.1))
    summary = chain_summary(found, rows=rows, squared=chord(1.1), metric="euclidean")
    assert summary.largest == chained
    assert [one.size for one in summary.giants] == [chained] * giant
    assert (giant_warning(summary, metric="euclidean", threshold=0.1) is not None) == giant


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="'manhattan'"):
        from_squared(np.array([0.1]), "manhattan")
