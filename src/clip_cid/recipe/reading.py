"""A recipe from YAML or plain values; its problems are named all at once, in our words."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import BaseModel, ValidationError

from clip_cid import plain_yaml, units
from clip_cid.addresses import without_secrets
from clip_cid.errors import ConfigError
from clip_cid.recipe.whole import Recipe

_MOST_PROBLEMS = 20  # that a message names
_NUMBER_OR_AUTO, _LITERAL_AUTO = "constrained-int", "literal['auto']"  # as pydantic names the two


class _Removed(NamedTuple):
    """A setting of an earlier version."""

    hint: str
    without_effect: tuple[Any, ...]
    """The values that change nothing."""


_REMOVED = {
    "cluster.algorithm": _Removed("only one k-means is left, so delete this line of the recipe", ("faiss", "blocks")),
    "machine.fsdp": _Removed("each device holds the whole student, so delete this line of the recipe", (False,)),
}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, its defaults filled in.

    Raises:
        ConfigError: The file is missing or not YAML, or settings are misspelt or out of limits; all
            are named at once.
    """
    return parse_recipe(_read_yaml(path), where=_named(path))


def read_run_recipe(path: Path) -> Recipe:
    """The recipe that a run has stored; also that of an earlier version.

    It holds every setting, so also those removed since, mostly at their defaults. Where these have no
    effect they are left out: a run stays readable.

    Raises:
        ConfigError: As `read_recipe`.
    """
    values = _read_yaml(path)
    if values == {} and not path.stat().st_size:
        raise ConfigError(
            f"{_named(path)}: this recipe of a run is empty, as after a power cut; its settings are lost.",
            fix="Give the recipe again with --recipe FILE. What was made with the same settings stays up to date.",
        )
    sections = cast(dict[str, Any], values) if isinstance(values, dict) else {}
    for name, removed in _REMOVED.items():
        section, setting = name.split(".")
        settings = sections.get(section)
        if isinstance(settings, dict) and setting in settings and settings[setting] in removed.without_effect:
            del settings[setting]
    return parse_recipe(values, where=_named(path))


def parse_recipe(values: Any, *, where: str) -> Recipe:
    """The recipe of plain values from YAML, JSON or flags; `where` names their origin in the error.

    Raises:
        ConfigError: Settings are misspelt or out of limits; all are named at once.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        every = [problem for problem in error.errors(include_url=False) if not _is_of_auto(problem)]
        problems = [_describe(problem) for problem in every[:_MOST_PROBLEMS]]
        if (more := len(every) - len(problems)) > 0:
            problems.append(f"and {more:,} more")
        raise ConfigError(
            "\n  ".join([f"{where}: {units.counted(len(every), 'problem')}", *problems]),
            fix="`clip-cid init FILE` writes a recipe with every setting explained.",
        ) from error


def _named(path: Path) -> str:
    return units.shortened(str(path), 500)


def _read_yaml(path: Path) -> Any:
    where = _named(path)
    try:
        with path.open("rb") as handle:
            content = handle.read(plain_yaml.MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot read this recipe ({error.strerror}).",
            fix="`clip-cid init FILE --pairs N` writes one to start from.",
        ) from error

    if len(content) > plain_yaml.MOST_BYTES:
        raise ConfigError(
            f"{where}: more than {units.size(plain_yaml.MOST_BYTES)}, so this is not a recipe.",
            fix="Name a recipe, as `clip-cid init FILE` writes one; many sources are written as {00000..00331}.",
        )
    try:
        values = plain_yaml.parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: not text in UTF-8 (byte {error.start:,}).", fix="Save it as UTF-8 without other encodings."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{where}: not valid YAML: {units.shortened(str(error), 300)}", fix="Mend the line it names."
        ) from error
    return {} if values is None else values


def _is_of_auto(problem: Any) -> bool:
    """Whether it says that a number is not `auto`, beside the problem that it says of the number."""
    return bool(problem["loc"]) and problem["loc"][-1] == _LITERAL_AUTO


def _describe(problem: Any) -> str:
    """One of pydantic's problems in our words; a misspelt name gets the nearest right one."""
    location = tuple(units.shortened(str(part), 100) for part in problem["loc"])
    or_auto = ""
    if location and location[-1] == _NUMBER_OR_AUTO:
        location, or_auto = location[:-1], ", or auto"
    name = ".".join(location)

    # A name that is no setting.
    if name in _REMOVED:
        return f"{name}: this setting was removed; {_REMOVED[name].hint}"
    if problem["type"] == "extra_forbidden":
        known = _names_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{name}: no such setting; {hint}"

    # Settings that do not fit together: the message is ours, and names them.
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return units.shortened(message, 500)

    # A value that the setting does not take.
    try:
        got = units.shortened(repr(problem["input"]), 200)
    except ValueError:
        got = "a number of more digits than Python writes"
    return f"{name or 'recipe'}: {message[:1].lower()}{units.shortened(message[1:], 500)}{or_auto}, got {without_secrets(got)}"


def _names_at(location: tuple[str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
