"""The laws of int8 codes on every processor."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from clip_cid.method.products import int8_products_are_right


def exact(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    product = (left.double() @ right.double()).int()
    return product if out is None else out.copy_(product)


@pytest.fixture(autouse=True, scope="session")
def _exact_int8_products() -> Iterator[None]:
    """Without VNNI instructions int8 products overflow, and no plan uses them; tests of int8 plans get exact ones."""
    with pytest.MonkeyPatch.context() as patch:
        if not int8_products_are_right():
            patch.setattr(torch, "_int_mm", exact, raising=False)
        yield
