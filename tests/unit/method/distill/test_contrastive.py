import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid.method.distill.contrastive import Side, contrastive_loss, instance_loss, one_way_loss


def unit_rows(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(Side.whole(a), Side.whole(b), scale)


def test_two_orthogonal_pairs_by_hand():
    rows = torch.eye(2)
    assert float(loss(rows, rows, torch.tensor(3.0))) == pytest.approx(math.log(1 + math.exp(-3)))
    assert float(loss(rows, rows.flip(0), torch.tensor(3.0))) == pytest.approx(math.log(1 + math.exp(3)))


def test_one_row_of_two_by_hand():
    """The second rank's: its pair agrees, and beside it lies a text that both images like equally."""
    images, texts = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    found = contrastive_loss(Side(images[1:], images, 1), Side(texts[1:], texts, 1), torch.tensor(2.0))
    from_image, from_text = math.log(1 + math.exp(1.6 - 2)), math.log(1 + math.exp(0 - 2))
    assert float(found) == pytest.approx((from_image + from_text) / 2)


def test_it_is_the_slow_version_in_both_directions():
    a, b = unit_rows(7, 5, 0), unit_rows(7, 5, 1)
    expected = oracles.contrastive(a.numpy(), b.numpy(), 14.3)
    assert float(loss(a, b, torch.tensor(14.3))) == pytest.approx(expected, rel=1e-7)
    assert float(loss(b, a, torch.tensor(14.3))) == pytest.approx(expected, rel=1e-7)


def test_it_is_that_of_open_clip():
    from open_clip.loss import ClipLoss

    results = []
    for function in (loss, ClipLoss()):
        a, b = unit_rows(7, 5, 0).requires_grad_(), unit_rows(7, 5, 1).requires_grad_()
        scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
        value = function(a, b, scale)
        results.append((value, *torch.autograd.grad(value, (a, b, scale))))
    torch.testing.assert_close(results[0], results[1])


def test_gradients_are_right_for_both_sides_and_the_scale():
    a, b = unit_rows(4, 3, 0).requires_grad_(), unit_rows(4, 3, 1).requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (a, b, scale))


def test_one_pair_has_nothing_to_learn_from():
    assert float(loss(torch.eye(3)[:1], torch.eye(3)[1:2], torch.tensor(10.0))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32_under_autocast(dtype):
    a, b = unit_rows(16, 32, 0, dtype), unit_rows(16, 32, 1, dtype)
    scale = torch.tensor(50.0)
    plain = loss(a.float(), b.float(), scale)
    with torch.autocast("cpu", dtype=dtype):
        found = loss(a, b, scale)
    assert found.dtype == torch.float32
    assert float(found) == float(plain)


@pytest.mark.parametrize(("own", "batch", "first"), [(2, 4, 2), (1, 4, 1), (2, 5, 1), (3, 4, 1)])
def test_rows_that_are_not_of_one_pair_are_refused(own, batch, first):
    rows = unit_rows(batch, 3, 0)
    side = Side(rows[first : first + own], rows, first)
    other = Side(unit_rows(4, 3, 1)[1:3], unit_rows(4, 3, 1), 1)
    with pytest.raises(
        ValueError, match=rf"sides must be of the same rows of a batch, got .*\({first}, {own}, {batch}\)"
    ):
        contrastive_loss(side, other, torch.tensor(1.0))


def test_rows_beyond_the_batch_are_refused():
    side = Side(unit_rows(2, 3, 0), unit_rows(4, 3, 0), 3)
    with pytest.raises(ValueError, match=r"sides must be of the same rows of a batch, got .*\(3, 2, 4\)"):
        contrastive_loss(side, side, torch.tensor(1.0))


def test_a_rank_without_rows_is_refused():
    """The mean of its losses would be no number, in silence."""
    side = Side(torch.zeros(0, 3), unit_rows(4, 3, 0), 2)
    with pytest.raises(ValueError, match="sides must have rows, got none of a batch of 4"):
        contrastive_loss(side, side, torch.tensor(1.0))


def test_sides_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="sides must have one width, got 3 and 2"):
        loss(unit_rows(4, 3, 0), unit_rows(4, 2, 0), torch.tensor(1.0))


def test_the_type_of_the_queries_decides_whatever_the_keys_are_stored_in():
    rows, keys, scale = unit_rows(4, 3, 0), unit_rows(4, 3, 1), torch.tensor(9.0)
    plain = one_way_loss(Side.whole(rows), Side.whole(keys), scale)
    found = one_way_loss(Side.whole(rows), Side.whole(keys.double()), scale)
    assert torch.equal(found, plain)


def test_the_instance_loss_is_the_slow_version_in_both_directions():
    student, teacher = unit_rows(5, 4, 0), unit_rows(5, 4, 1)
    computed = instance_loss(Side.whole(student), Side.whole(teacher), torch.tensor(7.0))
    one_way = oracles.one_way(student.numpy(), teacher.numpy(), 7)
    other_way = oracles.one_way(teacher.numpy(), student.numpy(), 7)
    assert one_way != pytest.approx(other_way, rel=1e-2)
    assert float(computed) == pytest.approx((one_way + other_way) / 2, rel=1e-12)


def test_gradients_of_the_instance_loss_reach_the_student_and_the_scale_but_no_teacher():
    student = unit_rows(5, 4, 0).requires_grad_()
    teacher, all_teachers = unit_rows(5, 4, 1).requires_grad_(), unit_rows(5, 4, 1).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)

    def crossed(student: Tensor, scale: Tensor) -> Tensor:
        return instance_loss(Side.whole(student), Side(teacher, all_teachers, 0), scale)

    assert torch.autograd.gradcheck(crossed, (student, scale))
    crossed(student, scale).backward()
    assert teacher.grad is None
    assert all_teachers.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 0
