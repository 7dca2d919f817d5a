"""The paper's Tables 4 to 7 as lists of recipe changes, run with several seeds and put into one table.

Each variant with each seed is an ordinary run folder in OUT/runs. A stage that another of these runs has finished from the
same settings and inputs is taken over, so that what does not change between variants is computed once.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from clip_cid import log, pipeline, units
from clip_cid.errors import ClipCidError, ConfigError, RunError
from clip_cid.figures.ablation import AblationTable, Line, notes, write
from clip_cid.loss_table import LOSSES
from clip_cid.recipe import PRESETS, Recipe, parse_recipe
from clip_cid.run_folder import RunFolder, read_json, write_json
from clip_cid.stage_names import BALANCE, CLUSTER, DISTILL, EMBED, EVALUATE

Name = Literal["threshold", "losses", "clusters", "teacher"]
Number = TypeVar("Number", int, float)

THRESHOLDS = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08)
"""Table 4; scaled to a recipe whose own threshold is not the paper's 0.07."""
LOSS_PARTS = {
    "clip": (),
    "clip + cls": ("cluster_cls",),
    "clip + kl": ("cluster_kl",),
    "clip + cluster": ("cluster_cls", "cluster_kl"),
    "clip + instance": ("instance_image", "instance_text"),
    "clip + cluster + instance": ("cluster_cls", "cluster_kl", "instance_image", "instance_text"),
}
"""Table 5: what each row adds to the contrastive loss; the rows of `cls` and `kl` alone are ours."""
_BASELINE = "clip"
READINGS = ("paper-r1", "paper-r2")
PEERS = ("open-clip", "clip-kd", "tiny-clip", "mobile-clip")
CLUSTER_COUNTS = (100_000, 500_000, 1_000_000, 5_000_000)
"""Table 6; scaled to a recipe whose own number is not the paper's million."""
_PAPER_THRESHOLD, _PAPER_CLUSTERS = 0.07, 1_000_000
_TITLES = {
    "threshold": "Ablation of balance.threshold (paper Table 4)",
    "losses": "Ablation of distill.weights (paper Table 5)",
    "clusters": "Ablation of cluster.num_centers (paper Table 6)",
    "teacher": "Ablation of embed.teacher (paper Table 7)",
}
_LAST = EVALUATE
_RESULTS, _TABLES = "ablation.json", "tables.txt"
_METRICS = {
    "zero_shot": "zero-shot",
    "linear_probe": "linear probe",
    "knn": "neighbors",
    "retrieval": "mean recall",
}


@dataclass(frozen=True)
class Variant:
    """A row of the table: dotted names of settings and their new values."""

    label: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """What is compared with what; `seeded` are the settings that take the number of the seed."""

    name: Name
    variants: tuple[Variant, ...]
    reference: str
    seeded: tuple[str, ...] = ("distill.seed",)


@dataclass(frozen=True, eq=False)
class Run:
    """A variant with a seed, in its own run folder."""

    label: str
    seed: int
    recipe: Recipe
    folder: RunFolder


def plan(name: Name, recipe: Recipe, *, values: Sequence[str] = (), peers: bool = False) -> Ablation:
    """The variants of a recipe.

    Args:
        name: Which of the paper's tables.
        recipe: What all variants have in common; its own setting is the reference where it is one of them.
        values: Thresholds, numbers of clusters, or teachers as in evaluate.compare, instead of the paper's.
        peers: Also train with the losses of peers; for `losses` only.

    Raises:
        ConfigError: The recipe has nothing to vary, or the values do not fit.
    """
    if peers and name != "losses":
        raise ConfigError(f"--peers: {name} compares no losses.", fix="Use it with `clip-cid ablate losses`.")
    if not recipe.uses(DISTILL) or not recipe.uses(_LAST):
        raise ConfigError("ablate: this recipe measures no student.", fix="Name sets in evaluate.sets or retrieval.")
    if name == "losses":
        return _losses(recipe, values, peers=peers)
    return {"threshold": _thresholds, "clusters": _clusters, "teacher": _teachers}[name](recipe, values)


def _thresholds(recipe: Recipe, values: Sequence[str]) -> Ablation:
    settings = recipe.balance
    _refuse_unused(recipe, BALANCE, settings.existing)
    if not values and settings.target_removed is not None:
        raise ConfigError(
            "balance.target_removed: it takes the place of the threshold, so there is none to scale the paper's by.",
            fix="Name thresholds with --values.",
        )
    scale = settings.threshold / _PAPER_THRESHOLD
    chosen = _numbers(values, float) or [
        settings.threshold if value == _PAPER_THRESHOLD else float(f"{scale * value:.3g}") for value in THRESHOLDS
    ]
    furthest = max(*chosen, settings.max_threshold or 0)  # one search for pairs answers all of them
    changes = {
        f"{value:g}": {
            "balance.threshold": value,
            "balance.max_threshold": furthest,
            "balance.target_removed": None,
        }
        for value in chosen
    }
    return _ablation("threshold", changes, own=f"{settings.threshold:g}" if settings.target_removed is None else None)


def _clusters(recipe: Recipe, values: Sequence[str]) -> Ablation:
    _refuse_unused(recipe, CLUSTER, recipe.cluster.existing)
    own = recipe.cluster.num_centers
    chosen = _numbers(values, int) or [max(1, round(own * count / _PAPER_CLUSTERS)) for count in CLUSTER_COUNTS]
    changes = {f"{count:,}": {"cluster.num_centers": count} for count in chosen}
    return _ablation("clusters", changes, own=f"{own:,}", seeded=("distill.seed", "cluster.seed"))


def _teachers(recipe: Recipe, values: Sequence[str]) -> Ablation:
    _refuse_unused(recipe, EMBED, recipe.embed.existing)
    changes = {value: _teacher(value) for value in values}
    if len(changes) < 2:
        raise ConfigError(
            f"ablate teacher: {len(changes)} teachers to compare.",
            fix="Name two or more with --values: run:PATH, local-dir:PATH, hf-hub:ORG/NAME, or NAME/TAG of open_clip.",
        )
    if recipe.uses(BALANCE) and recipe.balance.target_removed is None:
        log.warn(
            "a threshold means something else in each teacher's space; balance.target_removed in the recipe removes the"
            " same share for all"
        )
    own = recipe.embed.teacher
    return _ablation("teacher", changes, own=own if ":" in own else f"{own}/{recipe.embed.pretrained}")


def _teacher(reference: str) -> dict[str, Any]:
    if ":" in reference:
        return {"embed.teacher": reference}
    name, _, tag = reference.partition("/")
    if not tag:
        raise ConfigError(f"--values: {reference} is an architecture without weights.", fix=f"Give {reference}/TAG.")
    return {"embed.teacher": name, "embed.pretrained": tag}


def _losses(recipe: Recipe, values: Sequence[str], *, peers: bool) -> Ablation:
    if values:
        raise ConfigError("--values: the rows of losses are fixed.", fix="Leave it out; --peers adds peers' losses.")
    _refuse_unused(recipe, CLUSTER, None)
    own = recipe.distill.weights.model_dump()
    contrastive = [loss.name for loss in LOSSES if not loss.reads_targets]
    parts = LOSS_PARTS["clip + cluster + instance"]
    if silent := [part for part in parts if own[part] == 0]:
        raise ConfigError(
            f"distill.weights.{silent[0]}: 0 in this recipe, so there is no such loss to take away.",
            fix="Give the losses of the paper weights, or use a preset such as paper-r1.",
        )
    changes: dict[str, dict[str, Any]] = {
        label: {"distill.weights": {name: own[name] if name in (*contrastive, *added) else 0.0 for name in own}}
        for label, added in LOSS_PARTS.items()
    }
    for name in (*READINGS, *(PEERS if peers else ())):
        weights, settings = PRESETS[name]
        changes[name] = {"distill.weights": weights, **{f"distill.{key}": value for key, value in settings.items()}}
    return _ablation("losses", changes, own=_BASELINE)


def _ablation(
    name: Name,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    own: str | None,
    seeded: tuple[str, ...] = ("distill.seed",),
) -> Ablation:
    variants = tuple(Variant(label, change) for label, change in changes.items())
    reference = own if own is not None and own in changes else variants[0].label
    return Ablation(name, variants, reference, seeded)


def _refuse_unused(recipe: Recipe, stage: str, existing: Path | None) -> None:
    """What a recipe does not compute cannot be varied."""
    if existing is not None:
        raise ConfigError(f"{stage}.existing: {existing} was made elsewhere, so it cannot be varied.", fix="Remove it.")
    if not recipe.uses(stage):
        raise ConfigError(
            f"ablate: this recipe does not use {stage}.",
            fix="embed.teacher, balance.enabled and distill.weights decide which stages there are.",
        )


def _numbers(values: Sequence[str], kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"--values: {error}.", fix="Give numbers, such as --values 0.05 0.07.") from error


def recipe_of(ablation: Ablation, recipe: Recipe, variant: Variant, seed: int) -> Recipe:
    """The recipe of one run: the student is the only model measured, since the others are the same for all."""
    changes = {**variant.changes, **dict.fromkeys(ablation.seeded, seed), "evaluate.compare": {}}
    values = recipe.model_dump(mode="json")
    for name, value in changes.items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return parse_recipe(values, where=f"ablate {ablation.name}, {variant.label}")


def run(ablation: Ablation, recipe: Recipe, out: Path, *, seeds: int) -> None:
    """Make every run that is not finished; the table in `out` is written anew after each.

    Raises:
        ClipCidError: As the stages raise it, or `out` holds another ablation; finished runs stay whole.
    """
    runs = _runs(ablation, recipe, out, seeds)
    with RunFolder(out).lock():
        _refuse_another(ablation, out)
        done = {run for run in runs if _is_done(run)}
        log.info(f"ablate    {len(done)} of {len(runs)} runs are done")
        for number, current in enumerate(runs, start=1):
            if current in done:
                continue
            left = _seconds_left(runs, done)
            about = "" if left is None else f"; about {units.duration(left)} left"
            log.info(f"ablate    run {number} of {len(runs)}: {current.label}, seed {current.seed}{about}")
            _make(current, [other.folder for other in runs if other is not current])
            done.add(current)
            _write(ablation, recipe, out, [run for run in runs if run in done])
        table = _write(ablation, recipe, out, runs)
    log.table(*table.cells(), title=table.title)
    for note in notes(table):
        log.say(note)
    log.say(f"Written to {out / 'ablation.md'}, .csv, .json and .svg.")


def _make(run: Run, others: Sequence[RunFolder]) -> None:
    """The stages of one run up to its scores; what it says in detail goes into its folder."""
    started = time.monotonic()
    run.folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with log.quiet(run.folder.path / _TABLES):
            pipeline.take_over(run.folder, run.recipe, others)
            for stage in _stages(run.recipe):
                pipeline.run(run.folder, run.recipe, only=stage.name)
    except ClipCidError as error:
        error.problem = f"{run.label}, seed {run.seed}: {error.problem}"
        raise
    if (record := run.folder.record(_LAST)) is not None:
        log.info(f"ablate    {record.summary['headline']}; {units.duration(time.monotonic() - started)}")


def preview(ablation: Ablation, recipe: Recipe, out: Path, *, seeds: int) -> None:
    """Print what `run` would do: the runs, how often each stage is computed, and the time where earlier runs tell it."""
    runs = _runs(ablation, recipe, out, seeds)
    done = {run for run in runs if _is_done(run)}
    rows: list[list[str]] = []
    for variant in ablation.variants:
        finished = sum(run.label == variant.label for run in done)
        changes = ", ".join(f"{name} {_short(value)}" for name, value in variant.changes.items())
        rows.append([variant.label, changes, f"{finished} of {seeds}"])
    log.table(["variant", "changes", "done"], rows, title=_TITLES[ablation.name])
    made = _footprints(done)
    counts = [
        [stage, str(sum(run.recipe.uses(stage) for run in runs)), str(len(wanted)), str(len(wanted - made[stage]))]
        for stage, wanted in _footprints(runs).items()
        if wanted
    ]
    log.table(["stage", "runs that use it", "computed", "still to do"], counts)
    left = _seconds_left(runs, done)
    words = "how long they take is known after the first" if left is None else f"about {units.duration(left)} left"
    log.say(f"{len(runs)} runs, {len(done)} done; {words}.")


def _runs(ablation: Ablation, recipe: Recipe, out: Path, seeds: int) -> list[Run]:
    """All variants with the first seed, then with the next: a table of every variant is there early."""
    if seeds < 1:
        raise ConfigError(f"--seeds: {seeds}, but there must be one.", fix="Three or more give an interval.")
    return [
        Run(
            variant.label,
            seed,
            recipe_of(ablation, recipe, variant, seed),
            RunFolder(out / "runs" / f"{quote(variant.label.replace(' ', ''), safe='+,')}-seed{seed}"),
        )
        for seed in range(seeds)
        for variant in ablation.variants
    ]


def _refuse_another(ablation: Ablation, out: Path) -> None:
    path = out / _RESULTS
    if path.is_file() and (other := read_json(path)["ablation"]) != ablation.name:
        raise ConfigError(f"{out}: holds the ablation {other!r}.", fix="Give another folder.")


def _stages(recipe: Recipe) -> list[pipeline.Stage]:
    """Those that scores depend on; figures and pages of single runs are left out."""
    active = list(pipeline.active_stages(recipe))
    return active[: 1 + [stage.name for stage in active].index(_LAST)]


def _is_done(run: Run) -> bool:
    needed = {stage.name for stage in _stages(run.recipe)}
    found = pipeline.states(run.folder, run.recipe)
    return all(state.status == "done" for state in found if state.stage.name in needed)


def _footprints(runs: Iterable[Run]) -> dict[str, set[str]]:
    """Stage -> what has to be computed for these runs."""
    found: dict[str, set[str]] = {stage.name: set() for stage in pipeline.STAGES}
    for run in runs:
        for stage in _stages(run.recipe):
            found[stage.name].add(pipeline.footprint(stage, run.recipe))
    return found


def _seconds_left(runs: Sequence[Run], done: set[Run]) -> float | None:
    """What the stages of finished runs took on average, times how often each has still to be computed."""
    if not done:
        return None
    made, total = _footprints(done), 0.0
    for stage, wanted in _footprints(runs).items():
        records = [record for run in done if (record := run.folder.record(stage)) is not None]
        seconds = {record.key: record.seconds for record in records}  # a stage that was taken over counts once
        total += len(wanted - made[stage]) * statistics.mean(seconds.values() or [0.0])
    return total


def _write(ablation: Ablation, recipe: Recipe, out: Path, finished: Sequence[Run]) -> AblationTable:
    """The table of the finished runs, and their numbers one by one as JSON."""
    found = [(run, _scores(run.folder), _summary(run.folder)) for run in finished]
    metrics = {tuple(scores) for _, scores, _ in found}
    if metrics == {()}:
        raise RunError(
            f"{out}: the runs measured the student on nothing.",
            fix="evaluate.zero_shot, linear_probe and knn say what is measured; the last two need sets with a train split.",
        )
    if len(metrics) > 1:
        raise RunError(
            f"{out}: the runs were measured on different sets ({' / '.join(map(', '.join, sorted(metrics)))}).",
            fix="Run the same command again; what is not current is measured again.",
        )
    lines: list[Line] = []
    for variant in ablation.variants:
        own = [(run, scores, summary) for run, scores, summary in found if run.label == variant.label]
        lines.append(
            Line(
                variant.label,
                pairs=tuple(summary["pairs"] for _, _, summary in own),
                scores={run.seed: scores for run, scores, _ in own},
                collapsed=sum(summary["collapse_alarm"] for _, _, summary in own),
            )
        )
    table = AblationTable(_TITLES[ablation.name], ablation.reference, metrics.pop(), tuple(lines))
    write(table, out)
    results = {
        "ablation": ablation.name,
        "reference": ablation.reference,
        "seeded": ablation.seeded,
        "changes": {variant.label: variant.changes for variant in ablation.variants},
        "runs": [
            {"variant": run.label, "seed": run.seed, "folder": run.folder.path.name, "scores": scores, **summary}
            for run, scores, summary in found
        ],
        "recipe": recipe.model_dump(mode="json"),
    }
    write_json(out / _RESULTS, results)
    return table


def _scores(folder: RunFolder) -> dict[str, float]:
    """Metric -> the student's mean over sets that may be averaged, a share of 1; the name says over how many."""
    found: dict[str, float] = {}
    for task, words in _METRICS.items():
        path = folder.stage(_LAST) / f"{task}.json"
        if not path.is_file():
            continue
        table = read_json(path)
        for group in table.get("groups") or [{**table, "title": f"mean of {table['mean_of']}"}]:
            if "student" in group["mean"]:
                found[f"{words}, {group['title']}"] = group["mean"]["student"]
    return found


def _summary(folder: RunFolder) -> dict[str, Any]:
    record = folder.record(DISTILL)
    assert record is not None, "only finished runs are asked"
    return {name: record.summary[name] for name in ("pairs", "steps", "collapse_alarm", "seconds")}


def _short(value: Any) -> str:
    """A value as a cell shows it; of weights those that are not 0."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={part:g}" for name, part in value.items() if part)
    return str(value)
