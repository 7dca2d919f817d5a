"""The appendix's class activation maps: where each model sees what a prompt names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from clip_cid.figures import image_grid, style

_COLORS = "viridis"  # even steps to every kind of eye, and in grey
_OPACITY = (0.25, 0.75)  # where the map is 0, and at its maximum: the image stays visible


@dataclass(frozen=True)
class PromptedImage:
    """An image, its prompt, and each model's map and cosine of the two."""

    image: int
    """Row of the set's test split."""
    label: str
    prompt: str
    picture: UInt8[np.ndarray, "height width 3"]
    maps: Mapping[str, Float[np.ndarray, "rows columns"]]
    """Grad-CAM by model, at least 0."""
    cosines: Mapping[str, float]


def overlay(
    picture: UInt8[np.ndarray, "height width 3"], activation: Float[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The map over the gray image, from dark at 0 to yellow at its maximum; no yellow in a map of zeros."""
    largest = float(activation.max())
    share = Image.fromarray((activation / largest if largest > 0 else activation).astype(np.float32))
    smooth = np.clip(np.asarray(share.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)), 0, 1)[..., None]
    heat = matplotlib.colormaps[_COLORS](smooth[..., 0])[..., :3]
    gray = picture.mean(axis=2, keepdims=True) / 255
    opacity = _OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * smooth
    return np.round(255 * ((1 - opacity) * gray + opacity * heat)).astype(np.uint8)


def draw(images: Sequence[PromptedImage], out: Path) -> dict[str, dict[str, float]]:
    """Write `activation_maps.svg` and `.csv`: an image a column, a model a row, and the cosine under each map."""
    models = list(images[0].maps)
    _write_table(images, out / "activation_maps.csv")
    band = image_grid.Band(
        rows={"": [one.picture for one in images]}
        | {model: [overlay(one.picture, one.maps[model]) for one in images] for model in models},
        column_headings=[one.label for one in images],
        notes={model: [f"{one.cosines[model]:.3f}" for one in images] for model in models},
    )
    image_grid.draw([band], out / "activation_maps.svg")
    return {model: {"mean_cosine": float(np.mean([one.cosines[model] for one in images]))} for model in models}


def _write_table(images: Sequence[PromptedImage], path: Path) -> None:
    """One line a patch."""
    lines = [
        (model, one.image, one.label, one.prompt, one.cosines[model], row, column, float(activation[row, column]))
        for one in images
        for model, activation in one.maps.items()
        for row, column in np.ndindex(activation.shape)
    ]
    names = ("model", "image", "class", "prompt", "cosine", "row", "column", "activation")
    style.write_csv(path, {name: [line[index] for line in lines] for index, name in enumerate(names)})
