"""The facts of the stages fit each other, the recipe and the modules that do the work."""

import importlib
import inspect
import subprocess
import sys

from clip_cid import stage_names
from clip_cid.recipe import Recipe
from clip_cid.stages.facts import BY_NAME, STAGES


def test_every_stage_has_a_name_and_a_module_with_its_work():
    assert [stage.name for stage in STAGES] == [value for name, value in vars(stage_names).items() if name.isupper()]
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
