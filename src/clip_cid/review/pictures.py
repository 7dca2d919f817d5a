"""Pictures for the page: decoded by the project's one reader of images, small ones kept on the disk."""

import hashlib
import io
import threading
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from clip_cid.data.balance.kinds import NEAR_BITS, bits_apart, difference_hash
from clip_cid.data.embeddings.rows_of_pairs import rows_in_store
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs import images
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.errors import ClipCidError
from clip_cid.recipe import Recipe
from clip_cid.remote.cache import cache_folder
from clip_cid.run_folder import RunFolder, atomic_file
from clip_cid.stage_names import EMBED

SIDE = 160
"""The long side of a small picture, in pixels."""

_LARGEST_SIDE = 4_096
_EXACT_PIXELS = 1 << 20  # of a picture that is sent without loss
_WEBP_QUALITY, _JPEG_QUALITY = 75, 95


class NoPictureError(Exception):
    """There is no picture of a row; the message is the reason, fit for a page."""


class Encoded(NamedTuple):
    """A picture as a browser reads it."""

    content: bytes
    media_type: str


class RowPictures:
    """The pictures of a store's rows, read from the pairs when they are asked for.

    One thread decodes at a time: Pillow's limits against decompression bombs hold for the whole process.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, store: EmbeddingStore) -> None:
        self._folder, self._recipe, self._store = folder, recipe, store
        self._lock = threading.Lock()
        record = folder.record(EMBED)
        of_embeddings = record.results[:16] if record is not None else "unknown"
        self._cache = cache_folder(recipe.machine.cache_dir) / "thumbnails" / of_embeddings

    def small(self, row: int) -> Encoded:
        """At most `SIDE` pixels a side; made once, then read from the cache folder.

        Raises:
            NoPictureError: There is none.
        """
        path = self._cached(row)
        try:
            return Encoded(path.read_bytes(), "image/webp")
        except OSError:
            pass
        with self._lock:
            picture = self._decode(row)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        content = _encode(picture, "WEBP", quality=_WEBP_QUALITY)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)
        except OSError:
            pass  # a full disk makes the page slower, not wrong
        return Encoded(content, "image/webp")

    def full(self, row: int) -> Encoded:
        """In its own size, without loss unless it is large.

        Raises:
            NoPictureError: There is none.
        """
        with self._lock:
            picture = self._decode(row)
        if picture.width * picture.height <= _EXACT_PIXELS:
            return Encoded(_encode(picture, "PNG"), "image/png")
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        return Encoded(_encode(picture, "JPEG", quality=_JPEG_QUALITY), "image/jpeg")

    def original(self, row: int) -> tuple[str, bytes]:
        """The key of a row, and its picture as it lies in the pairs.

        Raises:
            NoPictureError: There is none.
            BadSample: It cannot be used.
        """
        pair = self._pairs.read(self._row_of_pairs(row))
        return pair.key, pair.image

    def file(self, row: int) -> Path | None:
        """The file of a picture; None for one inside a tar or a table.

        Raises:
            NoPictureError: There is no picture.
        """
        return self._pairs.image_file(self._row_of_pairs(row))

    def alike(self, one: int, other: int) -> str:
        """Perceptual or semantic, as the balance tells them apart; unknown without both pictures."""
        try:
            with self._lock:
                hashes = [difference_hash(self._decode(row)) for row in (one, other)]
        except NoPictureError:
            return "unknown"
        return "perceptual" if bits_apart(*hashes) <= NEAR_BITS else "semantic"

    def _decode(self, row: int) -> Image.Image:
        try:
            pairs = self._pairs
            pair = pairs.read(self._row_of_pairs(row))
            return images.decode_image(pair.image, max_pixels=self._recipe.pairs.max_pixels)
        except BadSample as error:
            raise NoPictureError(error.reason) from error
        except ClipCidError as error:
            raise NoPictureError(error.problem.splitlines()[0]) from error

    @cached_property
    def _pairs(self) -> Pairs:
        if not self._recipe.pairs.source:
            raise NoPictureError("the recipe names no pairs")
        return open_pairs(self._recipe.pairs, index=self._folder.index, cache_dir=self._recipe.machine.cache_dir)

    def _row_of_pairs(self, row: int) -> int:
        """If the store was made from these pairs, its row numbers are theirs; otherwise keys decide."""
        key = self._store.keys[row]
        if row < len(self._pairs) and self._pairs.key(row) == key:
            return row
        if (there := int(self._moved[row])) < 0:
            raise NoPictureError(f"the pairs have no {key!r}")
        return there

    @cached_property
    def _moved(self) -> Int[np.ndarray, " rows"]:
        """The pair of each row of the store, by key; -1 where there is none."""
        of_pairs = rows_in_store(self._pairs, self._store, max_absent_share=1.0)
        there = np.full(self._store.rows, -1)
        there[of_pairs[of_pairs >= 0]] = np.flatnonzero(of_pairs >= 0)
        return there

    def _cached(self, row: int) -> Path:
        name = hashlib.sha256(f"{SIDE}\0{row}\0{self._store.keys[row]}".encode()).hexdigest()
        return self._cache / name[:2] / f"{name[2:34]}.webp"


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()
