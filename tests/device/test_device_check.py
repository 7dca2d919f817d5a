"""The device check: each line runs, wrong results fail, and nothing passes that was not measured."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device_check
import device_check_lines
import device_check_stages
import numpy as np
import pytest
import torch
from device_check_lines import LINES
from device_check_parts import Bar, Line, Outcome, Place, Skipped
from safetensors.torch import save_file
from tiny_training import make_pairs, make_store

ROOT = Path(__file__).parents[2]
BAR = Bar(0.5)


@pytest.mark.slow
def test_every_line_runs_on_small_data_and_only_speed_is_not_judged(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/device_check.py", "--device", "cpu", "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nincomplete: " in done.stdout

    found = json.loads((tmp_path / "device_check.json").read_text())
    assert found["verdict"] == "incomplete"
    assert [line["name"] for line in found["lines"]] == [line.name for line in LINES]
    verdicts = {line["name"]: line["verdict"] for line in found["lines"]}
    not_judged = {line.name for line in LINES if line.of_speed}
    if left_out := found["lines"][0]["details"]["left out"]:  # tests that need CUDA itself
        not_judged.add("gpu-tests")
        assert all(name in found["lines"][0]["reason"] for name in left_out)
    assert verdicts == {line.name: "skipped" if line.name in not_judged else "passed" for line in LINES}
    assert all(line["number"] for line in found["lines"])
    assert all(bool(line["reason"]) == (line["verdict"] == "skipped") for line in found["lines"])
    assert all(line.what in (tmp_path / "device_check.md").read_text() for line in LINES)
    assert {path.name for path in tmp_path.iterdir()} == {"device_check.json", "device_check.md", "logs"}


# Verdicts


@pytest.mark.parametrize(
    ("outcome", "verdict", "reason"),
    [
        (Outcome(0.5), "passed", ""),
        (Outcome(0.49), "failed", "0.49 is not ≥ 0.5"),
        (Outcome(math.nan), "failed", "not finite"),
        (Outcome(math.inf), "failed", "not finite"),
        (Outcome(0.9, {"the sets are the same": False}), "failed", "not so: the sets are the same"),
        (Outcome(0.9, {"this": True, "that": False}, not_judged="some were left out"), "failed", "not so: that"),
        (Outcome(0.9, not_judged="some were left out"), "skipped", "some were left out"),
    ],
)
def test_a_line_passes_only_with_its_number_and_all_else(outcome: Outcome, verdict: str, reason: str) -> None:
    found, said = device_check.judge(Line("x", "x", BAR, 9, lambda place: outcome), outcome, tiny=False)
    assert found == verdict
    assert reason in said
    assert bool(said) == (verdict != "passed")


def test_speed_on_small_data_is_no_verdict_but_a_wrong_result_is() -> None:
    line = Line("x", "x", BAR, 9, lambda place: Outcome(0), of_speed=True)
    assert device_check.judge(line, Outcome(9.0), tiny=True)[0] == "skipped"
    assert device_check.judge(line, Outcome(9.0, {"right": False}), tiny=True)[0] == "failed"
    assert device_check.judge(line, Outcome(0.1), tiny=False)[0] == "failed"


def test_a_bar_may_be_a_least_or_a_largest_number() -> None:
    assert Bar(1.1, least=False).is_met_by(1.1)
    assert not Bar(1.1, least=False).is_met_by(1.11)
    assert f"{Bar(60, least=False, unit=' s')}" == "≤ 60 s"


def test_one_word_stands_for_all() -> None:
    def results(*verdicts: Any) -> list[device_check.Result]:
        return [device_check.Result("x", "x", "", verdict) for verdict in verdicts]

    every = ["passed"] * (len(LINES) - 1)
    assert device_check.verdict_on_all(results(*every, "passed")) == "passed"
    assert device_check.verdict_on_all(results(*every, "skipped")) == "incomplete"
    assert device_check.verdict_on_all(results(*every)) == "incomplete"
    assert device_check.verdict_on_all(results("skipped", "failed", *every)) == "failed"
    assert device_check.verdict_on_all([]) == "failed"


def test_the_whole_check_takes_less_than_eight_minutes() -> None:
    assert device_check._SECONDS + len(LINES) * 0.5 < 480
    assert "device-check: setup" in (ROOT / "Makefile").read_text()


# Processes


def raises(place: Place) -> Outcome:
    raise RuntimeError("CUDA error: an illegal\nmemory access")


def hangs(place: Place) -> Outcome:
    subprocess.run(["sleep", "1000"], check=True)
    return Outcome(1.0)


def is_killed(place: Place) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(1.0)


def ends(place: Place) -> Outcome:
    sys.exit(0)


def cannot(place: Place) -> Outcome:
    raise Skipped("there is 1 CUDA device here")


def works(place: Place) -> Outcome:
    sys.stdout.write("what it says\n")
    return Outcome(0.7, {"all is well": True}, notes="in a process of its own", details={"process": os.getpid()})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "verdict", "reason"),
    [
        (raises, "failed", "RuntimeError: CUDA error: an illegal memory access"),
        (hangs, "failed", "stopped after its limit of 3 s"),
        (is_killed, "failed", "its process ended by itself, exit code -9"),
        (ends, "failed", "SystemExit: 0"),
        (cannot, "skipped", "there is 1 CUDA device here"),
        (works, "passed", ""),
    ],
)
def test_no_line_can_harm_another(
    tmp_path: Path, measure: Callable[[Place], Outcome], verdict: str, reason: str
) -> None:
    began = time.monotonic()
    place = Place("cpu", True, tmp_path)
    found = device_check.run(Line("x", "x", BAR, 9, measure), place, tmp_path, limit=3 if measure is hangs else 600)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert time.monotonic() - began < 500
    if measure is works:
        assert (tmp_path / "x.txt").read_text() == "what it says\n"
        assert (found.number, found.notes) == ("0.7", "in a process of its own; all is well")
        assert found.details["process"] != os.getpid()


def test_results_are_written_after_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(line: Line, *_: Any) -> device_check.Result:
        if line.name == LINES[2].name:
            raise KeyboardInterrupt
        return device_check.Result(line.name, line.what, "", "passed")

    monkeypatch.setattr(device_check, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        device_check.main(device_check.Options(device="cpu", tiny=True, out=tmp_path))
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert [line["name"] for line in found["lines"]] == [line.name for line in LINES[:2]]
    assert found["verdict"] == "incomplete"
    assert not list(tmp_path.glob("work-*"))


def test_results_of_an_earlier_check_are_not_taken_for_those_of_one_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def passed(line: Line, *_: Any) -> device_check.Result:
        return device_check.Result(line.name, line.what, "", "passed", details={"error": math.nan})

    def stopped(*_: Any) -> device_check.Result:
        raise KeyboardInterrupt

    options = device_check.Options(device="cpu", tiny=True, out=tmp_path)
    monkeypatch.setattr(device_check, "run", passed)
    assert device_check.main(options) == 0
    first = (tmp_path / "device_check.json").read_text()
    assert json.loads(first, parse_constant=pytest.fail)["verdict"] == "passed"
    assert "earlier check" not in capsys.readouterr().out

    (tmp_path / "work-left").mkdir()
    monkeypatch.setattr(device_check, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        device_check.main(options)
    assert json.loads((tmp_path / "device_check.json").read_text())["verdict"] == "failed"
    (aside,) = tmp_path.glob("earlier-*")
    assert (aside / "device_check.json").read_text() == first
    assert {path.name for path in aside.iterdir()} == {"device_check.json", "device_check.md", "logs"}
    said = capsys.readouterr().out
    assert f"The results of an earlier check are in {aside}." in said
    assert f"{tmp_path / 'work-left'} is of a check that was killed" in said


def test_lines_that_are_not_asked_for_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def passed(line: Line, *_: Any) -> device_check.Result:
        ran.append(line.name)
        return device_check.Result(line.name, line.what, "", "passed")

    monkeypatch.setattr(device_check, "run", passed)
    options = device_check.Options(device="cpu", tiny=True, out=tmp_path, only=("cluster",))
    assert device_check.main(options) == 0
    assert ran == ["sample", "cluster"]
    lines = json.loads((tmp_path / "device_check.json").read_text())["lines"]
    assert {line["name"] for line in lines if line["reason"] == "not asked for"} == {line.name for line in LINES} - {
        *ran
    }
    assert device_check.main(dataclasses.replace(options, only=("clusters",))) == 2


def test_a_device_that_is_not_here_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert device_check.main(device_check.Options(device="cuda:99", out=out)) == 1
    assert "machine.device is cuda:99" in capsys.readouterr().err
    assert not out.exists()


# Wrong results


def is_within(found: dict[str, float]) -> bool:
    return device_check_stages._largest(found) <= 1


def test_an_embedding_that_is_another_fails(tmp_path: Path) -> None:
    for name in ("cpu", "device"):
        make_store(tmp_path / name / "embed", make_pairs(tmp_path / "pairs"))
    cpu, device = tmp_path / "cpu", tmp_path / "device"
    assert is_within(device_check_stages.compare_embed(cpu, device, 1e-5))
    (path,) = (device / "embed" / "img_emb").glob("*.npy")
    rows = np.load(path)
    rows[3] = np.roll(rows[3], 1)
    np.save(path, rows)
    assert not is_within(device_check_stages.compare_embed(cpu, device, 1e-2))
    rows[3] = np.nan
    np.save(path, rows)
    assert not is_within(device_check_stages.compare_embed(cpu, device, 1e-2))


def test_one_entry_that_differs_is_one_too_many(tmp_path: Path) -> None:
    for name, values in (("cpu", [0, 1, 2]), ("same", [0, 1, 2]), ("other", [0, 1, 1]), ("short", [0, 1])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "kept.npy", values)

    def differing(name: str) -> float:
        return device_check_stages.compare_arrays(tmp_path / "cpu", tmp_path / name, ("kept.npy",))["kept.npy"]

    assert [differing(name) for name in ("same", "other", "short")] == [0, 1, 3]
    bars = {line.name: line.bar for line in device_check_stages.LINES}
    for stage in device_check_stages.EXACT:
        assert bars[stage].is_met_by(0)
        assert not bars[stage].is_met_by(1)


def write_student(run: Path, losses: list[float], weights: torch.Tensor) -> Path:
    (run / "distill/student").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss, "lr": step}) for step, loss in enumerate(losses)]
    (run / "distill/metrics.jsonl").write_text("\n".join(lines))
    save_file({"a": weights}, run / "distill/student/open_clip_model.safetensors")
    return run


def test_a_student_that_learned_something_else_fails(tmp_path: Path) -> None:
    weights = torch.ones(100)
    cpu = write_student(tmp_path / "cpu", [3.0, 2.0], weights)
    good = write_student(tmp_path / "good", [3.001, 2.0], 1.001 * weights)
    assert is_within(device_check_stages.compare_distill(cpu, good))
    wrong = {
        "loss": ([3.0, 2.01], weights),
        "no number": ([3.0, math.nan], weights),
        "weights": ([3.0, 2.0], 1.1 * weights),
        "nan weights": ([3.0, 2.0], math.nan * weights),
    }
    for name, (losses, others) in wrong.items():
        assert not is_within(
            device_check_stages.compare_distill(cpu, write_student(tmp_path / name, losses, others))
        ), name
    with pytest.raises(ValueError, match="other steps"):
        device_check_stages.compare_distill(cpu, write_student(tmp_path / "fewer", [3.0], weights))


def test_answers_that_are_others_fail(tmp_path: Path) -> None:
    for run, differing in (("cpu", 0), ("good", 2), ("wrong", 3)):
        folder = tmp_path / run / "evaluate/answers"
        folder.mkdir(parents=True)
        predicted = np.zeros(30, dtype=np.int16)
        predicted[:differing] = 1
        np.savez(folder / f"colors-knn-{run}.npz", predicted=predicted)
    cpu = tmp_path / "cpu"
    assert device_check_stages.compare_evaluate(cpu, tmp_path / "good") == {"colors-knn": 1.0}
    assert not is_within(device_check_stages.compare_evaluate(cpu, tmp_path / "wrong"))
    (tmp_path / "good/evaluate/answers/colors-knn-good.npz").unlink()
    with pytest.raises(ValueError, match="other sets"):
        device_check_stages.compare_evaluate(cpu, tmp_path / "good")


def verdict(name: str, tmp_path: Path) -> str:
    line, place = next(line for line in LINES if line.name == name), Place("cpu", True, tmp_path)
    return device_check.judge(line, line.measure(place), tiny=True)[0]


def test_a_wrong_product_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check_lines, "matrix_rate", lambda kind, place: 1.0)
    assert verdict("products", tmp_path) == "passed"
    right = device_check_lines.int8_product
    monkeypatch.setattr(device_check_lines, "int8_product", lambda left, others: right(left, others) + 1)
    assert verdict("products", tmp_path) == "failed"


def test_sets_that_were_not_made_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check_lines, "matrix_rate", lambda kind, place: 1.0)
    right = device_check_lines.balance
    for threshold, expected in ((0.07, "skipped"), (1e-9, "failed"), (0.5, "failed")):
        monkeypatch.setattr(
            device_check_lines,
            "balance",
            lambda rows, device, threshold=threshold: right(rows, device=device, threshold=threshold),
        )
        assert verdict("balance-rate", tmp_path) == expected
