"""How far each model is ahead of the first: paired where both answered the same images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clip_cid.data.sets.groups import DATACOMP, members
from clip_cid.evaluation.comparison import differences
from clip_cid.evaluation.protocols import RETRIEVAL, ZERO_SHOT
from clip_cid.evaluation.results import Answers
from clip_cid.evaluation.scores import Difference, Score
from clip_cid.evaluation.tables import Group, groups_of
from clip_cid.report.comparison.contenders import Contender, Row


@dataclass(frozen=True)
class Gap:
    """The lead of a model over the first one on a row; with an interval only if the images are the same."""

    difference: float
    paired: Difference | None


def groups_for(task: str, rows: Iterable[Row]) -> list[Group]:
    """The sets of a task with a common mean; DataComp's list among them, if it has some."""
    names = list(dict.fromkeys(row.set for row in rows if row.task == task))
    if task == RETRIEVAL or not names:
        return []
    groups = groups_of(task, names)
    if task == ZERO_SHOT and (own := tuple(name for name in names if _of_datacomp(name))):
        groups.append(Group("DataComp's list", own, len(members(DATACOMP))))
    return groups


def _of_datacomp(name: str) -> bool:
    return any(member.is_named(name) for member in members(DATACOMP) if member.read != "retrieval")


def gaps(one: Contender, first: Contender, rows: Sequence[Row]) -> tuple[dict[Row, Gap], dict[str, Difference]]:
    """The gap on each row, and the paired difference of the mean of each group by its title."""
    answers = {row: pair for row in rows if (pair := _answers(one, first, row)) is not None}
    paired: dict[tuple[str, str, str], Difference] = {}
    means: dict[str, Difference] = {}
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in answers if row.task == task]
        if not own:
            continue
        groups = [group for group in groups_for(task, rows) if set(group.sets) <= {row.set for row in own}]
        for difference in _differences(one, first, own, answers, groups):
            if difference.of_group:
                means[f"{task} {difference.set}"] = difference
            else:
                paired[difference.task, difference.set, difference.metric] = difference
    leads = {
        row: Gap(one.scores[row].score - first.scores[row].score, paired.get((row.task, row.set, row.metric)))
        for row in rows
    }
    return leads, means


def _differences(
    one: Contender,
    first: Contender,
    rows: Sequence[Row],
    answers: Mapping[Row, tuple[Answers, Answers]],
    groups: Sequence[Group],
) -> list[Difference]:
    scores = [replace(who.scores[row], model=who.label) for who in (one, first) for row in rows]

    def answers_of(score: Score) -> Answers:
        ours, theirs = answers[Row(score.task, score.set, score.metric)]
        return ours if score.model == one.label else theirs

    return differences(scores, answers_of, groups=groups, seed=first.evaluation.seed)


def _answers(one: Contender, first: Contender, row: Row) -> tuple[Answers, Answers] | None:
    """The answers of both, if they are to the same images in the same order."""
    ours, theirs = one.scores[row], first.scores[row]
    if one.evaluation is not first.evaluation and not one.evaluation.has_images_of(first.evaluation, row):
        return None
    if ours.details.get("bad_images") != theirs.details.get("bad_images"):
        return None
    pair = one.evaluation.answers(ours), first.evaluation.answers(theirs)
    if pair[0] is None or pair[1] is None:
        return None
    name = "captions" if row.task == RETRIEVAL else "labels"
    return (pair[0], pair[1]) if np.array_equal(pair[0][name], pair[1][name]) else None
