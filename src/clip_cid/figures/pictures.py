"""Pictures of the data, read back from the pairs by row and key."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clip_cid.data import images
from clip_cid.data.pairs import BadSample, Pairs

_SCAN_ROWS = 100_000
_WEBP_QUALITY = 70


class Pictures:
    """The images of some rows of an embedding store, found in the pairs.

    Where the store was made from these pairs a row is a row; where it was made elsewhere the key decides.
    """

    def __init__(self, pairs: Pairs, wanted: Mapping[str, int], *, max_pixels: int) -> None:
        """Find the `wanted` pictures, given as key -> row of the store."""
        self.pairs, self._max_pixels = pairs, max_pixels
        self._rows = {key: row for key, row in wanted.items() if row < len(pairs) and pairs.key(row) == key}
        moved = wanted.keys() - self._rows.keys()
        for start in range(0, len(pairs), _SCAN_ROWS):
            if not moved:
                break
            keys = pairs.keys(start, min(start + _SCAN_ROWS, len(pairs)))
            found = {key: row for row, key in enumerate(keys, start=start) if key in moved}
            self._rows |= found
            moved -= found.keys()

    def get(self, key: str) -> Image.Image | None:
        """The decoded image; None where the pairs do not have it, or it cannot be read (any more)."""
        if key not in self._rows:
            return None
        try:
            return images.decode_image(self.pairs.read(self._rows[key]).image, max_pixels=self._max_pixels)
        except BadSample:
            return None

    def sample(self, count: int, *, seed: int) -> dict[str, str]:
        """Key -> first caption of some pairs drawn at random; broken ones are passed over."""
        order = np.random.default_rng(seed).choice(len(self.pairs), size=min(2 * count, len(self.pairs)), replace=False)
        found: dict[str, str] = {}
        for row in order.tolist():
            if len(found) == count:
                break
            try:
                pair = self.pairs.read(row)
            except BadSample:
                continue
            found[pair.key] = pair.captions[0]
            self._rows[pair.key] = row
        return found


@dataclass(frozen=True)
class Thumbnail:
    """A small picture ready for the page: a `data:` address and its size in pixels."""

    src: str
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
        """What all the addresses weigh in the page."""
        return sum(len(made.src) for made in self._made.values() if made)

    def get(self, key: str) -> Thumbnail | None:
        """The thumbnail; None where there is no picture or no room for it, which is counted."""
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
    return Thumbnail("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), small.width, small.height)
