"""A folder of arrays and a few words about them: complete once the words are there."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid.run_folder import atomic_file, disk_full, read_json, write_json

_WORDS = "arrays.json"


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray], words: Mapping[str, Any]) -> None:
    """Write `NAME.npy` for each array, then the words: a folder without them was not finished.

    An array that `new_array` made under its name is in its place already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        path = folder / f"{name}.npy"
        if isinstance(values, np.memmap) and values.filename == path.resolve():
            values.flush()
        else:
            save_array(path, values)
    write_json(folder / _WORDS, {"arrays": sorted(arrays), **words})


def new_array(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array to be filled that lies on the disk as `NAME.npy`: pages of it that are not in use take no memory.

    Raises:
        OSError: There is no room for it. Found out later, a write to the map would kill the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npy"
    values = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as handle:
            try:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
            except OSError as error:  # some file systems do not know it
                if disk_full(error):
                    raise
    return values


def has_arrays(folder: Path) -> bool:
    return (folder / _WORDS).is_file()


def load_arrays(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, mapped from the disk (what is written to them stays in memory), and the words."""
    words = read_json(folder / _WORDS)
    names = words.pop("arrays")
    return {name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in names}, words


def save_array(path: Path, values: np.ndarray) -> None:
    """Write one .npy that is there whole or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, values)
