"""A folder of arrays, one file an array, that stays after the process ends."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import os_errors, tasks
from clip_cid.run_folder import atomic_file, read_json, write_json

_FACTS = "arrays.json"
_WINDOW_SHARE, _LARGEST_WINDOW = 1 / 8, 1 << 30  # of the memory that is left; bytes


@dataclass(frozen=True)
class ArrayFolder:
    """Arrays as `NAME.npy`; a `clip_cid.method.balance.array_store.ArrayStore`.

    It can be sent to another process, which opens the same files.
    """

    path: Path

    @property
    def window_bytes(self) -> int:
        """How many bytes of an array may be copied into memory at a time."""
        return int(min(_WINDOW_SHARE * tasks.available_memory(), _LARGEST_WINDOW))

    def new(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A new array on the disk, to be filled; its pages take memory only while they are in use.

        Raises:
            OSError: There is no room for it. Without this check a write to the map would kill the process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self._file(name)
        values = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as handle:
                try:
                    os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
                except OSError as error:  # some file systems do not know it
                    if os_errors.disk_full(error):
                        raise
        return values

    def save_all(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write each array, then the facts, which mark the folder as finished; drop every other array.

        An array that `new` made under its name is in its place already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            if isinstance(values, np.memmap) and values.filename == self._file(name).resolve():
                values.flush()
            else:
                self.save(name, values)

        write_json(self.path / _FACTS, {"arrays": sorted(arrays), **facts})

        for path in set(self.path.glob("*.npy")) - {self._file(name) for name in arrays}:
            path.unlink()

    def load_all(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays, mapped from the disk (what is written to them stays in memory), and the facts."""
        if not (self.path / _FACTS).is_file():
            return None
        facts = read_json(self.path / _FACTS)
        names = facts.pop("arrays")
        return {name: np.load(self._file(name), mmap_mode="c", allow_pickle=False) for name in names}, facts

    def save(self, name: str, values: np.ndarray) -> None:
        """Write one array that is there whole or not at all."""
        save_array(self._file(name), values)

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def load(self, name: str) -> np.ndarray:
        return np.load(self._file(name), allow_pickle=False)

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"


def save_array(path: Path, values: np.ndarray) -> None:
    """Write one .npy that is there whole or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, values)
