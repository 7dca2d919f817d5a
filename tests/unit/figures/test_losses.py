import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.figures import losses
from clip_cid.report.drawing.training_log import read_metrics


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


GOOD = [
    {"step": 1, "loss": 3.0, "loss/instance": 2.0, "loss/clip": 1.0, "lr": 0.1, "note": "words"},
    {"step": 5, "loss": 2.5, "loss/instance": 1.5, "loss/clip": 1.0, "lr": 0.2, "note": "words"},
]


def test_parts_come_in_the_order_of_the_paper(tmp_path: Path) -> None:
    metrics = read_metrics(write(tmp_path / "m.jsonl", GOOD))
    assert losses.loss_parts(metrics) == ["loss", "loss/clip", "loss/instance"]
    assert "note" not in metrics


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 9))
def test_the_running_mean_is_the_mean_of_the_neighbors(values: list[float], window: int) -> None:
    half = window // 2
    slow = [np.mean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]
    assert losses.running_mean(np.array(values), window) == pytest.approx(np.array(slow), abs=1e-9)


def test_the_csv_holds_what_is_drawn(tmp_path: Path) -> None:
    summary = losses.draw(read_metrics(write(tmp_path / "m.jsonl", GOOD)), tmp_path)
    with open(tmp_path / "losses.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [{name: float(value) for name, value in line.items()} for line in lines] == [
        {name: value for name, value in line.items() if name.startswith(("step", "loss"))} for line in GOOD
    ]
    assert summary["loss"] == {"first": 3.0, "last": 2.5}


@pytest.mark.parametrize("lines", [1, 60])
def test_one_step_and_many_can_be_drawn(tmp_path: Path, lines: int) -> None:
    rows = [{"step": step, "loss": 1 / (1 + step), "loss/clip": 1 / (1 + step)} for step in range(lines)]
    losses.draw(read_metrics(write(tmp_path / "m.jsonl", rows)), tmp_path)
    assert (tmp_path / "losses.svg").stat().st_size > 1000


SPLIT = ("loss", "loss/clip", "loss/cluster_kl", "loss/instance_image", "loss/instance_text", "loss/other")


def test_parts_that_are_named_nowhere_are_drawn_behind_those_of_the_paper(tmp_path: Path) -> None:
    rows = [{"step": step, "grad_norm/clip": 1.0, **dict.fromkeys(reversed(SPLIT), 1 / step)} for step in (1, 2, 3)]
    metrics = read_metrics(write(tmp_path / "m.jsonl", rows))
    assert losses.loss_parts(metrics) == list(SPLIT)
    assert list(losses.draw(metrics, tmp_path)) == list(SPLIT)
    svg = (tmp_path / "losses.svg").read_text()
    for name in ("total", "CLIP", "cluster KL", "instance image", "instance text", "other"):
        assert f">{name}<" in svg
    assert "grad" not in svg
    assert "validation" not in svg


@pytest.mark.slow
@pytest.mark.parametrize("own_lines", [True, False])
def test_what_a_validation_measured_is_drawn_beside_the_training(tmp_path: Path, own_lines: bool) -> None:
    rows: list[dict[str, Any]] = []
    for step in (1, 2, 3, 4):
        rows.append({"step": step, "loss": 2.0 / step, "loss/clip": 1.0 / step, "loss/other": 1.0 / step})
        if step % 2 == 0:
            measured = {"val/loss/clip": 1.5 / step, "val/recall": step / 10}
            rows += [{"step": step, **measured}] if own_lines else []
            rows[-1] |= {} if own_lines else measured
    metrics = read_metrics(write(tmp_path / "m.jsonl", rows))
    summary = losses.draw(metrics, tmp_path)
    assert list(summary) == ["loss", "loss/clip", "loss/other", "val/loss/clip", "val/recall"]
    assert summary["val/loss/clip"] == {"first": 0.75, "last": 0.375}
    assert summary["loss/clip"] == {"first": 1.0, "last": 0.25}
    assert losses.display_name("val/loss/clip") == "CLIP (validation)"
    with open(tmp_path / "losses.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["val/recall"] for line in lines if line["val/recall"]] == ["0.2", "0.4"]
    assert [line["loss"] for line in lines if line["loss"]] == ["2.0", "1.0", "0.6666666666666666", "0.5"]
    svg = (tmp_path / "losses.svg").read_text()
    assert svg.count(">CLIP<") == 1
    assert ">validation<" in svg


def test_one_part_with_a_validated_total_keeps_the_total(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, "loss/clip": 1.0, "val/loss": 2.0} for step in (1, 2)]
    losses.draw(read_metrics(write(tmp_path / "m.jsonl", rows)), tmp_path)
    assert ">total<" in (tmp_path / "losses.svg").read_text()


def test_a_null_is_a_gap_and_the_numbers_behind_a_mean_share_its_panel(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0, "loss/clip": 1.0, "loss/kl": 0.5, "collapse": "words"},
        {"step": 2, "loss": None, "loss/clip": None, "loss/kl": 0.5},
        {"step": 2, "val/retrieval/R@1": 0.2, "val/retrieval/R@5": 0.4, "val/retrieval": 0.3},
        {"step": 3, "loss": 0.5, "loss/clip": 0.25, "loss/kl": 0.25},
    ]
    summary = losses.draw(read_metrics(write(tmp_path / "m.jsonl", rows)), tmp_path)
    assert list(summary) == ["loss", "loss/clip", "loss/kl", "val/retrieval"]
    assert summary["loss/clip"] == {"first": 1.0, "last": 0.25}
    with open(tmp_path / "losses.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["loss"] for line in lines] == ["1.0", "", "", "0.5"]
    assert [line["val/retrieval/R@5"] for line in lines] == ["", "", "0.4", ""]
    svg = (tmp_path / "losses.svg").read_text()
    assert svg.count(">retrieval<") == 1
    assert "R@" not in svg


def test_a_loss_that_was_never_finite_has_no_panel(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, "loss/clip": None, "loss/kl": 1.0} for step in (1, 2)]
    assert list(losses.draw(read_metrics(write(tmp_path / "m.jsonl", rows)), tmp_path)) == ["loss", "loss/kl"]
