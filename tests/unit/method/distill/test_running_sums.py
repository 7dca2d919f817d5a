"""Sums that are put together from blocks: what is found must not depend on how the centers were divided."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clip_cid.method.distill.arithmetic import Arithmetic
from clip_cid.method.distill.running_sums import Comparison, LogSum

EXACT = Arithmetic(None, torch.float64)

CPU = torch.device("cpu")


def drawn(rows: int, columns: int, seed: int, size: float) -> Tensor:
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compared(p: Tensor, q: Tensor, widths: list[int], reference: Tensor | None = None) -> Comparison:
    """Logits of two distributions, seen in blocks of these widths."""
    found = Comparison(near(p, p - q) if reference is None else reference, EXACT)
    for a, b in zip(p.split(widths, dim=1), q.split(widths, dim=1), strict=True):
        found.add(a.clone(), a - b)
    return found


def near(p: Tensor, gaps: Tensor) -> Tensor:
    """A reference as a sample gives it: the mean gap within a tenth of the gaps' spread."""
    share = p.softmax(dim=1)
    mean = (share * gaps).sum(dim=1)
    return mean + 0.1 * (share * (gaps - mean[:, None]) ** 2).sum(dim=1).sqrt()


def divergence(p: Tensor, q: Tensor, widths: list[int]) -> Tensor:
    return compared(p, q, widths).divergence(torch.logsumexp(q.double(), dim=1))


def plain(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(p, dim=1), F.log_softmax(q, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


widths = st.lists(st.integers(1, 9), min_size=1, max_size=6)
sizes = st.floats(1e-3, 200)
seeds = st.integers(0, 10_000)


@given(seeds, widths, sizes, sizes)
def test_the_divergence_of_blocks_is_that_of_the_whole(seed, widths, size_p, size_q):
    p, q = drawn(3, sum(widths), seed, size_p), drawn(3, sum(widths), seed + 1, size_q)
    torch.testing.assert_close(divergence(p, q, widths), plain(p, q), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(compared(p, q, widths).log_total, torch.logsumexp(p, dim=1), rtol=1e-12, atol=1e-12)


@given(seeds, widths, sizes)
def test_a_distribution_is_exactly_itself_however_it_is_divided(seed, widths, size):
    p = drawn(3, sum(widths), seed, size)
    assert not divergence(p, p, widths).any()


@given(seeds, widths, sizes, st.floats(-50, 50))
def test_a_constant_in_the_logits_changes_nothing(seed, widths, size, constant):
    p, q = drawn(3, sum(widths), seed, size), drawn(3, sum(widths), seed + 1, size)
    torch.testing.assert_close(divergence(p, q + constant, widths), divergence(p, q, widths), rtol=1e-9, atol=1e-11)


@given(seeds, st.integers(1, 30), st.floats(1e-9, 1e-3))
def test_a_tiny_divergence_has_its_digits(seed, columns, size):
    """To first order it is half the variance of the gaps; of a gap of 1e-9 float64 leaves seven digits of the square."""
    p, gaps = drawn(3, columns, seed, 3.0), drawn(3, columns, seed + 1, 1.0).clamp(-3, 3) * size
    share = p.softmax(dim=1)
    variance = (share * (gaps - (share * gaps).sum(dim=1, keepdim=True)) ** 2).sum(dim=1)
    found = Comparison(near(p, gaps), EXACT)
    found.add(p.clone(), gaps.clone())
    kl = found.divergence(found.log_total - found.mean + torch.log1p(variance / 2))
    torch.testing.assert_close(kl, variance / 2, rtol=10 * size + 1e-14 / size, atol=0)


@given(seeds, widths, st.floats(0.1, 20), st.floats(-5, 5))
def test_the_reference_decides_nothing_but_rounding(seed, widths, size, moved):
    p, q = drawn(3, sum(widths), seed, size), drawn(3, sum(widths), seed + 1, size)
    found = compared(p, q, widths, near(p, p - q) + moved).divergence(torch.logsumexp(q.double(), dim=1))
    torch.testing.assert_close(found, plain(p, q), rtol=1e-9, atol=1e-11)


def test_a_block_gives_what_the_gradient_is_added_up_from():
    """Sum over the centers of (q - p) w, from parts that are rescaled as later blocks are larger."""
    p, q = drawn(3, 12, 0, 3.0), drawn(3, 12, 1, 3.0)
    table = drawn(12, 4, 2, 1.0)
    found, beside = Comparison(near(p, p - q), EXACT), torch.zeros(3, 4, dtype=torch.float64)
    for a, b, some in zip(p.split(5, dim=1), q.split(5, dim=1), table.split(5), strict=True):
        excess, shrunk = found.add(a.clone(), a - b)
        beside = beside * shrunk + excess @ some
    student_mean = q.softmax(dim=1) @ table
    slopes = beside / found.total[:, None] - found.rate(plain(p, q))[:, None] * student_mean
    torch.testing.assert_close(slopes, student_mean - p.softmax(dim=1) @ table)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("size", [50.0, 100.0, 300.0, 1000.0, 5000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_nothing_to_p_may_be_half_of_q(size, together, dtype):
    p, q = torch.tensor([[size, -size]], dtype=dtype), torch.tensor([[size, size]], dtype=dtype)
    found = divergence(p, q, [2] if together else [1, 1])
    assert float(found) == pytest.approx(math.log(2))


@given(seeds, widths, sizes, st.sampled_from([torch.float32, torch.float64]))
def test_the_logarithm_of_a_sum_does_not_depend_on_the_blocks(seed, widths, size, dtype):
    logits = drawn(3, sum(widths), seed, size).to(dtype)
    found = LogSum.empty(3, CPU)
    for block in logits.split(widths, dim=1):
        found.add(block.clone())
    expected = torch.logsumexp(logits.double(), dim=1)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.across(None), expected, rtol=bound, atol=bound)


def test_older_sums_are_shrunk_to_the_new_highest():
    """A weighted sum of something else, kept beside it, is that with the softmax in the end."""
    logits, values = drawn(3, 12, 0, 8.0), drawn(3, 12, 1, 1.0)
    found, beside = LogSum.empty(3, CPU), torch.zeros(3, 1, dtype=torch.float64)
    for block, some in zip(logits.split(5, dim=1), values.split(5, dim=1), strict=True):
        weights = block.clone()
        beside = beside * found.add(weights) + (weights * some).sum(dim=1, keepdim=True)
    mean = beside[:, 0] / found.total
    torch.testing.assert_close(mean, (logits.softmax(dim=1) * values).sum(dim=1))


def test_a_row_that_sees_nothing_has_a_sum_of_nothing_and_then_the_first_it_sees():
    found = LogSum.empty(1, CPU)
    assert found.across(None).tolist() == [-math.inf]
    found.add(torch.full((1, 3), -math.inf))
    assert found.across(None).tolist() == [-math.inf]
    found.add(torch.tensor([[2.0, -math.inf]]))
    assert found.across(None).tolist() == [2.0]
