import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.errors import DataError
from clip_cid.figures import losses


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


GOOD = [
    {"step": 1, "loss": 3.0, "loss/instance": 2.0, "loss/clip": 1.0, "lr": 0.1, "note": "words"},
    {"step": 5, "loss": 2.5, "loss/instance": 1.5, "loss/clip": 1.0, "lr": 0.2, "note": "words"},
]


def test_parts_come_in_the_order_of_the_paper(tmp_path: Path) -> None:
    metrics = losses.read_metrics(write(tmp_path / "m.jsonl", GOOD))
    assert losses.loss_parts(metrics) == ["loss", "loss/clip", "loss/instance"]
    assert "note" not in metrics


@pytest.mark.parametrize(
    "line",
    [
        {"step": 5, "loss": 1.0, "loss/clip": 1.0, "loss/instance": 0.0},  # not later than step 5
        {"step": 6, "loss": float("nan"), "loss/clip": 1.0, "loss/instance": 0.0},
        {"step": 6, "loss": 1.0, "loss/clip": float("inf"), "loss/instance": 0.0},
        {"step": 6, "loss": 1.0, "loss/clip": 1.0},  # a part is gone
        {"loss": 1.0, "loss/clip": 1.0, "loss/instance": 0.0},
        ["a list"],
    ],
)
def test_a_line_that_is_no_later_step_is_named(tmp_path: Path, line: Any) -> None:
    with pytest.raises(DataError, match=r"m\.jsonl, line 3: "):
        losses.read_metrics(write(tmp_path / "m.jsonl", [*GOOD, line]))


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", GOOD)
    path.write_text(path.read_text() + '{"step": 9, "lo')
    with pytest.raises(DataError, match="line 3"):
        losses.read_metrics(path)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 9))
def test_the_running_mean_is_the_mean_of_the_neighbors(values: list[float], window: int) -> None:
    half = window // 2
    slow = [np.mean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]
    assert losses.running_mean(np.array(values), window) == pytest.approx(np.array(slow), abs=1e-9)


def test_the_csv_holds_what_is_drawn(tmp_path: Path) -> None:
    summary = losses.draw(losses.read_metrics(write(tmp_path / "m.jsonl", GOOD)), tmp_path)
    with open(tmp_path / "losses.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [{name: float(value) for name, value in line.items()} for line in lines] == [
        {name: value for name, value in line.items() if name.startswith(("step", "loss"))} for line in GOOD
    ]
    assert summary["loss"] == {"first": 3.0, "last": 2.5}


@pytest.mark.parametrize("lines", [1, 60])
def test_one_step_and_many_can_be_drawn(tmp_path: Path, lines: int) -> None:
    rows = [{"step": step, "loss": 1 / (1 + step), "loss/clip": 1 / (1 + step)} for step in range(lines)]
    losses.draw(losses.read_metrics(write(tmp_path / "m.jsonl", rows)), tmp_path)
    assert (tmp_path / "losses.svg").stat().st_size > 1000
