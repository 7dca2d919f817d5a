import math

import oracles
import pytest
import torch
import torch.nn.functional as F

from clip_cid.method.contrastive import contrastive_loss


def unit_rows(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def test_two_orthogonal_pairs_by_hand():
    rows = torch.eye(2)
    assert float(contrastive_loss(rows, rows, torch.tensor(3.0))) == pytest.approx(math.log(1 + math.exp(-3)))
    assert float(contrastive_loss(rows, rows.flip(0), torch.tensor(3.0))) == pytest.approx(math.log(1 + math.exp(3)))


def test_it_is_the_slow_version_in_both_directions():
    a, b = unit_rows(7, 5, 0), unit_rows(7, 5, 1)
    expected = oracles.contrastive(a.numpy(), b.numpy(), 14.3)
    assert float(contrastive_loss(a, b, torch.tensor(14.3))) == pytest.approx(expected, rel=1e-7)
    assert float(contrastive_loss(b, a, torch.tensor(14.3))) == pytest.approx(expected, rel=1e-7)


def test_gradients_are_right_for_both_sides_and_the_scale():
    a, b = unit_rows(4, 3, 0).requires_grad_(), unit_rows(4, 3, 1).requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive_loss, (a, b, scale))


def test_one_pair_has_nothing_to_learn_from():
    assert float(contrastive_loss(torch.eye(3)[:1], torch.eye(3)[1:2], torch.tensor(10.0))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32_under_autocast(dtype):
    a, b = unit_rows(16, 32, 0, dtype), unit_rows(16, 32, 1, dtype)
    scale = torch.tensor(50.0)
    plain = contrastive_loss(a.float(), b.float(), scale)
    with torch.autocast("cpu", dtype=dtype):
        found = contrastive_loss(a, b, scale)
    assert found.dtype == torch.float32
    assert float(found) == float(plain)
