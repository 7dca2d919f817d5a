import numpy as np
import oracles
import pytest

from clip_cid.method.balance import exact_links, kept_rows
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.pair_plan import Layout, Plan
from clip_cid.method.balance.semantic_balance import Balance, balance
from clip_cid.method.codes import Coding
from clip_cid.method.distances import threshold_on

METRICS = ["cosine", "squared_euclidean", "euclidean"]
PLANS = [
    Plan("float32"),
    Plan("float32", 2, chunk_rows=13),
    Plan("float32", 32, cells=6, chunk_rows=11),
    Plan("int8"),
    Plan("int8", 32, cells=6),
    Plan("float16"),
    Plan("float16", 32, cells=50, chunk_rows=25),
]


def on_circle(degrees: list[float]) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def planted(sets: int, per_set: int, dim: int, *, noise: float, seed: int = 0) -> np.ndarray:
    """Shuffled near-duplicates; the set of row i is its value in `truth`."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(oracles.unit(rng.standard_normal((sets, dim))), per_set, axis=0)
    return oracles.unit(rows + noise * rng.standard_normal(rows.shape))[rng.permutation(len(rows))]


def test_near_images_join_and_far_ones_do_not():
    found = balance(on_circle([0, 1, 90, 91, 180]), threshold=2e-4)  # 1 - cos(1 degree) = 1.52e-4
    assert found.set_of.tolist() == [0, 0, 1, 1, 2]
    assert found.kept.tolist() == [0, 2, 4]
    assert found.removed_share == pytest.approx(0.4)
    assert (found.kept.dtype, found.set_of.dtype) == (np.int64, np.int64)
    assert (found.threshold, found.metric) == (2e-4, "cosine")


def test_a_chain_of_near_images_is_one_set_that_keeps_its_middle():
    found = balance(on_circle([0, 1, 2, 3, 4]), threshold=2e-4)
    assert found.kept.tolist() == [2]
    assert found.set_of.tolist() == [0] * 5


@pytest.mark.parametrize("metric", METRICS)
def test_the_threshold_is_on_the_scale_of_its_metric(metric):
    rows = on_circle([0, 20, 45])
    near = oracles.distance(rows[0], rows[1], metric)
    assert len(balance(rows, threshold=near * 0.999, metric=metric).kept) == 3
    assert len(balance(rows, threshold=near * 1.001, metric=metric).kept) == 2


def test_two_equally_near_images_are_decided_by_their_caption_then_by_their_row():
    images = on_circle([0, 2, 90, 92])
    texts = on_circle([1, 1, 89, 92])
    assert balance(images, threshold=1e-3).kept.tolist() == [0, 2]
    assert balance(images, threshold=1e-3, text_embeddings=texts).kept.tolist() == [0, 3]


def test_a_better_caption_does_not_beat_a_nearer_image():
    images = on_circle([0, 1, 2])
    texts = on_circle([0, 60, 60])
    assert balance(images, threshold=1e-3, text_embeddings=texts).kept.tolist() == [1]


def test_a_tie_within_rounding_is_a_tie():
    rng = np.random.default_rng(3)
    pair = oracles.unit(rng.standard_normal((1, 50)) + 0.01 * rng.standard_normal((2, 50)))
    for rows in (pair, pair[::-1]):
        assert balance(rows, threshold=0.07).kept.tolist() == [0]


@pytest.mark.parametrize("with_texts", [False, True])
def test_planted_sets_are_found_as_the_slow_version_finds_them(with_texts):
    rows = planted(30, 4, 24, noise=0.02).astype(np.float16)
    texts = planted(30, 4, 24, noise=0.5, seed=1).astype(np.float16) if with_texts else None
    found = balance(rows, threshold=0.07, text_embeddings=texts, plan=Plan("int8", 8, chunk_rows=17))
    kept, set_of = oracles.balance(rows, 0.07, "cosine", texts)
    assert found.kept.tolist() == kept
    assert found.set_of.tolist() == set_of
    assert len(kept) == 30


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("threshold", [1e-6, 0.07])
@pytest.mark.parametrize("dim", [2, 512])
def test_pairs_a_hair_on_either_side_of_the_threshold_are_told_apart(plan, threshold, dim):
    """One pair in two is nearer by 1e-9 of the threshold, the other further: float32 alone cannot see it."""
    rows, expected = on_either_side(threshold, dim)
    found = balance(rows, threshold=threshold, plan=plan)
    pairs = len(rows) // 2
    assert (found.set_of[:pairs] == found.set_of[pairs:]).tolist() == expected


@pytest.mark.parametrize("plan", [Plan("float32"), Plan("float16"), Plan("int8")], ids=str)
def test_without_the_margin_such_pairs_would_be_lost(monkeypatch, plan):
    rows, expected = on_either_side(0.07, 512)
    monkeypatch.setattr(Coding, "floor", lambda coding, least, left, right: (least + 0 * (left + right)) / coding.unit)
    found = balance(rows, threshold=0.07, plan=plan)
    assert (found.set_of[: len(rows) // 2] == found.set_of[len(rows) // 2 :]).tolist() != expected


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_a_pair_exactly_at_the_threshold_is_joined_and_one_a_float_beyond_it_is_not(plan, metric):
    rng = np.random.default_rng(11)
    for dim in (2, 3, 48):
        first, second = pair = oracles.unit(oracles.unit(rng.standard_normal((1, dim))) + 0.05 * rng.random((2, dim)))
        lengths = np.sqrt((pair * pair).sum(axis=1))
        difference = first / lengths[0] - second / lengths[1]
        squared = float((difference * difference).sum())
        at = smallest_at_or_above(squared, metric)
        below, beyond = float(np.nextafter(at, 0)), float(np.nextafter(at, 2))
        sets = {each: balance(pair, threshold=each, metric=metric, plan=plan).set_of for each in (below, at, beyond)}
        assert {each: found.tolist() for each, found in sets.items()} == {below: [0, 1], at: [0, 0], beyond: [0, 0]}
        forest = balance(pair, threshold=0.9, metric=metric, plan=plan).forest
        links = [forest.links(threshold_on(metric, each, "squared_euclidean")) for each in (below, at, beyond)]
        assert links == [0, 1, 1]
        assert forest.squared.tolist() == [squared]


def smallest_at_or_above(squared: float, metric: str) -> float:
    """The first number on the scale of the metric whose square (or double) reaches this squared distance."""
    if metric != "euclidean":
        return {"cosine": squared / 2, "squared_euclidean": squared}[metric]
    at = squared**0.5
    while at**2 < squared:
        at = float(np.nextafter(at, 2))
    while float(np.nextafter(at, 0)) ** 2 >= squared:
        at = float(np.nextafter(at, 0))
    return at


def on_either_side(threshold: float, dim: int) -> tuple[np.ndarray, list[bool]]:
    rng = np.random.default_rng(7)
    first = np.linalg.qr(rng.standard_normal((dim, min(dim // 2, 20))))[0].T
    away = rng.standard_normal(first.shape)
    away -= (away @ first.T) @ first
    away = oracles.unit(away)
    near = [i % 2 == 0 for i in range(len(first))]
    cosines = 1 - threshold * np.where(near, 1 - 1e-9, 1 + 1e-9)[:, None]
    return np.concatenate([first, cosines * first + np.sqrt(1 - cosines**2) * away]), near


def test_of_a_clique_few_distances_are_computed_exactly(monkeypatch):
    computed = 0
    distances = exact_links._distances

    def counted(units, i, j):
        nonlocal computed
        computed += len(i)
        return distances(units, i, j)

    monkeypatch.setattr(exact_links, "_distances", counted)
    rows = planted(1, 1000, 64, noise=1e-2)
    assert len(balance(rows, threshold=0.07).kept) == 1
    assert 999 <= computed < 50_000  # of 499,500 pairs


@pytest.mark.parametrize("members", [1, 7, 100, 1 << 12])
@pytest.mark.parametrize("rows_read", [1, 5, 1 << 20])
@pytest.mark.parametrize("keep", ["nearest_centroid", "best_caption"])
def test_what_is_kept_does_not_depend_on_how_much_is_read_at_once(monkeypatch, members, rows_read, keep):
    rows = np.concatenate([planted(1, 150, 8, noise=0.02), planted(20, 2, 8, noise=0.01), planted(9, 3, 8, noise=0.01)])
    texts = planted(len(rows), 1, 8, noise=0.0, seed=4)
    expected = balance(rows, threshold=0.02, text_embeddings=texts, keep=keep)
    assert len(np.unique(np.bincount(expected.set_of))) > 2
    monkeypatch.setattr(kept_rows, "_MEMBERS", members)
    monkeypatch.setattr("clip_cid.method.unit_rows._CACHED_NUMBERS", 8 * rows_read)
    found = balance(rows, threshold=0.02, text_embeddings=texts, keep=keep)
    assert found.kept.tolist() == expected.kept.tolist()
    assert found.set_of.tolist() == expected.set_of.tolist()


def test_a_set_larger_than_a_portion_keeps_the_row_nearest_its_centroid(monkeypatch):
    rows = planted(2, 150, 8, noise=0.02)
    expected = balance(rows, threshold=0.2)
    monkeypatch.setattr(kept_rows, "_MEMBERS", 7)
    monkeypatch.setattr("clip_cid.method.unit_rows._CACHED_NUMBERS", 8 * 7)
    found = balance(rows, threshold=0.2, text_embeddings=rows)
    kept, set_of = oracles.balance(rows, 0.2, "cosine")
    assert found.kept.tolist() == expected.kept.tolist() == kept
    assert found.set_of.tolist() == set_of


def test_many_sets_are_kept_portion_by_portion(monkeypatch):
    rows = np.concatenate([planted(40, 2, 16, noise=0.01), planted(20, 3, 16, noise=0.01, seed=5)])
    kept, _ = oracles.balance(rows, 0.02, "cosine")
    monkeypatch.setattr(kept_rows, "_MEMBERS", 9)
    assert balance(rows, threshold=0.02).kept.tolist() == kept


def test_the_forest_answers_every_threshold_up_to_the_largest():
    rows = on_circle([0, 1, 10, 12, 30, 33])
    found = balance(rows, threshold=2e-4, max_threshold=0.01)
    assert found.set_of.tolist() == [0, 0, 1, 2, 3, 4]
    assert isinstance(found.forest, Forest)
    assert (found.forest.rows, found.forest.limit) == (6, 0.02)
    assert list(zip(found.forest.left.tolist(), found.forest.right.tolist(), strict=True)) == [(0, 1), (2, 3), (4, 5)]
    # Chords of 1, 2 and 3 degrees: 2 - 2 cos.
    assert found.forest.squared == pytest.approx(2 - 2 * np.cos(np.deg2rad([1, 2, 3])), rel=1e-9)
    for threshold in (2e-4, 7e-4, 0.01):
        own = balance(rows, threshold=threshold)
        assert own.set_of.tolist() == found.forest.sets(2 * threshold).tolist()
        assert own.removed_share == pytest.approx(found.forest.removed_share(2 * threshold))
    assert balance(rows, threshold=0.01).forest.limit == 0.02


@pytest.mark.parametrize("metric", METRICS)
def test_a_largest_threshold_below_the_threshold_is_refused(metric):
    with pytest.raises(ValueError, match=r"max_threshold must be at least the threshold 0\.07, got 0\.06"):
        balance(on_circle([0, 1]), threshold=0.07, max_threshold=0.06, metric=metric)
    assert balance(on_circle([0, 1]), threshold=0.07, max_threshold=0.07, metric=metric).threshold == 0.07
    with pytest.raises(ValueError, match="threshold must be above 0 and below"):
        balance(on_circle([0, 1]), threshold=0.07, max_threshold=5.0, metric=metric)


@pytest.mark.parametrize(
    ("share", "degrees", "kept"),
    [
        (0.01, 1, [0, 2, 3, 4, 5]),  # a sixth of the rows is the least that can go
        (1 / 6, 1, [0, 2, 3, 4, 5]),
        (0.3, 2, [0, 2, 4, 5]),
        (1 / 3, 2, [0, 2, 4, 5]),
        (0.5, 3, [0, 2, 4]),
    ],
)
def test_the_smallest_threshold_that_removes_a_share_is_taken(share, degrees, kept):
    rows = on_circle([0, 1, 10, 12, 30, 33])
    found = balance(rows, target_removed=share, max_threshold=0.01)
    assert found.kept.tolist() == kept
    assert found.threshold == pytest.approx(1 - np.cos(np.deg2rad(degrees)), rel=1e-9)


def test_a_share_that_no_threshold_removes_is_refused():
    rows = on_circle([0, 1, 10, 12, 30, 33])
    with pytest.raises(ValueError, match=r"share must be at most 0\.5000, which the largest distance .* got 0\.6"):
        balance(rows, target_removed=0.6, max_threshold=0.01)
    with pytest.raises(ValueError, match="share must be above 0 and below 1, got 1"):
        balance(rows, target_removed=1.0, max_threshold=0.01)


def test_a_share_may_need_a_threshold_below_the_one_that_is_the_default():
    found = balance(on_circle([0, 1, 10, 12, 30, 33]), target_removed=0.5, max_threshold=0.002)
    assert found.threshold < 0.002 < 0.07


@pytest.mark.parametrize("metric", METRICS)
def test_the_threshold_found_for_a_share_removes_it_again(metric):
    for seed in range(8):
        rows = planted(20, 3, 12, noise=0.05, seed=seed)
        found = balance(rows, metric=metric, target_removed=0.25, max_threshold=0.4)
        again = balance(rows, metric=metric, threshold=found.threshold)
        assert len(found.kept) == 45
        assert again.kept.tolist() == found.kept.tolist()


def test_the_image_whose_caption_fits_best_is_kept_when_asked():
    images = on_circle([0, 1, 2, 90, 91])
    texts = on_circle([0.5, 61, 2.1, 91, 91.5])  # 0.5, 60, 0.1, 1 and 0.5 degrees away
    found = balance(images, threshold=2e-4, text_embeddings=texts, keep="best_caption")
    assert (found.kept.tolist(), found.set_of.tolist()) == ([2, 4], [0, 0, 0, 1, 1])
    assert balance(images, threshold=2e-4, text_embeddings=texts).kept.tolist() == [1, 4]  # the middle one, and a tie


def test_captions_that_fit_equally_well_leave_the_lower_row():
    images = on_circle([0, 1, 2])
    found = balance(images, threshold=2e-4, text_embeddings=on_circle([3, 4, 1]), keep="best_caption")
    assert found.kept.tolist() == [2]  # 3, 3 and 1 degrees
    found = balance(images, threshold=2e-4, text_embeddings=on_circle([3, 4, 5]), keep="best_caption")
    assert found.kept.tolist() == [0]


def test_the_best_caption_needs_captions():
    with pytest.raises(ValueError, match="keep='best_caption' needs text_embeddings"):
        balance(on_circle([0, 1]), keep="best_caption")


def test_a_drift_within_a_radius_keeps_a_row_for_every_stretch():
    """1 degree is a cosine distance of 1.52e-4, 2 degrees are 6.1e-4."""
    rows = on_circle([0, 1, 2, 3, 4, 5, 6])
    assert balance(rows, threshold=2e-4).kept.tolist() == [3]
    found = balance(rows, threshold=2e-4, max_radius=2e-4)
    # Row 3 is the middle and stands for 2 to 4. Of 0, 1, 5 and 6 the middle is as near 1 as 5: 1 for 0 and itself.
    # 5 and 6 are left, and of two the lower is kept.
    assert found.kept.tolist() == [1, 3, 5]
    assert found.set_of.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert balance(rows, threshold=2e-4, max_radius=7e-4).kept.tolist() == [0, 3, 6]
    assert balance(rows, threshold=2e-4, max_radius=1.4e-3).kept.tolist() == [3]  # 3 degrees are 1.37e-3
    assert balance(rows, threshold=2e-4, max_radius=1e-4).kept.tolist() == list(range(7))


def test_a_radius_is_on_the_scale_of_the_metric():
    rows = on_circle([0, 1, 2, 3, 4, 5, 6])
    chord = 2 * np.sin(np.deg2rad(0.5))
    found = balance(rows, threshold=1.1 * chord, max_radius=1.1 * chord, metric="euclidean")
    assert found.kept.tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match="threshold must be above 0 and below 2 for metric euclidean, got -1"):
        balance(rows, threshold=chord, max_radius=-1.0, metric="euclidean")


def test_within_a_radius_the_best_caption_decides_as_well():
    rows = on_circle([0, 1, 2, 3, 4])
    texts = on_circle([9, 9, 9, 9, 4])  # the last caption fits best, then that of 3
    found = balance(rows, threshold=2e-4, max_radius=2e-4, text_embeddings=texts, keep="best_caption")
    assert found.kept.tolist() == [0, 2, 4]  # 4 for 3; then 2 for 1; then 0
    assert found.set_of.tolist() == [0, 1, 1, 2, 2]


class ShardsOnDisk:
    """What an embedding store offers: a shape, slices and row numbers, nothing more."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        self.shape = rows.shape

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        assert isinstance(rows, slice | np.ndarray)
        return self._rows[rows]


def test_anything_with_a_shape_and_rows_will_do():
    rows = planted(5, 3, 8, noise=0.01)
    found = balance(ShardsOnDisk(rows), text_embeddings=ShardsOnDisk(rows), threshold=0.07)
    assert isinstance(found, Balance)
    assert len(found.kept) == 5


@pytest.mark.parametrize("plan", [None, *PLANS], ids=str)
def test_progress_adds_up_to_the_rows(plan):
    told: list[int] = []
    balance(planted(5, 3, 48, noise=0.01), threshold=0.07, plan=plan, on_progress=told.append)
    assert sum(told) == 15
    assert min(told) > 0


@pytest.mark.parametrize("plan", [None, Plan("int8", 8, chunk_rows=4)], ids=str)
def test_the_plan_is_told_once_and_before_the_work(plan):
    told: list[Layout | int] = []
    balance(planted(5, 3, 48, noise=0.01), threshold=0.07, plan=plan, on_plan=told.append, on_progress=told.append)
    assert isinstance(told[0], Layout)
    assert sum(isinstance(each, Layout) for each in told) == 1
    assert told[0].plan == (plan or Plan(chunk_rows=told[0].plan.chunk_rows))
    assert told[0].describe().startswith("whole rows in float32" if plan is None else "8-number sketches in int8")


@pytest.mark.parametrize("factor", [1e-150, 1e-44, 1e-38, 1e-30, 1e20, 1e39, 1e150])
def test_rows_of_any_length_that_float64_holds_are_balanced(factor):
    rows = planted(6, 3, 8, noise=0.01)
    found = balance(rows * factor, threshold=0.07, normalize=True)
    assert found.set_of.tolist() == balance(rows, threshold=0.07).set_of.tolist()
    assert len(found.kept) == 6


def test_one_image_is_its_own_set():
    found = balance(on_circle([10]), threshold=0.07)
    assert (found.kept.tolist(), found.set_of.tolist(), found.removed_share) == ([0], [0], 0)


def test_rows_of_any_length_are_balanced_by_direction_when_asked():
    rows = on_circle([0, 1, 90]) * np.array([[3.0], [0.2], [1.0]])
    with pytest.raises(ValueError, match=r"embeddings must have rows that are of length 1 .* row 0 has length 3"):
        balance(rows, threshold=2e-4)
    assert balance(rows, threshold=2e-4, normalize=True).set_of.tolist() == [0, 0, 1]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["embeddings", "text_embeddings"])
def test_a_row_without_direction_is_always_refused(normalize, value, name):
    arrays = {"embeddings": on_circle([0, 1]), "text_embeddings": on_circle([0, 1])}
    arrays[name][1] = value
    with pytest.raises(ValueError, match=f"^{name} must have rows .* row 1"):
        balance(arrays["embeddings"], text_embeddings=arrays["text_embeddings"], threshold=0.07, normalize=normalize)


@pytest.mark.parametrize(
    ("metric", "threshold", "largest"),
    [
        ("cosine", 0.0, 2),
        ("cosine", -1.0, 2),
        ("cosine", 2.0, 2),
        ("squared_euclidean", 4.0, 4),
        ("euclidean", 2.0, 2),
        ("cosine", float("nan"), 2),
        ("cosine", float("inf"), 2),
    ],
)
def test_a_threshold_nobody_can_mean_is_refused(metric, threshold, largest):
    with pytest.raises(ValueError, match=f"threshold must be above 0 and below {largest} for metric {metric}, got"):
        balance(on_circle([0]), threshold=threshold, metric=metric)


def test_texts_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"text_embeddings must match embeddings of shape \(2, 2\), got \(1, 2\)"):
        balance(on_circle([0, 1]), text_embeddings=on_circle([0]))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        balance(on_circle([0, 1]), text_embeddings=np.eye(3)[:2])
