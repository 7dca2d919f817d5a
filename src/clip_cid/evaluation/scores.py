"""The scores of an evaluation and the differences between its models: the one place that reads and writes them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, overload

from clip_cid.errors import DataError
from clip_cid.evaluation.protocols import PROTOCOLS, RETRIEVAL
from clip_cid.journal import Journal
from clip_cid.recipe import STUDENT
from clip_cid.run_folder import read_json

RESULTS = "results.jsonl"
TEACHER, BASELINE = "teacher", "baseline"
MEAN = "mean"
"""The metric of a difference over a group of sets."""


@dataclass(frozen=True)
class Score:
    """One line of results.jsonl: a model on a set by one protocol. Scores, intervals and chance are shares of 1."""

    model: str
    set: str
    task: str
    """The protocol's name."""
    metric: str
    score: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """Images, or queries of a retrieval."""
    classes: int | None = None
    chance: float | None = None
    """The score of a model that knows nothing."""
    variant: str | None = None
    """How the set differs from the one CLIP was measured on; empty if it does not, None for a retrieval."""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Values that only this protocol records, such as C or the prompts, in the order of the line."""
    cached: tuple[str, ...] = ()
    """The cached features it was made from."""
    key: str | None = None
    """Equal keys, equal results; None before `Results` has written it."""
    answers: str | None = None
    """The file of the answers behind it."""

    @property
    def top1(self) -> float | None:
        return self.details.get("top1")

    @property
    def top5(self) -> float | None:
        return self.details.get("top5")

    @property
    def mean_per_class(self) -> float | None:
        return self.details.get("mean_per_class")

    @property
    def imagenet_same_classes(self) -> float | None:
        """Top-1 on ImageNet's own images of the classes of a shifted ImageNet; `top1` is the one on the set."""
        return self.details.get("imagenet_same_classes")

    def line(self) -> dict[str, Any]:
        """The line as JSON."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        if self.variant is not None:
            facts["variant"] = self.variant
        return {**facts, **self.details, "cached": list(self.cached), "key": self.key, "answers": self.answers}


_FACTS = ("model", "set", "task", "metric", "score", "low", "high", "n", "classes", "chance")
_SHARES = ("score", "low", "high", "chance", "top1", "top5", "mean_per_class", "imagenet_same_classes")
_OPTIONAL = ("low", "high", "n", "classes", "chance", "variant", "key", "answers")
_OWN = {part.name for part in fields(Score)} - {"details"}


def read_scores(path: Path) -> list[Score]:
    """The lines of a results.jsonl.

    Raises:
        DataError: There is no file, a line is not a result, or its score is not between 0 and 1.
    """
    if not path.is_file():
        raise DataError(f"{path}: there are no results.", fix=_again(path.parent))
    try:
        lines = Journal(path).read()
    except ValueError as error:
        raise _not_results(path, error) from error
    scores: list[Score] = []
    for number, line in enumerate(lines, start=1):
        try:
            scores.append(_score(line))
        except (KeyError, TypeError, ValueError) as error:
            raise _not_results(path, error, line=number) from error
    return scores


def _score(line: dict[str, Any]) -> Score:
    if wrong := [name for name in ("model", "set", "task", "metric") if not isinstance(line[name], str)]:
        raise TypeError(f"{wrong[0]} is not a text")
    if line["task"] not in PROTOCOLS:
        raise ValueError(f"task {line['task']!r}")
    shares = {name: line.get(name) for name in _SHARES if name == "score" or line.get(name) is not None}
    if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares.values()):
        raise ValueError(", ".join(f"{name} {share}" for name, share in shares.items()))

    return Score(
        *(line[name] for name in ("model", "set", "task", "metric", "score")),
        **{name: line[name] for name in _OPTIONAL if name in line},
        cached=tuple(line.get("cached", ())),
        details={name: value for name, value in line.items() if name not in _OWN},
    )


def _not_results(path: Path, error: Exception, *, line: int | None = None) -> DataError:
    where = f"{path}, line {line}" if line else str(path)
    problem = f"no {error}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{where}: not a result with shares of 1 ({problem}).", fix=_again(path.parent))


def _again(evaluate: Path) -> str:
    return f"Run `clip-cid evaluate {evaluate.parent} --force` to make the stage again."


@dataclass(frozen=True)
class Difference:
    """`model` minus `other` on the same images, a share of 1, with the 95 % interval of a paired bootstrap."""

    task: str
    set: str
    """A set, or the title of a group of sets (`mean of 3/14`), which has the metric `mean`."""
    metric: str
    model: str
    other: str
    difference: float
    low: float
    high: float

    @property
    def of_group(self) -> bool:
        return self.metric == MEAN

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0, so that these images separate the two models."""
        return self.low > 0 or self.high < 0

    def line(self) -> dict[str, Any]:
        """As JSON, in the table of its task."""
        models = {"model": self.model, "other": self.other}
        numbers = {"difference": self.difference, "low": self.low, "high": self.high}
        if self.of_group:
            return {"group": self.set, "metric": self.metric, **numbers, **models}
        return {"set": self.set, "metric": self.metric, **models, **numbers}


class Differences(Sequence[Difference]):
    """The differences between the student and the other models of one evaluation."""

    def __init__(self, differences: Iterable[Difference]) -> None:
        self._all = [one for one in differences if one.model == STUDENT]
        self._by_place = {(one.task, one.set, one.metric, one.other): one for one in self._all}

    @overload
    def __getitem__(self, index: int) -> Difference: ...
    @overload
    def __getitem__(self, index: slice) -> list[Difference]: ...
    def __getitem__(self, index: int | slice) -> Difference | list[Difference]:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    def of(self, task: str, set: str, metric: str, other: str) -> Difference | None:
        return self._by_place.get((task, set, metric, other))

    def headlines(self, other: str) -> list[Difference]:
        """One or a few for each protocol: the mean of the first group of sets, and each retrieval's R@1."""
        chosen: list[Difference] = []
        for task in PROTOCOLS:
            own = [one for one in self._all if one.task == task and one.other == other]
            chosen += [one for one in own if one.of_group][:1]
            chosen += [one for one in own if task == RETRIEVAL and one.metric.endswith("R@1")]
        return chosen


@dataclass(frozen=True)
class GroupMean:
    """The mean over sets that may be averaged."""

    title: str
    """Says over how many of how many: `mean of 11/14`."""
    of: str
    """`11/14`."""
    sets: tuple[str, ...]
    by_model: Mapping[str, float]

    def line(self) -> dict[str, Any]:
        return {"title": self.title, "of": self.of, "sets": list(self.sets), "mean": dict(self.by_model)}


@dataclass(frozen=True)
class TaskSummary:
    """The contents of one protocol's table beside its scores."""

    task: str
    groups: tuple[GroupMean, ...]
    """None for a retrieval."""
    mean: GroupMean
    """The mean of the first group that was measured, or for a retrieval the mean recall over all sets."""
    missing: Mapping[str, str]
    """Set without a result -> why."""
    differences: tuple[Difference, ...]
    """Between all models."""


def read_task_summaries(evaluate: Path) -> dict[str, TaskSummary]:
    """Protocol -> what its table says, for each that was measured.

    Raises:
        DataError: A table holds something else.
    """
    summaries: dict[str, TaskSummary] = {}
    for task, protocol in PROTOCOLS.items():
        path = evaluate / protocol.table_file
        if not path.is_file():
            continue
        try:
            summaries[task] = _task_summary(task, read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a table of scores ({type(error).__name__}: {error}).", fix=_again(evaluate)
            ) from error
    return summaries


def _task_summary(task: str, table: dict[str, Any]) -> TaskSummary:
    groups = tuple(_group(line["title"], line["of"], line["sets"], line["mean"]) for line in table.get("groups", ()))
    return TaskSummary(
        task,
        groups,
        _group(f"mean of {table['mean_of']}", table["mean_of"], (), table["mean"]),
        dict(table["missing"]),
        tuple(_differences(task, table["differences"])),
    )


def _group(title: str, of: str, sets: Sequence[str], means: Mapping[str, Any]) -> GroupMean:
    return GroupMean(title, of, tuple(sets), {model: float(mean) for model, mean in means.items()})


def _differences(task: str, lines: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    for line in lines:
        place = line["group"] if "group" in line else line["set"]
        numbers = (float(line[name]) for name in ("difference", "low", "high"))
        yield Difference(task, place, line["metric"], line["model"], line["other"], *numbers)


@dataclass(frozen=True)
class ScoreRow:
    """All models on one set, task and metric."""

    task: str
    set: str
    metric: str
    by_model: dict[str, Score]

    @property
    def any(self) -> Score:
        """One of the scores, for what is the same for all models: images, classes and chance."""
        return next(iter(self.by_model.values()))

    def delta(self, other: str) -> float | None:
        """Student minus `other`; None if one of them has no score."""
        if STUDENT not in self.by_model or other not in self.by_model:
            return None
        return self.by_model[STUDENT].score - self.by_model[other].score


def score_rows(scores: Iterable[Score]) -> list[ScoreRow]:
    """One row for each task, set and metric, in the order of the results."""
    rows: dict[tuple[str, str, str], ScoreRow] = {}
    for score in scores:
        place = (score.task, score.set, score.metric)
        rows.setdefault(place, ScoreRow(*place, by_model={})).by_model[score.model] = score
    return list(rows.values())


def model_order(models: Iterable[str]) -> list[str]:
    """The student first, the teacher last, the others between them as they come."""
    place = {STUDENT: 0, TEACHER: 2}
    return sorted(dict.fromkeys(models), key=lambda name: place.get(name, 1))


def models_of(scores: Iterable[Score]) -> list[str]:
    """The models that were measured, in the order they are shown in."""
    return model_order(score.model for score in scores)


def reference_model(models: Sequence[str]) -> str | None:
    """The model to compare the student with: the one named `baseline`, else the first but the teacher."""
    others = [model for model in models if model not in {STUDENT, TEACHER}]
    return BASELINE if BASELINE in others else next(iter(others), None)
