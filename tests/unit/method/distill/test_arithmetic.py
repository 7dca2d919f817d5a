"""Losses in the arithmetic of a device, on the CPU: products of rows rounded to bfloat16, and nothing of a logit in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clip_cid.method.distill import fused_cluster_loss, row_blocks
from clip_cid.method.distill.arithmetic import Arithmetic, arithmetic_of, loss_precision
from clip_cid.method.distill.contrastive import Side, contrastive_loss
from clip_cid.method.distill.fused_cluster_loss import cluster_losses, soft_centers
from clip_cid.method.distill.peer_losses import affinity_loss, siglip_loss
from clip_cid.method.products import product

ROWS, CENTERS, DIM, SCALE = 24, 700, 48, 16.0
AWAY = {"1e-6": 4e-3, "1e-4": 0.04, "1e-2": 0.3, "1": 1.6, "10": -3.0}
"""How far the student is from its teacher, by the divergence that comes of it."""
ON_DEVICE = {
    "float32": Arithmetic(None, torch.float32),
    "bf16": Arithmetic(torch.bfloat16, torch.float32),
}
BOUNDS = {"float32": (1e-5, 5e-5), "bf16": (3e-3, 1.5e-2)}
"""Of the losses and of their gradients, relative; what benchmarks/loss_precision.py finds is below."""
each_arithmetic = pytest.mark.parametrize("name", ON_DEVICE)


def unit_rows(rows: int, seed: int, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def batch(away: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, centers and labels, exactly as float32 holds them."""
    centers, labels = unit_rows(CENTERS, 0), torch.arange(ROWS) * 7
    teacher = F.normalize(centers[labels] + 0.7 * unit_rows(ROWS, 1), dim=1)
    student = F.normalize(teacher + away * (teacher if away < 0 else unit_rows(ROWS, 2)), dim=1)
    return student.float(), teacher.float(), centers.float(), labels


def exact(student: Tensor, teacher: Tensor, centers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses from all logits, by autograd."""
    log_p = (SCALE * teacher @ centers.detach().T).log_softmax(dim=1)
    log_q = (SCALE * student @ centers.T).log_softmax(dim=1)
    return F.nll_loss(log_q, labels), F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@each_arithmetic
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("divergence", AWAY)
def test_losses_and_gradients_are_near_those_of_float64(
    name: str, trained: bool, divergence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fused_cluster_loss, "arithmetic_of", lambda rows: ON_DEVICE[name])
    student, teacher, centers, labels = batch(AWAY[divergence])
    inputs = [student.requires_grad_(), *([centers.requires_grad_()] if trained else [])]
    found = cluster_losses(student, centers, labels, teacher=teacher, scale=SCALE, block_centers=190)
    right_inputs = [value.detach().double().requires_grad_() for value in inputs]
    right_centers = right_inputs[1] if trained else centers.double()
    right = exact(right_inputs[0], teacher.double(), right_centers, labels)
    assert float(divergence) / 3 < right[1].item() < 3 * float(divergence)

    of_losses, of_gradients = BOUNDS[name]
    for loss, right_loss in zip((found.cls, found.kl), right, strict=True):
        assert loss is not None
        assert loss.item() == pytest.approx(right_loss.item(), rel=of_losses)
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        right_gradients = torch.autograd.grad(right_loss, right_inputs, retain_graph=True)
        for gradient, right_gradient in zip(gradients, right_gradients, strict=True):
            assert error(gradient, right_gradient) < of_gradients


def test_a_center_that_weighs_nothing_for_the_teacher_and_all_for_the_student_counts():
    """e^-120 of the teacher's: nothing in float32."""
    teacher, centers = torch.eye(2)[:1], torch.eye(2)
    student = torch.eye(2)[1:].requires_grad_()
    with loss_precision("bf16"):
        found = cluster_losses(student, centers, torch.zeros(1, dtype=torch.long), teacher=teacher, scale=120.0)
    assert found.kl is not None
    assert found.kl.item() == pytest.approx(120.0)
    found.kl.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-120.0, 120.0]]))


BATCH_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "contrastive": (
        lambda a, b: contrastive_loss(a, b, torch.tensor(20.0)),
        lambda z, own: (F.cross_entropy(20 * z, own) + F.cross_entropy(20 * z.T, own)) / 2,
    ),
    "siglip": (
        lambda a, b: siglip_loss(a, b, torch.tensor(20.0), torch.tensor(-5.0)),
        lambda z, own: -F.logsigmoid((20 * z - 5) * (2 * torch.eye(len(z)).double() - 1)).sum(dim=1).mean(),
    ),
}


@pytest.mark.parametrize("loss", BATCH_LOSSES)
@each_arithmetic
def test_losses_of_a_batch_are_near_those_of_float64(name: str, loss: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_blocks, "arithmetic_of", lambda rows: ON_DEVICE[name])
    blocked, dense = BATCH_LOSSES[loss]
    values = [unit_rows(40, seed).float().requires_grad_() for seed in (0, 1)]
    right_values = [value.detach().double().requires_grad_() for value in values]
    found, right = blocked(*map(Side.whole, values)), dense(right_values[0] @ right_values[1].T, torch.arange(40))
    assert found.item() == pytest.approx(right.item(), rel=BOUNDS[name][0])
    for gradient, right_gradient in zip(
        torch.autograd.grad(found, values), torch.autograd.grad(right, right_values), strict=True
    ):
        assert error(gradient, right_gradient) < BOUNDS[name][1]


def small_divergences() -> list[Tensor]:
    """Of soft centers and of the affinity: differences of nearly equal products."""
    student, teacher, centers, labels = batch(AWAY["1e-6"])
    soft = soft_centers(teacher, centers, scale=SCALE)
    kl = cluster_losses(student, centers, labels, teacher=soft, scale=SCALE).kl
    assert kl is not None
    texts, scale = Side.whole(centers[:ROWS]), torch.tensor(10.0)
    return [kl, affinity_loss(Side.whole(student), texts, scale, Side.whole(teacher), texts, scale)]


def test_products_that_cancel_afterwards_are_not_rounded():
    expected = small_divergences()
    with loss_precision("bf16"):
        found = small_divergences()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


class _Float64OfLogits(TorchDispatchMode):
    """Refuses results, and sums, in float64 of more numbers than rows have."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        wide = [value for value in (made, *args) if isinstance(value, Tensor) and value.numel() > self._most]
        if wide and isinstance(made, Tensor):
            assert made.dtype != torch.float64, f"{func} in float64 of {wide[0].numel()} numbers"
        return made


@each_arithmetic
def test_a_device_computes_nothing_of_a_logit_in_float64(name: str, monkeypatch: pytest.MonkeyPatch):
    for module in (fused_cluster_loss, row_blocks):
        monkeypatch.setattr(module, "arithmetic_of", lambda rows: ON_DEVICE[name])
    student, teacher, centers, labels = batch(AWAY["1"])
    student.requires_grad_()
    several = torch.stack([labels, labels + 1], dim=1)
    sides, texts = Side.whole(student), Side.whole(centers[: 3 * ROWS][-ROWS:])
    with _Float64OfLogits(ROWS * DIM):
        every: tuple[dict[str, Any], ...] = ({}, {"ignore_near": 0.3}, {"teacher": None}, {"temperature": 2.0})
        for options in every:
            given: dict[str, Any] = {"teacher": teacher} | options
            for weights in (centers, centers.clone().requires_grad_()):
                found = cluster_losses(student, weights, several, **given, scale=SCALE)
                (found.cls if found.kl is None else found.cls + found.kl).backward()
        affinity_loss(sides, texts, torch.tensor(9.0), Side.whole(teacher), texts, torch.tensor(9.0)).backward()
        contrastive_loss(sides, texts, torch.tensor(9.0)).backward()


def test_a_rounded_product_is_that_of_the_rounded_values():
    left, right = unit_rows(9, 0).float(), unit_rows(5, 1).float().T
    found = product(left, right, rounded_to=torch.bfloat16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), left.bfloat16().double() @ right.bfloat16().double(), rtol=1e-6, atol=1e-7
    )
    assert not torch.equal(found, product(left, right))


def test_the_processor_computes_in_float32_unless_it_is_told_and_float64_stays():
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert arithmetic_of(single) == Arithmetic(None, torch.float64)
    with loss_precision("bf16"):
        assert arithmetic_of(single) == Arithmetic(torch.bfloat16, torch.float32)
        assert arithmetic_of(double) == Arithmetic(None, torch.float64)
        with loss_precision("fp32"):
            assert arithmetic_of(single) == Arithmetic(None, torch.float64)
    assert arithmetic_of(torch.zeros(1, device="meta")) == Arithmetic(None, torch.float32)
