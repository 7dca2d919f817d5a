"""What of a run there is to show."""

from collections.abc import Mapping

from clip_cid.data.pairs import open_pairs
from clip_cid.errors import DataError
from clip_cid.figures.pictures import Pictures
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder


class NoPicturesError(Exception):
    """The pairs' pictures cannot be had; the message is the reason, fit for a page."""


def open_pictures(folder: RunFolder, recipe: Recipe, wanted: Mapping[str, int]) -> Pictures:
    """The pictures of some pairs, given as key -> row of the embedding store.

    Raises:
        NoPicturesError: The recipe names no pairs, or they are gone or broken.
    """
    if not recipe.pairs.source:
        raise NoPicturesError("the recipe names no pairs")
    try:
        pairs = open_pairs(recipe.pairs, index=folder.path / "index", cache_dir=recipe.machine.cache_dir)
        return Pictures(pairs, wanted, max_pixels=recipe.pairs.max_pixels)
    except DataError as error:
        raise NoPicturesError(f"the pairs cannot be read ({error.problem.splitlines()[0]})") from error
