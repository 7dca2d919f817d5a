"""The models to compare: what the finished evaluations of several folders hold, and which rows they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_cid.data.sets.known_sets import few
from clip_cid.errors import DataError, RunError
from clip_cid.evaluation.results import ANSWERS, Answers
from clip_cid.evaluation.scores import RESULTS, STUDENT, Score, read_scores
from clip_cid.models.public_names import unique_public_names
from clip_cid.models.references import CONFIG_FILE
from clip_cid.run_folder import RunFolder, StageRecord
from clip_cid.stage_names import DISTILL, EVALUATE
from clip_cid.summaries import ModelCost, costs_in

_BUILTIN = "builtin:"


class Row(NamedTuple):
    """What a score is of."""

    task: str
    set: str
    metric: str


_OF_SCORES = ("", " low", " high", " lead", " lead low", " lead high")
"""What stands behind the name of a model in the columns of the table."""
_OF_ROWS = (*Row._fields, "n", "chance")


@dataclass(frozen=True)
class Evaluation:
    """A folder with a finished evaluation."""

    path: Path
    label: str
    record: StageRecord
    scores: Mapping[str, Mapping[Row, Score]]
    """Model -> its scores."""

    @property
    def any(self) -> Mapping[Row, Score]:
        """The scores of one model: all have the same rows."""
        return next(iter(self.scores.values()))

    @property
    def sets(self) -> set[tuple[str, str]]:
        """Task and set of each row."""
        return {(row.task, row.set) for row in self.any}

    @property
    def seed(self) -> int:
        return int(self.record.settings.get(EVALUATE, {}).get("seed", 0))

    def images_of(self, name: str) -> str | None:
        """What the images of a set were: equal values, equal images; None if the record does not say."""
        settings = self.record.settings
        where = str(settings.get(EVALUATE, {}).get("sets", {}).get(name, ""))
        if where.startswith(_BUILTIN):
            return where
        found = [self.record.inputs.get(f"{EVALUATE}.{kind}.{name}") for kind in ("sets", "retrieval")]
        contents = next((value for value in found if value), None)
        if contents is None or not self.record.by_contents:
            return None
        return f"{contents}, at most {settings.get('pairs', {}).get('max_pixels')} pixels"

    def keys(self, row: Row) -> set[str]:
        """The keys of its measurements on a row."""
        return {
            score.key for by_row in self.scores.values() if row in by_row and (score := by_row[row]).key is not None
        }

    def has_images_of(self, other: "Evaluation", row: Row) -> bool:
        """Whether the records show that both measured the same images.

        Either a model of equal weights is in both with an equal key, or the files of the set had equal contents.
        """
        if self.keys(row) & other.keys(row):
            return True
        images = self.images_of(row.set)
        return images is not None and images == other.images_of(row.set)

    def answers(self, score: Score) -> Answers | None:
        """What a score is made of, if it is there."""
        path = self.path / EVALUATE / ANSWERS / str(score.answers)
        if score.answers is None or not path.is_file():
            return None
        with np.load(path) as arrays:
            return dict(arrays)


@dataclass(frozen=True)
class Contender:
    """A model of an evaluation."""

    label: str
    evaluation: Evaluation
    model: str
    cost: ModelCost | None

    @property
    def scores(self) -> Mapping[Row, Score]:
        return self.evaluation.scores[self.model]

    @property
    def log(self) -> Path | None:
        """The log of its training, if it was trained in this run."""
        path = self.evaluation.path / DISTILL / "metrics.jsonl"
        return path if self.model == STUDENT and path.is_file() else None


def open_evaluations(places: Sequence[Path]) -> list[Evaluation]:
    """Read what was measured in each folder, as it was written.

    Raises:
        RunError: A folder is none, is named twice, is a model without scores, or its evaluation has not finished or
            has changed.
        DataError: Its results cannot be read.
    """
    resolved = [place.resolve() for place in places]
    if twice := [place for number, place in enumerate(places) if resolved[number] in resolved[:number]]:
        raise RunError(f"{twice[0]}: is named twice.", fix="Name each folder once.")
    labels = _labels(resolved)
    return [_open(place, label) for place, label in zip(places, labels, strict=True)]


def _open(place: Path, label: str) -> Evaluation:
    if not place.is_dir():
        raise RunError(f"{place}: no such folder.", fix="Name run folders, or folders that `clip-cid evaluate` made.")
    if (place / CONFIG_FILE).is_file():
        raise RunError(
            f"{place}: is a model, and holds no scores.",
            fix=f"Measure it, `clip-cid evaluate scores --model local-dir:{place} --evaluate.sets NAME FOLDER`, and"
            " compare the folder `scores`.",
        )
    folder = RunFolder(place, read_only=True)
    evaluate = folder.stage(EVALUATE)
    folder.verify(EVALUATE)
    record = folder.record(EVALUATE)
    assert record is not None  # as its folder is there

    scores: dict[str, dict[Row, Score]] = {}
    for score in read_scores(evaluate / RESULTS):
        scores.setdefault(score.model, {})[Row(score.task, score.set, score.metric)] = score
    if not scores:
        raise DataError(f"{evaluate / RESULTS}: there is no score.", fix=f"Run `clip-cid evaluate {place} --force`.")
    return Evaluation(place, label, record, scores)


def _labels(places: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of those above it as tell it apart, also from other columns.

    Raises:
        RunError: Two columns of the table would have one name.
    """
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        labels = ["/".join(place.parts[-depth:]).lstrip("/") for place in places]
        columns = [*_OF_ROWS, *(f"{label}{end}" for label in labels for end in _OF_SCORES)]
        if len(set(columns)) == len(columns):
            return labels
    raise RunError(
        f"compare: two columns of the table would have one name for {', '.join(map(str, places))}.",
        fix=f"Give one of these folders another name, which does not end in one of{','.join(_OF_SCORES[1:])}.",
    )


def contenders(evaluations: Sequence[Evaluation]) -> tuple[list[Contender], dict[str, str]]:
    """Every model, students first; and those left out, because they are one that is there, with the reason."""
    found = [
        _contender(one, model, name) for one in evaluations for model, name in unique_public_names(one.scores).items()
    ]
    found.sort(key=lambda one: one.model != STUDENT)

    chosen: list[Contender] = []
    left_out: dict[str, str] = {}
    for one in found:
        same = next((other for other in chosen if _same_model(one, other)), None)
        if same is None:
            chosen.append(one)
        else:
            left_out[one.label] = f"has the weights of {same.label}"
    return chosen, left_out


def _contender(evaluation: Evaluation, model: str, name: str) -> Contender:
    """A model under a name without local paths."""
    label = evaluation.label if model == STUDENT else f"{evaluation.label}: {name}"
    costs = [cost for cost in costs_in(evaluation.record.summary) if cost.model == model]
    return Contender(label, evaluation, model, costs[0] if costs else None)


def _same_model(one: Contender, other: Contender) -> bool:
    """Whether they agree in the key of every measurement that both have: it covers weights, images and settings."""
    shared = [row for row in one.scores if row in other.scores]
    keys = [(one.scores[row].key, other.scores[row].key) for row in shared]
    return bool(keys) and all(ours is not None and ours == theirs for ours, theirs in keys)


def common_rows(evaluations: Sequence[Evaluation], *, common: bool) -> tuple[list[Row], dict[str, str]]:
    """The rows that all have; and the sets left out, with the reason.

    Args:
        evaluations: Two or more, or one with several models.
        common: Whether sets that some lack are left out; otherwise they are refused.

    Raises:
        RunError: The sets differ, none is shared, or a set of one name is not the same in two of them.
    """
    shared = set.intersection(*(one.sets for one in evaluations))
    every = dict.fromkeys(place for one in evaluations for place in sorted(one.sets))
    lacking = {
        place: [one.label for one in evaluations if place not in one.sets] for place in every if place not in shared
    }
    if not shared or (lacking and not common):
        raise _sets_differ(lacking, num_shared=len(shared))

    rows = [row for row in evaluations[0].any if (row.task, row.set) in shared]
    for one in evaluations[1:]:
        for row in rows:
            _refuse_other_set(evaluations[0], one, row)
    left_out = {f"{name}, {task.replace('_', ' ')}": f"not in {', '.join(of)}" for (task, name), of in lacking.items()}
    return rows, left_out


def _sets_differ(lacking: Mapping[tuple[str, str], Sequence[str]], *, num_shared: int) -> RunError:
    listed = [f"{name} ({task.replace('_', ' ')}) is not in {', '.join(of)}" for (task, name), of in lacking.items()]
    fix = f"Evaluate all on the same sets, or add --common to compare the {num_shared} they share."
    return RunError(
        f"compare: the sets differ: {few(listed)}.",
        fix=fix if num_shared else "Evaluate all on the same sets: they share none.",
    )


def _refuse_other_set(one: Evaluation, other: Evaluation, row: Row) -> None:
    """Refuse two sets of one name that are not the same."""
    ours, theirs = one.any[row], other.any.get(row)
    facts = {name: _fact(ours, theirs, name) for name in ("n", "classes", "variant")}
    different = {name: values for name, values in facts.items() if values[0] != values[1]}
    if theirs is None or different:
        what = "; ".join(f"{name} {a} and {b}" for name, (a, b) in different.items()) or f"no {row.metric} in one"
        raise RunError(
            f"compare: {row.set} is not the same set in {one.label} and {other.label}: {what}.",
            fix="Evaluate both on the same images, or give one of the two sets another name and add --common.",
        )


def _fact(ours: Score, theirs: Score | None, name: str) -> tuple[Any, Any]:
    return getattr(ours, name), None if theirs is None else getattr(theirs, name)
