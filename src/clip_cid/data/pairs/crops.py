"""The crops of an image that the teacher embeds beside it, and that the student sees again.

A crop is a pure function of the image's key, its size and the number of the view: whoever has the image makes
the same crop of it, in any process and at any time. Nothing of a crop is stored but its embedding.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from clip_cid.recipe import EmbedConfig

LAW = 1
"""Raise it when the same key, size and view would give another crop."""
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10


class Box(NamedTuple):
    """A part of an image in pixels, right and lower edge excluded."""

    left: int
    upper: int
    right: int
    lower: int


@dataclass(frozen=True)
class Views:
    """What decides the crops of all images, beside their keys and sizes."""

    count: int
    """Crops of each image, at least one."""
    crop_scale: float
    """The smallest share of the area."""
    law: int = LAW
    """Of the version that wrote the embeddings."""

    def __str__(self) -> str:
        law = "" if self.law == LAW else f" by law {self.law}"
        return f"{self.count:,} of {self.crop_scale:g} to 1 of the area{law}"

    def crop(self, image: Image.Image, key: str, number: int) -> Image.Image:
        """View `number` of an image."""
        return image.crop(crop_box(key, number, image.size, crop_scale=self.crop_scale))


def views_of(settings: EmbedConfig) -> Views | None:
    """The views that a recipe asks for; None without any."""
    return Views(settings.views, settings.view_crop_scale) if settings.views else None


def crop_box(key: str, number: int, size: tuple[int, int], *, crop_scale: float) -> Box:
    """The crop of one view; `view_crop` in docs/method.md.

    torchvision's law of `RandomResizedCrop`, drawn from a hash: a share of the area in [`crop_scale`, 1], an aspect in
    [3/4, 4/3] (its logarithm is uniform), a place. Ten attempts may reach beyond the image; then it is the largest
    crop in the middle whose aspect is in these limits.

    Args:
        key: Of the image.
        number: Of the view.
        size: Width and height of the decoded image.
        crop_scale: The smallest share of the area.
    """
    width, height = size
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for attempt in range(_TRIES):
        area, aspect, across, down = _draws(key, number, attempt)
        pixels = (crop_scale + (1 - crop_scale) * area) * width * height
        ratio = math.exp(low + (high - low) * aspect)
        wide, tall = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return _placed(int(across * (width - wide + 1)), int(down * (height - tall + 1)), wide, tall)

    wide, tall = min(width, round(height * _ASPECTS[1])), min(height, round(width / _ASPECTS[0]))
    return _placed((width - wide) // 2, (height - tall) // 2, wide, tall)


def _draws(key: str, number: int, attempt: int) -> list[float]:
    """Four numbers in [0, 1)."""
    digest = hashlib.blake2b(f"{number} {attempt} {key}".encode(), digest_size=32).digest()
    return [(int.from_bytes(digest[at : at + 8]) >> 11) / 2**53 for at in range(0, 32, 8)]


def _placed(left: int, upper: int, wide: int, tall: int) -> Box:
    return Box(left, upper, left + wide, upper + tall)
