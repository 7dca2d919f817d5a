"""Pictures on the page: the sets and clusters that the draw stage chose, each image with its number."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from clip_cid.figures.pictures import Thumbnail, Thumbnails

_FOLD_BEYOND = 12
_CAPTION_CHARACTERS = 300  # a web caption can be a whole article


@dataclass(frozen=True)
class Picture:
    """One image: what it shows, the number under it, and the thumbnail (None where there is none)."""

    caption: str
    note: str
    thumbnail: Thumbnail | None
    kept: bool = False


@dataclass(frozen=True)
class Gallery:
    """One set or cluster; `folded` opens on a click, `more` are not on the page."""

    stratum: str
    heading: str
    size: int
    span: tuple[float, float]
    """Least and greatest number under its images."""
    widest: float | None
    pictures: Sequence[Picture]
    folded: Sequence[Picture]
    more: int


def rows_by_key(path: Path) -> dict[str, int]:
    """Key -> store row of every image in a table of sets or clusters."""
    return {line["key"]: int(line["row"]) for line in _lines(path)}


def removed_sets(path: Path, thumbnails: Thumbnails) -> list[Gallery]:
    """The sets of `removed_sets.csv`, the kept image first."""
    found = []
    for _, lines in groupby(_lines(path), key=lambda line: line["set"]):
        members = list(lines)
        pictures = [
            _picture(line, "kept" if line["place"] == "0" else f"{float(line['distance']):.3f}", thumbnails)
            for line in members
        ]
        distances = [float(line["distance"]) for line in members[1:]]
        found.append(_gallery(members, pictures, f"{int(members[0]['size']):,} images", distances))
    return found


def clusters(path: Path, thumbnails: Thumbnails) -> list[Gallery]:
    """The clusters of `clusters.csv`, images nearest the center first."""
    found = []
    for _, lines in groupby(_lines(path), key=lambda line: line["cluster"]):
        members = list(lines)
        pictures = [_picture(line, f"{float(line['cosine']):.3f}", thumbnails) for line in members]
        heading = f"cluster {int(members[0]['cluster']):,}"
        found.append(_gallery(members, pictures, heading, [float(line["cosine"]) for line in members]))
    return found


def sample(captions: Mapping[str, str], thumbnails: Thumbnails) -> list[Picture]:
    """Some pairs, with their captions in full view."""
    return [_picture({"key": key, "caption": caption}, short(caption), thumbnails) for key, caption in captions.items()]


def short(caption: str) -> str:
    """A caption cut to a length that a page can bear."""
    return caption if len(caption) <= _CAPTION_CHARACTERS else caption[: _CAPTION_CHARACTERS - 1] + "…"


def _gallery(
    members: Sequence[Mapping[str, str]], pictures: Sequence[Picture], heading: str, numbers: Sequence[float]
) -> Gallery:
    size = int(members[0]["size"])
    first = _FOLD_BEYOND if len(pictures) > _FOLD_BEYOND else len(pictures)
    return Gallery(
        stratum=members[0]["stratum"],
        heading=heading,
        size=size,
        span=(min(numbers), max(numbers)),
        widest=float(members[0]["widest_pair"]) if "widest_pair" in members[0] else None,
        pictures=pictures[:first],
        folded=pictures[first:],
        more=size - len(pictures),
    )


def _picture(line: Mapping[str, str], note: str, thumbnails: Thumbnails) -> Picture:
    caption = short(line["caption"]) or line["key"]
    return Picture(caption, note, thumbnails.get(line["key"]), kept=note == "kept")


def _lines(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as handle:
        yield from csv.DictReader(handle)
