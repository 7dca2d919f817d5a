"""The results of a run in three statements for a first-time reader, each with its limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_cid import units
from clip_cid.evaluation.protocols import PROTOCOLS
from clip_cid.evaluation.scores import STUDENT, Difference
from clip_cid.report.page import unbroken_percent
from clip_cid.report.score_tables import ScoreTable
from clip_cid.summaries import BalanceSummary, DistillSummary

_WAYS = {"image_to_text_R@1": "image to text R@1", "text_to_image_R@1": "text to image R@1"}


@dataclass(frozen=True)
class Statement:
    """A number, what it is, and the sentences that say how far to trust it."""

    number: str
    heading: str
    sentences: Sequence[str]
    section: str
    """Of the page, where the rest stands."""
    link: str

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


@dataclass(frozen=True)
class Trained:
    """The facts of a model's training."""

    steps: int
    pairs_seen: int
    student: str
    losses: tuple[str, ...]
    """Those with a weight."""

    @classmethod
    def of(cls, summary: DistillSummary, settings: Mapping[str, Any]) -> "Trained":
        """A training by its summary and its `distill:` settings."""
        losses = tuple(name for name, weight in settings["weights"].items() if weight)
        return cls(summary.steps, summary.pairs_seen, settings["student"], losses)


def removed(balance: BalanceSummary) -> Statement | None:
    """How much the balance removed, and how much of it was right; None if it removed nothing."""
    if not balance.removed:
        return None
    counts = f"{balance.removed:,} of {balance.ok:,} images"
    near = {one.name: one.near for one in balance.against or [] if one.near}
    if near:
        listed = ", ".join(f"{name} {count:,}" for name, count in near.items())
        sentences = [
            f"{counts} were removed, among them all that are near a test image of an evaluation ({listed}). Of the others"
            f" {_how_near(balance)}"
        ]
    else:
        sentences = [f"{counts} were removed: {_how_near(balance)}"]

    if (truth := balance.truth) is not None:
        sentences.append(
            f"The data names the true groups ({truth.field}): {unbroken_percent(truth.precision)} of the image pairs"
            f" in one set belong together, and {unbroken_percent(truth.recall)} of all true pairs were found."
        )
    if (
        balance.kinds is not None
        and balance.kinds.perceptual.share is not None
        and balance.kinds.semantic.share is not None
    ):
        compared = balance.kinds.drawn - balance.kinds.unknown
        sentences.append(
            f"Of {compared:,} compared by their pixels, {unbroken_percent(balance.kinds.perceptual.share)} have nearly"
            f" those of the kept one (perceptual), {unbroken_percent(balance.kinds.semantic.share)} have not (semantic)."
        )

    if balance.from_ is not None:
        sentences = [f"{counts} were left out by a list made elsewhere."]

    return Statement(
        unbroken_percent(balance.removed_share), "removed as duplicates", sentences, "balance", "What was removed"
    )


def _how_near(balance: BalanceSummary) -> str:
    """How far the removed images are from the kept ones, as far as that is known."""
    linked = "each is linked to a kept one by images that the teacher finds nearly equal"
    if balance.chains is None:
        return f"{linked}."
    beyond = balance.chains.beyond_threshold_share
    if not beyond:
        return "each is within the threshold of a kept one, so nearly equal to it for the teacher."
    return f"{linked}. {unbroken_percent(beyond)} of them are farther from the kept one than the threshold."


def flattened(sizes: Mapping[str, Mapping[str, float]]) -> Statement | None:
    """How the balance changed the sizes of the clusters; None if they were not measured before and after."""
    if len(sizes) != 2:
        return None
    before, after = sizes.values()
    first, last = f"{before['gini']:.3f}", f"{after['gini']:.3f}"
    heading = "clusters became more even" if float(last) < float(first) else "clusters did not become more even"
    sentences = [
        "Gini coefficient of the cluster sizes before and after the balance, on the same centers: 0 means that all are"
        " equal, near 1 that one cluster holds everything.",
        f"The largest cluster before has {before['largest']:,.0f} images, the largest after {after['largest']:,.0f};"
        f" {unbroken_percent(after['images'] / before['images'])} of all images stayed.",
    ]
    return Statement(f"{first} \N{RIGHTWARDS ARROW} {last}", heading, sentences, "clusters", "All about the clusters")


def gained(
    tables: Sequence[ScoreTable], baseline: str | None, student: Trained | None, other: Trained | None
) -> Statement | None:
    """How far the student is ahead of the baseline by the first task, and whether these images can tell.

    Args:
        tables: All of the run, in the order of the tasks, so the first one is chosen whatever it says.
        baseline: The model to compare with; without one there is nothing to state.
        student: How it was trained; None without one.
        other: How the baseline was trained, as far as that is known.
    """
    headline = _headline(tables, baseline)
    if baseline is None or headline is None or student is None:
        return None
    one, ours, theirs = headline
    lead, low, high = (units.signed_points(value) for value in (one.difference, one.low, one.high))
    what = ", ".join([PROTOCOLS[one.task].short, one.set, *([_WAYS[one.metric]] if one.metric in _WAYS else [])])
    sentences = [
        f"{unbroken_percent(ours)} against {unbroken_percent(theirs)} ({what}).",
        f"95\N{NO-BREAK SPACE}% interval of the difference, over the same images: {low} to {high}.",
        _verdict(one, baseline),
        _equal_steps(baseline, student, other),
    ]
    return Statement(f"{lead} points", f"student against {baseline}", sentences, "scores", "All scores")


def _headline(tables: Sequence[ScoreTable], baseline: str | None) -> tuple[Difference, float, float] | None:
    """The first protocol's mean, or the first R@1: the difference and both scores."""
    if baseline is None or not tables:
        return None
    for one in tables[0].differences.headlines(baseline):
        for table in tables:
            if table.task != one.task:
                continue
            means = {mean.title: mean.by_model for mean in table.means}
            rows = {(row.set, row.metric): {m: s.score for m, s in row.by_model.items()} for row in table.rows}
            scores = means.get(one.set) or rows.get((one.set, one.metric), {})
            if STUDENT in scores and baseline in scores:
                return one, scores[STUDENT], scores[baseline]
    return None


def _verdict(one: Difference, baseline: str) -> str:
    if not one.clear:
        return f"The interval contains 0: these images do not separate the student from the {baseline}."
    return (
        f"The interval does not contain 0: the {'student' if one.difference > 0 else baseline} is ahead on"
        " these images."
    )


def _equal_steps(baseline: str, student: Trained, other: Trained | None) -> str:
    if other is None:
        return f"How the {baseline} was trained is not known here, so the comparison may not be at equal steps."
    if (other.steps, other.pairs_seen) != (student.steps, student.pairs_seen):
        return (
            f"Not at equal steps: the student took {student.steps:,} steps and saw {student.pairs_seen:,} pairs, the"
            f" {baseline} {other.steps:,} and {other.pairs_seen:,}."
        )
    plain = "plain CLIP (its loss alone), " if other.losses == ("clip",) else ""
    same = "the same architecture" if other.student == student.student else f"another architecture ({other.student})"
    return (
        f"The {baseline} is {plain}{same}, at equal steps: both took {student.steps:,} and saw"
        f" {student.pairs_seen:,} pairs."
    )
