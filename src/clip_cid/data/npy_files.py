"""One array in a .npy file: read as it was written, or refused in words; made with room for all of it."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from clip_cid import os_errors
from clip_cid.errors import DataError

_MAGIC = b"\x93NUMPY"


def read_npy(path: Path, *, mmap_mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """The array of numbers in a file.

    Raises:
        OSError: The file cannot be opened or read.
        ValueError: It is not a whole .npy.
    """
    with path.open("rb") as handle:
        begin = handle.read(len(_MAGIC))
    if begin != _MAGIC:
        raise ValueError("it does not begin like a .npy" if begin else "it is empty")

    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # the header is parsed as Python, so a damaged one raises nearly anything
        raise ValueError(f"it is not a whole .npy: {' '.join(str(error).split())}") from error


def read_array_of_stage(path: Path, *, mmap_mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """An array that a stage has left in its folder.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        return read_npy(path, mmap_mode=mmap_mode)
    except (OSError, ValueError) as error:
        stage, run = path.parent.name, path.parent.parent
        raise DataError(
            f"{path}: cannot be read ({error}).", fix=f"Make it again: `clip-cid {stage} {run} --force`."
        ) from error


def new_npy(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """A new array on the disk, to be filled; its pages take memory only while they are in use.

    Raises:
        OSError: There is no room for it. Without this check a write to the map would kill the process.
    """
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as handle, os_errors.named(path):
            try:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
            except OSError as error:  # some file systems do not know it
                if os_errors.disk_full(error):
                    raise
    return values
