"""What a line of the device check is, what it measures, and the rate of matrix products on this device."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from clip_cid.method.products import float32_sums, int8_product
from clip_cid.models.device import resolve_device

Kind = Literal["bf16", "fp16", "fp32", "int8"]
DTYPES: dict[Kind, torch.dtype] = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8,
}  # fmt: skip
_RATE_SECONDS = 0.4


@dataclass(frozen=True)
class Place:
    """Where a line runs, and on what size of data."""

    device: str
    tiny: bool
    work: Path

    @property
    def torch_device(self) -> torch.device:
        return resolve_device(self.device)

    @property
    def on_cuda(self) -> bool:
        return self.device != "cpu"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def __repr__(self) -> str:
        return f"{self.device}{', small data' if self.tiny else ''}"


@dataclass(frozen=True)
class Bar:
    """A number at least, or at most."""

    number: float
    least: bool = True
    unit: str = ""

    def is_met_by(self, number: float) -> bool:
        return number >= self.number if self.least else number <= self.number

    def shown(self, number: float) -> str:
        return f"{number:{',.0f' if number >= 1000 else '.3g'}}{self.unit}"

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.shown(self.number)}"


@dataclass(frozen=True)
class Outcome:
    """What a line has measured; whether it passed is not for the line to say."""

    number: float
    """To be compared with the bar."""
    holds: dict[str, bool] = field(default_factory=dict[str, bool])
    """What else must be so."""
    notes: str = ""
    not_judged: str = ""
    """Why the bar says nothing of the number here; empty if it does."""
    details: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Line:
    """One line of the check."""

    name: str
    what: str
    bar: Bar
    limit: int
    """Seconds after which its process is ended."""
    measure: Callable[[Place], Outcome]
    of_speed: bool = False
    needs_sample: bool = False


class Skipped(Exception):
    """A line cannot be measured here; the text says why."""


def matrix_rate(kind: Kind, place: Place) -> float:
    """Operations a second (two for each product) of large square matrices."""
    side = 8192 if place.on_cuda else 256
    # Of random numbers: with equal ones a device needs less power, and is faster than at any real work.
    numbers = torch.randn(2, side, side, device=place.torch_device)
    left, right = (numbers.mul(20) if kind == "int8" else numbers).to(DTYPES[kind])

    def multiply() -> None:
        _ = int8_product(left, right.T) if kind == "int8" else left @ right.T

    with float32_sums():
        for _ in range(3):
            multiply()
        place.wait()
        count, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < _RATE_SECONDS:
            for _ in range(4):
                multiply()
            place.wait()
            count += 4
    return 2 * count * side**3 / seconds
