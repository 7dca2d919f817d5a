"""The runs of an ablation, one after another; stages that do not change between them run once."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clip_cid import log, os_errors, pipeline, units
from clip_cid.ablations.results import Run, refuse_another, write_results
from clip_cid.ablations.variants import TITLES, Ablation, recipe_of
from clip_cid.errors import ClipCidError, ConfigError
from clip_cid.figures.ablation import notes
from clip_cid.models.public_names import public_name
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder, digest
from clip_cid.stage_names import EVALUATE
from clip_cid.summaries import EvaluateSummary, read_summary

_TABLES = "tables.txt"


def run(ablation: Ablation, recipe: Recipe, out: Path, *, seeds: int) -> None:
    """Make every run that is not finished; write the table in `out` again after each.

    Raises:
        ClipCidError: As the stages raise it, or `out` holds another ablation; finished runs stay whole.
    """
    os_errors.refuse_address(out)
    runs = _runs(ablation, recipe, out, seeds)
    with RunFolder(out).lock():
        refuse_another(ablation, out)
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
            write_results(ablation, recipe, out, [run for run in runs if run in done])

        table = write_results(ablation, recipe, out, runs)
    log.table(*table.cells(), title=table.title)
    for note in notes(table):
        log.say(note)
    log.say(f"Written to {out / 'ablation.md'}, .csv, .json and .svg.")


def _make(run: Run, others: Sequence[RunFolder]) -> None:
    """Run the stages of one run up to its scores; its detailed messages go into its folder."""
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
    if (record := run.folder.record(EVALUATE)) is not None:
        log.info(
            f"ablate    {read_summary(EvaluateSummary, record.summary)}; {units.duration(time.monotonic() - started)}"
        )


def preview(ablation: Ablation, recipe: Recipe, out: Path, *, seeds: int) -> None:
    """Print what `run` would do: the runs, how often each stage runs, and the time if it is known."""
    os_errors.refuse_address(out)
    runs = _runs(ablation, recipe, out, seeds)
    done = {run for run in runs if _is_done(run)}
    rows: list[list[str]] = []
    for variant in ablation.variants:
        finished = sum(run.label == variant.label for run in done)
        changes = ", ".join(f"{name} {_short(value)}" for name, value in variant.changes.items())
        rows.append([variant.label, changes, f"{finished} of {seeds}"])
    log.table(["variant", "changes", "done"], rows, title=TITLES[ablation.name])
    made = _footprints(done)
    counts = [
        [stage, str(sum(run.recipe.uses(stage) for run in runs)), str(len(wanted)), str(len(wanted - made[stage]))]
        for stage, wanted in _footprints(runs).items()
        if wanted
    ]
    log.table(["stage", "runs that use it", "computed", "still to do"], counts)
    left = _seconds_left(runs, done)
    words = "the time they take is known after the first" if left is None else f"about {units.duration(left)} left"
    log.say(f"{len(runs)} runs, {len(done)} done; {words}.")


def _runs(ablation: Ablation, recipe: Recipe, out: Path, seeds: int) -> list[Run]:
    """All variants with the first seed, then with the next: so a table of every variant exists early."""
    if seeds < 1:
        raise ConfigError(f"--seeds: {seeds}, but there must be one.", fix="Three or more give an interval.")
    return [
        Run(
            variant.label,
            seed,
            recipe_of(ablation, recipe, variant, seed),
            _folder(out / "runs", variant.label, seed),
        )
        for seed in range(seeds)
        for variant in ablation.variants
    ]


def _folder(runs: Path, label: str, seed: int) -> RunFolder:
    """The folder of a run; earlier versions called it by the whole path of its teacher."""
    public = public_name(label)
    if public != label:  # two teachers may have the same name
        public = f"{public}-{digest(label)[:8]}"
    earlier, now = (runs / f"{quote(name.replace(' ', ''), safe='+,')}-seed{seed}" for name in (label, public))
    return RunFolder(earlier if earlier.exists() else now)


def _stages(recipe: Recipe) -> list[pipeline.Stage]:
    """The stages that scores depend on; single runs get no figures and no page."""
    active = list(pipeline.active_stages(recipe))
    return active[: 1 + [stage.name for stage in active].index(EVALUATE)]


def _is_done(run: Run) -> bool:
    needed = {stage.name for stage in _stages(run.recipe)}
    states = pipeline.states(run.folder, run.recipe)
    return all(state.status == "done" for state in states if state.stage.name in needed)


def _footprints(runs: Iterable[Run]) -> dict[str, set[str]]:
    """Stage -> what has to be computed for these runs."""
    footprints: dict[str, set[str]] = {stage.name: set() for stage in pipeline.STAGES}
    for run in runs:
        for stage in _stages(run.recipe):
            footprints[stage.name].add(pipeline.footprint(stage, run.recipe))
    return footprints


def _seconds_left(runs: Sequence[Run], done: set[Run]) -> float | None:
    """Mean time of each stage in the finished runs, times how often it still has to run."""
    if not done:
        return None
    made, total = _footprints(done), 0.0
    for stage, wanted in _footprints(runs).items():
        records = [record for run in done if (record := run.folder.record(stage)) is not None]
        seconds = {record.key: record.seconds for record in records}  # a stage that was taken over counts once
        total += len(wanted - made[stage]) * statistics.mean(seconds.values() or [0.0])
    return total


def _short(value: Any) -> str:
    """A value as a cell shows it; for weights, only those that are not 0."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={part:g}" for name, part in value.items() if part)
    return str(value)
