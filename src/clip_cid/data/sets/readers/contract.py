"""The arguments and the result of a reader of one layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from clip_cid.data.sets.known_sets import KnownSet
from clip_cid.data.sets.labelled_images import Contents, FileImages, LabelledImages, check_all_there
from clip_cid.file_digests import sha256_file


@dataclass(frozen=True)
class Request:
    """The set to read."""

    name: str
    root: Path
    known_set: KnownSet | None
    """None for a set of the user's own."""
    splits: tuple[str, ...]
    """A choice of train, val and test; those that the layout does not have are left out."""
    max_pixels: int
    digest_of: Callable[[Path], str] = sha256_file
    """The SHA-256 of a file, perhaps remembered."""

    @property
    def known(self) -> KnownSet:
        """The known set, for readers that only the table of known sets names."""
        assert self.known_set is not None
        return self.known_set

    def wants(self, split: str) -> bool:
        return split in self.splits

    def title(self, split: str) -> str:
        return f"{self.name}/{split}"

    def files(self, split: str, root: Path, files: Sequence[str], labels: Sequence[int]) -> LabelledImages:
        """A split of files below `root`, one an image.

        Raises:
            DataError: Some of the files are not there.
        """
        check_all_there(root, files)
        contents = self.contents(root, files, decoded=True)
        images = FileImages(root, contents.files, self.max_pixels)
        return LabelledImages(self.title(split), np.array(labels, dtype=np.int64), contents, images)

    def contents(self, root: Path, files: Sequence[str], *, decoded: bool) -> Contents:
        """The files behind a split; with `decoded` the limit on their images' pixels counts too."""
        reading = f"at most {self.max_pixels} pixels" if decoded else ""
        return Contents(root, tuple(files), self.digest_of, reading)


@dataclass(frozen=True)
class SetFiles:
    """A set as a reader made it of the files."""

    classes: tuple[str, ...]
    """As the files call them, in the order of the labels."""
    splits: dict[str, LabelledImages]
    names: tuple[str, ...] = ()
    """The names of the classes of a user's own set, if they differ from what the files say."""
    templates: tuple[str, ...] = ()
    """Prompts that lie with the set."""
    notes: tuple[str, ...] = ()
    """How this differs from CLIP's protocol."""
    folds: tuple[Int[np.ndarray, " rows"], ...] | None = None


Reader = Callable[[Request], SetFiles | None]
"""Reads a set; None if the files are of another layout."""
