"""Losses of a batch in blocks of rows: the dense form in float64 is the oracle."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clip_cid.method.distill.row_blocks import CrossEntropy, Divergence, RowLoss, Sigmoid, mean_over_rows

ROWS, BATCH, FIRST, DIM = 7, 23, 5, 6
TEACHER_SCALE = 9.0


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def teacher(rows: int = ROWS, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return unit_rows(rows, DIM + 2, 3), unit_rows(batch, DIM + 2, 4)


def dense_cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(FIRST, FIRST + len(logits)))


def dense_sigmoid(logits: Tensor) -> Tensor:
    own = torch.arange(logits.shape[1]) == torch.arange(FIRST, FIRST + len(logits))[:, None]
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum(dim=1).mean()


def dense_divergence(logits: Tensor) -> Tensor:
    queries, keys = teacher()
    log_p = (TEACHER_SCALE * queries @ keys.T).log_softmax(dim=1).to(logits.dtype)
    return F.kl_div(logits.log_softmax(dim=1), log_p, log_target=True, reduction="batchmean")


def divergence(dtype: torch.dtype = torch.float64) -> RowLoss:
    queries, keys = teacher()
    return Divergence(queries.to(dtype), keys.to(dtype), torch.tensor(TEACHER_SCALE, dtype=dtype))


KINDS: dict[str, tuple[Callable[[torch.dtype], RowLoss], Callable[[Tensor], Tensor]]] = {
    "cross entropy": (lambda _: CrossEntropy(), dense_cross_entropy),
    "sigmoid": (lambda _: Sigmoid(), dense_sigmoid),
    "divergence": (divergence, dense_divergence),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def found_by(loss: RowLoss, values: Sequence[Tensor], block_rows: int | None = None) -> Tensor:
    queries, keys, scale, bias = values
    return mean_over_rows(loss, queries, keys, FIRST, scale, bias, block_rows=block_rows)


def inputs(dtype: torch.dtype = torch.float64, scale: float = 7.0) -> list[Tensor]:
    values = [unit_rows(ROWS, DIM, 0), unit_rows(BATCH, DIM, 1), torch.tensor(scale), torch.tensor(-2.0)]
    return [value.to(dtype).requires_grad_() for value in values]


@each_kind
@pytest.mark.parametrize("block_rows", [1, 3, ROWS, 100, None])
def test_loss_and_gradients_are_those_of_the_dense_form(kind: str, block_rows: int | None):
    make, dense = KINDS[kind]
    results = []
    for blocked in (True, False):
        values = inputs()
        found = found_by(make(torch.float64), values, block_rows) if blocked else dense(_logits(values))
        results.append((found, *torch.autograd.grad(3 * found, values, materialize_grads=True)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-13)


@each_kind
def test_it_passes_autograds_own_check(kind: str):
    loss = KINDS[kind][0](torch.float64)
    assert torch.autograd.gradcheck(lambda *values: found_by(loss, values, 3), inputs())


@each_kind
@pytest.mark.parametrize("scale", [7.0, 100.0])
def test_float32_is_the_dense_form_to_a_millionth(kind: str, scale: float):
    """Against float64 dense, at most what rounding of the logits alone can do."""
    make, dense = KINDS[kind]
    exact = dense(_logits(inputs(scale=scale))).detach()
    values = inputs(torch.float32, scale)
    found = found_by(make(torch.float32), values, 3)
    rounding = 4 * torch.finfo(torch.float32).eps * (scale + TEACHER_SCALE)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-6, abs=rounding)


def _logits(values: list[Tensor]) -> Tensor:
    queries, keys, scale, bias = values
    return scale * queries @ keys.T + bias


@each_kind
def test_only_what_requires_a_gradient_gets_one(kind: str):
    loss = KINDS[kind][0](torch.float64)
    for wanted in range(4):
        values = [value.requires_grad_(place == wanted) for place, value in enumerate(inputs())]
        found_by(loss, values).backward()
        assert [value.grad is not None for value in values] == [place == wanted for place in range(4)]


@each_kind
def test_without_gradients_it_is_the_same_number_and_there_is_no_second_derivative(kind: str):
    loss, values = KINDS[kind][0](torch.float64), inputs()
    found = found_by(loss, values)
    with torch.no_grad():
        alone = found_by(loss, values)
    assert not alone.requires_grad
    assert alone.item() == found.item()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found, values[0], create_graph=True)


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return made


@each_kind
def test_no_tensor_is_of_all_rows_with_all_rows(kind: str):
    batch, dim, block_rows = 300, 8, 10
    queries, keys = (unit_rows(batch, dim, seed).requires_grad_() for seed in (0, 1))
    loss = (
        Divergence(*teacher(batch, batch), torch.tensor(9.0)) if kind == "divergence" else KINDS[kind][0](torch.float64)
    )
    with _Largest() as made:
        found = mean_over_rows(loss, queries, keys, 0, torch.tensor(5.0).double(), block_rows=block_rows)
        found.backward()
    assert made.elements == max(block_rows * batch, batch * (dim + 2))


def test_a_pair_that_is_found_keeps_its_digits():
    """Own logits of 40, the other's 0: log(1 + e^-40), which log-sum-exp less the own logit rounds to 0 in float32."""
    rows = torch.eye(2).requires_grad_()
    found = mean_over_rows(CrossEntropy(), rows, torch.eye(2), 0, torch.tensor(40.0))
    assert found.item() == pytest.approx(math.exp(-40), rel=1e-5)
    found.backward()
    assert rows.grad is not None
    assert rows.grad[0].tolist() == pytest.approx([-20 * math.exp(-40), 20 * math.exp(-40)], rel=1e-5)


@pytest.mark.parametrize("noise", [3e-4, 3e-3, 3e-2, 0.3, 3.0])
def test_the_divergence_keeps_its_digits_in_float32(noise: float):
    """From 1e-8 to several nats: the same rows in both precisions, teacher and student read through one product."""
    queries, keys = unit_rows(64, 32, 0).float(), unit_rows(64, 32, 1).float()
    moved = F.normalize(queries + noise * unit_rows(64, 32, 2).float(), dim=1)
    results = []
    for dtype in (torch.float32, torch.float64):
        student = moved.detach().clone().to(dtype).requires_grad_()
        loss = Divergence(queries.to(dtype), keys.to(dtype), torch.tensor(20.0, dtype=dtype))
        found = mean_over_rows(loss, student, keys.to(dtype), 0, torch.tensor(20.0, dtype=dtype))
        found.backward()
        results.append((found.double(), student.grad.double()))  # pyright: ignore[reportOptionalMemberAccess]
    (found, slopes), (exact, exact_slopes) = results
    gap = 20 * noise  # the scale of what student and teacher differ by; the logits are rounded to some 1e-6 of 20
    rounding = 20 * torch.finfo(torch.float32).eps / min(gap, 1)
    assert found.item() == pytest.approx(exact.item(), rel=20 * rounding)
    assert float((slopes - exact_slopes).norm() / exact_slopes.norm()) < 20 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_who_is_sure_of_what_the_teacher_excludes(dtype: torch.dtype):
    """The teacher gives its pair e^-200 less than nothing else: the loss is the difference of the logits, by hand."""
    queries, keys = torch.eye(2, dtype=dtype), torch.eye(2, dtype=dtype)
    student = queries.flip(0).clone().requires_grad_()
    loss = Divergence(queries, keys, torch.tensor(200.0, dtype=dtype))
    found = mean_over_rows(loss, student, keys, 0, torch.tensor(200.0, dtype=dtype))
    assert found.item() == pytest.approx(200, rel=1e-6)
    found.backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([-100, 100], rel=1e-6)  # (q - p) * 200 / 2 rows


@each_kind
def test_one_pair_alone(kind: str):
    """A batch of one has no negatives; nothing is divided by 0."""
    row = unit_rows(1, DIM, 0).requires_grad_()
    loss = Divergence(*teacher(1, 1), torch.tensor(9.0)) if kind == "divergence" else KINDS[kind][0](torch.float64)
    found = mean_over_rows(loss, row, row.detach(), 0, torch.tensor(5.0).double())
    expected = math.log1p(math.exp(-5)) if kind == "sigmoid" else 0.0
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=0)
    found.backward()
    assert row.grad is not None
    assert bool(row.grad.isfinite().all())
    assert bool((row.grad != 0).any()) == (kind == "sigmoid")


@each_kind
def test_rows_that_are_no_numbers_are_not_hidden(kind: str):
    values = inputs()
    with torch.no_grad():
        values[0][2, 1] = math.nan
    assert math.isnan(found_by(KINDS[kind][0](torch.float64), values).item())
