"""Counts the operations at which the host would wait for a device, on a machine without one.

Tensors of the CPU stand for those of a device. What would wait is known by name: every operation whose result or whose
size the host must know.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_SIZE_OR_VALUE = {
    _ATEN._local_scalar_dense,  # .item(), int(), bool()
    _ATEN.equal,
    _ATEN.is_nonzero,
    _ATEN.nonzero,
    _ATEN.masked_select,
    _ATEN._unique2,
    _ATEN.unique_dim,
    _ATEN.unique_consecutive,
    _ATEN.bincount,
    _ATEN._coalesce,
}
_BY_MASK = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}
_TO_THE_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
"""They dispatch nothing where a tensor is on the CPU already."""


class HostWaits:
    """As a context: which operations would wait, and how often; with `allowed`, any other raises where it happens."""

    def __init__(self, *allowed: str) -> None:
        self.counts: Counter[str] = Counter()
        self._allowed = allowed
        self._modes = _Dispatched(self), _Called(self)

    def __enter__(self) -> "HostWaits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, name: str) -> None:
        self.counts[name] += 1
        if self._allowed and name not in self._allowed:
            raise AssertionError(f"the host would wait for a device: {name}")


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _SIZE_OR_VALUE or (packet in _BY_MASK and _has_mask(args[1])):
            self._waits.note(packet.__name__)
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_THE_HOST:
            self._waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
