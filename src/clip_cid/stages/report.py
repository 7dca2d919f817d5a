"""Stage `report`: one self-contained HTML page about the run, and its tables as CSV; both fit to be published."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_cid import log
from clip_cid.data.pairs.pair import reason_kind
from clip_cid.errors import DataError, RunError
from clip_cid.evaluation.printed_tables import Printed, cost_lines, machines
from clip_cid.evaluation.scores import (
    RESULTS,
    STUDENT,
    Differences,
    models_of,
    read_scores,
    read_task_summaries,
    reference_model,
)
from clip_cid.figures import losses, style
from clip_cid.figures import scores as score_figure
from clip_cid.models.public_names import PublicWords, public_settings, unique_public_names
from clip_cid.recipe import Recipe, as_yaml, dump_recipe
from clip_cid.report import galleries, page, story
from clip_cid.report.cards import cards
from clip_cid.report.drawing.all_figures import FIGURES
from clip_cid.report.parts import WITH_PICTURES, by_stratum, page_pictures, place_figures
from clip_cid.report.run_records import RunRecords
from clip_cid.report.score_tables import ScoreTable, score_tables
from clip_cid.run_folder import RunFolder, StageRecord, atomic_file
from clip_cid.stage_names import DISTILL, DRAW, EMBED, EVALUATE, REPORT
from clip_cid.summaries import DistillSummary, ModelCost, ReportSummary, costs_in, read_summary

PAGE = "report.html"
_SAMPLE_PAIRS = 12
_REASONS_SHOWN = 20


@dataclass(frozen=True)
class _Scores:
    """The scores as the page shows them."""

    tasks: list[ScoreTable]
    models: list[str]
    others: list[str]
    """The models beside the student."""
    costs: list[ModelCost]
    """None in results of before it was measured."""

    @property
    def cost_table(self) -> Printed:
        return cost_lines(self.costs)

    @property
    def machines(self) -> str:
        return machines(self.costs)


def run(folder: RunFolder, out: Path, recipe: Recipe) -> ReportSummary:
    """Write `report.html` and `tables/*.csv`."""
    for stage in (DRAW, EVALUATE):
        folder.verify(stage)  # what the page shows must be as it was drawn and measured
    draw, tables = folder.stage(DRAW), out / "tables"
    records, settings = RunRecords.read(folder, recipe), recipe.model_dump(mode="json")
    words = PublicWords(settings, folder.path)
    tables.mkdir()
    shown = page_pictures(folder, draw, recipe)
    thumbnails, no_pictures = shown.thumbnails, shown.missing
    if no_pictures and recipe.report.images:
        log.warn(f"report: no pictures, because {no_pictures}")
    sample = {} if shown.opened is None else shown.opened.sample(_SAMPLE_PAIRS, seed=0)
    pairs = galleries.removed_pairs(draw / "removed_pairs.csv", thumbnails)
    measured = _scores(folder, recipe, tables)
    skipped, stages = _skipped(folder, recipe, tables), _stages(records.by_stage.values(), tables)
    public = [path for path in draw.glob("*.csv") if recipe.report.images or path.stem not in WITH_PICTURES]
    for path in (*public, *tables.iterdir()):
        style.write_csv(tables / path.name, _public_table(style.read_csv(path), words))

    values = {
        "title": recipe.report.title,
        "run": _name(folder),
        "digest": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest(),
        "blur": recipe.report.blur,
        "story": _story(records, measured, recipe),
        "cards": cards(records, recipe),
        "summaries": records,
        "missing": records.missing,
        "figures": place_figures(FIGURES, draw, records.draw.figures, words, images=recipe.report.images),
        "left_out": records.draw.left_out,
        "numbers": records.draw.figures,
        "metric_name": recipe.balance.metric,
        "metric": recipe.balance.metric.replace("_", " "),
        "radius": recipe.balance.max_radius,
        "loss_name": losses.display_name,
        "side": recipe.report.thumbnail_px,
        "removed_sets": by_stratum(galleries.removed_sets, draw / "removed_sets.csv", thumbnails),
        "removed_pairs": pairs,
        "examples": {} if no_pictures else galleries.typical_pairs(pairs),
        "clusters": by_stratum(galleries.clusters, draw / "clusters.csv", thumbnails),
        "sample": galleries.sample(sample, thumbnails),
        "scores": measured,
        "skipped": skipped,
        "stages": stages,
        "versions": _versions(records.by_stage.values()),
        "settings": as_yaml(public_settings(settings)),
        "seeds": _seeds(recipe),
        "commands": _commands(folder),
        "thumbnails": thumbnails,
        "no_pictures": no_pictures,
        "tables": sorted(path.name for path in tables.iterdir()),
    }
    with atomic_file(out / PAGE) as temporary:
        temporary.write_text(page.render("report.html", values, words), encoding="utf-8")

    return ReportSummary(
        page=f"{REPORT}/{PAGE}",
        bytes=(out / PAGE).stat().st_size,
        picture_bytes=thumbnails.bytes_used,
        no_pictures=no_pictures,
    )


def _scores(folder: RunFolder, recipe: Recipe, tables: Path) -> _Scores | None:
    """The tables by protocol and the models; also writes `tables/scores.csv`."""
    if not (recipe.uses(EVALUATE) and folder.has(EVALUATE)):
        return None
    evaluate = folder.stage(EVALUATE)
    scores, summaries = read_scores(evaluate / RESULTS), read_task_summaries(evaluate)
    differences = Differences(one for summary in summaries.values() for one in summary.differences)
    score_figure.write_table(scores, differences, tables / "scores.csv")

    models = models_of(scores)
    others = [model for model in models if model != STUDENT]
    record = folder.record(EVALUATE)
    costs = [] if record is None else costs_in(record.summary)
    return _Scores(score_tables(summaries, scores, differences), models, others, costs)


def _story(records: RunRecords, measured: _Scores | None, recipe: Recipe) -> list[story.Statement]:
    """The statements at the top of the page; one without its numbers in this run is left out."""
    statements = [
        None if records.balance is None else story.removed(records.balance),
        story.flattened(records.draw.figures.get("cluster_sizes", {})),
    ]
    if measured is not None:
        baseline = reference_model(measured.models)
        other = None if baseline is None else _trained_elsewhere(recipe.evaluate.compare[baseline])
        student = None if records.distill is None else story.Trained.of(records.distill, records.settings_of(DISTILL))
        statements.append(story.gained(measured.tasks, baseline, student, other))
    return [statement for statement in statements if statement is not None]


def _trained_elsewhere(reference: str) -> story.Trained | None:
    """How a model was trained, if it is the student of an existing run of this version."""
    if not reference.startswith("run:"):
        return None
    record = RunFolder(Path(reference.removeprefix("run:"))).record(DISTILL)
    if record is None:
        return None
    try:
        return story.Trained.of(read_summary(DistillSummary, record.summary), record.settings["distill"])
    except RunError:
        return None


def _seeds(recipe: Recipe) -> dict[str, int]:
    """Section -> its seed, of those that have one."""
    sections = {name: getattr(recipe, name) for name in Recipe.model_fields}
    return {name: section.seed for name, section in sections.items() if "seed" in type(section).model_fields}


def _skipped(folder: RunFolder, recipe: Recipe, tables: Path) -> list[tuple[str, str, int]]:
    """Stage, reason and count of the skipped samples."""
    counts: Counter[tuple[str, str]] = Counter()
    for stage in (EMBED, DISTILL):
        path = folder.path / stage / "skipped.jsonl"
        if recipe.uses(stage) and folder.has(stage) and path.is_file():
            counts.update((stage, reason) for reason in _reasons(path))

    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    rows = [(stage, reason, count) for (stage, reason), count in ordered]
    style.write_csv(
        tables / "skipped.csv",
        {name: [row[index] for row in rows] for index, name in enumerate(("stage", "reason", "samples"))},
    )

    if rest := rows[_REASONS_SHOWN:]:
        more = f"{len(rest):,} other reasons, in tables/skipped.csv"
        return [*rows[:_REASONS_SHOWN], ("", more, sum(count for _, _, count in rest))]
    return rows


def _reasons(path: Path) -> list[str]:
    try:
        return [reason_kind(json.loads(line)["reason"]) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a list of skipped samples ({error}).", fix="Run the stage that wrote it again, with --force."
        ) from error


def _stages(records: Iterable[StageRecord], tables: Path) -> list[StageRecord]:
    """The records of the stages; also writes `tables/stages.csv`."""
    rows = list(records)
    columns = ("stage", "started", "seconds", "device", "key")
    style.write_csv(tables / "stages.csv", {name: [getattr(record, name) for record in rows] for name in columns})
    return rows


def _versions(records: Iterable[StageRecord]) -> dict[str, str]:
    """Package -> version; all of them if stages ran under different ones."""
    by_package: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record.versions.items():
            by_package.setdefault(name, {})[version] = None
    return {name: " and ".join(versions) for name, versions in by_package.items()}


def _public_table(columns: dict[str, list[str]], words: PublicWords) -> dict[str, list[str]]:
    """A table without secrets and local paths, in its header neither."""
    names = unique_public_names(columns, words)
    cut = {name: words.data if name == "caption" else words for name in columns}
    return {names[name]: [cut[name](cell) for cell in cells] for name, cells in columns.items()}


def _name(folder: RunFolder) -> str:
    return folder.path.resolve().name


def _commands(folder: RunFolder) -> Sequence[tuple[str, str]]:
    name = _name(folder)
    return (
        (f"clip-cid run {name}-again --recipe {name}/recipe.yaml", "the same run in another folder"),
        (f"clip-cid verify {name}", "compare every file with its digest"),
        (f"clip-cid status {name}", "shows what is done, and what a changed recipe would run again"),
    )
