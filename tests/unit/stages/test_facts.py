"""The facts of the stages fit each other, the recipe and the modules that do the work."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from clip_cid import stage_names
from clip_cid.data.outside_files import Reader
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages.facts import BY_NAME, STAGES


def test_every_stage_has_a_name_and_a_module_with_its_work():
    names = {name: value for name, value in vars(stage_names).items() if name.isupper()}
    assert names.pop("STAGE_NAMES") == tuple(names.values())
    assert [stage.name for stage in STAGES] == list(names.values())
    for stage in STAGES:
        work = importlib.import_module(f"clip_cid.stages.{stage.name}").run
        assert list(inspect.signature(work).parameters) == ["folder", "out", "recipe"]


def test_a_stage_needs_only_stages_before_it():
    before: set[str] = set()
    for stage in STAGES:
        assert before.issuperset(stage.needs), stage.name
        before.add(stage.name)
    assert set(BY_NAME) == before


def test_every_section_of_the_recipe_belongs_to_a_stage_but_the_machine():
    sections = {section for stage in STAGES for section in stage.sections}
    assert sections == set(Recipe.model_fields) - {"machine"}


def test_the_facts_import_no_torch():
    program = "import sys, clip_cid.stages.facts; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_models_that_are_not_here_now_stay_inputs_of_their_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A finished run that is looked at from another folder is not stale."""
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(
        {
            "embed": {"teacher": "cid-tiny", "pretrained": "gone/epoch_32.pt"},
            "distill": {"student": "gone/tiny.json", "pretrained": "run:gone"},
            "evaluate": {"compare": {"a": "local-dir:gone", "b": "ViT-B-32/gone.pt", "c": "ViT-B-32/openai"}},
        },
        where="test",
    )
    reader = Reader(RunFolder(tmp_path).digests, None, None)
    named = {setting: outside for stage in STAGES for setting, outside in stage.outside(recipe, reader).items()}
    assert named.keys() == {
        *("embed.teacher", "distill.student", "distill.pretrained", "evaluate.compare.a", "evaluate.compare.b"),
    }
    assert not any(outside.is_here() for outside in named.values())
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "epoch_32.pt").write_bytes(b"weights")
    assert BY_NAME["embed"].outside(recipe, reader)["embed.teacher"].is_here()
