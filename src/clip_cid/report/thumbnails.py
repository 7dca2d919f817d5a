"""Small pictures for a page, as `data:` addresses that hold the picture."""

import base64
import io
from dataclasses import dataclass

from markupsafe import Markup
from PIL import Image

from clip_cid.data.pairs.pictures import Pictures

_WEBP_QUALITY = 70


@dataclass(frozen=True)
class Thumbnail:
    """A small picture ready for the page: a `data:` address and its size in pixels."""

    src: Markup
    width: int
    height: int


class Thumbnails:
    """Small pictures for one page, each made once, until the page's budget of bytes is spent."""

    def __init__(self, pictures: Pictures | None, *, side: int, budget: int) -> None:
        self._pictures, self._side, self._left = pictures, side, budget
        self._made: dict[str, Thumbnail | None] = {}
        self.over_budget = 0
        self.unreadable = 0

    @property
    def bytes_used(self) -> int:
        """Bytes of all addresses in the page."""
        return sum(len(made.src) for made in self._made.values() if made)

    def get(self, key: str) -> Thumbnail | None:
        """The thumbnail; None if there is no picture or no room for it, which is counted."""
        if self._pictures is None:
            return None
        if key not in self._made:
            self._made[key] = self._make(self._pictures, key)
        return self._made[key]

    def _make(self, pictures: Pictures, key: str) -> Thumbnail | None:
        if self._left <= 0:
            self.over_budget += 1
            return None
        image = pictures.get(key)
        if image is None:
            self.unreadable += 1
            return None
        made = thumbnail(image, self._side)
        self._left -= len(made.src)
        if self._left < 0:
            self.over_budget += 1
            return None
        return made


def thumbnail(image: Image.Image, side: int) -> Thumbnail:
    """The image as WebP in base64, its long side at most `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="WEBP", quality=_WEBP_QUALITY, method=6)
    source = Markup("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode())
    return Thumbnail(source, small.width, small.height)
