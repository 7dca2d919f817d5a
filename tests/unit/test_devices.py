"""Work ahead of the host, and copies to a device."""

import pytest
import torch

from clip_cid.devices import Copies, Returning, one_ahead


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_on_a_device_the_next_item_is_begun_before_one_is_given(device: str, count: int):
    happened: list[str] = []

    def begin(item: int) -> int:
        happened.append(f"begin {item}")
        return item

    for item in one_ahead(range(count), begin, torch.device(device)):
        happened.append(f"use {item}")

    on_the_processor = [f"{what} {item}" for item in range(count) for what in ("begin", "use")]
    ahead = ["begin 0", *(text for n in range(1, count) for text in (f"begin {n}", f"use {n - 1}"))]
    on_a_device = [*ahead, f"use {count - 1}"] if count else []
    assert happened == (on_the_processor if device == "cpu" else on_a_device)


def test_what_is_there_is_not_copied():
    values = torch.arange(3.0)
    assert Copies(torch.device("cpu"))(values) is values


def test_what_comes_back_from_the_processor_is_not_copied():
    values = torch.arange(3.0)
    assert Returning(values).here() is values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_comes_back_from_cuda_is_whole_while_the_device_works():
    busy = torch.randn(4096, 4096, device="cuda")
    returning: list[Returning] = []
    for number in range(20):
        busy = busy @ busy / 64
        values = torch.full((1 << 20,), float(number), device="cuda")
        returning.append(Returning(values))
        values.fill_(-1.0)  # what was sent must not follow
        del values
    for number, values in enumerate(returning):
        assert bool((values.here() == number).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_to_cuda_arrive_whole_while_the_device_works():
    device = torch.device("cuda")
    copies, busy = Copies(device), torch.randn(4096, 4096, device=device)
    for number in range(20):
        busy = busy @ busy / 64
        values = torch.full((1 << 20,), float(number))
        there = copies(values)
        values.fill_(-1.0)  # what was sent must not follow
        assert float(there.mean()) == number
