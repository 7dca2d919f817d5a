"""What a run of N pairs costs on so many devices like the one here: `clip-cid plan`.

Some rates are measured on this machine for about a minute, and arithmetic does the rest. Training, teacher and
disk are estimated by `clip-cid check`; what the data stages take a row is measured on rows of the run. Nothing in the
run changes.
"""

import dataclasses
import math

import torch

from clip_cid import tasks, units
from clip_cid.auto_numbers import settle
from clip_cid.check import Report, check, estimates, trial
from clip_cid.errors import ConfigError, RunError
from clip_cid.plan import rates
from clip_cid.plan.costs import Scale, StageCost, stage_costs
from clip_cid.plan.rates import Rates
from clip_cid.recipe import Recipe, settled
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import BALANCE, EMBED
from clip_cid.summaries import BalanceSummary, read_summary

PAPERS_KEPT_SHARE = 0.5625
"""225 of 400 million pairs."""
_FEWEST, _MOST = 2, 10**12
_ROWS_A_CENTER = 20
_STEP_ROWS_OF_CPU = 64  # a step of more takes longer than a minute has


@dataclasses.dataclass(frozen=True)
class Forecast:
    """All that a plan says; seconds, bytes, and money in the unit of the price."""

    scale: Scale
    rates: Rates
    stages: list[StageCost]
    price: float | None
    """Of a device for an hour."""
    free: float
    """Bytes on the disk of the run."""
    memory: float
    """Bytes that a process may take here."""
    misfits: list[RunError]

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def device_hours(self) -> float:
        """Hours in which a device works, whether or not others wait."""
        return sum(stage.device_hours for stage in self.stages)

    @property
    def disk(self) -> float:
        """Bytes at the fullest: what stays of each stage, and what the largest needs while it works."""
        return room_needed(self.stages)

    @property
    def money(self) -> float | None:
        """All devices are paid for as long as one of them works."""
        return None if self.price is None else self.price * self.scale.devices * self.hours


def plan(folder: RunFolder, recipe: Recipe, *, pairs: float, gpus: int, price: float | None = None) -> Forecast:
    """Estimate a run of the recipe on so many pairs; nothing of the run changes.

    Args:
        folder: Of a run with the same data in small, for rates and for its rows. It need not have begun.
        recipe: Of the large run.
        pairs: How many there will be.
        gpus: Devices like the one here that work together.
        price: Of one of them for an hour.

    Raises:
        ClipCidError: An argument is out of bounds, or not even the small run can begin.
    """
    count = _checked(pairs, gpus, price)
    share, how = _kept_share(folder, recipe)
    kept = max(int(share * count), 1)
    recipe = settle(recipe, kept).recipe
    _check_batch(recipe, kept, gpus)

    found, seconds = rates.first_source(recipe)
    report = _check_in_small(folder, recipe, gpus, len(found))
    scale = Scale(count, kept, gpus, report.teacher_dim or 1, share, how)
    measured = rates.measure(folder, recipe, report, found, seconds, width=scale.width)
    stages = stage_costs(recipe, scale, measured, report)
    forecast = Forecast(scale, measured, stages, price, report.disk.free, tasks.available_memory(), [])
    return dataclasses.replace(forecast, misfits=find_misfits(recipe, forecast, report))


def refusal(misfits: list[RunError]) -> RunError:
    """The only one as it is, or one error that lists all."""
    if len(misfits) == 1:
        return misfits[0]
    lines = (f"{misfit.problem}\n    {misfit.fix}" for misfit in misfits)
    return RunError("\n  ".join([f"{len(misfits)} things do not fit", *lines]), fix="Mend them all, and plan again.")


def room_needed(stages: list[StageCost]) -> float:
    return sum(stage.disk for stage in stages) + max(stage.work_disk for stage in stages)


def find_misfits(recipe: Recipe, forecast: Forecast, report: Report) -> list[RunError]:
    """What does not fit, each with the setting that would."""
    found: list[RunError] = []
    if forecast.disk > forecast.free:
        found.append(_disk_misfit(recipe, forecast, report))
    too_large = [stage for stage in forecast.stages if stage.memory > forecast.memory]
    return found + [_memory_misfit(recipe, forecast, stage, report) for stage in too_large]


def _checked(pairs: float, gpus: int, price: float | None) -> int:
    if not (math.isfinite(pairs) and _FEWEST <= pairs <= _MOST and pairs == int(pairs)):
        raise ConfigError(
            f"--pairs: {pairs:g} is not a number of pairs.",
            fix=f"Give a whole number from {_FEWEST} on, such as 400e6.",
        )
    if gpus < 1:
        raise ConfigError(f"--gpus: must be at least 1, got {gpus:,}.", fix="On a CPU give 1: this machine.")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ConfigError(f"--price: {price:g} is not the price of an hour.", fix="Give it as 2.5, or leave it out.")
    return int(pairs)


def _check_batch(recipe: Recipe, kept: int, gpus: int) -> None:
    batch = settled(recipe.distill.batch_size)
    if batch % gpus:
        raise ConfigError(
            f"distill.batch_size: {batch:,} pairs cannot be shared equally by {gpus:,} devices.",
            fix=f"Set distill.batch_size to {max(batch // gpus, 1) * gpus:,}.",
        )
    if batch > kept:
        raise ConfigError(
            f"distill.batch_size: {batch:,}, but {kept:,} pairs are kept.",
            fix="Lower it, set it to auto, or give more --pairs.",
        )


def _check_in_small(folder: RunFolder, recipe: Recipe, gpus: int, pairs: int) -> Report:
    """A check of the part of a step that one device has; of less where so few pairs, or a CPU, cannot do it.

    Where there are fewer pairs than centers, fewer centers are tried, and arithmetic adds the others.
    """
    settings, cluster = recipe.distill, recipe.cluster
    rows = settled(settings.batch_size) // gpus
    if not torch.cuda.is_available() or recipe.machine.device == "cpu":
        rows = min(rows, _STEP_ROWS_OF_CPU)
    rows = max(min(rows, pairs // 2), 2)
    changes = {
        "batch_size": rows,
        "steps": max(settled(settings.warmup_steps) + 1, 100),
        "per_cluster": None,
        "shuffle_window": None,
        "validation": type(settings.validation)(),
    }
    fewer = max(pairs // _ROWS_A_CENTER, settings.labels + 1)
    if max(centers := settled(cluster.num_centers), cluster.text_centers) > pairs:
        cluster = cluster.model_copy(update={"num_centers": min(centers, fewer), "num_text_centers": None})
    small = {"distill": settings.model_copy(update=changes), "cluster": cluster}
    return check(folder, recipe.model_copy(update=small))


def _kept_share(folder: RunFolder, recipe: Recipe) -> tuple[float, str]:
    if not recipe.uses(BALANCE):
        return 1.0, "arithmetic: nothing is balanced"
    undone = {state.stage.name for state in trial.undone(folder, recipe)}
    record = None if undone & {EMBED, BALANCE} else folder.record(BALANCE)
    if record is None:
        return PAPERS_KEPT_SHARE, "the paper's: balance has not run here"
    summary = read_summary(BalanceSummary, record.summary)
    return summary.kept / summary.ok, f"sampled: balance of the {summary.ok:,} images here; of more, fewer are kept"


def _disk_misfit(recipe: Recipe, forecast: Forecast, report: Report) -> RunError:
    """The first setting that makes room enough, else how many pairs there is room for."""

    def needs(section: str, **changes: object) -> float:
        changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})
        return room_needed(stage_costs(changed, forecast.scale, forecast.rates, report))

    problem = (
        f"The disk of the run has {units.size(forecast.free)} free, but {forecast.scale.pairs:,} pairs need"
        f" {units.size(forecast.disk)}."
    )
    tries = (
        ("distill.sample_rate: 0.1", "distill", {"sample_rate": 0.1}, "which needs no stored soft centers"),
        ("embed.views: 0", "embed", {"views": 0}, "which stores no views"),
    )
    for setting, section, changes, why in tries:
        if needs(section, **changes) <= forecast.free:
            return RunError(problem, fix=f"Set {setting}, {why}, or take a larger disk.")
    fixed = room_needed(stage_costs(recipe, _of_one_pair(forecast.scale), forecast.rates, report))
    return RunError(problem, fix=f"Take a larger disk{_that_fits(forecast, forecast.disk, fixed, forecast.free)}.")


def _of_one_pair(scale: Scale) -> Scale:
    """What is needed for it is needed for any number of pairs."""
    return dataclasses.replace(scale, pairs=1, kept=1)


def _that_fits(forecast: Forecast, needed: float, fixed: float, there: float) -> str:
    """How many pairs fit, where need grows with them along a line or less."""
    fits = int(forecast.scale.pairs * (there - fixed) / (needed - fixed)) if there > fixed else 0
    return f", or fewer pairs: --pairs {fits} fit here" if fits > 1 else ""


def _memory_misfit(recipe: Recipe, forecast: Forecast, stage: StageCost, report: Report) -> RunError:
    scale, memory = forecast.scale, forecast.memory
    problem = (
        f"{stage.name} holds {units.memory(stage.memory)} in its largest process; {units.memory(memory)} are here."
    )
    per_center = estimates.cluster_memory(0, 1, scale.width)
    room = memory - estimates.cluster_memory(scale.kept, 0, scale.width)
    if stage.uses_centers and (centers := int(room / per_center)) > 0:
        return RunError(problem, fix=f"Set cluster.num_centers to at most {centers:,}, or take more memory.")
    fixed = next(
        one for one in stage_costs(recipe, _of_one_pair(scale), forecast.rates, report) if one.name == stage.name
    )
    more = _that_fits(forecast, stage.memory, fixed.memory, memory)
    return RunError(problem, fix=f"Take a machine with more memory{more}.")
