"""The tables of an evaluation, one for each protocol: models by sets, and means with their number of sets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_cid.data.sets.known_sets import find_known_set, known_sets
from clip_cid.evaluation.protocols import RETRIEVAL, ZERO_SHOT
from clip_cid.evaluation.scores import Difference, GroupMean, Score, TaskSummary

MEAN_RECALL = "mean_recall"


@dataclass(frozen=True)
class Group:
    """Sets whose scores may be averaged: alike enough that one number over them means something."""

    name: str
    """Such as `CLIP's sets`; empty if there is only one group."""
    sets: tuple[str, ...]
    """Its sets that the recipe names."""
    of: int
    """How many sets it has in all, named in the recipe or not."""

    def title(self, measured: int) -> str:
        """`mean of 11/14`, never only `mean`."""
        return f"mean of {measured}/{self.of}" + (f" ({self.name})" if self.name else "")


def groups_of(task: str, names: Sequence[str]) -> list[Group]:
    """The sets whose scores may be averaged: CLIP's, the shifted ImageNets (test images only), all others."""
    others = tuple(name for name in names if find_known_set(name) is None)
    shifted = tuple(name for name in names if is_shifted(name))
    clip = tuple(name for name in names if name not in {*others, *shifted})
    of_shifted = sum(entry.shifted for entry in known_sets().values())

    groups = [Group("CLIP's sets", clip, len(known_sets()) - of_shifted)] if clip else []
    if others:
        groups.append(Group("other sets" if clip or shifted else "", others, len(others)))
    if shifted and task == ZERO_SHOT:
        groups.append(Group("shifted ImageNets", shifted, of_shifted))
    return groups


def is_shifted(name: str) -> bool:
    """Whether this is one of the five robustness sets."""
    entry = find_known_set(name)
    return entry is not None and entry.shifted


@dataclass(frozen=True)
class Table:
    """All of one protocol."""

    scores: tuple[Score, ...]
    summary: TaskSummary

    @property
    def by_set(self) -> dict[str, dict[str, Score]]:
        """Set -> model -> score, of a protocol with one score a set."""
        by_set: dict[str, dict[str, Score]] = {}
        for score in self.scores:
            by_set.setdefault(score.set, {})[score.model] = score
        return by_set

    def as_json(self) -> dict[str, Any]:
        """What the table's file holds."""
        summary = self.summary
        sets, scores, intervals = _recall_columns(self) if summary.task == RETRIEVAL else _score_columns(self)
        whole = {
            "task": summary.task,
            "sets": sets,
            "scores": scores,
            "mean": dict(summary.mean.by_model),
            "mean_of": summary.mean.of,
            "missing": dict(summary.missing),
            "intervals": intervals,
        }
        if summary.task != RETRIEVAL:
            whole["groups"] = [group.line() for group in summary.groups]
        return {**whole, "differences": [one.line() for one in summary.differences]}


def score_table(
    scores: Iterable[Score],
    task: str,
    *,
    groups: Sequence[Group],
    missing: Mapping[str, str],
    differences: Sequence[Difference] = (),
) -> Table:
    """The scores of a protocol on labelled sets, with a mean for every group.

    The mean of the table is that of the first group that was measured.

    Args:
        scores: Results of all protocols.
        task: Which of them to take.
        groups: Every set the recipe names, by what may be averaged.
        missing: The sets that gave no result, with the reason.
        differences: Between the models, on this task.
    """
    chosen = tuple(score for score in scores if score.task == task)
    by_model: dict[str, dict[str, float]] = {}
    for score in chosen:
        by_model.setdefault(score.model, {})[score.set] = score.score

    means = tuple(_group_mean(group, by_model) for group in groups)
    measured = [mean for mean in means if mean.by_model]
    first = [*measured, *means, GroupMean("mean of 0/0", "0/0", (), {})][0]

    wanted = {name for group in groups for name in group.sets} - {score.set for score in chosen}
    reasons = {name: reason for name, reason in missing.items() if name in wanted}
    return Table(chosen, TaskSummary(task, means, first, reasons, tuple(differences)))


def retrieval_table(
    scores: Iterable[Score], *, sets: Sequence[str], missing: Mapping[str, str], differences: Sequence[Difference] = ()
) -> Table:
    """Every recall, and for each set their mean over depths and directions (`mean_recall`).

    Args:
        scores: Results of all protocols.
        sets: Every set of pairs the recipe names.
        missing: The sets that gave no result, with the reason.
        differences: Between the models, on their recalls.
    """
    chosen = tuple(score for score in scores if score.task == RETRIEVAL)
    by_model = {
        model: _mean([_mean(list(recalls.values())) for recalls in by_set.values()])
        for model, by_set in _recalls(chosen).items()
    }
    measured = list(dict.fromkeys(score.set for score in chosen))
    of = f"{len(measured)}/{len(sets)}"

    reasons = {name: reason for name, reason in missing.items() if name in sets and name not in measured}
    mean = GroupMean(f"mean of {of}", of, tuple(measured), by_model)
    return Table(chosen, TaskSummary(RETRIEVAL, (), mean, reasons, tuple(differences)))


def _group_mean(group: Group, scores: Mapping[str, Mapping[str, float]]) -> GroupMean:
    by_model = {model: [by_set[name] for name in group.sets if name in by_set] for model, by_set in scores.items()}
    measured = max((len(values) for values in by_model.values()), default=0)
    means = {model: _mean(values) for model, values in by_model.items() if values}
    return GroupMean(group.title(measured), f"{measured}/{group.of}", group.sets, means)


def _recalls(scores: Iterable[Score]) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> set -> metric -> recall."""
    recalls: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        recalls.setdefault(score.model, {}).setdefault(score.set, {})[score.metric] = score.score
    return recalls


def _score_columns(table: Table) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Facts of each set, scores by model, intervals by model."""
    facts = ("metric", "classes", "chance", "n", "variant")
    sets = {score.set: {name: getattr(score, name) for name in facts} for score in table.scores}
    scores: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, list[float | None]]] = {}
    for score in table.scores:
        scores.setdefault(score.model, {})[score.set] = score.score
        intervals.setdefault(score.model, {})[score.set] = [score.low, score.high]
    return sets, scores, intervals


def _recall_columns(table: Table) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The same with one more level: each set has several metrics."""
    sets: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for score in table.scores:
        sets.setdefault(score.set, {})[score.metric] = {"chance": score.chance, "n": score.n}
        of_model = intervals.setdefault(score.model, {})
        of_model.setdefault(score.set, {})[score.metric] = [score.low, score.high]
    scores = {
        model: {name: {**recalls, MEAN_RECALL: _mean(list(recalls.values()))} for name, recalls in by_set.items()}
        for model, by_set in _recalls(table.scores).items()
    }
    return sets, scores, intervals


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
