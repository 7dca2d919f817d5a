"""The tables of an evaluation as they are printed: columns and lines of text."""

from collections.abc import Iterable, Mapping, Sequence

from clip_cid import units
from clip_cid.evaluation.scores import Difference, Score, score_rows
from clip_cid.evaluation.tables import Table
from clip_cid.summaries import ModelCost

Printed = tuple[list[str], list[list[str]]]
"""Columns and lines."""


def table_lines(table: Table, models: Sequence[str]) -> Printed:
    """Sets down, models across; sets without a result stand below, then the means.

    A star stands at sets that are not as CLIP measured them; `variant_notes` says how they differ.
    """
    variants = {score.set for score in table.scores if score.variant}
    lines: list[list[str]] = []
    for row in score_rows(table.scores):
        cells = [_cell(row.by_model.get(model)) for model in models]
        lines.append([row.set + _star(row.set in variants), row.metric, units.in_percent(row.any.chance), *cells])

    lines += [[name, "not measured", *("-" for _ in range(1 + len(models)))] for name in table.summary.missing]

    for group in table.summary.groups:
        star = _star(any(name in variants for name in group.sets))
        lines.append([group.title + star, "", "", *(units.in_percent(group.by_model.get(model)) for model in models)])
    return ["set", "metric", "chance", *models], lines


def variant_notes(tables: Mapping[str, Table]) -> list[str]:
    """The meaning of the stars in the printed tables."""
    scores = (score for table in tables.values() for score in table.scores)
    variants = {score.set: score.variant for score in scores if score.variant}
    return [f"* {name}: {words}" for name, words in variants.items()]


def same_class_lines(scores: Iterable[Score], models: Sequence[str]) -> Printed:
    """Each robustness set, and the model's accuracy on ImageNet's images of the same classes."""
    rows = score_rows(score for score in scores if score.imagenet_same_classes is not None)
    lines: list[list[str]] = []
    for row in rows:
        of_set = [row.by_model[model] for model in models]
        lines.append([row.set, "this set", *(units.in_percent(score.top1) for score in of_set)])
        lines.append(
            ["", "ImageNet, same classes", *(units.in_percent(score.imagenet_same_classes) for score in of_set)]
        )
    return ["set", "top1 on", *models], lines


def difference_lines(differences: Iterable[Difference], models: Sequence[str]) -> Printed:
    """How far the first model is ahead of each other one, in points, with its interval."""
    first, *others = models
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for one in differences:
        if one.model == first:
            lead, low, high = (f"{100 * value:+.1f}" for value in (one.difference, one.low, one.high))
            place = (one.set, "" if one.of_group else one.metric)
            lines.setdefault(place, {})[one.other] = f"{lead} ({low} to {high})"
    columns = ["set", "metric", *(f"{first} - {other}" for other in others)]
    return columns, [[*place, *(cells[other] for other in others)] for place, cells in lines.items()]


def cost_lines(costs: Sequence[ModelCost]) -> Printed:
    """The cost of each model: parameters, operations of a forward pass, and times in milliseconds."""
    batches = list(dict.fromkeys(one.batch for cost in costs for one in cost.latency))
    towers = ("image", "text")
    columns = ["model", *(f"{tower} parameters" for tower in towers), *(f"GFLOPs an {tower}" for tower in towers)]
    columns = [column.replace("an text", "a text") for column in columns]
    columns += [f"ms of {units.counted(batch, tower)}" for batch in batches for tower in towers]

    lines: list[list[str]] = []
    for cost in costs:
        flops = [cost.image_flops, cost.text_flops]
        times = {one.batch: one for one in cost.latency}
        lines.append([cost.model, f"{cost.image_parameters:,}", f"{cost.text_parameters:,}"])
        lines[-1] += ["-" if value is None else f"{value / 1e9:.3g}" for value in flops]
        for batch in batches:
            one = times.get(batch)
            lines[-1] += ["-", "-"] if one is None else [f"{one.image_ms:.3g}", f"{one.text_ms:.3g}"]
    return columns, lines


def machines(costs: Sequence[ModelCost]) -> str:
    """Where the times were measured."""
    return "; ".join(dict.fromkeys(cost.machine for cost in costs))


def _cell(score: Score | None) -> str:
    """A score and its interval in percent: `62.3 (60.1-64.5)`."""
    return (
        "-"
        if score is None
        else f"{units.in_percent(score.score)} ({units.in_percent(score.low)}-{units.in_percent(score.high)})"
    )


def _star(shown: bool) -> str:
    return " *" if shown else ""
