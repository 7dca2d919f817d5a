"""What the Dockerfile names is there; it could not be built where it was written."""

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from clip_cid import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STEPS = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(kind: str) -> list[str]:
    return [rest for name, rest in STEPS if name == kind]


def is_ignored(path: str) -> bool:
    """By .dockerignore: a pattern begins at the root, and hides what is below it."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(
        fnmatch(part.rpartition("/")[2], pattern[3:]) if pattern.startswith("**/") else part == pattern
        for pattern in patterns
        for part in above
    )


def test_it_has_only_steps_that_are_looked_at_here() -> None:
    assert {name for name, _ in STEPS} == {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "CMD", "ENTRYPOINT"}


def test_images_have_their_usual_short_names_or_are_stages_above() -> None:
    stages: list[str] = []
    for step in steps("FROM"):
        image, _, stage = step.partition(" AS ")
        assert image in stages or re.fullmatch(r"[a-z]+:[0-9.]+", image), image
        stages.append(stage)
    assert stages[-1] == "clip-cid", "the last one is built without --target"
    assert set(re.findall(r"--target (\S+)", TEXT)) <= {*stages}


def test_nothing_comes_from_another_index() -> None:
    assert not re.search(r"https?://|index-url|find-links|trusted-host", TEXT)


@pytest.mark.parametrize("step", steps("COPY"))
def test_what_is_copied_is_there_and_not_ignored(step: str) -> None:
    *sources, _ = step.split()
    for source in sources:
        assert (ROOT / source).exists()
        assert source == "." or not is_ignored(source)


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        (".venv/bin/python", True),
        ("data/demo/pairs/0.tar", True),
        ("src/clip_cid.egg-info/PKG-INFO", True),
        ("src/clip_cid/__pycache__/cli.pyc", True),
        ("src/clip_cid/data/pairs/tars.py", False),
        ("tests/unit/data/test_npy_files.py", False),
        ("Makefile", False),
        ("benchmarks/device_check.py", False),
    ],
)
def test_results_are_left_out_and_sources_are_not(path: str, ignored: bool) -> None:
    assert is_ignored(path) == ignored


def test_its_targets_of_make_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = [shlex.split(step) for step in steps("RUN")]
    commands += [json.loads(step) for step in (*steps("CMD"), *steps("ENTRYPOINT"))]
    named = [command[1] for command in commands if command[0] == "make"]
    assert named == ["setup", "device-check"]
    assert {*named} <= {*targets}


def test_pip_gets_an_extra_and_a_file_that_exist() -> None:
    (install,) = [shlex.split(step) for step in steps("RUN") if step.startswith("pip ")]
    assert install[:3] == ["pip", "install", "-c"]
    constraints, what = install[3:]
    assert any(constraints in step.split() for step in steps("COPY"))
    (extra,) = re.findall(r"^\.\[(\w+)\]$", what)
    assert extra in PROJECT["optional-dependencies"]


def test_its_commands_exist() -> None:
    assert json.loads(steps("ENTRYPOINT")[0])[0] in PROJECT["scripts"]
    (run,) = re.findall(r'-v "\$PWD:/work" clip-cid (\w+)', TEXT)
    assert run in cli._commands()


def test_the_torch_it_speaks_of_is_the_one_it_installs() -> None:
    (told,) = re.findall(r"torch ([\d.]+) of constraints.txt", TEXT)
    assert f"torch=={told}\n" in (ROOT / "constraints.txt").read_text()
