"""A setting that makes others void gives way to a flag of theirs: no flag is ignored for what a run remembers."""

from pathlib import Path
from typing import Any

import pytest

from clip_cid import cli, pipeline
from clip_cid.errors import ConfigError
from clip_cid.overruling import OVERRULINGS, let_flags_count, settings_given
from clip_cid.recipe import Recipe, parse_recipe


def wanted(
    monkeypatch: pytest.MonkeyPatch, run: Path, remembered: str, *arguments: str, command: str = "run"
) -> tuple[Recipe, int]:
    """The recipe with which the command runs in a folder that has stored these lines, and its exit code."""
    seen: dict[str, Any] = {"recipe": Recipe()}
    monkeypatch.setattr(pipeline, "run", lambda folder, recipe, **rest: seen.update(recipe=recipe))
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(remembered)
    code = cli.main([command, str(run), *arguments])
    return seen["recipe"], code


def value_of(recipe: Recipe, name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_setting_of_the_table_exists_and_is_cleared_to_a_value_that_overrules_nothing():
    settings = Recipe().model_dump()
    for rule in OVERRULINGS:
        for name in (rule.setting, *rule.overruled):
            section, _, setting = name.partition(".")
            assert section in settings
            assert not setting or setting in settings[section], name
        if rule.ask is None:
            assert not rule.overrules(rule.cleared)


@pytest.mark.parametrize(
    ("remembered", "flags", "cleared", "to"),
    [
        ("balance: {target_removed: 0.1}", ["--balance.threshold", "0.07"], "balance.target_removed", None),
        ("balance: {target_removed: 0.1}", ["--balance.threshold=0.2"], "balance.target_removed", None),
        ("balance: {existing: k.npy}", ["--balance.threshold", "0.07"], "balance.existing", None),
        ("balance: {existing: k.npy}", ["--balance.target-removed", "0.1"], "balance.existing", None),
        ("balance: {existing: k.npy}", ["--balance.keep", "best_caption"], "balance.existing", None),
        ("balance: {enabled: false}", ["--balance.threshold", "0.07"], "balance.enabled", True),
        ("balance: {enabled: false}", ["--kept", "k.npy"], "balance.enabled", True),
        ("embed: {existing: e}", ["--embed.teacher", "ViT-B-32"], "embed.existing", None),
        ("embed: {existing: e}", ["--embed.pretrained", "openai"], "embed.existing", None),
        ("cluster: {existing: c}", ["--cluster.num_centers", "1000000"], "cluster.existing", None),
        ("distill: {steps: 10}", ["--distill.epochs", "32"], "distill.steps", None),
        ("distill: {head_perplexity: 9}", ["--distill.head-scale", "16"], "distill.head_perplexity", None),
        ("evaluate: {student: false, compare: {m: 'run:m'}}", ["--distill.epochs", "3"], "evaluate.student", True),
    ],
)
def test_a_flag_given_now_clears_what_would_overrule_it(
    monkeypatch, tmp_path: Path, capsys, remembered: str, flags: list[str], cleared: str, to: Any
):
    recipe, code = wanted(monkeypatch, tmp_path / "run", remembered, *flags)
    assert code == 0
    assert value_of(recipe, cleared) == to
    assert f"{cleared}:" in capsys.readouterr().err

    # Without the flag, or with another one, it is remembered.
    recipe, code = wanted(monkeypatch, tmp_path / "run", remembered, "--machine.workers", "3")
    assert code == 0
    assert value_of(recipe, cleared) != to
    assert "no longer counts" not in capsys.readouterr().err


def test_what_a_recipe_file_names_gives_way_too(monkeypatch, tmp_path: Path, capsys):
    (tmp_path / "r.yaml").write_text("distill: {steps: 10}")
    recipe, _ = wanted(monkeypatch, tmp_path / "run", "", f"--recipe={tmp_path / 'r.yaml'}", "--distill.epochs", "2")
    assert (recipe.distill.steps, recipe.distill.epochs) == (None, 2)
    assert "distill.epochs given, so distill.steps: 10 of the recipe no longer counts" in capsys.readouterr().err


def test_several_give_way_at_once(monkeypatch, tmp_path: Path):
    stored = "balance: {enabled: false, existing: k.npy, target_removed: 0.1}"
    recipe, _ = wanted(monkeypatch, tmp_path / "run", stored, "--balance.threshold", "0.07")
    settings = recipe.balance
    assert (settings.enabled, settings.existing, settings.target_removed) == (True, None, None)


def test_a_setting_that_overrules_is_kept_when_it_is_what_is_given(monkeypatch, tmp_path: Path, capsys):
    recipe, _ = wanted(monkeypatch, tmp_path / "run", "balance: {threshold: 0.05}", "--balance.target-removed", "0.1")
    assert (recipe.balance.threshold, recipe.balance.target_removed) == (0.05, 0.1)
    recipe, _ = wanted(monkeypatch, tmp_path / "run", "balance: {existing: k}", "--balance.target-removed", "None")
    assert recipe.balance.existing == Path("k")
    assert "no longer counts" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--balance.threshold", "0.05", "--balance.target-removed", "0.1"], "balance.threshold has no effect with"),
        (["--balance.threshold", "0.05", "--kept", "k.npy"], "balance.threshold has no effect with balance.existing"),
        (["--balance.no-enabled", "--balance.threshold", "0.05"], "no effect with balance.enabled: false"),
        (["--distill.epochs", "3", "--distill.steps", "9"], "distill.epochs has no effect with distill.steps: 9"),
        (["--kept", "a.npy", "--balance.existing", "b.npy"], "--kept and --balance.existing both set balance.existing"),
        (["--embed.teacher", "hf-hub:a/b", "--embed.pretrained", "openai"], "embed.pretrained has no effect with"),
        (["--embed.view-crop-scale", "0.5"], "embed.view_crop_scale has no effect with embed.views: 0"),
        (["--report.no-images", "--report.blur"], "report.blur has no effect with report.images: false"),
    ],
)
def test_both_at_once_are_refused(monkeypatch, tmp_path: Path, capsys, flags: list[str], words: str):
    _, code = wanted(monkeypatch, tmp_path / "run", "{}", *flags)
    assert code == 2
    assert words in capsys.readouterr().err


def test_pictures_that_were_left_out_do_not_come_back_with_a_blur(monkeypatch, tmp_path: Path, capsys):
    """A page for sharing: only the user can say that it shows pictures again."""
    _, code = wanted(monkeypatch, tmp_path / "run", "report: {images: false}", "--blur", command="report")
    assert code == 2
    assert "--report.images" in capsys.readouterr().err
    recipe, code = wanted(
        monkeypatch, tmp_path / "run", "report: {images: false}", "--blur", "--report.images", command="report"
    )
    assert (code, recipe.report.images, recipe.report.blur) == (0, True, True)


def test_weights_need_the_name_of_their_teacher(monkeypatch, tmp_path: Path, capsys):
    _, code = wanted(monkeypatch, tmp_path / "run", "embed: {teacher: 'hf-hub:a/b'}", "--embed.pretrained", "openai")
    assert code == 2
    assert "embed.pretrained has no effect with embed.teacher: hf-hub:a/b." in capsys.readouterr().err


def test_settings_of_a_stage_that_is_not_used_are_named(monkeypatch, tmp_path: Path, capsys):
    stored = "distill: {weights: clip-only}"
    _, code = wanted(monkeypatch, tmp_path / "run", stored, "--cluster.num-centers", "5")
    assert code == 0
    assert "this recipe does not use cluster" in capsys.readouterr().err


def test_flags_are_read_however_they_are_written():
    settings = Recipe().model_dump()
    arguments = ["run", "R", "--balance.max_threshold=0.2", "--report.no-images", "--kept", "k", "--no-such", "--force"]
    assert settings_given(arguments, settings, {"kept": "balance.existing"}) == [
        "balance.max_threshold",
        "report.images",
        "balance.existing",
    ]
    assert settings_given(["--distill.weights.clip", "0.5", "--distill.no-such", "-x"], settings, {}) == [
        "distill.weights.clip"
    ]
    with pytest.raises(ConfigError, match=r"--balance.existing and --kept both set balance.existing"):
        settings_given(["--balance.existing=k", "--kept", "k"], settings, {"kept": "balance.existing"})


def test_what_counts_is_the_recipe_that_runs():
    settings = parse_recipe({"balance": {"target_removed": 0.1}}, where="test").model_dump()
    assert let_flags_count(settings, ["balance.threshold"]) == [
        "balance.threshold given, so balance.target_removed: 0.1 of the recipe no longer counts"
    ]
    assert settings["balance"]["target_removed"] is None
    assert let_flags_count(settings, ["balance.threshold"]) == []
