"""`auto`: a number that fits whatever is kept, the same on every machine, recorded, and no reason to do work again."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid import cli, pipeline
from clip_cid.auto_numbers import FORMER_DEFAULTS, as_before, chosen_settings, settle
from clip_cid.check import likely_mistakes
from clip_cid.made_from import different_settings
from clip_cid.recipe import Recipe, auto_settings, dump_recipe, parse_recipe, settled
from clip_cid.training.assemble import count_steps, largest_epoch
from clip_cid.training.optimizer import refuse_long_warmup

COUNTS = st.floats(0, 1).map(lambda share: int(64 * (400_000_000 / 64) ** share))


def recipe(**sections: Any) -> Recipe:
    return parse_recipe(sections, where="test")


@given(
    kept=COUNTS,
    per_cluster=st.none() | st.integers(3, 100),
    share=st.sampled_from([0.0, 0.1, 0.5]),
    steps=st.none() | st.integers(10, 100_000),
)
def test_the_numbers_fit_whatever_is_kept(kept: int, per_cluster: int | None, share: float, steps: int | None):
    training = {"per_cluster": per_cluster, "validation": {"share": share}, "steps": steps}
    page = settle(recipe(distill=training), kept).recipe
    assert auto_settings(page) == ()
    assert settled(page.cluster.num_centers) <= max(2, kept / 20)

    epoch = largest_epoch(page, round(kept * (1 - share)))
    length = count_steps(page.distill, epoch)
    refuse_long_warmup(page.distill, length)
    assert not list(likely_mistakes.of_settings(page.distill, steps=max(length, 10), pairs=epoch, held_out=0))


@pytest.mark.parametrize(
    ("kept", "centers", "batch", "epochs", "warmup"),
    [
        (660, 22, 32, 32, 66),  # 660 / 16 steps = 41, and 32 x 660 / 32 = 660 steps
        (100_000, 3_300, 1_024, 32, 312),
        (5_000_000, 160_000, 1_024, 20, 2_000),  # a hundred million pairs seen
        (225_000_000, 1_000_000, 1_024, 4, 2_000),  # the paper's data, on the machine people have
    ],
)
def test_numbers_worked_by_hand(kept: int, centers: int, batch: int, epochs: int, warmup: int):
    chosen = {choice.setting: choice.value for choice in settle(Recipe(), kept).choices}
    assert list(chosen) == ["cluster.num_centers", "distill.batch_size", "distill.epochs", "distill.warmup_steps"]
    assert list(chosen.values()) == [centers, batch, epochs, warmup]


def test_a_number_that_is_given_stays_and_the_others_fit_it():
    page = settle(recipe(distill={"batch_size": 10, "epochs": 3}), 1_000)
    assert page.recipe.distill.batch_size == 10
    assert page.recipe.distill.warmup_steps == 30  # a tenth of 3 x 1,000 / 10
    assert [choice.setting for choice in page.choices] == ["cluster.num_centers", "distill.warmup_steps"]


def test_nothing_is_said_of_settings_without_effect():
    assert chosen_settings(recipe(distill={"steps": 7, "batch_size": 2, "warmup_steps": 0})) == ("cluster.num_centers",)
    without = recipe(embed={"teacher": "none"}, distill={"weights": "clip-only", "batch_size": 2, "warmup_steps": 0})
    assert chosen_settings(without) == ("distill.epochs",)


@given(kept=COUNTS)
def test_a_settled_recipe_is_one_that_can_be_written_and_stays(kept: int):
    page = settle(Recipe(), kept).recipe
    assert settle(page, kept + 1_000).recipe == page
    assert parse_recipe(page.model_dump(mode="json"), where="test") == page


def test_a_number_whose_data_are_not_here_is_no_difference_but_another_auto_is():
    assert different_settings({"distill": {"batch_size": 64}}, {"distill": {"batch_size": "auto"}}) == []
    assert different_settings({"embed": {"precision": "fp32"}}, {"embed": {"precision": "auto"}}) == [
        "embed.precision fp32 -> auto"
    ]


def test_only_numbers_are_taken_beside_auto():
    for value in ("Auto", 0, -1, 1.5, None):
        with pytest.raises(Exception, match=r"distill\.batch_size"):
            recipe(distill={"batch_size": value})


def test_a_run_from_before_keeps_the_defaults_it_was_made_with(tmp_path: Path):
    then = recipe(cluster={"num_centers": 50}, distill={"batch_size": 64, "epochs": 32, "warmup_steps": 2_000})
    page, kept = as_before(recipe(cluster={"num_centers": 50}, distill={"batch_size": 64}), then)
    assert page == then
    assert kept == ["distill.epochs", "distill.warmup_steps"]
    assert as_before(recipe(), recipe(distill={"epochs": 7}))[1] == []  # a number of the user's, who has removed it
    assert set(FORMER_DEFAULTS) == set(auto_settings(Recipe()))


def test_the_command_line_says_that_it_keeps_them(tmp_path: Path, monkeypatch, capsys):
    seen: list[Recipe] = []
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.append(recipe))
    run, file = tmp_path / "run", tmp_path / "mine.yaml"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe(distill={"warmup_steps": 2_000, "batch_size": 64})))
    file.write_text("distill: {batch_size: 64}\n")

    assert cli.main(["run", str(run), "--recipe", str(file)]) == 0
    assert "distill.warmup_steps: as when this run was begun" in capsys.readouterr().err
    assert cli.main(["run", str(run), "--recipe", str(file), "--distill.warmup-steps", "auto"]) == 0
    assert cli.main(["run", str(tmp_path / "new"), "--recipe", str(file)]) == 0
    assert [page.distill.warmup_steps for page in seen] == [2_000, "auto", "auto"]
