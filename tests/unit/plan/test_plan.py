"""The arithmetic by hand and by laws, with made-up rates; what is measured is tried once, on a tiny run."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from clip_cid import cli, plan
from clip_cid.check import Report
from clip_cid.check.estimates import Disk, Duration
from clip_cid.errors import ConfigError, RunError
from clip_cid.plan import Forecast, find_misfits, rates, refusal
from clip_cid.plan.costs import Scale, StageCost, stage_costs
from clip_cid.plan.rates import Rates
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder

HOUR = 3600.0
RATES = Rates(
    device=torch.device("cpu"),
    index=1e-4,
    pair_bytes=25_000.0,
    captions=1.0,
    teacher=1e-2,
    teacher_how="measured",
    product=1e12,
    balance=lambda count: 1e-5 * count + 1e-12 * count**2,
    assign_row=1e-6,
    assign_center=1e-9,
    rows_how="sampled",
    sha256=2e9,
    write=1e9,
    read=1e9,
    opening=1e-5,
)


class Steps(NamedTuple):
    """Of a rehearsal."""

    steps: int
    memory_gib: float


def report_of(recipe: Recipe, *, tried: int = 64, compute: float = 0.5, soft: float | None = None) -> Report:
    """What a check of steps of `tried` pairs says, as far as a plan reads it."""
    report = Report.__new__(Report)
    small = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"batch_size": tried})})
    known: dict[str, Any] = {
        "recipe": small,
        "pairs": 1_000,
        "teacher": None,
        "student": None,
        "soft_seconds": soft,
        "label_seconds": None,
        "duration": Duration(100, compute, 0.0, overlaps=True),
        "rehearsal": Steps(10, 2.0),
        "disk": Disk(10**8, 3 * 10**8, 10**8, 0, 0, 10**6, 0, 10**12),
    }
    for name, value in known.items():
        object.__setattr__(report, name, value)
    return report


def recipe_of(**distill: Any) -> Recipe:
    cluster = {"num_centers": 1_000, "iterations": 10, "max_points_per_center": 100}
    return parse_recipe({"cluster": cluster, "distill": {"batch_size": 1_024, "epochs": 2, **distill}}, where="test")


def scale_of(pairs: int, devices: int = 8) -> Scale:
    return Scale(pairs, pairs // 2, devices, 512, 0.5, "sampled")


def stages_of(recipe: Recipe, scale: Scale) -> dict[str, StageCost]:
    return {stage.name: stage for stage in stage_costs(recipe, scale, RATES, report_of(recipe))}


def forecast_of(recipe: Recipe, pairs: int, *, free: float = 1e15, memory: float = 1e15) -> Forecast:
    scale = scale_of(pairs)
    stages = stage_costs(recipe, scale, RATES, report_of(recipe))
    forecast = Forecast(scale, RATES, stages, 2.5, free, memory, [])
    return dataclasses.replace(forecast, misfits=find_misfits(recipe, forecast, report_of(recipe)))


def test_the_stages_of_a_million_pairs_by_hand():
    stages = stages_of(recipe_of(), scale_of(1_000_000))
    assert list(stages) == ["index", "embed", "balance", "cluster", "distill"]
    assert stages["index"].seconds == pytest.approx(100)

    written = 4 * 512 * 1e6
    assert stages["embed"].seconds == pytest.approx(1e4 + written / 1e9 + written / 2e9)
    assert stages["embed"].disk == written
    assert stages["embed"].tasks == 100
    assert stages["embed"].read == pytest.approx(written + 25_000 * 1e6)

    assert stages["balance"].seconds == pytest.approx(10 + 1)
    assert stages["balance"].tasks == 1

    # Ten rounds over 100,000 rows and one over 500,000, against 1,000 centers; then the start and the quality.
    rows = 10 * 100_000 + 500_000
    start = 12 * 100_000 * (1e-6 + 1_000**0.5 * 1e-9)
    assert stages["cluster"].seconds == pytest.approx(rows * 2e-6 + start + 2 * 500_000 * 1e-6)

    # 976 steps of 1,024 pairs, each pair 0.5 s / 64.
    assert stages["distill"].seconds == pytest.approx(976 * 1_024 * 0.5 / 64)
    assert stages["distill"].devices == 8
    assert stages["distill"].hours == pytest.approx(stages["distill"].seconds / 8 / HOUR)


def test_all_devices_are_paid_for_while_one_works():
    forecast = forecast_of(recipe_of(), 1_000_000)
    assert forecast.hours == pytest.approx(sum(stage.seconds / stage.devices for stage in forecast.stages) / HOUR)
    assert forecast.money == pytest.approx(2.5 * 8 * forecast.hours)
    assert forecast.device_hours == pytest.approx(sum(stage.seconds for stage in forecast.stages) / HOUR)


def test_each_further_caption_takes_room():
    scale, recipe = scale_of(1_000_000), recipe_of()
    one, three = (
        stage_costs(recipe, scale, dataclasses.replace(RATES, captions=captions), report_of(recipe))[1]
        for captions in (1.0, 3.0)
    )
    assert three.disk - one.disk == 2 * 2 * 512 * 1_000_000


@pytest.mark.parametrize("name", ["seconds", "tasks", "disk", "work_disk", "read", "memory"])
def test_more_pairs_never_take_less(name: str):
    sizes = [stages_of(recipe_of(), scale_of(10**power)) for power in range(4, 9)]
    for less, more in itertools.pairwise(sizes):
        stages = [stage for stage in more if (stage, name) != ("balance", "tasks")]  # its tasks grow, too
        assert all(getattr(more[stage], name) >= getattr(less[stage], name) for stage in stages)


def test_stages_that_a_recipe_does_not_use_cost_nothing():
    values = {"embed": {"teacher": "none"}, "distill": {"weights": "clip-only", "batch_size": 1_024, "epochs": 2}}
    assert list(stages_of(parse_recipe(values, where="test"), scale_of(10**6))) == ["index", "distill"]


def test_soft_centers_take_their_seconds_and_their_disk():
    plain, soft = recipe_of(sample_rate=0.5), recipe_of(sample_rate=1.0)
    scale = scale_of(1_000_000)
    costs_of = {
        recipe.distill.sample_rate: stage_costs(recipe, scale, RATES, report_of(recipe, soft=seconds))[-1]
        for recipe, seconds in ((plain, None), (soft, 3.0))
    }
    assert costs_of[1.0].seconds - costs_of[0.5].seconds == pytest.approx(500_000 * 3.0 / 1_000)
    assert costs_of[1.0].work_disk - costs_of[0.5].work_disk == 500_000 * (4 * 512 + 8)


@pytest.mark.parametrize("short", [0.5, 0.9])
def test_the_setting_that_makes_room_on_the_disk_does(short: float):
    recipe = recipe_of(sample_rate=1.0)
    needed = forecast_of(recipe, 10**6).disk
    forecast = forecast_of(recipe, 10**6, free=short * needed)
    (misfit,) = forecast.misfits
    assert "free, but 1,000,000 pairs need" in misfit.problem
    if "sample_rate" in misfit.fix:
        changed = recipe_of(sample_rate=0.1)
        assert forecast_of(changed, 10**6).disk <= short * needed
    else:
        fits = int(misfit.fix.split("--pairs ")[1].split()[0])
        assert 0.9 * short * needed < forecast_of(recipe, fits).disk <= short * needed


def test_the_number_of_centers_that_fits_the_memory_does():
    recipe = recipe_of()
    recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"num_centers": 1_000_000})})
    memory = 8e9
    found = {misfit.problem.split()[0]: misfit for misfit in forecast_of(recipe, 10**7, memory=memory).misfits}
    fits = int(found["cluster"].fix.split()[5].replace(",", ""))
    assert "Set cluster.num_centers to at most" in found["cluster"].fix
    smaller = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"num_centers": fits})})
    names = {misfit.problem.split()[0] for misfit in forecast_of(smaller, 10**7, memory=memory).misfits}
    assert "cluster" not in names


def test_several_misfits_are_told_together_with_exit_code_1():
    error = refusal([RunError("One.", fix="Mend it."), RunError("Two.", fix="And that.")])
    assert error.exit_code == 1
    assert "2 things do not fit" in error.problem
    assert all(words in error.problem for words in ("One.", "Mend it.", "Two.", "And that."))
    assert refusal([error]) is error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pairs": float("nan")}, "--pairs: nan is not a number of pairs"),
        ({"pairs": 0}, "--pairs: 0 is not a number of pairs"),
        ({"pairs": 1000.5}, "--pairs: 1000.5 is not a number of pairs"),
        ({"pairs": 1e30}, r"--pairs: 1e\+30 is not a number of pairs"),
        ({"gpus": 0}, "--gpus: must be at least 1, got 0"),
        ({"price": -1.0}, "--price: -1 is not the price of an hour"),
        ({"price": float("inf")}, "--price: inf is not the price of an hour"),
        ({"gpus": 7}, "distill.batch_size: 1,024 pairs cannot be shared equally by 7 devices"),
        ({"pairs": 1000}, "distill.batch_size: 1,024, but 562 pairs are kept"),
    ],
)
def test_arguments_out_of_bounds_are_refused_before_anything_is_measured(
    tmp_path: Path, arguments: dict[str, Any], words: str
):
    with pytest.raises(ConfigError, match=words):
        plan.plan(RunFolder(tmp_path), recipe_of(), **{"pairs": 10_000, "gpus": 1, **arguments})


def test_rows_of_a_sample_stand_for_any_number_of_rows():
    rows = np.eye(5, dtype=np.float32)
    many = rates._Likeness(rows, 10**12)
    assert many.shape == (10**12, 5)
    assert np.array_equal(many[np.array([0, 7, 10**12 - 1])], rows[:3])
    assert np.array_equal(many[3:10], rows[[0, 1, 2, 3, 4, 0, 1]])


@pytest.mark.slow
def test_a_plan_of_a_tiny_run_says_everything_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in {"_SECONDS": 0.01, "_ROWS": 200, "_FILE_BYTES": 1 << 20, "_FILES": 3, "_SIDE_CPU": 64}.items():
        monkeypatch.setattr(rates, name, value)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "data", "--pairs", "60"]) == 0
    distill = {"student": "cid-tiny", "weights": "clip-only", "batch_size": 16, "warmup_steps": 1, "epochs": 1}
    common = {"pairs": {"source": ["data/pairs/*.tar"]}, "machine": {"workers": 0, "device": "cpu", "threads": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**common, "embed": {"teacher": "none"}, "distill": distill}))
    capsys.readouterr()

    arguments = ["plan", "run", "--recipe", "recipe.yaml", "--pairs", "1e6", "--gpus", "4", "--price", "2"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    for words in ("1,000,000 pairs on 4 devices", "GPU hours", "money", "SHA-256", "measured", "arithmetic", "sampled"):
        assert words in said, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "recipe.yaml"]

    monkeypatch.setattr(plan.tasks, "available_memory", lambda: 1e6)
    assert cli.main(arguments) == 1
    assert "things do not fit" in capsys.readouterr().err
