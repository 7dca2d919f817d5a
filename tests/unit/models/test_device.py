from typing import Any

import pytest
import torch

from clip_cid.errors import ConfigError
from clip_cid.models.device import resolve_device


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_is_cuda_only_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"machine\.device"):
        resolve_device(name)


def test_a_cuda_device_becomes_the_current_one_and_its_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the current one memory is pinned, and on it Triton runs; a context on device 0 would take its memory."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    flags: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        assert resolve_device("cuda:1") == torch.device("cuda:1")
        assert [flag.allow_tf32 for flag in flags] == [False, False]
        assert current == [torch.device("cuda:1")]
        assert resolve_device("cuda") == torch.device("cuda")
        assert len(current) == 1
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
