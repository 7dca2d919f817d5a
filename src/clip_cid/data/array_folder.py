"""A folder of arrays and a few words about them: complete once the words are there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid.run_folder import atomic_file, read_json, write_json

_WORDS = "arrays.json"


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray], words: Mapping[str, Any]) -> None:
    """Write `NAME.npy` for each array, then the words: a folder without them was not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        save_array(folder / f"{name}.npy", values)
    write_json(folder / _WORDS, {"arrays": sorted(arrays), **words})


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
