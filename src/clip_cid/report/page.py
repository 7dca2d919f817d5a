"""The report's page: one file, no script, nothing fetched; every word from the data is escaped."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import unescape
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.runtime import Context
from markupsafe import Markup, escape

from clip_cid import units
from clip_cid.figures import style
from clip_cid.models.public_names import PublicWords

_LARGEST = 1.35  # a figure may be shown this much larger than it was drawn
_COLORS = {
    style.PAPER: "paper",
    style.INK: "ink",
    style.MUTED: "muted",
    style.GRID: "line",
    style.BLUE: "blue",
    style.VERMILLION: "vermillion",
    style.GREEN: "green",
    style.ORANGE: "orange",
    style.PURPLE: "purple",
    style.SKY: "sky",
}


@dataclass(frozen=True)
class Placed:
    """A figure on the page."""

    svg: Markup
    caption: str
    section: str
    of_data: bool


def render(template: str, values: Mapping[str, Any], words: PublicWords) -> str:
    """The page of a template with these values, every text cut by `words`; a value that is needed but missing is an error."""
    style_sheet = Markup((resources.files("clip_cid") / "report" / "report.css").read_text(encoding="utf-8"))
    return _templates().get_template(template).render(style_sheet=style_sheet, public_words=words, **values)


@functools.cache
def _templates() -> jinja2.Environment:
    """Shared by all pages of a process: to compile a template takes longer than to fill it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clip_cid", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_cut,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "caption": _caption,
        "number": lambda value: f"{value:,}",
        "percent": unbroken_percent,
        "points": units.signed_points,
        "duration": units.duration,
        "columns": columns,
        "sections": sections,
    }
    return environment


@jinja2.pass_context
def _cut(context: Context, value: Any) -> Any:
    return context["public_words"](value) if type(value) is str else value


@jinja2.pass_context
def _caption(context: Context, value: str) -> Markup:
    return escape(context["public_words"].data(value))


def columns(pictures: int, most: int, together: int = 1) -> int:
    """How many pictures stand in a row of at most `most`, so that the last row is as full as can be.

    `most` must be a multiple of `together`, the number of pictures that no row may part.
    """
    rows = max(1, -(-pictures // most))
    in_a_row = -(-pictures // rows)
    return -(-in_a_row // together) * together


def sections(body: str) -> list[tuple[str, Markup]]:
    """Id and heading of each section of a page, in order."""
    found = re.findall(r'<section id="([\w-]+)">\s*<h2>(.*?)</h2>', body)
    return [(name, Markup(heading)) for name, heading in found]


def unbroken_percent(share: float) -> str:
    """A share in percent that no line break separates from its sign."""
    return units.percent(share).replace(" ", "\N{NO-BREAK SPACE}")


def inline_svg(path: Path, description: str, words: PublicWords) -> Markup:
    """One of our figures as a part of the page: in the page's font and colors, light or dark, with its own ids.

    Its texts are cut by `words`.
    Each figure may stand on the page once.
    """
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{path.stem}-", text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: inherit", text)
    text = re.sub("|".join(_COLORS), lambda match: f"var(--{_COLORS[match[0]]})", text)
    text = re.sub(r">([^<>]*[^<>\s][^<>]*)<", lambda match: f">{escape(words(unescape(match[1])))}<", text)
    size = re.match(r'<svg[^>]* viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None, "matplotlib always writes a viewBox"
    opening = (
        f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{escape(description)}" '
        f'style="max-width: {float(size[1]) * 4 / 3 * _LARGEST:.0f}px">'
    )
    return Markup(re.sub(r"\s*\n\s*", " ", re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)))
