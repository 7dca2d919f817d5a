"""Numbers in the forms that people have them in Python: tensors, data frames, lists. What cannot be read is named."""

import operator
import os
from typing import Any

import numpy as np

_FLOATS_OF_BOTH = ("torch.float16", "torch.float32", "torch.float64")

ArrayLike = Any
"""An array, or numbers in a form that `as_array` reads."""


def as_array(given: ArrayLike, *, name: str) -> Any:
    """The same numbers as an array.

    A tensor may be on a device, need gradients, or be in bfloat16, which becomes float32. Of a data frame all columns
    are taken, or its only one if that holds vectors. A list may hold rows of any of these forms. Anything else with a
    shape is left as it is, unread.

    Args:
        given: The numbers.
        name: What to call them in an error.

    Raises:
        ValueError: It is a path, not numbers, has rows of several lengths, or has values that are masked or missing.
    """
    if isinstance(given, str | os.PathLike):
        raise ValueError(f"{name} must be an array, got the path {str(given)!r}; load it first, as by np.load")
    if isinstance(given, np.ma.MaskedArray):
        raise ValueError(f"{name} must be a plain array, got a masked one; fill or leave out what is masked")

    if hasattr(given, "detach"):
        return _of_tensor(given, name)
    if hasattr(given, "to_numpy"):
        return _of_table(given, name)
    if isinstance(given, list | tuple):
        return _of_list(given, name)
    if not hasattr(given, "shape") or hasattr(given, "schema"):  # a table of pyarrow has both
        raise ValueError(f"{name} must be an array, got {type(given).__name__}{_way_out(given, name)}")
    return given


def as_whole_number(given: Any, *, name: str, least: int | None = None) -> int:
    """The number as Python's.

    Raises:
        ValueError: It is none, or below `least`.
    """
    try:
        number = operator.index(given)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {given!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _way_out(given: Any, name: str) -> str:
    """What to do with an object that holds the numbers somewhere."""
    if hasattr(given, "images"):
        return f"; give its images ({name}.images)"
    if hasattr(given, "collect"):
        return "; collect() it first"
    if hasattr(given, "schema"):
        return f"; give its column of vectors, as {name}['embedding']"
    return "; list() makes one" if hasattr(given, "__next__") else ""


def _of_table(given: Any, name: str) -> np.ndarray:
    """A data frame of pandas or polars, or a column of one or of pyarrow."""
    try:
        values = given.to_numpy()
    except ValueError:  # pyarrow, where the numbers would have to be copied
        values = given.to_numpy(zero_copy_only=False)
    if values.dtype != object:
        return values
    if values.ndim == 1:
        return as_array(list(values), name=name)
    return _of_columns(given, name) if hasattr(given, "columns") else values


def _of_columns(frame: Any, name: str) -> np.ndarray:
    """Columns of numbers of several kinds, or one column of vectors."""
    columns = {label: as_array(frame[label], name=f"{name}[{label!r}]") for label in frame.columns}
    for label, values in columns.items():
        if values.ndim == 2 and len(columns) == 1:
            return values
        if values.ndim != 1 or values.dtype.kind not in "iuf":
            what = "vectors" if values.ndim > 1 else values.dtype
            raise ValueError(
                f"{name} must be a frame of numbers, but column {label!r} has {what}; give the embedding's columns alone"
            )
    return np.stack(list(columns.values()), axis=1)


def _of_tensor(tensor: Any, name: str) -> np.ndarray:
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_floating_point() and str(plain.dtype) not in _FLOATS_OF_BOTH:
        plain = plain.float()
    try:
        return plain.cpu().numpy()
    except (TypeError, RuntimeError):
        raise ValueError(
            f"{name} must be a dense array of numbers, got a tensor of {tensor.dtype}, {tensor.layout}"
        ) from None


def _of_list(rows: Any, name: str) -> np.ndarray:
    if any(hasattr(row, "detach") or hasattr(row, "to_numpy") for row in rows):
        rows = [as_array(row, name=name) for row in rows]
    try:
        return np.asarray(rows)
    except ValueError:
        missing = next((number for number, row in enumerate(rows) if row is None), None)
        if missing is not None:
            raise ValueError(f"{name} must have a vector in each row, but row {missing} has none") from None
        raise ValueError(f"{name} must have rows of one length, got a list of several") from None
