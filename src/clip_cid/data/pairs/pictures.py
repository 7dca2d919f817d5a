"""Pictures of the data, read back from the pairs by row and key."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from clip_cid import os_errors
from clip_cid.data.pairs import images
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.errors import ConfigError, DataError
from clip_cid.recipe import Recipe
from clip_cid.remote.contract import UnreachableError
from clip_cid.run_folder import RunFolder

_SCAN_ROWS = 100_000


class NoPicturesError(Exception):
    """The images of the pairs are not available; the message is the reason, fit for a page."""


class Pictures:
    """The images of some rows of an embedding store, read from the pairs.

    If the store was made from these pairs, its row numbers are theirs. Otherwise pairs are matched by key.
    """

    def __init__(self, pairs: Pairs, wanted: Mapping[str, int], *, max_pixels: int) -> None:
        """Find the `wanted` pictures, given as key -> row of the store."""
        self.pairs, self._max_pixels = pairs, max_pixels
        self._rows = {key: row for key, row in wanted.items() if row < len(pairs) and pairs.key(row) == key}
        moved = wanted.keys() - self._rows.keys()
        for start in range(0, len(pairs), _SCAN_ROWS):
            if not moved:
                break
            keys = pairs.keys(start, min(start + _SCAN_ROWS, len(pairs)))
            here = {key: row for row, key in enumerate(keys, start=start) if key in moved}
            self._rows |= here
            moved -= here.keys()

    def get(self, key: str) -> Image.Image | None:
        """The decoded image; None if the pairs do not have it, or it cannot be read."""
        if key not in self._rows:
            return None
        try:
            return images.decode_image(self.pairs.read(self._rows[key]).image, max_pixels=self._max_pixels)
        except (BadSample, DataError):  # broken, or its source is gone since it was indexed
            return None

    def sample(self, count: int, *, seed: int) -> dict[str, str]:
        """Key -> first caption of some pairs drawn at random; broken ones are left out."""
        order = np.random.default_rng(seed).choice(len(self.pairs), size=min(2 * count, len(self.pairs)), replace=False)
        captions: dict[str, str] = {}
        for row in order.tolist():
            if len(captions) == count:
                break
            try:
                pair = self.pairs.read(row)
            except (BadSample, DataError):
                continue
            captions[pair.key] = next(iter(pair.captions), "")
            self._rows[pair.key] = row
        return captions


def open_pictures(folder: RunFolder, recipe: Recipe, wanted: Mapping[str, int]) -> Pictures:
    """The pictures of some pairs, given as key -> row of the embedding store.

    Raises:
        NoPicturesError: The recipe names no pairs, or they are gone or broken, or a command that may not run; or they
            are elsewhere and their server does not answer.
        DataError: They cannot be read now, which may pass.
    """
    if not recipe.pairs.source:
        raise NoPicturesError("the recipe names no pairs")
    try:
        pairs = open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)
        return Pictures(pairs, wanted, max_pixels=recipe.pairs.max_pixels)
    except UnreachableError as error:  # a page has its numbers without them
        raise NoPicturesError(f"the pairs cannot be read ({error.problem})") from error
    except (ConfigError, DataError) as error:
        if os_errors.may_pass(error.__cause__):
            raise
        raise NoPicturesError(f"the pairs cannot be read ({error.problem.splitlines()[0]})") from error
