"""Draws the scenes of the embedded sample: flat sprites on simple backgrounds.

Sprites are drawn four times too large and reduced, which smooths their edges.

A picture is first a canvas of color numbers (one byte a pixel), so that an object costs one paste and the whole picture
one palette lookup: about half a millisecond for 64 pixels.
"""

import colorsys
import functools
import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clip_cid.data.sample.scenes import Scene, Thing
from clip_cid.data.sample.sprites import SPRITES

SIZE = 64
"""Side of a finished picture, in pixels."""
_OVERSAMPLING = 4
_CANVAS = SIZE * _OVERSAMPLING

# Layers of a sprite. A thing on the canvas owns eight color numbers, one a layer.
_EMPTY, _BODY, _PATTERN, _OUTLINE, _DARK, _LIGHT, _WOOD, _LEAF = range(8)
_LAYERS = {
    "empty": _EMPTY,
    "body": _BODY,
    "outline": _OUTLINE,
    "dark": _DARK,
    "light": _LIGHT,
    "wood": _WOOD,
    "leaf": _LEAF,
}
_FIXED = {_DARK: (44, 44, 54), _LIGHT: (250, 250, 246), _WOOD: (134, 92, 58), _LEAF: (74, 148, 78)}

# Color numbers of a background: two gradients and eight decorations; things follow.
_GRADIENT = 24
_RAMP = np.linspace(0, 1, _GRADIENT)[:, None]
_UPPER, _LOWER, _DECOR, _THINGS = 0, _GRADIENT, 2 * _GRADIENT, 64

RGB = tuple[int, int, int]
COLORS: dict[str, RGB] = {
    "red": (222, 52, 50),
    "blue": (50, 98, 220),
    "yellow": (246, 208, 48),
    "green": (60, 166, 70),
    "orange": (242, 136, 36),
    "purple": (138, 66, 186),
    "pink": (244, 142, 188),
    "black": (52, 50, 58),
    "white": (240, 240, 238),
    "brown": (140, 88, 48),
}

Draw = ImageDraw.ImageDraw
_SPRITE = 200
_MARGIN = 8
_BOARD = _SPRITE - 2 * _MARGIN


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """One drawing of a scene; position, size, tilt, hue and texture vary with `rng`, the meaning does not."""
    canvas, palette = _BACKGROUNDS[scene.background](rng)
    pixels = np.array(canvas)
    for slot, thing in enumerate(scene.things):
        base = _THINGS + 8 * slot
        palette[base : base + 8] = _thing_colors(thing, rng)
        for box in _boxes(scene, slot, rng):
            _paste(pixels, thing, base, box, rng)
    light = rng.uniform(0.94, 1.06)
    table = np.clip(palette * light, 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.putpalette(table.tobytes())
    return picture.convert("RGB").reduce(_OVERSAMPLING)


def _paste(pixels: np.ndarray, thing: Thing, base: int, box: tuple[float, float, float], rng: random.Random) -> None:
    """Put a thing on the canvas; `box` is its center and side as shares of the canvas."""
    side = round(box[2] * _CANVAS)
    left, top = (min(max(round(center * _CANVAS - side / 2), 0), _CANVAS - side) for center in box[:2])
    sprite = np.array(_tilted(_sprite(thing.object), side, rng))
    if thing.texture != "plain":
        sprite[(sprite == _BODY) & _texture(thing.texture, side, rng)] = _PATTERN
    region = pixels[top : top + side, left : left + side]
    np.copyto(region, sprite + np.uint8(base), where=sprite != _EMPTY)


def _tilted(sprite: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """The sprite at `side` pixels, tilted a little."""
    angle = math.radians(rng.uniform(-5, 5))
    across = _SPRITE / side
    cos, sin = across * math.cos(angle), across * math.sin(angle)
    middle, half = _SPRITE / 2, side / 2
    x_row = (cos, sin, middle - (cos + sin) * half)
    y_row = (-sin, cos, middle - (cos - sin) * half)
    return sprite.transform((side, side), Image.Transform.AFFINE, (*x_row, *y_row), Image.Resampling.NEAREST)


def _thing_colors(thing: Thing, rng: random.Random) -> np.ndarray:
    """The eight colors of a thing's layers, in their order."""
    red, green, blue = (value / 255 for value in COLORS[thing.color])
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    hue, lightness = (hue + rng.uniform(-0.012, 0.012)) % 1, lightness * rng.uniform(0.95, 1.05)
    body = 255 * np.array(colorsys.hls_to_rgb(hue, min(lightness, 1.0), saturation))
    bright = body @ (0.3, 0.59, 0.11) > 150
    pattern = body * 0.5 if bright else body * 0.15 + 255 * 0.85
    colors = np.zeros((8, 3))
    colors[_BODY], colors[_PATTERN], colors[_OUTLINE] = body, pattern, body * (0.6 if bright else 0.45)
    for layer, color in _FIXED.items():
        colors[layer] = color
    return colors


def _boxes(scene: Scene, slot: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Where the copies of a thing go: center x, center y and side, as shares of the canvas."""
    if scene.other is not None:
        centers, side = [_PAIR_CENTERS[scene.relation][slot]], 0.5
    elif scene.count > 1:
        centers, side = rng.choice(_GROUP_CENTERS[scene.count]), _GROUP_SIDES[scene.count]
    else:
        centers, side = [(0.5, 0.5)], 0.74
    side *= rng.uniform(0.9, 1.1)
    spread = 0.12 if len(scene.things) == scene.count == 1 else 0.03
    shift = [(rng.uniform(-spread, spread), rng.uniform(-spread, spread)) for _ in centers]
    return [(x + dx, y + dy, side) for (x, y), (dx, dy) in zip(centers, shift, strict=True)]


_PAIR_CENTERS = {"left": ((0.26, 0.54), (0.74, 0.54)), "above": ((0.5, 0.25), (0.5, 0.74))}
_GROUP_SIDES = {2: 0.49, 3: 0.47, 4: 0.46, 5: 0.38}
_GROUP_CENTERS: dict[int, list[list[tuple[float, float]]]] = {
    2: [[(0.26, 0.5), (0.74, 0.5)], [(0.28, 0.3), (0.72, 0.7)], [(0.28, 0.7), (0.72, 0.3)]],
    3: [[(0.27, 0.72), (0.73, 0.72), (0.5, 0.27)], [(0.27, 0.28), (0.73, 0.28), (0.5, 0.73)]],
    4: [[(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]],
    5: [[(0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8)]],
}


@functools.cache
def _sprite(name: str) -> Image.Image:
    """The layers of an object on a board of 200 pixels, with an outline around all of it."""
    board = Image.new("L", (_SPRITE, _SPRITE), _EMPTY)
    draw = ImageDraw.Draw(board)
    for layer, form, numbers in SPRITES[name]:
        _draw_part(draw, form, numbers, _LAYERS[layer])
    solid = board.point([0] + [255] * 255)
    grown = np.asarray(solid.filter(ImageFilter.MaxFilter(7)))
    layers = np.array(board)
    layers[(layers == _EMPTY) & (grown > 0)] = _OUTLINE
    return Image.fromarray(layers)


def _draw_part(draw: Draw, form: str, numbers: tuple[float, ...], layer: int) -> None:
    def scaled(values: tuple[float, ...]) -> list[float]:
        return [_MARGIN + value * _BOARD / 100 for value in values]

    if form == "disk":
        x, y, radius = numbers
        draw.ellipse(scaled((x - radius, y - radius, x + radius, y + radius)), fill=layer)
    elif form == "oval":
        draw.ellipse(scaled(numbers), fill=layer)
    elif form == "box":
        draw.rectangle(scaled(numbers), fill=layer)
    elif form == "pie":
        draw.pieslice(scaled(numbers[:4]), numbers[4], numbers[5], fill=layer)
    elif form == "line":
        draw.line(scaled(numbers[1:]), fill=layer, width=round(numbers[0] * _BOARD / 100), joint="curve")
    else:
        draw.polygon(scaled(numbers), fill=layer)


def _texture(name: str, side: int, rng: random.Random) -> np.ndarray:
    """Where a texture shows its second color on a square of `side` pixels: a random cut of a larger sheet."""
    sheet = _texture_sheet(name, rng.randrange(_SHEETS))
    x, y = rng.randrange(_PERIOD), rng.randrange(_PERIOD)
    return sheet[y : y + side, x : x + side]


_PERIOD = 32
_SHEETS = 6


@functools.cache
def _texture_sheet(name: str, variant: int) -> np.ndarray:
    """A texture over a canvas and one period more, in one of a few directions."""
    y, x = np.mgrid[: _CANVAS + _PERIOD, : _CANVAS + _PERIOD].astype(np.float64)
    angle = math.pi * variant / _SHEETS
    along = (x * math.cos(angle) + y * math.sin(angle)) / _PERIOD
    across = (y * math.cos(angle) - x * math.sin(angle)) / _PERIOD
    if name == "striped":
        return along % 1 < 0.5
    if name == "dotted":
        return (along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.3**2
    return (along % 1 < 0.5) ^ (across % 1 < 0.5)


# --- backgrounds: a canvas of color numbers, and the palette that goes with it ---


def _start(
    upper: tuple[RGB, RGB], lower: tuple[RGB, RGB], decor: tuple[RGB, ...], horizon: float
) -> tuple[Image.Image, np.ndarray]:
    """Two vertical gradients that meet at `horizon`, a share of the height."""
    palette = np.zeros((256, 3))
    for first, (start, end) in ((_UPPER, upper), (_LOWER, lower)):
        palette[first : first + _GRADIENT] = start + _RAMP * np.subtract(end, start)
    palette[_DECOR : _DECOR + len(decor)] = decor
    edge = round(horizon * _CANVAS)
    rows = np.empty(_CANVAS, np.uint8)
    rows[:edge] = _UPPER + np.arange(edge) * _GRADIENT // edge
    rows[edge:] = _LOWER + np.arange(_CANVAS - edge) * _GRADIENT // (_CANVAS - edge)
    return Image.fromarray(np.repeat(rows[:, None], _CANVAS, axis=1)), palette


def _scatter(
    draw: Draw, rng: random.Random, count: int, radius: tuple[float, float], top: float, bottom: float, fill: int
) -> None:
    """Small disks at random, between two heights given as shares of the canvas."""
    for _ in range(count):
        x, y, r = rng.uniform(0, _CANVAS), rng.uniform(top, bottom) * _CANVAS, rng.uniform(*radius)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _meadow(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    horizon = rng.uniform(0.4, 0.5)
    decor: tuple[RGB, ...] = ((112, 178, 84), (250, 250, 250))
    canvas, palette = _start(((120, 190, 240), (206, 232, 250)), ((140, 200, 96), (92, 160, 66)), decor, horizon)
    draw = ImageDraw.Draw(canvas)
    x = rng.uniform(0, _CANVAS)
    draw.ellipse((x - 110, horizon * _CANVAS - 22, x + 110, horizon * _CANVAS + 40), fill=_DECOR)
    _scatter(draw, rng, 14, (3, 5), horizon + 0.15, 1, _DECOR + 1)
    return canvas, palette


def _beach(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    horizon = rng.uniform(0.55, 0.65)
    decor: tuple[RGB, ...] = ((52, 150, 196), (250, 252, 252), (222, 190, 132))
    canvas, palette = _start(((150, 216, 246), (220, 242, 252)), ((244, 218, 160), (230, 196, 130)), decor, horizon)
    draw = ImageDraw.Draw(canvas)
    edge = horizon * _CANVAS
    draw.rectangle((0, edge - 50, _CANVAS, edge), fill=_DECOR)
    phase = rng.uniform(0, 6)
    foam = [(x, edge + 5 * math.sin(x / 20 + phase)) for x in range(0, _CANVAS + 8, 8)]
    draw.line(foam, fill=_DECOR + 1, width=9)
    _scatter(draw, rng, 12, (2, 4), horizon + 0.08, 1, _DECOR + 2)
    return canvas, palette


def _night(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    decor: tuple[RGB, ...] = ((252, 244, 200), (150, 160, 210))
    canvas, palette = _start(((14, 18, 52), (40, 48, 104)), ((26, 34, 46), (16, 22, 30)), decor, rng.uniform(0.8, 0.88))
    draw = ImageDraw.Draw(canvas)
    _scatter(draw, rng, 26, (2, 4.5), 0, 0.8, _DECOR)
    _scatter(draw, rng, 16, (2, 3), 0, 0.8, _DECOR + 1)
    return canvas, palette


def _snow(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    horizon = rng.uniform(0.5, 0.6)
    decor: tuple[RGB, ...] = ((255, 255, 255), (200, 214, 232))
    canvas, palette = _start(((150, 168, 192), (196, 208, 224)), ((236, 242, 250), (214, 226, 242)), decor, horizon)
    draw = ImageDraw.Draw(canvas)
    x = rng.uniform(0, _CANVAS)
    draw.ellipse((x - 130, horizon * _CANVAS - 26, x + 130, horizon * _CANVAS + 60), fill=_LOWER)
    _scatter(draw, rng, 40, (3, 6), 0, 1, _DECOR)
    return canvas, palette


def _room(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    horizon = rng.uniform(0.6, 0.7)
    decor: tuple[RGB, ...] = ((122, 82, 50), (246, 240, 226), (150, 204, 236))
    canvas, palette = _start(((216, 200, 178), (206, 188, 164)), ((176, 124, 78), (150, 102, 62)), decor, horizon)
    draw = ImageDraw.Draw(canvas)
    edge = round(horizon * _CANVAS)
    draw.rectangle((0, edge - 8, _CANVAS, edge), fill=_DECOR + 1)
    for y in range(edge + 24, _CANVAS, 26):
        draw.line((0, y, _CANVAS, y), fill=_DECOR, width=3)
    left = rng.choice((16, 170)) + rng.uniform(-8, 8)
    draw.rectangle((left, 20, left + 66, 96), fill=_DECOR + 1)
    draw.rectangle((left + 7, 27, left + 59, 89), fill=_DECOR + 2)
    return canvas, palette


def _sunset(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    horizon = rng.uniform(0.7, 0.78)
    decor: tuple[RGB, ...] = ((255, 226, 130),)
    canvas, palette = _start(((94, 60, 130), (250, 150, 90)), ((96, 52, 84), (52, 30, 62)), decor, horizon)
    x, y = rng.uniform(0.2, 0.8) * _CANVAS, horizon * _CANVAS
    draw = ImageDraw.Draw(canvas)
    draw.pieslice((x - 44, y - 44, x + 44, y + 44), 180, 360, fill=_DECOR)
    return canvas, palette


def _sea(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    decor: tuple[RGB, ...] = ((190, 236, 240), (40, 130, 110))
    canvas, palette = _start(
        ((44, 160, 190), (10, 64, 120)), ((150, 140, 110), (120, 112, 92)), decor, rng.uniform(0.84, 0.9)
    )
    draw = ImageDraw.Draw(canvas)
    for _ in range(5):
        x, height = rng.uniform(0, _CANVAS), rng.uniform(40, 90)
        weed = [(x + 6 * math.sin(k), 0.95 * _CANVAS - height * k / 6) for k in range(7)]
        draw.line(weed, fill=_DECOR + 1, width=8, joint="curve")
    for _ in range(9):
        x, y, r = rng.uniform(0, _CANVAS), rng.uniform(0, 0.8 * _CANVAS), rng.uniform(5, 10)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=_DECOR, width=3)
    return canvas, palette


def _city(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    decor: tuple[RGB, ...] = ((108, 118, 134), (136, 146, 160), (250, 226, 140), (236, 236, 236))
    canvas, palette = _start(((186, 206, 220), (228, 232, 232)), ((104, 106, 112), (84, 86, 92)), decor, 0.78)
    draw = ImageDraw.Draw(canvas)
    left = -rng.randrange(40)
    while left < _CANVAS:
        width, top = rng.randrange(36, 60), rng.uniform(0.12, 0.5) * _CANVAS
        draw.rectangle((left, top, left + width, 0.78 * _CANVAS), fill=_DECOR + rng.randrange(2))
        for y in range(round(top) + 10, round(0.7 * _CANVAS), 22):
            for x in range(left + 7, left + width - 9, 16):
                draw.rectangle((x, y, x + 7, y + 10), fill=_DECOR + 2)
        left += width
    for x in range(rng.randrange(-30, 0), _CANVAS, 60):
        draw.rectangle((x, 0.89 * _CANVAS, x + 32, 0.91 * _CANVAS), fill=_DECOR + 3)
    return canvas, palette


_BACKGROUNDS: dict[str, Callable[[random.Random], tuple[Image.Image, np.ndarray]]] = {
    "meadow": _meadow,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "room": _room,
    "sunset": _sunset,
    "sea": _sea,
    "city": _city,
}
