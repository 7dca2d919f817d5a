"""The shapes of the things in the embedded sample, as data."""

import math

Part = tuple[str, str, tuple[float, ...]]


def _star(cx: float, cy: float, outer: float, inner: float, points: int) -> tuple[float, ...]:
    """Corners of a star, as x, y, x, y, ...; one point looks up."""
    corners: list[float] = []
    for k in range(2 * points):
        radius, angle = (inner if k % 2 else outer), math.pi * k / points
        corners += [cx + radius * math.sin(angle), cy - radius * math.cos(angle)]
    return tuple(corners)


def _petals(count: int, distance: float, radius: float) -> tuple[Part, ...]:
    angles = [2 * math.pi * k / count for k in range(count)]
    return tuple(("body", "disk", (50 + distance * math.sin(a), 34 - distance * math.cos(a), radius)) for a in angles)


# What a sprite is made of, back to front, on a board of 100 x 100: layer, form, numbers.
# disk: center, radius. oval and box: left, top, right, bottom. shape: corners. line: width, then points.
SPRITES: dict[str, tuple[Part, ...]] = {
    "ball": (("body", "disk", (50, 50, 42)), ("light", "oval", (28, 20, 46, 34))),
    "house": (
        ("wood", "box", (66, 14, 76, 36)),
        ("body", "box", (18, 46, 82, 92)),
        ("outline", "shape", (8, 48, 50, 8, 92, 48)),
        ("light", "box", (26, 56, 42, 72)),
        ("wood", "box", (54, 60, 70, 92)),
    ),
    "car": (
        ("body", "shape", (22, 50, 34, 24, 66, 24, 80, 50)),
        ("body", "box", (6, 46, 94, 72)),
        ("light", "shape", (31, 46, 39, 30, 48, 30, 48, 46)),
        ("light", "shape", (53, 46, 53, 30, 63, 30, 71, 46)),
        ("dark", "disk", (28, 74, 13)),
        ("dark", "disk", (72, 74, 13)),
        ("light", "disk", (28, 74, 5)),
        ("light", "disk", (72, 74, 5)),
    ),
    "tree": (
        ("wood", "box", (43, 64, 57, 96)),
        ("body", "disk", (50, 28, 23)),
        ("body", "disk", (31, 46, 22)),
        ("body", "disk", (69, 46, 22)),
        ("body", "disk", (50, 52, 22)),
    ),
    "fish": (
        ("body", "shape", (64, 50, 96, 24, 90, 50, 96, 76)),
        ("body", "oval", (6, 24, 76, 76)),
        ("outline", "shape", (40, 50, 56, 42, 56, 60)),
        ("light", "disk", (24, 44, 8)),
        ("dark", "disk", (23, 44, 4)),
    ),
    "star": (("body", "shape", _star(50, 54, 48, 20, 5)),),
    "cat": (
        ("body", "line", (9, 74, 84, 92, 72, 88, 46)),
        ("body", "oval", (26, 46, 80, 96)),
        ("body", "shape", (14, 8, 36, 20, 16, 40)),
        ("body", "shape", (66, 8, 44, 20, 64, 40)),
        ("body", "oval", (12, 16, 68, 62)),
        ("light", "disk", (29, 36, 7)),
        ("light", "disk", (51, 36, 7)),
        ("dark", "disk", (29, 36, 4)),
        ("dark", "disk", (51, 36, 4)),
        ("dark", "shape", (36, 46, 44, 46, 40, 51)),
    ),
    "flower": (
        ("leaf", "line", (5, 50, 40, 50, 96)),
        ("leaf", "oval", (50, 68, 76, 82)),
        *_petals(6, 20, 14),
        ("light", "disk", (50, 34, 11)),
    ),
    "boat": (
        ("wood", "box", (47, 8, 52, 70)),
        ("body", "shape", (54, 8, 54, 60, 94, 60)),
        ("body", "shape", (46, 16, 46, 60, 8, 60)),
        ("wood", "shape", (6, 66, 94, 66, 78, 92, 22, 92)),
    ),
    "heart": (
        ("body", "disk", (30, 34, 23)),
        ("body", "disk", (70, 34, 23)),
        ("body", "shape", (10, 46, 50, 94, 90, 46, 70, 30, 50, 36, 30, 30)),
    ),
    "balloon": (
        ("dark", "line", (2, 50, 72, 44, 84, 54, 98)),
        ("body", "shape", (50, 64, 43, 76, 57, 76)),
        ("body", "oval", (22, 2, 78, 70)),
        ("light", "oval", (34, 12, 44, 28)),
    ),
    "umbrella": (
        ("dark", "line", (5, 50, 40, 50, 86, 56, 94, 66, 92, 68, 84)),
        ("body", "pie", (4, 10, 96, 102, 180, 360)),
        ("empty", "disk", (20, 58, 12)),
        ("empty", "disk", (80, 58, 12)),
        ("dark", "box", (48, 3, 52, 12)),
    ),
}
