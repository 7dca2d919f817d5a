import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method import products
from clip_cid.method.products import LeftRows, product


@given(st.integers(1, 70), st.integers(0, 70), st.integers(1, 70), st.sampled_from([torch.float32, torch.float64]))
def test_a_product_of_any_shape_is_the_product(rows: int, others: int, dim: int, kind: torch.dtype) -> None:
    random = np.random.default_rng(rows * others + dim)
    left, right = random.standard_normal((rows, dim)), random.standard_normal((dim, others))
    found = product(torch.from_numpy(left).to(kind), torch.from_numpy(right).to(kind))
    assert found.dtype == kind
    np.testing.assert_allclose(found.numpy(), left @ right, atol=1e-4 if kind == torch.float32 else 1e-12)


def test_rows_meet_blocks_of_any_size() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((45, 20))
    left = LeftRows(torch.from_numpy(rows).float())
    for count in (1, 31, 32, 33, 300):
        others = random.standard_normal((count, 20))
        found = left.times(torch.from_numpy(others).float())
        np.testing.assert_allclose(found.numpy(), rows @ others.T, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_rows_of_another_width_are_refused(kind: torch.dtype) -> None:
    """Both are filled up with zeros to the same few widths, which gave products of what was there."""
    with pytest.raises(ValueError, match="others must have the width 20 of the rows, got 19"):
        LeftRows(torch.ones(3, 20, dtype=kind)).times(torch.ones(4, 19, dtype=kind))


@given(st.integers(1, 1 << 20))
def test_there_is_room_for_every_size_and_at_most_an_eighth_more(size: int) -> None:
    room = products._room(size)
    assert size <= room <= max(size + 31, size * 9 // 8)
    assert products._room(room) == room


@pytest.mark.parametrize("chosen", [True, False])
def test_sums_are_in_float32_inside_and_as_the_process_chose_outside(chosen: bool) -> None:
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction, settings.allow_tf32
    try:
        settings.allow_fp16_reduced_precision_reduction = settings.allow_tf32 = chosen
        with products.float32_sums():
            assert not settings.allow_fp16_reduced_precision_reduction
            assert not settings.allow_tf32
        assert bool(settings.allow_fp16_reduced_precision_reduction) is chosen
        assert settings.allow_tf32 is chosen
    finally:
        settings.allow_fp16_reduced_precision_reduction, settings.allow_tf32 = before


def test_few_sizes_are_shown_to_a_library_that_keeps_a_kernel_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every size up to 4,096: 8 up to 256, and 8 between a power of two and the next."""
    assert len({products._room(size) for size in range(1, 4097)}) == 8 + 4 * 8
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")
    shapes: set[tuple[int, ...]] = set()
    linear = F.linear

    def noted(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        shapes.add((*rows.shape, *others.shape))
        return linear(rows, others)

    monkeypatch.setattr(products.F, "linear", noted)
    for size in range(200, 300):
        assert product(torch.ones(size, 16), torch.ones(16, size + 1)).shape == (size, size + 1)
    assert shapes == {(rows, 32, others, 32) for rows, others in ((224, 224), (256, 256), (288, 288), (320, 320))} | {
        (rows, 32, others, 32) for rows, others in ((224, 256), (256, 288), (288, 320))
    }
