"""Stage `evaluate`: zero-shot, linear probe, neighbors and retrieval of the student and of the models beside it."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clip_cid import engine, log, units
from clip_cid.data.sets.known_sets import few
from clip_cid.errors import DataError
from clip_cid.evaluation.clip_benchmark import write_clip_benchmark
from clip_cid.evaluation.comparison import differences
from clip_cid.evaluation.features import Encoder, UnmeasurableError, drop_unfinished, prune
from clip_cid.evaluation.measure import split_features
from clip_cid.evaluation.measurements import Measurement
from clip_cid.evaluation.opened_sets import OpenedSets, Split, open_sets_of
from clip_cid.evaluation.printed_tables import (
    cost_lines,
    difference_lines,
    machines,
    same_class_lines,
    table_lines,
    variant_notes,
)
from clip_cid.evaluation.protocols import PROTOCOLS, RETRIEVAL, ZERO_SHOT
from clip_cid.evaluation.results import Results
from clip_cid.evaluation.scores import RESULTS, STUDENT, Difference, Score, read_scores
from clip_cid.evaluation.tables import Group, Table, groups_of, retrieval_table, score_table
from clip_cid.models.costs import cost_key, measure_cost
from clip_cid.models.device import resolve_device
from clip_cid.models.loading import load_clip
from clip_cid.models.references import files_beside_weights
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder, write_json
from clip_cid.stage_names import DISTILL, EVALUATE
from clip_cid.summaries import EvaluateSummary, ModelCost, costs_in


def run(folder: RunFolder, out: Path, recipe: Recipe) -> EvaluateSummary:
    """Measure every model on every set; writes results.jsonl, a table for each protocol and CLIP_benchmark's files.

    Measurements of a killed attempt, or of the results to be replaced, are taken over if their key is equal, which
    covers the content of all that they depend on. With --force nothing is: every image is embedded again.
    """
    drop_unfinished(_cache(folder))
    if folder.forgets(EVALUATE) and (dropped := prune(_cache(folder), frozenset())):
        log.info(f"evaluate: forced, so {units.counted(dropped, 'cached feature')} of this run are made again")
    models = _models(folder, recipe)
    earlier = folder.earlier(EVALUATE)
    sets = open_sets_of(recipe, folder.digests.of)
    _check_none_lost(sets.missing, earlier)
    measurements = sets.measurements(recipe)
    _say_plan(models, sets, measurements)
    folder.accept()

    results, costs = Results(out, earlier), list[ModelCost]()
    for name, reference in models.items():
        encoder = _encoder(name, reference, folder, recipe)
        if recipe.machine.ray is not None:
            measured = {one.set for one in measurements if not results.holds(one.key(encoder))}
            _compute_on_cluster(
                name, reference, sets.splits(measured), folder, recipe, gpu=encoder.device.type == "cuda"
            )
        _measure(encoder, measurements, results, sets.failed)
        costs.append(_cost(encoder, folder))
    if sets.failed and not results.scores:
        raise DataError(
            f"evaluate: nothing could be measured: {next(iter(sets.failed.values()))}",
            fix="Mend the sets, or name others.",
        )
    results.close()
    if stale := prune(_cache(folder), frozenset(entry for score in results.scores for entry in score.cached)):
        log.info(f"evaluate: {stale} cached features of other models or sets deleted")

    tables = _tables(results, sets, recipe)
    for name, table in tables.items():
        write_json(out / PROTOCOLS[name].table_file, table.as_json())
    write_clip_benchmark(out / "clip_benchmark", results.scores, models)

    _print(list(models), tables, results.scores)
    log.table(*cost_lines(costs), title=f"Cost, measured on {machines(costs)}")
    for name, reason in sets.not_measured().items():
        log.say(f"{name}: {reason}" if name not in sets.missing else f"{name} was not measured: {reason}")
    return _summary(list(models), tables, sets.not_measured(), costs)


def _models(folder: RunFolder, recipe: Recipe) -> dict[str, str]:
    """Name -> reference of every model, the student first."""
    compare = recipe.evaluate.compare
    if not recipe.evaluate.student:
        return compare
    return {STUDENT: f"local-dir:{folder.stage(DISTILL) / 'student'}", **compare}


def _check_none_lost(missing: Mapping[str, str], earlier: Path | None) -> None:
    """Scores that replace others are of at least their sets: one that is out of reach now does not lose its scores."""
    path = earlier / RESULTS if earlier is not None else None
    measured = {score.set for score in read_scores(path)} if path is not None and path.is_file() else set[str]()
    if lost := [name for name in missing if name in measured]:
        raise DataError(
            f"evaluate: {few(lost)} was measured before and is not there now, so its scores would be lost:"
            f" {missing[lost[0]]}",
            fix=f"Bring it back (paths are taken from {Path.cwd()}), or take it out of the recipe; --force goes on"
            " without it.",
        )


def _cache(folder: RunFolder) -> Path:
    return folder.path / "features"


def _encoder(name: str, reference: str, folder: RunFolder, recipe: Recipe) -> Encoder:
    machine = recipe.machine
    device = resolve_device(machine.device)
    clip = load_clip(reference, device=str(device))
    return Encoder(
        name,
        clip,
        _cache(folder),
        device=device,
        batch_size=machine.embed_batch,
        workers=machine.workers,
        tokenizer={path.name: folder.digests.of(path) for path in files_beside_weights(reference)},
    )


def _compute_on_cluster(
    name: str, reference: str, splits: Sequence[Split], folder: RunFolder, recipe: Recipe, *, gpu: bool
) -> None:
    """Have a cluster compute the features of splits that are not cached yet; the measurements read the cache."""
    device = "cuda" if gpu else "cpu"
    there = recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"device": device})})
    with log.progress(f"features {name}", len(splits), unit="splits") as bar:
        engine.run_tasks(
            splits,
            functools.partial(_open_split, name, reference, folder.path.absolute(), there),
            machine=recipe.machine,
            folder=_cache(folder),
            processes=1,
            gpus=int(gpu),
            on_done=lambda split: bar.advance(1),
        )
    drop_unfinished(_cache(folder))  # of late tasks, ended when another node had done them


def _open_split(name: str, reference: str, run: Path, recipe: Recipe) -> Callable[[Split], None]:
    """Open what the tasks read; in each process once."""
    folder = RunFolder(run, read_only=True)
    sets = open_sets_of(recipe, folder.digests.of)
    return functools.partial(_compute, _encoder(name, reference, folder, recipe), sets, recipe)


def _compute(encoder: Encoder, sets: OpenedSets, recipe: Recipe, wanted: Split) -> None:
    """A task: put the features of a split into the cache."""
    with contextlib.suppress(UnmeasurableError):  # it is said when it is measured
        if wanted.split is None:
            encoder.images(next(pairs for pairs in sets.retrieval if pairs.name_of_set == wanted.set), before=False)
        else:
            labelled = next(labelled for labelled in sets.labelled if labelled.name == wanted.set)
            split_features(encoder, labelled, wanted.split, recipe.evaluate)


def _say_plan(models: Mapping[str, str], sets: OpenedSets, measurements: Sequence[Measurement]) -> None:
    images = sum(len(split) for labelled in sets.labelled for split in labelled.splits.values())
    images += sum(len(pairs) for pairs in sets.retrieval)
    log.info(
        f"evaluate: {len(models)} models, {len(measurements)} measurements each on"
        f" {len(sets.labelled) + len(sets.retrieval)} sets; {images:,} images to embed for each model, minus"
        " those already embedded"
    )


def _measure(
    encoder: Encoder, measurements: Sequence[Measurement], results: Results, failed: dict[tuple[str, str], str]
) -> None:
    """Measure one model on everything; earlier measurements are taken over.

    A set that turns out not to be measurable is added to `failed`: no other model is measured on it.
    """
    known = 0
    for measurement in measurements:
        if (measurement.set, measurement.task) in failed:
            continue
        key = measurement.key(encoder)
        if results.take_over(key, model=encoder.name) is not None:
            known += 1
            continue
        encoder.forget_used()
        try:
            scores, answers = measurement.measure(encoder)
        except UnmeasurableError as error:
            failed[measurement.set, measurement.task] = f"{error.problem} {error.fix}"
            log.warn(f"{error.problem} No {PROTOCOLS[measurement.task].short} on it. {error.fix}")
            continue
        cached = tuple(encoder.forget_used())
        results.add(key, [replace(score, cached=cached) for score in scores], answers)
    if known:
        log.info(f"evaluate: {known} of {len(measurements)} measurements of {encoder.name} were made before")


def _cost(encoder: Encoder, folder: RunFolder) -> ModelCost:
    """The cost of a model; that of the results to be replaced, if it was measured with these weights on this machine."""
    record = None if folder.forgets(EVALUATE) else folder.record(EVALUATE)
    key = cost_key(encoder.clip, encoder.digest)
    for known in [] if record is None else costs_in(record.summary):
        if known.key == key:
            return replace(known, model=encoder.name)
    return measure_cost(encoder.name, encoder.clip, weights=encoder.digest)


def _tables(results: Results, sets: OpenedSets, recipe: Recipe) -> dict[str, Table]:
    """One table for each protocol the recipe asks for, with the models' differences."""
    settings, scores = recipe.evaluate, results.scores
    untrained = {labelled.name: "no train split" for labelled in sets.labelled if "train" not in labelled.splits}
    tables: dict[str, Table] = {}
    for task, protocol in PROTOCOLS.items():
        if task == RETRIEVAL or not getattr(settings, task):
            continue
        missing = sets.reasons(task) | (untrained if protocol.needs_training_images else {})
        if groups := groups_of(task, list(recipe.evaluate.sets)):
            gaps = _differences(results, task, groups, recipe)
            tables[task] = score_table(scores, task, groups=groups, missing=missing, differences=gaps)
    if settings.retrieval:
        gaps = _differences(results, RETRIEVAL, [], recipe)
        tables[RETRIEVAL] = retrieval_table(
            scores, sets=list(settings.retrieval), missing=sets.reasons(RETRIEVAL), differences=gaps
        )
    return tables


def _differences(results: Results, task: str, groups: Sequence[Group], recipe: Recipe) -> list[Difference]:
    scores = [score for score in results.scores if score.task == task]
    return differences(scores, results.answers, groups=groups, seed=recipe.evaluate.seed)


def _print(models: list[str], tables: Mapping[str, Table], scores: Sequence[Score]) -> None:
    for name, table in tables.items():
        title = PROTOCOLS[name].title
        log.table(*table_lines(table, models), title=f"{title}, in percent")
        if name == ZERO_SHOT and (same_classes := same_class_lines(scores, models))[1]:
            log.table(*same_classes, title="Robustness, in percent")
        if gaps := table.summary.differences:
            log.table(*difference_lines(gaps, models), title=f"{title}: differences in points")
    for note in variant_notes(tables):
        log.say(note)


def _summary(
    models: list[str], tables: Mapping[str, Table], missing: dict[str, str], costs: list[ModelCost]
) -> EvaluateSummary:
    means = {name: table.summary.mean for name, table in tables.items()}
    keys = {name: name if name == RETRIEVAL else f"{name}_mean" for name in tables}
    words = [
        f"{PROTOCOLS[name].short} {units.in_percent(mean.by_model.get(models[0]))} % (mean of {mean.of})"
        for name, mean in means.items()
    ]
    return EvaluateSummary(
        models={model: {keys[name]: mean.by_model.get(model) for name, mean in means.items()} for model in models},
        mean_of={name: mean.of for name, mean in means.items()},
        missing=missing,
        headline=f"{models[0]}: {', '.join(words)}",
        costs=costs,
    )
