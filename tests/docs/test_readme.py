"""What the documents promise exists: commands, settings and targets (links: test_links.py)."""

import re
from pathlib import Path

import pytest
from test_names_in_messages import is_flag

from clip_cid import cli
from clip_cid.recipe import Recipe

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_the_first_runnable_block_is_on_the_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```bash") + 1 < 15
    assert len(lines) < 150


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "Makefile"], ids=lambda path: path.name)
def test_every_command_named_exists(document: Path):
    commands = cli._commands()
    for name in re.findall(r"clip-cid ([a-z]+)\b", document.read_text()):
        if name not in ("stage", "is", "needs", "on", "and"):
            assert name in commands, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_setting_named_exists(document: Path):
    for section, name in re.findall(r"`([a-z]+)\.([a-z_]+)", document.read_text()):
        if section in Recipe.model_fields and name not in ("part", "html"):  # a folder and a page of a run
            assert name in type(getattr(Recipe(), section)).model_fields, f"{section}.{name}"


def test_every_target_of_the_makefile_that_the_documents_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        for name in re.findall(r"[`\n]make ([a-z-]+)", document.read_text()):
            assert name in targets, f"{document.name}: make {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_of_a_command_that_is_printed_exists(document: Path):
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", document.read_text())
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        for command in re.split(r"clip[-_]cid ", line.partition("#")[0])[1:]:
            for flag in re.findall(r"(?<=\s)--([a-z][\w.-]*)", command):
                assert is_flag(flag), line
