"""The images of evaluation sets in the teacher's space, to compare training images with them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip_cid.data.embeddings.files_behind import is_of_embeddings
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import read_npy
from clip_cid.data.sets.evaluation_sets import open_test_images
from clip_cid.data.sets.labelled_images import LabelledImages
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.unit_rows import Rows, UnitRows
from clip_cid.recipe import Recipe


class SetRows(NamedTuple):
    """The test images of a set, as unit rows."""

    name: str
    rows: UnitRows
    names: Callable[[int], str]
    """Of each row: its file, or its key."""
    unreadable: int
    """Images that could not be embedded, and were not compared."""


@runtime_checkable
class EmbedsImages(Protocol):
    """`clip_cid.evaluation.features.Encoder`, which needs models; embeddings do not."""

    def images(self, source: Any, *, before: bool) -> Any: ...


def open_sets(
    sets: Mapping[str, str], recipe: Recipe, *, dim: int, encoder: Callable[[], EmbedsImages]
) -> list[SetRows]:
    """Every set, its images embedded once by the encoder of the teacher.

    Args:
        sets: `balance.against`.
        recipe: Says how images are read.
        dim: The width of the embeddings to compare with.
        encoder: Loads the teacher; called only where a set has images.

    Raises:
        ConfigError: A set has images, and the embeddings were made elsewhere.
        DataError: A set is not there, or its embeddings are of another width.
    """
    loaded = encoder() if _of_images(sets, recipe) else None
    opened = [
        _of_embeddings(name, Path(where))
        if loaded is None or is_of_embeddings(where)
        else _embed(name, where, recipe, loaded)
        for name, where in sets.items()
    ]
    for one in opened:
        if one.rows.dim != dim:
            raise DataError(
                f"balance.against: {one.name} has embeddings of width {one.rows.dim}, the images of {dim}.",
                fix="Give embeddings by the teacher that embedded the images.",
            )
    return opened


def find_sets(sets: Mapping[str, str], recipe: Recipe) -> None:
    """Look that every set is there; nothing is embedded.

    Raises:
        ConfigError: As `open_sets`.
        DataError: A set is not there, or no set.
    """
    of_images = _of_images(sets, recipe)
    for name, where in sets.items():
        if name in of_images:
            _images(name, where, recipe)
        else:
            _of_embeddings(name, Path(where))


def _of_images(sets: Mapping[str, str], recipe: Recipe) -> list[str]:
    """The names of sets whose images are to be embedded."""
    of_images = [name for name, where in sets.items() if not is_of_embeddings(where)]
    if of_images and recipe.embed.existing is not None:
        raise ConfigError(
            f"balance.against: {of_images[0]} has images, but the embeddings were made elsewhere (embed.existing), and"
            " no teacher is known to embed them.",
            fix="Give embeddings of that set by the same teacher: a .npy, or an embedding store.",
        )
    return of_images


def _images(name: str, where: str, recipe: Recipe) -> LabelledImages:
    return open_test_images(
        name,
        where,
        setting="balance.against",
        max_pixels=recipe.pairs.max_pixels,
        cache_dir=recipe.machine.cache_dir,
    )


def _of_embeddings(name: str, path: Path) -> SetRows:
    if path.suffix != ".npy":
        store = EmbeddingStore.open(path)
        good = np.flatnonzero(store.ok)
        rows = _unit_rows(name, path, store.images.select(good))
        return SetRows(name, rows, lambda row: store.keys[int(good[row])], store.rows - len(good))
    try:
        array = read_npy(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"balance.against: {name}, {path}, cannot be read ({error}).", fix="Give a .npy of (images, width)."
        ) from error
    return SetRows(name, _unit_rows(name, path, array), lambda row: f"row {row}", 0)


def _embed(name: str, where: str, recipe: Recipe, encoder: EmbedsImages) -> SetRows:
    images = _images(name, where, recipe)
    features = encoder.images(images, before=False)
    return SetRows(
        name,
        _unit_rows(name, Path(where), features.after),
        lambda row: images.name(int(features.rows[row])),
        len(features.bad),
    )


def _unit_rows(name: str, path: Path, rows: Rows) -> UnitRows:
    try:
        return UnitRows(rows, name=name, any_length=True)
    except ValueError as error:
        raise DataError(
            f"balance.against: {path}: {error}", fix="Give (images, width) numbers, none of them 0."
        ) from error
