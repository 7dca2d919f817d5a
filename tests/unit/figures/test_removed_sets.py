import csv
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.figures import removed_sets
from clip_cid.figures.removed_sets import RemovedSet
from clip_cid.method.semantic_balance import Metric, balance, threshold_on


def unit(degrees: list[float]) -> np.ndarray:
    """Points on a circle: distances can be worked out by hand."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def chosen(embeddings: np.ndarray, threshold: float, *, sets: int = 24, seed: int = 0) -> list[RemovedSet]:
    found = balance(embeddings, threshold=threshold)
    removed, distances = removed_sets.distances_to_kept(embeddings, found.kept, found.set_of, metric="cosine")
    return removed_sets.choose(
        *(embeddings, found.kept, found.set_of, removed, distances),
        metric="cosine",
        threshold=threshold,
        sets=sets,
        seed=seed,
    )


def test_distances_are_those_to_the_kept_row_and_kept_rows_have_none() -> None:
    embeddings = unit([0, 60, 90, 180])
    removed, distances = removed_sets.distances_to_kept(
        embeddings, np.array([0, 2]), np.array([0, 0, 1, -1]), metric="cosine"
    )
    assert removed.tolist() == [1]
    assert distances == pytest.approx([0.5])


@pytest.mark.parametrize("metric", get_args(Metric))
def test_scales_agree_with_the_thresholds_of_balance(metric: Metric) -> None:
    assert removed_sets.on_metric(np.array([0.14]), metric) == pytest.approx(
        [threshold_on("squared_euclidean", 0.14, metric)]
    )


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="'manhattan'"):
        removed_sets.on_metric(np.array([0.1]), "manhattan")


def test_stored_vectors_of_uneven_length_do_not_change_the_distance() -> None:
    embeddings = unit([0, 1]) * np.array([[1.003], [0.998]])
    _, distances = removed_sets.distances_to_kept(embeddings, np.array([0]), np.array([0, 0]), metric="cosine")
    assert distances == pytest.approx([1 - np.cos(np.deg2rad(1))], rel=1e-9)


def test_a_chain_is_wider_than_the_threshold() -> None:
    (chain,) = chosen(unit([0, 10, 20, 30, 180]), 1 - np.cos(np.deg2rad(10.5)))
    assert chain.size == 4
    assert chain.widest == pytest.approx(1 - np.cos(np.deg2rad(30)))


@given(st.lists(st.floats(0, 359), min_size=3, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_sets_shown_are_whole_different_and_nearest_first(degrees: list[float], sets: int, seed: int) -> None:
    embeddings = unit(degrees)
    found = balance(embeddings, threshold=0.001)
    sizes = np.bincount(found.set_of)
    shown = chosen(embeddings, 0.001, sets=sets, seed=seed)
    assert len(shown) == min(sets, (sizes > 1).sum())
    assert len({one.set for one in shown}) == len(shown)
    for one in shown:
        members = set(np.flatnonzero(found.set_of == one.set).tolist())
        assert {one.kept, *one.rows.tolist()} == members
        assert one.size == len(members)
        assert (np.diff(one.distances) >= 0).all()
    largest = [one.size for one in shown if one.stratum == "largest"]
    assert largest == sorted(sizes[sizes > 1], reverse=True)[: len(largest)]


def test_the_stratum_at_the_threshold_holds_the_sets_nearest_to_it() -> None:
    gaps = [1.0, 2.0, 3.0, 4.0]
    degrees = [angle for place, gap in enumerate(gaps) for angle in (50 * place, 50 * place + gap)]
    shown = chosen(unit(degrees), 1 - np.cos(np.deg2rad(4.1)), sets=2)
    at_threshold = next(one for one in shown if one.stratum == "at the threshold")
    assert at_threshold.distances == pytest.approx([1 - np.cos(np.deg2rad(4))])


def test_a_set_too_large_to_show_keeps_its_size() -> None:
    (one,) = chosen(unit(list(np.linspace(0, 1, 100))), 0.1)
    assert (one.size, len(one.rows)) == (100, 60)


def test_the_table_survives_captions_with_commas_quotes_and_lines(tmp_path: Path) -> None:
    shown = chosen(unit([0, 0.5, 90]), 0.01)
    captions = {row: f'a "{row}",\nb' for row in range(3)}
    removed_sets.write_table(shown, {row: f"key,{row}" for row in range(3)}, captions, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["place"] for line in lines] == ["0", "1"]
    assert float(lines[0]["distance"]) == 0
    assert float(lines[1]["distance"]) == shown[0].distances[0]
    assert [line["caption"] for line in lines] == [captions[int(line["row"])] for line in lines]
