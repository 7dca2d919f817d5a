"""The images of one split of a labelled set: files, members of tars, records of a binary file, or arrays."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample
from clip_cid.errors import DataError
from clip_cid.file_digests import sha256_file


@runtime_checkable
class Images(Protocol):
    """Where the images of one split come from."""

    def name(self, row: int) -> str: ...

    def load(self, row: int) -> Image.Image: ...


@dataclass(frozen=True)
class Contents:
    """What decides the images of a split: files, by their content, and how they are read."""

    root: Path
    files: tuple[str, ...]
    """Below `root`, in the order in which they are read."""
    digest_of: Callable[[Path], str] = sha256_file
    reading: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """Equal for equal files, wherever they lie and whenever they were written."""
        digest = hashlib.sha256(self.reading.encode())
        for file in self.files:
            try:
                content = self.digest_of(self.root / file)
            except OSError as error:  # an image that cannot be read is left out
                content = f"cannot be read ({error.strerror})"
            digest.update(json.dumps([file, content]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class LabelledImages:
    """One split of a set: image `row` belongs to class `labels[row]`. Pickles, so that worker processes can decode."""

    title: str
    """Set and split, such as `cifar10/test`."""
    labels: Int[np.ndarray, " images"]
    contents: Contents
    images: Images

    @property
    def fingerprint(self) -> str:
        """Changes when the content of the files behind the split changes, or how they are read.

        Reads every file that `contents.digest_of` does not know: only what keeps results asks for it.
        """
        return self.contents.digest

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """The name of an image in messages: its file, or its tar and key."""
        return self.images.name(row)

    def load(self, row: int) -> Image.Image:
        """The decoded RGB image.

        Raises:
            BadSample: It cannot be decoded.
        """
        return self.images.load(row)


@dataclass(frozen=True)
class FileImages:
    """One file an image."""

    root: Path
    files: tuple[str, ...]
    """Below `root`: a million texts take a fifth of the memory of a million paths."""
    max_pixels: int

    def name(self, row: int) -> str:
        return str(self.root / self.files[row])

    def load(self, row: int) -> Image.Image:
        try:
            data = (self.root / self.files[row]).read_bytes()
        except OSError as error:
            raise BadSample(f"cannot be read ({error.strerror})") from error
        return decode_image(data, max_pixels=self.max_pixels)


class Member(NamedTuple):
    """Where a file lies in a tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarImages:
    """Images inside tars, each read with one seek."""

    tars: tuple[Path, ...]
    tar_of: Int[np.ndarray, " images"]
    members: tuple[Member, ...]
    keys: tuple[str, ...]
    max_pixels: int

    def name(self, row: int) -> str:
        return f"{self.tars[self.tar_of[row]]}: {self.keys[row]}"

    def load(self, row: int) -> Image.Image:
        with open(self.tars[self.tar_of[row]], "rb") as tar:
            tar.seek(self.members[row].offset)
            data = tar.read(self.members[row].size)
        return decode_image(data, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class RecordImages:
    """Raw RGB images of one size in records of equal length, color planes one after the other."""

    files: tuple[Path, ...]
    file_of: Int[np.ndarray, " images"]
    record_of: Int[np.ndarray, " images"]
    record: int
    """Bytes of a record."""
    skip: int
    """Bytes of it before the pixels."""
    side: int
    columns_first: bool = False
    """Pixels run down the columns (STL10), not along the rows (CIFAR)."""

    def name(self, row: int) -> str:
        return f"{self.files[self.file_of[row]]}: image {self.record_of[row]}"

    def load(self, row: int) -> Image.Image:
        with open(self.files[self.file_of[row]], "rb") as file:
            file.seek(int(self.record_of[row]) * self.record + self.skip)
            data = file.read(3 * self.side**2)
        return planes_to_image(data, self.side, columns_first=self.columns_first)


@dataclass(frozen=True)
class PlaneImages:
    """Images as rows of red, green and blue planes in memory."""

    pixels: UInt8[np.ndarray, "images bytes"]
    side: int
    title: str

    def name(self, row: int) -> str:
        return f"{self.title} image {row}"

    def load(self, row: int) -> Image.Image:
        return planes_to_image(self.pixels[row].tobytes(), self.side, columns_first=False)


@dataclass(frozen=True)
class CroppedImages:
    """Images without the outermost pixels of each side."""

    images: Images
    border: int

    def name(self, row: int) -> str:
        return self.images.name(row)

    def load(self, row: int) -> Image.Image:
        image = self.images.load(row)
        if min(image.size) <= 2 * self.border:
            raise BadSample(f"image of {image.width} x {image.height} pixels is nothing but its border")
        return image.crop((self.border, self.border, image.width - self.border, image.height - self.border))


def planes_to_image(data: bytes, side: int, *, columns_first: bool) -> Image.Image:
    """A square RGB image from its three color planes."""
    if len(data) != 3 * side**2:
        raise BadSample(f"{len(data)} bytes where {3 * side**2} are an image")
    planes = np.frombuffer(data, np.uint8).reshape(3, side, side)
    return Image.fromarray(np.ascontiguousarray(planes.transpose((2, 1, 0) if columns_first else (1, 2, 0))))


def check_all_there(root: Path, files: Sequence[str]) -> None:
    """Look for each file below `root`.

    Raises:
        DataError: Some of the files are not there.
    """
    missing = [file for file in files if not (root / file).exists()]
    if missing:
        raise DataError(
            f"{root}: {len(missing):,} of {len(files):,} files are missing, the first {missing[0]}.",
            fix="Unpack or copy the set again.",
        )
