"""The radar of linear probes: which sets it shows, and that every score is inside its axis."""

import csv
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clip_cid.evaluation.scores import Score
from clip_cid.figures import radar


def columns(path: Path) -> dict[str, list[str]]:
    with open(path, newline="") as handle:
        lines = list(csv.DictReader(handle))
    return {name: [line[name] for line in lines] for name in lines[0]}


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.floats(0, 1)))
def test_every_score_is_inside_its_axis_and_no_axis_is_a_point(values: np.ndarray) -> None:
    low, high = radar.axis_ranges(values)
    assert (low < values).all()
    assert (values < high).all()
    assert (high - low >= 0.02).all()


def test_the_radar_shows_sets_that_every_model_has(tmp_path: Path) -> None:
    found = [
        Score(model, name, "linear_probe", "top1", 0.5 + place / 10)
        for model in ("student", "baseline")
        for place, name in enumerate("abcd")
        if (model, name) != ("baseline", "c")
    ]
    summary = radar.draw(found, tmp_path)
    table = columns(tmp_path / "radar.csv")
    assert table["set"] == ["a", "b", "d"]
    assert [float(value) for value in table["student"]] == summary["student"] == [0.5, 0.6, 0.8]
