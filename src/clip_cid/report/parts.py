"""The parts that pages share: their pictures, the sets and clusters they show, their figures."""

import contextlib
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_cid.data.pairs.pictures import NoPicturesError, Pictures, open_pictures
from clip_cid.models.public_names import PublicWords
from clip_cid.new_folder import drop_left
from clip_cid.recipe import Recipe
from clip_cid.report import galleries, page
from clip_cid.report.drawing.figure import Figure
from clip_cid.report.thumbnails import Thumbnails
from clip_cid.run_folder import RunFolder, own_mark

WITH_PICTURES = ("removed_sets", "removed_pairs", "clusters")
"""Tables of the draw stage that hold keys and captions."""
_THUMBNAIL_BUDGET = 3_000_000  # bytes of base64: some 1,300 thumbnails of 96 pixels


@dataclass(frozen=True)
class PagePictures:
    """The pictures of a page."""

    thumbnails: Thumbnails
    opened: Pictures | None
    missing: str | None
    """Why there are none, if there are none."""


@contextlib.contextmanager
def place_to_draw(path: Path) -> Generator[Path]:
    """A folder beside the page `path` while the block lasts; those of killed processes are removed."""
    drop_left(path)
    drawn = path.with_name(f".{path.name}.part-{own_mark()}")
    drawn.mkdir()
    try:
        yield drawn
    finally:
        shutil.rmtree(drawn, ignore_errors=True)


def page_pictures(folder: RunFolder, drawn: Path, recipe: Recipe) -> PagePictures:
    """The pictures that the tables in `drawn` name."""
    if not recipe.report.images:
        return PagePictures(Thumbnails(None, side=0, budget=0), None, "report.images is off")
    tables = [path for name in WITH_PICTURES if (path := drawn / f"{name}.csv").is_file()]
    wanted = {key: row for path in tables for key, row in galleries.rows_by_key(path).items()}
    try:
        pictures = open_pictures(folder, recipe, wanted)
    except NoPicturesError as reason:
        return PagePictures(Thumbnails(None, side=0, budget=0), None, str(reason))
    thumbnails = Thumbnails(pictures, side=recipe.report.thumbnail_px, budget=_THUMBNAIL_BUDGET)
    return PagePictures(thumbnails, pictures, None)


def by_stratum(
    read: Callable[[Path, Thumbnails], list[galleries.Gallery]], path: Path, thumbnails: Thumbnails
) -> dict[str, list[galleries.Gallery]]:
    """Stratum -> its sets or clusters; empty if none were chosen."""
    strata: dict[str, list[galleries.Gallery]] = {}
    for gallery in read(path, thumbnails) if path.is_file() else []:
        strata.setdefault(gallery.stratum, []).append(gallery)
    return strata


def place_figures(
    figures: Iterable[Figure], drawn: Path, numbers: Mapping[str, Any], words: PublicWords, *, images: bool
) -> dict[str, page.Placed]:
    """Name -> figure, of those that were drawn and may be shown."""
    placed: dict[str, page.Placed] = {}
    for figure in figures:
        if figure.name not in numbers or (figure.of_data and not images):
            continue
        own = numbers[figure.name]
        files = {figure.name: (figure.description, figure.caption_for(own))} if figure.section else {}
        if figure.small_description:
            files[f"{figure.name}_small"] = (figure.small_description, figure.small_caption)
        for name, (description, caption) in files.items():
            svg = page.inline_svg(drawn / f"{name}.svg", description, words)
            section = figure.section if name == figure.name else "head"
            placed[name] = page.Placed(svg, caption, section, figure.of_data)
    return placed
