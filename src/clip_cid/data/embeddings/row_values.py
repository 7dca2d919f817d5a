"""Numbers of the rows of a store, by which one of several equal images is preferred."""

from collections.abc import Sequence
from decimal import Decimal

import numpy as np
from jaxtyping import Float, Int

from clip_cid import log, units
from clip_cid.data.embeddings.rows_of_pairs import rows_in_store
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError

_EXACT_BELOW = 2.0**53  # whole numbers, in float64


def pixels(store: EmbeddingStore) -> Float[np.ndarray, " rows"]:
    """Width times height of each image that was embedded.

    Raises:
        DataError: The store does not say, as one made elsewhere.
    """
    unknown = DataError(
        f"{store.path}: the sizes of the images are not known here, as the embeddings were made elsewhere.",
        fix="Take another rule for balance.keep, such as largest_file with pairs.source, or field:NAME.",
    )
    try:
        sizes = store.sizes.astype(np.float64)
    except DataError as error:  # without columns of these names
        raise unknown from error
    found = sizes[:, 0] * sizes[:, 1]
    if not found[store.ok].any():
        raise unknown
    return found


def field_numbers(store: EmbeddingStore, name: str) -> Float[np.ndarray, " rows"]:
    """A kept field as numbers; NaN for a row without one.

    Raises:
        DataError: The store does not have the field, or it holds something else than numbers.
    """
    texts, numbers = store.field(name), np.full(store.rows, np.nan)
    for row, text in enumerate(texts):
        if not text.strip():
            continue
        try:
            numbers[row] = float(text)
        except ValueError as error:
            raise DataError(
                f"balance.keep: the field {name!r} of {store.keys[row]!r} is {text!r}, not a number.",
                fix="Name a field of numbers, of which the highest is kept.",
            ) from error

    missing = int(np.isnan(numbers).sum())
    if missing == store.rows:
        raise DataError(f"balance.keep: no image has a number in {name!r}.", fix="Name another field.")
    if missing:
        log.info(
            f"balance   {units.counted(missing, 'image')} of {store.rows:,} without {name!r}: kept if no other has it"
        )
    return _in_order(texts, numbers)


def _in_order(texts: Sequence[str], numbers: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """The numbers, but those that float64 cannot tell apart, as long identifiers, by their place among the like."""
    large = np.flatnonzero(np.isfinite(numbers) & (np.abs(numbers) >= _EXACT_BELOW))
    exact = [Decimal(texts[row].strip()) for row in large.tolist()]
    above, below = sorted({value for value in exact if value > 0}), sorted({value for value in exact if value < 0})
    number_of = {value: _EXACT_BELOW + 2 * place for place, value in enumerate(above)}
    number_of |= {value: -_EXACT_BELOW - 2 * place for place, value in enumerate(reversed(below))}
    numbers[large] = [number_of[value] for value in exact]
    return numbers


class FileSizes:
    """The bytes of the images of rows, read from the pairs when they are asked for."""

    def __init__(self, store: EmbeddingStore, pairs: Pairs, rows: Int[np.ndarray, " rows"]) -> None:
        """`rows` are those of the store that are numbered from 0 on when sizes are asked for."""
        in_store = rows_in_store(pairs, store, max_absent_share=1.0)
        self._pair_of = np.full(store.rows, -1)
        found = np.flatnonzero(in_store >= 0)
        self._pair_of[in_store[found]] = found
        self._pairs, self._rows = pairs, rows

    def __call__(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The sizes; NaN for an image that is not among the pairs or cannot be read."""
        return np.array([self._size(int(pair)) for pair in self._pair_of[self._rows[rows]]])

    def _size(self, pair: int) -> float:
        if pair < 0:
            return np.nan
        try:
            return float(len(self._pairs.read(pair).image))
        except BadSample:
            return np.nan
