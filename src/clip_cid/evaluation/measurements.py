"""The measurements of every model: each labelled set and each set of pairs, by each protocol."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from clip_cid import log
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.data.sets.evaluation_sets import EvaluationSet
from clip_cid.data.sets.labelled_images import LabelledImages
from clip_cid.evaluation.features import Encoder
from clip_cid.evaluation.measure import (
    Measured,
    imagenet_classes,
    measure_knn,
    measure_linear_probe,
    measure_retrieval,
    measure_zero_shot,
    prompts_of,
    short_digest,
)
from clip_cid.evaluation.protocols import KNN, LINEAR_PROBE, RETRIEVAL, ZERO_SHOT
from clip_cid.recipe import EvaluateConfig, MachineConfig

METHOD = 3
"""Raised when the same features would give other results."""


@dataclass(frozen=True)
class PairSet:
    """Image-text pairs as an `ImageSource`."""

    title: str
    pairs: Pairs
    max_pixels: int

    @property
    def name_of_set(self) -> str:
        """As the recipe has it."""
        return self.title.removesuffix("/pairs")

    @property
    def fingerprint(self) -> str:
        """A digest of every image and caption, in order: of what is read, in whatever files it lies."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(f"at most {self.max_pixels} pixels".encode())
        with log.progress(f"reading {self.title}", len(self), unit="pairs") as bar:
            for row in range(len(self)):
                digest.update(json.dumps(self._content(row)).encode())
                bar.advance()
        return digest.hexdigest()

    def _content(self, row: int) -> list[str]:
        try:
            pair = self.pairs.read(row)
        except BadSample as error:
            return [str(error)]
        return [hashlib.sha256(pair.image).hexdigest(), *pair.captions]

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, row: int) -> str:
        return self.pairs.key(row)

    def load(self, row: int) -> Image.Image:
        return decode_image(self.pairs.read(row).image, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class Measurement:
    """One set measured by one protocol, for any model."""

    set: str
    task: str
    """The protocol's name."""
    depends: dict[str, Any]
    """All that its result depends on besides the model."""
    measure: Callable[[Encoder], Measured]

    def key(self, encoder: Encoder) -> str:
        """Equal keys, equal results: covers the weights, the images, the prompts and the settings."""
        parts = [METHOD, self.set, self.task, self.depends, encoder.identity]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def measurements_of(
    labelled: EvaluationSet, settings: EvaluateConfig, machine: MachineConfig, *, imagenet: EvaluationSet | None
) -> Iterator[Measurement]:
    """The measurements that the recipe names and this set allows.

    Args:
        labelled: The set.
        settings: Of the recipe.
        machine: Of the recipe.
        imagenet: Where it is evaluated too: measured on the classes of a shifted ImageNet.
    """
    prints = {name: _fingerprint(split) for name, split in labelled.splits.items()}
    common = {"metric": labelled.metric, "seed": settings.seed, "classes": labelled.class_names}

    if settings.zero_shot:
        beside = imagenet if imagenet_classes(labelled) is not None else None
        depends = {**common, "test": prints["test"], "prompts": prompts_of(labelled)}
        if beside is not None:
            depends |= {"imagenet": _fingerprint(beside.split("test")), "imagenet_prompts": prompts_of(beside)}
        measure = functools.partial(measure_zero_shot, labelled, beside, settings)
        yield Measurement(labelled.name, ZERO_SHOT, depends, measure)

    if "train" not in labelled.splits:
        return
    depends = {**common, "splits": prints, "features": settings.features}
    if settings.linear_probe:
        folds = None if labelled.folds is None else [short_digest(rows.tolist()) for rows in labelled.folds]
        measure = functools.partial(measure_linear_probe, labelled, settings, machine)
        yield Measurement(labelled.name, LINEAR_PROBE, {**depends, "folds": folds}, measure)
    if settings.knn:
        yield Measurement(labelled.name, KNN, depends, functools.partial(measure_knn, labelled, settings))


def retrieval_measurement(source: PairSet, *, seed: int) -> Measurement:
    """Recall at 1, 5 and 10, both ways."""
    name = source.name_of_set
    depends = {"pairs": source.fingerprint, "seed": seed}
    return Measurement(
        name, RETRIEVAL, depends, functools.partial(measure_retrieval, name, source, source.pairs, seed=seed)
    )


def _fingerprint(split: LabelledImages) -> list[str]:
    """A digest of the images, and of the labels as they were read."""
    return [split.fingerprint, hashlib.sha256(split.labels.tobytes()).hexdigest()[:16]]
