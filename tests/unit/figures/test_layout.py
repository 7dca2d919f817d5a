"""Words of a figure are inside it and apart from one another, however long the names from the data are."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from clip_cid.evaluation.scores import MEAN, Difference, Differences, Score
from clip_cid.figures import ablation, gain, radar, removed_share, scores, style
from clip_cid.figures.ablation import AblationTable, Line
from clip_cid.method.balance.forest import Forest

MODELS = (
    "student",
    "baseline",
    "a-rather-long-name-of-a-model-b-32",
    "another-long-name-of-a-model",
    "fifth",
    "sixth",
    "teacher",
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved, laid out."""
    found: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        figure.draw_without_rendering()
        found.append(figure)

    monkeypatch.setattr(style, "save_svg", keep)
    return found


def boxes(texts: list[Text]) -> list[Bbox]:
    return [text.get_window_extent() for text in texts]


def assert_inside(figure: Figure, texts: list[Text]) -> None:
    for text, box in zip(texts, boxes(texts), strict=True):
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text


def of_models(names: list[str]) -> list[Score]:
    return [Score(model, name, "zero_shot", "top1", 0.5 + i / 50) for i, model in enumerate(MODELS) for name in names]


def test_every_model_is_in_the_legend_in_a_color_of_its_own(tmp_path: Path, drawn: list[Figure]) -> None:
    assert len(set(style.model_colors(MODELS).values())) == len(MODELS)
    scores.draw(of_models(["a", "b"]), Differences([]), "zero_shot", tmp_path)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(MODELS)
    assert_inside(drawn[0], legend.get_texts())
    assert all(legend.get_window_extent().y0 >= axes.bbox.y1 for axes in drawn[0].axes)


def test_three_models_are_beside_each_other() -> None:
    assert style.legend_columns(["student", "baseline", "teacher"]) == 3
    assert style.legend_columns(["x" * 100, "y"]) == 1


def test_long_names_leave_room_for_the_radar(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [f"a_set_of_labelled_images_with_a_long_name_{letter}" for letter in "abcd"]
    radar.draw([one for one in of_models(names) if one.model in ("student", "baseline")], tmp_path)
    (axes,) = drawn[0].axes
    assert_inside(drawn[0], list(axes.texts))
    assert axes.bbox.width > drawn[0].bbox.width / 4


def test_the_lead_says_points_whatever_the_sets_are_called(tmp_path: Path, drawn: list[Figure]) -> None:
    gain.draw(
        Differences(
            [Difference("zero_shot", "mean of 14/14 (CLIP's sets)", MEAN, "student", "baseline", 0.1, -0.05, 0.2)]
        ),
        "baseline",
        tmp_path,
    )
    assert_inside(drawn[0], [drawn[0].axes[0].xaxis.label])


def test_metrics_of_the_paper_do_not_run_into_one_another(tmp_path: Path, drawn: list[Figure]) -> None:
    clip, shifted = "mean of 14/14 (CLIP's sets)", "mean of 5/5 (shifted ImageNets)"
    metrics = (
        f"zero-shot, {clip}",
        f"zero-shot, {shifted}",
        f"linear probe, {clip}",
        f"neighbors, {clip}",
        "mean recall, mean of 1/1",
    )
    line = Line("clip", (10,), {0: dict.fromkeys(metrics, 0.5)})
    ablation.write(AblationTable("t", "clip", metrics, (line,)), tmp_path)
    labels: list[Text] = [axes.xaxis.label for axes in drawn[0].axes]
    assert [" ".join(label.get_text().split()) for label in labels] == [f"{metric}, %" for metric in metrics]
    assert_inside(drawn[0], labels)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes(labels), 2))


@pytest.mark.parametrize("threshold", [0.002, 0.1])
def test_the_removed_share_stands_beside_its_line_and_not_on_the_axis(
    tmp_path: Path, drawn: list[Figure], threshold: float
) -> None:
    forest = Forest(9, np.array([0, 2]), np.array([1, 3]), np.array([0.001, 0.1]), 0.2)
    removed_share.draw(forest, threshold=threshold, metric="cosine", out=tmp_path)
    axes = drawn[0].axes[0]
    (box,) = boxes(list(axes.texts))
    assert axes.bbox.x0 <= box.x0
    assert box.x1 <= axes.bbox.x1
