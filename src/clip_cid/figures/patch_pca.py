"""Fig. 5: principal components of the patches of a ViT, as colors.

Over all patches of the images of a class, the first principal component separates foreground from background.
The first three components of the foreground are its red, green and blue, so one color means one thing in all
these images. The components of another model are rotated to fit those of the first, so that their colors mean
about the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from scipy.linalg import eigh

from clip_cid.figures import image_grid, style

_PERCENTILES = (1, 99)
_TINY = 1e-7  # of the features or of the first component: rounding, not a component


@dataclass(frozen=True)
class PatchComponents:
    """The patches of the images of one class as one model sees them."""

    foreground: Bool[np.ndarray, "images rows columns"]
    coordinates: Float[np.ndarray, "images rows columns 3"]
    """The first three principal components of the foreground; 0 in the background."""


@dataclass(frozen=True)
class ClassPatches:
    """Images of one class, and each model's components of their patches."""

    name: str
    images: Sequence[int]
    """Rows of the set's test split."""
    pictures: Sequence[UInt8[np.ndarray, "height width 3"]]
    models: Mapping[str, PatchComponents]


def components(
    tokens: Float[np.ndarray, "images rows columns width"], *, like: PatchComponents | None = None
) -> PatchComponents:
    """Foreground and its three components; the same for features that are turned or mirrored as a whole.

    Fewer than four foreground patches have fewer than three components; the rest are 0.

    Args:
        tokens: Features of each patch.
        like: The same images as another model sees them, which decides which side is the foreground.
    """
    mask = foreground(tokens, like=None if like is None else like.foreground)
    coordinates = np.zeros((*mask.shape, 3))
    if mask.any():
        scores = principal(tokens[mask], 3)
        coordinates[mask, : scores.shape[1]] = scores
    return PatchComponents(mask, coordinates)


def foreground(
    tokens: Float[np.ndarray, "images rows columns width"], *, like: Bool[np.ndarray, "images _ _"] | None = None
) -> Bool[np.ndarray, "images rows columns"]:
    """The patches on one side of the mean on the first principal component: on the side that touches the border least.

    A component has no sign of its own. The foreground is the side that agrees best with `like`, if it is given (on any
    grid); then the one with the smaller share of its patches at the border of their images; then the smaller one.
    """
    images, rows, columns, width = tokens.shape
    first = principal(tokens.reshape(-1, width), 1)
    if not first.shape[1]:  # all patches are equal
        return np.zeros((images, rows, columns), dtype=bool)
    scores = first.reshape(images, rows, columns)
    border = np.ones((images, rows, columns), dtype=bool)
    border[:, 1:-1, 1:-1] = False
    wanted = None if like is None else _on_grid(like, (rows, columns))

    def rank(side: Bool[np.ndarray, "images rows columns"]) -> tuple[float, float, int]:
        differs = 0.0 if wanted is None else float((side != wanted).mean())
        return differs, float(border[side].mean()), int(side.sum())

    return min((scores > 0, scores < 0), key=rank)


def principal(rows: Float[np.ndarray, "rows width"], count: int) -> Float[np.ndarray, "rows components"]:
    """Coordinates on the first principal components, up to `count` of them, in float64.

    The sign of each is the one that makes its largest coordinate positive: it follows the rows when they are turned.
    """
    centered = rows.astype(np.float64)
    centered -= centered.mean(axis=0)
    many = len(rows) > rows.shape[1]
    products = centered.T @ centered if many else centered @ centered.T  # the smaller one gives the same components
    last = len(products) - 1
    squares, vectors = eigh(products, subset_by_index=(max(0, last + 1 - count), last))
    lengths, vectors = np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1]
    rank = int((lengths > max(_TINY * lengths[0], _TINY * float(np.abs(rows).max()))).sum())
    scores = (centered @ vectors if many else vectors * lengths)[:, :rank]
    largest = np.abs(scores).argmax(axis=0)
    return scores * np.sign(scores[largest, np.arange(rank)])


def align(own: PatchComponents, reference: PatchComponents) -> PatchComponents:
    """The same components turned (or mirrored) so that they fit the reference's best: orthogonal Procrustes.

    Fitted on the patches that are foreground in both; if the grids differ, each patch of the reference is compared
    with the one that covers its middle.
    """
    grid = (reference.foreground.shape[1], reference.foreground.shape[2])
    both = _on_grid(own.foreground, grid) & reference.foreground
    if not both.any():
        return own
    mine, wanted = _on_grid(own.coordinates, grid)[both], reference.coordinates[both]
    left, _, right = np.linalg.svd((mine - mine.mean(axis=0)).T @ (wanted - wanted.mean(axis=0)))
    return PatchComponents(own.foreground, own.coordinates @ (left @ right))


def _on_grid(values: Shaped[np.ndarray, "images _ _ *more"], grid: tuple[int, int]) -> np.ndarray:
    """Values by patch on another grid: each of its patches takes those of the one that covers its middle."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * there / wanted).astype(np.intp)
        for wanted, there in zip(grid, values.shape[1:3], strict=True)
    )
    return values[:, rows][:, :, columns]


def colors(components: PatchComponents) -> Float[np.ndarray, "images rows columns 3"]:
    """RGB from 0 to 1: each component from its 1st to its 99th percentile over all images; the background is black."""
    picture = np.zeros_like(components.coordinates)
    if not components.foreground.any():
        return picture
    values = components.coordinates[components.foreground]
    low, high = np.percentile(values, _PERCENTILES, axis=0)
    span = np.where(high > low, high - low, 1)
    picture[components.foreground] = np.clip((values - low) / span, 0, 1)
    return picture


def overlap(a: PatchComponents, b: PatchComponents) -> float | None:
    """Foreground in both over foreground in either; None if the grids differ or there is none at all."""
    if a.foreground.shape != b.foreground.shape or not (a.foreground | b.foreground).any():
        return None
    return float((a.foreground & b.foreground).sum() / (a.foreground | b.foreground).sum())


def draw(classes: Sequence[ClassPatches], out: Path) -> dict[str, dict[str, float | None]]:
    """Write `patch_pca.svg` and `.csv`: the images of each class, and below them each model's patches."""
    models = list(classes[0].models)
    aligned = {
        (shown.name, model): align(shown.models[model], shown.models[models[0]])
        for shown in classes
        for model in models
    }
    painted = {key: colors(components) for key, components in aligned.items()}
    _write_table(classes, aligned, painted, out / "patch_pca.csv")

    bands = [
        image_grid.Band(
            heading=shown.name,
            rows={"": list(shown.pictures)}
            | {model: [np.round(255 * one).astype(np.uint8) for one in painted[shown.name, model]] for model in models},
        )
        for shown in classes
    ]
    image_grid.draw(bands, out / "patch_pca.svg")

    return {
        model: {
            "foreground_share": float(np.mean([aligned[c.name, model].foreground.mean() for c in classes])),
            "overlap": _mean([overlap(aligned[c.name, model], aligned[c.name, models[0]]) for c in classes]),
        }
        for model in models
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _write_table(
    classes: Sequence[ClassPatches],
    aligned: Mapping[tuple[str, str], PatchComponents],
    painted: Mapping[tuple[str, str], Float[np.ndarray, "images rows columns 3"]],
    path: Path,
) -> None:
    """One line a patch."""
    values = ("component_1", "component_2", "component_3", "red", "green", "blue")
    lines = [
        (
            model,
            shown.name,
            image,
            row,
            column,
            bool(components.foreground[place, row, column]),
            *both[place, row, column],
        )
        for shown in classes
        for model in shown.models
        for components in (aligned[shown.name, model],)
        for both in (np.concatenate([components.coordinates, painted[shown.name, model]], axis=3),)
        for place, image in enumerate(shown.images)
        for row, column in np.ndindex(components.foreground.shape[1:])
    ]

    names = ("model", "class", "image", "row", "column", "foreground", *values)
    style.write_csv(path, {name: [line[index] for line in lines] for index, name in enumerate(names)})
