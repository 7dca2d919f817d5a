import pytest
import torch

from clip_cid.method.products import LeftRows, product


def drawn(rows: int, dim: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("rows", "others", "dim"), [(1, 1, 1), (3, 5, 7), (64, 33, 48)])
def test_products_are_those_of_float64(monkeypatch, dtype, onednn, rows, others, dim):
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    a, b = drawn(rows, dim, 0, dtype), drawn(others, dim, 1, dtype)
    exact = a.double() @ b.double().T
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(LeftRows(a).times(b), exact.to(dtype), rtol=bound, atol=bound * dim)
    torch.testing.assert_close(product(a, b.T), exact.to(dtype), rtol=bound, atol=bound * dim)
    assert product(a, b.T).layout == torch.strided


def test_rows_that_are_views_are_multiplied_as_they_are_seen():
    whole = drawn(10, 6, 0, torch.float32)
    a, b = whole[::2], whole.T[:, 3:8].T
    torch.testing.assert_close(LeftRows(a).times(b), a @ b.T)


def test_equal_inputs_give_equal_bits():
    a, b = drawn(40, 64, 0, torch.float32), drawn(300, 64, 1, torch.float32)
    assert torch.equal(LeftRows(a).times(b), LeftRows(a.clone()).times(b.clone()))
