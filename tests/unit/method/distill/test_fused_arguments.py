"""What `fused_cluster_loss` takes: tensors of any precision, on one device; all else in a line."""

import re
from typing import Any

import pytest
import torch
from jaxtyping import config as jaxtyping_config

import clip_cid

ROWS = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
GOOD = {"student": ROWS[:3], "teacher": ROWS[1:4], "centers": ROWS, "labels": torch.tensor([0, 4, 5])}


def losses(**changed: Any) -> tuple[float, float]:
    arguments = GOOD | changed
    cls, kl = clip_cid.fused_cluster_loss(*(arguments[name] for name in GOOD), scale=16.0)
    return float(cls), float(kl)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_tensors_of_any_precision(dtype: torch.dtype, labels: torch.dtype):
    changed = {name: GOOD[name].to(dtype) for name in ("student", "teacher", "centers")}
    found = losses(**changed, labels=GOOD["labels"].to(labels))
    assert found == pytest.approx(losses(), rel=0.05)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"labels": torch.tensor([0.5, 1.0, 2.0])}, "labels must be whole numbers, got torch.float32"),
        ({"labels": torch.tensor([True, False, True])}, "labels must be whole numbers, got torch.bool"),
        ({"student": GOOD["student"].to(torch.complex64)}, "student must be rows of real numbers, got torch.complex64"),
        ({"teacher": (3 * GOOD["teacher"]).int()}, "teacher must be rows of real numbers, got torch.int32"),
        ({"student": ROWS[0]}, r"student must be rows of real numbers, got torch.float32 of shape \(4,\)"),
        ({"centers": ROWS.to_sparse()}, "centers must be dense, got a tensor of torch.sparse_coo"),
        ({"teacher": GOOD["teacher"].to("meta")}, "teacher must be dense, .* on meta"),
        ({"labels": [0, 1, 2]}, "labels must be a torch.Tensor, got list"),
    ],
)
def test_what_it_cannot_read_is_refused_in_a_line(changed: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says) as error:
        unchecked(**changed)
    assert not re.search(r"\n", str(error.value))


def unchecked(**changed: Any) -> None:
    """Without the types that the tests check before the function runs."""
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        losses(**changed)
    finally:
        jaxtyping_config.update("jaxtyping_disable", before)
