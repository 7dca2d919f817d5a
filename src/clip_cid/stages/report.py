"""One self-contained HTML page about the run, and its tables as CSV."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid import log, units
from clip_cid.data.pairs.pairs import reason_kind
from clip_cid.data.pairs.pictures import NoPicturesError, open_pictures
from clip_cid.errors import DataError
from clip_cid.figures import losses, scores, style
from clip_cid.figures.differences import TASKS, read_differences
from clip_cid.recipe import Recipe, dump_recipe
from clip_cid.report import galleries, page, story
from clip_cid.report.score_tables import score_tables
from clip_cid.report.thumbnails import Thumbnails
from clip_cid.run_folder import RunFolder, StageRecord, atomic_file

PAGE = "report.html"
_STAGES = ("embed", "balance", "cluster", "distill", "evaluate", "draw")
_THUMBNAIL_BUDGET = 3_000_000  # bytes of base64: some 1,300 thumbnails of 96 pixels
_SAMPLE_PAIRS = 12
_REASONS_SHOWN = 20
_WITH_PICTURES = ("removed_sets", "removed_pairs", "clusters")  # tables that hold keys and captions
_FIGURES_OF_PICTURES = ("single_linkage", "patch_pca", "activation_maps")
_ALT = {
    "cluster_sizes": "Images in each cluster by rank, before and after balance, on logarithmic axes",
    "cluster_sizes_small": "Images in each cluster by rank, before and after balance",
    "gain": "The student's lead over the baseline by way of measuring, with intervals",
    "throughput": "Pairs a second and share of the time spent waiting for data, by training step",
    "cluster_rounds": "Objective of k-means by round",
    "distances": "Histogram of the removed images' distance to the kept one, with the threshold",
    "removed_share": "Share of the images removed by threshold, with the chosen one",
    "losses": "Each loss part by training step",
    "weights": "Density of the weights of the last layer of the last block",
    "radar": "Scores of all models on all sets, each axis on its own range",
    "embedding_map": "Map of some kept images, those of the largest clusters in color",
    "single_linkage": "Tree of the links that join one set of duplicates, its pictures below, with the threshold",
    "patch_pca": "Images of some classes, and below them their patches in color as each model sees them",
    "activation_maps": "Images, and below them where each model sees what a prompt names",
    **{f"scores_{task}": f"{name} scores with intervals, by set and model" for task, name in TASKS.items()},
}


@dataclass(frozen=True)
class Card:
    """One fact at the head of the page."""

    label: str
    value: str
    note: str = ""


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Write `report.html` and `tables/*.csv`."""
    draw = folder.stage("draw")
    records = {name: record for name in _STAGES if recipe.uses(name) and (record := folder.record(name))}
    tables = out / "tables"
    tables.mkdir()
    thumbnails, sample, no_pictures = _pictures(folder, draw, recipe)
    pairs = galleries.removed_pairs(draw / "removed_pairs.csv", thumbnails)
    measured = _scores(folder, recipe, tables)
    for path in sorted(draw.glob("*.csv")):
        if recipe.report.images or path.stem not in _WITH_PICTURES:
            shutil.copyfile(path, tables / path.name)
    values = {
        "title": recipe.report.title,
        "run": folder.path.name,
        "digest": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest(),
        "blur": recipe.report.blur,
        "story": _story(records, measured, recipe),
        "cards": _cards(records, recipe),
        "summaries": {name: record.summary for name, record in records.items()},
        "figures": _figures(draw, pictures=recipe.report.images),
        "left_out": records["draw"].summary["left_out"],
        "numbers": records["draw"].summary["figures"],
        "metric_name": recipe.balance.metric,
        "metric": recipe.balance.metric.replace("_", " "),
        "radius": recipe.balance.max_radius,
        "loss_name": losses.display_name,
        "side": recipe.report.thumbnail_px,
        "removed_sets": _gallery(galleries.removed_sets, draw / "removed_sets.csv", thumbnails),
        "removed_pairs": pairs,
        "examples": {} if no_pictures else galleries.typical_pairs(pairs),
        "clusters": _gallery(galleries.clusters, draw / "clusters.csv", thumbnails),
        "sample": galleries.sample(sample, thumbnails),
        "scores": measured,
        "skipped": _skipped(folder, recipe, tables),
        "stages": _stages(records, tables),
        "versions": _versions(records),
        "settings": dump_recipe(recipe),
        "seeds": _seeds(recipe),
        "commands": _commands(folder),
        "thumbnails": thumbnails,
        "no_pictures": no_pictures,
        "tables": sorted(path.name for path in tables.iterdir()),
    }
    with atomic_file(out / PAGE) as temporary:
        temporary.write_text(page.render(values), encoding="utf-8")
    shown = folder.path / "report" / PAGE
    size = (out / PAGE).stat().st_size
    return {"page": str(shown), "bytes": size, "picture_bytes": thumbnails.bytes_used, "no_pictures": no_pictures}


def _pictures(folder: RunFolder, draw: Path, recipe: Recipe) -> tuple[Thumbnails, dict[str, str], str | None]:
    """Thumbnails of what the page shows, a sample of the pairs, and why there are no pictures, if there are none."""
    if not recipe.report.images:
        return Thumbnails(None, side=0, budget=0), {}, "report.images is off"
    tables = [path for name in _WITH_PICTURES if (path := draw / f"{name}.csv").is_file()]
    wanted = {key: row for path in tables for key, row in galleries.rows_by_key(path).items()}
    try:
        pictures = open_pictures(folder, recipe, wanted)
    except NoPicturesError as reason:
        log.warn(f"report: no pictures, because {reason}")
        return Thumbnails(None, side=0, budget=0), {}, str(reason)
    sample = pictures.sample(_SAMPLE_PAIRS, seed=0)
    return Thumbnails(pictures, side=recipe.report.thumbnail_px, budget=_THUMBNAIL_BUDGET), sample, None


def _gallery(read: Any, path: Path, thumbnails: Thumbnails) -> dict[str, list[galleries.Gallery]]:
    """Stratum -> its sets or clusters; empty where the draw stage chose none."""
    found: dict[str, list[galleries.Gallery]] = {}
    for gallery in read(path, thumbnails) if path.is_file() else []:
        found.setdefault(gallery.stratum, []).append(gallery)
    return found


def _figures(draw: Path, *, pictures: bool) -> dict[str, str]:
    shown = [name for name in _ALT if pictures or name not in _FIGURES_OF_PICTURES]
    return {name: page.inline_svg(path, _ALT[name]) for name in shown if (path := draw / f"{name}.svg").is_file()}


def _cards(records: dict[str, StageRecord], recipe: Recipe) -> list[Card]:
    cards: list[Card] = []
    if "balance" in records:
        cards += _balance_cards(records["balance"].summary, recipe)
    elif "embed" in records:
        embed = records["embed"].summary
        cards.append(Card("pairs in", f"{embed['images']:,}", f"{embed['ok']:,} usable, none removed"))
    if recipe.has_teacher:
        teacher = recipe.embed.teacher if recipe.embed.existing is None else str(recipe.embed.existing)
        dim = records["embed"].summary["dim"] if "embed" in records else "?"
        cards.append(Card("teacher", _short_name(teacher), f"{dim} dimensions"))
    distill = records["distill"].summary
    if "embed" not in records:
        cards.append(Card("pairs in", f"{distill['pairs']:,}", "plain CLIP training, without a teacher"))
    cards.append(
        Card(
            "student",
            _short_name(recipe.distill.student),
            f"{distill['steps']:,} steps, {distill['pairs_seen']:,} pairs seen",
        )
    )
    seconds = sum(record.seconds for record in records.values())
    slowest = max(records.values(), key=lambda record: record.seconds)
    note = f"{units.duration(slowest.seconds)} of it {slowest.stage}, on {records['distill'].device}"
    return [*cards, Card("wall time", units.duration(seconds), note)]


def _balance_cards(balance: dict[str, Any], recipe: Recipe) -> list[Card]:
    skipped = balance["images"] - balance["ok"]
    cards = [
        Card("pairs in", f"{balance['images']:,}", f"{skipped:,} skipped" if skipped else "all usable"),
        Card("kept", f"{balance['kept']:,}"),
        Card("removed", f"{balance['removed']:,}", f"{units.percent(balance['removed_share'])} of the usable ones"),
        Card(
            "sets of duplicates",
            f"{balance['sets_with_duplicates']:,}",
            f"the largest has {balance['largest_set']:,} images",
        ),
    ]
    if "threshold" not in balance:
        return [*cards, Card("threshold", "none", "the kept rows were made elsewhere")]
    scales = {name.replace("_", " "): f"{value:.4g}" for name, value in balance["threshold"].items()}
    chosen = recipe.balance.metric.replace("_", " ")
    others = ", ".join(f"{value} {name}" for name, value in scales.items() if name != chosen)
    return [*cards, Card(f"threshold, {chosen}", scales[chosen], f"= {others}")]


def _scores(folder: RunFolder, recipe: Recipe, tables: Path) -> dict[str, Any] | None:
    """The tables by task, the models, and whom the student is compared with."""
    if not recipe.uses("evaluate"):
        return None
    evaluate = folder.stage("evaluate")
    found, differences = scores.read_scores(evaluate / "results.jsonl"), read_differences(evaluate)
    scores.write_table(found, differences, tables / "scores.csv")
    models = scores.model_order(found)
    return {
        "tasks": score_tables(evaluate, found, differences),
        "models": models,
        "others": [model for model in models if model != scores.STUDENT],
    }


def _story(records: dict[str, StageRecord], measured: dict[str, Any] | None, recipe: Recipe) -> list[story.Statement]:
    """What a newcomer should know first; a statement without its numbers in this run is left out."""
    numbers = records["draw"].summary["figures"]
    statements = []
    if "balance" in records:
        statements.append(story.removed(records["balance"].summary))
    statements.append(story.flattened(numbers.get("cluster_sizes", {})))
    if measured is not None:
        baseline = scores.reference_model(measured["models"])
        other = None if baseline is None else _trained_elsewhere(recipe.evaluate.compare[baseline])
        statements.append(story.gained(measured["tasks"], baseline, _trained(records["distill"]), other))
    return [statement for statement in statements if statement is not None]


def _trained_elsewhere(reference: str) -> story.Trained | None:
    """How a model was trained, if it is the student of a run that is still there."""
    record = RunFolder(Path(reference.removeprefix("run:"))).record("distill") if reference.startswith("run:") else None
    return None if record is None else _trained(record)


def _trained(record: StageRecord) -> story.Trained:
    settings = record.settings["distill"]
    return story.Trained(
        steps=record.summary["steps"],
        pairs_seen=record.summary["pairs_seen"],
        student=settings["student"],
        losses=tuple(name for name, weight in settings["weights"].items() if weight),
    )


def _seeds(recipe: Recipe) -> dict[str, int]:
    """Section -> its seed, of those that have one."""
    sections = {name: getattr(recipe, name) for name in Recipe.model_fields}
    return {name: section.seed for name, section in sections.items() if "seed" in type(section).model_fields}


def _skipped(folder: RunFolder, recipe: Recipe, tables: Path) -> list[tuple[str, str, int]]:
    """Stage, reason and count of the samples that were passed over."""
    counts: Counter[tuple[str, str]] = Counter()
    for stage in ("embed", "distill"):
        path = folder.stage(stage) / "skipped.jsonl" if recipe.uses(stage) else None
        if path is not None and path.is_file():
            counts.update((stage, reason) for reason in _reasons(path))
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    found = [(stage, reason, count) for (stage, reason), count in ordered]
    style.write_csv(
        tables / "skipped.csv",
        {name: [line[index] for line in found] for index, name in enumerate(("stage", "reason", "samples"))},
    )
    rest = found[_REASONS_SHOWN:]
    if rest:
        more = f"{len(rest):,} other reasons, in tables/skipped.csv"
        return [*found[:_REASONS_SHOWN], ("", more, sum(count for _, _, count in rest))]
    return found


def _reasons(path: Path) -> list[str]:
    try:
        return [reason_kind(json.loads(line)["reason"]) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a list of skipped samples ({error}).", fix="Run the stage that wrote it again, with --force."
        ) from error


def _stages(records: dict[str, StageRecord], tables: Path) -> list[StageRecord]:
    found = list(records.values())
    style.write_csv(
        tables / "stages.csv",
        {
            name: [getattr(record, name) for record in found]
            for name in ("stage", "started", "seconds", "device", "key")
        },
    )
    return found


def _versions(records: dict[str, StageRecord]) -> dict[str, str]:
    """Package -> version; all of them where stages ran under different ones."""
    names = dict.fromkeys(name for record in records.values() for name in record.versions)
    return {
        name: " and ".join(dict.fromkeys(r.versions[name] for r in records.values() if name in r.versions))
        for name in names
    }


def _commands(folder: RunFolder) -> Sequence[tuple[str, str]]:
    recipe = folder.path / "recipe.yaml"
    return (
        (f"clip-cid run {folder.path.name}-again --recipe {recipe}", "the same run in another folder"),
        (f"clip-cid verify {folder.path}", "compare every file with its digest"),
        (f"clip-cid status {folder.path}", "what is done, and what a changed recipe would run again"),
    )


def _short_name(reference: str) -> str:
    """The last part of a path or of a reference to one."""
    return reference.rstrip("/").split("/")[-1].removeprefix("run:").removeprefix("local-dir:")
