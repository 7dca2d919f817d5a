"""A forecast as text: the table of the stages, how each number is known, and what does not fit."""

from clip_cid import log, units
from clip_cid.plan import Forecast
from clip_cid.plan.costs import SHARED_BY_TASKS, StageCost
from clip_cid.stage_names import DISTILL

_COLUMNS = ("stage", "GPU hours", "hours", "tasks", "disk", "while it works", "read", "memory", "money")


def say(forecast: Forecast) -> None:
    """Print all of it."""
    scale, rates = forecast.scale, forecast.rates
    device = "CPU, in place of a GPU" if rates.device.type == "cpu" else str(rates.device)
    title = f"{scale.pairs:,} pairs on {units.counted(scale.devices, 'device')} like the one here ({device})"
    log.table(_COLUMNS, [*(_row(forecast, stage) for stage in forecast.stages), _total(forecast)], title=title)
    log.table(("", "", "how it is known"), list(_facts(forecast)), title="Rates")
    log.say("\nNot counted")
    for line in _left_out(forecast):
        log.say(f"  - {line}")


def _row(forecast: Forecast, stage: StageCost) -> tuple[str, ...]:
    money = None if forecast.price is None else forecast.price * forecast.scale.devices * stage.hours
    return (
        stage.name,
        _hours(stage.device_hours),
        _hours(stage.hours),
        f"{stage.tasks:,}",
        units.size(stage.disk),
        units.size(stage.work_disk),
        units.size(stage.read),
        units.memory(stage.memory),
        _money(money),
    )


def _total(forecast: Forecast) -> tuple[str, ...]:
    stages = forecast.stages
    return (
        "all",
        _hours(forecast.device_hours),
        _hours(forecast.hours),
        f"{sum(stage.tasks for stage in stages):,}",
        units.size(sum(stage.disk for stage in stages)),
        units.size(max(stage.work_disk for stage in stages)),
        units.size(sum(stage.read for stage in stages)),
        units.memory(max(stage.memory for stage in stages)),
        _money(forecast.money),
    )


def _facts(forecast: Forecast) -> list[tuple[str, str, str]]:
    scale, rates = forecast.scale, forecast.rates
    by_stage = [(f"hours of {stage.name}", _hours(stage.device_hours), stage.how) for stage in forecast.stages]
    return [
        ("pairs that balance keeps", f"{scale.kept:,} ({units.percent(scale.kept_share)})", scale.kept_how),
        *by_stage,
        ("bytes of a pair", units.size(rates.pair_bytes), "sampled: the first pairs"),
        ("captions of a pair", f"{rates.captions:,.2f}", "sampled: the first pairs"),
        ("products", f"{2 * rates.product / 1e12:,.3g} TFLOP/s", "measured"),
        ("SHA-256", f"{units.size(rates.sha256)} a second", "measured"),
        ("the run's disk: writing", f"{units.size(rates.write)} a second", "measured"),
        ("the run's disk: reading", f"{units.size(rates.read)} a second", "measured; a cache may have helped"),
        ("the run's disk: opening a file", f"{1000 * rates.opening:,.3g} ms", "measured"),
        ("tasks, disk, bytes read, memory", "", "arithmetic, docs/scale.md; memory of distill from a measured step"),
        ("disk needed, at the fullest", units.size(forecast.disk), "arithmetic"),
        ("disk free", units.size(forecast.free), "measured"),
        ("memory here", units.memory(forecast.memory), "measured"),
    ]


def _left_out(forecast: Forecast) -> list[str]:
    alone = [stage.name for stage in forecast.stages if stage.name not in (*SHARED_BY_TASKS, DISTILL)]
    lines = ["the exchange between devices, their losses against each other's rows, starts and retries"]
    if alone and forecast.scale.devices > 1:
        lines.append(f"that {', '.join(alone)} run on one device while the others wait: their hours are counted")
    speeds = {stage.name: stage.read / (3600 * stage.hours) for stage in forecast.stages if stage.hours > 0}
    if speeds:
        fastest = max(speeds, key=lambda name: speeds[name])
        lines.append(
            f"a disk that is too slow: {fastest} reads {units.size(speeds[fastest])} a second, this one gives"
            f" {units.size(forecast.rates.read)}"
        )
    return lines


def _hours(hours: float) -> str:
    return "unknown" if hours != hours else f"{hours:,.3g}" if hours < 100 else f"{hours:,.0f}"


def _money(money: float | None) -> str:
    return "-" if money is None or money != money else f"{money:,.2f}"
