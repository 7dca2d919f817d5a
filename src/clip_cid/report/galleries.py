"""Pictures on the page: the sets and clusters that the draw stage chose, each image with its number."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from clip_cid.figures import style
from clip_cid.report.drawing.removed_sets import distance_note
from clip_cid.report.thumbnails import Thumbnail, Thumbnails

_FOLD_BEYOND = 12
_CAPTION_CHARACTERS = 300  # a web caption can be a whole article


@dataclass(frozen=True)
class Picture:
    """One image: what it shows, the number under it, and the thumbnail (None if there is none)."""

    caption: str
    note: str
    thumbnail: Thumbnail | None
    kept: bool = False
    apart: bool = False
    """Whether images between it and the one before it are left out."""


@dataclass(frozen=True)
class Example:
    """A kept image and one removed for it, one of `of` pairs that were drawn."""

    kept: Picture
    removed: Picture
    of: int


@dataclass(frozen=True)
class SetFacts:
    """The distances within a set of duplicates."""

    farthest: float
    """From the kept image."""
    widest: float
    widest_exact: bool
    weakest_link: float
    component_size: int


@dataclass(frozen=True)
class Gallery:
    """One set or cluster; `folded` opens on a click, `more` are not on the page."""

    stratum: str
    heading: str
    size: int
    span: tuple[float, float]
    """Least and greatest number under its images."""
    facts: SetFacts | None
    """Of a set; a cluster has none."""
    common: tuple[str, float] | None
    """The most frequent class of a cluster and its share, if classes are known."""
    pictures: Sequence[Picture]
    folded: Sequence[Picture]
    more: int


def rows_by_key(path: Path) -> dict[str, int]:
    """Key -> store row of every image in a table of sets or clusters."""
    return {line["key"]: int(line["row"]) for line in _lines(path)}


def removed_sets(path: Path, thumbnails: Thumbnails) -> list[Gallery]:
    """The sets of `removed_sets.csv`, the kept image first."""
    galleries = []
    for _, lines in groupby(_lines(path), key=lambda line: line["set"]):
        members = list(lines)
        pictures = [_picture(line, "kept" if line["place"] == "0" else _distance(line), thumbnails) for line in members]
        distances = [float(line["distance"]) for line in members[1:]]
        galleries.append(_gallery(members, pictures, f"{int(members[0]['size']):,} images", distances))
    return galleries


def removed_pairs(path: Path, thumbnails: Thumbnails) -> dict[str, list[Picture]]:
    """Kind -> kept and removed images of `removed_pairs.csv` in turn, the nearest pair first."""
    pictures_of_kind: dict[str, list[Picture]] = {}
    for place, line in enumerate(_lines(path) if path.is_file() else ()):
        words = f"{float(line['distance']):.3f}" if place % 2 else "kept"  # the heading says the kind
        pictures_of_kind.setdefault(line["kind"], []).append(_picture(line, words, thumbnails))
    return pictures_of_kind


def typical_pairs(pairs: Mapping[str, Sequence[Picture]]) -> dict[str, Example]:
    """The median pair of each kind: the nearest would show the balance too good, the farthest too bad."""
    return {
        kind: Example(*pictures[2 * ((len(pictures) // 2 - 1) // 2) :][:2], of=len(pictures) // 2)
        for kind, pictures in pairs.items()
    }


def clusters(path: Path, thumbnails: Thumbnails) -> list[Gallery]:
    """The clusters of `clusters.csv`, images nearest the center first, those farthest from it set apart."""
    galleries = []
    for _, lines in groupby(_lines(path), key=lambda line: line["cluster"]):
        members = list(lines)
        places = [int(line["place"]) for line in members]
        pictures = [
            replace(_picture(line, f"{float(line['cosine']):.3f}", thumbnails), apart=place > before + 1)
            for line, place, before in zip(members, places, [-1, *places], strict=False)
        ]
        heading = f"cluster {int(members[0]['cluster']):,}"
        cosines = [float(line["cosine"]) for line in members]
        common = (short(members[0]["class"]), float(members[0]["class_share"])) if members[0]["class"] else None
        galleries.append(_gallery(members, pictures, heading, cosines, common))
    return galleries


def sample(captions: Mapping[str, str], thumbnails: Thumbnails) -> list[Picture]:
    """Some pairs, with their captions in full view."""
    return [_picture({"key": key, "caption": caption}, short(caption), thumbnails) for key, caption in captions.items()]


def short(caption: str) -> str:
    """A caption cut to a length that a page can bear."""
    return caption if len(caption) <= _CAPTION_CHARACTERS else caption[: _CAPTION_CHARACTERS - 1] + "…"


def _gallery(
    members: Sequence[Mapping[str, str]],
    pictures: Sequence[Picture],
    heading: str,
    numbers: Sequence[float],
    common: tuple[str, float] | None = None,
) -> Gallery:
    size = int(members[0]["size"])
    first = _FOLD_BEYOND if len(pictures) > _FOLD_BEYOND else len(pictures)
    return Gallery(
        stratum=members[0]["stratum"],
        heading=heading,
        size=size,
        span=(min(numbers), max(numbers)),
        facts=_facts(members[0]) if "weakest_link" in members[0] else None,
        common=common,
        pictures=pictures[:first],
        folded=pictures[first:],
        more=size - len(pictures),
    )


def _distance(line: Mapping[str, str]) -> str:
    return distance_note(float(line["distance"]), line["kind"])


def _facts(line: Mapping[str, str]) -> SetFacts:
    return SetFacts(
        farthest=float(line["farthest"]),
        widest=float(line["widest_pair"]),
        widest_exact=line["widest_exact"] == "True",
        weakest_link=float(line["weakest_link"]),
        component_size=int(line["component_size"]),
    )


def _picture(line: Mapping[str, str], note: str, thumbnails: Thumbnails) -> Picture:
    caption = short(line["caption"]) or line["key"]
    return Picture(caption, note, thumbnails.get(line["key"]), kept=note == "kept")


def _lines(path: Path) -> Iterator[dict[str, str]]:
    columns = style.read_csv(path)
    for cells in zip(*columns.values(), strict=True):
        yield dict(zip(columns, cells, strict=True))
