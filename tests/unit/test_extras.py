"""What is installed of the package: balance needs none of the optional parts, and all else says which it lacks."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import clip_cid
from clip_cid import cli, extras, pipeline
from clip_cid.errors import MissingExtraError
from clip_cid.pipeline import State
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages.facts import STAGES

ROOT = Path(__file__).parents[2]
OPTIONAL = sorted({module for modules in extras.MODULES.values() for module in modules})
MODULE_OF = {
    "open_clip_torch": "open_clip",
    "pylance": "lance",
    "scikit-learn": "sklearn",
}  # of packages that bear another name
WITH_OPEN_CLIP = {"torchvision", "timm"}  # open_clip requires them


@pytest.fixture
def nothing_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in OPTIONAL:
        monkeypatch.setitem(sys.modules, module, None)


def test_the_modules_of_an_extra_are_those_of_its_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]

    def modules(extra: str) -> set[str]:
        found: set[str] = set()
        for requirement in declared[extra]:
            if within := re.fullmatch(r"clip-cid\[(.+)\]", requirement):
                found |= set().union(*map(modules, within[1].split(",")))
            else:
                package = re.split(r"[>=<\[]", requirement)[0]
                found.add(MODULE_OF.get(package, package))
        return found | (WITH_OPEN_CLIP if "open_clip" in found else set())

    assert {extra: modules(extra) for extra in extras.MODULES} == {
        extra: set(names) for extra, names in extras.MODULES.items()
    }
    assert modules("all") == {*OPTIONAL}
    always = {re.split(r"[>=<]", requirement)[0] for requirement in project["dependencies"]}
    assert not {MODULE_OF.get(package, package) for package in always} & {*OPTIONAL}


@pytest.mark.slow
def test_balance_cluster_and_subset_of_stored_embeddings_need_no_optional_part(tmp_path: Path):
    rows = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    rows[40:] = rows[:20]
    np.save(tmp_path / "rows.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    program = f"""
import sys
for module in {OPTIONAL!r}:
    sys.modules[module] = None  # as if it were not installed
from clip_cid.cli import main
for command in (
    "balance run --embeddings rows.npy",
    "cluster run --cluster.num-centers 3",
    "subset run list",
    "status run",
    "verify run",
    "init mine.yaml",
    "sample data --pairs 60",
):
    assert main(command.split()) == 0, command
import clip_cid
assert clip_cid.balance(__import__("numpy").load("rows.npy")).kept.shape == (40,)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "list" / "keys.txt").read_text().split()) == 40


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("run RUN --recipe all.yaml", "evaluate,report"),
        ("embed RUN --recipe all.yaml", "distill"),
        ("texts RUN --recipe all.yaml", "distill"),
        ("distill RUN --recipe all.yaml", "distill"),
        ("evaluate RUN --recipe all.yaml", "evaluate"),
        ("draw RUN --recipe all.yaml", "distill,report"),
        ("report RUN --recipe all.yaml", "distill,report"),
        ("check RUN --recipe all.yaml", "distill"),
        ("balance RUN --embeddings rows.npy --sweep", "report"),
        ("ablate losses all.yaml OUT", "distill,report"),
        ("export RUN OUT", "distill"),
        ("push RUN ORG/NAME --dry-run", "distill"),
    ],
)
@pytest.mark.usefixtures("nothing_optional")
def test_a_command_without_its_extra_is_refused_in_two_lines_and_does_nothing(
    command: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    Path("all.yaml").write_text(
        "{pairs: {source: [p.tar]}, evaluate: {sets: {digits: 'builtin:digits'}},"
        " distill: {texts: [t.txt], weights: {cosine_text: 1}}}"
    )
    assert cli.main(command.split()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.match(r"clip-cid: .+ needs an optional part: .+ (is|are) not installed\.", lines[0])
    assert lines[1] == f'pip install "clip-cid[{extra}]"'
    assert not [*Path("RUN").iterdir()]
    assert not Path("OUT").exists()


@pytest.mark.usefixtures("nothing_optional")
def test_a_stage_that_is_up_to_date_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = parse_recipe({"embed": {"teacher": "none"}, "distill": {"weights": "clip-only"}}, where="test")

    def of_stages(*done: str) -> None:
        states = [State(stage, "done" if stage.name in done else "missing", "", None) for stage in STAGES]
        monkeypatch.setattr(pipeline, "states", lambda folder, recipe: states)

    of_stages("distill", "draw", "report")
    pipeline.require_extras(RunFolder(tmp_path), recipe)
    with pytest.raises(MissingExtraError, match=r"^distill needs"):
        pipeline.require_extras(RunFolder(tmp_path), recipe, force=True)
    of_stages("distill", "report")
    with pytest.raises(MissingExtraError, match=r"^draw needs"):
        pipeline.require_extras(RunFolder(tmp_path), recipe)
    with pytest.raises(MissingExtraError, match=r"^embed needs"):
        pipeline.require_extras(RunFolder(tmp_path), Recipe(), only="embed")


@pytest.mark.usefixtures("nothing_optional")
def test_a_function_without_its_extra_says_so():
    with pytest.raises(MissingExtraError, match=r"clip_cid\.linear_probe needs") as error:
        _ = clip_cid.linear_probe
    assert error.value.fix == 'pip install "clip-cid[evaluate]"'


def test_the_part_that_holds_another_is_named_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError) as error:
        extras.require("This", extras.DISTILL, extras.EVALUATE)
    assert (
        str(error.value) == 'This needs an optional part: sklearn is not installed.\npip install "clip-cid[evaluate]"'
    )
