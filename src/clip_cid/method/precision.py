"""Losses are sums of many small terms: they are computed in float32 whatever the autocast precision of the student."""

import torch
from torch import Tensor


def autocast_off(tensor: Tensor) -> torch.autocast:
    """A region in which matrix products on this tensor's device keep the precision of their inputs."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, so that gradients can be checked in it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
