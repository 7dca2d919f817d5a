import csv
from pathlib import Path

import numpy as np
import oracles
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.data.balance.tables import BalanceTables, write_tables
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.semantic_balance import Balance, balance
from clip_cid.method.balance.set_explanation import explain
from clip_cid.method.unit_rows import UnitRows
from clip_cid.report.drawing import removed_sets
from clip_cid.report.drawing.removed_sets import RemovedSet, choose, choose_pairs, distance_note


def cosine_of(degrees: float) -> float:
    """The cosine distance of two points of the circle this far apart."""
    return 1 - float(np.cos(np.deg2rad(degrees)))


def tables_of(
    degrees: list[float], threshold: float, out: Path, kinds: list[int] | None = None
) -> tuple[BalanceTables, Balance]:
    """What balance writes of points on a circle, whose distances can be worked out by hand."""
    angles = np.deg2rad(degrees)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    links, squared = oracles.spanning_forest(rows, 2 * threshold)
    ends = np.array(links, dtype=np.int64).reshape(-1, 2)
    forest = Forest(len(rows), ends[:, 0], ends[:, 1], np.array(squared), 2 * threshold)
    result = balance(rows, threshold=threshold)
    images = UnitRows(rows, name="rows", any_length=False)
    found = explain(images, result.kept, result.set_of, forest, 2 * threshold)
    keys = pa.array([f"key {row}" for row in range(len(rows))], pa.large_string())
    numbers = None if kinds is None else np.array(kinds, dtype=np.int8)
    columns = found.set_columns("cosine"), found.member_columns("cosine")
    write_tables(out, keys, *columns, metric="cosine", threshold=threshold, kinds=numbers)
    return BalanceTables(out), result


def chosen(degrees: list[float], threshold: float, out: Path, *, sets: int = 24) -> list[RemovedSet]:
    return choose(tables_of(degrees, threshold, out)[0], sets=sets, seed=0)


def test_a_chain_is_wider_than_the_threshold(tmp_path: Path) -> None:
    (chain,) = chosen([0, 10, 20, 30.5, 180], cosine_of(10.6), tmp_path)
    assert (chain.size, chain.component_size, chain.widest_exact) == (4, 4, True)
    assert chain.widest == pytest.approx(cosine_of(30.5))
    assert chain.weakest_link == pytest.approx(cosine_of(10.5))
    assert chain.farthest == chain.distances[-1]


@pytest.mark.slow
@given(degrees=st.lists(st.floats(0, 359), min_size=3, max_size=40), sets=st.integers(1, 9), seed=st.integers(0, 3))
def test_sets_shown_are_whole_different_and_nearest_first(
    tmp_path_factory: pytest.TempPathFactory, degrees: list[float], sets: int, seed: int
) -> None:
    tables, found = tables_of(degrees, 0.001, tmp_path_factory.mktemp("tables"))
    sizes = np.bincount(found.set_of)
    shown = choose(tables, sets=sets, seed=seed)
    assert len(shown) == min(sets, (sizes > 1).sum())
    assert len({one.set for one in shown}) == len(shown)
    for one in shown:
        members = set(np.flatnonzero(found.set_of == one.set).tolist())
        assert one.kept == found.kept[one.set]
        assert {one.kept, *one.rows.tolist()} == members
        assert one.size == len(members)
        assert (np.diff(one.distances) >= 0).all()
    largest = [one.size for one in shown if one.stratum == "largest"]
    assert largest == sorted(sizes[sizes > 1], reverse=True)[: len(largest)]


def test_the_stratum_at_the_threshold_holds_the_sets_nearest_to_it(tmp_path: Path) -> None:
    gaps = [1.0, 2.0, 3.0, 4.0]
    degrees = [angle for place, gap in enumerate(gaps) for angle in (50 * place, 50 * place + gap)]
    shown = chosen(degrees, cosine_of(4.1), tmp_path, sets=2)
    at_threshold = next(one for one in shown if one.stratum == "at the threshold")
    assert at_threshold.distances == pytest.approx([cosine_of(4)])


def test_a_chain_is_not_at_the_threshold_because_its_ends_are(tmp_path: Path) -> None:
    """Five images 2.05 degrees apart: the ends are 4.1 from the kept one in the middle, but no link is near 4.1."""
    degrees = np.concatenate([2.05 * np.arange(5), [100, 104], 200 + np.arange(6)])
    shown = chosen(degrees.tolist(), cosine_of(4.1), tmp_path, sets=2)
    assert [(one.stratum, one.size) for one in shown] == [("largest", 6), ("at the threshold", 2)]


def test_a_set_too_large_to_show_keeps_its_size(tmp_path: Path) -> None:
    (one,) = chosen(list(np.linspace(0, 1, 100)), 0.1, tmp_path)
    assert (one.size, len(one.rows), len(one.kinds)) == (100, 60, 60)


def test_pairs_of_a_kind_are_of_different_sets_and_each_with_its_own_kept_image(tmp_path: Path) -> None:
    degrees = [0, 1, 2, 90, 91, 180, 181.5, 270, 271]  # the first set is of three
    tables, found = tables_of(degrees, cosine_of(1.6), tmp_path, kinds=[1, 1, 2, 1, 3])
    pairs = choose_pairs(tables, pairs=5, seed=0)
    assert [pair.kind for pair in pairs] == ["perceptual", "perceptual", "semantic"]
    assert len({pair.kept for pair in pairs}) == 3
    for pair in pairs:
        assert pair.kept == found.kept[found.set_of[pair.row]] != pair.row
        assert pair.distance == pytest.approx(cosine_of(abs(degrees[pair.row] - degrees[pair.kept])))
    assert pairs[0].distance < pairs[1].distance
    assert [pair.kind for pair in choose_pairs(tables, pairs=1, seed=1)] == ["perceptual", "semantic"]
    assert choose_pairs(tables_of(degrees, cosine_of(1.6), tmp_path)[0], pairs=5, seed=0) == []


def test_a_kind_is_told_where_it_is_known() -> None:
    assert [distance_note(0.0421, kind) for kind in ("perceptual", "semantic", "unknown", "")] == [
        "0.042 perceptual",
        "0.042 semantic",
        "0.042",
        "0.042",
    ]


def test_the_tables_survive_captions_with_commas_quotes_and_lines(tmp_path: Path) -> None:
    tables, _ = tables_of([0, 0.5, 90], 0.01, tmp_path, kinds=[2])
    shown, pairs = choose(tables, sets=24, seed=0), choose_pairs(tables, pairs=5, seed=0)
    captions = {row: f'a "{row}",\nb' for row in range(3)}
    keys = {row: f"key,{row}" for row in range(3)}
    removed_sets.write_table(shown, keys, captions, tmp_path / "sets.csv")
    removed_sets.write_pairs(pairs, keys, captions, tmp_path / "pairs.csv")
    for name in ("sets", "pairs"):
        with open(tmp_path / f"{name}.csv", newline="") as handle:
            lines = list(csv.DictReader(handle))
        assert len(lines) == 2
        assert float(lines[0]["distance"]) == 0
        assert float(lines[1]["distance"]) == shown[0].distances[0] == pairs[0].distance
        assert lines[1]["kind"] == "semantic"
        assert [line["caption"] for line in lines] == [captions[int(line["row"])] for line in lines]
        assert [line["key"] for line in lines] == [keys[int(line["row"])] for line in lines]
