"""The contents of the embedded sample's pictures: objects, relations and backgrounds, and how frequent they are."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

# Most frequent first: draws follow Zipf's law down each list.
OBJECTS = (
    "ball", "house", "car", "tree", "fish", "star", "cat", "flower", "boat", "heart", "umbrella", "balloon",
)  # fmt: skip
COLORS = ("red", "blue", "yellow", "green", "orange", "purple", "pink", "black")
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("meadow", "beach", "night", "snow", "room", "sea", "sunset", "city")
RELATIONS = ("left", "above")

_LAYOUTS, _LAYOUT_WEIGHTS = ("single", "group", "pair"), (0.6, 0.2, 0.2)
_TRIES = 50


@dataclass(frozen=True)
class Thing:
    """An object of one color and texture."""

    object: str
    color: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """The meaning of a picture; two pictures of one scene are semantic duplicates.

    `count` copies of `thing`; or one, with an `other` thing that it is to the "left" of or "above".
    """

    background: str
    thing: Thing
    count: int = 1
    relation: str = ""
    other: Thing | None = None

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.thing,) if self.other is None else (self.thing, self.other)


class _Zipf:
    """Names, the k-th of them as frequent as k to the power of minus `exponent`."""

    def __init__(self, names: Sequence[str], exponent: float) -> None:
        self._names = names
        self._cumulative = list(itertools.accumulate(rank**-exponent for rank in range(1, len(names) + 1)))

    def draw(self, rng: random.Random) -> str:
        return rng.choices(self._names, cum_weights=self._cumulative)[0]


_OBJECT_MIX, _COLOR_MIX = _Zipf(OBJECTS, 0.5), _Zipf(COLORS, 0.3)
_TEXTURE_MIX, _BACKGROUND_MIX = _Zipf(TEXTURES, 1.0), _Zipf(BACKGROUNDS, 0.3)


def draw_thing(rng: random.Random, *, object: str | None = None) -> Thing:
    """A thing from the long-tailed mix, its object given or not."""
    return Thing(object or _OBJECT_MIX.draw(rng), _COLOR_MIX.draw(rng), _TEXTURE_MIX.draw(rng))


def draw_scene(rng: random.Random, *, object: str | None = None) -> Scene:
    """A scene from the long-tailed mix, its main object given or not."""
    background, thing = _BACKGROUND_MIX.draw(rng), draw_thing(rng, object=object)
    layout = rng.choices(_LAYOUTS, _LAYOUT_WEIGHTS)[0]
    if layout == "group":
        return Scene(background, thing, count=rng.randint(2, 5))
    if layout == "single":
        return Scene(background, thing)
    other = draw_thing(rng)
    while other.object == thing.object:
        other = draw_thing(rng)
    return Scene(background, thing, relation=rng.choice(RELATIONS), other=other)


class SceneBook:
    """Hands out scenes that differ from all earlier ones in at least two attributes.

    So it is certain which pictures are duplicates: two pictures show one scene, or they differ in two or
    more of background, count, relation, objects, colors and textures.
    """

    def __init__(self) -> None:
        self._taken: set[tuple[object, ...]] = set()
        self._scenes: set[Scene] = set()

    def __contains__(self, scene: Scene) -> bool:
        return scene in self._scenes

    def new(self, rng: random.Random) -> Scene:
        """A new scene. Its main object is drawn once and kept, so that rejected draws do not flatten the tail."""
        scene = draw_scene(rng)
        wanted = scene.thing.object
        for _ in range(_TRIES):
            if self.add(scene):
                return scene
            scene = draw_scene(rng, object=wanted)
        raise ValueError(f"pairs: after {len(self._scenes):,} there is no room for another scene with a {wanted}")

    def add(self, scene: Scene) -> bool:
        """Take this scene if it is far enough from all others; says whether it was."""
        masks = list(_masks(scene))
        if not self._taken.isdisjoint(masks):
            return False
        self._taken.update(masks)
        self._scenes.add(scene)
        return True


def _masks(scene: Scene) -> Iterator[tuple[object, ...]]:
    """The scene with each attribute hidden in turn, and with relation and textures hidden together."""
    things = [part for thing in scene.things for part in astuple(thing)]
    attributes = (scene.background, scene.count, scene.relation, *things)
    for hidden in range(len(attributes)):
        yield (*attributes[:hidden], None, *attributes[hidden + 1 :])
    bare = sorted((thing.object, thing.color) for thing in scene.things)
    yield (scene.background, scene.count, *bare)
