"""Fig. 2a/2b and the appendix's clusters: rows of pictures with a number under each."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip_cid.figures import style
from clip_cid.run_folder import atomic_file

_SIDE, _GAP, _NOTE, _LABEL, _FRAME = 96, 8, 18, 26, 4
_ACROSS, _APART = 10, 24


@dataclass(frozen=True)
class Strip:
    """A line of pictures (as keys) under a label; the ones at the places `framed` are kept images."""

    label: str
    keys: Sequence[str]
    notes: Sequence[str]
    framed: Collection[int] = ()
    gap: int | None = None
    """Set apart the pictures from this place on."""


def draw(strips: Sequence[Strip], picture: Callable[[str], Image.Image | None], path: Path) -> dict[str, int]:
    """Write a PNG of the strips, ten pictures across; a picture that cannot be read is an empty square."""
    fonts = [ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size) for size in (13, 11)]
    height = _LABEL + _SIDE + _NOTE + _GAP
    apart = _APART if any(strip.gap is not None for strip in strips) else 0
    sheet = Image.new("RGB", (_GAP + _ACROSS * (_SIDE + _GAP) + apart, _GAP + height * len(strips)), style.PAPER)
    canvas = ImageDraw.Draw(sheet)
    missing = 0
    for index, strip in enumerate(strips):
        top = _GAP + index * height
        canvas.text((_GAP, top), strip.label, fill=style.INK, font=fonts[0])
        for place, (key, note) in enumerate(list(zip(strip.keys, strip.notes, strict=True))[:_ACROSS]):
            left, middle = _GAP + place * (_SIDE + _GAP), top + _LABEL - 6
            left += _APART if strip.gap is not None and place >= strip.gap else 0
            image = picture(key)
            missing += image is None
            _paste(sheet, canvas, image, left, middle, framed=place in strip.framed)
            canvas.text((left, middle + _SIDE + 2), note, fill=style.MUTED, font=fonts[1])
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return {"strips": len(strips), "missing_pictures": missing}


def _paste(
    sheet: Image.Image, canvas: ImageDraw.ImageDraw, image: Image.Image | None, left: int, top: int, *, framed: bool
) -> None:
    box = (left, top, left + _SIDE - 1, top + _SIDE - 1)
    if image is None:
        canvas.rectangle(box, outline=style.GRID)
    else:
        small = ImageOps.contain(image, (_SIDE, _SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
    if framed:
        canvas.rectangle(box, outline=style.GREEN, width=_FRAME)
