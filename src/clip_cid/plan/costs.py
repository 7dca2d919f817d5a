"""The cost of each stage for N pairs, by arithmetic from rates."""

import dataclasses
import math

from clip_cid.check import Report, estimates
from clip_cid.plan.rates import Rates
from clip_cid.recipe import Recipe, settled
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, EMBED
from clip_cid.training.assemble import largest_epoch
from clip_cid.training.soft_targets import uses_soft_centers

INDEX = "index"
SHARED_BY_TASKS = frozenset({INDEX, EMBED, BALANCE})
"""Stages whose tasks a Ray cluster shares; `distill` is shared by torchrun, and the others run on one device."""

_INDEX_ROW, _HEADERS = 80, 2_048  # bytes of the index a pair, and read for it
_SHARD_ROWS = 10_000
_CHUNK_ROWS, _GROUP, _FEWEST_GROUPS = 1 << 20, 16, 8
_PASSES = 3  # of balance over all rows beside the pairs: lengths and codes, choice, explanation
_START_ROWS, _START_PASSES = 100, 12  # of the k-means start: rows a center, and comparisons with sqrt(K) centers
_QUALITY_PASSES = 2
_PRODUCTS_OF_STEP = 3
_HALF = 2  # bytes
_RANK_ROW = 16  # bytes a kept row in each rank; benchmarks/distill_memory.py
_ABOVE_ROWS = 1 << 30  # bytes of libraries and blocks


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the run that is planned."""

    pairs: int
    kept: int
    """That balance leaves."""
    devices: int
    width: int
    """Of the teacher's embeddings."""
    kept_share: float
    kept_how: str


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What a stage takes; seconds and bytes."""

    name: str
    seconds: float
    """Of one device that does all of it."""
    devices: int
    """How many share it."""
    tasks: int
    disk: float
    """That it leaves."""
    work_disk: float
    """Beside it, while it works."""
    read: float
    memory: float
    """Of its largest process."""
    how: str
    """How the seconds are known."""
    uses_centers: bool = False
    """Whether its memory is that of the centers, for the most part."""

    @property
    def device_hours(self) -> float:
        return self.seconds / 3600

    @property
    def hours(self) -> float:
        return self.device_hours / self.devices


def stage_costs(recipe: Recipe, scale: Scale, rates: Rates, report: Report) -> list[StageCost]:
    """The stages that the recipe uses, in their order."""
    stages = [_index(scale, rates)]
    if recipe.uses(EMBED):
        stages.append(_embed(recipe, scale, rates, report))
    if recipe.uses(BALANCE):
        stages.append(_balance(scale, rates, taken_over=recipe.balance.existing is not None))
    if recipe.uses(CLUSTER):
        stages.append(_cluster(recipe, scale, rates))
    return [*stages, _distill(recipe, scale, rates, report)]


def _devices(stage: str, scale: Scale) -> int:
    return scale.devices if stage in SHARED_BY_TASKS else 1


def _index(scale: Scale, rates: Rates) -> StageCost:
    return StageCost(
        name=INDEX,
        seconds=scale.pairs * rates.index,
        devices=_devices(INDEX, scale),
        tasks=math.ceil(scale.pairs / _SHARD_ROWS),
        disk=scale.pairs * _INDEX_ROW,
        work_disk=0,
        read=scale.pairs * min(_HEADERS, rates.pair_bytes),
        memory=_ABOVE_ROWS,
        how="measured: the first source, once",
    )


def _embed(recipe: Recipe, scale: Scale, rates: Rates, report: Report) -> StageCost:
    further = scale.pairs * max(rates.captions - 1, 0.0)
    written = estimates.embedding_bytes(scale.pairs, scale.width, views=recipe.embed.views)
    written += estimates.text_bytes(int(further), scale.width)
    encoding = scale.pairs * rates.teacher if rates.teacher is not None else _teacher_by_flops(recipe, scale, report)
    parameters = report.teacher.costs.parameters if report.teacher is not None and report.teacher.costs else 0
    taken_over = recipe.embed.existing is not None
    return StageCost(
        name=EMBED,
        seconds=(0 if taken_over else encoding + written / rates.write) + written / rates.sha256,
        devices=_devices(EMBED, scale),
        tasks=math.ceil(scale.pairs / _SHARD_ROWS),
        disk=0 if taken_over else written,
        work_disk=0,
        read=written + (0 if taken_over else scale.pairs * rates.pair_bytes),
        memory=_ABOVE_ROWS + 4 * parameters,
        how=rates.teacher_how,
    )


def _teacher_by_flops(recipe: Recipe, scale: Scale, report: Report) -> float:
    """Seconds for all pairs, as a check estimates them; NaN where nobody knows the teacher's FLOPs."""
    if report.teacher is None or report.teacher.costs is None or report.student is None:
        return math.nan
    costs = report.teacher.costs
    speed = report.student.training * settled(report.recipe.distill.batch_size) / report.duration.compute
    return scale.pairs * (costs.forward + recipe.embed.views * costs.image_flops) / speed


def _balance(scale: Scale, rates: Rates, *, taken_over: bool) -> StageCost:
    on_cuda = rates.device.type == "cuda"
    groups = _groups_of_chunks(scale.pairs, on_cuda=on_cuda)
    _, room = estimates.balance_room(scale.pairs, scale.width, on_cuda=on_cuda)
    rows = _HALF * scale.width * scale.pairs
    return StageCost(
        name=BALANCE,
        seconds=0 if taken_over else rates.balance(scale.pairs),
        devices=_devices(BALANCE, scale),
        tasks=groups * (groups + 1) // 2,
        disk=24 * scale.pairs + 8 * scale.kept,
        work_disk=room,
        read=(_PASSES + groups + 1) * rows,  # a task reads two groups
        memory=estimates.balance_memory(scale.pairs),
        how=rates.rows_how,
    )


def _groups_of_chunks(rows: int, *, on_cuda: bool) -> int:
    """Each two of them are a task; a group has up to 16 chunks, and fewer where a CPU has few groups."""
    chunks = math.ceil(rows / _CHUNK_ROWS)
    return math.ceil(chunks / (_GROUP if on_cuda else max(1, min(chunks // _FEWEST_GROUPS, _GROUP))))


def _cluster(recipe: Recipe, scale: Scale, rates: Rates) -> StageCost:
    settings, centers = recipe.cluster, settled(recipe.cluster.num_centers)
    sample = min(scale.kept, settings.max_points_per_center * centers)
    start = min(sample, _START_ROWS * centers) * _START_PASSES
    taken_over = settings.existing is not None

    passes = settings.iterations * sample + scale.kept
    seconds = (
        passes * (rates.assign_row + centers * rates.assign_center)
        + start * (rates.assign_row + math.sqrt(centers) * rates.assign_center)
        + _QUALITY_PASSES * scale.kept * rates.assign_row
    )
    return StageCost(
        name=CLUSTER,
        seconds=0 if taken_over else seconds,
        devices=_devices(CLUSTER, scale),
        tasks=1,
        disk=estimates.cluster_bytes(scale.kept, centers, scale.width),
        work_disk=0,
        read=_HALF * scale.width * (passes + start + _QUALITY_PASSES * scale.kept),
        memory=estimates.cluster_memory(scale.kept, centers, scale.width),
        how=f"{rates.rows_how}, x {centers:,} centers",
        uses_centers=True,
    )


def _distill(recipe: Recipe, scale: Scale, rates: Rates, report: Report) -> StageCost:
    settings, trained = recipe.distill, scale.kept
    batch, tried = settled(settings.batch_size), settled(report.recipe.distill.batch_size)
    seen = batch * (settings.steps or settled(settings.epochs) * largest_epoch(recipe, trained) // batch)
    step, once = _seconds_of_pair(recipe, scale, rates, report)

    soft = recipe.uses_clusters and not recipe.embed.views and uses_soft_centers(settings)
    passes = trained * (4 * scale.width + 8) * soft + 4 * settings.labels * trained * recipe.uses_several_labels
    centers = 4 * scale.width * settled(recipe.cluster.num_centers) if recipe.uses_clusters else 0
    copies = 3 if settings.head_lr > 0 else 1
    return StageCost(
        name=DISTILL,
        seconds=seen * step + trained * once,
        devices=scale.devices,
        tasks=scale.devices,
        disk=report.disk.student,
        work_disk=report.disk.checkpoints + report.disk.metrics + passes,
        read=seen * (rates.pair_bytes + 2 * _HALF * scale.width),
        memory=report.rehearsal.memory_gib * 2**30 + _RANK_ROW * trained + copies * centers,
        how=f"measured: {report.rehearsal.steps} steps of {tried:,} pairs",
        uses_centers=centers * copies > _RANK_ROW * trained,
    )


def _seconds_of_pair(recipe: Recipe, scale: Scale, rates: Rates, report: Report) -> tuple[float, float]:
    """Seconds of a pair in a step, and of one in the passes before the first step."""
    step = report.duration.seconds_per_step / settled(report.recipe.distill.batch_size)
    once = sum(value / report.pairs for value in (report.soft_seconds, report.label_seconds) if value is not None)
    if not recipe.uses_clusters:
        return step, once

    # Centers that were not tried: those of a step by their products, forwards and twice backwards.
    centers, tried = settled(recipe.cluster.num_centers), settled(report.recipe.cluster.num_centers)
    more = max(centers - tried, 0) * recipe.distill.sample_rate
    return step + _PRODUCTS_OF_STEP * more * scale.width / rates.product, once * max(centers / tried, 1.0)
