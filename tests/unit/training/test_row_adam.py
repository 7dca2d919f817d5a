"""Adam by rows, against torch's dense one and against the textbook, row by row."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_cid.training.optimizer import RowAdam

BETAS, EPS = (0.9, 0.98), 1e-6


def table(rows: int = 7, dim: int = 5, *, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(
        torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    )


def steps(number: int, *, rows: int = 7, dim: int = 5, share: float = 0.4) -> list[tuple[Tensor, Tensor]]:
    """Rows that take part, some more than once, and their gradients; of very different sizes, as in training."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(number):
        index = (torch.rand(rows, generator=generator) < share).nonzero()[:, 0]
        index = torch.cat([index, index[: len(index) // 2]])
        size = 10 ** (4 * torch.rand(len(index), 1, generator=generator) - 3)
        found.append((index, size * torch.randn(len(index), dim, generator=generator)))
    return found


def give(weight: nn.Parameter, index: Tensor, values: Tensor) -> None:
    weight.grad = torch.sparse_coo_tensor(index[None], values.to(weight.dtype), weight.shape, check_invariants=True)


def textbook(weight: Tensor, taken: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
    """Kingma and Ba's algorithm 1 in float64, for each row by itself: the steps it takes part in are its time."""
    beta1, beta2 = BETAS
    weight = weight.detach().double().clone()
    for row in range(len(weight)):
        first, second, time = torch.zeros_like(weight[row]), torch.zeros_like(weight[row]), 0
        for index, values in taken:
            if row not in index.tolist():
                continue
            gradient = values[index == row].double().sum(dim=0)
            time += 1
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            weight[row] -= lr * (first / (1 - beta1**time)) / ((second / (1 - beta2**time)).sqrt() + EPS)
    return weight


def test_with_all_rows_in_every_step_it_is_torchs_adam():
    ours, theirs = table(), table()
    by_row = RowAdam([ours], lr=0.01, betas=BETAS, eps=EPS)
    dense = torch.optim.AdamW([theirs], lr=0.01, betas=BETAS, eps=EPS, weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        gradient = torch.randn(7, 5, generator=generator)
        order = torch.randperm(7, generator=generator)
        give(ours, order, gradient[order])
        theirs.grad = gradient
        for optimizer in (by_row, dense):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 50)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_each_row_counts_its_own_steps_as_in_the_textbook(dtype, bound):
    weight, taken = table(dtype=dtype), steps(40)
    expected = textbook(weight, taken, lr=0.01)
    optimizer = RowAdam([weight], lr=0.01, betas=BETAS, eps=EPS)
    for index, values in taken:
        give(weight, index, values)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=bound, atol=bound)
    counts = [sum(row in index.tolist() for index, _ in taken) for row in range(7)]
    assert optimizer.state[weight]["steps"].tolist() == counts
    assert len(set(counts)) > 1


def test_a_row_first_met_late_takes_a_step_of_the_learning_rate():
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = RowAdam([weight], lr=0.01, betas=(0.9, 0.999), eps=0.0)
    for step in range(200):
        give(weight, torch.tensor([0] if step < 199 else [1]), torch.full((1, 3), 5.0))
        optimizer.step()
    torch.testing.assert_close(weight[1].detach(), torch.full((3,), -0.01, dtype=torch.float64))


def test_rows_without_a_gradient_and_their_moments_do_not_change_by_a_bit():
    weight = table()
    optimizer = RowAdam([weight], lr=0.1, betas=BETAS, eps=EPS)
    give(weight, torch.arange(7), torch.ones(7, 5))
    optimizer.step()
    before = weight.detach().clone(), copy.deepcopy(dict(optimizer.state[weight]))
    give(weight, torch.tensor([5, 2]), torch.ones(2, 5))
    optimizer.step()
    others = torch.tensor([0, 1, 3, 4, 6])
    assert torch.equal(weight[others], before[0][others])
    assert not (weight[[2, 5]] == before[0][[2, 5]]).any()
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value[others], before[1][name][others])
        assert not (value[[2, 5]] == before[1][name][[2, 5]]).all()


def test_a_step_of_no_rows_changes_nothing():
    weight = table()
    before = weight.detach().clone()
    optimizer = RowAdam([weight], lr=0.1)
    give(weight, torch.zeros(0, dtype=torch.long), torch.zeros(0, 5))
    optimizer.step()
    weight.grad = None
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["steps"].tolist() == [0] * 7


def test_a_row_that_is_there_twice_has_the_sum_of_its_gradients():
    once, twice = table(), table()
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    for weight, index, gradient in (
        (once, torch.tensor([1, 4]), torch.stack([values[0] + values[2], values[1]])),
        (twice, torch.tensor([1, 4, 1]), values),
    ):
        give(weight, index, gradient)
        RowAdam([weight], lr=0.1).step()
    torch.testing.assert_close(once, twice)


def test_the_gradient_of_an_embedding_is_one_it_takes():
    weight = table()
    before = weight.detach().clone()
    F.embedding(torch.tensor([2, 2, 5]), weight, sparse=True).sum().backward()
    RowAdam([weight], lr=0.1, eps=0.0).step()
    expected = before.clone()
    expected[[2, 5]] -= 0.1
    torch.testing.assert_close(weight.detach(), expected)


def test_a_dense_gradient_is_refused():
    weight = table()
    weight.sum().backward()
    with pytest.raises(ValueError, match="sparse in the rows, got a dense one"):
        RowAdam([weight], lr=0.1).step()


@pytest.mark.resume
def test_after_a_restart_it_goes_on_bit_by_bit():
    taken = steps(12)
    whole, before = table(), table()
    uninterrupted, first = (RowAdam([weight], lr=0.1, betas=BETAS, eps=EPS) for weight in (whole, before))
    for weight, optimizer, some in ((whole, uninterrupted, taken), (before, first, taken[:6])):
        for index, values in some:
            give(weight, index, values)
            optimizer.step()
    after = nn.Parameter(before.detach().clone())
    second = RowAdam([after], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for index, values in taken[6:]:
        give(after, index, values)
        second.step()
    assert torch.equal(after, whole)
    for name, value in uninterrupted.state[whole].items():
        assert torch.equal(second.state[after][name], value)
        assert second.state[after][name].dtype == value.dtype


def test_the_closure_is_called_with_gradients_and_its_loss_returned():
    weight = table()

    def closure() -> float:
        loss = F.embedding(torch.tensor([3]), weight, sparse=True).sum()
        loss.backward()
        return loss.item()

    before = weight[3].sum().item()
    assert RowAdam([weight], lr=0.1).step(closure) == pytest.approx(before)
    assert weight[3].sum().item() == pytest.approx(before - 0.5)
