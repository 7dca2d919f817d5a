"""A recipe as YAML: its values alone, or each with its explanation and its limits."""

import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml

from clip_cid.recipe.section import Config
from clip_cid.recipe.whole import Recipe

_LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def dump_recipe(recipe: Recipe) -> str:
    """The full recipe as YAML; reading it gives an equal recipe."""
    return as_yaml(recipe.model_dump(mode="json"))


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, in their order."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)


def commented_recipe(recipe: Recipe | None = None, *, reasons: Mapping[str, str] = MappingProxyType({})) -> str:
    """A recipe for `clip-cid init`: every setting, with its explanation and its limits.

    Args:
        recipe: Its values; by default the defaults.
        reasons: Setting -> why it has its value, where that is not the default.
    """
    lines = _comment(
        "A clip-cid recipe: every setting with its value and, behind it, what else it may be."
        " Delete what you do not change."
    )
    lines.append("")

    for section in Recipe.model_fields:
        model: Config = getattr(recipe or Recipe(), section)
        commented = _commented_section(model, reasons, f"{section}.", indent="  ")
        lines += [*_comment(type(model).__doc__), f"{section}:", *commented, ""]
    return "\n".join(lines)


def one_line(text: str | None) -> str:
    """A docstring of several lines as one line of help."""
    return " ".join((text or "").split())


def _comment(text: str | None, *, indent: str = "") -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(one_line(text), 100, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def _commented_section(model: Config, reasons: Mapping[str, str], prefix: str, *, indent: str) -> list[str]:
    lines: list[str] = []
    schemas = type(model).model_json_schema()["properties"]
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        lines += _comment(field.description, indent=indent)
        if prefix + name in reasons:
            lines += _comment(f"Chosen: {reasons[prefix + name]}.", indent=indent)
        if isinstance(value, Config):
            lines += [f"{indent}{name}:", *_commented_section(value, reasons, f"{prefix}{name}.", indent=indent + "  ")]
        else:
            plain = model.model_dump(mode="json")[name]
            text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            limits = _limits(schemas[name])
            lines.append(f"{indent}{name}: {text}" + (f"  # {limits}" if limits else ""))
    return lines


def _limits(schema: dict[str, Any]) -> str:
    """The values a setting accepts, or the limits of its number; empty if there are none."""
    for kind in schema.get("anyOf", [schema]):  # a setting that may be absent is its kind or null
        limits = [f"{words} {kind[name]:,}" for name, words in _LIMITS.items() if name in kind]
        if shown := kind.get("enum", limits):
            return ", ".join(shown)
    return ""
