"""The device that computes: CPU, CUDA or MPS."""

import functools
import platform
from pathlib import Path

import torch

from clip_cid import log
from clip_cid.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; `auto` is CUDA where there is one and the CPU elsewhere.

    It also turns TF32 off. PyTorch allows TF32 in convolutions, and some systems in all products. TF32 keeps
    11 bits, so scores and cluster losses would differ from those of the CPU. A device that is named by its number
    becomes the current one, on which Triton runs, and for which memory is pinned.

    Raises:
        ConfigError: The name is not a device, or this machine does not have it.
    """
    device = _named(name)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def _named(name: str) -> torch.device:
    if name == "auto":
        return torch.device(_automatic())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"machine.device: {name!r} is not a device.", fix=_FIX) from error

    if device.type == "cpu":
        return torch.device("cpu")

    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"machine.device is {name}, but PyTorch {torch.__version__} sees {count} CUDA devices here.",
                fix="Set machine.device: cpu, or install a PyTorch built for CUDA and check `nvidia-smi`.",
            )
        return device

    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("machine.device is mps, but this machine has none.", fix=_FIX)
        return device

    raise ConfigError(f"machine.device: {name!r} is not supported.", fix=_FIX)


_FIX = "Set machine.device to auto, cpu, cuda, cuda:1 or mps."


@functools.cache
def _automatic() -> str:
    """Choose once, and say so once."""
    if torch.cuda.is_available():
        log.info(f"device auto: cuda ({torch.cuda.get_device_name()})")
        return "cuda"
    log.info("device auto: cpu (PyTorch sees no CUDA device)")
    return "cpu"


def hardware_of(device: torch.device) -> str:
    """What decides the last bits of a model's output beside the software: the GPU, or the CPU and its instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
