"""What the messages, help texts and docstrings of the source name: settings, flags and commands that exist."""

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import clip_cid
from clip_cid import cli
from clip_cid.recipe import Config, Recipe
from clip_cid.recipe.reading import _REMOVED

SOURCE = Path(clip_cid.__file__).parent

NOT_SETTINGS = {"balance.part", "report.html", "balance.html", "suggest.html", "report.css"}  # a folder and two files
NOT_COMMANDS = {"did", "recipe", "embedding"}  # "a clip-cid recipe", "what clip-cid did"
OF_OTHERS = {
    *("help", "debug", "version"),
    *("concatenate", "dereference", "hard-dereference", "sort"),  # tar
    *("dataset", "dataset_root", "model", "model_type", "output", "pretrained", "task"),  # CLIP_benchmark
    *("logdir", "nproc-per-node"),  # TensorBoard and torchrun
    *("address", "head", "num-cpus", "port"),  # ray start
    "section.no-setting",  # an example
}


def strings(source: str) -> Iterator[str]:
    """Every string, joined as Python joins it; a value in an f-string is {}."""
    tree = ast.parse(source)
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    for node in joined:
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    parts = {id(part) for node in joined for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def settings_in(source: str) -> set[str]:
    sections = "|".join(Recipe.model_fields)
    pattern = rf"(?<![\w./-])(?:{sections})(?:\.[a-z_]+(?:-[a-z]+)*)+"
    return {name.replace("-", "_") for text in strings(source) for name in re.findall(pattern, text)}


def flags_in(source: str) -> set[str]:
    return {
        name for text in strings(source) for name in re.findall(r"(?<![\w-])--([a-z][\w-]*(?:\.[a-z][\w-]*)*)", text)
    }


def commands_in(source: str) -> set[str]:
    return {name for text in strings(source) for name in re.findall(r"clip-cid ([a-z]+)\b", text)}


def is_setting(name: str) -> bool:
    """Whether the recipe has it; below a mapping with free names, such as `evaluate.sets`, anything goes."""
    kind: object = Recipe
    for part in name.split("."):
        if not (isinstance(kind, type) and issubclass(kind, Config)):
            return False
        if hasattr(kind, part) and part not in kind.model_fields:  # a property, in a docstring
            return True
        if part not in kind.model_fields:
            return False
        kind = kind.model_fields[part].annotation
    return True


@functools.cache
def known_flags() -> set[str]:
    rows = [*cli._COMMON, *cli._FORCE, *(row for rows in cli._EXTRAS.values() for row in rows)]
    names = {name for name, *_ in rows}
    names |= {name for command in cli._commands().values() for name in inspect.signature(command).parameters}
    return {name.rstrip("_").replace("_", "-") for name in names}  # `from_`, as `from` is a word of Python


def is_flag(name: str) -> bool:
    section, dot, setting = name.replace("-", "_").partition(".")
    if not dot:
        return name in OF_OTHERS or name.replace("_", "-") in known_flags()
    return (
        name in OF_OTHERS
        or is_setting(f"{section}.{setting}")
        or is_setting(f"{section}.{setting.removeprefix('no_')}")
    )


def offenders(names_in: Callable[[str], set[str]], known: Callable[[str], bool]) -> list[str]:
    return [
        f"{path.relative_to(SOURCE)}: {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for name in sorted(names_in(path.read_text(encoding="utf-8")))
        if not known(name)
    ]


def test_every_setting_named_in_a_string_exists() -> None:
    named = [*NOT_SETTINGS, *_REMOVED]
    assert offenders(settings_in, lambda name: name in named or is_setting(name)) == []


def test_every_flag_named_in_a_string_exists() -> None:
    assert offenders(flags_in, is_flag) == []


def test_every_command_named_in_a_string_exists() -> None:
    known = {*cli._commands(), *NOT_COMMANDS}
    assert offenders(commands_in, lambda name: name in known) == []


def test_a_name_that_does_not_exist_is_noticed() -> None:
    source = 'f"{path}: set distill.weights" ".instance: 0, --embed.normalise, --kepts or balance.max-threshold"'
    assert settings_in(source) == {"distill.weights.instance", "balance.max_threshold"}
    assert [name for name in sorted(settings_in(source)) if not is_setting(name)] == ["distill.weights.instance"]
    assert flags_in(source) == {"embed.normalise", "kepts"}
    assert not any(is_flag(name) for name in flags_in(source))
    assert is_flag("embed.no-normalize")
    assert is_flag("force")
