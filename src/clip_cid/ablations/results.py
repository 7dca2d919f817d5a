"""The results of an ablation's finished runs: one table of their means, and every number as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid.ablations.variants import TITLES, Ablation
from clip_cid.errors import ConfigError, RunError
from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.scores import STUDENT, read_task_summaries
from clip_cid.figures.ablation import AblationTable, Line, write
from clip_cid.models.public_names import public_settings, unique_public_names
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder, read_json, write_json
from clip_cid.stage_names import DISTILL, EVALUATE
from clip_cid.summaries import DistillSummary, read_summary

_RESULTS = "ablation.json"


@dataclass(frozen=True, eq=False)
class Run:
    """A variant with a seed, in its own run folder."""

    label: str
    seed: int
    recipe: Recipe
    folder: RunFolder


@dataclass(frozen=True)
class _Finished:
    """What a run came to."""

    run: Run
    scores: dict[str, float]
    training: DistillSummary

    def as_json(self, name: str) -> dict[str, Any]:
        training = {name: getattr(self.training, name) for name in ("pairs", "steps", "collapse_alarm", "seconds")}
        about = {"variant": name, "seed": self.run.seed, "folder": self.run.folder.path.name}
        return {**about, "scores": self.scores, **training}


def write_results(ablation: Ablation, recipe: Recipe, out: Path, runs: Sequence[Run]) -> AblationTable:
    """Write the table of the finished runs, and their numbers one by one as JSON, fit to be published.

    Raises:
        RunError: The runs measured nothing, or measured different sets.
    """
    finished = [_Finished(run, _scores(run.folder), _training(run.folder)) for run in runs]
    metrics, names = _metrics(out, finished), unique_public_names(variant.label for variant in ablation.variants)

    lines: list[Line] = []
    for variant in ablation.variants:
        own = [one for one in finished if one.run.label == variant.label]
        lines.append(
            Line(
                names[variant.label],
                pairs=tuple(one.training.pairs for one in own),
                scores={one.run.seed: one.scores for one in own},
                collapsed=sum(one.training.collapse_alarm for one in own),
            )
        )
    table = AblationTable(TITLES[ablation.name], names[ablation.reference], metrics, tuple(lines))
    write(table, out)

    results = {
        "ablation": ablation.name,
        "reference": names[ablation.reference],
        "seeded": ablation.seeded,
        "changes": {names[variant.label]: public_settings(variant.changes) for variant in ablation.variants},
        "runs": [one.as_json(names[one.run.label]) for one in finished],
        "recipe": public_settings(recipe.model_dump(mode="json")),
    }
    write_json(out / _RESULTS, results)
    return table


def refuse_another(ablation: Ablation, out: Path) -> None:
    """Refuse a folder that holds another ablation.

    Raises:
        ConfigError: It does.
    """
    path = out / _RESULTS
    if path.is_file() and (other := read_json(path)["ablation"]) != ablation.name:
        raise ConfigError(f"{out}: holds the ablation {other!r}.", fix="Give another folder.")


def _metrics(out: Path, finished: Sequence[_Finished]) -> tuple[str, ...]:
    """The metrics that all runs have."""
    metrics = {tuple(one.scores) for one in finished}
    if metrics == {()}:
        raise RunError(
            f"{out}: the runs measured the student on nothing.",
            fix="Turn on evaluate.zero_shot, linear_probe or knn; the last two need sets with a train split.",
        )
    if len(metrics) > 1:
        raise RunError(
            f"{out}: the runs were measured on different sets ({' / '.join(map(', '.join, sorted(metrics)))}).",
            fix="Run the same command again; it measures again what is not current.",
        )
    return metrics.pop()


def _scores(folder: RunFolder) -> dict[str, float]:
    """Metric -> the student's mean over the sets that may be averaged, a share of 1.

    The metric's name says how many sets these are.
    """
    scores: dict[str, float] = {}
    for task, summary in read_task_summaries(folder.stage(EVALUATE)).items():
        for group in summary.groups or (summary.mean,):
            if STUDENT in group.by_model:
                scores[f"{PROTOCOLS[task].mean}, {group.title}"] = group.by_model[STUDENT]
    return scores


def _training(folder: RunFolder) -> DistillSummary:
    record = folder.record(DISTILL)
    assert record is not None, "called for finished runs only"
    return read_summary(DistillSummary, record.summary)
