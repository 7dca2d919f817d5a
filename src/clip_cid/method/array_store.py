"""The store of a stage's arrays: in memory, or in a folder that stays after the process ends."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

_WINDOW_BYTES = 1 << 27


@runtime_checkable
class ArrayStore(Protocol):
    """Arrays by name. `clip_cid.data.array_folder.ArrayFolder` keeps them on the disk."""

    @property
    def window_bytes(self) -> int:
        """How many bytes of an array may be copied into memory at a time."""
        ...

    def new(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array to be filled; it is kept once it is given to `save_all`."""
        ...

    def save_all(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Keep these arrays and these few words or numbers about them, and nothing else."""
        ...

    def load_all(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays and facts that `save_all` got; None if it has not finished."""
        ...

    def save(self, name: str, values: np.ndarray) -> None:
        """Keep one more array: whole or not at all."""
        ...

    def has(self, name: str) -> bool: ...

    def load(self, name: str) -> np.ndarray: ...

    def view(self, name: str) -> np.ndarray:
        """As `load`, of an array whose contents were compared before or are too large for that: a part is read."""
        ...

    def drop(self, names: Iterable[str]) -> None:
        """Forget arrays that `save` got, those that are there."""
        ...

    def clear(self) -> None: ...


class MemoryStore:
    """Arrays in the memory of this process."""

    window_bytes = _WINDOW_BYTES

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self._prepared: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None

    def new(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        return np.empty(shape, dtype=dtype)

    def save_all(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        self.clear()
        self._prepared = dict(arrays), dict(facts)

    def load_all(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        return None if self._prepared is None else (dict(self._prepared[0]), dict(self._prepared[1]))

    def save(self, name: str, values: np.ndarray) -> None:
        self._arrays[name] = values

    def has(self, name: str) -> bool:
        return name in self._arrays

    def load(self, name: str) -> np.ndarray:
        return self._arrays[name]

    view = load

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._arrays.pop(name, None)

    def clear(self) -> None:
        self._arrays.clear()
        self._prepared = None
