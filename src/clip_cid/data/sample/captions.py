"""Captions for the pictures of the embedded sample: templates with synonyms."""

import random

from clip_cid.data.sample.scenes import Scene, Thing

# The usual word first; it is taken most of the time.
OBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "house": ("house", "cottage"),
    "car": ("car", "automobile"),
    "cat": ("cat", "kitten"),
    "flower": ("flower", "blossom"),
    "boat": ("boat", "sailboat"),
}
COLOR_WORDS: dict[str, tuple[str, ...]] = {"red": ("red", "scarlet"), "purple": ("purple", "violet")}
TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("",),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
}
_TEXTURE_NOUNS = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on the grass", "on a lawn"),
    "beach": ("on the beach", "on the sand", "at the seaside"),
    "night": ("at night", "under the stars", "on a starry night"),
    "snow": ("in the snow", "on a snowy day", "in winter"),
    "room": ("in a room", "on a wooden floor", "indoors"),
    "sunset": ("at sunset", "in the evening sun", "at dusk"),
    "sea": ("under water", "in the deep sea", "at the bottom of the sea"),
    "city": ("in the city", "in town", "in front of tall buildings"),
}
_RELATIONS: dict[str, tuple[str, str]] = {
    "left": ("to the left of", "to the right of"),
    "above": ("above", "under"),
}
COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
_BRIEF_TEMPLATES = ("{what}", "{what}", "a picture of {what}", "a drawing of {what}", "{there} {what}")
_FULL_TEMPLATES = (
    "{what} {where}",
    "{what} {where}",
    "{where}, {what}",
    "a picture of {what} {where}",
    "{there} {what} {where}",
)
_USUAL_SHARE = 0.9
BRIEF_SHARE = 0.5
"""The share of brief captions. Only these require shapes: colors and places identify a full caption."""
_SAID_IN_FULL = 0.95


def caption(scene: Scene, rng: random.Random, *, brief_share: float = BRIEF_SHARE) -> str:
    """A random caption. This share of the captions names only the objects; the others describe the picture."""
    full = rng.random() >= brief_share
    what = _what(scene, full, rng)
    there = "there is" if scene.count == 1 else "there are"
    if full:
        where = rng.choice(BACKGROUND_PHRASES[scene.background])
        text = rng.choice(_FULL_TEMPLATES).format(what=what, where=where, there=there)
    else:
        text = rng.choice(_BRIEF_TEMPLATES).format(what=what, there=there)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.5 else text


def _what(scene: Scene, full: bool, rng: random.Random) -> str:
    if scene.other is None:
        return _noun_phrase(scene.thing, scene.count, full, rng)
    first, second = (_noun_phrase(thing, 1, full, rng) for thing in scene.things)
    forward, backward = _RELATIONS[scene.relation] if full else ("and", "and")
    return f"{first} {forward} {second}" if rng.random() < 0.5 else f"{second} {backward} {first}"


def _noun_phrase(thing: Thing, count: int, full: bool, rng: random.Random) -> str:
    """Such as "a red striped ball", "two spotted pink cups", "one blue house with checks"; brief: "a ball"."""
    noun = _word(OBJECT_WORDS.get(thing.object, (thing.object,)), rng)
    if count > 1:
        noun = plural(noun)
    if not full:
        return f"{_determiner(noun, 1, rng)} {noun}" if count == 1 else noun
    color = _word(COLOR_WORDS.get(thing.color, (thing.color,)), rng) if rng.random() < _SAID_IN_FULL else ""
    texture = _word(TEXTURE_WORDS[thing.texture], rng) if rng.random() < _SAID_IN_FULL else ""
    if texture and thing.texture in _TEXTURE_NOUNS and rng.random() < 0.2:
        words = [color, noun, "with", _TEXTURE_NOUNS[thing.texture]]
    else:
        words = [color, texture, noun] if rng.random() < 0.5 else [texture, color, noun]
    described = " ".join(word for word in words if word)
    return f"{_determiner(described, count, rng)} {described}"


def _determiner(described: str, count: int, rng: random.Random) -> str:
    if count > 1:
        return COUNT_WORDS[count]
    return "one" if rng.random() < 0.15 else ("an" if described[0] in "aeiou" else "a")


def _word(words: tuple[str, ...], rng: random.Random) -> str:
    return words[0] if len(words) == 1 or rng.random() < _USUAL_SHARE else rng.choice(words[1:])


def plural(noun: str) -> str:
    """The plural of an object's name; a few fish are fish."""
    if noun == "fish":
        return noun
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + "s"
