"""A folder of arrays, one file an array, that stays after the process ends.

Behind its array each file has a digest of it. So what a kill, a power cut or a bad disk has damaged is not taken
for the work that was done.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import tasks
from clip_cid.data.npy_files import new_npy, read_npy
from clip_cid.errors import ClipCidError, DataError
from clip_cid.file_digests import digest
from clip_cid.run_folder import atomic_file, read_json, write_json

_FACTS, _DIGEST = "arrays.json", "sha256"
_WINDOW_SHARE, _LARGEST_WINDOW = 1 / 8, 1 << 30  # of the memory that is left; bytes


@dataclass(frozen=True)
class ArrayFolder:
    """Arrays as `NAME.npy`; a `clip_cid.method.array_store.ArrayStore`.

    It can be sent to another process, which opens the same files.
    """

    path: Path

    @property
    def window_bytes(self) -> int:
        """How many bytes of an array may be copied into memory at a time."""
        return int(min(_WINDOW_SHARE * tasks.available_memory(), _LARGEST_WINDOW))

    def new(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A new array on the disk, to be filled.

        Raises:
            OSError: As `new_npy`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return new_npy(self.file(name), dtype, shape)

    def save_all(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write each array and drop every other one, then write the facts, which mark the folder as finished.

        An array that `new` made under its name is in its place already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            if isinstance(values, np.memmap) and values.filename == self.file(name).resolve():
                values.flush()
                _seal(self.file(name), values)
            else:
                self.save(name, values)

        # Before the facts: what an attempt of other facts left must not pass for theirs.
        for path in set(self.path.glob("*.npy")) - {self.file(name) for name in arrays}:
            path.unlink()

        written = {"arrays": sorted(arrays), **facts}
        write_json(self.path / _FACTS, {**written, _DIGEST: digest(written)})

    def load_all(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays, mapped from the disk (what is written to them stays in memory), and the facts.

        None if there are none, or if they cannot be opened; `is_whole` compares their contents too.
        """
        try:
            facts = read_json(self.path / _FACTS)
            if facts.pop(_DIGEST) != digest(facts):
                return None
            return {name: read_npy(self.file(name), mmap_mode="c") for name in facts.pop("arrays")}, facts
        except (ClipCidError, OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    @property
    def has_facts(self) -> bool:
        """Whether `save_all` has finished once, in this version or another."""
        return (self.path / _FACTS).exists()

    def is_whole(self) -> bool:
        """Whether every array of `save_all` is there as it was written, by its digest."""
        saved = self.load_all()
        return saved is not None and all(_is_sealed(self.file(name), values) for name, values in saved[0].items())

    def save(self, name: str, values: np.ndarray) -> None:
        """Write one array that is there whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file(name)) as temporary, temporary.open("wb") as handle:
            np.save(handle, values)
            handle.write(_digest(values))

    def has(self, name: str) -> bool:
        """Whether the array is there as it was saved."""
        return self._read(name) is not None

    def load(self, name: str) -> np.ndarray:
        """One array that `save` wrote, mapped from the disk.

        Raises:
            DataError: It is not there any more, or was changed.
        """
        values = self._read(name)
        if values is None:
            raise self._changed(name)
        return values

    def view(self, name: str) -> np.ndarray:
        """As `load`, without a look at the digest, which would read the whole file.

        Raises:
            DataError: It is not there any more, or cut short.
        """
        try:
            return read_npy(self.file(name), mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._changed(name) from error

    def drop(self, names: Iterable[str]) -> None:
        """Remove arrays, those that are there."""
        for name in names:
            self.file(name).unlink(missing_ok=True)

    def _changed(self, name: str) -> DataError:
        return DataError(
            f"{self.file(name)}: changed since it was written.",
            fix="Run the same command again; what is missing is done again.",
        )

    def clear(self) -> None:
        """Remove all arrays; the facts first, so that a kill in the middle leaves nothing that counts."""
        (self.path / _FACTS).unlink(missing_ok=True)
        for path in self.path.glob("*.npy"):
            path.unlink()

    def _read(self, name: str) -> np.ndarray | None:
        try:
            values = read_npy(self.file(name), mmap_mode="c")
            return values if _is_sealed(self.file(name), values) else None
        except (OSError, ValueError):
            return None

    def file(self, name: str) -> Path:
        """Where an array is, or would be."""
        return self.path / f"{name}.npy"


def save_array(path: Path, values: np.ndarray) -> None:
    """Write one .npy that is there whole or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, values)


def _seal(path: Path, values: np.ndarray) -> None:
    """Write the digest behind an array that is in its place, on disk for good."""
    with path.open("r+b") as handle:
        handle.seek(0, os.SEEK_END)
        handle.write(_digest(values))
        handle.flush()
        os.fsync(handle.fileno())


def _is_sealed(path: Path, values: np.ndarray) -> bool:
    seal = _digest(values)
    with path.open("rb") as handle:
        handle.seek(-len(seal), os.SEEK_END)
        return handle.read() == seal


def _digest(values: np.ndarray) -> bytes:
    """SHA-256 of kind, shape and numbers."""
    sha256 = hashlib.sha256(repr((values.dtype.str, values.shape)).encode())
    sha256.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return sha256.digest()
