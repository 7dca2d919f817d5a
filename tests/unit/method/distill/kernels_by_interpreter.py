"""The Triton kernels of the losses, by Triton's interpreter: what they give is what PyTorch's operations give.

`test_triton_kernels.py` runs this file in a process that imports Triton as an interpreter.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid.method.distill import fused_cluster_loss, row_blocks
from clip_cid.method.distill import triton_kernels as kernels
from clip_cid.method.distill.arithmetic import Arithmetic, loss_precision
from clip_cid.method.distill.contrastive import Side, contrastive_loss
from clip_cid.method.distill.fused_cluster_loss import cluster_losses
from clip_cid.method.distill.row_blocks import CrossEntropy

ROWS, CENTERS, DIM = 3, 11, 5


@pytest.fixture(autouse=True)
def few_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_COLUMNS", 4)


def unit_rows(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


CASES: dict[str, dict[str, Any]] = {
    "both losses": {},
    "cross entropy": {"teacher": None},
    "a temperature": {"temperature": 2.0},
    "several labels, near centers": {"labels": torch.tensor([[0, 4], [5, 1], [10, 3]]), "ignore_near": 0.3},
    "a sample": {"log_inclusion": -torch.arange(CENTERS) / 9.0, "logq": "both"},
    "near its teacher": {"teacher": F.normalize(unit_rows(ROWS, 1) + 1e-3 * unit_rows(ROWS, 4), dim=1)},
    "far from its teacher": {"teacher": -unit_rows(ROWS, 1), "scale": 90.0},
}


def by(triton_is_used: bool, case: str, *, trained: bool, patch: pytest.MonkeyPatch) -> list[Tensor]:
    """Losses and gradients, by kernels or as the CPU computes them."""
    kind = Arithmetic(None, torch.float32, True) if triton_is_used else Arithmetic(None, torch.float64)
    patch.setattr(fused_cluster_loss, "arithmetic_of", lambda rows: kind)
    student, centers = unit_rows(ROWS, 1).requires_grad_(), unit_rows(CENTERS, 2).requires_grad_(trained)
    given = {"labels": torch.tensor([0, 5, 10]), "teacher": unit_rows(ROWS, 3), "scale": 12.0} | CASES[case]
    found = cluster_losses(student, centers, **given, block_centers=7)
    values = [found.cls] if found.kl is None else [found.cls, found.kl]
    gradients = torch.autograd.grad(torch.stack(values).sum(), [student, centers] if trained else [student])
    return [*(value.detach() for value in values), *gradients]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_cluster_losses_are_those_of_the_processor(case: str, trained: bool, monkeypatch: pytest.MonkeyPatch):
    found, expected = (by(used, case, trained=trained, patch=monkeypatch) for used in (True, False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_contrastive_loss_is_that_of_float64(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_blocks, "arithmetic_of", lambda rows: Arithmetic(None, torch.float32, True))
    monkeypatch.setattr(row_blocks, "_suitable_rows", lambda keys: 3)
    values = [unit_rows(rows, seed).requires_grad_() for seed in (0, 1)]
    right = [value.detach().double().requires_grad_() for value in values]
    found = contrastive_loss(Side.whole(values[0]), Side.whole(values[1]), torch.tensor(20.0))
    logits, own = 20 * right[0] @ right[1].T, torch.arange(rows)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-12)
    for one, other in zip(torch.autograd.grad(found, values), torch.autograd.grad(expected, right), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_a_small_loss_of_a_batch_keeps_its_digits():
    logits = torch.tensor([[30.0, 1.0, 0.0, -4.0, 2.0]])
    excess = kernels.cross_entropy(logits.clone(), 0)
    exact = torch.tensor([1.0, 0.0, -4.0, 2.0]).double().logsumexp(0) - 30
    assert excess.item() == pytest.approx(exact.item(), rel=1e-6)
    loss, slopes = CrossEntropy().of(logits.clone(), slice(0, 1), slice(0, 1))
    again = logits.clone()
    kernels.cross_entropy(again, 0)
    torch.testing.assert_close(again, slopes, rtol=1e-5, atol=0.0)
    assert loss.item() < 1e-11


def test_expm1_keeps_its_digits_near_0():
    """By the slopes: with p = 1 they are expm1(-v)."""
    v = torch.tensor([[1e-7, -1e-6, 1e-3, 0.2, 0.49, 0.51, 1.0, 30.0, -0.3, -0.99]])
    zeros = torch.zeros(1)
    found = kernels.kl_slopes(-v, v.clone(), zeros, zeros, (zeros, zeros))
    torch.testing.assert_close(found.double(), torch.expm1(-v.double()), rtol=1e-6, atol=0.0)


def test_blocks_that_are_not_whole_in_a_row_are_refused():
    with pytest.raises(ValueError, match="must be float32 and whole in a row"):
        kernels.cross_entropy(torch.zeros(4, 3).T, 0)


def test_bf16_and_kernels_go_together_by_name():
    student, teacher, centers = unit_rows(ROWS, 1).requires_grad_(), unit_rows(ROWS, 3), unit_rows(CENTERS, 2)
    with loss_precision("bf16", "triton"):
        found = cluster_losses(student, centers, torch.tensor([0, 5, 10]), teacher=teacher, scale=12.0)
    with loss_precision("bf16", "torch"):
        expected = cluster_losses(student, centers, torch.tensor([0, 5, 10]), teacher=teacher, scale=12.0)
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(found.cls, expected.cls, rtol=1e-5, atol=0.0)
