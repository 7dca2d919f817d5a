"""One page for several runs or models: scores with paired intervals, cost, curves; the numbers as CSV and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clip_cid import units
from clip_cid.csv_tables import write_csv
from clip_cid.errors import RunError
from clip_cid.evaluation.printed_tables import cost_lines, machines
from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.scores import Difference
from clip_cid.figures import curves
from clip_cid.models.public_names import PublicWords
from clip_cid.new_folder import new_folder, refuse_foreign
from clip_cid.report import page
from clip_cid.report.comparison.contenders import Contender, Row, common_rows, contenders, open_evaluations
from clip_cid.report.comparison.gaps import Gap, gaps, groups_for
from clip_cid.report.drawing.training_log import read_metrics
from clip_cid.run_folder import write_json
from clip_cid.summaries import ModelCost

PAGE, TABLE, NUMBERS = "compare.html", "compare.csv", "compare.json"


@dataclass(frozen=True)
class _Comparison:
    models: list[Contender]
    rows: list[Row]
    gaps: dict[str, dict[Row, Gap]]
    """Label -> its lead over the first model."""
    mean_gaps: dict[str, dict[str, Difference]]
    left_out: dict[str, str]
    """Set or model -> why it is not on the page."""

    @property
    def unpaired(self) -> list[str]:
        """Model and set, where it is not known that the images are the same."""
        pairs = [(label, row) for label, leads in self.gaps.items() for row, gap in leads.items() if gap.paired is None]
        return list(dict.fromkeys(f"{label} on {row.set}" for label, row in pairs))


def compare(places: Sequence[Path], out: Path, *, common: bool) -> str:
    """Write `compare.html`, `.csv` and `.json`, and the curves as a table, into a new folder; says what is in it.

    Args:
        places: Run folders, or folders in which models were evaluated.
        out: The folder; an earlier comparison is replaced.
        common: Whether sets that some lack are left out.

    Raises:
        RunError: As `open_evaluations` and `common_rows`; there is one model only; or as `refuse_foreign`.
        DataError: Results cannot be read.
    """
    names = {PAGE, TABLE, NUMBERS, "curves.csv"}
    refuse_foreign(out, "a comparison", is_one=lambda folder: (folder / NUMBERS).is_file(), names=names)

    evaluations = open_evaluations(places)
    models, same = contenders(evaluations)
    if len(models) < 2:
        raise RunError(
            f"compare: {models[0].label} is the only model here.",
            fix="Name another run, or measure another model: `clip-cid evaluate RUN --model NAME`.",
        )

    rows, missing = common_rows(evaluations, common=common)
    leads = {one.label: gaps(one, models[0], rows) for one in models[1:]}
    comparison = _Comparison(
        models,
        rows,
        {label: by_row for label, (by_row, _) in leads.items()},
        {label: by_group for label, (_, by_group) in leads.items()},
        {**missing, **same},
    )
    with new_folder(out) as part:
        _write(comparison, part, out)
    return _headline(comparison, out)


def _headline(comparison: _Comparison, out: Path) -> str:
    lines = [
        f"{out / PAGE}: {units.counted(len(comparison.models), 'model')} on {units.counted(len(comparison.rows), 'row')}"
    ]
    lines += [f"left out: {name}, {reason}" for name, reason in comparison.left_out.items()]
    if comparison.unpaired:
        lines.append(
            f"without paired intervals, as the images are not known to be the same: {', '.join(comparison.unpaired)}"
        )
    return "\n".join(lines)


def _write(comparison: _Comparison, folder: Path, out: Path) -> None:
    trainings = {one.label: read_metrics(one.log) for one in comparison.models if one.log is not None}
    words = PublicWords({}, out)
    if trainings:
        curves.draw(trainings, folder)
    write_csv(folder / TABLE, _columns(comparison))
    write_json(folder / NUMBERS, _as_json(comparison))

    costs = _costs(comparison)
    values = {
        "title": "Comparison",
        "run": out.resolve().name,
        "blur": False,
        "side": 96,
        "models": [one.label for one in comparison.models],
        "tasks": [_task(comparison, task) for task in dict.fromkeys(row.task for row in comparison.rows)],
        "costs": cost_lines(costs) if costs else None,
        "machines": machines(costs),
        "without_cost": [one.label for one in comparison.models if one.cost is None],
        "curves": page.inline_svg(folder / "curves.svg", "Losses by step", words) if trainings else None,
        "left_out": comparison.left_out,
        "unpaired": comparison.unpaired,
        "made": [(one.label, one.evaluation.record) for one in comparison.models],
        "tables": sorted(path.name for path in folder.iterdir() if path.suffix in (".csv", ".json")),
    }
    (folder / "curves.svg").unlink(missing_ok=True)  # it is on the page
    (folder / PAGE).write_text(page.render("compare.html", values, words), encoding="utf-8")


def _costs(comparison: _Comparison) -> list[ModelCost]:
    return [replace(one.cost, model=one.label) for one in comparison.models if one.cost is not None]


def _task(comparison: _Comparison, task: str) -> dict[str, Any]:
    """A table of the page."""
    first, *others = comparison.models
    lines: list[dict[str, Any]] = []
    for row in comparison.rows:
        if row.task == task:
            lines.append(
                {
                    "row": row,
                    "any": first.scores[row],
                    "scores": [one.scores[row] for one in comparison.models],
                    "gaps": [comparison.gaps[one.label][row] for one in others],
                }
            )

    means: list[dict[str, Any]] = []
    for group in groups_for(task, comparison.rows):
        title = group.title(len(group.sets))
        own = [row for row in comparison.rows if row.task == task and row.set in group.sets]
        scores = [sum(one.scores[row].score for row in own) / len(own) for one in comparison.models]
        differences = [comparison.mean_gaps[one.label].get(f"{task} {title}") for one in others]
        leads = [Gap(score - scores[0], difference) for score, difference in zip(scores[1:], differences, strict=True)]
        means.append({"title": title, "scores": scores, "gaps": leads})
    return {"name": PROTOCOLS[task].title, "task": task, "lines": lines, "means": means}


def _columns(comparison: _Comparison) -> dict[str, list[Any]]:
    """The table as columns: of each model score, interval and lead over the first."""
    rows, first = comparison.rows, comparison.models[0]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    columns["n"] = [first.scores[row].n for row in rows]
    columns["chance"] = [first.scores[row].chance for row in rows]
    for one in comparison.models:
        scores = [one.scores[row] for row in rows]
        columns[one.label] = [score.score for score in scores]
        columns[f"{one.label} low"] = [score.low for score in scores]
        columns[f"{one.label} high"] = [score.high for score in scores]
        if one is not first:
            leads = [comparison.gaps[one.label][row] for row in rows]
            columns[f"{one.label} lead"] = [gap.difference for gap in leads]
            columns[f"{one.label} lead low"] = [gap.paired.low if gap.paired else None for gap in leads]
            columns[f"{one.label} lead high"] = [gap.paired.high if gap.paired else None for gap in leads]
    return columns


def _as_json(comparison: _Comparison) -> dict[str, Any]:
    models = [
        {"name": one.label, "cost": None if one.cost is None else asdict(replace(one.cost, model=one.label))}
        for one in comparison.models
    ]
    columns = _columns(comparison)
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return {
        "first": comparison.models[0].label,
        "models": models,
        "rows": rows,
        "left_out": comparison.left_out,
        "unpaired": comparison.unpaired,
    }
