"""The labelled sets of the embedded sample: the classes, and a random scene of a class."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from clip_cid.data.sample.captions import BACKGROUND_PHRASES
from clip_cid.data.sample.scenes import BACKGROUNDS, COLORS, OBJECTS, TEXTURES, Scene, Thing


@dataclass(frozen=True)
class LabelledSet:
    """Class names, prompts with `{c}`, and how to draw a scene of a class."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    largest: int
    """Images of a class in each split, at most."""
    scene: Callable[[int, random.Random], Scene]


def _any_scene(rng: random.Random, *, background: str | None = None, **fixed: str) -> Scene:
    """A scene with one thing, every attribute that is not fixed equally likely."""
    thing = {"object": rng.choice(OBJECTS), "color": rng.choice(COLORS), "texture": rng.choice(TEXTURES), **fixed}
    return Scene(background or rng.choice(BACKGROUNDS), Thing(**thing))


def _object(label: int, rng: random.Random) -> Scene:
    return _any_scene(rng, object=OBJECTS[label])


def _color(label: int, rng: random.Random) -> Scene:
    return _any_scene(rng, color=COLORS[label])


def _place(label: int, rng: random.Random) -> Scene:
    return _any_scene(rng, background=BACKGROUNDS[label])


LABELLED_SETS: dict[str, LabelledSet] = {
    "objects": LabelledSet(OBJECTS, ("a {c}", "one {c}", "a picture of a {c}", "a drawing of one {c}"), 20, _object),
    "colors": LabelledSet(COLORS, ("a {c} ball", "a {c} house", "a {c} car", "one {c} fish", "a {c} star"), 30, _color),
    "scenes": LabelledSet(
        tuple(BACKGROUND_PHRASES[name][0] for name in BACKGROUNDS),
        ("a picture {c}", "a ball {c}", "a house {c}", "{c}, a car"),
        30,
        _place,
    ),
}
