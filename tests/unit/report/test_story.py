"""The first screen says no more than the numbers do."""

from dataclasses import replace
from pathlib import Path

import pytest

from clip_cid.evaluation.scores import Difference, Differences, GroupMean, Score, TaskSummary
from clip_cid.figures import gain
from clip_cid.report import story
from clip_cid.report.score_tables import ScoreTable, score_tables
from clip_cid.report.story import Trained
from clip_cid.summaries import AgainstSet, BalanceSummary, BalanceTruth, Chains, KindShare, KindShares

OURS = Trained(250, 32_000, "tiny", ("clip", "cluster_kl"))
PLAIN = Trained(250, 32_000, "tiny", ("clip",))
BALANCE = BalanceSummary(
    images=120, ok=120, kept=90, removed=30, removed_share=0.25, sets_with_duplicates=9, largest_set=7
)


def summaries(difference: float, low: float, high: float) -> dict[str, TaskSummary]:
    """Zero-shot on two sets, their mean `difference` ahead of `baseline`; and a retrieval on which it is 50 points."""
    first = Difference("zero_shot", "a", "top1", "student", "baseline", 0.9, 0.8, 1.0)
    mean = Difference("zero_shot", "mean of 2/2", "mean", "student", "baseline", difference, low, high)
    behind = Difference("zero_shot", "a", "top1", "baseline", "teacher", 9, 9, 9)
    group = GroupMean("mean of 2/2", "2/2", ("a", "b"), {"student": 0.5, "baseline": 0.5 - difference})
    recall = Difference("retrieval", "r", "image_to_text_R@1", "student", "baseline", 0.5, 0.4, 0.6)
    deeper = replace(recall, metric="image_to_text_R@5")
    return {
        "zero_shot": TaskSummary("zero_shot", (group,), group, {}, (first, mean, behind)),
        "retrieval": TaskSummary("retrieval", (), GroupMean("mean of 1/1", "1/1", ("r",), {}), {}, (recall, deeper)),
    }


def tables(by_task: dict[str, TaskSummary]) -> list[ScoreTable]:
    scores = [
        Score(model, name, task, metric, value)
        for name, task, metric in (("a", "zero_shot", "top1"), ("r", "retrieval", "image_to_text_R@1"))
        for model, value in (("student", 0.75), ("baseline", 0.25))
    ]
    return score_tables(by_task, scores, differences(by_task))


def differences(by_task: dict[str, TaskSummary]) -> Differences:
    return Differences(one for summary in by_task.values() for one in summary.differences)


def sentences_of(*numbers: float, other: Trained | None = PLAIN) -> str:
    statement = story.gained(tables(summaries(*numbers)), "baseline", OURS, other)
    assert statement is not None
    text = " ".join([statement.number, statement.heading, statement.text])
    return text.replace("\N{MINUS SIGN}", "-").replace("\xa0", " ")


def test_a_gain_whose_interval_leaves_0_out_is_told_as_one() -> None:
    text = sentences_of(0.105, 0.08, 0.125)
    assert text.startswith("+10.5 points student against baseline 50.0 % against 39.5 % (zero-shot, mean of 2/2)")
    assert "over the same images: +8.0 to +12.5. The interval does not contain 0: the student is ahead" in text
    assert "plain CLIP (its loss alone), the same architecture, at equal steps: both took 250 and saw 32,000" in text


@pytest.mark.parametrize(("low", "high"), [(-0.01, 0.125), (0.0, 0.1), (-0.1, 0.0)])
def test_an_interval_that_holds_0_is_no_gain(low: float, high: float) -> None:
    text = sentences_of(0.105, low, high)
    assert "The interval contains 0: these images do not separate the student from the baseline." in text
    assert "ahead" not in text


def test_a_loss_is_told_as_one() -> None:
    text = sentences_of(-0.105, -0.125, -0.08)
    assert text.startswith("-10.5 points")
    assert "the baseline is ahead" in text


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Trained(500, 32_000, "tiny", ("clip",)), "Not at equal steps: the student took 250 steps"),
        (Trained(250, 16_000, "tiny", ("clip",)), "the baseline 250 and 16,000"),
        (
            Trained(250, 32_000, "large", ("clip",)),
            "plain CLIP (its loss alone), another architecture (large), at equal",
        ),
        (Trained(250, 32_000, "tiny", ("clip", "icl")), "The baseline is the same architecture, at equal steps"),
        (None, "is not known here, so the comparison may not be at equal steps"),
    ],
)
def test_equal_steps_are_claimed_only_where_they_are_known(other: Trained | None, words: str) -> None:
    text = sentences_of(0.1, 0.05, 0.15, other=other)
    assert words in text
    same = other is not None and (other.steps, other.pairs_seen) == (250, 32_000)
    assert ("at equal steps: both took" in text) == same


def test_without_a_baseline_or_scores_there_is_no_gain() -> None:
    all_tables = tables(summaries(0.1, 0.05, 0.15))
    assert story.gained(all_tables, None, OURS, None) is None
    assert story.gained(all_tables, "nobody", OURS, None) is None
    assert story.gained([], "baseline", OURS, None) is None


def test_the_first_protocol_is_shown_and_not_the_one_with_the_largest_gain() -> None:
    assert "zero-shot" in sentences_of(0.01, -0.05, 0.06)  # although the retrieval is 50 points better
    retrieval_alone = {"retrieval": summaries(0.01, -0.05, 0.06)["retrieval"]}
    only = story.gained(tables(retrieval_alone), "baseline", OURS, None)
    assert only is not None
    assert only.text.replace("\xa0", " ").startswith("75.0 % against 25.0 % (retrieval, r, image to text R@1).")


def test_what_was_removed_is_told_with_what_is_known_of_it() -> None:
    bare = story.removed(BALANCE)
    assert bare is not None
    assert (bare.number.replace("\xa0", " "), len(bare.sentences)) == ("25.0 %", 1)
    perceptual, semantic = (KindShare(images=8, share=share, low=0.1, high=0.9) for share in (0.625, 0.375))
    kinds = KindShares(drawn=9, unknown=1, perceptual=perceptual, semantic=semantic)
    truth = BalanceTruth(field="dup", precision=0.5, recall=0.25, redundant_share=0.5)
    whole = story.removed(replace(BALANCE, kinds=kinds, truth=truth))
    assert whole is not None
    text = whole.text.replace("\xa0", " ")
    assert "30 of 120 images" in text
    assert "50.0 % of the image pairs in one set belong together, and 25.0 % of all true pairs were found" in text
    assert "Of 8 compared by their pixels, 62.5 % have nearly those of the kept one (perceptual)" in text
    assert "37.5 % have not (semantic)" in text
    elsewhere = story.removed(replace(BALANCE, from_="kept.npy"))
    assert elsewhere is not None
    assert "list made elsewhere" in elsewhere.text
    assert story.removed(replace(BALANCE, removed=0)) is None


@pytest.mark.parametrize(
    ("beyond", "words"),
    [
        (None, "each is linked to a kept one by images that the teacher finds nearly equal."),
        (0.0, "each is within the threshold of a kept one"),
        (0.23, "23.0 % of them are farther from the kept one than the threshold."),
    ],
)
def test_no_image_is_said_to_repeat_the_kept_one_where_only_others_link_it(beyond: float | None, words: str) -> None:
    chains = None
    if beyond is not None:
        chains = Chains(beyond_threshold_share=beyond, distance={}, largest=3, top_sizes=[3], giants=[])
    told = story.removed(replace(BALANCE, chains=chains))
    assert told is not None
    text = told.text.replace("\xa0", " ")
    assert words in text
    assert ("within the threshold" in text) == (beyond == 0.0)
    assert "repeat" not in text


def test_images_removed_for_an_evaluation_are_not_said_to_be_linked_to_a_kept_one() -> None:
    against = [
        AgainstSet(name="cifar", images=100, unreadable=0, near=7),
        AgainstSet(name="dtd", images=9, unreadable=0, near=0),
    ]
    told = story.removed(replace(BALANCE, against=against))
    assert told is not None
    assert (
        "among them all that are near a test image of an evaluation (cifar 7). Of the others each is linked"
        in told.text
    )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.5, 0.25, "clusters became more even"),
        (0.25, 0.5, "clusters did not become more even"),
        (0.3, 0.29999, "clusters did not become more even"),
    ],
)
def test_clusters_are_called_more_even_only_where_the_number_shown_says_so(
    before: float, after: float, words: str
) -> None:
    sizes = {
        "before": {"gini": before, "largest": 9, "images": 40},
        "after": {"gini": after, "largest": 5, "images": 30},
    }
    found = story.flattened(sizes)
    assert found is not None
    assert found.heading == words
    assert "before has 9 images, the largest after 5; 75.0" in found.text
    assert story.flattened({"all pairs": sizes["before"]}) is None


def test_the_lines_of_the_gain_are_means_and_first_recalls(tmp_path: Path) -> None:
    numbers = gain.draw(differences(summaries(0.1, -0.05, 0.15)), "baseline", tmp_path)
    assert list(numbers) == ["Zero-shot\nmean of 2/2", "r\nimage to text R@1"]
    assert numbers["Zero-shot\nmean of 2/2"] == {"difference": 0.1, "low": -0.05, "high": 0.15}
