"""A look at some of the pairs: what the student will see of their captions and images."""

from dataclasses import dataclass

import numpy as np

from clip_cid.data.pairs.images import image_size
from clip_cid.data.pairs.pair import BadSample
from clip_cid.models.clip import Clip, count_truncated
from clip_cid.training.batches import TrainingPairs

_LOOKED_AT = 500


@dataclass(frozen=True)
class Sights:
    """What the inspected pairs hold."""

    pairs: int
    """Looked at."""
    unreadable: int
    captions: int
    without_caption: int
    """Images, where a caption is optional."""
    truncated: int
    """Captions that are longer than the student's context."""
    sides: tuple[int, int, int]
    """The short side of the images in pixels: the least, the median, the most; zeros if none could be read."""
    smaller: int
    """Images with a side shorter than the student's images: they are enlarged."""
    kilobytes: float
    """Of an encoded image, on average."""


def look_at(training: TrainingPairs, clip: Clip, *, max_pixels: int) -> Sights:
    """Read pairs at equal steps through the data.

    Raises:
        DataError: The files changed or went away after they were indexed.
    """
    chosen = np.unique(np.linspace(0, len(training) - 1, min(_LOOKED_AT, len(training))).astype(np.int64))
    captions: list[str] = []
    sides: list[int] = []
    sizes: list[int] = []
    unreadable = without_caption = 0

    for row in training.rows[chosen].tolist():
        try:
            pair = training.pairs.read(row)
            sides.append(min(image_size(pair.image, max_pixels=max_pixels)))
        except BadSample:
            unreadable += 1
            continue
        captions += pair.captions
        without_caption += not pair.captions
        sizes.append(len(pair.image))

    return Sights(
        pairs=len(chosen),
        unreadable=unreadable,
        captions=len(captions),
        without_caption=without_caption,
        truncated=count_truncated(clip, captions),
        sides=(min(sides), int(np.median(sides)), max(sides)) if sides else (0, 0, 0),
        smaller=sum(side < clip.image_side for side in sides),
        kilobytes=float(np.mean(sizes)) / 1e3 if sizes else 0.0,
    )
