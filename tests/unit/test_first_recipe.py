"""The recipe that `clip-cid init --pairs N --gpus G` writes: it fits, says why, and is quick to read."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clip_cid import cli
from clip_cid.check import likely_mistakes
from clip_cid.errors import ConfigError
from clip_cid.first_recipe import choose, full_recipe, short_recipe
from clip_cid.recipe import Recipe, parse_recipe, read_recipe
from clip_cid.training.assemble import count_steps
from clip_cid.training.optimizer import refuse_long_warmup

SIZES = st.floats(0, 1).map(lambda share: int(3_200 * (400_000_000 / 3_200) ** share))


def recipe_of(text: str) -> Recipe:
    return parse_recipe(yaml.safe_load(text), where="test")


@given(pairs=SIZES, gpus=st.integers(0, 100), kept_share=st.floats(0.5, 1))
def test_the_numbers_fit_whatever_balance_keeps_down_to_half(pairs: int, gpus: int, kept_share: float):
    recipe, kept = recipe_of(short_recipe(pairs, gpus)), int(kept_share * pairs)
    settings, centers = recipe.distill, recipe.cluster.num_centers
    assert centers != "auto"
    assert settings.batch_size != "auto"
    steps = count_steps(settings, kept)
    refuse_long_warmup(settings, steps)
    assert centers <= kept / 20
    assert settings.batch_size % max(1, gpus) == 0
    doubts = [
        *likely_mistakes.of_settings(settings, steps=steps, pairs=kept, held_out=0),
        *likely_mistakes.of_negatives(settings, num_centers=centers, own=min(settings.batch_size, centers)),
        *likely_mistakes.of_head(settings),
        *likely_mistakes.of_weights(settings),
    ]
    assert not doubts


@pytest.mark.parametrize(
    ("pairs", "gpus", "centers", "batch", "epochs", "warmup"),
    [
        (200_000, 1, 3_300, 1_024, 32, 312),  # 100,000 kept: 32 x 100,000 / 1,024 = 3,125 steps
        (200_000, 0, 3_300, 256, 10, 390),  # a million pairs seen
        (6_000, 0, 100, 128, 32, 75),  # 3,000 / 16 steps = 187
        (400_000_000, 64, 1_000_000, 32_768, 32, 2_000),  # the paper's
        (10_000_000, 1, 160_000, 1_024, 20, 2_000),  # 5,000,000 kept, 100,000,000 seen
    ],
)
def test_numbers_worked_by_hand(pairs: int, gpus: int, centers: int, batch: int, epochs: int, warmup: int):
    chosen = {choice.setting: choice.value for choice in choose(pairs, gpus)}
    assert chosen["cluster.num_centers"] == centers
    assert chosen["distill.batch_size"] == batch
    assert chosen["distill.epochs"] == epochs
    assert chosen["distill.warmup_steps"] == warmup


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_all_writes_the_same_numbers_among_every_setting(gpus: int):
    short, full = short_recipe(200_000, gpus), full_recipe(200_000, gpus)
    assert recipe_of(short) == recipe_of(full)
    assert full.count("# Chosen: ") == len(choose(200_000, gpus))
    assert len(full.splitlines()) > 10 * len(short.splitlines())


def test_every_number_of_the_short_recipe_has_its_reason_in_a_line():
    lines = short_recipe(200_000, 1).splitlines()
    settings = [line for line in lines if line.startswith("  ")]
    assert all(re.fullmatch(r"  \w+: \S+  # .{5,}", line) for line in settings)
    assert len(lines) < 30
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("pairs", "gpus", "says"), [(31, 0, "at least 32"), (255, 8, "at least 256"), (99, -1, "0 to")]
)
def test_what_cannot_fit_is_refused(pairs: int, gpus: int, says: str):
    with pytest.raises(ConfigError, match=says):
        choose(pairs, gpus)


def test_the_command_writes_it_and_says_why(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "--pairs", "200000", "--gpus", "1"]) == 0
    said = capsys.readouterr().out
    assert "30 images a cluster" in said
    assert "clip-cid run runs/recipe --recipe recipe.yaml" in said
    assert Path("recipe.yaml").read_text() == short_recipe(200_000, 1)

    assert cli.main(["init", "all.yaml", "--pairs", "200000", "--all"]) == 0
    assert Path("all.yaml").read_text() == full_recipe(200_000, 0)

    assert cli.main(["init", "no.yaml", "--gpus", "1"]) == 2
    assert cli.main(["init", "no.yaml", "--pairs", "5"]) == 2
    assert not Path("no.yaml").exists()


SHIPPED = sorted(path.stem for path in (Path(cli.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_that_comes_with_the_package_is_written_as_it_is(tmp_path: Path, name: str):
    written = tmp_path / "mine.yaml"
    assert cli.main(["init", str(written), "--from", name]) == 0
    assert written.read_text() == (Path(cli.__file__).parent / "recipes" / f"{name}.yaml").read_text()
    assert read_recipe(written).pairs.source


def test_there_are_recipes_and_the_folder_beside_the_readme_is_the_same_one():
    assert {"demo", "demo-teacher", "small-gpu", "laion400m-b32"} <= {*SHIPPED}
    assert (Path(__file__).parents[2] / "recipes").resolve() == Path(cli.__file__).parent.resolve() / "recipes"


@pytest.mark.parametrize("name", ["large-gpu", "", "../recipe", "demo.yaml"])
def test_an_unknown_recipe_is_refused_with_the_names_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    assert cli.main(["init", str(tmp_path / "mine.yaml"), "--from", name]) == 2
    problem, fix = capsys.readouterr().err.splitlines()
    assert repr(name) in problem
    assert fix == f"Give one of: {', '.join(SHIPPED)}."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--pairs", "2000"], ["--gpus", "1"], ["--all"]])
def test_a_recipe_as_it_is_has_no_numbers_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
):
    assert cli.main(["init", str(tmp_path / "mine.yaml"), "--from", "demo", *flags]) == 2
    assert "--from: such a recipe is written as it is." in capsys.readouterr().err
