"""A log that is not one of a training is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from clip_cid.errors import DataError
from clip_cid.report.drawing.training_log import read_metrics


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


GOOD = [
    {"step": 1, "loss": 3.0, "loss/instance": 2.0, "loss/clip": 1.0, "lr": 0.1, "note": "words"},
    {"step": 5, "loss": 2.5, "loss/instance": 1.5, "loss/clip": 1.0, "lr": 0.2, "note": "words"},
]


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
        read_metrics(write(tmp_path / "m.jsonl", [*GOOD, line]))


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", GOOD)
    path.write_text(path.read_text() + '{"step": 9, "lo')
    with pytest.raises(DataError, match="line 3"):
        read_metrics(path)


@pytest.mark.parametrize(
    "line",
    [
        {"step": 4, "val/clip": 1.0},  # before the training's step 5
        {"step": 5, "val/clip": float("nan")},
        {"step": 5, "note": "nothing measured"},
    ],
)
def test_a_validation_that_cannot_be_is_named(tmp_path: Path, line: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="line 3"):
        read_metrics(write(tmp_path / "m.jsonl", [*GOOD, line]))
