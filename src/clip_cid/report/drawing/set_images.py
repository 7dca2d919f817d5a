"""Images of a labelled set, cut and scaled as a model sees them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.sets.evaluation_sets import EvaluationSet
from clip_cid.models.clip import Clip


@dataclass(frozen=True)
class LabelledImage:
    """One image of a set's test split."""

    row: int
    label: int
    image: Image.Image


def choose(labelled: EvaluationSet, *, classes: int, each: int, seed: int) -> list[list[LabelledImage]]:
    """Up to `each` images of up to `classes` classes, at random; images that cannot be decoded are skipped."""
    test = labelled.split("test")
    random = np.random.default_rng(seed)
    by_class: list[list[LabelledImage]] = []
    for label in random.permutation(len(labelled.class_names)).tolist():
        own: list[LabelledImage] = []
        for row in random.permutation(np.flatnonzero(test.labels == label)).tolist():
            if len(own) == each:
                break
            try:
                own.append(LabelledImage(row, label, test.load(row)))
            except BadSample:
                continue
        if own:
            by_class.append(own)
        if len(by_class) == classes:
            break
    return by_class


def pixels(clip: Clip, images: list[LabelledImage]) -> Float[Tensor, "images 3 height width"]:
    """What the model is given."""
    return torch.stack([clip.preprocess(one.image) for one in images])


def as_seen(clip: Clip, given: Float[Tensor, "3 height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """The picture that `pixels` holds: cut and scaled as the model sees it."""
    mean, std = (torch.tensor(clip.preprocess_cfg[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    return (255 * (given * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
