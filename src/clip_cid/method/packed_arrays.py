"""Several arrays in one, so that a task can leave one file with all that it has found."""

import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

_ALIGNED = 64  # bytes: an array that is mapped from the disk begins where a processor likes it
_LENGTH_BYTES = 8


def packed(arrays: Sequence[np.ndarray]) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of these arrays, after a line that says their types and shapes."""
    header = json.dumps([(values.dtype.str, values.shape) for values in arrays]).encode()
    starts = _starts(_LENGTH_BYTES + len(header), [values.nbytes for values in arrays])
    out = np.zeros(starts[-1], dtype=np.uint8)
    out[:_LENGTH_BYTES] = np.frombuffer(len(header).to_bytes(_LENGTH_BYTES, "little"), dtype=np.uint8)
    out[_LENGTH_BYTES : _LENGTH_BYTES + len(header)] = np.frombuffer(header, dtype=np.uint8)
    for start, values in zip(starts, arrays, strict=False):
        out[start : start + values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return out


def unpacked(values: UInt8[np.ndarray, " bytes"]) -> list[np.ndarray]:
    """The arrays, as views: of a mapped file only what is used is read."""
    length = int.from_bytes(values[:_LENGTH_BYTES].tobytes(), "little")
    shapes = [(np.dtype(kind), shape) for kind, shape in json.loads(values[_LENGTH_BYTES:][:length].tobytes())]
    sizes = [kind.itemsize * int(np.prod(shape)) for kind, shape in shapes]
    return [
        values[start : start + size].view(kind).reshape(shape)
        for start, size, (kind, shape) in zip(_starts(_LENGTH_BYTES + length, sizes), sizes, shapes, strict=False)
    ]


def _starts(first: int, sizes: Sequence[int]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    starts, at = [], first
    for size in sizes:
        at = -(-at // _ALIGNED) * _ALIGNED
        starts.append(at)
        at += size
    return [*starts, at]
