"""What the files of a training that has not finished say of it; the numbers are worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from clip_cid.errors import DataError
from clip_cid.run_folder import RunFolder
from clip_cid.training.so_far import TrainingSoFar


def line(step: int, **more: Any) -> dict[str, Any]:
    """Batches of 8 from epochs of 20 pairs."""
    return {"step": step, "pairs_seen": 8 * step, "epoch": 8 * step / 20, "loss": 2.5, "pairs_per_s": 4.0} | more


def begun(path: Path, lines: list[dict[str, Any]], torn: str = "", **distill: Any) -> RunFolder:
    folder = RunFolder(path)
    settings = {"distill": distill or {"epochs": 10, "steps": None}}
    part = folder.begin("distill", {"version": 4, "settings": settings, "inputs": {}}, resumable=True).part
    if lines or torn:
        (part / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + torn)
    return folder


def read(folder: RunFolder) -> TrainingSoFar:
    training = TrainingSoFar.unfinished(folder)
    assert training is not None
    return training


def test_no_training_has_begun_in_a_new_run(tmp_path: Path):
    assert TrainingSoFar.unfinished(RunFolder(tmp_path)) is None
    assert TrainingSoFar.finished(RunFolder(tmp_path)) is None


def test_steps_follow_from_the_epochs_as_the_training_counts_them(tmp_path: Path):
    # 10 epochs of 20 pairs are 200 pairs, which is 25 batches of 8.
    training = read(begun(tmp_path, [line(1), line(5)]))
    assert (training.step, training.steps) == (5, 25)


def test_given_steps_count_before_the_first_line(tmp_path: Path):
    training = read(begun(tmp_path, [], steps=40))
    assert (training.step, training.steps, training.seconds_left) == (0, 40, None)
    assert str(training) == "no step is logged yet"


def test_without_a_line_epochs_say_nothing_of_steps(tmp_path: Path):
    assert read(begun(tmp_path, [])).steps is None


def test_the_time_left_is_that_of_the_pairs_left_at_the_speed_of_the_last_ten_lines(tmp_path: Path):
    # A line at 1 pair/s long ago does not count. Of the last ten, five lines of equal length at 4 and five at 12
    # pairs/s are 6 pairs/s together. 40 - 11 steps of 8 pairs are left.
    lines = [line(1, pairs_per_s=1.0), *(line(step, pairs_per_s=4.0 if step % 2 else 12.0) for step in range(2, 12))]
    training = read(begun(tmp_path, lines, steps=40))
    assert training.pairs_per_s == pytest.approx(6.0)
    assert training.seconds_left == pytest.approx(29 * 8 / 6)
    assert str(training) == "step 11 of 40, loss 2.500, 38.7s to go"


def test_measurements_and_a_line_that_is_being_written_do_not_count(tmp_path: Path):
    lines = [line(1), {"step": 1, "pairs_seen": 8, "val/loss": 3.0}]
    training = read(begun(tmp_path, lines, torn='{"step": 2, "lo', steps=40))
    assert [one["step"] for one in training.lines] == [1]


def test_a_warning_of_a_collapse_is_said_with_its_step(tmp_path: Path):
    training = read(begun(tmp_path, [line(1), line(2, collapse="one point"), line(3, loss=None)], steps=4))
    assert training.collapse == (2, "one point")
    assert str(training) == "step 3 of 4, loss not finite, 2.0s to go, looks like a collapse"


def test_a_damaged_log_is_named(tmp_path: Path):
    folder = begun(tmp_path, [line(1)], torn="no json\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: not the log of a training"):
        TrainingSoFar.unfinished(folder)
