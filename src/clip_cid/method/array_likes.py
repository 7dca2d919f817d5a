"""Numbers in the forms that people have them in Python: tensors, data frames, lists. What cannot be read is named."""

import os
from typing import Any

import numpy as np

_FLOATS_OF_BOTH = ("torch.float16", "torch.float32", "torch.float64")

ArrayLike = Any
"""An array, or numbers in a form that `as_array` reads."""


def as_array(given: ArrayLike, *, name: str) -> Any:
    """The same numbers as an array.

    A tensor may be on a device, need gradients, or be in bfloat16, which becomes float32. Of a data frame all columns
    are taken. A list may hold rows of any of these forms. Anything else with a shape is left as it is, unread.

    Args:
        given: The numbers.
        name: What to call them in an error.

    Raises:
        ValueError: It is a path, not numbers, has rows of several lengths, or has values that are masked.
    """
    if isinstance(given, str | os.PathLike):
        raise ValueError(f"{name} must be an array, got the path {str(given)!r}; load it first, as by np.load")
    if isinstance(given, np.ma.MaskedArray):
        raise ValueError(f"{name} must be a plain array, got a masked one; fill or leave out what is masked")

    if hasattr(given, "detach"):
        return _of_tensor(given, name)
    if hasattr(given, "to_numpy"):
        values = given.to_numpy()
        return as_array(list(values), name=name) if values.dtype == object and values.ndim == 1 else values
    if isinstance(given, list | tuple):
        return _of_list(given, name)
    if not hasattr(given, "shape") or hasattr(given, "schema"):  # a table of pyarrow has both
        hint = f"; give its images ({name}.images)" if hasattr(given, "images") else ""
        raise ValueError(f"{name} must be an array, got {type(given).__name__}{hint}")
    return given


def _of_tensor(tensor: Any, name: str) -> np.ndarray:
    plain = tensor.detach()
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
        raise ValueError(f"{name} must have rows of one length, got a list of several") from None
