"""The first screen says no more than the numbers do."""

import json
from pathlib import Path
from typing import Any

import pytest

from clip_cid.errors import DataError
from clip_cid.figures import gain
from clip_cid.figures.differences import Differences, read_differences
from clip_cid.figures.scores import Score
from clip_cid.report import story
from clip_cid.report.score_tables import ScoreTable, score_tables
from clip_cid.report.story import Trained

OURS = Trained(250, 32_000, "tiny", ("clip", "cluster_kl"))
PLAIN = Trained(250, 32_000, "tiny", ("clip",))
BALANCE = {"removed": 30, "ok": 120, "removed_share": 0.25}


def tables(folder: Path, difference: float, low: float, high: float) -> tuple[list[ScoreTable], Differences]:
    """Zero-shot on two sets, their mean `difference` ahead of `baseline`; and a retrieval on which it is 50 points."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = {"model": "student", "other": "baseline"}
    mean = {"group": "mean of 2/2", "metric": "mean", "difference": difference, "low": low, "high": high, **pair}
    behind = {
        "model": "baseline",
        "other": "teacher",
        "set": "a",
        "metric": "top1",
        "difference": 9,
        "low": 9,
        "high": 9,
    }
    first = {"set": "a", "metric": "top1", "difference": 0.9, "low": 0.8, "high": 1.0, **pair}
    group = {"title": "mean of 2/2", "mean": {"student": 0.5, "baseline": 0.5 - difference}}
    write(folder, "zero_shot", {"differences": [first, mean, behind], "groups": [group], "missing": {}})
    recall = {"set": "r", "metric": "image_to_text_R@1", "difference": 0.5, "low": 0.4, "high": 0.6, **pair}
    deeper = {**recall, "metric": "image_to_text_R@5"}
    write(folder, "retrieval", {"differences": [recall, deeper], "missing": {}})
    scores = [
        Score(model, name, task, metric, value)
        for name, task, metric in (("a", "zero_shot", "top1"), ("r", "retrieval", "image_to_text_R@1"))
        for model, value in (("student", 0.75), ("baseline", 0.25))
    ]
    differences = read_differences(folder)
    return score_tables(folder, scores, differences), differences


def write(folder: Path, task: str, table: dict[str, Any]) -> None:
    (folder / f"{task}.json").write_text(json.dumps(table))


def told(tmp_path: Path, *numbers: float, other: Trained | None = PLAIN) -> str:
    found = story.gained(tables(tmp_path / "evaluate", *numbers)[0], "baseline", OURS, other)
    assert found is not None
    return " ".join([found.number, found.heading, found.text]).replace("\N{MINUS SIGN}", "-").replace("\xa0", " ")


def test_a_gain_whose_interval_leaves_0_out_is_told_as_one(tmp_path: Path) -> None:
    text = told(tmp_path, 0.105, 0.08, 0.125)
    assert text.startswith("+10.5 points student against baseline 50.0 % against 39.5 % (zero-shot, mean of 2/2)")
    assert "over the same images: +8.0 to +12.5. The interval leaves 0 out: the student is ahead" in text
    assert "plain CLIP (its loss alone), the same architecture, at equal steps: both took 250 and saw 32,000" in text


@pytest.mark.parametrize(("low", "high"), [(-0.01, 0.125), (0.0, 0.1), (-0.1, 0.0)])
def test_an_interval_that_holds_0_is_no_gain(tmp_path: Path, low: float, high: float) -> None:
    text = told(tmp_path, 0.105, low, high)
    assert "The interval holds 0: these images cannot tell the student from the baseline." in text
    assert "ahead" not in text


def test_a_loss_is_told_as_one(tmp_path: Path) -> None:
    text = told(tmp_path, -0.105, -0.125, -0.08)
    assert text.startswith("-10.5 points")
    assert "the baseline is ahead" in text


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Trained(500, 32_000, "tiny", ("clip",)), "Not of equal work: the student took 250 steps"),
        (Trained(250, 16_000, "tiny", ("clip",)), "the baseline 250 and 16,000"),
        (
            Trained(250, 32_000, "large", ("clip",)),
            "plain CLIP (its loss alone), another architecture (large), at equal",
        ),
        (Trained(250, 32_000, "tiny", ("clip", "icl")), "The baseline is the same architecture, at equal steps"),
        (None, "is not known here, so the comparison may be of unequal work"),
    ],
)
def test_equal_steps_are_claimed_only_where_they_are_known(tmp_path: Path, other: Trained | None, words: str) -> None:
    text = told(tmp_path, 0.1, 0.05, 0.15, other=other)
    assert words in text
    assert ("equal steps" in text) == (other is not None and (other.steps, other.pairs_seen) == (250, 32_000))


def test_without_a_baseline_or_scores_there_is_no_gain(tmp_path: Path) -> None:
    found, _ = tables(tmp_path, 0.1, 0.05, 0.15)
    assert story.gained(found, None, OURS, None) is None
    assert story.gained(found, "nobody", OURS, None) is None
    assert story.gained([], "baseline", OURS, None) is None


def test_the_first_task_is_told_and_not_the_one_with_the_largest_gain(tmp_path: Path) -> None:
    assert "zero-shot" in told(tmp_path, 0.01, -0.05, 0.06)  # although the retrieval is 50 points better
    (tmp_path / "evaluate" / "zero_shot.json").unlink()
    folder = tmp_path / "evaluate"
    scores = [Score(m, "r", "retrieval", "image_to_text_R@1", v) for m, v in (("student", 0.75), ("baseline", 0.25))]
    only = story.gained(score_tables(folder, scores, read_differences(folder)), "baseline", OURS, None)
    assert only is not None
    assert only.text.replace("\xa0", " ").startswith("75.0 % against 25.0 % (retrieval, r, image to text R@1).")


def test_what_was_removed_is_told_with_what_is_known_of_it() -> None:
    bare = story.removed(BALANCE)
    assert bare is not None
    assert (bare.number.replace("\xa0", " "), len(bare.sentences)) == ("25.0 %", 1)
    kinds = {"perceptual": {"share": 0.625}, "semantic": {"share": 0.375}}
    truth = {"field": "dup", "precision": 0.5, "recall": 0.25}
    whole = story.removed({**BALANCE, "kinds": kinds, "truth": truth})
    assert whole is not None
    text = whole.text.replace("\xa0", " ")
    assert "30 of 120 images" in text
    assert "50.0 % belong together, and 25.0 % of all true pairs were found" in text
    assert "62.5 % repeat the pixels (perceptual), 37.5 % only what is shown (semantic)" in text
    elsewhere = story.removed({**BALANCE, "from": "kept.npy"})
    assert elsewhere is not None
    assert "list made elsewhere" in elsewhere.text
    assert story.removed({**BALANCE, "removed": 0}) is None


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
    _, differences = tables(tmp_path, 0.1, -0.05, 0.15)
    numbers = gain.draw(differences, "baseline", tmp_path)
    assert list(numbers) == ["Zero-shot\nmean of 2/2", "r\nimage to text R@1"]
    assert numbers["Zero-shot\nmean of 2/2"] == {"difference": 0.1, "low": -0.05, "high": 0.15}


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    write(tmp_path, "knn", {"differences": [{"model": "student", "set": "a"}]})
    with pytest.raises(DataError, match=r"knn\.json: not a table of scores \(KeyError: 'metric'\)"):
        read_differences(tmp_path)
